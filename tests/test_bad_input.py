"""Every mistake that a user may make has one error, which names the place and the way out."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_chain

from dcpc import DCPC
from dcpc.errors import DataError, DCPCError, DegenerateWeightsError, ModelError, OptionError

X = torch.tensor(1.0)


def run(model, *args, **options):
    return DCPC(model, num_particles=4, **options).run(*args, num_sweeps=2, progress=False, seed=0)


def refused(kind, *parts, of):
    """Runs a function that must raise `kind` with all of the parts in its message."""
    with pytest.raises(kind) as caught:
        of()
    message = str(caught.value)
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in: {message}"
    assert isinstance(caught.value, ValueError)


# -- models ----------------------------------------------------------------------------------


def branching(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = z if z > 0 else -z
    pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def itemised(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.item(), 1.0), obs=x)


def numpied(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(torch.as_tensor(z.detach().numpy()), 1.0), obs=x)


def floated(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(float(z), 1.0), obs=x)


def counted(x):
    z = pyro.sample("z", dist.Gamma(2.0, 1.0))
    total = torch.zeros(())
    for _ in range(int(z)):
        total = total + 1
    pyro.sample("x", dist.Normal(total, 1.0), obs=x)


@pytest.mark.parametrize("backend", ["auto", "graph", "vmap"])
@pytest.mark.parametrize(
    ("model", "what", "line"),
    [
        (branching, "branches on a latent", "loc = z if z > 0 else -z"),
        (itemised, r"\.item\(\)", r"dist.Normal\(z.item\(\)"),
        (numpied, "numpy", r"z\.detach\(\)\.numpy\(\)"),
        (floated, r"\.item\(\)", r"float\(z\)"),
        (counted, r"branches|\.item\(\)", r"range\(int\(z\)\)"),
    ],
)
def test_latent_that_steers_python_is_refused_with_the_line(model, what, line, backend):
    refused(
        ModelError,
        what,
        line,
        r"\['z'\]",
        r"torch\.where",
        of=lambda: run(model, X, backend=backend),
    )


def test_support_without_a_bijection_is_refused():
    def model(x):
        z = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), torch.eye(2)))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), precision_matrix=z), obs=x)

    refused(
        ModelError, "'precision'", "biject_to", "reparam", of=lambda: run(model, torch.zeros(2))
    )


def test_support_that_depends_on_a_latent_is_refused():
    def model(x):
        n = pyro.sample("n", dist.Poisson(5.0))
        k = pyro.sample("k", dist.Binomial(n, torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    refused(ModelError, "'k'", "discrete", "depends on another latent", of=lambda: run(model, X))


def test_scaled_prior_of_a_discrete_latent_is_refused():
    def model(x):
        with pyro.poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(ModelError, "'z'", "discrete", "handler", "pyro.factor", of=lambda: run(model, X))


def test_block_of_discrete_and_continuous_latents_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        loc = pyro.sample("loc", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    refused(
        OptionError,
        r"\['z'\]",
        "continuous",
        "block",
        of=lambda: run(model, X, blocks=[("z", "loc")]),
    )


def test_initial_value_of_a_discrete_latent_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = DCPC(model, num_particles=4)
    refused(
        OptionError,
        "'z'",
        "discrete",
        "leave it out",
        of=lambda: engine.run(X, initial_values={"z": 1.0}, progress=False),
    )


def test_mask_that_does_not_fit_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    refused(DataError, "'x'", r"\(2,\)", r"\(3,\)", of=lambda: run(model, X))


def test_category_outside_of_the_support_is_refused():
    def model(x):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Categorical(p), obs=torch.tensor([0, 3, 1]))

    refused(DataError, "'x'", "Categorical", "3", of=lambda: run(model, X))


def test_model_without_latents_is_refused():
    def model(x):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    refused(ModelError, "no latent", r"\['x'\]", "pyro.sample", of=lambda: run(model, X))


def test_model_without_observations_is_refused():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    refused(ModelError, "no observed", r"\['z'\]", "obs=", "condition", of=lambda: run(model))


def test_model_without_any_site_is_refused():
    refused(ModelError, "no latent", "none", of=lambda: run(lambda: None))


def test_model_that_is_not_callable_is_refused():
    refused(OptionError, "callable", "17", of=lambda: DCPC(17, num_particles=2))


# -- data ------------------------------------------------------------------------------------


def plain(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_data_with_nan_are_refused():
    x = torch.tensor([1.0, math.nan, math.nan])
    refused(DataError, "'x'", "2 NaN among 3", "mask", of=lambda: run(plain, x))


def test_nan_that_is_masked_is_none_of_our_business():
    x = torch.tensor([1.0, math.nan])

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2), pyro.poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.nan_to_num())

    assert bool(run(model, x).samples["z"].isfinite().all())


@pytest.mark.parametrize(
    ("likelihood", "value", "support"),
    [
        (lambda z: dist.Gamma(z.exp(), 1.0), -1.5, r"GreaterThan"),
        (lambda z: dist.Bernoulli(logits=z), 0.5, "Boolean"),
        (lambda z: dist.Beta(z.exp(), 1.0), 2.0, "Interval"),
        (lambda z: dist.Poisson(z.exp()), 2.5, "IntegerGreaterThan"),
    ],
)
def test_value_outside_the_support_is_refused(likelihood, value, support):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("count", likelihood(z), obs=x)

    refused(
        DataError,
        "'count'",
        support,
        re.escape(f"{value:.6g}"),
        "Rescale",
        of=lambda: run(model, torch.tensor(value)),
    )


def test_new_data_with_nan_are_refused_although_their_shape_is_known():
    engine = DCPC(plain, num_particles=4)
    engine.run(torch.zeros(3), num_sweeps=2, progress=False)
    refused(
        DataError,
        "'x'",
        "NaN",
        of=lambda: engine.run(torch.tensor([0.0, math.nan, 1.0]), num_sweeps=2, progress=False),
    )


def test_shape_that_contradicts_the_state_is_refused():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = DCPC(model, num_particles=4)
    state = engine.init(torch.zeros(5))
    other = engine.bind(torch.zeros(3))
    for act in (other.sweep, other.loss, other.observation_means):
        refused(
            DataError,
            "'z'",
            r"\(4, 5\)",
            r"\(4, 3\)",
            r"init\(",
            of=lambda act=act: act(state),
        )


def test_state_of_another_number_of_particles_is_refused():
    chain = gaussian_chain()
    state = DCPC(chain.model, num_particles=4).init(*chain.args)
    other = DCPC(chain.model, num_particles=7)
    refused(DataError, r"\(4,\)", r"\(7,\)", of=lambda: other.sweep(state, *chain.args))


def test_data_that_no_particle_can_explain_name_the_site():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * math.inf, 1.0, validate_args=False), obs=x)

    refused(DegenerateWeightsError, "all 4 particles", "'x'", "step size", of=lambda: run(model, X))


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -3])
def test_fewer_than_one_particle_is_refused(count):
    refused(
        OptionError,
        "num_particles",
        "at least 1",
        str(count),
        of=lambda: DCPC(plain, num_particles=count),
    )


@pytest.mark.parametrize("count", [2.5, "4", True, None])
def test_number_of_particles_that_is_no_integer_is_refused(count):
    refused(
        OptionError,
        "num_particles",
        "integer",
        re.escape(repr(count)),
        of=lambda: DCPC(plain, num_particles=count),
    )


@pytest.mark.parametrize("step_size", [-0.1, 0.0, math.inf, math.nan])
def test_step_size_that_is_not_positive_is_refused(step_size):
    refused(
        OptionError,
        "step_size",
        "positive",
        re.escape(repr(step_size)),
        of=lambda: DCPC(plain, num_particles=4, step_size=step_size),
    )


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("algorithm", ["dcpc", "dcpc-smc", "dcpc-paper", "pgd", "lpc", "mcpc", "pc", "ipc"]),
        ("schedule", ["sequential", "coloured", "joint"]),
        ("move", ["langevin", "gradient"]),
        ("correction", ["metropolis", "weight", "resample", "none"]),
        ("preconditioner", ["identity", "particle_variance", "second_moment", "dense", "adapted"]),
        ("resampling", ["systematic", "stratified", "multinomial", "residual"]),
    ],
)
def test_unknown_name_lists_the_choices(option, choices):
    refused(
        OptionError,
        option,
        "'nonsense'",
        *choices,
        of=lambda: DCPC(plain, num_particles=4, **{option: "nonsense"}),
    )


@pytest.mark.parametrize("option", ["move", "correction", "preconditioner"])
def test_part_of_the_wrong_type_is_refused(option):
    refused(
        OptionError, option, "instance of", of=lambda: DCPC(plain, num_particles=4, **{option: 3.0})
    )


def test_unknown_backend_lists_the_choices():
    refused(
        OptionError,
        "backend",
        "'nonsense'",
        "graph",
        "vmap",
        "loop",
        of=lambda: run(plain, torch.zeros(2), backend="nonsense"),
    )


@pytest.mark.parametrize("correction", ["metropolis", "weight", "resample"])
def test_correction_that_the_joint_schedule_does_not_allow_is_refused(correction):
    refused(
        OptionError,
        "joint",
        correction,
        "coloured",
        "blocks",
        of=lambda: DCPC(plain, num_particles=4, schedule="joint", correction=correction),
    )


def test_a_word_for_blocks_other_than_auto_is_refused():
    refused(
        OptionError,
        "blocks",
        "'auto'",
        "foo",
        of=lambda: DCPC(plain, num_particles=4, blocks="foo"),
    )


def test_joint_schedule_with_one_block_of_everything_is_allowed():
    chain = gaussian_chain()
    posterior = run(chain.model, *chain.args, schedule="joint", blocks=[("z1", "z2")])
    assert list(posterior.acceptance) == ["z1+z2"]


def test_move_without_a_density_cannot_be_corrected():
    refused(
        OptionError,
        "gradient",
        "no way back",
        "langevin",
        of=lambda: DCPC(plain, num_particles=4, move="gradient"),
    )


def test_preconditioner_of_the_moved_particles_cannot_be_exact():
    refused(
        OptionError,
        "'particle_variance'",
        "'metropolis'",
        "adapted",
        of=lambda: DCPC(plain, num_particles=4, preconditioner="particle_variance"),
    )


@pytest.mark.parametrize("algorithm", ["mcpc", "pc", "ipc"])
def test_single_particle_algorithms_refuse_a_cloud(algorithm):
    refused(
        OptionError,
        algorithm,
        "num_particles=1",
        "pgd",
        of=lambda: DCPC(plain, num_particles=4, algorithm=algorithm),
    )


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_resample_threshold_out_of_range_is_refused(threshold):
    refused(
        OptionError,
        "resample_threshold",
        r"\[0, 1\]",
        str(threshold),
        of=lambda: DCPC(plain, num_particles=4, resample_threshold=threshold),
    )


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_sweeps": -1}, ["num_sweeps", "-1"]),
        ({"num_sweeps": 5, "num_warmup": 6}, ["num_warmup", "6"]),
        ({"num_sweeps": 5, "num_warmup": -2}, ["num_warmup", "-2"]),
        ({"keep_every": -1}, ["keep_every", "-1"]),
        ({"conditional_ess": 1.0}, ["conditional_ess", "1.0"]),
        ({"conditional_ess": 0.0}, ["conditional_ess", "0.0"]),
    ],
)
def test_options_of_a_run_out_of_range_are_refused(options, parts):
    refused(
        OptionError,
        *parts,
        of=lambda: DCPC(plain, num_particles=4).run(torch.zeros(2), progress=False, **options),
    )


@pytest.mark.parametrize("what", ["get_samples", "summary", "diagnostics"])
def test_results_before_a_run_are_refused(what):
    refused(OptionError, r"run\(", of=getattr(DCPC(plain, num_particles=4), what))


def test_all_errors_of_the_package_are_value_errors_of_one_family():
    for kind in (OptionError, ModelError, DataError, DegenerateWeightsError):
        assert issubclass(kind, DCPCError)
        assert issubclass(kind, ValueError)


def test_a_model_that_only_the_loop_backend_can_run_says_so_and_names_the_operation():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        found = torch.stack([z, -z])
        pyro.sample("x", dist.Normal(found[found > 0].sum(), 1.0), obs=x)

    message = r"once per particle: right, but slow.*vmap.*index.*test_bad_input"
    with pytest.warns(UserWarning, match=message):
        DCPC(model, num_particles=4).units(torch.ones(()))
    DCPC(model, num_particles=4, backend="loop").units(torch.ones(()))


def test_a_model_that_cannot_be_captured_as_one_graph_says_so(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a fault of the capture")

    monkeypatch.setattr("dcpc.divide.program.capture.capture", fails)
    with pytest.warns(UserWarning, match=r"as one graph.*never compiled.*a fault of the capture"):
        division = DCPC(plain, num_particles=4).division(torch.zeros(2))
    assert division.program.name == "vmap"
    DCPC(plain, num_particles=4, backend="vmap").division(torch.zeros(2))
