"""Benchmark (b): effective samples per second against Pyro's NUTS on eight schools.

    python -m experiments.benchmarks.eight_schools_nuts

Both get the same non-centred model and are scored by the same estimator
(`pyro.ops.stats.effective_sample_size`) on the worst of the ten quantities of interest, mu, tau
and theta. Set-up (compilation of NUTS, capture of DCPC), warm-up and sampling are timed apart; the
ratio is of sampling only.
"""

import argparse
import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from dcpc import DCPC
from experiments.benchmarks.timing import describe_machine

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(effects: Tensor, errors: Tensor) -> None:
    """Rubin (1981), non-centred, with the priors of posteriordb."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        deviation = pyro.sample("deviation", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * deviation, errors), obs=effects)


def worst_ess(draws: dict[str, Tensor]) -> float:
    """Smallest ESS over mu, tau and theta of draws `(chains, draws, ...)`."""
    theta = draws["mu"][..., None] + draws["tau"][..., None] * draws["deviation"]
    quantities = torch.cat([draws["mu"][..., None], draws["tau"][..., None], theta], -1)
    return float(effective_sample_size(quantities.double(), chain_dim=0, sample_dim=1).min())


def run_nuts(num_samples: int, num_warmup: int) -> tuple[float, float, float, float]:
    """ESS, seconds of compilation, of warm-up and of sampling."""

    def kernel() -> NUTS:
        return NUTS(eight_schools, jit_compile=True, ignore_jit_warnings=True)

    start = time.perf_counter()
    MCMC(kernel(), num_samples=1, warmup_steps=1, disable_progbar=True).run(EFFECTS, ERRORS)
    compilation = time.perf_counter() - start

    marks: list[float] = []

    def mark(_: NUTS, samples: object, stage: str, step: int) -> None:
        if stage.startswith("Sample") and not marks:
            marks.append(time.perf_counter())

    start = time.perf_counter()
    mcmc = MCMC(
        kernel(),
        num_samples=num_samples,
        warmup_steps=num_warmup,
        disable_progbar=True,
        hook_fn=mark,
    )
    mcmc.run(EFFECTS, ERRORS)
    end = time.perf_counter()
    ess = worst_ess(mcmc.get_samples(group_by_chain=True))
    return ess, compilation, marks[0] - start, end - marks[0]


def run_dcpc(num_particles: int, num_sweeps: int) -> tuple[float, float, float, float]:
    """ESS, seconds of capture, of annealing and warm-up, and of sampling.

    Sampling time is the difference between a whole run and the same run without sampling sweeps.
    """
    dcpc = DCPC(eight_schools, num_particles=num_particles)
    start = time.perf_counter()
    dcpc.init(EFFECTS, ERRORS)
    capture = time.perf_counter() - start

    def timed(num_sampling: int) -> tuple[float, dict[str, Tensor]]:
        begin = time.perf_counter()
        posterior = dcpc.run(
            EFFECTS,
            ERRORS,
            num_sweeps=num_sweeps + num_sampling,
            num_warmup=num_sweeps,
            keep_every=1,
            evidence=False,
            seed=0,
            progress=False,
        )
        return time.perf_counter() - begin, posterior.history

    warmup, _ = timed(0)
    total, history = timed(num_sweeps)
    return worst_ess(history), capture, warmup, total - warmup


def main() -> None:
    """Prints ESS per second of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=2000, help="draws of NUTS")
    parser.add_argument("--num-warmup", type=int, default=500, help="warm-up of NUTS")
    parser.add_argument("--num-particles", type=int, default=2048, help="particles of DCPC")
    parser.add_argument("--num-sweeps", type=int, default=300, help="sweeps of DCPC, twice")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    pyro.set_rng_seed(0)
    print(describe_machine())
    rates = []
    for name, (ess, setup, warmup, sampling) in {
        "NUTS (jit)": run_nuts(options.num_samples, options.num_warmup),
        "DCPC": run_dcpc(options.num_particles, options.num_sweeps),
    }.items():
        rates.append(ess / sampling)
        print(
            f"{name:11s} set-up {setup:5.1f} s, warm-up {warmup:5.1f} s, sampling "
            f"{sampling:5.1f} s, worst ESS {ess:8.0f}, {ess / sampling:8.0f} per second"
        )
    print(f"DCPC / NUTS: {rates[1] / rates[0]:.1f} times the effective samples per second")


if __name__ == "__main__":
    main()
