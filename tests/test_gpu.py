"""Inference on a GPU: exact answers, the CPU's numbers, and files that a CPU can read."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_models import models as discrete_models
from oracles import conjugate_pairs, enumerate_posterior, gaussian_chain, kalman
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import CASES, Case, chain, eight_schools

from dcpc import DCPC, Posterior
from dcpc.conquer import MOVES, PRECONDITIONERS
from dcpc.divide import Arguments, divide, read_sites
from dcpc.errors import ModelError
from dcpc.models import ConvolutionalGenerator, DeepLatentGaussian
from dcpc.networks import pc_gradients
from dcpc.presets import PRESETS
from dcpc.recombine import RESAMPLERS, LogWeights
from dcpc.sweep import SweepState

pytestmark = pytest.mark.gpu

K = 5
QUIET = {"progress": False, "seed": 0}
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@pytest.fixture
def default_device() -> Iterator[None]:
    """New tensors are made on the GPU, as Pyro's own users of one have it."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def on_gpu(*values: Tensor) -> list[Tensor]:
    return [value.cuda() for value in values]


def devices(tree: object) -> set[str]:
    return {leaf.device.type for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


def built_on_gpu(case: Case):
    """A model of the zoo with its data and parameters on the GPU, while new tensors are not."""
    with torch.device("cuda"):
        model, args, kwargs = case.build()
        read_sites(model, args, kwargs)  # makes its parameters
    return model, args, kwargs


# -- densities ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("backend", ["graph", "vmap", "loop"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_densities_and_scores_are_those_of_the_cpu(case, backend):
    if backend == "vmap" and case.name.startswith("buffer_write"):
        pytest.skip("vmap alone takes no writes in place")
    if case.name == "conditioned":
        pytest.skip("its data are no arguments, so that nothing says where they are")
    found = []
    for build in (case.build, lambda: built_on_gpu(case)):
        pyro.clear_param_store()
        model, args, kwargs = build()
        arguments, sites = Arguments(args, kwargs), read_sites(model, args, kwargs)
        division = divide(model, arguments, sites, K, backend=backend)
        assert {name: set(on) for name, on in division.graph.depends.items()} == case.depends
        generator = torch.Generator().manual_seed(5)
        latents = {
            name: torch.randn(K, *sites[name].unconstrained_shape, generator=generator).to(u)
            for name, u in division.program.example.items()
        }
        numbers = division.log_factors(latents, arguments.tensors)
        for group in division.groups:
            evaluated = group.evaluate(group.pack(latents), latents, arguments.tensors)
            numbers |= {group.name: evaluated.log_density, f"{group.name} score": evaluated.score}
        found.append(numbers)
    on_cpu, on_device = found
    assert devices(on_cpu) == {"cpu"}
    assert devices(on_device) == {"cuda"}
    for name, expected in on_cpu.items():
        torch.testing.assert_close(on_device[name].cpu(), expected, rtol=1e-9, atol=1e-9)


def supports(x: Tensor) -> None:
    """A latent on every kind of support, all parameters plain numbers or made on the way."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    within = pyro.sample("within", dist.Uniform(-1.0, 2.0))
    part = pyro.sample("part", dist.Beta(2.0, 3.0))
    precision = pyro.sample("precision", dist.Gamma(3.0, 1.0))
    tail = pyro.sample("tail", dist.StudentT(4.0, 0.0, 1.0))
    angle = pyro.sample("angle", dist.VonMises(0.3, 2.0))
    ordered = pyro.sample(
        "ordered",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
        ),
    )
    flat = pyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), (3,)))
    loc = share + factor.sum(-1) + within + part + tail + angle.sin() + ordered + flat
    with pyro.plate("data", len(x)):
        noise = dist.MultivariateNormal(torch.zeros(3), torch.eye(3)).mask(torch.tensor(True))
        shift = pyro.sample("shift", noise)
        spread = scale * precision.rsqrt()
        pyro.sample("x", dist.Normal(loc + shift, spread).to_event(1), obs=x)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc"])
def test_a_model_of_plain_numbers_follows_its_data_to_the_gpu(algorithm):
    x = torch.randn(6, 3).cuda()
    engine = DCPC(supports, num_particles=40, algorithm=algorithm)
    posterior = engine.run(x, num_sweeps=4, conditional_ess=0.5, **QUIET)
    assert devices((posterior.samples, posterior.history, posterior.log_weight)) == {"cuda"}
    assert all(z.isfinite().all() for z in posterior.samples.values())
    unit_rows = posterior.samples["factor"].square().sum(-1)
    torch.testing.assert_close(unit_rows, torch.ones_like(unit_rows))
    assert "40 particles" in posterior.format_summary()


def test_data_that_are_elsewhere_than_the_latents_are_named():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.tensor(0.5).cuda()
    with pytest.raises(ModelError, match=r"'mu' on cpu.* 'x' on cuda:0.* torch.set_default_device"):
        DCPC(model, num_particles=4).run(**QUIET)


# -- posteriors --------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64", "default_device")
@pytest.mark.parametrize("name", [pair.name for pair in conjugate_pairs()])
def test_posteriors_and_evidence_are_exact_for_every_kind_of_support(name):
    pair = next(pair for pair in conjugate_pairs() if pair.name == name)
    posterior = DCPC(pair.model, num_particles=300).run(num_sweeps=60, **QUIET)
    assert devices(posterior.samples) == {"cuda"}
    about = posterior.statistics()["z"]
    error = (about["mean"] - pair.mean.to(about["mean"])).abs()
    assert bool((error < 5 * about["mcse"]).all())
    torch.testing.assert_close(about["std"], pair.std.to(about["std"]), rtol=0.1, atol=0.0)
    log_evidence = float(posterior.log_evidence)
    allowed = 0.02 + 4 * float(posterior.log_evidence_se)
    assert abs(log_evidence - pair.log_evidence) < allowed


def test_a_state_space_chain_is_smoothed_exactly():
    exact = kalman(torch.tensor([0.3, -0.8, 1.1, 0.4, -0.2]))
    engine = DCPC(exact.model, num_particles=400)
    posterior = engine.run(*on_gpu(*exact.args), num_sweeps=100, **QUIET)
    draws = {name: z.flatten(0, 1).cpu() for name, z in posterior.history.items()}
    count = len(draws["z0"])
    mean, sd, correlation = exact.errors(draws, torch.full((count,), 1.0 / count))
    assert max(mean, sd, correlation) < 0.06
    error = float(posterior.log_evidence) - exact.log_evidence
    assert abs(error) < 0.02 + 4 * float(posterior.log_evidence_se)


def test_eight_schools_are_those_of_the_cpu():
    engine, options = DCPC(eight_schools()[0], num_particles=200), {"num_sweeps": 40, **QUIET}
    expected = engine.run(EFFECTS, ERRORS, **options)
    found = engine.run(*on_gpu(EFFECTS, ERRORS), **options)
    assert devices(found.samples) == {"cuda"}
    error = float(found.log_evidence) - float(expected.log_evidence)
    errors = float(found.log_evidence_se), float(expected.log_evidence_se)
    assert abs(error) < 5 * max(errors) + 0.05
    for name, about in expected.statistics().items():
        got = found.statistics()[name]
        mcse = about["mcse"].hypot(got["mcse"].cpu())
        assert bool(((got["mean"].cpu() - about["mean"]).abs() < 5 * mcse).all()), name


@pytest.mark.usefixtures("default_device")
def test_eight_schools_run_where_new_tensors_are_on_the_gpu():
    posterior = DCPC(eight_schools()[0], num_particles=50).run(
        *on_gpu(EFFECTS, ERRORS), num_sweeps=20, **QUIET
    )
    assert devices((posterior.samples, posterior.history)) == {"cuda"}
    posterior.resample()
    posterior.diagnostics()


@pytest.mark.parametrize("algorithm", list(PRESETS))
@pytest.mark.parametrize("population", [None, 7])
def test_every_preset_sweeps(algorithm, population):
    exact = gaussian_chain(population)
    single = PRESETS[algorithm].single_particle
    engine = DCPC(exact.model, num_particles=1 if single else 20, algorithm=algorithm)
    posterior = engine.run(*on_gpu(*exact.args), num_sweeps=12, **QUIET)
    assert devices((posterior.samples, posterior.state.latents)) == {"cuda"}
    posterior.format_summary()


OPTIONS = {
    "gradient": {"correction": "none"},
    "particle_variance": {"correction": "resample"},
    "block": {"blocks": [("z1", "z2")]},
}
"""What parts need that do not go with the default ones."""


@pytest.mark.parametrize("part", [*MOVES, *PRECONDITIONERS, *RESAMPLERS, "block"])
def test_every_part_runs(part):
    options = dict(OPTIONS.get(part, {}))
    if part in MOVES:
        options["move"] = part
    elif part in PRECONDITIONERS:
        options["preconditioner"] = part
    elif part in RESAMPLERS:
        options |= {"resampling": part, "algorithm": "dcpc-smc", "resample_threshold": 1.0}
    exact = gaussian_chain(3)
    posterior = DCPC(exact.model, num_particles=16, **options).run(
        *on_gpu(*exact.args), num_sweeps=10, **QUIET
    )
    assert devices(posterior.samples) == {"cuda"}


DISCRETE = [case.name for case in discrete_models() if case.args]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_latents_have_the_probabilities_of_enumeration(name):
    case = next(case for case in discrete_models() if case.name == name)
    exact = enumerate_posterior(case.model, case.args, case.values)
    engine = DCPC(case.model, num_particles=500, **case.options)
    posterior = engine.run(*on_gpu(*case.args), num_sweeps=80, **QUIET)
    assert devices((posterior.samples, posterior.history)) == {"cuda"}
    for latent, shares in exact.probabilities.items():
        found = posterior.probabilities(latent).cpu()
        if name == "one_hot":  # probabilities of the entries, not of zero and one in each
            shares = shares[..., 1]
        seen = min(found.shape[-1], shares.shape[-1])
        off = (found[..., :seen] - shares[..., :seen]).abs()
        is_latent = ~case.args[1] if latent.endswith("_unobserved") else ...
        assert float(off[is_latent].max()) < 0.03


@pytest.mark.usefixtures("float64")
def test_discrete_latents_are_summed_out_and_drawn_as_on_the_cpu():
    def model(x):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x)

    x, engine = EFFECTS.double() / 10, DCPC(model, num_particles=20)
    on_cpu, here = engine.bind(x), engine.bind(x.cuda())
    state = here.init()
    latents = {name: u.cpu() for name, u in state.latents.items()}
    assert set(latents) == {"share", "loc"}
    expected = on_cpu.density.log_joint(latents)
    torch.testing.assert_close(here.log_joint(state).cpu(), expected)
    drawn, probabilities = here.completed(state.latents)
    assert drawn["z"].is_cuda
    torch.testing.assert_close(probabilities["z"].cpu(), on_cpu.completed(latents)[1]["z"])
    posterior = engine.run(x.cuda(), num_sweeps=10, **QUIET)
    assert devices((posterior.samples, posterior.probabilities("z"))) == {"cuda"}


def test_masks_initial_values_and_missing_data():
    x = torch.tensor([1.0, torch.nan, 3.0, torch.nan, 2.0]).cuda()

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=~x.isnan())

    posterior = DCPC(model, num_particles=400).run(
        x, num_sweeps=40, initial_values={"mu": 2.0}, **QUIET
    )
    precision = 3.0 + 1.0 / 25.0
    about = posterior.statistics()["mu"]
    assert abs(float(about["mean"]) - 6.0 / precision) < 5 * float(about["mcse"])
    assert float(about["std"]) == pytest.approx(precision**-0.5, rel=0.05)
    assert posterior.num_masked["x_unobserved"] == 3


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_particles_start_from_a_guide(kind):
    exact = gaussian_chain()
    args = on_gpu(*exact.args)
    engine = DCPC(exact.model, kind(exact.model, init_scale=1.0), num_particles=300)
    posterior = engine.run(*args, num_sweeps=10, **QUIET)
    assert devices(posterior.samples) == {"cuda"}
    error = float(posterior.log_evidence) - exact.log_evidence
    assert abs(error) < 0.05 + 5 * float(posterior.log_evidence_se)
    problem = engine.bind(*args)
    problem.guide_loss(problem.init()).backward()


# -- randomness and files ----------------------------------------------------------------------


def test_a_seeded_run_repeats_itself_and_leaves_both_generators_alone():
    engine, data = DCPC(chain()[0], num_particles=64), torch.tensor(0.7).cuda()
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    first, second = (engine.run(data, num_sweeps=20, **QUIET) for _ in range(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], torch.cuda.get_rng_state())
    for name, z in first.history.items():
        assert torch.equal(z, second.history[name])
    other = engine.run(data, num_sweeps=20, progress=False, seed=1)
    assert not torch.equal(other.samples["a"], first.samples["a"])


def test_a_posterior_is_read_and_told_on_the_cpu(tmp_path):
    engine = DCPC(eight_schools()[0], num_particles=50)
    posterior = engine.run(*on_gpu(EFFECTS, ERRORS), num_sweeps=40, **QUIET)
    posterior.save(tmp_path / "schools.pt")
    loaded = Posterior.load(tmp_path / "schools.pt")
    assert devices((loaded.samples, loaded.history, loaded.state.latents)) == {"cpu"}
    for name, about in posterior.statistics().items():
        for kind, value in about.items():
            got = loaded.statistics()[name][kind]
            torch.testing.assert_close(got, value.cpu(), rtol=1e-3, atol=1e-4, equal_nan=True)
    engine.sweep(loaded.state, EFFECTS, ERRORS)
    back = Posterior.load(tmp_path / "schools.pt", device="cuda")
    engine.sweep(back.state, *on_gpu(EFFECTS, ERRORS))


# -- networks of torch ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("likelihood", ["normal", "discretized_normal"])
def test_a_generator_of_colour_images_is_certified(norm, likelihood):
    torch.manual_seed(0)
    model = ConvolutionalGenerator(10, likelihood=likelihood, norm=norm).cuda()
    x = (torch.randint(256, (8, 3, 32, 32)) / 127.5 - 1).cuda()
    problem = DCPC(model, num_particles=3).bind(x)
    state = problem.init()
    state, _ = problem.sweep(state)
    problem.loss(state).backward()
    assert all(p.grad.is_cuda for p in model.parameters())


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli"])
def test_a_deep_model_learns_the_gradient_of_the_cpu(likelihood):
    torch.manual_seed(0)
    model = DeepLatentGaussian([3, 6], [1, 4, 4], likelihood=likelihood).double()
    x = torch.rand(9, 1, 4, 4, dtype=torch.double).round()
    state = DCPC(model, num_particles=4).bind(x).init()
    gradients = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        model.to(device)
        here = SweepState(
            {name: u.to(device) for name, u in state.latents.items()},
            LogWeights(state.log_weight.log_weight.to(device)),
            state.log_joint.to(device),
        )
        DCPC(model, num_particles=4).bind(x.to(device)).loss(here).backward()
        gradients.append([p.grad.cpu().clone() for p in model.parameters()])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", ["exact", "fixed_prediction", "strict"])
def test_predictive_coding_gradients_draw_noise_once(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 2)).cuda()
    x, y = torch.randn(16, 4).cuda(), torch.randn(16, 2).cuda()
    pc_gradients(model, nn.functional.mse_loss, x, y, mode=mode, num_steps=4)
    assert all(p.grad.isfinite().all() for p in model.parameters())
