"""The certificate compares what moves with Pyro's joint density: broken engines do not pass."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from zoo import CASES

from dcpc import DCPC
from dcpc.divide import handlers, unit
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
    original = handlers.Substitute._pyro_post_sample

    def scaled_jacobian(self, msg):
        original(self, msg)
        if msg["name"] == "s" and self.sites is not None:
            u = self.latents["s"]
            self.log_factors["s"] = self.log_factors["s"] + 2.0 * u  # log |det J| of exp is u

    monkeypatch.setattr(handlers.Substitute, "_pyro_post_sample", scaled_jacobian)
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
        "dcpc.divide.division.certify_moves", lambda *_: pytest.fail("it was certified")
    )
    DCPC(nested, num_particles=3, certify=False).division(X)
