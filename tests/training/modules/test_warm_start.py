"""Particles that start from an encoder, which learns from them in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dcpc import DCPC
from dcpc.errors import OptionError
from dcpc.models import DeepLatentGaussian, MLPEncoder
from dcpc.problem import Problem
from dcpc.sweep import SweepState
from dcpc.training import AmortisedModule, HeldOut, ParticleModule, Start
from dcpc.training.modules.warm_start import annealed

SIZES, SHAPE = [2, 3], [1, 2, 2]


def counting(init: Callable[[Problem], SweepState], drawn: list[int]) -> Callable[..., SweepState]:
    """`Problem.init` that notes for how many data particles were drawn."""

    def counted(problem: Problem) -> SweepState:
        drawn.append(len(problem.arguments.tensors[0]))
        return init(problem)

    return counted


def deep(**options: object) -> ParticleModule:
    torch.manual_seed(0)
    settings = {"num_particles": 2, "held_out": HeldOut(2, 2), **options}
    return ParticleModule(DeepLatentGaussian(SIZES, SHAPE), MLPEncoder(SIZES, SHAPE, 4), **settings)


def test_the_encoder_learns_the_posterior_of_the_particles(
    shifted_gaussian: Callable[..., nn.Module],
    linear_encoder: Callable[..., nn.Module],
    images: type,
    trainer: Callable[..., Trainer],
) -> None:
    # z ~ N(0, I) and x ~ N(shift + z, I): the posterior of z is N((x - shift) / 2, I / 2).
    model, guide = shifted_gaussian(), linear_encoder()
    module = ParticleModule(
        model, guide, num_particles=16, learning_rate=0.05, learning_rate_schedule="cosine"
    )
    data = images(num_images=120, num_held_out=20, batch_size=100)
    trainer(max_epochs=150).fit(module, datamodule=data)
    shift = float(model.shift.detach().mean())
    assert float(guide.slope.detach()) == pytest.approx(0.5, abs=0.05)
    assert float(guide.offset.detach()) == pytest.approx(-shift / 2, abs=0.05)
    assert float(guide.log_scale.detach().exp()) == pytest.approx(math.sqrt(0.5), abs=0.03)


def test_the_guides_loss_is_the_cross_entropy_of_particles_at_known_places(
    shifted_gaussian: Callable[..., nn.Module], linear_encoder: Callable[..., nn.Module]
) -> None:
    guide = linear_encoder(slope=0.5, offset=0.1, scale=0.7)
    module = ParticleModule(shifted_gaussian(), guide, num_particles=3)
    x = torch.rand(5, 1, 2, 2)
    state = module.inference.init(x)
    losses = module._losses(module.inference.bind(x), state, x)
    rows, z = x.flatten(1), state.latents["z"]
    log_q = torch.distributions.Normal(0.5 * rows + 0.1, 0.7).log_prob(z).sum(-1)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(torch.stack((z, rows - z))).sum((0, -1))
    # Fresh particles have equal weights.
    torch.testing.assert_close(losses["guide_loss"], -log_q.mean())
    torch.testing.assert_close(losses["loss"], -log_p.mean())


def test_neither_loss_teaches_the_other_network(images: type) -> None:
    module = deep()
    x = torch.rand(6, 1, 2, 2)
    losses = module._losses(module.inference.bind(x), module.inference.init(x), x)
    for name, learns, rests in (
        ("loss", module.model, module.guide),
        ("guide_loss", module.guide, module.model),
    ):
        parameters = list(learns.parameters()), list(rests.parameters())
        of_one, of_other = (
            torch.autograd.grad(losses[name], p, retain_graph=True, allow_unused=True)
            for p in parameters
        )
        assert any(g is not None and bool(g.abs().sum() > 0) for g in of_one), name
        assert all(g is None for g in of_other), name


@pytest.mark.parametrize(
    ("algorithm", "restart", "visits"),
    [
        ("dcpc", None, 1),
        ("pgd", None, 1),
        ("lpc", None, 3),
        ("dcpc", True, 3),
        ("lpc", False, 1),
    ],
)
def test_particles_come_from_the_encoder_at_the_first_visit_or_at_every_visit(
    algorithm: str,
    restart: bool | None,
    visits: int,
    images: type,
    trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, drawn = deep(algorithm=algorithm, start=Start(restart=restart)), []
    monkeypatch.setattr(Problem, "init", counting(Problem.init, drawn))
    trainer(max_epochs=3).fit(module, datamodule=images(batch_size=20))
    assert drawn == [20] * visits


def test_a_warm_up_trains_as_the_autoencoder_does_and_then_makes_particles(
    images: type, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    rival = AmortisedModule(DeepLatentGaussian(SIZES, SHAPE), MLPEncoder(SIZES, SHAPE, 4))
    module, drawn = deep(start=Start(warm_up_epochs=2)), []
    monkeypatch.setattr(Problem, "init", counting(Problem.init, drawn))
    for one, epochs in ((rival, 2), (module, 2)):
        torch.manual_seed(11)
        trainer(max_epochs=epochs).fit(one, datamodule=images(batch_size=10))
    for ours, theirs in ((module.model, rival.model), (module.guide, rival.guide)):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert not drawn
    assert not module.store.visited(torch.arange(20)).any()

    module = deep(start=Start(warm_up_epochs=2))
    trainer(max_epochs=4).fit(module, datamodule=images(batch_size=10))
    assert drawn == [10, 10]
    assert module.store.visited(torch.arange(20)).all()


@pytest.mark.parametrize(
    ("restart", "warm_up_epochs", "learns"),
    [(False, 1, False), (True, 1, True), (False, 0, True)],
)
def test_a_warm_guide_rests_unless_particles_start_from_it_again(
    restart: bool,
    warm_up_epochs: int,
    learns: bool,
    images: type,
    trainer: Callable[..., Trainer],
) -> None:
    states = []
    for epochs in (1, 3):
        module = deep(start=Start(warm_up_epochs, restart))
        torch.manual_seed(11)
        trainer(max_epochs=epochs).fit(module, datamodule=images(batch_size=10))
        states.append((module.model.state_dict(), module.guide.state_dict()))
    changed = [
        any(not torch.equal(value, later[name]) for name, value in earlier.items())
        for earlier, later in zip(*states, strict=True)
    ]
    assert changed == [True, learns]


@pytest.mark.parametrize("start", [Start(warm_up_epochs=1, restart=True), Start(proposals=True)])
def test_a_guide_by_the_layers_of_the_model_leaves_them_alone(start: Start) -> None:
    torch.manual_seed(0)
    model, x = DeepLatentGaussian(SIZES, SHAPE), torch.rand(6, 1, 2, 2)
    module = ParticleModule(
        model, "top_down_encoder", num_particles=2, start=start, held_out=HeldOut(2, 2)
    )
    problem = module.inference.bind(x)
    losses = module._losses(problem, problem.init(), x)
    (of_guide,) = (loss for name, loss in losses.items() if name != "loss")
    weights = [*module.guide.parameters(), *model.parameters()]
    grads = torch.autograd.grad(of_guide, weights, allow_unused=True)
    learns = [grad is not None and bool((grad != 0).any()) for grad in grads]
    count = len(list(module.guide.parameters()))
    assert learns == [True] * count + [False] * len(list(model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("by_name", [False, True])
def test_a_warm_guide_that_particles_start_from_ascends_its_bound_alone(by_name: bool) -> None:
    module, x = deep(start=Start(warm_up_epochs=1, restart=True)), torch.rand(6, 1, 2, 2)
    problem = module.inference.bind(x=x) if by_name else module.inference.bind(x)
    state = problem.init()
    torch.manual_seed(3)
    losses = module._losses(problem, state, {"x": x} if by_name else x)
    assert set(losses) == {"loss", "negative_elbo"}
    torch.manual_seed(3)
    bound = Trace_ELBO().differentiable_loss(module.model, module.guide, x) / len(x)
    torch.testing.assert_close(losses["negative_elbo"], bound)
    weights = list(module.guide.parameters())
    for found, expected in zip(
        torch.autograd.grad(losses["negative_elbo"], weights, retain_graph=True),
        torch.autograd.grad(bound, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    of_model = torch.autograd.grad(
        losses["negative_elbo"], list(module.model.parameters()), allow_unused=True
    )
    assert all(gradient is None for gradient in of_model)


def test_particles_without_an_encoder_cannot_restart() -> None:
    with pytest.raises(OptionError, match=r"start\.proposals=True needs a guide .*at false"):
        ParticleModule(DeepLatentGaussian(SIZES, SHAPE), start=Start(proposals=True))
    for options, message in (
        ({"algorithm": "pgd", "start": Start(proposals=True)}, "leaves posteriors invariant"),
        ({"start": Start(restart=True, proposals=True)}, "leave one of them out"),
    ):
        with pytest.raises(OptionError, match=rf"start\.proposals=True .*{message}"):
            ParticleModule(DeepLatentGaussian(SIZES, SHAPE), "encoder", **options)
    with pytest.raises(OptionError, match=r"kl_warm_up_epochs=3 are a part of the warm-up"):
        Start(warm_up_epochs=2, kl_warm_up_epochs=3)
    with pytest.raises(OptionError, match=r"model\.start\.restart=True needs a guide"):
        ParticleModule(DeepLatentGaussian(SIZES, SHAPE), start=Start(restart=True))


@pytest.mark.parametrize("warm_up_epochs", [0, 1, 3])
def test_a_resumed_run_with_an_encoder_continues_bit_for_bit(
    warm_up_epochs: int, images: type, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def fit(epochs: int, seed: int, **options: object) -> ParticleModule:
        module = deep(
            algorithm="lpc",
            step_size=0.1,
            learning_rate_schedule="cosine",
            start=Start(warm_up_epochs),
        )
        torch.manual_seed(seed)
        run = trainer(max_epochs=4, callbacks=[StopAfter(epochs)])
        run.fit(module, datamodule=images(batch_size=6), **options)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(4, 11)
    fit(2, 11)
    resumed = fit(5, 99, ckpt_path=tmp_path / "2.ckpt", weights_only=True)
    states = whole.state_dict(), resumed.state_dict()
    assert any(name.startswith("guide.") for name in states[0])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    stores = whole.store.state_dict(), resumed.store.state_dict()
    assert torch.equal(stores[0]["latents"]["z2"], stores[1]["latents"]["z2"])


class StopAfter(Callback):
    """Ends a run early, with a schedule made for the whole of it."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= trainer.current_epoch + 1 == self.epochs


def test_an_encoder_of_other_latents_is_refused_by_name(
    images: type, trainer: Callable[..., Trainer]
) -> None:
    module = ParticleModule(DeepLatentGaussian(SIZES, SHAPE), MLPEncoder([2], SHAPE, 4))
    with pytest.raises(OptionError, match=r"does not sample latent site\(s\) \['z2'\]"):
        trainer().fit(module, datamodule=images())


def test_the_two_losses_are_logged_apart_and_descended_together(
    images: type, trainer: Callable[..., Trainer]
) -> None:
    module, returned = deep(), []
    step = module.training_step
    module.training_step = lambda *args: returned.append(step(*args)) or returned[-1]
    run = trainer()
    run.fit(module, datamodule=images(batch_size=20))
    logged = run.callback_metrics
    total = logged["train/loss"] + logged["train/guide_loss"]
    torch.testing.assert_close(returned[0].detach(), total)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logged["train/loss"], logged["train/guide_loss"])


def test_steps_have_random_numbers_of_their_own_that_depend_on_the_seed() -> None:
    def draws(seed: int) -> list[float]:
        module = deep()
        module._seed = seed
        numbers = []
        for key in ((0,), (1,), (0, 1)):
            with module.stream(*key):
                numbers.append(float(torch.rand(())))
        return numbers

    assert draws(3) == draws(3)
    assert len({*draws(3), *draws(4)}) == 6


# -- annealing from the prior ------------------------------------------------------------------


def two_modes(x: Tensor) -> None:
    """z ~ N(0, 1), x ~ N(z^2, .05^2): at x = 1 two modes, 20 standard deviations apart each."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.05), obs=x)


def test_annealed_particles_are_at_the_posterior_in_both_of_its_modes() -> None:
    problem = DCPC(two_modes, num_particles=400).bind(torch.ones(10))
    state = annealed(problem, num_temperatures=30)
    z, weights = state.latents["z"].detach(), state.log_weight.normalized()
    # By quadrature over one mode.
    grid = torch.linspace(0.0, 2.0, 20001, dtype=torch.float64)
    mass = (-grid.square() / 2 - ((grid.square() - 1) / 0.05).square() / 2).softmax(0)
    mean = float((mass * grid).sum())
    spread = float((mass * (grid - mean).square()).sum().sqrt())
    assert float((weights * z.abs()).sum(0).mean()) == pytest.approx(mean, abs=0.2 * spread)
    found = (weights * (z.abs() - mean).square()).sum(0).mean().sqrt()
    assert float(found) == pytest.approx(spread, rel=0.15)
    assert float((weights * (z > 0)).sum(0).mean()) == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(state.log_weight.log_mean(), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(state.log_joint, problem.log_joint(state), atol=1e-3, rtol=1e-4)


def test_particles_are_annealed_where_they_are_missing_only(
    images: type, trainer: Callable, deep_module: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    climbs, anneal_once = [], Problem.anneal_once
    monkeypatch.setattr(
        Problem, "anneal_once", lambda *args, **how: climbs.append(1) or anneal_once(*args, **how)
    )
    module = deep_module(start=Start(temperatures=3))
    trainer(max_epochs=3).fit(module, datamodule=images(batch_size=10))
    assert len(climbs) == 2  # of twenty images in two batches, at their first visits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "encoder"}, r"start\.temperatures=3 anneals .* but model\.guide"),
        ({"algorithm": "pgd"}, r"start\.temperatures=3 needs .* dcpc or dcpc-smc"),
    ],
)
def test_annealing_from_the_prior_needs_an_exact_algorithm_and_no_guide(
    options: dict, message: str, deep_module: Callable
) -> None:
    with pytest.raises(OptionError, match=message):
        deep_module(start=Start(temperatures=3), **options)
