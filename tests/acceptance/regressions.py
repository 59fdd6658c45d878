"""Hierarchical models and regressions: continuous latents, in the idioms of Pyro's examples."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.autoname import named
from pyro.contrib.oed.glmm import zero_mean_unit_obs_sd_lm
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from tests.acceptance.case import Program, Reference, generator
from tests.acceptance.conjugate import grid_posterior
from tests.acceptance.ensemble import ensemble_posterior

Values = Mapping[str, Tensor]


def _gaussian(mean: Tensor, covariance: Tensor, names: list[str]) -> Reference:
    spread = covariance.diagonal().sqrt()
    return Reference(
        dict(zip(names, mean.unbind(), strict=True)), dict(zip(names, spread.unbind(), strict=True))
    )


# -- the smallest program ----------------------------------------------------------------------


def smallest(data):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data), dim=-1):
        pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)


HUNDRED = torch.randn(100, generator=generator(0)) + 3.0


def _smallest() -> Reference:
    precision = torch.tensor(101.0).double()
    return Reference({"loc": HUNDRED.double().sum() / precision}, {"loc": precision.rsqrt()})


# -- eight schools -----------------------------------------------------------------------------

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(sigma):
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10 * torch.ones(1)))
    tau = pyro.sample("tau", dist.HalfCauchy(scale=25 * torch.ones(1)))
    theta = mu + tau * eta
    return pyro.sample("obs", dist.Normal(theta, sigma))


def conditioned_schools(model, sigma, y):
    return poutine.condition(model, data={"obs": y})(sigma)


def _about_schools(z: Values) -> Values:
    return {"eta": z["eta"], "mu": z["mu"], "log tau": z["tau"].log()}


def _schools() -> Reference:
    """The schools' effects are Gaussian given mu and tau, of which there is a grid."""
    y, sigma = EFFECTS.double(), ERRORS.double()

    def log_density(at: Values) -> Tensor:
        tau, mu = at["log tau"].exp(), at["mu"]
        spread = (sigma**2 + tau[:, None] ** 2).sqrt()
        likelihood = torch.distributions.Normal(mu[:, None], spread).log_prob(y).sum(1)
        prior = at["log tau"] - torch.log1p((tau / 25) ** 2) - 0.5 * (mu / 10) ** 2
        return likelihood + prior

    def moments(at: Values) -> Values:
        tau, mu = at["log tau"].exp()[:, None], at["mu"][:, None]
        total = sigma**2 + tau**2
        eta = tau * (y - mu) / total
        return {"first": eta, "second": eta**2 + sigma**2 / total, **at}

    axes = {"log tau": torch.linspace(-14, 7, 500), "mu": torch.linspace(-40, 50, 400)}
    rough = grid_posterior(log_density, axes, quantities=moments)
    eta = rough.mean["first"]
    return Reference(
        {"eta": eta, "mu": rough.mean["mu"][None], "log tau": rough.mean["log tau"][None]},
        {
            "eta": (rough.mean["second"] - eta**2).sqrt(),
            "mu": rough.std["mu"][None],
            "log tau": rough.std["log tau"][None],
        },
    )


# -- baseball ----------------------------------------------------------------------------------

AT_BATS = torch.tensor([45.0, 45, 45, 30, 20, 10])
HITS = torch.tensor([18.0, 14, 9, 9, 3, 4])


def fully_pooled(at_bats, hits):
    phi = pyro.sample("phi", dist.Uniform(at_bats.new_tensor(0), at_bats.new_tensor(1)))
    with pyro.plate("num_players", at_bats.shape[0]):
        return pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def not_pooled(at_bats, hits):
    with pyro.plate("num_players", at_bats.shape[0]):
        phi = pyro.sample("phi", dist.Uniform(at_bats.new_tensor(0), at_bats.new_tensor(1)))
        return pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def partially_pooled(at_bats, hits):
    m = pyro.sample("m", dist.Uniform(at_bats.new_tensor(0), at_bats.new_tensor(1)))
    kappa = pyro.sample("kappa", dist.Pareto(at_bats.new_tensor(1), at_bats.new_tensor(1.5)))
    with pyro.plate("num_players", at_bats.shape[0]):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        return pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def partially_pooled_with_logit(at_bats, hits):
    loc = pyro.sample("loc", dist.Normal(at_bats.new_tensor(-1), at_bats.new_tensor(1)))
    scale = pyro.sample("scale", dist.HalfCauchy(scale=at_bats.new_tensor(1)))
    with pyro.plate("num_players", at_bats.shape[0]):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        return pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)


def _beta(ones: Tensor, zeros: Tensor) -> Reference:
    a, b = 1 + ones.double(), 1 + zeros.double()
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    return Reference({"phi": a / (a + b)}, {"phi": variance.sqrt()})


def _about_pool(z: Values) -> Values:
    return {"phi": z["phi"], "m": z["m"], "log kappa": z["kappa"].log()}


def _partially_pooled() -> Reference:
    """Chances are Beta given m and kappa, of which there is a grid."""
    hits, misses = HITS.double(), (AT_BATS - HITS).double()

    def log_beta(a: Tensor, b: Tensor) -> Tensor:
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    def log_density(at: Values) -> Tensor:
        a = (at["m"] * at["log kappa"].exp())[:, None]
        b = ((1 - at["m"]) * at["log kappa"].exp())[:, None]
        marginal = (log_beta(a + hits, b + misses) - log_beta(a, b)).sum(1)
        return marginal - 1.5 * at["log kappa"]

    def moments(at: Values) -> Values:
        a = (at["m"] * at["log kappa"].exp())[:, None] + hits
        b = ((1 - at["m"]) * at["log kappa"].exp())[:, None] + misses
        mean = a / (a + b)
        return {"first": mean, "second": mean * (a + 1) / (a + b + 1), **at}

    axes = {"m": (torch.arange(200) + 0.5) / 200, "log kappa": (torch.arange(300) + 0.5) / 20}
    rough = grid_posterior(log_density, axes, quantities=moments)
    phi = rough.mean["first"]
    spread = (rough.mean["second"] - phi**2).sqrt()
    rest = ("m", "log kappa")
    return Reference(
        {"phi": phi} | {name: rough.mean[name] for name in rest},
        {"phi": spread} | {name: rough.std[name] for name in rest},
    )


def _about_logits(z: Values) -> Values:
    return {"alpha": z["alpha"], "loc": z["loc"], "log scale": z["scale"].log()}


def _partially_pooled_with_logit() -> Reference:
    """A grid of loc and scale, and for each the integrals of the players' logits."""
    hits, misses = HITS.double(), (AT_BATS - HITS).double()
    e = torch.linspace(-7, 7, 281).double()
    weight = (-0.5 * e**2).log_softmax(0)

    def terms(at: Values) -> tuple[Tensor, Tensor]:
        alpha = at["loc"][:, None] + at["log scale"].exp()[:, None] * e  # (G, E)
        log_likelihood = hits * nn.functional.logsigmoid(alpha)[..., None]
        log_likelihood = log_likelihood + misses * nn.functional.logsigmoid(-alpha)[..., None]
        return alpha, log_likelihood + weight[:, None]

    def log_density(at: Values) -> Tensor:
        scale = at["log scale"].exp()
        prior = -0.5 * (at["loc"] + 1) ** 2 + at["log scale"] - torch.log1p(scale**2)
        return terms(at)[1].logsumexp(1).sum(1) + prior

    def moments(at: Values) -> Values:
        alpha, joint = terms(at)
        share = joint.softmax(1)
        first = (share * alpha[..., None]).sum(1)
        return {"first": first, "second": (share * alpha[..., None] ** 2).sum(1), **at}

    axes = {"loc": torch.linspace(-5, 3, 81), "log scale": torch.linspace(-10, 4, 141)}
    rough = grid_posterior(log_density, axes, quantities=moments)
    alpha = rough.mean["first"]
    rest = ("loc", "log scale")
    return Reference(
        {"alpha": alpha} | {name: rough.mean[name] for name in rest},
        {"alpha": (rough.mean["second"] - alpha**2).sqrt()} | {n: rough.std[n] for n in rest},
    )


# -- a correlation matrix ----------------------------------------------------------------------


def correlations(y):
    d, num = y.shape[1], y.shape[0]
    options = {"dtype": y.dtype, "device": y.device}
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(d, **options)))
    concentration = torch.ones((), **options)
    L_omega = pyro.sample("L_omega", dist.LKJCholesky(d, concentration))
    L_Omega = torch.mm(torch.diag(theta.sqrt()), L_omega)
    mu = torch.zeros(d, **options)
    with pyro.plate("observations", num):
        obs = pyro.sample("obs", dist.MultivariateNormal(mu, scale_tril=L_Omega), obs=y)
    return obs


PAIRS = torch.randn(10, 2, generator=generator(1), dtype=torch.double) @ torch.tensor(
    [[1.0, 0.6], [0.0, 0.8]], dtype=torch.double
)


def _about_correlations(z: Values) -> Values:
    return {"log theta": z["theta"].log(), "correlation": z["L_omega"][..., 1, 0]}


def _correlations() -> Reference:
    second = PAIRS.T @ PAIRS

    def log_density(at: Values) -> Tensor:
        a, b, r = at["a"], at["b"], at["r"]
        rest = 1 - r**2
        quadratic = second[0, 0] / a.exp() + second[1, 1] / b.exp()
        quadratic = quadratic - 2 * r * second[0, 1] * (-(a + b) / 2).exp()
        log_det = a + b + rest.log()
        prior = a - torch.log1p(a.exp() ** 2) + b - torch.log1p(b.exp() ** 2)
        return -0.5 * quadratic / rest - len(PAIRS) / 2 * log_det + prior

    axis = torch.linspace(-4, 4, 101)
    axes = {"a": axis, "b": axis, "r": (torch.arange(100) + 0.5) / 50 - 1}
    return grid_posterior(
        log_density,
        axes,
        quantities=lambda at: {
            "log theta": torch.stack([at["a"], at["b"]], -1),
            "correlation": at["r"],
        },
    )


# -- sparse regression with a kernel -----------------------------------------------------------


def _kernel(X: Tensor, Z: Tensor, eta1: Tensor, eta2: Tensor, c: float) -> Tensor:
    eta1sq, eta2sq = eta1**2, eta2**2
    product = torch.mm(X, Z.t())
    k1 = 0.5 * eta2sq * (1.0 + product).pow(2.0)
    k2 = -0.5 * eta2sq * torch.mm(X.pow(2.0), Z.pow(2.0).t())
    return k1 + k2 + (eta1sq - eta2sq) * product + c**2 - 0.5 * eta2sq


def sparse_regression(X, Y, hypers, jitter=1.0e-4):
    S, P, N = hypers["expected_sparsity"], X.size(1), X.size(0)
    sigma = pyro.sample("sigma", dist.HalfNormal(hypers["alpha3"]))
    phi = sigma * (S / math.sqrt(N)) / (P - S)
    eta1 = pyro.sample("eta1", dist.HalfCauchy(phi))
    msq = pyro.sample("msq", dist.InverseGamma(hypers["alpha1"], hypers["beta1"]))
    xisq = pyro.sample("xisq", dist.InverseGamma(hypers["alpha2"], hypers["beta2"]))
    eta2 = eta1.pow(2.0) * xisq.sqrt() / msq
    lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(P, device=X.device)).to_event(1))
    kappa = msq.sqrt() * lam / (msq + (eta1 * lam).pow(2.0)).sqrt()
    kX = kappa * X
    k = _kernel(kX, kX, eta1, eta2, hypers["c"]) + (sigma**2 + jitter) * torch.eye(N)
    pyro.sample("Y", dist.MultivariateNormal(torch.zeros(N), covariance_matrix=k), obs=Y)


FEATURES = torch.randn(8, 3, generator=generator(2))
TARGETS = 1.5 * FEATURES[:, 0] + 0.3 * torch.randn(8, generator=generator(3))
HYPERS = {
    "expected_sparsity": 1.0,
    "alpha1": 3.0,
    "beta1": 1.0,
    "alpha2": 3.0,
    "beta2": 1.0,
    "alpha3": 1.0,
    "c": 1.0,
}


def _logarithms(z: Values) -> Values:
    return {f"log {name}": value.log() for name, value in z.items()}


def _sparse_regression() -> Reference:
    x, y = FEATURES.double(), TARGETS.double()

    def log_density(z: Values) -> Tensor:
        sigma, eta1, msq, xisq, lam = (
            z[name] for name in ("sigma", "eta1", "msq", "xisq", "lambda")
        )
        phi = sigma / math.sqrt(8) / 2
        prior = -0.5 * sigma**2 - phi.log() - torch.log1p((eta1 / phi) ** 2)
        for value in (msq, xisq):
            prior = prior - 4 * value.log() - 1 / value
        prior = prior - torch.log1p(lam**2).sum()
        eta2 = eta1**2 * xisq.sqrt() / msq
        scaled = x * msq.sqrt() * lam / (msq + (eta1 * lam) ** 2).sqrt()
        gram = scaled @ scaled.T
        k = 0.5 * eta2**2 * (1 + gram) ** 2 - 0.5 * eta2**2 * (scaled**2) @ (scaled**2).T
        k = k + (eta1**2 - eta2**2) * gram + 1 - 0.5 * eta2**2
        k = k + (sigma**2 + 1e-4) * torch.eye(8).double()
        factor = torch.linalg.cholesky_ex(k).L
        white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        return prior - 0.5 * white.square().sum() - factor.diagonal().log().sum()

    sites = {name: ((), constraints.positive) for name in ("sigma", "eta1", "msq", "xisq")}
    return ensemble_posterior(
        log_density, {**sites, "lambda": ((3,), constraints.positive)}, _logarithms
    )


# -- an inclined plane -------------------------------------------------------------------------


def descent_time(mu, length=2.0, phi=math.pi / 6.0):
    acceleration = 9.8 * (math.sin(phi) - mu * math.cos(phi))
    return torch.where(acceleration > 0, (2.0 * length / acceleration.clamp(min=1e-6)).sqrt(), 1e5)


def inclined_plane(observed_data):
    mu = pyro.sample("mu", dist.Uniform(0.0, 1.0))
    for i, time in enumerate(observed_data):
        pyro.sample(f"obs_{i}", dist.Normal(descent_time(mu), torch.tensor(0.02)), obs=time)
    return mu


TIMES = descent_time(torch.tensor(0.12)) + 0.02 * torch.randn(5, generator=generator(2))


def _inclined_plane() -> Reference:
    axis = (torch.arange(20000) + 0.5) / 20000

    def log_density(at: Values) -> Tensor:
        expected = descent_time(at["mu"])[:, None]
        return -0.5 * (((TIMES.double() - expected) / 0.02) ** 2).sum(1)

    return grid_posterior(log_density, {"mu": axis})


# -- shapes for samplers -----------------------------------------------------------------------


class BananaShaped(dist.TorchDistribution):
    """A Gaussian bent along a parabola."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, a, b, rho=0.9):
        self.a, self.b = a, b
        self.mvn = dist.MultivariateNormal(
            torch.zeros(2), covariance_matrix=torch.tensor([[1.0, rho], [rho, 1.0]])
        )
        super().__init__(event_shape=(2,))

    def sample(self, sample_shape=()):
        u0, u1 = self.mvn.sample(sample_shape).unbind(-1)
        return torch.stack([self.a * u0, u1 / self.a + self.b * (u0**2 + self.a**2)], -1)

    def log_prob(self, value):
        x, y = value.unbind(-1)
        u0 = x / self.a
        u1 = (y - self.b * (u0**2 + self.a**2)) * self.a
        return self.mvn.log_prob(torch.stack([u0, u1], -1))


def banana(a, b, seen):
    x = pyro.sample("x", BananaShaped(a, b))
    pyro.sample("seen", dist.Normal(x[..., 0], 2.0), obs=seen)


def _banana() -> Reference:
    """`u` is Gaussian given what is seen of `a u0`; the curve's moments follow from its."""
    a, b, rho, seen = 1.15, 1.0, 0.9, 1.0
    variance = 1 / (1 + a**2 / 4)
    mean = variance * a * seen / 4
    # u1 | u0 ~ N(rho u0, 1 - rho^2); y = rho u0 / a + b u0^2 + ...
    first = rho * mean / a + b * (mean**2 + variance + a**2)
    linear = rho / a + 2 * b * mean
    spread = linear**2 * variance + 2 * b**2 * variance**2 + (1 - rho**2) / a**2
    return Reference(
        {"x": torch.tensor([a * mean, first]).double()},
        {"x": torch.tensor([a**2 * variance, spread]).double().sqrt()},
    )


def _moons(z: Tensor) -> Tensor:
    ring = ((z.norm(dim=-1) - 2) / 0.4) ** 2
    x = z[..., 0]
    return -0.5 * ring + torch.logaddexp(-0.5 * ((x - 2) / 0.6) ** 2, -0.5 * ((x + 2) / 0.6) ** 2)


def dual_moon():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    pyro.factor("moons", _moons(z))


def _about_moons(z: Values) -> Values:
    x = z["z"][..., 0]
    return {"x squared": x**2, "right": (x > 0).to(x.dtype), "z": z["z"]}


def _dual_moon() -> Reference:
    axis = torch.linspace(-5, 5, 400)

    def place(at: Values) -> Tensor:
        return torch.stack([at["x"], at["y"]], -1)

    return grid_posterior(
        lambda at: _moons(place(at)) - (place(at) ** 2).sum(-1) / 18,
        {"x": axis, "y": axis},
        quantities=lambda at: _about_moons({"z": place(at)}),
    )


# -- designs, trees, regressions ---------------------------------------------------------------

ab_test, _ = zero_mean_unit_obs_sd_lm(torch.tensor([10.0, 2.5]))
DESIGN = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 4)
OUTCOMES = torch.tensor([1.0, 0.2, -0.5, 2.0, 1.1, 0.7, 1.9])


def _ab_test() -> Reference:
    x, y = DESIGN.double(), OUTCOMES.double()
    precision = torch.tensor([10.0, 2.5]).double() ** -2
    covariance = torch.linalg.inv(torch.diag(precision) + x.T @ x)
    mean = covariance @ x.T @ y
    return Reference({"w": mean}, {"w": covariance.diagonal().sqrt()})


def tree_of_data(data):
    latent = named.Object("latent")
    latent.z.sample_(dist.Normal(0.0, 1.0))
    _branch(data, latent)


def _branch(data, latent):
    if torch.is_tensor(data):
        latent.x.sample_(dist.Normal(latent.z, 1.0), obs=data)
    elif isinstance(data, list):
        latent.prior_scale.param_(torch.tensor(1.0), constraint=constraints.positive)
        latent.list = named.List()
        for datum in data:
            child = latent.list.add()
            child.z.sample_(dist.Normal(latent.z, latent.prior_scale))
            _branch(datum, child)
    else:
        latent.prior_scale.param_(torch.tensor(1.0), constraint=constraints.positive)
        latent.dict = named.Dict()
        for key, value in data.items():
            latent.dict[key].z.sample_(dist.Normal(latent.z, latent.prior_scale))
            _branch(value, latent.dict[key])


TREE = {"foo": torch.tensor(1.0), "bar": [torch.tensor(0.0), torch.tensor(2.0)]}


def _tree_of_data() -> Reference:
    """A Gaussian tree: root, foo and bar under it, two leaves under bar."""
    names = [
        "latent.z",
        "latent.dict['foo'].z",
        "latent.dict['bar'].z",
        "latent.dict['bar'].list[0].z",
        "latent.dict['bar'].list[1].z",
    ]
    parents = {1: 0, 2: 0, 3: 2, 4: 2}
    precision = torch.zeros(5, 5).double()
    precision[0, 0] += 1
    for child, parent in parents.items():
        precision[child, child] += 1
        precision[parent, parent] += 1
        precision[child, parent] -= 1
        precision[parent, child] -= 1
    shift = torch.zeros(5).double()
    for leaf, value in {1: 1.0, 3: 0.0, 4: 2.0}.items():
        precision[leaf, leaf] += 1
        shift[leaf] += value
    covariance = torch.linalg.inv(precision)
    return _gaussian(covariance @ shift, covariance, names)


class BayesianRegression(PyroModule):
    """Linear regression with priors on the module's own parameters."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = PyroModule[nn.Linear](in_features, out_features)
        self.linear.weight = PyroSample(
            dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2)
        )
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


LINEAR_X = torch.randn(12, 2, generator=generator(4))
LINEAR_Y = LINEAR_X @ torch.tensor([1.0, -0.5]) + 2 + 0.5 * torch.randn(12, generator=generator(5))


def _bayesian_regression() -> Reference:
    """Conjugate given sigma, of which there is a grid."""
    x = torch.cat([LINEAR_X, torch.ones(12, 1)], 1).double()
    y, prior = LINEAR_Y.double(), torch.tensor([1.0, 1.0, 100.0]).double()

    def log_density(at: Values) -> Tensor:
        covariance = x @ torch.diag(prior) @ x.T
        every = covariance + at["sigma"][:, None, None] ** 2 * torch.eye(12).double()
        normal = torch.distributions.MultivariateNormal(torch.zeros(12).double(), every)
        return normal.log_prob(y)

    def moments(at: Values) -> Values:
        noise = at["sigma"][:, None, None] ** 2
        covariance = torch.linalg.inv(torch.diag(1 / prior) + x.T @ x / noise)
        mean = (covariance @ (x.T @ y)[:, None] / noise)[..., 0]
        second = covariance.diagonal(dim1=-2, dim2=-1) + mean**2
        return {"first": mean, "second": second, "sigma": at["sigma"]}

    axes = {"sigma": (torch.arange(4000) + 0.5) / 1600}
    rough = grid_posterior(log_density, axes, quantities=moments)
    mean = rough.mean["first"]
    spread = (rough.mean["second"] - mean**2).sqrt()
    return Reference(
        {"linear.weight": mean[None, :2], "linear.bias": mean[2:], "sigma": rough.mean["sigma"]},
        {"linear.weight": spread[None, :2], "linear.bias": spread[2:], "sigma": rough.std["sigma"]},
    )


class BayesianNetwork(PyroModule):
    """A network of two tanh units with priors on all weights."""

    def __init__(self):
        super().__init__()
        self.first = PyroModule[nn.Linear](1, 2)
        self.second = PyroModule[nn.Linear](2, 1)
        for layer in (self.first, self.second):
            shape = list(layer.weight.shape)
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(shape[:1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.second(torch.tanh(self.first(x))).squeeze(-1)
        pyro.deterministic("mean", mean)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)


CURVE_X = torch.linspace(-2, 2, 6)[:, None]
CURVE_Y = torch.tensor([-0.6, -0.9, -0.3, 0.4, 0.9, 0.8])


def _bayesian_network() -> Reference:
    """Compared by its predictions, which do not change when units swap or change sign."""
    x, y = CURVE_X.double(), CURVE_Y.double()

    def predict(z: Values) -> Tensor:
        hidden = torch.tanh(x @ z["w1"].T + z["b1"])
        return (hidden @ z["w2"].T + z["b2"])[:, 0]

    def log_density(z: Values) -> Tensor:
        prior = -0.5 * sum((value**2).sum() for value in z.values())
        return prior - 0.5 * ((y - predict(z)) ** 2).sum() / 0.09

    shapes = {"w1": (2, 1), "b1": (2,), "w2": (1, 2), "b2": (1,)}
    return ensemble_posterior(
        log_density,
        {name: (shape, constraints.real) for name, shape in shapes.items()},
        lambda z: {"mean": predict(z)},
    )


def programs() -> list[Program]:
    """The rows of this family."""
    bats, tutorial = (AT_BATS, HITS), "tutorial"
    grid, closed = "grid, the rest in closed form", "closed form"
    ensemble = "Hamiltonian ensemble"
    return [
        Program("minipyro", "minipyro.py", smallest, (HUNDRED,), closed, _smallest),
        Program(
            "eight schools",
            "eight_schools/mcmc.py",
            conditioned_schools,
            (schools, ERRORS, EFFECTS),
            grid,
            _schools,
            quantities=_about_schools,
        ),
        Program(
            "baseball, pooled",
            "baseball.py",
            fully_pooled,
            bats,
            closed,
            lambda: _beta(HITS.sum(), (AT_BATS - HITS).sum()),
        ),
        Program(
            "baseball, not pooled",
            "baseball.py",
            not_pooled,
            bats,
            closed,
            lambda: _beta(HITS, AT_BATS - HITS),
        ),
        Program(
            "baseball, partially pooled",
            "baseball.py",
            partially_pooled,
            bats,
            grid,
            _partially_pooled,
            quantities=_about_pool,
        ),
        Program(
            "baseball, with logits",
            "baseball.py",
            partially_pooled_with_logit,
            bats,
            grid,
            _partially_pooled_with_logit,
            num_particles=3000,
            num_sweeps=400,
            quantities=_about_logits,
        ),
        Program(
            "lkj",
            "lkj.py",
            correlations,
            (PAIRS,),
            "grid",
            _correlations,
            quantities=_about_correlations,
        ),
        Program(
            "sparse regression",
            "sparse_regression.py",
            sparse_regression,
            (FEATURES, TARGETS, HYPERS),
            ensemble,
            _sparse_regression,
            num_particles=1000,
            num_sweeps=200,
            quantities=_logarithms,
        ),
        Program(
            "inclined plane",
            "inclined_plane.py",
            inclined_plane,
            (TIMES,),
            "grid",
            _inclined_plane,
            remark="the descent time by its formula; the simulator branches on the latent",
        ),
        Program(
            "banana",
            "neutra.py",
            banana,
            (torch.tensor(1.15), torch.tensor(1.0), torch.tensor(1.0)),
            closed,
            _banana,
            remark="with an observation; the original samples its prior",
        ),
        Program(
            "dual moon",
            "tests of samplers",
            dual_moon,
            (),
            "grid",
            _dual_moon,
            quantities=_about_moons,
        ),
        Program(
            "A/B test",
            "contrib/oed/ab_test.py",
            lambda design, y: pyro.condition(ab_test, data={"y": y})(design),
            (DESIGN, OUTCOMES),
            closed,
            _ab_test,
        ),
        Program(
            "tree of data",
            "contrib/autoname/tree_data.py",
            tree_of_data,
            (TREE,),
            closed,
            _tree_of_data,
        ),
        Program(
            "Bayesian regression",
            f"{tutorial} bayesian_regression",
            BayesianRegression(2, 1),
            (LINEAR_X, LINEAR_Y),
            grid,
            _bayesian_regression,
        ),
        Program(
            "Bayesian neural network",
            "PyroSample on nn.Linear",
            BayesianNetwork(),
            (CURVE_X, CURVE_Y),
            ensemble,
            _bayesian_network,
        ),
    ]
