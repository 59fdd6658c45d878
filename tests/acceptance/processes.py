"""Gaussian processes, state-space models whose states are summed out, animal movement."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.nn import PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from tests.acceptance.case import Program, Reference, generator
from tests.acceptance.conjugate import assignments, grid_posterior, mixture
from tests.acceptance.ensemble import ensemble_posterior

Values = Mapping[str, Tensor]

INPUTS = torch.linspace(-2, 2, 8)
OUTPUTS = torch.sin(2 * INPUTS) + 0.2 * torch.randn(8, generator=generator(1))


# -- Gaussian processes --------------------------------------------------------------------------


def process(x, y):
    """Written out, with priors on variance, length and noise."""
    variance = pyro.sample("variance", dist.LogNormal(0.0, 1.0))
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-2.0, 1.0))
    distance = (x[:, None] - x[None]) / length
    covariance = variance * torch.exp(-0.5 * distance**2) + (noise + 1e-6) * torch.eye(len(x))
    pyro.sample(
        "y", dist.MultivariateNormal(torch.zeros(len(x)), covariance_matrix=covariance), obs=y
    )


def regression_process():
    """`pyro.contrib.gp`, its kernel's parameters given priors."""
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 0.5))
    model = gp.models.GPRegression(INPUTS, OUTPUTS, kernel, noise=torch.tensor(0.1), jitter=1e-6)
    model.noise = PyroSample(dist.LogNormal(-2.0, 1.0))
    return model.model


def _process(names: tuple[str, str, str]) -> Reference:
    x, y = INPUTS.double(), OUTPUTS.double()
    squared = (x[:, None] - x[None]) ** 2

    def log_density(at: Values) -> Tensor:
        variance, length, noise = (at[name].exp()[:, None, None] for name in names)
        covariance = variance * torch.exp(-0.5 * squared / length**2)
        covariance = covariance + (noise + 1e-6) * torch.eye(8).double()
        normal = torch.distributions.MultivariateNormal(torch.zeros(8).double(), covariance)
        prior = -0.5 * (at[names[0]] ** 2 + (at[names[1]] / 0.5) ** 2 + (at[names[2]] + 2) ** 2)
        return normal.log_prob(y) + prior

    ranges = ((-4, 4), (-2, 2), (-6, 2))
    axes = {n: torch.linspace(*ends, 50) for n, ends in zip(names, ranges, strict=True)}
    found = grid_posterior(log_density, axes)
    return Reference(
        {f"log {name}": found.mean[name] for name in names},
        {f"log {name}": found.std[name] for name in names},
    )


def _logarithms(z: Values) -> Values:
    return {f"log {name}": value.log() for name, value in z.items() if "log" not in name}


# -- state-space models, summed out by their distributions ---------------------------------------

SERIES = torch.tensor([0.4, 1.1, 0.9, 1.8, 2.2, 1.5])


def linear_series(y):
    """`GaussianHMM` of a local level that decays."""
    decay = pyro.sample("decay", dist.Uniform(0.0, 1.0))
    level = pyro.sample("level", dist.LogNormal(-1.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    one = torch.ones(1, 1)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    steps = dist.Normal(torch.zeros(1), level).to_event(1)
    errors = dist.Normal(torch.zeros(1), noise).to_event(1)
    hmm = dist.GaussianHMM(start, decay * one, steps, one, errors, duration=len(y))
    pyro.sample("y", hmm, obs=y.unsqueeze(-1))


def _linear_series() -> Reference:
    """The Kalman filter at every point of a grid."""

    def log_density(at: Values) -> Tensor:
        decay, q, r = at["decay"], (2 * at["log level"]).exp(), (2 * at["log noise"]).exp()
        mean, variance = torch.zeros_like(decay), torch.ones_like(decay)
        total = -2.0 * ((at["log level"] + 1) ** 2 + (at["log noise"] + 1) ** 2)
        for y in SERIES.tolist():
            mean, variance = decay * mean, decay**2 * variance + q
            spread = variance + r
            total = total - 0.5 * (y - mean) ** 2 / spread - 0.5 * spread.log()
            gain = variance / spread
            mean, variance = mean + gain * (y - mean), (1 - gain) * variance
        return total

    axes = {
        "decay": (torch.arange(80) + 0.5) / 80,
        "log level": torch.linspace(-3.5, 1.5, 61),
        "log noise": torch.linspace(-3.5, 1.5, 61),
    }
    return grid_posterior(log_density, axes)


def _about_series(z: Values) -> Values:
    return {"decay": z["decay"], "log level": z["level"].log(), "log noise": z["noise"].log()}


def regimes(y):
    """`DiscreteHMM` with two regimes of their own levels."""
    stay = pyro.sample("stay", dist.Beta(4.0, 1.0))
    levels = pyro.sample("levels", dist.Normal(torch.tensor([0.0, 2.0]), 0.5).to_event(1))
    rows = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    start = torch.zeros(2) - torch.tensor(2.0).log()
    hmm = dist.DiscreteHMM(start, rows.log(), dist.Normal(levels, 0.5), duration=len(y))
    pyro.sample("y", hmm, obs=y)


def _regimes() -> Reference:
    """The forward algorithm at every point of a grid."""

    def log_density(at: Values) -> Tensor:
        levels = torch.stack([at["0"], at["1"]], -1)
        move = torch.stack([at["stay"], 1 - at["stay"]], -1).log()
        rows = torch.stack([move, move.flip(-1)], -2)  # (G, from, to)
        state = torch.full_like(levels, 0.5).log()
        for y in SERIES.tolist():
            state = (state[..., None] + rows).logsumexp(-2) - 2 * (y - levels) ** 2
        prior = 3 * at["stay"].log() - 2 * at["0"] ** 2 - 2 * (at["1"] - 2) ** 2
        return state.logsumexp(-1) + prior

    axes = {
        "stay": (torch.arange(80) + 0.5) / 80,
        "0": torch.linspace(-2.5, 2.5, 61),
        "1": torch.linspace(-0.5, 4.5, 61),
    }
    found = grid_posterior(log_density, axes)

    def both(values: Values) -> dict[str, Tensor]:
        return {"stay": values["stay"], "levels": torch.stack([values["0"], values["1"]])}

    return Reference(both(found.mean), both(found.std))


# -- mixed-effects hidden Markov models of moving animals ----------------------------------------

STEPS = torch.tensor(
    [
        [[0.5, 2.0, -1.0], [1.0, 0.4, 0.3]],
        [[2.5, -1.0, 3.0], [0.2, 0.6, 1.5]],
    ]
)  # (individuals, groups, time)
ANGLES = 1.5 * torch.sin(3 * STEPS)
MISSING = -1.0
PRESENT = torch.tensor([[True, True], [True, False]])  # (individuals, groups)
LAST = torch.tensor([[3, 3], [2, 3]])
IN_TIME = PRESENT[..., None] & (torch.arange(3) < LAST[..., None])


def animals(group: str, individual: str):
    """The model with the given kinds of random effects: discrete, continuous, or none."""

    @config_enumerate
    def model(config):
        num_effects, num_states = 2, 2
        if group == "discrete":
            probs_g = pyro.param(
                "probs_e_group", lambda: config["shares"].clone(), constraint=constraints.simplex
            )
            theta_g = pyro.param("theta_group", lambda: config["theta_g"].clone())
        if individual == "discrete":
            probs_i = pyro.param(
                "probs_e_individual",
                lambda: config["shares"].expand(2, num_effects).clone(),
                constraint=constraints.simplex,
            )
            theta_i = pyro.param("theta_individual", lambda: config["theta_i"].clone())
        step_zi = pyro.param("step_zi_param", lambda: config["zero"].clone())
        rate = pyro.param(
            "step_rate", lambda: config["rate"].clone(), constraint=constraints.positive
        )
        turn = pyro.param("angle_loc", lambda: config["turn"].clone())
        gamma = torch.zeros(num_states**2)
        with pyro.plate("group", 2, dim=-1):
            if group == "discrete":
                e_g = pyro.sample("e_g", dist.Categorical(probs_g))
                gamma = gamma + Vindex(theta_g)[..., e_g, :]
            elif group == "continuous":
                gamma = gamma + pyro.sample(
                    "eps_g", dist.Normal(torch.zeros(4), torch.ones(4)).to_event(1)
                )
            with (
                pyro.plate("individual", 2, dim=-2),
                poutine.mask(mask=config["individual mask"]),
            ):
                if individual == "discrete":
                    e_i = pyro.sample("e_i", dist.Categorical(probs_i))
                    gamma = gamma + Vindex(theta_i)[..., e_i, :]
                elif individual == "continuous":
                    gamma = gamma + pyro.sample(
                        "eps_i", dist.Normal(torch.zeros(2, 4), torch.ones(2, 4)).to_event(1)
                    )
                y = torch.tensor(0).long()
                for t in pyro.markov(range(3)):
                    with poutine.mask(mask=config["time mask"][..., t]):
                        rows = gamma.reshape((*gamma.shape[:-1], num_states, num_states))
                        y = pyro.sample(f"y_{t}", dist.Categorical(logits=Vindex(rows)[..., y, :]))
                        step = config["step"][..., t]
                        is_zero = step == config["MISSING"]
                        pyro.sample(
                            f"step_zi_{t}",
                            dist.Categorical(logits=Vindex(step_zi)[..., y, :]),
                            obs=is_zero.long(),
                        )
                        pyro.sample(
                            f"step_{t}",
                            dist.MaskedMixture(
                                is_zero,
                                dist.Gamma(2.0, Vindex(rate)[..., y]),
                                dist.Delta(torch.tensor(config["MISSING"])),
                            ),
                            obs=step,
                        )
                        pyro.sample(
                            f"angle_{t}",
                            dist.VonMises(Vindex(turn)[..., y], 2.0),
                            obs=config["angle"][..., t],
                        )

    return model


CONFIG = MappingProxyType(
    {
        "shares": torch.tensor([0.3, 0.7]),
        "theta_g": torch.tensor([[1.0, 0, 0, 1.0], [-0.5, 0.5, 1.0, 0]]),
        "theta_i": torch.tensor(
            [[[0.5, 0, 0, 0.5], [0, 1.0, 1.0, 0]], [[0, 0.3, 0, 0], [0.8, 0, 0, 0.8]]]
        ),
        "zero": torch.tensor([[1.0, -1.0], [0.5, 0.0]]),
        "rate": torch.tensor([1.0, 3.0]),
        "turn": torch.tensor([0.0, 1.5]),
        "individual mask": PRESENT,
        "time mask": IN_TIME,
        "step": STEPS,
        "angle": ANGLES,
        "MISSING": MISSING,
    }
)


def _emissions() -> Tensor:
    """`log p(observations | state)`, `(individuals, groups, time, states)`; zero where masked."""
    steps, angles = STEPS.double()[..., None], ANGLES.double()[..., None]
    rate, turn = CONFIG["rate"].double(), CONFIG["turn"].double()
    zero = CONFIG["zero"].double().log_softmax(-1)
    bessel = torch.special.i0(torch.tensor(2.0).double())
    angle = 2 * torch.cos(angles - turn) - (2 * torch.pi * bessel).log()
    gamma = 2 * rate.log() + steps.clamp(min=1e-9).log() - rate * steps
    step = torch.where(steps == MISSING, zero[:, 1], zero[:, 0] + gamma)
    return torch.where(IN_TIME[..., None], step + angle, 0.0)


def _chain(gamma: Tensor, emit: Tensor, length: int) -> Tensor:
    """Joint log-density of all paths of one animal, `(*batch, states, states, states)`.

    Args:
        gamma: Logits `(*batch, states^2)` of the transitions, from row to column.
        emit: `(time, states)`.
        length: Number of steps that are not masked out; a masked state is uniform and unconnected.
    """
    rows = gamma.unflatten(-1, (2, 2)).log_softmax(-1)
    joint = (rows[..., 0, :] + emit[0])[..., :, None, None]
    joint = joint + (rows + emit[1])[..., None] if length > 1 else joint
    last = rows[..., None, :, :] + emit[2] if length > 2 else torch.zeros(2, 2, 2)
    return joint + last


def _random_effects() -> Reference:
    """All discrete effects of groups and individuals, and all paths of the states."""
    emit, theta_g, theta_i = _emissions(), CONFIG["theta_g"].double(), CONFIG["theta_i"].double()
    log_shares = CONFIG["shares"].double().log()
    effects = assignments([2] * 6)  # two groups, four individuals
    e_g, e_i = effects[:, :2], effects[:, 2:].reshape(-1, 2, 2)  # (M, groups), (M, ind., groups)
    total = log_shares[e_g].sum(1)
    states: dict[tuple[int, int], Tensor] = {}
    for i in range(2):
        for g in range(2):
            if not PRESENT[i, g]:
                continue
            gamma = theta_g[e_g[:, g]] + theta_i[g][e_i[:, i, g]]
            paths = _chain(gamma, emit[i, g], int(LAST[i, g]))
            total = total + log_shares[e_i[:, i, g]] + paths.flatten(1).logsumexp(1)
            states[i, g] = paths.flatten(1).softmax(1).unflatten(1, (2, 2, 2))
    found = mixture(total, {}, {"e_g": (e_g, 2), "e_i": (e_i, 2)})
    weight = total.softmax(0)
    shares = dict(found.probabilities)
    for t in range(3):
        table = torch.full((2, 2, 2), 0.5).double()
        for (i, g), paths in states.items():
            others = [1 + s for s in range(3) if s != t]
            table[i, g] = torch.tensordot(weight, paths.sum(others), 1)
        shares[f"y_{t}"] = table
    return Reference(probabilities=shares)


def _continuous_effects() -> Reference:
    emit = _emissions()

    def animals_at(z: Values) -> dict[tuple[int, int], Tensor]:
        return {
            (i, g): _chain(z["eps_g"][g] + z["eps_i"][i, g], emit[i, g], int(LAST[i, g]))
            for i in range(2)
            for g in range(2)
            if PRESENT[i, g]
        }

    def log_density(z: Values) -> Tensor:
        prior = -0.5 * (z["eps_g"] ** 2).sum() - 0.5 * (z["eps_i"] ** 2).sum()
        return prior + sum(paths.flatten().logsumexp(0) for paths in animals_at(z).values())

    def marginals(z: Values) -> dict[str, Tensor]:
        paths = {key: joint.flatten().softmax(0) for key, joint in animals_at(z).items()}
        tables = {}
        for t in range(3):
            others = [s for s in range(3) if s != t]
            rows = [
                torch.stack(
                    [
                        paths[i, g].unflatten(0, (2, 2, 2)).sum(others)
                        if (i, g) in paths
                        else torch.full((2,), 0.5).double()
                        for g in range(2)
                    ]
                )
                for i in range(2)
            ]
            tables[f"y_{t}"] = torch.stack(rows)
        return tables

    sites = {"eps_g": ((2, 4), constraints.real), "eps_i": ((2, 2, 4), constraints.real)}
    return ensemble_posterior(log_density, sites, lambda z: {"eps_g": z["eps_g"]}, marginals)


def _animals(name: str, group: str, individual: str, oracle: str, reference: object) -> Program:
    unseen = {f"y_{t}": ~IN_TIME[..., t] for t in range(3)} | {"e_i": ~PRESENT}
    return Program(
        f"mixed_hmm, {name}",
        "mixed_hmm/model.py",
        animals(group, individual),
        (CONFIG,),
        oracle,
        reference,
        unseen=unseen,
        remark="without the dives; two animals in two groups, three steps",
    )


def programs() -> list[Program]:
    """The rows of this family."""
    names = ("variance", "length", "noise")
    of_kernel = ("kernel.variance", "kernel.lengthscale", "noise")
    return [
        Program(
            "Gaussian process",
            "tutorial gp",
            process,
            (INPUTS, OUTPUTS),
            "grid",
            lambda: _process(names),
            quantities=_logarithms,
        ),
        Program(
            "GPRegression",
            "contrib/gp",
            regression_process(),
            (),
            "grid",
            lambda: _process(of_kernel),
            quantities=_logarithms,
        ),
        Program(
            "GaussianHMM",
            "contrib/timeseries",
            linear_series,
            (SERIES,),
            "Kalman filter on a grid",
            _linear_series,
            quantities=_about_series,
        ),
        Program(
            "DiscreteHMM",
            "dist.DiscreteHMM",
            regimes,
            (SERIES,),
            "forward algorithm on a grid",
            _regimes,
        ),
        _animals("discrete effects", "discrete", "discrete", "enumeration", _random_effects),
        _animals(
            "continuous effects",
            "continuous",
            "continuous",
            "Hamiltonian ensemble, states summed out",
            _continuous_effects,
        ),
    ]
