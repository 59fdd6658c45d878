"""Particles kept, moved and learned from by values or by errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dcpc import DCPC
from dcpc.coordinates import transported
from dcpc.errors import ModelError, OptionError
from dcpc.problem import Problem
from dcpc.reparam import NonCentred
from dcpc.training import Parameterization, Start
from dcpc.training.checkpoint import CheckpointError

KINDS = ("centred", "noncentred")
UNITS = Parameterization("noncentred", "centred", "noncentred")


def stretched(module: nn.Module) -> nn.Module:
    """The module, with parameters under which errors are not values."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.mark.parametrize(
    ("algorithm", "chosen"),
    [
        *(("dcpc", Parameterization(*chosen)) for chosen in product(KINDS, repeat=3)),
        ("dcpc-smc", UNITS),
        ("pgd", UNITS),
        ("ipc", UNITS),
    ],
    ids=str,
)
def test_every_choice_trains_with_the_same_sites(
    deep_module: Callable,
    images: type,
    trainer: Callable,
    algorithm: str,
    chosen: Parameterization,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: dict[str, set[str]] = {"sweep": set(), "loss": set()}

    def noting(name: str, method: Callable) -> Callable:
        def noted(problem: Problem, *args: object, **options: object) -> object:
            used[name].add(KINDS[problem.division.sites["z2"].is_standardised])
            return method(problem, *args, **options)

        return noted

    for name in used:
        monkeypatch.setattr(Problem, name, noting(name, getattr(Problem, name)))
    count = 1 if algorithm == "ipc" else 2
    options = {"algorithm": algorithm, "num_particles": count, "sweeps_per_step": 2}
    module = stretched(deep_module(parameterization=chosen, **options))
    before = {name: value.clone() for name, value in module.model.named_parameters()}
    trainer(max_epochs=2).fit(module, datamodule=images())
    assert all(not torch.equal(value, before[n]) for n, value in module.model.named_parameters())
    latents, weights = module.store.particles(torch.arange(20))
    assert {name: tuple(u.shape) for name, u in latents.items()} == {
        "z1": (20, count, 2),
        "z2": (20, count, 3),
    }
    assert bool(weights.isfinite().all())
    assert used == {"sweep": {chosen.move}, "loss": {chosen.learn}}
    assert module.store is not None
    kept = module._particles()
    assert kept is not None
    assert kept["noncentred"] == (["z1", "z2"] if chosen.keep == "noncentred" else [])


@pytest.mark.parametrize(("keep", "move"), list(product(KINDS, repeat=2)))
def test_what_is_kept_stays_while_the_parameters_learn(
    deep_module: Callable, images: type, trainer: Callable, keep: str, move: str
) -> None:
    """Of particles that hardly move, as of those whose moves are all refused."""

    def kept_after(epochs: int) -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(5)
        chosen = Parameterization(keep, move, "noncentred")
        options = {"algorithm": "pgd", "step_size": 1e-13, "learning_rate": 0.05}
        module = stretched(deep_module(parameterization=chosen, num_particles=2, **options))
        trainer(max_epochs=epochs).fit(module, datamodule=images())
        latents, _ = module.store.particles(torch.arange(20))
        return module, {name: u.movedim(0, 1) for name, u in latents.items()}

    (one, before), (_, after) = kept_after(1), kept_after(4)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    x = images().load()[0][:20]
    other = {"centred": "noncentred", "noncentred": "centred"}[keep]
    models = {"centred": one.model, "noncentred": NonCentred(one.model)}
    here, there = (DCPC(models[k], num_particles=2).bind(x) for k in (keep, other))
    state = replace(here.init(), latents=before)
    moved = transported(state, here, there).latents["z2"]
    assert float((moved - before["z2"]).abs().max()) > 0.1


def test_an_encoder_starts_errors_at_the_errors_of_its_draws(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    """One state from a guide in either coordinates: values, and densities by the Jacobian."""
    module = stretched(deep_module(guide="encoder"))
    data = images()
    data.setup("fit")
    x = data.training_set.first(5)[0]
    engines = [
        DCPC(m, module.guide, num_particles=4) for m in (module.model, NonCentred(module.model))
    ]
    values, errors = (engine.bind(x) for engine in engines)
    states = []
    for problem in (values, errors):
        torch.manual_seed(3)
        states.append(problem.init())
    there = transported(states[0], values, errors)
    torch.testing.assert_close(there.latents, states[1].latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.log_joint, states[1].log_joint, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "start",
    [Start(warm_up_epochs=1), Start(restart=True), Start(proposals=True), Start()],
    ids=str,
)
def test_an_encoder_goes_with_every_choice(
    deep_module: Callable, images: type, trainer: Callable, start: Start
) -> None:
    for move in KINDS:
        chosen = Parameterization("noncentred", move, "noncentred")
        module = deep_module(parameterization=chosen, guide="encoder", start=start)
        trainer(max_epochs=2).fit(module, datamodule=images())
        assert module.last_sweep is not None


def test_a_run_goes_on_by_its_own_choice_only(
    deep_module: Callable, images: type, trainer: Callable, tmp_path
) -> None:
    run = trainer()
    run.fit(deep_module(parameterization=Parameterization(keep="noncentred")), datamodule=images())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(CheckpointError, match=r"parameterization keep noncentred, .* keep centred"):
        trainer(max_epochs=2).fit(
            deep_module(),
            datamodule=images(),
            ckpt_path=tmp_path / "one.ckpt",
            weights_only=True,
        )


def test_words_and_sites_that_do_not_exist_are_refused(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    with pytest.raises(OptionError, match=r"parameterization\.move must be .* got 'errors'"):
        Parameterization(move="errors")
    chosen = Parameterization(keep="noncentred", sites=["z9"])
    with pytest.raises((OptionError, ModelError), match=r"\['z9'\] are no latents"):
        trainer().fit(deep_module(parameterization=chosen), datamodule=images())
