"""Training that diverges stops, and leaves nothing that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer

from dcpc.errors import DataError, OptionError
from dcpc.training.callbacks import RunCheckpoint
from dcpc.training.checkpoint import CheckpointError, DurableFiles
from dcpc.training.divergence import NUM_FIRST, PATIENCE, DivergenceError, Watch


class Spike(Callback):
    """Makes gradients infinite at some steps."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.fit_loop.total_batch_idx in self.steps:
            next(pl_module.model.parameters()).grad.fill_(torch.inf)


def test_losses_far_above_the_first_ones_are_a_warning_and_then_an_error() -> None:
    watch, gradients = Watch(), [torch.ones(3)]
    for step in range(NUM_FIRST):
        assert watch.usable(torch.tensor(-5.0 + step % 2), gradients)
    assert watch.usable(torch.tensor(400.0), gradients)  # -4.5 + 100 * 5.5 is 545.5
    with pytest.warns(UserWarning, match=r"the loss is 600, and was -4\.5 at first.*learning_rate"):
        assert watch.usable(torch.tensor(600.0), gradients)
    assert watch.usable(torch.tensor(-4.0), gradients)  # begins the count anew
    for _ in range(PATIENCE - 1):
        assert watch.usable(torch.tensor(600.0), gradients)
    with pytest.raises(DivergenceError, match=r"loss is 600.*in a row.*model\.learning_rate"):
        watch.usable(torch.tensor(600.0), gradients)


@pytest.mark.filterwarnings("ignore:training may diverge")
@pytest.mark.parametrize(
    ("loss", "gradient"), [(torch.nan, 1.0), (torch.inf, 1.0), (1.0, torch.nan), (1.0, torch.inf)]
)
def test_what_is_not_finite_is_left_out_and_then_an_error(loss: float, gradient: float) -> None:
    watch = Watch()
    for _ in range(PATIENCE - 1):
        assert not watch.usable(torch.tensor(loss), [torch.full((2,), gradient)])
    with pytest.raises(DivergenceError, match=r"not finite|nan|inf"):
        watch.usable(torch.tensor(loss), [torch.full((2,), gradient)])


def test_a_step_with_infinite_gradients_changes_nothing(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    module = deep_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.warns(UserWarning, match="gradients are not finite, so the step is left out"):
        trainer(callbacks=[Spike(range(100))]).fit(module, datamodule=images(batch_size=10))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.filterwarnings("ignore:training may diverge")
@pytest.mark.parametrize("algorithm", ["dcpc", "pgd", "ipc"])
def test_learning_rates_that_explode_end_in_an_error_and_finite_checkpoints(
    algorithm: str, deep_module: Callable, images: type, trainer: Callable, tmp_path: Path
) -> None:
    step_size = None if algorithm == "dcpc" else 0.1
    module = deep_module(
        algorithm=algorithm, num_particles=1, step_size=step_size, learning_rate=1e12
    )
    run = trainer(
        max_epochs=100,
        callbacks=[RunCheckpoint()],
        enable_checkpointing=True,
        plugins=[DurableFiles()],
    )
    with pytest.raises((DivergenceError, CheckpointError), match=r"learning_rate"):
        run.fit(module, datamodule=images(batch_size=4))
    link = tmp_path / "last.ckpt"
    if link.exists():
        saved = torch.load(link, weights_only=True)
        assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())
        for value in saved["dcpc"]["particles"]["latents"].values():
            assert bool(value.isfinite().all())


def test_a_checkpoint_that_would_not_be_finite_leaves_the_one_before(tmp_path: Path) -> None:
    path, files = tmp_path / "a.ckpt", DurableFiles()
    files.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match=r"entry 'state_dict\.w' would hold"):
        files.save_checkpoint({"state_dict": {"w": torch.tensor([1.0, torch.nan])}}, path)
    assert torch.equal(files.load_checkpoint(path)["state_dict"]["w"], torch.ones(2))
    files.save_checkpoint({"log_weight": torch.tensor([0.0, -torch.inf])}, path)
    assert files.load_checkpoint(path)["log_weight"][1] == -torch.inf


def test_a_datum_that_is_not_finite_is_named(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    data = images(batch_size=5)
    data.setup("fit")
    data.training_set.data[13, 0, 1, 1] = torch.nan
    with pytest.raises(DataError, match=r"datum 13 of the training set holds NaN"):
        trainer().fit(deep_module(), datamodule=data)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_half_precision_is_refused_by_name(
    precision: str, deep_module: Callable, images: type, trainer: Callable
) -> None:
    with pytest.raises(OptionError, match=rf"trainer\.precision .* '{precision}'"):
        trainer(precision=precision).fit(deep_module(), datamodule=images())


def test_double_precision_trains(images: type, trainer: Callable, deep_module: Callable) -> None:
    module = deep_module()
    trainer(precision="64-true").fit(module, datamodule=images())
    assert all(value.dtype == torch.float64 for value in module.state_dict().values())
    latents, _ = module.store.particles(torch.arange(20))
    assert all(value.dtype == torch.float64 for value in latents.values())


def test_the_measure_of_what_is_usual_survives_a_checkpoint() -> None:
    watch, again = Watch(), Watch()
    for value in range(NUM_FIRST):
        watch.usable(torch.tensor(float(value)), [torch.ones(1)])
    again.load_state_dict(watch.state_dict())
    with pytest.warns(UserWarning, match="may diverge"):
        again.usable(torch.tensor(9.5 + 100 * 10.5 + 1.0), [torch.ones(1)])
