"""A sweep that was recorded, and one that was compiled, against the sweep as it is written.

    python -m experiments.benchmarks.compiled_sweep

Eight schools (non-centred) and kidscore of posteriordb, with K = 1000 particles in double
precision. Prints the time that it takes to record and to compile for the first time, and once more
from Inductor's cache on disk; and what `dcpc.graphs.tiers` takes for them where it decides.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.graphs.recording import Recording
from dcpc.graphs.tiers import compile_seconds, recorded_seconds
from experiments.benchmarks.timing import describe_machine, interleaved_medians

SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """The eight schools of Rubin (1981), non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * trans, sigma), obs=y)


def kidscore(score: Tensor, iq: Tensor) -> None:
    """A child's score given the mother's, with a flat prior on the coefficients."""
    flat = dist.ImproperUniform(dist.constraints.real_vector, (), (2,))
    beta = pyro.sample("beta", flat)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("n", len(score)):
        pyro.sample("y", dist.Normal(beta[0] + beta[1] * iq, sigma), obs=score)


def children() -> tuple[Tensor, Tensor]:
    """434 scores like those of the survey: none of the times depends on them."""
    iq = 100.0 + 15.0 * torch.randn(434)
    return 25.8 + 0.6 * iq + 18.0 * torch.randn(434), iq


def sweeps(model: Callable, data: tuple, compile: bool | str, adapt: bool) -> Callable[[], None]:
    """A function that sweeps once, at an equilibrium of some sort."""
    engine = DCPC(model, num_particles=1000, compile=compile)
    state = engine.init(*data)
    for _ in range(20):
        state, _ = engine.sweep(state, *data)
    problem = engine.bind(*data)

    def sweep() -> None:
        nonlocal state
        state, _ = problem.sweep(state, adapt=adapt, retargets=False)

    return sweep


def compile_time(model: Callable, data: tuple) -> tuple[float, Recording]:
    """Seconds until the first compiled sweep is done, and what was compiled."""
    engine = DCPC(model, num_particles=1000, compile=False)
    state, _ = engine.sweep(engine.init(*data), *data)
    compiled = DCPC(model, num_particles=1000, compile=True)
    problem = compiled.bind(*data)
    start = time.perf_counter()
    problem.sweep(state, retargets=False)
    elapsed = time.perf_counter() - start
    recordings = problem.division.recordings.values()
    return elapsed, max((r.recording for r in recordings if r.recording), key=recorded_seconds)


def main() -> None:
    """Prints the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for model, data in (
            (eight_schools, tuple(x.double() for x in SCHOOLS)),
            (kidscore, children()),
        ):
            cold, recording = compile_time(model, data)
            warm, _ = compile_time(model, data)
            print(
                f"{model.__name__}, {recording.num_operators} operators: compiled in {cold:.1f} s, "
                f"and in {warm:.1f} s from the cache; estimates: "
                f"{compile_seconds(recording):.1f} s of compiling, "
                f"{1e3 * recorded_seconds(recording):.2f} ms of a recorded sweep"
            )
            for adapt in (True, False):
                plain, recorded, compiled = interleaved_medians(
                    *(sweeps(model, data, mode, adapt) for mode in (False, "auto", True)),
                    repeats=options.repeats,
                    warmup=20,
                )
                print(
                    f"  {'adapting' if adapt else 'frozen'}: as written {plain:.2f} ms, recorded "
                    f"{recorded:.2f} ms, compiled {compiled:.2f} ms; ratios {plain / recorded:.1f} "
                    f"and {plain / compiled:.1f}"
                )


if __name__ == "__main__":
    main()
