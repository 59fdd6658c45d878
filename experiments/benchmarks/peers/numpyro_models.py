"""The models of `tests/posteriordb.py` in NumPyro, site by site, in double precision.

Their sites have the same names and the same bijections to unconstrained space, so that both
log-densities can be compared at the same unconstrained values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

jax.config.update("jax_enable_x64", True)

Data = Mapping[str, Any]


def array(values: object) -> Array:
    return jnp.asarray(values, dtype=float)


def flat(size: int) -> dist.Distribution:
    return dist.ImproperUniform(constraints.real_vector, (), (size,))


def positive() -> dist.Distribution:
    return dist.ImproperUniform(constraints.positive, (), ())


def squared_exponential(x: Array, alpha: Array, rho: Array) -> Array:
    return alpha**2 * jnp.exp(-0.5 * jnp.square(x[:, None] - x) / rho**2)


def eight_schools(data: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * trans)
        numpyro.sample("y", dist.Normal(theta, array(data["sigma"])), obs=array(data["y"]))


def regression(site: str, x: Array, y: Array, beta: Array, sigma: Array) -> None:
    """Normal observations `y` of the means `x beta`."""
    with numpyro.plate("n", len(y)):
        numpyro.sample(site, dist.Normal(x @ beta, sigma), obs=y)


def with_intercept(*columns: object) -> Array:
    first = array(columns[0])
    return jnp.stack([jnp.ones_like(first), *(array(column) for column in columns)], -1)


def kidscore_momiq(data: Data) -> None:
    beta = numpyro.sample("beta", flat(2))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    regression("y", with_intercept(data["mom_iq"]), array(data["kid_score"]), beta, sigma)


def ark(data: Data) -> None:
    y, order = array(data["y"]), data["K"]
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(order), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = jnp.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], -1)
    with numpyro.plate("t", len(y) - order):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def kilpisjarvi(data: Data) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(data["pmualpha"], data["psalpha"]))
    beta = numpyro.sample("beta", dist.Normal(data["pmubeta"], data["psbeta"]))
    sigma = numpyro.sample("sigma", positive())
    regression("y", with_intercept(data["x"]), array(data["y"]), jnp.stack([alpha, beta]), sigma)


def sblri(data: Data) -> None:
    x = array(data["X"])
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    regression("y", x, array(data["y"]), beta, sigma)


def gp_regr(data: Data) -> None:
    x, y = array(data["x"]), array(data["y"])
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    covariance = squared_exponential(x, alpha, rho) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def low_dim_gauss_mix(data: Data) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2 * jnp.ones(2)).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    choice = dist.Categorical(jnp.stack([theta, 1 - theta]))
    with numpyro.plate("n", data["N"]):
        mixture = dist.MixtureSameFamily(choice, dist.Normal(mu, sigma))
        numpyro.sample("y", mixture, obs=array(data["y"]))


def pilots(data: Data) -> None:
    mu_a = numpyro.sample("mu_a", dist.Normal(0.0, 1.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 1.0))
    sigma_a, sigma_b, sigma_y = (
        numpyro.sample(f"sigma_{name}", dist.Uniform(0.0, 100.0)) for name in "aby"
    )
    with numpyro.plate("groups", data["n_groups"]):
        a = numpyro.sample("a", dist.Normal(10 * mu_a, sigma_a))
        numpyro.deterministic("za", (a - 10 * mu_a) / sigma_a)
    with numpyro.plate("scenarios", data["n_scenarios"]):
        b = numpyro.sample("b", dist.Normal(10 * mu_b, sigma_b))
        numpyro.deterministic("zb", (b - 10 * mu_b) / sigma_b)
    group, scenario = (jnp.asarray(data[f"{k}_id"]) - 1 for k in ("group", "scenario"))
    with numpyro.plate("n", data["N"]):
        numpyro.sample("y", dist.Normal(a[group] + b[scenario], sigma_y), obs=array(data["y"]))


def surgical(data: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1000.0))
    variance = numpyro.sample("sigmasq", dist.InverseGamma(0.001, 0.001))
    numpyro.deterministic("ls2", jnp.log(variance))
    with numpyro.plate("hospitals", data["N"]):
        b = numpyro.sample("b", dist.Normal(mu, jnp.sqrt(variance)))
        deaths = dist.Binomial(jnp.asarray(data["n"]), logits=b)
        numpyro.sample("r", deaths, obs=jnp.asarray(data["r"]))


def earn_height(data: Data) -> None:
    beta = numpyro.sample("beta", flat(2))
    sigma = numpyro.sample("sigma", positive())
    regression("earn", with_intercept(data["height"]), array(data["earn"]), beta, sigma)


def gp_pois_regr(data: Data) -> None:
    x = array(data["x"])
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = numpyro.sample("f_tilde", dist.Normal(jnp.zeros(len(x)), 1.0).to_event(1))
    covariance = squared_exponential(x, alpha, rho) + 1e-10 * jnp.eye(len(x))
    f = numpyro.deterministic("f", jnp.linalg.cholesky(covariance) @ f_tilde)
    with numpyro.plate("n", len(x)):
        numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=jnp.asarray(data["k"]))


def mesquite(data: Data) -> None:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    beta = numpyro.sample("beta", flat(7))
    sigma = numpyro.sample("sigma", positive())
    x = with_intercept(*(data[name] for name in names))
    regression("weight", x, array(data["weight"]), beta, sigma)


MODELS: dict[str, Callable[[Data], None]] = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "kidiq-kidscore_momiq": kidscore_momiq,
    "arK-arK": ark,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "sblri-blr": sblri,
    "gp_pois_regr-gp_regr": gp_regr,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "pilots-pilots": pilots,
    "surgical_data-surgical_model": surgical,
    "earnings-earn_height": earn_height,
    "gp_pois_regr-gp_pois_regr": gp_pois_regr,
    "mesquite-mesquite": mesquite,
}
