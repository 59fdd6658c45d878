"""Cormack-Jolly-Seber models of animals that are caught, marked, and caught again.

Whether an animal is alive is a discrete latent. The mask that is to leave out the years up to the
first capture is written in place, so that Pyro takes its last state for all years: animals that are
caught at all are alive until then, and all their years inform the chance of recapture.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.nn import functional

from tests.acceptance.case import Program, Reference
from tests.acceptance.conjugate import (
    dirichlet_evidence,
    dirichlet_moments,
    grid_posterior,
    mixture,
)
from tests.acceptance.ensemble import ensemble_posterior


def constant(captures, sex):
    """One chance of survival and one of recapture."""
    num_animals, num_years = captures.shape
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", num_animals, dim=-1):
        z = torch.ones(num_animals)
        marked = torch.zeros(num_animals).bool()
        for t in pyro.markov(range(num_years)):
            with poutine.mask(mask=marked):
                alive = marked.float() * phi * z + (1 - marked.float())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=captures[:, t])
            marked |= captures[:, t].bool()


def by_year(captures, sex):
    """A chance of survival for each year."""
    num_animals, num_years = captures.shape
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    z = torch.ones(num_animals)
    marked = torch.zeros(num_animals).bool()
    animals_plate = pyro.plate("animals", num_animals, dim=-1)
    for t in pyro.markov(range(num_years)):
        phi_t = pyro.sample(f"phi_{t}", dist.Uniform(0.0, 1.0)) if t > 0 else 1.0
        with animals_plate, poutine.mask(mask=marked):
            alive = marked.float() * phi_t * z + (1 - marked.float())
            z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=captures[:, t])
        marked |= captures[:, t].bool()


def random_years(captures, sex):
    """Years as random effects on the logit of survival."""
    num_animals, num_years = captures.shape
    phi_mean = pyro.sample("phi_mean", dist.Uniform(0.0, 1.0))
    phi_sigma = pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    z = torch.ones(num_animals)
    marked = torch.zeros(num_animals).bool()
    animals_plate = pyro.plate("animals", num_animals, dim=-1)
    for t in pyro.markov(range(num_years)):
        logit = (
            pyro.sample(f"phi_logit_{t}", dist.Normal(torch.logit(phi_mean), phi_sigma))
            if t > 0
            else torch.tensor(0.0)
        )
        phi_t = torch.sigmoid(logit)
        with animals_plate, poutine.mask(mask=marked):
            alive = marked.float() * phi_t * z + (1 - marked.float())
            z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=captures[:, t])
        marked |= captures[:, t].bool()


def by_sex(captures, sex):
    """A chance of survival for each sex."""
    num_animals, num_years = captures.shape
    phi_male = pyro.sample("phi_male", dist.Uniform(0.0, 1.0))
    phi_female = pyro.sample("phi_female", dist.Uniform(0.0, 1.0))
    phi = sex * phi_male + (1.0 - sex) * phi_female
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", num_animals, dim=-1):
        z = torch.ones(num_animals)
        marked = torch.zeros(num_animals).bool()
        for t in pyro.markov(range(num_years)):
            with poutine.mask(mask=marked):
                alive = marked.float() * phi * z + (1 - marked.float())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=captures[:, t])
            marked |= captures[:, t].bool()


def by_sex_and_year(captures, sex):
    """Sex and year as effects on the logit of survival."""
    num_animals, num_years = captures.shape
    phi_beta = sex * pyro.sample("phi_beta", dist.Normal(0.0, 10.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    z = torch.ones(num_animals)
    marked = torch.zeros(num_animals).bool()
    animals_plate = pyro.plate("animals", num_animals, dim=-1)
    for t in pyro.markov(range(num_years)):
        gamma_t = pyro.sample(f"phi_gamma_{t}", dist.Normal(0.0, 10.0)) if t > 0 else 0.0
        phi_t = torch.sigmoid(phi_beta + gamma_t)
        with animals_plate, poutine.mask(mask=marked):
            alive = marked.float() * phi_t * z + (1 - marked.float())
            z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=captures[:, t])
        marked |= captures[:, t].bool()


CAPTURES = torch.tensor(
    [
        [1.0, 1, 0, 1],
        [1, 0, 1, 1],
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 1, 1],
    ]
)
SEX = torch.tensor([0.0, 1, 0, 1, 0, 1, 1, 1, 0, 0])
NUM_ANIMALS, NUM_YEARS = CAPTURES.shape


def alive_until(phi: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Likelihood, and chances of being alive, over the last year that an animal lives in.

    An animal is alive up to some last year, which is no earlier than its last capture.

    Args:
        phi: Chance of surviving into a year, `(*batch, animals, years)`.
        rho: Chance of recapture, `(*batch)`.

    Returns:
        Log-likelihood `(*batch)`, and `(*batch, animals, years)` chances.
    """
    total = torch.zeros_like(rho)
    alive = []
    for i, history in enumerate(CAPTURES.bool().tolist()):
        first = history.index(True)
        terms, states = [], []
        for last in range(first, NUM_YEARS):
            if any(history[last + 1 :]):
                continue
            term = torch.zeros_like(rho)
            for t in range(last + 1):
                if t > first:
                    term = term + phi[..., i, t].log()
                term = term + (rho.log() if history[t] else torch.log1p(-rho))
            if last + 1 < NUM_YEARS:
                term = term + torch.log1p(-phi[..., i, last + 1])
            terms.append(term)
            states.append([float(t <= last) for t in range(NUM_YEARS)])
        stacked = torch.stack(terms, -1)
        total = total + stacked.logsumexp(-1)
        alive.append(stacked.softmax(-1) @ torch.tensor(states, dtype=rho.dtype))
    return total, torch.stack(alive, -2)


def _states(phi: Tensor, rho: Tensor) -> dict[str, Tensor]:
    alive = alive_until(phi, rho)[1]
    return {f"z_{t}": torch.stack([1 - alive[..., t], alive[..., t]], -1) for t in range(NUM_YEARS)}


def _every_year(phi: Tensor) -> Tensor:
    return phi.unsqueeze(-1).expand(*phi.shape, NUM_YEARS)


def _constant() -> Reference:
    axis = (torch.arange(200).double() + 0.5) / 200

    def spread(at: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _every_year(at["phi"].unsqueeze(-1).expand(-1, NUM_ANIMALS)), at["rho"]

    return grid_posterior(
        lambda at: alive_until(*spread(at))[0],
        {"phi": axis, "rho": axis},
        lambda at: _states(*spread(at)),
    )


def _by_sex() -> Reference:
    axis = (torch.arange(60).double() + 0.5) / 60

    def spread(at: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        phi = torch.where(SEX.bool(), at["phi_male"][:, None], at["phi_female"][:, None])
        return _every_year(phi), at["rho"]

    return grid_posterior(
        lambda at: alive_until(*spread(at))[0],
        {"phi_male": axis, "phi_female": axis, "rho": axis},
        lambda at: _states(*spread(at)),
    )


def _by_year() -> Reference:
    """Over the numbers of animals that die unseen in each year, which are enough."""
    unit = torch.ones(2).double()
    per_animal = []  # for each animal, its possible last years
    for history in CAPTURES.bool().tolist():
        last = max(t for t, seen in enumerate(history) if seen)
        per_animal.append((history.index(True), list(range(last, NUM_YEARS))))
    joint = torch.cartesian_prod(*(torch.tensor(years) for _, years in per_animal))
    years = torch.arange(NUM_YEARS)
    first = torch.tensor([start for start, _ in per_animal])
    alive = years <= joint.unsqueeze(-1)  # (M, animals, years)
    after = alive & (years > first.unsqueeze(-1))
    deaths = (years == joint.unsqueeze(-1) + 1).sum(1)
    survived = torch.stack([after.sum(1), deaths], -1).double()  # (M, years, 2)
    caught = (alive & CAPTURES.bool()).sum((1, 2))
    missed = (alive & ~CAPTURES.bool()).sum((1, 2))
    recaptures = torch.stack([caught, missed], -1).double()
    log_weight = dirichlet_evidence(unit, survived).sum(-1) + dirichlet_evidence(unit, recaptures)
    moments = {"rho": tuple(m[..., 0] for m in dirichlet_moments(unit + recaptures))}
    for t in range(1, NUM_YEARS):
        moments[f"phi_{t}"] = tuple(m[..., 0] for m in dirichlet_moments(unit + survived[:, t]))
    discrete = {f"z_{t}": (alive[..., t].long(), 2) for t in range(NUM_YEARS)}
    return mixture(log_weight, moments, discrete)


def _random_years() -> Reference:
    def spread(z: Mapping[str, Tensor]) -> Tensor:
        logits = torch.stack([z[f"phi_logit_{t}"] for t in range(1, NUM_YEARS)])
        return functional.pad(logits.sigmoid(), (1, 0), value=1.0).expand(NUM_ANIMALS, -1)

    def log_density(z: Mapping[str, Tensor]) -> Tensor:
        effects = torch.stack([z[f"phi_logit_{t}"] for t in range(1, NUM_YEARS)])
        prior = dist.Normal(torch.logit(z["phi_mean"]), z["phi_sigma"], validate_args=False)
        return prior.log_prob(effects).sum() + alive_until(spread(z), z["rho"])[0]

    unit = torch.distributions.constraints.unit_interval
    ten = torch.distributions.constraints.interval(0.0, 10.0)
    real = torch.distributions.constraints.real
    supports = {"phi_mean": unit, "phi_sigma": ten, "rho": unit}
    supports |= {f"phi_logit_{t}": real for t in range(1, NUM_YEARS)}
    return ensemble_posterior(
        log_density,
        {name: ((), support) for name, support in supports.items()},
        marginals=lambda z: _states(spread(z), z["rho"]),
    )


def _by_sex_and_year() -> Reference:
    def spread(z: Mapping[str, Tensor]) -> Tensor:
        logits = torch.stack([z[f"phi_gamma_{t}"] for t in range(1, NUM_YEARS)])
        phi = (SEX.unsqueeze(-1) * z["phi_beta"] + logits).sigmoid()
        return functional.pad(phi, (1, 0), value=0.5)

    def log_density(z: Mapping[str, Tensor]) -> Tensor:
        effects = [z["phi_beta"], *(z[f"phi_gamma_{t}"] for t in range(1, NUM_YEARS))]
        return -torch.stack(effects).square().sum() / 200 + alive_until(spread(z), z["rho"])[0]

    unit = torch.distributions.constraints.unit_interval
    real = torch.distributions.constraints.real
    names = ["phi_beta", *(f"phi_gamma_{t}" for t in range(1, NUM_YEARS))]
    return ensemble_posterior(
        log_density,
        {"rho": ((), unit), **{name: ((), real) for name in names}},
        marginals=lambda z: _states(spread(z), z["rho"]),
    )


def programs() -> list[Program]:
    """The rows of this family."""
    data, source = (CAPTURES, SEX), "capture_recapture/cjs.py"
    grid = "grid, lifetimes enumerated"
    sampled = "Hamiltonian ensemble, lifetimes enumerated"
    rows = [
        ("cjs 1", constant, grid, _constant),
        ("cjs 2", by_year, "lifetimes enumerated, conjugate given them", _by_year),
        ("cjs 3", random_years, sampled, _random_years),
        ("cjs 4", by_sex, grid, _by_sex),
        ("cjs 5", by_sex_and_year, sampled, _by_sex_and_year),
    ]
    return [
        Program(
            name,
            source,
            model,
            data,
            oracle,
            reference,
            num_particles=1500,
            remark="none; its masks count as they are at the end of the run, in Pyro as well",
        )
        for name, model, oracle, reference in rows
    ]
