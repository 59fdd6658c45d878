"""Observations that arrive one by one: `DCPC.extend` against exact filters and Pyro's.

    python -m experiments.filtering [--num_steps 500 --num_particles 1000]

A linear-Gaussian chain against the Kalman filter, and a stochastic-volatility model against a grid
(exact to many digits in one dimension) and against Pyro's `SMCFilter`. Prints the largest error of
a filtering mean over all steps, in posterior standard deviations; that of the log evidence, and
over its reported standard error; and the time per step, in the beginning and in the end.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SMCFilter
from torch import Tensor

from dcpc import DCPC

DECAY, PROCESS, NOISE = 0.9, 0.5, 0.7
LEVEL, PERSISTENCE, VOLATILITY = -1.0, 0.97, 0.2
GRID_SIZE, GRID_HALF_WIDTH = 801, 7.0
FIRST_STEPS = 5
"""Steps that `run` infers; the others are extended by."""


def linear_gaussian(y: Tensor) -> None:
    """`x_t ~ N(.9 x_{t-1}, .5^2)`, seen with noise of .7."""
    x = None
    for t in pyro.markov(range(len(y))):
        prior = dist.Normal(0.0, 1.0) if x is None else dist.Normal(DECAY * x, PROCESS)
        x = pyro.sample(f"x_{t}", prior)
        pyro.sample(f"y_{t}", dist.Normal(x, NOISE), obs=y[t])


def stochastic_volatility(y: Tensor) -> None:
    """Log-variance `x_t ~ N(m + .97 (x_{t-1} - m), .2^2)` of a return, m = -1."""
    x = None
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", log_variance(x))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (0.5 * x).exp()), obs=y[t])


def log_variance(x: Tensor | None) -> dist.Normal:
    """The next log-variance given the last one; stationary where there is none."""
    if x is None:
        return dist.Normal(LEVEL, VOLATILITY / math.sqrt(1.0 - PERSISTENCE**2))
    return dist.Normal(LEVEL + PERSISTENCE * (x - LEVEL), VOLATILITY)


@dataclass(frozen=True)
class Filtered:
    """Filtering means and standard deviations `(T)`, log evidence, and seconds per step."""

    mean: Tensor
    std: Tensor
    log_evidence: float = math.nan
    standard_error: float = math.nan
    seconds: tuple[float, ...] = ()


def kalman_filter(y: Tensor) -> Filtered:
    """The exact filter of `linear_gaussian` (Kalman 1960)."""
    means, variances, log_evidence = [], [], 0.0
    mean, variance = 0.0, 1.0
    for t, value in enumerate(y.double().tolist()):
        if t > 0:
            mean, variance = DECAY * mean, DECAY**2 * variance + PROCESS**2
        total = variance + NOISE**2
        error = value - mean
        log_evidence -= 0.5 * (error**2 / total + math.log(2.0 * math.pi * total))
        mean, variance = mean + variance / total * error, variance * NOISE**2 / total
        means.append(mean)
        variances.append(variance)
    return Filtered(torch.tensor(means), torch.tensor(variances).sqrt(), log_evidence)


def grid_filter(y: Tensor) -> Filtered:
    """The filter of `stochastic_volatility` by sums over a fine grid."""
    grid = torch.linspace(-GRID_HALF_WIDTH, GRID_HALF_WIDTH, GRID_SIZE, dtype=torch.float64) + LEVEL
    width = float(grid[1] - grid[0])
    transition = log_variance(grid[:, None]).log_prob(grid).exp() * width
    mass = log_variance(None).log_prob(grid).exp() * width
    means, deviations, log_evidence = [], [], 0.0
    for t, value in enumerate(y.double()):
        if t > 0:
            mass = mass @ transition
        mass = mass * dist.Normal(0.0, (0.5 * grid).exp()).log_prob(value).exp()
        log_evidence += math.log(float(mass.sum()))
        mass = mass / mass.sum()
        means.append(float(mass @ grid))
        deviations.append(math.sqrt(float(mass @ (grid - means[-1]).square())))
    return Filtered(torch.tensor(means), torch.tensor(deviations), log_evidence)


def extended(model: Callable, y: Tensor, num_particles: int, seed: int) -> Filtered:
    """The filter by `DCPC.extend`, one observation after the other."""
    engine = DCPC(model, num_particles=num_particles)
    posterior = engine.run(y[:FIRST_STEPS], num_sweeps=200, seed=seed, progress=False)
    means, deviations, seconds = [], [], []
    for t in range(FIRST_STEPS, len(y)):
        begin = time.perf_counter()
        posterior = posterior.extend(y[: t + 1], seed=seed + t, progress=False)
        about = posterior.filtered()[f"x_{t}"]
        seconds.append(time.perf_counter() - begin)
        means.append(float(about["mean"]))
        deviations.append(float(about["std"]))
    return Filtered(
        torch.tensor(means),
        torch.tensor(deviations),
        float(posterior.log_evidence),
        float(posterior.log_evidence_se),
        tuple(seconds),
    )


class _Volatility:
    """`stochastic_volatility` as `SMCFilter` takes models and guides: a state, and a step."""

    def __init__(self, is_model: bool) -> None:
        self._is_model = is_model

    def init(self, state: dict, y: Tensor) -> None:
        self._t = -1
        self._go_on(state, None, y)

    def step(self, state: dict, y: Tensor) -> None:
        self._go_on(state, state["x"], y)

    def _go_on(self, state: dict, x: Tensor | None, y: Tensor) -> None:
        self._t += 1
        x = pyro.sample(f"x_{self._t}", log_variance(x))
        if self._is_model:
            state["x"] = x
            pyro.sample(f"y_{self._t}", dist.Normal(0.0, (0.5 * x).exp()), obs=y)


def smc_filter(y: Tensor, num_particles: int, seed: int) -> Filtered:
    """The filter of `stochastic_volatility` by Pyro's `SMCFilter`, with the prior as proposal."""
    pyro.set_rng_seed(seed)
    smc = SMCFilter(_Volatility(True), _Volatility(False), num_particles, 0)
    means, deviations, seconds = [], [], []
    for t, value in enumerate(y):
        begin = time.perf_counter()
        smc.init(value) if t == 0 else smc.step(value)
        about = smc.get_empirical()["x"]
        seconds.append(time.perf_counter() - begin)
        means.append(float(about.mean))
        deviations.append(float(about.variance.sqrt()))
    return Filtered(torch.tensor(means), torch.tensor(deviations), seconds=tuple(seconds))


def simulated(model: Callable, num_steps: int, seed: int) -> Tensor:
    """Data from a model, one step after the other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, num_steps, generator=generator).tolist()
    values, x = [], 0.0
    for t, (one, other) in enumerate(zip(*noise, strict=True)):
        if model is linear_gaussian:
            x = DECAY * x + PROCESS * one if t else one
            values.append(x + NOISE * other)
            continue
        prior = log_variance(torch.tensor(x) if t else None)
        x = float(prior.loc + prior.scale * one)
        values.append(math.exp(0.5 * x) * other)
    return torch.tensor(values)


def worst_error(got: Filtered, exact: Filtered) -> float:
    """Largest error of a filtering mean, in exact standard deviations, over the steps of `got`."""
    first = len(exact.mean) - len(got.mean)
    return float(((got.mean - exact.mean[first:]) / exact.std[first:]).abs().max())


def row(name: str, got: Filtered, exact: Filtered) -> str:
    """A line of the table."""
    milliseconds = [1e3 * s for s in got.seconds]
    first, last = (sum(part) / len(part) for part in (milliseconds[:50], milliseconds[-50:]))
    error = got.log_evidence - exact.log_evidence
    evidence = f"{error:.3f} | {error / got.standard_error:.2f}" if error == error else "- | -"
    worst = f"{worst_error(got, exact):.4f}"
    return f"| {name} | {len(exact.mean)} | {worst} | {evidence} | {first:.1f} | {last:.1f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(1)
    count, seed = options.num_particles, options.seed
    print("| filter | T | worst mean, sd | log evidence error | / SE | ms first 50 | ms last 50 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    y = simulated(linear_gaussian, options.num_steps, seed)
    got = extended(linear_gaussian, y, count, seed)
    print(row(f"linear-Gaussian, extend, K = {count}", got, kalman_filter(y)), flush=True)
    y = simulated(stochastic_volatility, options.num_steps, seed)
    exact = grid_filter(y)
    got = extended(stochastic_volatility, y, count, seed)
    print(row(f"volatility, extend, K = {count}", got, exact), flush=True)
    for size in (count, 100 * count):
        got = smc_filter(y, size, seed)
        print(row(f"volatility, Pyro's SMCFilter, K = {size}", got, exact), flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_steps", type=int, default=500, help="Observations.")
    parser.add_argument("--num_particles", type=int, default=1000, help="Particles (K).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the data and of the filters.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
