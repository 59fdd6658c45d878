"""posteriordb's reference posteriors, with default settings and at most joint blocks.

The reference draws are Stan's (10 chains of 1000 thinned draws each). Means must lie within .15
reference standard deviations, standard deviations within 15 %.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from dcpc import DCPC

REFERENCES = Path(__file__).parents[2] / "shared" / "refs" / "posteriordb.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(
        not REFERENCES.exists(), reason=f"needs the reference posteriors in {REFERENCES}"
    ),
]


def flat(*shape: int) -> dist.Distribution:
    return dist.ImproperUniform(constraints.real_vector, (), shape)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def eight_schools(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * trans)
        pyro.sample("y", dist.Normal(theta, tensor(data["sigma"])), obs=tensor(data["y"]))


def kidscore_momiq(data):
    beta = pyro.sample("beta", flat(2))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("n", data["N"]):
        mean = beta[0] + beta[1] * tensor(data["mom_iq"])
        pyro.sample("y", dist.Normal(mean, sigma), obs=tensor(data["kid_score"]))


def ark(data):
    y, order = tensor(data["y"]), data["K"]
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(order), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = torch.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], -1)
    with pyro.plate("t", len(y) - order):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def kilpisjarvi(data):
    alpha = pyro.sample("alpha", dist.Normal(data["pmualpha"], data["psalpha"]))
    beta = pyro.sample("beta", dist.Normal(data["pmubeta"], data["psbeta"]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("n", data["N"]):
        mean = alpha + beta * tensor(data["x"])
        pyro.sample("y", dist.Normal(mean, sigma), obs=tensor(data["y"]))


def sblri(data):
    x, y = tensor(data["X"]), tensor(data["y"])
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def gp_regr(data):
    x, y = tensor(data["x"]), tensor(data["y"])
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    squared = (x[:, None] - x).square()
    covariance = alpha**2 * (-0.5 * squared / rho**2).exp() + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


@dataclass(frozen=True)
class Reference:
    name: str
    model: Callable
    blocks: tuple[tuple[str, ...], ...] = ()


CASES = [
    Reference("eight_schools-eight_schools_noncentered", eight_schools),
    Reference("kidiq-kidscore_momiq", kidscore_momiq),
    Reference("arK-arK", ark),
    Reference("kilpisjarvi_mod-kilpisjarvi", kilpisjarvi, (("alpha", "beta"),)),
    Reference("sblri-blr", sblri),
    Reference("gp_pois_regr-gp_regr", gp_regr),
]


def labelled(name: str, draws: Tensor) -> dict[str, Tensor]:
    """Stan's names: `beta[1]` and so on for the elements of a vector."""
    if draws.dim() == 1:
        return {name: draws}
    return {f"{name}[{index + 1}]": draws[:, index] for index in range(draws.shape[1])}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_means_and_standard_deviations_are_those_of_the_reference(case):
    reference = json.loads(REFERENCES.read_text())[case.name]
    data = reference["data"]
    engine = DCPC(case.model, num_particles=1000, blocks=case.blocks)
    samples = engine.run(data, seed=0, progress=False).resample()
    if case.model is eight_schools:
        samples["theta"] = samples["mu"][:, None] + samples["tau"][:, None] * samples["theta_trans"]
    draws = {k: v for name, z in samples.items() for k, v in labelled(name, z).items()}
    for name, mean in reference["mean"].items():
        sd = reference["sd"][name]
        assert abs(float(draws[name].mean()) - mean) < 0.15 * sd, name
        assert 0.85 < float(draws[name].std()) / sd < 1.15, name
