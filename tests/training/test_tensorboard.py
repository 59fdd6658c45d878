"""A short run, read back over HTTP from a real TensorBoard server."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pytest
import torch
from PIL import Image

from dcpc.training import ParticleModule
from dcpc.training.cli import TrainingCLI

NUM_PARTICLES, BATCH_SIZE, NUM_TRAINING, NUM_EPOCHS = 2, 10, 30, 2
LATENT_SIZES = {"z1": 3, "z2": 5}
NUM_STEPS = NUM_EPOCHS * NUM_TRAINING // BATCH_SIZE
GRID_SIZE = 8 * 9 + 1
TIMEOUT = 60.0


@dataclass
class Run:
    """What a run was seen to do, other than through its logs."""

    module: ParticleModule
    losses: list[float] = field(default_factory=list)
    indices: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorboard")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """`dcpc fit` on thirty digits; the losses as the module returned them."""
    digits = {
        "batch_size": BATCH_SIZE,
        "num_held_out": 1797 - NUM_TRAINING,
        "evaluation_batch_size": 70,
    }
    model = {"latent_sizes": list(LATENT_SIZES.values()), "image_shape": [1, 8, 8]}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder / "digits"),
            "log_every_n_steps": 1,
            "max_epochs": NUM_EPOCHS,
            "limit_val_batches": 2,
        },
        "model": {
            "model": {
                "class_path": "dcpc.models.DeepLatentGaussian",
                "init_args": model,
            },
            "num_particles": NUM_PARTICLES,
            "held_out": {"num_particles": 2, "num_temperatures": 2},
        },
        "data": {"class_path": "dcpc.training.data.DigitsData", "init_args": digits},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    losses: list[float] = []
    indices: list[torch.Tensor] = []
    step = ParticleModule.training_step

    def observed(module: ParticleModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(module, batch, batch_idx)
        losses.append(float(loss.detach()))
        indices.append(batch[2])
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParticleModule, "training_step", observed)
        cli = TrainingCLI(["fit", "--config", str(path)])
    return Run(cli.model, losses, indices)


@pytest.fixture(scope="module")
def get(run: Run, folder: Path) -> Iterator[Callable[..., bytes]]:
    """Asks a server on a free port of the loopback interface; stops it in the end."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    options = ["--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    with log.open("w") as output:
        server = subprocess.Popen([*command, *options], stdout=output, stderr=output)
    opener = build_opener(ProxyHandler({}))

    def ask(route: str, **query: object) -> bytes:
        url = f"{address}/data/plugin/{route}?{urlencode(query)}"
        return opener.open(url, timeout=TIMEOUT).read()

    try:
        address = wait(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()), log)[0]
        wait(lambda: json.loads(ask("images/tags")), log)
        yield ask
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


def wait(answer: Callable[[], Any], log: Path) -> Any:
    """The first answer that is not empty."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        found = answer()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"TensorBoard did not answer: {log.read_text()}")


def read(get: Callable[..., bytes], kind: str, tag: str) -> list:
    return json.loads(get(f"{kind}/{kind}", run="digits/version_0", tag=tag, sample=0))


def picture(get: Callable[..., bytes], tag: str, position: int) -> np.ndarray:
    """One of the grids of a tag below its caption, as bytes `(73, 73)`, a byte for every square."""
    entry = read(get, "images", tag)[position]
    png = get("images/individualImage", **dict(parse_qsl(entry["query"])))
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    factor = shown.shape[1] // GRID_SIZE
    squares = shown[-factor * GRID_SIZE :].reshape(GRID_SIZE, factor, GRID_SIZE, factor)
    assert factor >= 4  # a digit is large enough to be read
    assert (squares == squares[:, :1, :, :1]).all()
    return squares[:, 0, :, 0]


def test_tags_are_grouped_with_the_headline_first(get: Callable[..., bytes]) -> None:
    groups = {}
    for kind in ("scalars", "histograms", "images"):
        tags = json.loads(get(f"{kind}/tags"))["digits/version_0"]
        groups[kind] = {tag.partition("/")[0] for tag in tags}
    assert groups["scalars"] == {"held_out", "sweep", "train"}
    assert groups["histograms"] == {"sweep"}
    assert groups["images"] == {"images"}


def test_the_table_of_hyperparameters_has_the_run_with_its_last_measurements(
    get: Callable[..., bytes], run: Run
) -> None:
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": {"tag": "held_out/evidence_nll", "group": ""}}],
        "startIndex": 0,
        "sliceSize": 9,
    }
    told = json.loads(get("hparams/session_groups", request=json.dumps(asked)))
    (row,) = told["sessionGroups"]
    assert row["hparams"]["algorithm"] == "dcpc"
    assert row["hparams"]["num_particles"] == NUM_PARTICLES
    assert row["hparams"]["data.batch_size"] == BATCH_SIZE
    assert row["hparams"]["model.latent_sizes"] == "[3, 5]"
    values = {metric["name"]["tag"]: metric["value"] for metric in row["metricValues"]}
    assert values["held_out/evidence_nll"] == pytest.approx(
        run.module.measurements()["evidence_nll"], rel=1e-5
    )


def test_the_overview_has_a_chart_for_every_tag_that_matters(get: Callable[..., bytes]) -> None:
    (category,) = json.loads(get("custom_scalars/layout"))["category"]
    patterns = [chart["multiline"]["tag"][0] for chart in category["chart"]]
    tags = list(json.loads(get("scalars/tags"))["digits/version_0"])
    shown = [[tag for tag in tags if re.match(pattern, tag)] for pattern in patterns]
    assert shown[:3] == [["held_out/evidence_nll"], ["train/loss"], ["held_out/reconstruction_mse"]]
    assert sorted(shown[3]) == [f"sweep/acceptance/{unit}" for unit in LATENT_SIZES]
    assert sorted(shown[4]) == [f"sweep/step_size/{unit}" for unit in LATENT_SIZES]


def test_the_untrained_model_is_a_table_and_no_point_of_a_curve(get: Callable[..., bytes]) -> None:
    steps = [step for _, step, _ in read(get, "scalars", "held_out/evidence_nll")]
    assert steps == [NUM_STEPS // 2 - 1, NUM_STEPS - 1]
    told = json.loads(get("text/text", run="digits/version_0", tag="held_out"))
    assert [entry["step"] for entry in told] == [0, *steps]
    assert ["Before training" in entry["text"] for entry in told] == [True, False, False]
    assert all("<td>evidence NLL</td>" in entry["text"] for entry in told)


def test_the_loss_is_what_the_module_returned_at_every_step(
    get: Callable[..., bytes], run: Run
) -> None:
    _, steps, losses = zip(*read(get, "scalars", "train/loss"), strict=True)
    assert steps == tuple(range(NUM_STEPS))
    np.testing.assert_allclose(losses, run.losses, rtol=1e-6)


def test_the_evidence_is_the_mean_over_the_held_out_data(
    get: Callable[..., bytes], run: Run
) -> None:
    nll = torch.cat([evaluation.evidence_nll for evaluation in run.module.evaluations])
    assert len(nll) == 2 * 70
    _, step, value = read(get, "scalars", "held_out/evidence_nll")[-1]
    assert step == NUM_STEPS - 1
    assert value == pytest.approx(float(nll.double().mean()), rel=1e-5)


@pytest.mark.parametrize("unit", LATENT_SIZES)
def test_acceptance_and_step_size_of_every_unit_have_a_curve(
    get: Callable[..., bytes], unit: str
) -> None:
    for kind, highest in (("acceptance", 1.0), ("step_size", np.inf)):
        curve = read(get, "scalars", f"sweep/{kind}/{unit}")
        assert len(curve) == NUM_STEPS
        assert all(0 <= value <= highest for _, _, value in curve)


@pytest.mark.parametrize("unit", LATENT_SIZES)
def test_histograms_of_latents_count_the_particles_of_the_batch(
    get: Callable[..., bytes], run: Run, unit: str
) -> None:
    entries = read(get, "histograms", f"sweep/latents/{unit}")
    assert [step for _, step, _ in entries] == list(range(NUM_STEPS))
    per_batch = BATCH_SIZE * NUM_PARTICLES * LATENT_SIZES[unit]
    for _, _, bins in entries:
        assert sum(count for _, _, count in bins) == per_batch
    # After the last step the store holds what its histogram was made of.
    values = run.module.store.state_dict()["latents"][unit][run.indices[-1]].flatten()
    values = values.clamp(max=values.max() - 1e-6)  # the last bin ends at the maximum
    for left, right, count in entries[-1][2]:
        assert ((values >= left) & (values < right)).sum() == count


def test_histograms_of_ess_and_weights_have_the_range_that_these_have(
    get: Callable[..., bytes],
) -> None:
    for _, _, bins in read(get, "histograms", "sweep/ess_percent"):
        assert sum(count for _, _, count in bins) == BATCH_SIZE
        filled = [(left, right) for left, right, count in bins if count]
        assert min(right for _, right in filled) >= 100 / NUM_PARTICLES - 1e-3
        assert max(left for left, _ in filled) <= 100 + 1e-3
    for _, _, bins in read(get, "histograms", "sweep/log_weight"):
        assert sum(count for _, _, count in bins) == BATCH_SIZE * NUM_PARTICLES
        # Weights have mean one, so that none exceeds K.
        assert max(left for left, _, count in bins if count) <= np.log(NUM_PARTICLES) + 1e-6


@pytest.mark.parametrize("name", ["originals", "reconstructions"])
def test_grids_show_the_held_out_images_in_rows_of_eight(
    get: Callable[..., bytes], run: Run, name: str
) -> None:
    grid = picture(get, f"images/{name}", position=-1)
    images = getattr(run.module.evaluations[0], name)
    for index in (0, 1, 8, 63):
        row, column = 1 + 9 * (index // 8), 1 + 9 * (index % 8)
        shown = grid[row : row + 8, column : column + 8]
        np.testing.assert_allclose(shown, 255 * images[index, 0].numpy(), atol=1)
    assert set(grid[0]) <= {127, 128}  # a grey line


def test_every_evaluation_has_its_grids(get: Callable[..., bytes]) -> None:
    for name in ("originals", "reconstructions", "prior_samples"):
        steps = [entry["step"] for entry in read(get, "images", f"images/{name}")]
        assert steps == [0, NUM_STEPS // 2 - 1, NUM_STEPS - 1]
    before, after = (picture(get, "images/reconstructions", position) for position in (0, -1))
    assert (before != after).any()
    assert (picture(get, "images/originals", 0) == picture(get, "images/originals", -1)).all()
