"""Random linear-Gaussian programs over plates against linear algebra and Pyro's own potential.

What holds without sampling is tested on all 200 programs; what a run gives on some of them, and on
the others with `-m slow`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from plated_gaussian import PlatedGaussian
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from random_models import random_model
from zoo import CASES

from dcpc import DCPC
from dcpc.divide import Arguments, Density
from dcpc.errors import EvidenceError

pytestmark = pytest.mark.usefixtures("float64")

NUM_MODELS = 200
SEEDS = range(NUM_MODELS)
SAMPLED = frozenset({2, 7, 9, 10, 14, 20, 22, 25, 58, 60, 62})
"""Those that are sampled in the fast suite: small ones, with every kind among them."""

NUM_PARTICLES = 400
KEEP_EVERY = 10
NUM_EFFECTIVE = 1000
"""Independent draws that a run is sure to give: ten clouds of 400, of chains that mix fast."""

STATIC_CASES = [case for case in CASES if case.name != "dependent_support"]
"""Pyro's potential takes a latent's support from one trace, for good."""

CONSTRAINED = {
    "positive": lambda: dist.Gamma(2.0, 3.0),
    "inverse gamma": lambda: dist.InverseGamma(2.0, 3.0),
    "half line": lambda: dist.HalfCauchy(2.0),
    "shifted half line": lambda: dist.Pareto(0.5, 3.0),
    "unit interval": lambda: dist.Beta(2.0, 3.0),
    "interval": lambda: dist.Uniform(-2.0, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0])),
    "Cholesky": lambda: dist.LKJCholesky(3, torch.tensor(2.0)),
    "positive event": lambda: dist.Weibull(torch.ones(2), 1.5).to_event(1),
    "transformed": lambda: dist.LogNormal(torch.zeros(2), 0.7).to_event(1),
}
HANDLERS = {
    "none": nullcontext,
    "scale": lambda: poutine.scale(scale=3.0),
    "scale by element": lambda: poutine.scale(scale=torch.tensor([[0.5, 1.0, 2.0]])),
    "mask": lambda: poutine.mask(mask=torch.tensor([[True, False, True], [False, True, True]])),
    "mask of all": lambda: poutine.mask(mask=False),
}

K = 8
"""Particles of the checks without sampling; each changes another element of a unit."""


class Divided:
    """All that the tests want of a division; the engine's interface is used here only."""

    def __init__(self, model, args, kwargs, num_particles: int = K, **options) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = DCPC(model, num_particles=num_particles, **options)
            self.division = engine.division(*args, **kwargs)
        self.tensors = Arguments(args, kwargs).tensors
        self.groups = self.division.groups

    def shapes(self) -> dict[str, torch.Size]:
        sites = self.division.sites
        return {name: sites[name].unconstrained_shape for name in self.division.latents}

    def particles(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(K, *shape, generator=generator)
            for name, shape in self.shapes().items()
        }

    def log_joint(self, latents) -> torch.Tensor:
        """`(K,)`, summed over the population."""
        joint = Density(self.division, self.tensors).log_joint(latents)
        return joint.reshape(len(joint), -1).sum(-1)

    def log_density(self, group, value, latents) -> torch.Tensor:
        return group.log_density(value, latents, self.tensors)


def pyro_log_joint(model, args, kwargs, latents, particles: int) -> torch.Tensor:
    """Minus the potential that Pyro's NUTS would move on, for the first few particles."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, potential, _, _ = initialize_model(
            model, args, kwargs, initial_params={name: u[0] for name, u in latents.items()}
        )
        values = [-potential({name: u[k] for name, u in latents.items()}) for k in range(particles)]
    return torch.stack([torch.as_tensor(value) for value in values]).detach()


def changed_one_by_one(value: torch.Tensor, generator: torch.Generator):
    """Packed values with one element of one unit changed in every particle, and which one."""
    changed = value.clone()
    size = value.shape[1:-1]
    where = torch.zeros(value.shape[:-1], dtype=torch.bool)
    for k in range(len(value)):
        element = tuple(int(torch.randint(n, (), generator=generator)) for n in size)
        where[(k, *element)] = True
        step = torch.randn(value.shape[-1], generator=generator)
        changed[(k, *element)] += step + 0.5 * step.sign()
    return changed, where


def check_moves(divided: Divided, seed: int, log_joint) -> None:
    """The log-density of the element that changes does so as the joint; all the others stay.

    Raises:
        AssertionError: With the group's name.
    """
    latents = divided.particles(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    before = log_joint(latents)
    for group in divided.groups:
        value = group.pack(latents)
        unpacked = group.unpack(value)
        for name, u in unpacked.items():
            torch.testing.assert_close(u, latents[name], rtol=0, atol=0, msg=name)
        changed, where = changed_one_by_one(value, generator)
        after = {**latents, **group.unpack(changed)}
        expected = log_joint(after) - before
        change = divided.log_density(group, changed, latents)
        change = change - divided.log_density(group, value, latents)
        assert change.shape == where.shape, group.name
        tolerance = 1e-9 * (1 + before.abs().max())
        scattered = where * expected.reshape(-1, *(1,) * (where.dim() - 1))
        error = (change - scattered).abs()
        assert float(error.max()) < tolerance, f"{group.name}: {float(error.max()):.3g}"


def check_scores(divided: Divided, seed: int, log_joint) -> None:
    """Every unit's score is autograd's gradient of the joint."""
    latents = {name: u.requires_grad_() for name, u in divided.particles(seed).items()}
    gradients = torch.autograd.grad(
        log_joint(latents).sum(), list(latents.values()), allow_unused=True
    )
    expected = {
        name: torch.zeros_like(u) if gradient is None else gradient
        for (name, u), gradient in zip(latents.items(), gradients, strict=True)
    }
    latents = {name: u.detach() for name, u in latents.items()}
    for group in divided.groups:
        evaluation = group.evaluate(group.pack(latents), latents, divided.tensors)
        torch.testing.assert_close(
            evaluation.score, group.pack(expected), rtol=1e-8, atol=1e-8, msg=group.name
        )


def exact_log_joint(model: PlatedGaussian):
    """The quadratic form, as a function of unconstrained latents."""
    exact = model.exact()
    return lambda latents: exact.log_joint(model.unconstrained(latents, exact.keys))


# -- the generator itself ------------------------------------------------------------------------


def test_every_kind_of_program_is_drawn_several_times():
    counts = Counter(kind for seed in SEEDS for kind in random_model(seed).kinds)
    counts.update(f"{len(random_model(seed).plates)} plates" for seed in SEEDS)
    rare = {kind for kind, count in counts.items() if count < 4}
    assert not rare, rare
    assert len(counts) >= 30, sorted(counts)
    sampled = set[str]().union(*(random_model(seed).kinds for seed in SAMPLED))
    assert sampled == {kind for kind in counts if not kind.endswith(" plates")}


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_algebra_agrees_with_pyros_potential(seed):
    """The two ways of writing a program down are one program."""
    model = random_model(seed)
    program, args, kwargs = model.build()
    with pyro.validation_enabled(False):
        trace = pyro.poutine.trace(program).get_trace(*args, **kwargs)
    latents = {}
    for site in model.sites:
        name = site.unknown_name()
        if name in trace.nodes and (site.is_latent or site.missing is not None):
            latents[name] = torch.randn(2, *trace.nodes[name]["value"].shape)
            dims = {f.name: f.dim for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized}
            assert dims == {plate.name: plate.dim for plate in site.plates}
    got = exact_log_joint(model)(latents)
    torch.testing.assert_close(pyro_log_joint(program, args, kwargs, latents, 2), got)


# -- without sampling ------------------------------------------------------------------------------


def check_density(divided: Divided, seed: int) -> None:
    """Joint, changes of the units' log-densities, and scores, against the quadratic form."""
    log_joint = exact_log_joint(random_model(seed))
    latents = divided.particles(seed)
    torch.testing.assert_close(divided.log_joint(latents), log_joint(latents))
    check_moves(divided, seed, log_joint)
    check_scores(divided, seed, log_joint)


@pytest.mark.parametrize("seed", SEEDS)
def test_units_move_on_the_joint_density_of_every_random_program(seed):
    check_density(Divided(*random_model(seed).build(), certify=False, backend="vmap"), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_units_of_captured_random_programs_move_on_the_joint_density(seed):
    divided = Divided(*random_model(seed).build(), certify=False)
    assert divided.division.program.name == "graph"
    check_density(divided, seed)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("support", CONSTRAINED)
def test_handlers_around_constrained_latents_mean_what_they_mean_to_pyro(support, handler):
    def model(x):
        with pyro.plate("outer", 3), pyro.plate("inner", 2), HANDLERS[handler]():
            z = pyro.sample("z", CONSTRAINED[support]())
        with pyro.plate("other", 2, dim=-2):
            pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    args = (torch.zeros(2, 1),)
    divided = Divided(model, args, {}, certify=False, backend="vmap")
    latents = divided.particles(3)
    expected = pyro_log_joint(model, args, {}, latents, K)
    torch.testing.assert_close(divided.log_joint(latents), expected)


@pytest.mark.parametrize("case", STATIC_CASES, ids=lambda case: case.name)
def test_the_joint_of_every_model_of_the_zoo_is_minus_pyros_potential(case):
    model, args, kwargs = case.build()
    divided = Divided(model, args, kwargs)
    latents = divided.particles(3)
    expected = pyro_log_joint(model, args, kwargs, latents, K)
    torch.testing.assert_close(divided.log_joint(latents), expected)


@pytest.mark.parametrize("case", STATIC_CASES, ids=lambda case: case.name)
def test_units_of_the_zoo_move_on_pyros_potential(case):
    model, args, kwargs = case.build()
    divided = Divided(model, args, kwargs)
    check_moves(divided, 3, lambda latents: pyro_log_joint(model, args, kwargs, latents, K))


# -- by sampling -----------------------------------------------------------------------------------


class Sampled:
    """All that the tests want of a run of a random program."""

    def __init__(self, model: PlatedGaussian, **options) -> None:
        program, args, kwargs = model.build()
        engine = DCPC(program, num_particles=NUM_PARTICLES, certify=False, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence: the tests know the answer
            self.posterior = engine.run(
                *args, num_sweeps=200, keep_every=KEEP_EVERY, seed=0, progress=False, **kwargs
            )
        self.population = [(p.name, p.size) for p in engine.division(*args, **kwargs).population]
        self.model = model

    def draws(self, keys) -> torch.Tensor:
        """Unconstrained draws `(n, D)`, of which at least `NUM_EFFECTIVE` are independent."""
        values = {}
        for site in self.model.sites:
            name = site.unknown_name()
            if name in self.posterior.history:
                value = self.posterior.history[name].flatten(0, 1)
                values[name] = value.log() if site.lognormal else value
        return self.model.unconstrained(values, keys)

    def log_evidence(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The estimate and its standard error by cell; None if it is refused."""
        try:
            return self.posterior.log_evidence, self.posterior.log_evidence_se
        except EvidenceError:
            return None


def check_run(seed: int) -> None:
    """Means, standard deviations and the evidence within five standard errors.

    Raises:
        AssertionError: With the worst errors, in posterior standard deviations.
    """
    model = random_model(seed)
    exact, sampled = model.exact(), Sampled(model)
    draws, sd = sampled.draws(exact.keys), exact.covariance.diagonal().sqrt()
    off = ((draws.mean(0) - exact.mean) / sd).abs().max()
    assert float(off) < 5 / NUM_EFFECTIVE**0.5
    wide = (draws.std(0) / sd - 1).abs().max()
    assert float(wide) < 5 / (2 * NUM_EFFECTIVE) ** 0.5
    check_evidence(sampled)


def check_evidence(sampled: Sampled) -> None:
    evidence = sampled.log_evidence()
    assert (evidence is not None) == sampled.model.exact().has_prior
    if evidence is None:
        return
    names = [name for name, _ in sampled.population]
    for cell in itertools.product(*(range(size) for _, size in sampled.population)):
        expected = sampled.model.exact(dict(zip(names, cell, strict=True))).log_evidence
        error, standard_error = float(evidence[0][cell]) - expected, float(evidence[1][cell])
        if math.isfinite(standard_error):
            assert abs(error) < 5 * standard_error + 1e-6, cell


@pytest.mark.parametrize(
    "seed",
    [
        seed if seed in SAMPLED else pytest.param(seed, marks=pytest.mark.slow)
        for seed in sorted(SEEDS, key=lambda seed: seed not in SAMPLED)
    ],
)
def test_runs_of_random_programs_give_the_exact_moments_and_evidence(seed):
    check_run(seed)
