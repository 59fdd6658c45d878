"""The models of posteriordb's reference posteriors in Pyro, and the names of their quantities."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

FOLDER = Path(__file__).parents[2] / "shared" / "refs"
FILES = ("posteriordb.json", "posteriordb_hard.json")


def references(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """All reference posteriors by name."""
    files = [json.loads((folder / name).read_text()) for name in FILES]
    return {k: v for found in files for k, v in found.items() if k != "about"}


def flat(*shape: int) -> dist.Distribution:
    return dist.ImproperUniform(constraints.real_vector, (), shape)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.get_default_dtype())


def positive() -> dist.Distribution:
    return dist.ImproperUniform(constraints.positive, (), ())


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
    sigma = pyro.sample("sigma", positive())
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


def low_dim_gauss_mix(data):
    """Ordered locations: flat on ordered vectors, with their prior as a factor."""
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    choice = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("n", data["N"]):
        mixture = dist.MixtureSameFamily(choice, dist.Normal(mu, sigma))
        pyro.sample("y", mixture, obs=tensor(data["y"]))


def pilots(data):
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 1.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 1.0))
    sigma_a, sigma_b, sigma_y = (
        pyro.sample(f"sigma_{name}", dist.Uniform(0.0, 100.0)) for name in "aby"
    )
    with pyro.plate("groups", data["n_groups"]):
        a = pyro.sample("a", dist.Normal(10 * mu_a, sigma_a))
        pyro.deterministic("za", (a - 10 * mu_a) / sigma_a)
    with pyro.plate("scenarios", data["n_scenarios"]):
        b = pyro.sample("b", dist.Normal(10 * mu_b, sigma_b))
        pyro.deterministic("zb", (b - 10 * mu_b) / sigma_b)
    group, scenario = (torch.tensor(data[f"{k}_id"]) - 1 for k in ("group", "scenario"))
    with pyro.plate("n", data["N"]):
        pyro.sample("y", dist.Normal(a[group] + b[scenario], sigma_y), obs=tensor(data["y"]))


def surgical(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    variance = pyro.sample("sigmasq", dist.InverseGamma(tensor(0.001), tensor(0.001)))
    pyro.deterministic("ls2", variance.log())
    with pyro.plate("hospitals", data["N"]):
        b = pyro.sample("b", dist.Normal(mu, variance.sqrt()))
        n = tensor(data["n"])
        pyro.sample("r", dist.Binomial(n, logits=b), obs=tensor(data["r"]))


def earn_height(data):
    beta = pyro.sample("beta", flat(2))
    sigma = pyro.sample("sigma", positive())
    with pyro.plate("n", data["N"]):
        mean = beta[0] + beta[1] * tensor(data["height"])
        pyro.sample("earn", dist.Normal(mean, sigma), obs=tensor(data["earn"]))


def gp_pois_regr(data):
    x = tensor(data["x"])
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = pyro.sample("f_tilde", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    squared = (x[:, None] - x).square()
    jitter = 1e-10 if x.dtype == torch.float64 else 1e-5
    covariance = alpha**2 * (-0.5 * squared / rho**2).exp() + jitter * torch.eye(len(x))
    f = pyro.deterministic("f", torch.linalg.cholesky(covariance) @ f_tilde)
    with pyro.plate("n", len(x)):
        pyro.sample("k", dist.Poisson(f.exp()), obs=tensor(data["k"]))


def mesquite(data):
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    x = torch.stack([torch.ones(data["N"]), *(tensor(data[name]) for name in names)], -1)
    beta = pyro.sample("beta", flat(7))
    sigma = pyro.sample("sigma", positive())
    with pyro.plate("n", data["N"]):
        pyro.sample("weight", dist.Normal(x @ beta, sigma), obs=tensor(data["weight"]))


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
HARD = [
    Reference("low_dim_gauss_mix-low_dim_gauss_mix", low_dim_gauss_mix),
    Reference("pilots-pilots", pilots),
    Reference("surgical_data-surgical_model", surgical),
    Reference("earnings-earn_height", earn_height),
    Reference("gp_pois_regr-gp_pois_regr", gp_pois_regr),
    Reference("mesquite-mesquite", mesquite),
]


def labelled(name: str, draws: Tensor) -> dict[str, Tensor]:
    """Stan's names: `beta[1]` and so on for the elements of a vector."""
    if draws.dim() == 1:
        return {name: draws}
    return {f"{name}[{index + 1}]": draws[:, index] for index in range(draws.shape[1])}


def by_label(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws by Stan's names."""
    return {k: v for name, z in samples.items() for k, v in labelled(name, z).items()}
