from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from dcpc.divide import read_sites
from dcpc.divide.handlers import accelerator_of, running
from dcpc.divide.model import sample_prior
from dcpc.errors import ModelError

PRIORS = [
    dist.Exponential(1.0),
    dist.Weibull(1.0, 0.5),
    dist.Gamma(0.01, 0.01),
    dist.Beta(0.1, 0.1),
    dist.Uniform(-1.0, 2.0),
    dist.Kumaraswamy(0.2, 0.3),
    dist.Pareto(1.0, 1.5),
]


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
@pytest.mark.parametrize("prior", PRIORS, ids=lambda fn: type(fn).__name__)
def test_an_extreme_uniform_variate_is_no_infinite_latent(
    monkeypatch: pytest.MonkeyPatch, prior: dist.Distribution, extreme: float
) -> None:
    """One in 2^24 single-precision uniform variates is exactly zero."""

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(()))

    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full(*a, extreme, **k))
    draws = torch.vmap(lambda _: sample_prior(model, (), {}, ["z"]), randomness="different")(
        torch.ones(2)
    )
    assert bool(draws["z"].isfinite().all())


# The device `meta`, which every machine has, stands for an accelerator in the following.


@pytest.mark.parametrize("where", ["argument", "keyword", "parameter"])
def test_a_program_makes_tensors_where_its_data_or_parameters_are(where: str) -> None:
    data = {"x": torch.zeros(2, device="meta"), "y": 1.0}
    model = torch.nn.Linear(2, 2, device="meta" if where == "parameter" else "cpu")
    args, kwargs = ((data,) if where == "argument" else ()), (data if where == "keyword" else {})
    with running(model, args, kwargs):
        assert dist.Normal(0.0, 1.0).loc.device.type == "meta"
        assert torch.zeros(3).device.type == "meta"
    assert torch.zeros(3).device.type == "cpu"


def test_a_program_on_the_cpu_leaves_the_default_device_alone() -> None:
    with torch.device("meta"), accelerator_of(torch.zeros, (torch.zeros(1, device="cpu"),), {}):
        assert torch.zeros(3).device.type == "meta"


def test_data_that_are_elsewhere_than_the_latents_are_refused_by_name() -> None:
    x = torch.zeros((), device="meta")

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"'z' on cpu and site 'x' on meta; pass the data as arg"):
        read_sites(model, (), {})


def test_prior_draws_run_a_model_as_far_as_its_last_latent() -> None:
    """They are those of the whole program, in whatever contexts it ends."""
    decoded = []

    def model() -> None:
        with pyro.plate("n", 3):
            top = pyro.sample("top", dist.Gamma(2.0, 1.0))
            z = pyro.sample("z", dist.Normal(top, 1.0))
            decoded.append(z.exp())
            pyro.sample("x", dist.Normal(decoded[-1], 1.0), obs=torch.zeros(3))

    def draw(names: list[str]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return sample_prior(model, (), {}, names)

    whole = draw(["top", "z", "absent"])  # a site that never comes: the model runs to its end
    assert len(decoded) == 1
    early = draw(["top", "z"])
    assert len(decoded) == 1
    assert early.keys() == whole.keys() == {"top", "z"}
    assert all(torch.equal(early[name], whole[name]) for name in whole)
    assert pyro.poutine.runtime._PYRO_STACK == []
