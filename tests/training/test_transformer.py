"""Sequences from the config to the pictures, and particles that start anew at every visit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from event_logs import event_logs
from torch import Tensor, nn

from dcpc import DCPC
from dcpc.errors import ModelError, OptionError
from dcpc.evaluation import forward_pass
from dcpc.models import DeepLatentGaussian, LatentTransformer, MLPEncoder
from dcpc.training import HeldOut, ParticleModule, Start
from dcpc.training.command import main

CONFIG = Path(__file__).parents[2] / "configs" / "transformer.json"
SMALL = {
    "trainer.max_epochs": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_train_batches": 2,
    "trainer.limit_test_batches": 1,
    "trainer.limit_predict_batches": 1,
    "trainer.check_val_every_n_epoch": 2,
    "model.model.width": 4,
    "model.model.num_blocks": 2,
    "model.model.num_heads": 1,
    "model.held_out.test_temperatures": 1,
    "model.held_out.prior_samples": 3,
    "data.images.evaluation_batch_size": 11,
}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("transformer")

    def run(subcommand: str, **options: Any) -> Path:
        settings = {**SMALL, "trainer.default_root_dir": folder, **options}
        main([subcommand, "--config", str(CONFIG), *(f"--{k}={v}" for k, v in settings.items())])
        return folder

    return run


@pytest.fixture(scope="module")
def run(command: Callable) -> Path:
    return command("fit")


def test_the_config_trains_and_keeps_no_particles(run):
    saved = torch.load(run / "last.ckpt", weights_only=True)
    assert saved["dcpc"]["particles"]["latents"] == {}
    visited = int(saved["dcpc"]["particles"]["visited"].sum())
    assert 50 <= visited <= 100  # of two epochs of two batches of 25
    shown = event_logs(run / "version_0")[-1].Tags()
    assert {"held_out/bits_per_symbol", "held_out/forward_pass_bits_per_symbol"} <= set(
        shown["scalars"]
    )
    assert {"images/originals", "images/prior_samples"} <= set(shown["images"])
    assert {"sweep/latents/z1", "sweep/latents/z2"} <= set(shown["histograms"])


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(command, tmp_path):
    options = {"trainer.max_epochs": 4, "model.learning_rate_schedule": "null"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command("fit", **options, **{"trainer.default_root_dir": whole})
    options["trainer.default_root_dir"] = parts
    command("fit", **{**options, "trainer.max_epochs": 2})
    command("fit", **options, ckpt_path=parts / "last.ckpt")
    one, other = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (whole, parts)
    )
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_measurements_are_in_bits_per_symbol(run, command, capsys):
    command("test")
    printed = capsys.readouterr().out

    def number(label: str) -> float:
        found = re.search(rf"^\s*{label}\s+(-?\d+\.\d+)", printed, re.MULTILINE)
        assert found, printed
        return float(found[1])

    in_bits = 64 * math.log(2)
    nll = number("evidence NLL")
    assert number("bits per symbol") == pytest.approx(nll / in_bits, abs=2e-3)
    sampled = number("prior-sample NLL")
    assert number("prior-sample bits per symbol") == pytest.approx(sampled / in_bits, abs=2e-3)


def test_predictions_are_symbols_and_their_picture(run, command):
    command("predict")
    predictions = torch.load(run / "predictions.pt", weights_only=True)
    assert predictions["prior_samples"].shape == (11, 1, 8, 8)
    assert predictions["prior_samples"].dtype == torch.int64
    assert int(predictions["prior_samples"].min()) >= 0
    assert int(predictions["prior_samples"].max()) <= 7
    assert predictions["reconstructions"].shape == (11, 1, 8, 8)
    assert (run / "predictions.png").stat().st_size > 0


def test_the_forward_pass_is_the_network_without_noise():
    torch.manual_seed(0)
    model = LatentTransformer(4, 6, width=8, num_blocks=2, num_heads=2)
    x = torch.randint(0, 4, (5, 6))
    told = model.network(x).log_softmax(-1)
    expected = told.gather(-1, x.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(forward_pass(DCPC(model, num_particles=3), x), expected)


class Chain(nn.Module):
    """`z1 ~ N(2, 1)`, `z2 ~ N(3 z1, 1)`, `x ~ N(z2, 1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_full((len(x),), 2.0), 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.slope * z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)


def test_a_start_at_means_runs_from_the_top_down():
    dcpc = DCPC(Chain(), num_particles=3, algorithm="pgd", step_size=0.1)
    state = dcpc.bind(torch.randn(4)).init_at_means()
    assert torch.equal(state.latents["z1"], torch.full((3, 4), 2.0))
    assert torch.equal(state.latents["z2"], torch.full((3, 4), 6.0))


def test_a_start_at_means_is_refused_where_there_are_none_or_particles_are_weighed():
    def heavy(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(len(x))))
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    x = torch.randn(4)
    with pytest.raises(ModelError, match="site 'scale' has no value at the mean"):
        DCPC(heavy, num_particles=1, algorithm="pc", step_size=0.1).bind(x).init_at_means()
    with pytest.raises(OptionError, match="'dcpc' weighs particles"):
        DCPC(Chain(), num_particles=2).bind(x).init_at_means()


@pytest.mark.parametrize(("afresh", "algorithm"), [("means", "pc"), ("prior", "dcpc")])
def test_particles_start_anew_at_every_visit(
    afresh, algorithm, images, trainer, deep_module, monkeypatch
):
    drawn: list[int] = []
    kept = ParticleModule._draw

    def counted(module, problem):
        drawn.append(len(problem.arguments.tensors[0]))
        return kept(module, problem)

    monkeypatch.setattr(ParticleModule, "_draw", counted)
    options = {"num_particles": 1, "step_size": 0.1} if algorithm == "pc" else {"num_particles": 2}
    module = deep_module(algorithm=algorithm, start=Start(afresh=afresh), **options)
    trainer(max_epochs=3).fit(module, datamodule=images(batch_size=10))
    assert drawn == [10] * 6  # 20 images
    state = module.store.state_dict()
    assert bool(state["visited"].all())
    assert state["latents"] == {}


def test_starts_that_contradict_the_module_are_refused():
    sizes, shape = [2, 3], [1, 2, 2]
    model = DeepLatentGaussian(sizes, shape)
    with pytest.raises(OptionError, match=r"model\.start\.afresh='prior' is a start without"):
        ParticleModule(model, MLPEncoder(sizes, shape, 4), start=Start(afresh="prior"))
    with pytest.raises(OptionError, match=r"model\.start\.afresh='means' gives particles no"):
        ParticleModule(model, start=Start(afresh="means"))
    with pytest.raises(OptionError, match=r"model\.start\.afresh must be"):
        Start(afresh="guide")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"model\.held_out\.prior_samples"):
        HeldOut(prior_samples=0)


def test_units_move_in_the_order_that_is_asked_for():
    module = ParticleModule(
        Chain(), num_particles=1, algorithm="pc", schedule="sequential", step_size=0.1
    )
    groups = module.inference.bind(torch.randn(4)).division.groups
    assert [group.name for group in groups] == ["z2", "z1"]
