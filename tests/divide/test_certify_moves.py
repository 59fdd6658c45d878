"""The certificate compares what moves with Pyro's joint density: broken engines do not pass."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from zoo import CASES

from dcpc import DCPC
from dcpc.divide import handlers, unit
from dcpc.divide.doubled import NotDoubledError, double_precision
from dcpc.divide.program import GraphProgram
from dcpc.errors import CertificationError

X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [2.0, 0.3, -1.0]])


def nested(x):
    """Plates as Pyro allocates them: the outer one has dim -1."""
    with pyro.plate("outer", 3):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 3):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def scaled(x):
    with poutine.scale(scale=3.0):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(s), obs=torch.tensor(2.0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_of_the_zoo_passes(case):
    model, args, kwargs = case.build()
    DCPC(model, num_particles=3).division(*args, **kwargs)


def test_elements_in_the_order_of_axes_instead_of_plates_do_not_pass(monkeypatch):
    def by_axis(factor, plates):
        keep = {factor.dim() + plate.dim for plate in plates}
        rest = [axis for axis in range(1, factor.dim()) if axis not in keep]
        return factor.sum(rest) if rest else factor

    monkeypatch.setattr(unit, "sum_to_plates", by_axis)
    with pytest.raises(CertificationError, match=r"unit 'z', element \(\d, \d\) of its plates"):
        DCPC(nested, num_particles=3).division(X)


def test_a_scaled_jacobian_does_not_pass(monkeypatch):
    original = handlers.Substitute._record

    def scaled_jacobian(self, name, msg, site):
        original(self, name, msg, site)
        if name == "s":
            u = self.latents["s"]
            self.log_factors["s"] = self.log_factors["s"] + 2.0 * u  # log |det J| of exp is u

    monkeypatch.setattr(handlers.Substitute, "_record", scaled_jacobian)
    with pytest.raises(CertificationError, match=r"unit 's'.*changes by"):
        DCPC(scaled, num_particles=3).division(X)


def test_a_factor_that_is_left_out_does_not_pass(monkeypatch):
    """The children's factors are a part of the unit's log-density: without, its change is off."""
    original = GraphProgram.select

    def without_data(self, names, *, for_score=False):
        run = original(self, names, for_score=for_score)
        if not for_score:
            return run
        return lambda latents, tensors: {
            name: 0 * value if name == "x" else value
            for name, value in run(latents, tensors).items()
        }

    monkeypatch.setattr(GraphProgram, "select", without_data)
    with pytest.raises(CertificationError, match="where the model's joint density changes by"):
        DCPC(nested, num_particles=3).division(X)


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_a_gradient_that_is_not_that_of_the_density_does_not_pass(monkeypatch, backend):
    evaluate = unit.UnitGroup.evaluate

    def stretched(self, value, latents, tensors, *target):
        evaluation = evaluate(self, value, latents, tensors, *target)
        return unit.ScoredDensity(evaluation.log_density, 1.5 * evaluation.score)

    monkeypatch.setattr(unit.UnitGroup, "evaluate", stretched)
    with pytest.raises(CertificationError, match=r"its score is .* has the slope"):
        DCPC(nested, num_particles=3, backend=backend).division(X)


def test_densities_that_are_flat_or_steep_on_purpose_pass():
    """Gradients that the author stops for learning, and kinks, are no disagreement."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Laplace(z.detach(), 1.0))
        pyro.sample("x", dist.Normal(torch.relu(w) + z.detach().abs(), 1.0), obs=x)

    DCPC(model, num_particles=3).division(X[0, 0])


def test_the_certificate_can_be_left_out(monkeypatch):
    monkeypatch.setattr(
        "dcpc.divide.dividing.certify_moves", lambda *_: pytest.fail("it was certified")
    )
    DCPC(nested, num_particles=3, certify=False).division(X)


def one_of_many(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def test_one_datum_of_many_that_is_left_out_does_not_pass_in_single_precision(monkeypatch):
    """Its term is smaller than the rounding of the sum over all: double precision tells."""
    original = GraphProgram.select

    def without_the_first(self, names, *, for_score=False):
        run = original(self, names, for_score=for_score)

        def spoilt(latents, tensors):
            factors = dict(run(latents, tensors))
            if for_score and "x" in factors:
                kept = (torch.arange(factors["x"].shape[-1]) > 0).to(factors["x"])
                factors["x"] = factors["x"] * kept
            return factors

        return spoilt

    torch.manual_seed(0)
    x = torch.randn(20_000)
    DCPC(one_of_many, num_particles=3).division(x)
    monkeypatch.setattr(GraphProgram, "select", without_the_first)
    with pytest.raises(CertificationError, match=r"unit 'mean', element \(\).*changes by"):
        DCPC(one_of_many, num_particles=3).division(x)


def saturated(x):
    """A link whose probabilities clamp to the last digit of the precision they are captured in."""
    slope = pyro.sample("slope", dist.Normal(0.0, 30.0))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Bernoulli(torch.sigmoid(slope * x)), obs=(x > 0).to(x))


def standardised(x):
    """A capture holds the numbers that it took out of its data, as they were rounded."""
    slope = pyro.sample("slope", dist.Normal(0.0, float(x.std())))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(slope * 1e3, x.abs().max().item()), obs=x)


def in_place(x):
    """Writes to a tensor of a fixed precision, which has no double."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    table = torch.from_numpy(np.zeros(3, dtype=np.float32))
    table[0] = 1.0
    pyro.sample("x", dist.Normal(z * table[0], 1.0), obs=x[0])


@pytest.mark.parametrize("model", [saturated, standardised, in_place])
@pytest.mark.parametrize("backend", ["graph", "vmap", "loop"])
def test_what_belongs_to_a_precision_is_no_disagreement(model, backend):
    for seed in range(5):
        torch.manual_seed(seed)
        DCPC(model, num_particles=3, backend=backend).division(10 * torch.randn(50))


def test_doubled_programs_see_doubles_only():
    layer, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    with double_precision():
        assert torch.ones(2).dtype == torch.float64
        assert (torch.tensor([1, 2]).float() / 3).dtype == torch.float64
        assert x.to(torch.float32).dtype == torch.float64
        got = layer(x)
        with pytest.raises(NotDoubledError, match="add_"):
            x.add_(1.0)
        with pytest.raises(NotDoubledError, match="__setitem__"):
            x[0] = 1.0
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0.0)
    assert torch.get_default_dtype() == torch.float32
