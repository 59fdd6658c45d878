"""Exact answers that the tests compare with. Nothing here imports the package under test.

* `linear_gaussian_dag`, `gaussian_chain`: posterior and evidence by linear algebra.
* `kalman`: the same for a state-space chain, by filtering and smoothing.
* `conjugate_pairs`: one-latent models with a closed-form posterior and evidence, one per support.
* `plain_log_factors`: the log-factors of any model by an ordinary Pyro trace.
* `perturbation_graph`: the dependency graph of any model, by changing one latent at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Exact:
    """A model whose posterior is Gaussian and known.

    Attributes:
        model: The Pyro program; takes `args`.
        names: Latent sites, in the order in which `mean` and `covariance` stack them.
        mean: Posterior mean of the stacked latents, `(D,)`.
        covariance: Posterior covariance, `(D, D)`.
        log_evidence: `log p(x)`.
        args: Arguments of the model.
    """

    model: Callable
    names: list[str]
    mean: Tensor
    covariance: Tensor
    log_evidence: float
    args: tuple = ()

    def stack(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Samples of all latents as one matrix `(K, D)`."""
        return torch.cat([samples[name].reshape(len(samples[name]), -1) for name in self.names], -1)

    def errors(self, samples: Mapping[str, Tensor], weights: Tensor) -> tuple[float, float, float]:
        """Largest error of the weighted means, sds and correlations.

        Means in units of the exact standard deviation, sds relative to it.
        """
        z, w = self.stack(samples).double(), weights.double()[:, None]
        mean = (w * z).sum(0)
        covariance = (z - mean).T @ (w * (z - mean))
        exact = self.covariance.double()
        sd, exact_sd = covariance.diagonal().sqrt(), exact.diagonal().sqrt()
        correlation = covariance / sd / sd[:, None]
        exact_correlation = exact / exact_sd / exact_sd[:, None]
        return (
            float(((mean - self.mean.double()) / exact_sd).abs().max()),
            float((sd / exact_sd - 1).abs().max()),
            float((correlation - exact_correlation).abs().max()),
        )


def condition_gaussian(
    mean: Tensor, covariance: Tensor, design: Tensor, noise: Tensor, data: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Posterior of `z ~ N(mean, covariance)` given `data ~ N(design z, diag(noise))`; log p(x)."""
    innovation = design @ covariance @ design.T + torch.diag(noise)
    gain = torch.linalg.solve(innovation, design @ covariance).T
    log_evidence = torch.distributions.MultivariateNormal(design @ mean, innovation).log_prob(data)
    return (
        mean + gain @ (data - design @ mean),
        covariance - gain @ design @ covariance,
        float(log_evidence),
    )


def linear_gaussian_dag(seed: int) -> Exact:
    """A random directed acyclic graph of 2 to 6 vector latents, linear with Gaussian noise.

    Latent i has 1 to 3 dimensions and each earlier latent as a parent with probability 0.6:
    `z_i ~ N(b_i + sum_j W_ij z_j, s_i^2)`. The last latent, and each other one with probability
    one half, has an observed child `x_i ~ N(C_i z_i, r_i^2)` of two dimensions. Float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform() -> float:
        return torch.rand((), generator=generator).item()

    count = int(torch.randint(2, 7, (), generator=generator))
    dims = [int(torch.randint(1, 4, (), generator=generator)) for _ in range(count)]
    parents = [[j for j in range(i) if uniform() < 0.6] for i in range(count)]
    weights = {(i, j): 0.7 * normal(dims[i], dims[j]) for i in range(count) for j in parents[i]}
    offsets = [normal(d) for d in dims]
    scales = [0.3 + uniform() for _ in dims]
    observed = [
        (i, normal(2, dims[i]), 0.3 + uniform(), 1.5 * normal(2))
        for i in range(count)
        if i == count - 1 or uniform() < 0.5
    ]

    def model() -> None:
        z: list[Tensor] = []
        for i in range(count):
            loc = offsets[i]
            for j in parents[i]:
                loc = loc + z[j] @ weights[i, j].T
            z.append(pyro.sample(f"z{i}", dist.Normal(loc, scales[i]).to_event(1)))
        for i, design, scale, data in observed:
            pyro.sample(f"x{i}", dist.Normal(z[i] @ design.T, scale).to_event(1), obs=data)

    starts = [sum(dims[:i]) for i in range(count)]
    total = sum(dims)
    arrows = torch.zeros(total, total, dtype=torch.float64)
    for (i, j), weight in weights.items():
        arrows[starts[i] : starts[i] + dims[i], starts[j] : starts[j] + dims[j]] = weight
    noise = torch.cat(
        [torch.full((d,), s**2, dtype=torch.float64) for d, s in zip(dims, scales, strict=True)]
    )
    forward = torch.linalg.inv(torch.eye(total, dtype=torch.float64) - arrows)
    design = torch.zeros(2 * len(observed), total, dtype=torch.float64)
    for row, (i, block, _, _) in enumerate(observed):
        design[2 * row : 2 * row + 2, starts[i] : starts[i] + dims[i]] = block
    mean, covariance, log_evidence = condition_gaussian(
        forward @ torch.cat(offsets),
        forward @ torch.diag(noise) @ forward.T,
        design,
        torch.cat([torch.full((2,), r**2, dtype=torch.float64) for _, _, r, _ in observed]),
        torch.cat([x for *_, x in observed]),
    )
    return Exact(model, [f"z{i}" for i in range(count)], mean, covariance, log_evidence)


def gaussian_chain(population: int | None = None) -> Exact:
    """`z1 ~ N(0, 1)`, `z2 ~ N(z1, 0.3^2)`, `x ~ N(z2, 1)`, `x = 2`; all in a plate if asked for.

    Exact: means .957 and 1.043, variances .522, covariance .478, log evidence -2.244.
    """

    def model(x: Tensor) -> None:
        def body() -> None:
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 0.3))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

        if population is None:
            body()
        else:
            with pyro.plate("data", population):
                body()

    prior = torch.tensor([[1.0, 1.0], [1.0, 1.09]], dtype=torch.float64)
    mean, covariance, log_evidence = condition_gaussian(
        torch.zeros(2, dtype=torch.float64),
        prior,
        torch.tensor([[0.0, 1.0]], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        torch.tensor([2.0], dtype=torch.float64),
    )
    data = torch.tensor(2.0) if population is None else torch.full((population,), 2.0)
    return Exact(model, ["z1", "z2"], mean, covariance, log_evidence, (data,))


def kalman(x: Tensor, decay: float = 0.9, process: float = 0.5, noise: float = 0.7) -> Exact:
    """AR(1): `z_0 ~ N(0, 1)`, `z_t ~ N(decay z_{t-1}, process^2)`, `x_t ~ N(z_t, noise^2)`.

    Forward Kalman filter, backward Rauch-Tung-Striebel smoother with lagged covariances.
    """
    steps = len(x)

    def model(x: Tensor) -> None:
        z: Tensor | None = None
        for t in pyro.markov(range(steps)):
            prior = dist.Normal(0.0, 1.0) if z is None else dist.Normal(decay * z, process)
            z = pyro.sample(f"z{t}", prior)
            pyro.sample(f"x{t}", dist.Normal(z, noise), obs=x[t])

    filtered: list[tuple[float, float]] = []
    predicted: list[tuple[float, float]] = []
    log_evidence = 0.0
    mean, variance = 0.0, 1.0
    for t, value in enumerate(x.tolist()):
        if t > 0:
            mean, variance = decay * mean, decay**2 * variance + process**2
        predicted.append((mean, variance))
        innovation = variance + noise**2
        error = value - mean
        log_evidence -= 0.5 * (error**2 / innovation + math.log(innovation) + LOG_TWO_PI)
        gain = variance / innovation
        mean, variance = mean + gain * error, (1 - gain) * variance
        filtered.append((mean, variance))

    means = torch.zeros(steps, dtype=torch.float64)
    covariance = torch.zeros(steps, steps, dtype=torch.float64)
    means[-1], covariance[-1, -1] = filtered[-1]
    for t in range(steps - 2, -1, -1):
        gain = filtered[t][1] * decay / predicted[t + 1][1]
        means[t] = filtered[t][0] + gain * (means[t + 1] - predicted[t + 1][0])
        covariance[t, t] = filtered[t][1] + gain**2 * (
            covariance[t + 1, t + 1] - predicted[t + 1][1]
        )
        covariance[t, t + 1 :] = gain * covariance[t + 1, t + 1 :]
        covariance[t + 1 :, t] = covariance[t, t + 1 :]
    return Exact(model, [f"z{t}" for t in range(steps)], means, covariance, log_evidence, (x,))


@dataclass(frozen=True)
class Conjugate:
    """A model with the single latent `z` whose posterior moments and evidence are known."""

    name: str
    model: Callable
    mean: Tensor
    std: Tensor
    log_evidence: float


def conjugate_pairs() -> list[Conjugate]:
    """One closed form per kind of support."""
    return [
        _normal_normal(),
        _gamma_poisson(),
        _exponential_exponential(),
        _beta_binomial(),
        _interval_binomial(),
        _dirichlet_categorical(),
        _gamma_precision(),
        _inverse_gamma_variance(),
        _log_normal(),
        _half_normal(),
        _multivariate_normal(),
    ]


def _t(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _normal_normal() -> Conjugate:
    x = _t([1.2, -0.3, 0.8])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(_t(0.5), 2.0))
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Normal(z, 1.5), obs=x)

    covariance = 4.0 * torch.ones(3, 3, dtype=torch.float64) + 2.25 * torch.eye(
        3, dtype=torch.float64
    )
    precision = 1 / 4.0 + 3 / 2.25
    mean = (0.5 / 4.0 + x.sum() / 2.25) / precision
    evidence = torch.distributions.MultivariateNormal(_t([0.5] * 3), covariance).log_prob(x)
    return Conjugate("normal-normal", model, mean, _t(precision**-0.5), float(evidence))


def _gamma_moments(shape: float, rate: float) -> tuple[Tensor, Tensor]:
    return _t(shape / rate), _t(math.sqrt(shape) / rate)


def _gamma_poisson() -> Conjugate:
    x, a, b = _t([3.0, 1.0, 4.0, 2.0]), 2.0, 1.5

    def model() -> None:
        z = pyro.sample("z", dist.Gamma(_t(a), b))
        with pyro.plate("n", 4):
            pyro.sample("x", dist.Poisson(z), obs=x)

    total, n = float(x.sum()), 4
    evidence = (
        a * math.log(b)
        - math.lgamma(a)
        + math.lgamma(a + total)
        - (a + total) * math.log(b + n)
        - float(torch.lgamma(x + 1).sum())
    )
    return Conjugate("gamma-poisson", model, *_gamma_moments(a + total, b + n), evidence)


def _exponential_exponential() -> Conjugate:
    x, b = _t([0.4, 1.1, 0.2]), 0.8

    def model() -> None:
        z = pyro.sample("z", dist.Exponential(_t(b)))
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Exponential(z), obs=x)

    total = float(x.sum())
    evidence = math.log(b) + math.lgamma(4) - 4 * math.log(b + total)
    return Conjugate("exponential-exponential", model, *_gamma_moments(4, b + total), evidence)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _beta_moments(a: float, b: float) -> tuple[float, float]:
    return a / (a + b), math.sqrt(a * b / (a + b) ** 2 / (a + b + 1))


def _beta_binomial() -> Conjugate:
    a, b, n, x = 1.5, 2.5, 9, 6.0

    def model() -> None:
        z = pyro.sample("z", dist.Beta(_t(a), b))
        pyro.sample("x", dist.Binomial(n, z), obs=_t(x))

    mean, std = _beta_moments(a + x, b + n - x)
    evidence = math.log(math.comb(n, int(x))) + _log_beta(a + x, b + n - x) - _log_beta(a, b)
    return Conjugate("beta-binomial", model, _t(mean), _t(std), evidence)


def _interval_binomial() -> Conjugate:
    """`z ~ U(-1, 3)`: a uniform Beta that was stretched."""
    n, x = 7, 2.0

    def model() -> None:
        z = pyro.sample("z", dist.Uniform(_t(-1.0), 3.0))
        pyro.sample("x", dist.Binomial(n, (z + 1) / 4), obs=_t(x))

    mean, std = _beta_moments(1 + x, 1 + n - x)
    evidence = math.log(math.comb(n, int(x))) + _log_beta(1 + x, 1 + n - x)
    return Conjugate("interval-binomial", model, _t(4 * mean - 1), _t(4 * std), evidence)


def _dirichlet_categorical() -> Conjugate:
    alpha, counts = _t([0.8, 1.5, 2.0, 1.2]), _t([2.0, 5.0, 0.0, 3.0])
    x = torch.repeat_interleave(torch.arange(4), counts.long())

    def model() -> None:
        z = pyro.sample("z", dist.Dirichlet(alpha))
        with pyro.plate("n", 10):
            pyro.sample("x", dist.Categorical(z), obs=x)

    after = alpha + counts
    total = after.sum()
    mean = after / total
    evidence = torch.lgamma(alpha.sum()) - torch.lgamma(total)
    evidence = evidence + (torch.lgamma(after) - torch.lgamma(alpha)).sum()
    std = (mean * (1 - mean) / (total + 1)).sqrt()
    return Conjugate("dirichlet-categorical", model, mean, std, float(evidence))


def _variance_evidence(a: float, b: float, x: Tensor) -> float:
    n, half = len(x), 0.5 * float(x.square().sum())
    return (
        -0.5 * n * LOG_TWO_PI
        + a * math.log(b)
        - math.lgamma(a)
        + math.lgamma(a + n / 2)
        - (a + n / 2) * math.log(b + half)
    )


def _gamma_precision() -> Conjugate:
    x, a, b = _t([0.7, -1.9, 0.4, 1.1, -0.2]), 2.0, 1.0

    def model() -> None:
        z = pyro.sample("z", dist.Gamma(_t(a), b))
        with pyro.plate("n", 5):
            pyro.sample("x", dist.Normal(0.0, z.rsqrt()), obs=x)

    moments = _gamma_moments(a + 2.5, b + 0.5 * float(x.square().sum()))
    return Conjugate("gamma-precision", model, *moments, _variance_evidence(a, b, x))


def _inverse_gamma_variance() -> Conjugate:
    x, a, b = _t([0.7, -1.9, 0.4, 1.1, -0.2, 0.9]), 4.0, 2.0

    def model() -> None:
        z = pyro.sample("z", dist.InverseGamma(_t(a), _t(b)))
        with pyro.plate("n", 6):
            pyro.sample("x", dist.Normal(0.0, z.sqrt()), obs=x)

    shape, scale = a + 3.0, b + 0.5 * float(x.square().sum())
    mean = scale / (shape - 1)
    std = mean / math.sqrt(shape - 2)
    evidence = _variance_evidence(a, b, x)
    return Conjugate("inverse-gamma-variance", model, _t(mean), _t(std), evidence)


def _log_normal() -> Conjugate:
    x = _t([1.5, 0.6])

    def model() -> None:
        z = pyro.sample("z", dist.LogNormal(_t(0.2), 0.5))
        with pyro.plate("n", 2):
            pyro.sample("x", dist.LogNormal(z.log(), 0.7), obs=x)

    precision = 1 / 0.25 + 2 / 0.49
    centre = (0.2 / 0.25 + float(x.log().sum()) / 0.49) / precision
    mean = math.exp(centre + 0.5 / precision)
    std = mean * math.sqrt(math.expm1(1 / precision))
    covariance = 0.25 * torch.ones(2, 2, dtype=torch.float64) + 0.49 * torch.eye(
        2, dtype=torch.float64
    )
    joint = torch.distributions.MultivariateNormal(_t([0.2, 0.2]), covariance)
    evidence = joint.log_prob(x.log()) - x.log().sum()
    return Conjugate("log-normal", model, _t(mean), _t(std), float(evidence))


def _half_normal() -> Conjugate:
    """A Normal observation of a half-line: the posterior is a truncated Normal."""
    x, s, t = 0.3, 1.2, 0.8

    def model() -> None:
        z = pyro.sample("z", dist.HalfNormal(_t(s)))
        pyro.sample("x", dist.Normal(z, t), obs=_t(x))

    variance = 1 / (1 / s**2 + 1 / t**2)
    sd = math.sqrt(variance)
    centre = variance * x / t**2
    a = -centre / sd
    upper = 0.5 * math.erfc(a / math.sqrt(2))
    hazard = math.exp(-0.5 * a * a - 0.5 * LOG_TWO_PI) / upper
    total = s**2 + t**2
    evidence = math.log(2 * upper) - 0.5 * (x**2 / total + math.log(total) + LOG_TWO_PI)
    return Conjugate(
        "half-normal",
        model,
        _t(centre + sd * hazard),
        _t(sd * math.sqrt(1 + a * hazard - hazard**2)),
        evidence,
    )


def _multivariate_normal() -> Conjugate:
    covariance = _t([[1.0, 0.6, 0.0], [0.6, 2.0, -0.4], [0.0, -0.4, 0.5]])
    noise, x = _t([0.5, 0.8, 1.0]), _t([1.0, -1.0, 0.4])

    def model() -> None:
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros_like(x), covariance))
        pyro.sample("x", dist.Normal(z, noise.sqrt()).to_event(1), obs=x)

    mean, after, evidence = condition_gaussian(
        torch.zeros_like(x), covariance, torch.eye(3, dtype=torch.float64), noise, x
    )
    return Conjugate("multivariate-normal", model, mean, after.diagonal().sqrt(), evidence)


class _At(Messenger):
    """Puts latents at the images of unconstrained values."""

    def __init__(self, u: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.u = u

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.u and not msg["is_observed"]:
            msg["value"] = biject_to(msg["fn"].support)(self.u[msg["name"]])
            msg["done"] = True


def plain_trace(
    model: Callable, u: Mapping[str, Tensor], args: tuple = (), kwargs: dict | None = None
):
    """The trace of one particle at unconstrained values, with the log-probabilities computed."""
    trace = poutine.trace(_At(u)(model)).get_trace(*args, **(kwargs or {}))
    trace.compute_log_prob()
    return trace


def plain_log_factors(
    model: Callable, u: Mapping[str, Tensor], args: tuple = (), kwargs: dict | None = None
) -> dict[str, Tensor]:
    """Log-factor of every site of one particle, Jacobians included, by Pyro's own trace."""
    factors = {}
    for name, node in plain_trace(model, u, args, kwargs).nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if node["infer"].get("_deterministic", False):
            continue
        factors[name] = node["log_prob"]
        if name in u:
            log_det = biject_to(node["fn"].support).log_abs_det_jacobian(u[name], node["value"])
            while log_det.dim() > len(node["fn"].batch_shape):
                log_det = log_det.sum(-1)
            factors[name] = factors[name] + log_det * node["scale"]
    return {name: value.detach() for name, value in factors.items()}


def perturbation_graph(
    model: Callable,
    shapes: Mapping[str, torch.Size],
    args: tuple = (),
    kwargs: dict | None = None,
    repeats: int = 4,
) -> dict[str, set[str]]:
    """For every site, the latents whose unconstrained value its log-factor changes with."""
    depends: dict[str, set[str]] = {}
    for _ in range(repeats):
        base = {name: torch.randn(shape) for name, shape in shapes.items()}
        before = plain_log_factors(model, base, args, kwargs)
        for site in before:
            depends.setdefault(site, {site} if site in shapes else set())
        for latent, shape in shapes.items():
            after = plain_log_factors(model, {**base, latent: torch.randn(shape)}, args, kwargs)
            for site, value in after.items():
                if not torch.equal(value, before[site]):
                    depends[site].add(latent)
    return depends


def weighted_moments(samples: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of `(K, ...)` samples with weights `(K,)`."""
    w = weights.reshape(-1, *(1,) * (samples.dim() - 1))
    mean = (w * samples).sum(0)
    return mean, (w * (samples - mean).square()).sum(0).sqrt()


@dataclass(frozen=True)
class Enumerated:
    """Exact posterior of a model whose latents are all discrete.

    Attributes:
        log_evidence: `log p(x)`.
        probabilities: By latent, probability of each value of each element, `(*shape, S)`, in the
            order of the values that were enumerated.
        weights: Probability of each joint assignment, `(number of assignments)`.
        assignments: By latent, its value in each of them.
    """

    log_evidence: float
    probabilities: dict[str, Tensor]
    weights: Tensor
    assignments: dict[str, Tensor]


def enumerate_posterior(
    model: Callable, args: tuple, values: Mapping[str, list[Tensor]]
) -> Enumerated:
    """Runs a model at every assignment of its discrete latents.

    Args:
        model: The Pyro program.
        args: Its arguments.
        values: By latent, all values that it can take, as tensors of its shape and type.
    """
    names = list(values)
    choices = list(itertools.product(*(range(len(values[name])) for name in names)))
    log_joint = []
    for choice in choices:
        data = {name: values[name][i] for name, i in zip(names, choice, strict=True)}
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(*args)
        trace.compute_log_prob()
        log_joint.append(trace.log_prob_sum().double())
    stacked = torch.stack(log_joint)
    weights = stacked.softmax(0)
    index = torch.tensor(choices)
    probabilities, assignments = {}, {}
    for position, name in enumerate(names):
        whole = torch.stack(values[name])
        support = torch.unique(whole)
        drawn = assignments[name] = whole[index[:, position]]
        shares = [
            (weights.reshape(-1, *(1,) * (drawn.dim() - 1)) * (drawn == value)).sum(0)
            for value in support
        ]
        probabilities[name] = torch.stack(shares, -1)
    return Enumerated(float(stacked.logsumexp(0)), probabilities, weights, assignments)


def vectors(size: int, options: list[float]) -> list[Tensor]:
    """All vectors of some length over a few numbers."""
    return [torch.tensor(row) for row in itertools.product(options, repeat=size)]
