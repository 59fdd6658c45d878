"""Training on a GPU: runs that resume, files that a CPU can read, and what is measured."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from resumable_runs import SETTINGS, assert_continues, run
from sklearn.datasets import load_digits

from dcpc.evaluation import (
    FeatureClassifier,
    FrozenParticles,
    PseudoPosterior,
    bottom_half,
    complete,
    decode,
    frechet_classifier_distance,
    guide_bounds,
    held_out_inference,
    infer_and_freeze,
    latent_traversal,
    nearest_neighbours,
    temperature_study,
)
from dcpc.models import DeepLatentGaussian
from dcpc.training import AmortisedModule, ParticleModule, Start
from dcpc.training.command import main

pytestmark = pytest.mark.gpu

ON_GPU = "--trainer.accelerator=gpu"


@pytest.fixture
def model() -> DeepLatentGaussian:
    torch.manual_seed(0)
    return DeepLatentGaussian([3, 6], [1, 4, 4])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_on_the_gpu_resumes_bit_for_bit(name, tmp_path):
    whole = run(tmp_path / "whole", name, ON_GPU)
    run(tmp_path / "stopped", name, ON_GPU, "--trainer.max_steps=7")
    last = tmp_path / "stopped" / "last.ckpt"
    assert_continues(whole, run(tmp_path / "stopped", name, ON_GPU, f"--ckpt_path={last}"))


def test_a_run_of_a_convolutional_model_resumes_bit_for_bit(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(40, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    model = {"latent_size": 4, "image_shape": [3, 16, 16], "likelihood": "normal"}
    config = {
        "model": {
            "model": {"class_path": "dcpc.models.ConvolutionalGenerator", "init_args": model},
            "num_particles": 2,
            "guide": "encoder",
            "start": {"warm_up_epochs": 1},
        },
        "data": {
            "class_path": "dcpc.training.ArrayData",
            "init_args": {
                "folder": str(tmp_path),
                "batch_size": 8,
                "num_held_out": 8,
            },
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def fit(folder: str, *options: str) -> dict[str, Any]:
        path = tmp_path / folder
        main(
            [
                "fit",
                f"--config={tmp_path / 'config.json'}",
                f"--trainer.default_root_dir={path}",
                "--trainer.limit_val_batches=0",
                "--trainer.max_epochs=4",
                "--trainer.log_every_n_steps=1",
                ON_GPU,
                *options,
            ]
        )
        return torch.load(path / "last.ckpt", weights_only=True)

    whole = fit("whole")
    fit("stopped", "--trainer.max_steps=10")
    resumed = fit("stopped", f"--ckpt_path={tmp_path / 'stopped' / 'last.ckpt'}")
    assert_continues(whole, resumed)
    assert not torch.backends.cudnn.allow_tf32


def test_a_run_of_the_gpu_is_tested_predicted_and_read_on_the_cpu(tmp_path, capsys):
    run(tmp_path, "dcpc", ON_GPU)
    config = f"--config={tmp_path / 'config.json'}"
    for device in (ON_GPU, "--trainer.accelerator=cpu"):
        short = ("--model.held_out.test_temperatures=2", "--data.num_held_out=20")
        main(["test", config, device, *short])
        main(["predict", config, device, *short])
        assert "evidence NLL" in capsys.readouterr().out
        predicted = torch.load(tmp_path / "predictions.pt", weights_only=True)
        assert {value.device.type for value in predicted.values()} == {"cpu"}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {value.device.type for value in saved["state_dict"].values()} == {"cpu"}
    model = DeepLatentGaussian([2, 3], [1, 8, 8])
    frozen = FrozenParticles.from_checkpoint(tmp_path / "last.ckpt", model)
    template = torch.zeros(1, 1, 8, 8)
    on_cpu = frozen.reconstruct(template)
    model.cuda()
    on_device = frozen.reconstruct(template.cuda())
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-4, atol=1e-5)


def test_a_run_of_the_cpu_goes_on_on_the_gpu(tmp_path):
    run(tmp_path, "dcpc", "--trainer.max_epochs=1")
    last = tmp_path / "last.ckpt"
    saved = run(tmp_path, "dcpc", ON_GPU, f"--ckpt_path={last}")
    assert saved["epoch"] == 2


def test_training_on_the_gpu_learns_what_it_learns_on_the_cpu(tmp_path):
    images = torch.tensor(load_digits().images[:100], dtype=torch.float32).unsqueeze(1) / 16
    found = {}
    for accelerator in ("cpu", "gpu"):
        folder = tmp_path / accelerator
        options = [f"--trainer.default_root_dir={folder}", "--trainer.limit_val_batches=0"]
        options += [f"--trainer.accelerator={accelerator}", "--trainer.max_epochs=5"]
        main(["fit", "--config=configs/digits.json", *options])
        model = DeepLatentGaussian([10, 32], [1, 8, 8], likelihood="continuous_bernoulli")
        FrozenParticles.from_checkpoint(folder / "last.ckpt", model)
        annealed = held_out_inference(model, 8).anneal(images, num_temperatures=30, seed=0)
        found[accelerator] = float(annealed.log_evidence.mean())
    assert found["cpu"] > 60.0
    assert found["gpu"] == pytest.approx(found["cpu"], abs=3.0)  # seeds differ by .5


@pytest.mark.parametrize("algorithm", ["dcpc-smc", "dcpc-paper", "pgd", "mcpc", "pc"])
def test_every_algorithm_trains(algorithm, images, trainer):
    torch.manual_seed(0)
    module = ParticleModule(
        DeepLatentGaussian([2, 3], [1, 2, 2]),
        algorithm=algorithm,
        num_particles=1 if algorithm in ("mcpc", "pc") else 3,
    )
    trainer(accelerator="gpu", max_epochs=2).fit(module, datamodule=images())
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("restart", [False, True])
def test_a_warm_start_trains(restart, images, trainer):
    torch.manual_seed(0)
    module = ParticleModule(
        DeepLatentGaussian([2, 3], [1, 2, 2]),
        guide="encoder",
        start=Start(warm_up_epochs=1, restart=restart),
    )
    trainer(accelerator="gpu", max_epochs=3, limit_val_batches=1).fit(module, datamodule=images())
    assert {p.device.type for p in module.parameters()} == {"cpu"}  # Lightning puts them back


def test_an_autoencoder_trains(images, trainer):
    module = AmortisedModule(DeepLatentGaussian([2, 3], [1, 2, 2]), guide="encoder")
    trainer(accelerator="gpu", max_epochs=2, limit_val_batches=1).fit(module, datamodule=images())


@pytest.mark.parametrize("name", ["two-moons", "digits"])
def test_classifiers_learn(name, tmp_path, capsys):
    options = [f"--config=configs/networks/{name}.json", ON_GPU]
    options += [f"--trainer.default_root_dir={tmp_path}", "--trainer.log_every_n_steps=10"]
    main(["fit", *options, "--trainer.max_epochs=2"])
    main(["test", *options])
    main(["predict", *options])
    assert "accuracy" in capsys.readouterr().out
    predicted = torch.load(tmp_path / "predictions.pt", weights_only=True)
    assert predicted["classes"].device.type == "cpu"


def test_held_out_data_are_measured_as_on_the_cpu(model, x):
    def measured(model, x):
        bound = guide_bounds(model, model.encoder().to(x), x, num_samples=2000, seed=0)
        study = temperature_study(model, x, [30], [16])
        completed = complete(model, x, bottom_half(x.shape[1:]), num_temperatures=20)
        return (
            bound.importance_weighted.mean(),
            -next(iter(study.evidence_nll.values())).mean(),
            completed.hidden_cross_entropy.mean(),
        )

    on_cpu = measured(model, x.cpu())
    on_device = measured(model.cuda(), x)
    for expected, got in zip(on_cpu, on_device, strict=True):
        assert got.is_cuda
        assert float(got) == pytest.approx(float(expected), abs=0.1)


def test_samples_and_their_neighbours(model, x):
    model.cuda()
    frozen = infer_and_freeze(held_out_inference(model, 8), x, num_temperatures=10)
    frozen = frozen.resample(4, seed=0).select(torch.arange(20))
    assert frozen.reconstruct(x).is_cuda
    pseudo = PseudoPosterior.fit("z1", frozen.latents["z1"], num_components=2)
    samples = decode(model, pseudo.sample(12, seed=0), x[:12], seed=0).samples
    assert samples.is_cuda
    assert latent_traversal(model, frozen.means(), "z1", 0, [-1.0, 1.0], x[:20]).is_cuda
    found = nearest_neighbours(samples, x.cpu(), 3)
    expected = nearest_neighbours(samples.cpu(), x.cpu(), 3)
    assert torch.equal(found.indices.cpu(), expected.indices)


def test_distances_of_images():
    images = torch.rand(60, 1, 8, 8).cuda()
    labels = (images.flatten(1).mean(1) > 0.5).long()
    classifier = FeatureClassifier((1, 8, 8), 2, num_features=4).cuda().fit(images, labels)
    assert 0.0 <= classifier.accuracy(images, labels) <= 1.0
    assert frechet_classifier_distance(classifier, images, images) == pytest.approx(0, abs=1e-3)
