from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from dcpc.divide.model import sample_prior


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(3))


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
def test_a_uniform_draw_of_exactly_zero_is_no_infinite_latent(
    monkeypatch: pytest.MonkeyPatch, extreme: float
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full(*a, extreme, **k))
    draws = torch.vmap(lambda _: sample_prior(model, (), {}), randomness="different")(torch.ones(2))
    # The normal's quantiles at 2^-24 and 1 - 2^-24.
    assert bool((draws["z"].abs() < 5.5).all())
    assert bool((draws["z"].abs() > 5).all())
