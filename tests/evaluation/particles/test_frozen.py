from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dcpc import DCPC
from dcpc.distributions import ContinuousBernoulli
from dcpc.errors import OptionError
from dcpc.evaluation import (
    FrozenParticles,
    FrozenParticlesError,
    held_out_inference,
    infer_and_freeze,
)
from dcpc.models import DeepLatentGaussian
from dcpc.training import Parameterization

SHAPE = (1, 2, 2)


def make_model(seed: int = 0, latent_sizes: tuple[int, ...] = (2, 3)) -> DeepLatentGaussian:
    torch.manual_seed(seed)
    return DeepLatentGaussian(latent_sizes, SHAPE, "bernoulli")


@pytest.fixture
def frozen() -> FrozenParticles:
    model = make_model()
    torch.manual_seed(1)
    return FrozenParticles(
        model=model,
        latents={"z1": torch.randn(3, 5, 2), "z2": torch.randn(3, 5, 3)},
        log_weight=torch.randn(3, 5),
        index=torch.tensor([7, 1, 9, 4, 0]),
    )


def reconstruction_of(frozen: FrozenParticles) -> Tensor:
    """The weighted mean of the decoder's means, written out: z1 does not enter."""
    weights = frozen.log_weight.exp() / frozen.log_weight.exp().sum(0)
    layer = frozen.model.layers[-1]
    logits = torch.relu(frozen.latents["z2"]) @ layer.weight.T + layer.bias
    return (weights.unsqueeze(-1) * torch.sigmoid(logits)).sum(0).reshape(-1, *SHAPE).detach()


@pytest.mark.parametrize("batch_size", [2, 100])
def test_reconstructions_average_the_decoders_means_by_weight(
    frozen: FrozenParticles, batch_size: int
) -> None:
    result = frozen.reconstruct(torch.zeros(1, *SHAPE), batch_size=batch_size)
    assert torch.allclose(result, reconstruction_of(frozen), atol=1e-6)


def test_means_and_ess_are_those_of_the_weights(frozen: FrozenParticles) -> None:
    weights = torch.softmax(frozen.log_weight, 0)
    expected = sum(weights[k].unsqueeze(-1) * frozen.latents["z1"][k] for k in range(3))
    assert torch.allclose(frozen.means()["z1"], expected, atol=1e-6)
    assert torch.allclose(frozen.ess, 1 / weights.square().sum(0), atol=1e-5)
    assert torch.allclose(frozen.ess_percent, 100 / 3 / weights.square().sum(0), atol=1e-3)


def test_a_saved_file_gives_everything_back(frozen: FrozenParticles, tmp_path: Path) -> None:
    path = tmp_path / "new" / "particles.pt"
    frozen.save(path)
    model = make_model(seed=5)
    opened = FrozenParticles.from_checkpoint(path, model)
    assert all(torch.equal(opened.latents[n], frozen.latents[n]) for n in ("z1", "z2"))
    assert torch.equal(opened.log_weight, frozen.log_weight)
    assert torch.equal(opened.index, frozen.index)
    x = torch.zeros(1, *SHAPE)
    assert torch.equal(opened.reconstruct(x), frozen.reconstruct(x))
    some = FrozenParticles.from_checkpoint(path, model, torch.tensor([9, 7]))
    assert torch.equal(some.latents["z1"], frozen.latents["z1"][:, [2, 0]])
    assert some.index.tolist() == [9, 7]


def test_the_data_and_their_labels_come_along(frozen: FrozenParticles, tmp_path: Path) -> None:
    originals, labels = torch.rand(5, *SHAPE), torch.arange(5)
    with_data = dataclasses.replace(frozen, originals=originals, labels=labels)
    with_data.select(torch.tensor([3, 1, 2])).save(tmp_path / "a.pt")
    opened = FrozenParticles.from_checkpoint(tmp_path / "a.pt", frozen.model)
    assert torch.equal(opened.originals, originals[[3, 1, 2]])
    assert opened.labels.tolist() == [3, 1, 2]
    some = FrozenParticles.from_checkpoint(tmp_path / "a.pt", frozen.model, torch.tensor([9, 4]))
    assert torch.equal(some.originals, originals[[2, 3]])
    assert some.labels.tolist() == [2, 3]
    frozen.save(tmp_path / "b.pt")
    assert FrozenParticles.from_checkpoint(tmp_path / "b.pt", frozen.model).originals is None


def test_a_selection_takes_only_its_own_share_of_the_disk(tmp_path: Path) -> None:
    many = FrozenParticles(
        make_model(), {"z1": torch.randn(4, 9000, 2)}, torch.zeros(4, 9000), torch.arange(9000)
    )
    many.select(torch.arange(100, 150)).save(tmp_path / "some.pt")
    many.save(tmp_path / "all.pt")
    assert (tmp_path / "some.pt").stat().st_size < 20_000
    assert (tmp_path / "all.pt").stat().st_size > 4 * 9000 * (2 + 1) * 4


def test_half_precision_halves_the_particles(frozen: FrozenParticles, tmp_path: Path) -> None:
    frozen.save(tmp_path / "half.pt", half_precision=True)
    opened = FrozenParticles.from_checkpoint(tmp_path / "half.pt", make_model(seed=5))
    assert torch.load(tmp_path / "half.pt")["latents"]["z1"].dtype == torch.float16
    assert opened.latents["z1"].dtype == torch.float32
    assert torch.allclose(opened.latents["z1"], frozen.latents["z1"], rtol=2**-11)
    assert torch.equal(opened.log_weight, frozen.log_weight)
    frozen.latents["z1"][0, 0, 0] = 1e6
    with pytest.raises(OptionError, match=r"site\(s\) \['z1'\].*65504"):
        frozen.save(tmp_path / "half.pt", half_precision=True)


def test_a_training_run_leaves_particles_to_reconstruct_from(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path
) -> None:
    run = trainer(max_epochs=2)
    run.fit(deep_module(num_particles=3), datamodule=images())
    run.save_checkpoint(tmp_path / "run.ckpt")
    stored = run.model.store.state_dict()
    model = DeepLatentGaussian((2, 3), SHAPE)
    frozen = FrozenParticles.from_checkpoint(tmp_path / "run.ckpt", model)
    assert (frozen.num_particles, len(frozen)) == (3, 20)
    assert torch.equal(frozen.latents["z2"][1, 4], stored["latents"]["z2"][4, 1])
    assert torch.equal(frozen.log_weight.T, stored["log_weight"])
    assert torch.equal(model.layers[0].weight, run.model.model.layers[0].weight)
    x = torch.zeros(1, *SHAPE)
    some = FrozenParticles.from_checkpoint(tmp_path / "run.ckpt", model, torch.tensor([4, 2]))
    assert torch.allclose(some.reconstruct(x), frozen.reconstruct(x)[[4, 2]], atol=1e-6)


def test_data_that_were_never_visited_have_no_particles(tmp_path: Path) -> None:
    model = make_model()
    particles = {
        "latents": {"z1": torch.arange(6.0).reshape(3, 1, 2), "z2": torch.zeros(3, 1, 3)},
        "log_weight": torch.zeros(3, 1),
        "visited": torch.tensor([True, False, True]),
    }
    parameters = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": parameters, "dcpc": {"particles": particles}}, tmp_path / "a.ckpt")
    frozen = FrozenParticles.from_checkpoint(tmp_path / "a.ckpt", model)
    assert frozen.index.tolist() == [0, 2]
    assert frozen.latents["z1"].tolist() == [[[0.0, 1.0], [4.0, 5.0]]]
    with pytest.raises(FrozenParticlesError, match=r"no particles of the data \[1\].*2 data"):
        FrozenParticles.from_checkpoint(tmp_path / "a.ckpt", model, torch.tensor([0, 1]))


def test_held_out_data_are_inferred_and_frozen(shifted_gaussian: type) -> None:
    x = torch.rand(40, 4)
    inference = DCPC(shifted_gaussian(4), num_particles=32)
    frozen = infer_and_freeze(
        inference, x, 100 + torch.arange(40), num_temperatures=20, batch_size=25
    )
    assert frozen.latents["z"].shape == (32, 40, 4)
    assert frozen.index[3] == 103
    # z | x ~ N(x / 2, 1/2); weights and moves that are correlated leave fewer than 32 to count.
    error = frozen.reconstruct(x) - x / 2
    assert float(error.square().mean()) < 3 * 0.5 / 32
    assert torch.equal(frozen.means()["z"], frozen.reconstruct(x))


def test_resampling_keeps_particles_in_proportion_to_their_weights() -> None:
    count = 4000
    weights = torch.tensor([0.0, 0.5, 0.3, 0.2])
    frozen = FrozenParticles(
        make_model(),
        {"z1": torch.arange(4.0).reshape(4, 1, 1).expand(4, count, 2)},
        weights.log().unsqueeze(1).expand(4, count),
        torch.arange(count),
    )
    kept = frozen.resample(2, seed=0)
    assert kept.latents["z1"].shape == (2, count, 2)
    assert bool((kept.ess == 2).all())
    shares = [float((kept.latents["z1"][..., 0] == k).float().mean()) for k in range(4)]
    # The two of a datum are dependent: at worst, as if there were one.
    for share, weight in zip(shares, weights.tolist(), strict=True):
        assert abs(share - weight) <= 4 * math.sqrt(weight * (1 - weight) / count)
    with pytest.raises(OptionError, match="between 1 and the number of particles, 4, got 5"):
        frozen.resample(5, seed=0)


def test_files_that_hold_no_particles_are_named(frozen: FrozenParticles, tmp_path: Path) -> None:
    path, model = tmp_path / "particles.pt", make_model()
    with pytest.raises(FrozenParticlesError, match="there is no file"):
        FrozenParticles.from_checkpoint(path, model)
    frozen.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FrozenParticlesError, match="truncated"):
        FrozenParticles.from_checkpoint(path, model)
    for content in (torch.zeros(2), {"state_dict": {}}, {"state_dict": {}, "dcpc": {}}):
        torch.save(content, path)
        with pytest.raises(FrozenParticlesError, match="holds no particles: it is neither"):
            FrozenParticles.from_checkpoint(path, model)
    particles = {"visited": torch.zeros(3, dtype=torch.bool), "log_weight": torch.zeros(0)}
    torch.save({"state_dict": {}, "dcpc": {"particles": particles}}, path)
    with pytest.raises(FrozenParticlesError, match=r"yet.*lower model\.start\.warm_up_epochs"):
        FrozenParticles.from_checkpoint(path, model)


def test_particles_of_another_model_are_refused(frozen: FrozenParticles, tmp_path: Path) -> None:
    frozen.save(tmp_path / "particles.pt")
    with pytest.raises(FrozenParticlesError, match=r"another model: parameter 'layers.0.bias'"):
        FrozenParticles.from_checkpoint(tmp_path / "particles.pt", make_model(latent_sizes=(2, 4)))
    x = torch.zeros(1, *SHAPE)
    for latents in ({"z1": frozen.latents["z1"]}, {**frozen.latents, "z2": torch.zeros(3, 5, 4)}):
        other = FrozenParticles(frozen.model, latents, frozen.log_weight, frozen.index)
        with pytest.raises(FrozenParticlesError, match="site 'z2'"):
            other.reconstruct(x)


def test_a_plain_function_and_an_index_of_another_length_are_refused(
    shifted_gaussian: type,
) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(OptionError, match="torch module"):
        infer_and_freeze(DCPC(model, num_particles=2), torch.zeros(3))
    inference = DCPC(shifted_gaussian(4), num_particles=2)
    with pytest.raises(OptionError, match=r"index must have shape \(3,\), got \(2,\)"):
        infer_and_freeze(inference, torch.zeros(3, 4), torch.arange(2))


def test_particles_that_a_training_kept_as_errors_are_decoded_as_errors(
    deep_module: Callable, images: type, trainer: Callable, tmp_path: Path
) -> None:
    chosen = Parameterization("noncentred", "noncentred", "noncentred")
    module, run = deep_module(parameterization=chosen, num_particles=2), trainer(max_epochs=3)
    run.fit(module, datamodule=images())
    run.save_checkpoint(tmp_path / "last.ckpt")
    model = DeepLatentGaussian([2, 3], [1, 2, 2])
    frozen = FrozenParticles.from_checkpoint(tmp_path / "last.ckpt", model)
    assert frozen.noncentred == ("z1", "z2")
    z1, e2 = frozen.latents["z1"], frozen.latents["z2"]
    z2 = model.layers[0](torch.relu(z1)) + e2 @ model.scales[0]().mT
    means = ContinuousBernoulli(model.layers[1](torch.relu(z2))).mean
    weights = frozen.log_weight.softmax(0)[..., None]
    by_hand = (weights * means).sum(0).detach().reshape(-1, 1, 2, 2)
    template = torch.zeros(1, 1, 2, 2)
    torch.testing.assert_close(frozen.reconstruct(template), by_hand)
    frozen.save(tmp_path / "particles.pt")
    again = FrozenParticles.from_checkpoint(
        tmp_path / "particles.pt", DeepLatentGaussian([2, 3], [1, 2, 2])
    )
    torch.testing.assert_close(again.reconstruct(template), by_hand)


def test_data_that_were_inferred_by_errors_are_frozen_by_values() -> None:
    """Both engines find the same posterior means, of values; parameters keep their names."""
    model = make_model()
    with torch.no_grad():
        model.scales[0].raw += 0.5 * torch.randn(3, 3)
        model.layers[0].bias += 1.0
    x = torch.rand(4, *SHAPE)
    found = [
        infer_and_freeze(held_out_inference(model, 2000, reparam=reparam), x, num_temperatures=6)
        for reparam in (None, "noncentred")
    ]
    assert found[1].model is model
    assert found[1].noncentred == ()
    for name in ("z1", "z2"):
        spread = found[0].latents[name].std(0)
        difference = (found[0].means()[name] - found[1].means()[name]).abs() / spread
        assert float(difference.max()) < 0.2
