from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from dcpc.divide.model import sample_prior

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
    draws = torch.vmap(lambda _: sample_prior(model, (), {}), randomness="different")(torch.ones(2))
    assert bool(draws["z"].isfinite().all())
