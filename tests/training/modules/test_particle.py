from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pytorch_lightning import Callback, Trainer

from dcpc.conquer import Langevin
from dcpc.errors import ModelError, OptionError
from dcpc.graphs import learning, stages
from dcpc.graphs.runner import CompileWarning
from dcpc.models import DeepLatentGaussian, MLPEncoder
from dcpc.presets import PRESETS
from dcpc.problem import Problem
from dcpc.training import HeldOut, Parameterization, ParticleModule, Start
from dcpc.training.checkpoint import CheckpointError, check_parameters, read_checkpoint
from dcpc.training.store import StoreError


class Record(Callback):
    """Keeps every step's loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def assert_same(one: object, other: object, where: str = "") -> None:
    """Equality, bit for bit, of nested dicts, lists, tensors and numbers."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    else:
        assert one == other, where


ERRORS = Parameterization("noncentred", "noncentred", "noncentred")
UNITS = Parameterization("noncentred", "centred", "noncentred")


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"move": "underdamped"},
        {"parameterization": ERRORS},
        {"parameterization": UNITS, "move": "underdamped"},
    ],
    ids=str,
)
def test_a_resumed_run_continues_bit_for_bit(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path, parts: dict
) -> None:
    whole, first, second = Record(), Record(), Record()

    def fit(epochs: int, record: Record, **options: object) -> Trainer:
        torch.manual_seed(11 if not options else 99)  # the second process starts elsewhere
        run = trainer(max_epochs=epochs, callbacks=[record])
        module = deep_module(sweeps_per_step=2, **parts)
        run.fit(module, datamodule=images(batch_size=6), **options)
        return run

    uninterrupted = fit(4, whole)
    fit(2, first).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(4, second, ckpt_path=tmp_path / "half.ckpt", weights_only=True)

    assert len(whole.losses) == 4 * 4  # 20 training images in batches of 6, 6, 6 and 2
    assert first.losses + second.losses == whole.losses
    assert_same(uninterrupted.model.state_dict(), resumed.model.state_dict())
    particles = resumed.model.store.state_dict()
    assert_same(uninterrupted.model.store.state_dict(), particles)
    for kept in particles["memory"].values():
        assert all(bool((kept[name] != 0).all()) for name in particles["latents"])
    assert set(particles["memory"]) == ({"momentum"} if "move" in parts else set())
    checkpoints: list[dict] = [{}, {}]
    for run, checkpoint in zip((uninterrupted, resumed), checkpoints, strict=True):
        run.model.on_save_checkpoint(checkpoint)
    assert_same(*checkpoints)


@pytest.mark.parametrize("algorithm", ["dcpc", "dcpc-smc", "dcpc-paper", "pgd", "lpc"])
def test_training_does_not_depend_on_how_many_particles_are_evaluated_at_once(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path, algorithm: str
) -> None:
    """Five particles in batches of two, with an encoder; the resumed half has them all at once."""

    def fit(epochs: int, record: Record, size: int | None, **options: object) -> Trainer:
        torch.manual_seed(11)
        run = trainer(max_epochs=epochs, callbacks=[record], precision="64-true")
        module = deep_module(
            guide="encoder",
            algorithm=algorithm,
            num_particles=5,
            particle_batch_size=size,
            sweeps_per_step=2,
        )
        run.fit(module, datamodule=images(batch_size=10), **options)
        return run

    whole, first, second = Record(), Record(), Record()
    expected = fit(2, whole, None)
    fit(1, first, 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(2, second, None, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.losses + second.losses == pytest.approx(whole.losses, rel=1e-10)
    torch.testing.assert_close(
        dict(resumed.model.state_dict()),
        dict(expected.model.state_dict()),
        rtol=1e-10,
        atol=1e-10,
    )
    found, kept = (run.model.store.state_dict()["latents"] for run in (resumed, expected))
    torch.testing.assert_close(found, kept, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("folder", ["particles", None])
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_anything_is_learned(
    deep_module: Callable,
    images: type,
    trainer: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str | None,
) -> None:
    """3 particles of 20 data: 2 + 3 numbers, a weight and a log-joint, of 4 bytes: 1680 in all."""
    free = {"checkpoints": 1679}
    monkeypatch.setattr(
        "shutil.disk_usage",
        lambda path: SimpleNamespace(free=free["checkpoints"] if Path(path) == tmp_path else 10**9),
    )
    store = None if folder is None else str(tmp_path / folder)
    learned, learn = [], ParticleModule.learn
    monkeypatch.setattr(
        ParticleModule, "learn", lambda self, batch: (learned.append(batch), learn(self, batch))[1]
    )
    with pytest.raises(StoreError, match=rf"needs 0 MB, but the disk of '{tmp_path}' has 0 MB"):
        trainer().fit(deep_module(num_particles=3, store_folder=store), datamodule=images())
    assert not learned
    free["checkpoints"] = 1680
    trainer().fit(deep_module(num_particles=3, store_folder=store), datamodule=images())
    assert len(learned) == 3


@pytest.mark.parametrize("warm_up_epochs", [0, 2])
def test_what_is_captured_before_training_serves_the_first_batch(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path, warm_up_epochs: int
) -> None:
    """20 data in batches of 10: one shape. A checkpoint of the warm-up has no particles."""
    module = deep_module(guide="encoder", start=Start(warm_up_epochs=warm_up_epochs))
    run = trainer(max_epochs=2)
    run.fit(module, datamodule=images(batch_size=10))
    assert len(module.inference._divisions) == 1
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = read_checkpoint(tmp_path / "a.ckpt")["dcpc"]["particles"]
    assert saved["visited"].tolist() == [warm_up_epochs == 0] * 20
    assert all(len(u) == (0 if warm_up_epochs else 20) for u in saved["latents"].values())


def test_a_checkpoint_holds_the_particles_without_pickled_objects(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path
) -> None:
    run = trainer()
    run.fit(deep_module(num_particles=3), datamodule=images())
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["dcpc"]
    assert saved["particles"]["latents"]["z2"].shape == (20, 3, 3)
    assert bool(saved["particles"]["visited"].all())
    assert set(saved["adaptation"]) == {g.name for g in run.model.inference.division(*_x()).groups}


def _x() -> tuple[torch.Tensor]:
    return (torch.rand(8, 1, 2, 2),)


def test_evaluation_neither_touches_the_particles_nor_the_randomness_of_training(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    plain, evaluated = Record(), Record()
    runs = []
    for record, batches in ((plain, 0), (evaluated, 1)):
        torch.manual_seed(5)
        runs.append(trainer(max_epochs=2, limit_val_batches=batches, callbacks=[record]))
        runs[-1].fit(deep_module(), datamodule=images())
    assert plain.losses == evaluated.losses
    assert_same(runs[0].model.store.state_dict(), runs[1].model.store.state_dict())


def test_training_finds_the_maximum_of_a_likelihood_that_is_known_in_closed_form(
    shifted_gaussian: type, images: type, trainer: Callable
) -> None:
    # x ~ N(shift, 2 I), so that the likelihood is largest at the mean of the data.
    data = images(num_images=64, batch_size=30)  # 60 images: no step is noisier than another
    module = ParticleModule(shifted_gaussian(), num_particles=32, learning_rate=0.05)
    run = trainer(max_epochs=60)
    run.fit(module, datamodule=data)
    expected = data.training_set.data.flatten(1).mean(0)
    # A batch's gradient, x - E[z | x] - shift averaged, has a standard deviation of about .05.
    assert torch.allclose(module.model.shift.detach(), expected, atol=0.15)


@pytest.mark.parametrize("last", [1, 3])
def test_a_short_last_batch_trains_like_any_other(
    deep_module: Callable, images: type, trainer: Callable, last: int
) -> None:
    record = Record()
    run = trainer(max_epochs=3, callbacks=[record])
    # A full batch of units of ten determines a dense preconditioner, the last one would not.
    module = deep_module(latent_sizes=(10, 9))
    run.fit(module, datamodule=images(num_images=4 + 16 + last, batch_size=8))
    assert len(record.losses) == 9
    assert bool(run.model.store.visited(torch.arange(16 + last)).all())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, [24, 12]),
        ({"max_epochs": 3, "max_steps": 6}, [16, 8]),
        ({"max_epochs": -1, "max_steps": 6}, [16, 8]),
    ],
    ids=str,
)
def test_compiling_reckons_with_the_sweeps_of_the_whole_run(
    deep_module: Callable,
    images: type,
    trainer: Callable,
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    expected: list[int],
) -> None:
    asked: list[tuple[bool | str, int]] = []
    monkeypatch.setattr(learning, "pays_to_compile", lambda _, *how: asked.append(how))
    run = trainer(**options)
    run.fit(deep_module(sweeps_per_step=4), datamodule=images(num_images=19 + 4, batch_size=8))
    assert asked == [("auto", num_sweeps) for num_sweeps in expected]


def test_a_run_says_that_it_compiles_and_trains_on_where_that_fails(
    deep_module: Callable,
    images: type,
    trainer: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(stages, "compile_nodes", failing)
    record = Record()
    module, data = deep_module(compile=True), images(num_images=16 + 4, batch_size=8)
    run = trainer(max_epochs=2, callbacks=[record])
    with pytest.warns(CompileWarning, match="torch's compiler failed: no compiler here"):
        run.fit(module, datamodule=data)
    assert capsys.readouterr().out == "compiling the training step\n"
    assert torch.tensor(record.losses).isfinite().all()


@pytest.mark.parametrize("algorithm", PRESETS)
def test_every_preset_trains(
    deep_module: Callable, images: type, trainer: Callable, algorithm: str
) -> None:
    num_particles = 1 if PRESETS[algorithm].single_particle else 3
    module = deep_module(algorithm=algorithm, num_particles=num_particles, sweeps_per_step=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer()
    run.fit(module, datamodule=images())
    every_sweep = PRESETS[algorithm].step_parameters_every_sweep
    assert run.global_step == 3 * (2 if every_sweep else 1)
    changed = [n for n, value in module.state_dict().items() if not torch.equal(value, before[n])]
    assert changed == list(before)


def test_blocks_of_latents_move_as_one_unit(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    module = deep_module(blocks=[["z1", "z2"]], move=Langevin(2))
    trainer(max_epochs=2).fit(module, datamodule=images())
    assert set(module.adaptation) == {"z1+z2"}


class Tied(torch.nn.Module):
    """Images under the batch's mean latent, as layers normalised over the batch tie them."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            loc = (z - z.mean() + self.shift).reshape(-1, 1, 1, 1).expand(x.shape)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(3), obs=x)


def test_data_that_a_batch_ties_train_without_weights(images: type, trainer: Callable) -> None:
    module = ParticleModule(
        Tied(), num_particles=3, algorithm="pgd", learning_rate=0.1, held_out=HeldOut(2)
    )
    data = images(num_images=64, batch_size=25)
    run = trainer(max_epochs=30)
    run.fit(module, datamodule=data)
    mean = float(data.training_set.data.mean())
    assert float(module.model.shift.detach()) == pytest.approx(mean, abs=0.1)
    assert not bool(module.store.state_dict()["log_weight"].any())


def test_data_that_a_batch_ties_are_refused_where_weights_matter(
    images: type, trainer: Callable
) -> None:
    module = ParticleModule(Tied(), num_particles=3, held_out=HeldOut(2))
    with pytest.raises(ModelError, match=r"algorithm 'dcpc' would weigh.*pgd, mpgd, lpc, mcpc"):
        trainer().fit(module, datamodule=images())


def test_first_visits_get_their_extra_sweeps(
    deep_module: Callable, images: type, trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, count = deep_module(start=Start(first_sweeps=4)), []
    sweep = Problem.sweep
    monkeypatch.setattr(
        Problem, "sweep", lambda *args, **how: count.append(1) or sweep(*args, **how)
    )
    trainer(max_epochs=2).fit(module, datamodule=images(batch_size=20))
    assert len(count) == (4 + 1) + 1


def test_incremental_steps_follow_the_sweeps_of_every_visit_but_not_its_extra_ones(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    options = {"num_particles": 1, "sweeps_per_step": 2, "start": Start(first_sweeps=3)}
    run = trainer(max_epochs=3)
    run.fit(deep_module(algorithm="ipc", **options), datamodule=images(batch_size=20))
    assert run.global_step == 3 * 2


def test_a_checkpoint_of_other_particles_is_refused_on_resuming(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path
) -> None:
    run = trainer()
    run.fit(deep_module(num_particles=2), datamodule=images())
    run.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.num_particles 2, and this run has 3"):
        trainer(max_epochs=2).fit(
            deep_module(num_particles=3),
            datamodule=images(),
            ckpt_path=tmp_path / "two.ckpt",
            weights_only=True,
        )


def test_unusable_checkpoints_are_told_apart(deep_module: Callable, tmp_path: Path) -> None:
    module = deep_module()
    path = tmp_path / "some.ckpt"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*some\.ckpt"):
        read_checkpoint(path)
    torch.save({"state_dict": module.state_dict()}, path)
    check_parameters(read_checkpoint(path), module, path)
    with pytest.raises(CheckpointError, match="has no entry 'dcpc'"):
        module.on_load_checkpoint(read_checkpoint(path))
    with pytest.raises(
        CheckpointError, match=r"another model: parameter 'bias' of this model is not"
    ):
        check_parameters(read_checkpoint(path), torch.nn.Linear(2, 2), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"some.ckpt' .* truncated"):
            read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1, got 0"),
        ({"particle_batch_size": 0}, "particle_batch_size must be at least 1, got 0"),
        ({"sweeps_per_step": 0}, r"model\.sweeps_per_step must be at least 1, got 0"),
        ({"start": Start(2)}, r"model\.start\.warm_up_epochs=2 needs a guide .* model\.guide"),
        (
            {"step_size": {"sgd": 0.1}},
            r"unknown algorithm of model\.step_size 'sgd'; choose one of",
        ),
        ({"step_size": {"dcpc": -0.1}}, "step_size must be a positive number"),
        ({"learning_rate": -1.0}, r"model\.learning_rate must be positive"),
        ({"step_size": -0.1}, "step_size must be a positive number"),
        ({"algorithm": "sgd"}, "unknown algorithm 'sgd'; choose one of dcpc,"),
        ({"algorithm": "pc", "num_particles": 4}, "one particle per datum"),
        ({"move": "jump"}, "unknown move 'jump'; choose one of langevin, barker"),
        (
            {"algorithm": "pc", "num_particles": 1, "correction": "metropolis"},
            "schedule 'joint' moves .* correction 'metropolis' does not allow",
        ),
        ({"algorithm": "dcpc-paper", "move": Langevin(2)}, "density of the proposal"),
    ],
)
def test_options_that_do_not_fit_are_named(
    deep_module: Callable, options: dict, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        deep_module(**options)


class MemoryWatch(Callback):
    """Live tensors, and the process's peak memory, at the end of every so many epochs."""

    def __init__(self, settled: int, every: int = 1) -> None:
        self.settled = settled
        self.every = every
        self.tensors: list[int] = []
        self.peaks: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        due = trainer.is_last_batch and trainer.current_epoch % self.every == 0
        if due and trainer.global_step >= self.settled:
            gc.collect()
            alive = gc.get_objects()
            self.tensors.append(sum(issubclass(type(x), torch.Tensor) for x in alive))
            self.peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def test_no_tensor_outlives_its_step(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    watch = MemoryWatch(settled=30, every=3)
    trainer(max_epochs=31, callbacks=[watch]).fit(deep_module(), datamodule=images(batch_size=9))
    assert len(watch.tensors) > 5
    assert len(set(watch.tensors)) == 1


@pytest.mark.slow
def test_memory_does_not_grow_over_two_thousand_steps(
    deep_module: Callable, images: type, trainer: Callable
) -> None:
    watch = MemoryWatch(settled=200, every=100)
    run = trainer(max_epochs=700, callbacks=[watch])
    run.fit(deep_module(), datamodule=images(batch_size=9))
    assert run.global_step == 2100
    assert len(set(watch.tensors)) == 1
    assert watch.peaks[-1] - watch.peaks[0] < 2000  # kilobytes: less than one per step


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (Start, {"first_sweeps": -1}, r"model\.start\.first_sweeps must be at least 0, got -1"),
        (Start, {"warm_up_epochs": -1}, r"model\.start\.warm_up_epochs must be at least 0"),
        (Start, {"temperatures": -1}, r"model\.start\.temperatures must be at least 0"),
        (HeldOut, {"forecast": -1}, r"model\.held_out\.forecast must be at least 0"),
        (HeldOut, {"num_particles": 1}, r"model\.held_out\.num_particles must be at least 2"),
        (HeldOut, {"num_temperatures": 0}, r"model\.held_out\.num_temperatures must be at least 1"),
        (
            HeldOut,
            {"test_temperatures": 0},
            r"model\.held_out\.test_temperatures must be at least 1",
        ),
        (HeldOut, {"bound_samples": 0}, r"model\.held_out\.bound_samples must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(group: type, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        group(**options)


@pytest.mark.parametrize(
    ("given", "expected"), [(0.2, 0.2), ({"pgd": 0.3, "pc": 1.0}, 0.3), ({"pc": 0.7}, None)]
)
def test_step_sizes_may_be_given_by_algorithm(
    deep_module: Callable, given: object, expected: float | None
) -> None:
    module, plain = (deep_module(algorithm="pgd", step_size=size) for size in (given, None))
    default = plain.inference.parts.step_size
    assert module.inference.parts.step_size == (default if expected is None else expected)


def test_the_models_own_encoder_is_its_guide() -> None:
    model = DeepLatentGaussian([2, 3], [1, 2, 2])
    module = ParticleModule(model, "encoder", held_out=HeldOut(2))
    assert isinstance(module.guide, MLPEncoder)
    assert module.inference.guide is module.guide
    x = torch.rand(5, 1, 2, 2)
    shapes = {name: tuple(value.shape) for name, value in module.guide(x).items()}
    assert shapes == {"z1": (5, 2), "z2": (5, 3)}
    with pytest.raises(OptionError, match=r"guide='encoder' .* Tied has no method encoder"):
        ParticleModule(Tied(), "encoder")
