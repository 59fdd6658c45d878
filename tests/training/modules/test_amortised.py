"""The variational autoencoder against a linear-Gaussian model, whose posterior is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from dcpc.errors import OptionError
from dcpc.training import AmortisedModule, HeldOut, ImageData, ParticleModule


def evidence(x: Tensor) -> Tensor:
    """Of `x = z + e`, with standard normal `z` and `e`: of variance two."""
    return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x.flatten(1)).sum(1)


def batch(num_data: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(num_data, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return x, torch.zeros(num_data), torch.arange(num_data)


def module(model: nn.Module, guide: nn.Module, **options: object) -> AmortisedModule:
    made = AmortisedModule(model, guide, **{"held_out": HeldOut(2, 2, 2), **options})
    made._seed = 0
    made.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return made


def test_at_the_posterior_the_loss_is_minus_the_evidence(
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
) -> None:
    # Prior and noise of variance one: the posterior of z is N(x / 2, 1 / 2).
    exact = linear_encoder(slope=0.5, scale=math.sqrt(0.5))
    data = batch()
    loss = module(shifted_gaussian(), exact).training_step(data, 0)
    # log p(x, z) - log q(z | x) is then the same number for every z.
    torch.testing.assert_close(loss, -evidence(data[0]).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_samples", [2, 8])
def test_importance_weights_are_weighed_datum_by_datum(
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
    num_samples: int,
) -> None:
    """Loss and gradients of the bound, written out for the same draws; its place by many draws."""
    model, guide = shifted_gaussian(), linear_encoder(slope=0.2, offset=0.1, scale=1.1)
    data = batch(512)
    rows = data[0].flatten(1)
    made = module(model, guide, objective="iwae", num_samples=num_samples)
    torch.manual_seed(7)
    loss = made.learn(data)
    found = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])

    torch.manual_seed(7)
    scale, logs = guide.log_scale.exp(), []
    for _ in range(num_samples):
        proposal = dist.Normal(guide.slope * rows + guide.offset, scale)
        z = proposal.rsample()
        joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(model.shift + z, 1.0).log_prob(rows)
        logs.append((joint - proposal.log_prob(z)).sum(1))
    by_hand = -(torch.stack(logs).logsumexp(0) - math.log(num_samples)).mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(
        found, torch.autograd.grad(by_hand, [*model.parameters(), *guide.parameters()])
    )

    def mean(options: dict) -> float:
        tried = module(model, guide, **options)
        with torch.no_grad():
            return float(torch.stack([tried.learn(data) for _ in range(30)]).mean())

    bound = mean({"objective": "iwae", "num_samples": num_samples})
    assert -float(evidence(data[0]).mean()) < bound < mean({}) - 0.05


def test_iwae_is_refused_where_it_is_none(
    shifted_gaussian: Callable[..., nn.Module], linear_encoder: Callable[..., nn.Module]
) -> None:
    for options in ({}, {"num_samples": 4, "kl_warm_up_epochs": 2}):
        with pytest.raises(OptionError, match=r"objective='iwae' .*num_samples of at least 2"):
            module(shifted_gaussian(), linear_encoder(), objective="iwae", **options)
    with pytest.raises(OptionError, match="objective must be 'elbo' or 'iwae', got 'vi'"):
        module(shifted_gaussian(), linear_encoder(), objective="vi")

    class WithoutGradient(dist.Normal):
        has_rsample = False

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> None:
            rows = x.flatten(1)
            with pyro.plate("data", len(rows)):
                pyro.sample("z", WithoutGradient(torch.zeros_like(rows), 1.0).to_event(1))

    made = module(shifted_gaussian(), Fixed(), objective="iwae", num_samples=2)
    with pytest.raises(OptionError, match=r"draws of \['z'\] have no gradient"):
        made.learn(batch())


def test_the_divergence_counts_by_its_share(
    shifted_gaussian: Callable[..., nn.Module], linear_encoder: Callable[..., nn.Module]
) -> None:
    """`E_q[-log p(x | z)] + b KL`, both in closed form."""
    model, guide = shifted_gaussian(), linear_encoder(slope=0.3, offset=0.2, scale=0.7)
    data = batch(2000)
    rows = data[0].flatten(1)
    loc = 0.3 * rows + 0.2
    kl = 0.5 * (loc.square() + 0.49 - 1.0 - 2.0 * math.log(0.7)).sum(1).mean()
    fit = 0.5 * ((rows - loc).square() + 0.49 + math.log(2 * math.pi)).sum(1).mean()
    made = module(model, guide, num_samples=50, kl_warm_up_epochs=4)
    for epoch, share in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0)):
        type(made).current_epoch = epoch
        try:
            loss = float(made.learn(data).detach())
        finally:
            del type(made).current_epoch
        assert loss == pytest.approx(float(fit + share * kl), abs=0.02)


class LabelledGaussian(nn.Module):
    """A standard normal `z`, seen as `x = z + e`, that classes are read from."""

    def forward(self, x: Tensor, label: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            classes = dist.Categorical(logits=torch.stack([z, -z], -1))
            pyro.sample("label", classes, obs=label, obs_mask=seen)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class PosteriorOfImage(nn.Module):
    """`N(x / 2, 1 / 2)`, the posterior where no label is seen."""

    def forward(self, x: Tensor, label: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def test_labels_that_are_not_seen_are_no_part_of_the_loss() -> None:
    x = torch.linspace(-1, 1, 50)
    labels, unseen = torch.zeros(50).long(), torch.zeros(50, dtype=torch.bool)
    data = ({"x": x, "label": labels, "seen": unseen}, labels, torch.arange(50))
    loss = module(LabelledGaussian(), PosteriorOfImage()).training_step(data, 0)
    # log p(x, z) - log q(z | x) is the same number for every z; a label's factor is not.
    expected = -dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_exceeds_minus_the_evidence_by_the_divergence(
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
) -> None:
    data = batch()
    loss = module(shifted_gaussian(), linear_encoder(), num_samples=400).training_step(data, 0)
    posterior = torch.distributions.Normal(0.5 * data[0].flatten(1), math.sqrt(0.5))
    gap = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, 1.0), posterior)
    expected = (-evidence(data[0]) + gap.sum(1)).mean()
    # A sample's log-ratio has a spread of about two; there are 64 x 400 of them.
    assert abs(float(loss.detach() - expected)) < 0.05


def test_measures_bounds_of_the_encoder_beside_the_evidence_of_the_model(
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
) -> None:
    how = HeldOut(2, num_temperatures=50, bound_samples=400)
    measured = module(shifted_gaussian(), linear_encoder(), held_out=how)
    measured.on_validation_epoch_start()
    x = batch(200)[0]
    measured.validation_step((x, x, x), 0)
    figures = measured.measurements()
    exact = float(evidence(x).mean())
    # Losses, all of them: bounds lie above minus the log of the evidence.
    assert figures["negative_elbo"] > figures["importance_weighted_nll"] > -exact - 0.02
    assert figures["importance_weighted_nll"] == pytest.approx(-exact, abs=0.1)
    assert figures["evidence_nll"] == pytest.approx(-exact, abs=0.1)


@pytest.mark.parametrize("kind", [AmortisedModule, ParticleModule])
def test_dcpc_test_adds_estimates_that_have_closed_forms_here(
    kind: type[AmortisedModule] | type[ParticleModule],
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
) -> None:
    exact = linear_encoder(slope=0.5, scale=math.sqrt(0.5))
    how = HeldOut(64, num_temperatures=2, test_temperatures=20, completion=True)
    made = kind(shifted_gaussian(), exact, held_out=how)
    data = batch(400)
    made.start_measurements()
    made.measure(data, 0, is_test=False)
    assert not {"prior_sample_nll", "completion_mse"} & made.measurements().keys()
    made.start_measurements()
    for start in (0, 200):
        made.measure(tuple(part[start : start + 200] for part in data), 0, is_test=True)
    figures, truth = made.measurements(), float(evidence(data[0]).mean())
    # The guide is the posterior: its weights are all the evidence.
    assert figures["negative_elbo"] == pytest.approx(-truth, abs=1e-4)
    assert figures["importance_weighted_nll"] == pytest.approx(-truth, abs=1e-4)
    # A weight of the prior has a relative spread of about one; there are 5,000 per image.
    assert figures["prior_sample_nll"] == pytest.approx(-truth, abs=0.01)
    # The lower half says nothing of the upper one, of which 64 samples of the prior are averaged.
    above = data[0][:, :, 0]
    assert figures["completion_mse"] == pytest.approx(
        float(above.square().mean()) + 1 / 64, abs=0.02
    )
    table = made.table(is_test=True)
    for label in ("negative ELBO", "prior-sample NLL", "completion MSE"):
        assert label in table
    assert "Lower is better, except for ESS %" in table
    # Where the guide is the posterior, the ELBO of a datum is its evidence.
    exact = evidence(data[0])
    assert made.standard_errors()["negative_elbo"] == pytest.approx(
        float(exact.std()) / math.sqrt(len(exact)), rel=1e-3
    )


def test_training_finds_the_mean_of_the_data_and_the_posterior(
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
    images: Callable[..., ImageData],
    trainer: Callable[..., Trainer],
) -> None:
    model, guide = shifted_gaussian(), linear_encoder()
    made = AmortisedModule(
        model, guide, num_samples=5, learning_rate=0.05, learning_rate_schedule="cosine"
    )
    data = images(num_images=120, num_held_out=20, batch_size=100)
    trainer(max_epochs=150).fit(made, datamodule=data)
    assert data.training_set is not None
    rows = data.training_set.first(100)[0].flatten(1)
    torch.testing.assert_close(model.shift.detach(), rows.mean(0), rtol=0, atol=0.05)
    assert float(guide.slope.detach()) == pytest.approx(0.5, abs=0.05)
    assert float(guide.log_scale.detach().exp()) == pytest.approx(math.sqrt(0.5), abs=0.03)


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_epochs": 9, "max_steps": 8}])
def test_cosine_schedule_ends_at_zero(
    length: dict[str, int],
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
    images: Callable[..., ImageData],
    trainer: Callable[..., Trainer],
) -> None:
    made = AmortisedModule(
        shifted_gaussian(), linear_encoder(), learning_rate=0.1, learning_rate_schedule="cosine"
    )
    rates: list[float] = []
    made.on_before_optimizer_step = lambda optimizer: rates.append(  # type: ignore[method-assign]
        optimizer.param_groups[0]["lr"]
    )
    trainer(**length).fit(made, datamodule=images(num_images=12, batch_size=4))
    expected = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx(expected)


def test_a_number_of_samples_below_one_is_an_error(
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
) -> None:
    with pytest.raises(OptionError, match=r"model\.num_samples must be at least 1, got 0"):
        module(shifted_gaussian(), linear_encoder(), num_samples=0)
