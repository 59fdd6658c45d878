"""Every notebook runs in a small setting, and shows what mathematics says or what the test made.

A notebook's first code cell, tagged "parameters", holds its constants; a test injects a cell with
its own behind it. The checkpoints made here have decoders that ignore their latents, so that
everything about them can be written down.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.util import run_sync
from nbformat.v4 import new_code_cell
from oracles import gaussian_chain
from PIL import Image
from scipy.stats import halfcauchy, multivariate_normal, norm
from torch import nn

from dcpc.evaluation import FrozenParticles
from dcpc.models import (
    BouncingDigit,
    ConvolutionalGenerator,
    DeepLatentGaussian,
    LabelledEmbedding,
    LabelledStyle,
    LatentTransformer,
    SequenceMemory,
)
from dcpc.training import DigitsData
from dcpc.training.data import BouncingDigits, PixelSequences

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {
    "algorithms",
    "bayes",
    "colour",
    "digits",
    "labels",
    "mnist",
    "mnist_metrics",
    "networks",
    "quick_start",
    "sequences",
    "transformer",
}
FOLDERS_OF_A_MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|mnt|opt|usr|var|work|Users)/")

PARTICLE_WEIGHTS = [0.5, 0.25, 0.25]
ESS_PERCENT = 100 / 3 / (0.5**2 + 2 * 0.25**2)
NUM_PICTURES = 40  # half in a folder, half in the checkpoint
UPPER, LOWER = (0.75, 0.25), (0.5, 0.5)
"""Shares of the pixels of the darker and of the lighter level, in the halves of every picture."""


FRESH = """
%reset -f
import os
import pyro
os.chdir({folder!r})
pyro.clear_param_store()
del os, pyro
"""


class Executed:
    """What an executed notebook shows."""

    def __init__(self, notebook: nbformat.NotebookNode) -> None:
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        streams = [output for output in outputs if output.output_type == "stream"]
        shown = [output.data for output in outputs if output.output_type == "display_data"]
        self.text = "".join(stream.text for stream in streams if stream.name == "stdout")
        self.tables = "\n".join(data.get("text/markdown", "") for data in shown)
        self.figures = [
            matplotlib.image.imread(io.BytesIO(base64.b64decode(data["image/png"])))
            for data in shown
            if "image/png" in data
        ]

    def number(self, pattern: str) -> float:
        """The number that follows a pattern in the text."""
        found = re.search(pattern + r"\s*(-?\d+(?:\.\d+)?)", self.text)
        assert found, f"nothing like {pattern!r} in:\n{self.text}"
        return float(found[1])

    def row(self, label: str) -> list[float]:
        """The numbers of the line that holds a label and numbers only."""
        numbers = r"((?:[ ]+(?:-?\d[\d.e+-]*|NaN|nan))+)"
        rows = re.findall(rf"^{re.escape(label)}{numbers}$", self.text, flags=re.MULTILINE)
        assert len(rows) == 1, f"{len(rows)} rows {label!r} in:\n{self.text}"
        return [float(word) for word in rows[0].split()]

    def figures_showing(self, colour: list[float]) -> int:
        """How many figures have a twentieth or more of their area in a colour, up to two levels."""
        target = np.asarray(colour)
        near = [(abs(f[..., :3] - target).max(-1) <= 2 / 255).mean() for f in self.figures]
        return sum(share > 0.05 for share in near)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., NotebookClient]]:
    """Makes clients of one kernel, which has no network and writes to a temporary folder."""
    home = tmp_path_factory.mktemp("home")
    started: list[NotebookClient] = []

    def make(notebook: nbformat.NotebookNode) -> NotebookClient:
        started.append(NotebookClient(notebook, timeout=900, kernel_name="python3"))
        if len(started) > 1:
            started[-1].km, started[-1].kc = started[0].km, started[0].kc
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        for variable in ("IPYTHONDIR", "XDG_CACHE_HOME", "HF_HOME"):
            patch.setenv(variable, str(home / variable))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(ROOT))  # the experiments are not installed
        patch.setenv("OMP_NUM_THREADS", "1")
        yield make
    if started and started[0].km is not None:
        run_sync(started[0]._async_cleanup_kernel)()


@pytest.fixture
def execute(client: Callable[..., NotebookClient], tmp_path: Path) -> Callable[..., Executed]:
    """Runs a notebook in a temporary folder with constants of the test.

    The kernel is that of the notebook before, whose names and parameters are gone.
    """

    def run(name: str, **constants: object) -> Executed:
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        position = first_code_cell(notebook)
        assert set(constants) <= set(assigned(notebook.cells[position].source))
        source = "\n".join(f"{name} = {value!r}" for name, value in constants.items())
        notebook.cells.insert(position + 1, new_code_cell(source))
        notebook.cells.insert(0, new_code_cell(FRESH.format(folder=str(tmp_path))))
        client(notebook).execute(cleanup_kc=False)
        return Executed(notebook)

    return run


def first_code_cell(notebook: nbformat.NotebookNode) -> int:
    return next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")


def assigned(source: str) -> list[str]:
    """Names that a cell of plain assignments gives values to."""
    statements = ast.parse(source).body
    assert all(isinstance(statement, ast.Assign) for statement in statements)
    return [target.id for statement in statements for target in statement.targets]


# -- the files -------------------------------------------------------------------------------


def test_there_are_the_notebooks_that_are_tested_here() -> None:
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_valid_and_thin(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    first = notebook.cells[first_code_cell(notebook)]
    assert first.metadata.tags == ["parameters"]
    assert assigned(first.source)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef) or len(node.body) <= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_figures_are_small_and_of_one_clean_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(set(cell.metadata) <= {"tags"} for cell in cells)  # no times
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type in ("stream", "display_data")  # no errors
        assert output.get("name", "stdout") == "stdout"  # no warnings
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        assert not FOLDERS_OF_A_MACHINE.search(str({**output, **output.get("data", {})}))
    assert len(Executed(notebook).figures) >= 2
    assert path.stat().st_size < 500_000


# -- quick start -----------------------------------------------------------------------------


def eight_schools_by_quadrature() -> tuple[float, float, float]:
    """Mean and standard deviation of mu given the data, and the log evidence.

    Given tau, mu and the effects are jointly Gaussian; tau is integrated over a grid.
    """
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    tau = np.linspace(0.005, 200, 20_000)
    precision = 1 / (tau[:, None] ** 2 + errors**2)
    variance = 1 / (1 / 25 + precision.sum(1))
    mean = variance * (precision * y).sum(1)
    marginal = np.array(
        [
            multivariate_normal(cov=25.0 + np.diag(t**2 + errors**2)).logpdf(y)
            for t in tau[::10]  # smooth enough to interpolate
        ]
    )
    joint = np.exp(np.interp(tau, tau[::10], marginal)) * halfcauchy(scale=5).pdf(tau)
    evidence = np.trapezoid(joint, tau)
    posterior = joint / joint.sum()
    centre = (posterior * mean).sum()
    spread = (posterior * (variance + mean**2)).sum() - centre**2
    return centre, math.sqrt(spread), math.log(evidence)


def test_the_quick_start_agrees_with_quadrature(execute: Callable[..., Executed]) -> None:
    count = 200
    shown = execute("quick_start", NUM_PARTICLES=count, NUM_SWEEPS=200, KEEP_EVERY=1)
    units = {line.split()[0]: line for line in shown.text.splitlines()[1:4]}
    assert list(units) == ["mu", "tau", "theta"]
    assert "effect, tau, theta" in units["mu"]
    assert "schools(8)" in units["theta"]
    mean, std, evidence = eight_schools_by_quadrature()
    # Particles share ancestors from the annealing: as if a quarter of them were independent.
    assert abs(shown.row("mu")[0] - mean) < 4 * std / math.sqrt(count / 4)
    error = shown.number(r"log evidence -?[\d.]+ ±")
    assert 0 < error < 0.5
    assert abs(shown.number("\nlog evidence") - evidence) < 4 * max(error, 0.05)
    assert len(shown.figures) == 2


# -- the applied Bayesian ----------------------------------------------------------------------


def polynomial_by_leaving_out(degree: int, count: int) -> tuple[float, float]:
    """Log evidence of the notebook's polynomial, and its leave-one-out log predictive density.

    The latter from the definition: the log evidence of all data less that of all others, summed.
    """
    torch.manual_seed(0)
    points = torch.linspace(-1, 1, count)
    y = (0.5 - 0.6 * points + 0.8 * points**2 + 0.4 * torch.randn(count)).double().numpy()
    design = np.vander(points.double().numpy(), degree + 1)
    covariance = design @ design.T + 0.4**2 * np.eye(count)

    def evidence(rows: np.ndarray) -> float:
        return multivariate_normal(cov=covariance[np.ix_(rows, rows)]).logpdf(y[rows])

    everything = np.arange(count)
    others = [evidence(np.delete(everything, row)) for row in everything]
    whole = evidence(everything)
    return whole, count * whole - sum(others)


def test_the_applied_bayesian_sees_the_exact_evidence_and_leave_one_out(
    execute: Callable[..., Executed],
) -> None:
    count = 20
    shown = execute(
        "bayes",
        NUM_PARTICLES=100,
        NUM_SWEEPS=80,
        NUM_POINTS=count,
        SIZES=(8, 9, 10),
        DEGREES=(1, 3),
        WIDTHS=(2.0,),
    )
    for degree in (1, 3):
        estimate, error, exact, loo, exact_loo = shown.row(str(degree))
        evidence, left_out = polynomial_by_leaving_out(degree, count)
        assert exact == pytest.approx(evidence, abs=2e-3)  # of points in single precision
        assert exact_loo == pytest.approx(left_out, abs=2e-3)
        assert 0 < error < 0.3
        assert abs(estimate - evidence) < 4 * error
        assert abs(loo - left_out) < 0.3  # spread of PSIS over seeds: less than .05
    groups = {"posterior", "log_likelihood", "posterior_predictive", "prior", "observed_data"}
    assert groups <= set(shown.text.splitlines())
    assert all(row[-1] < 1.05 for row in map(shown.row, ("mean[slope]", "sigma")))
    assert re.search(r"^pooled +-\d+\.\d+", shown.text, flags=re.MULTILINE)
    assert len(shown.figures) == 6


# -- the algorithms --------------------------------------------------------------------------


def head_to_head_run(algorithm: str, seed: int, nll: float) -> dict[str, object]:
    """By time; by gradients, measured earlier, all are ten nats worse."""
    curve = [
        {"seconds": 10.0 * step, "gradients": 100 * step, "evidence_nll": nll + 50 / step}
        for step in (1, 2, 3)
    ]
    spent = {
        budget: {
            "seconds": 30.0,
            "gradients": 300,
            "evidence_nll": nll + worse,
            "training_evidence_nll": nll,
            "reconstruction_cross_entropy": nll / 2,
            "reconstruction_mse": 0.01,
        }
        for budget, worse in (("seconds", 0.0), ("gradients", 10.0))
    }
    return {"algorithm": algorithm, "seed": seed, "curve": curve, "spent": spent}


def test_the_algorithms_beside_the_exact_posterior(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for seed, (ours, theirs) in enumerate([(100.0, 110.0), (102.0, 116.0)]):
        for name, nll in (("dcpc", ours), ("pgd", theirs)):
            content = json.dumps(head_to_head_run(name, seed, nll))
            (runs / f"{name}-seed{seed}.json").write_text(content)

    populations, count = 300, 16
    shown = execute(
        "algorithms",
        NUM_POPULATIONS=populations,
        NUM_PARTICLES=count,
        NUM_SWEEPS=300,
        STEP_SIZE=0.03,
        RESULTS=str(runs),
    )

    chain = gaussian_chain()
    (v1, c), (_, v2) = chain.covariance.tolist()
    exact = np.array([*chain.mean.tolist(), v1, v2, c, float(chain.log_evidence)])
    assert np.allclose(shown.row("exact"), exact, atol=6e-4)  # three digits are printed
    # Gaussian standard errors of moments, as if a quarter of the particles were independent; a
    # copy's log evidence spreads by less than .4.
    effective = populations * count / 4
    tolerance = 4 * np.array([v1, v2, 2 * v1**2, 2 * v2**2, v1 * v2 + c**2]) ** 0.5
    tolerance = np.append(tolerance / math.sqrt(effective), 4 * 0.4 / math.sqrt(populations))
    for name in ("dcpc", "dcpc-smc"):
        assert (abs(np.array(shown.row(name)) - exact) < tolerance).all(), name
    assert shown.row("dcpc-paper")[2] < 0.7 * v1  # an independent implementation: .2
    for name in ("pc", "ipc"):
        assert np.allclose(shown.row(name)[:5], [*exact[:2], 0, 0, 0], atol=5e-3), name
    assert all(math.isnan(shown.row(name)[-1]) for name in ("dcpc-paper", "pgd", "mcpc"))

    # Mean and standard error over the seeds, the better one first.
    rows = [line for line in shown.tables.splitlines() if line.startswith("| `")]
    assert [[cell.strip() for cell in row.split("|")[1:4]] for row in rows] == [
        ["`dcpc`", "2", "101.00 ± 1.00"],
        ["`pgd`", "2", "113.00 ± 3.00"],
        ["`dcpc`", "2", "111.00 ± 1.00"],
        ["`pgd`", "2", "123.00 ± 3.00"],
    ]
    assert shown.tables.index("Equal seconds") < shown.tables.index("Equal gradients")
    assert "no runs" not in shown.text
    assert len(shown.figures) == 3  # densities, and the curves of both budgets


@pytest.mark.slow
def test_without_runs_the_head_to_head_is_one_line(execute: Callable[..., Executed]) -> None:
    shown = execute(
        "algorithms", NUM_POPULATIONS=2, NUM_PARTICLES=2, NUM_SWEEPS=2, RESULTS="nowhere"
    )
    assert "no runs in nowhere yet" in shown.text
    assert not shown.tables.strip()
    assert len(shown.figures) == 1


# -- networks --------------------------------------------------------------------------------


def test_networks_learn_and_compare_with_backpropagation(execute: Callable[..., Executed]) -> None:
    shown = execute("networks", NUM_EPOCHS=2)
    assert "values:  input.value, layers.1.value, layers.3.value, layers.5.value" in shown.text
    assert "weights: layers.0.0.weight, layers.0.0.bias, layers.2.0.weight" in shown.text
    assert shown.number("held-out accuracy") < 80 < shown.number("before training,")
    three = r"^(\S.*?) +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+)$"
    found = re.findall(three, shown.text, flags=re.MULTILINE)
    rows = {name: [float(cosine) for cosine in cosines] for name, *cosines in found}
    assert len(rows) == 8
    # Those that equal it, and the last layer of what leaves that layer's input as it was.
    for name in ("exact", "Z-IL", "backpropagation"):
        assert rows[name] == [1.0, 1.0, 1.0], name
    assert rows["fixed_prediction"][2] == 1.0
    assert min(min(row) for row in rows.values()) > 0.5
    trained = dict(re.findall(r"^(\S.*?) +(\d+\.\d) +\d+\.\d$", shown.text, flags=re.MULTILINE))
    assert all(float(trained[name]) > 90.0 for name in rows), trained
    assert len(shown.figures) == 5


# -- checkpoints whose decoders ignore the latents ----------------------------------------------


def freeze(
    model: nn.Module,
    sizes: dict[str, int],
    path: Path,
    originals: torch.Tensor | None = None,
    num_data: int = 0,
) -> None:
    """Saves a model with random particles of known weights; data have the classes 0, 1, 0, ..."""
    num_data = num_data if originals is None else len(originals)
    shape = (len(PARTICLE_WEIGHTS), num_data)
    FrozenParticles(
        model=model,
        latents={name: torch.randn(*shape, size) for name, size in sizes.items()},
        log_weight=torch.tensor(PARTICLE_WEIGHTS).log().unsqueeze(1).expand(shape),
        index=torch.arange(num_data),
        originals=originals,
        labels=torch.arange(num_data) % 2,
    ).save(path)


def flat_digits(path: Path, logit: float) -> None:
    model = DeepLatentGaussian([10, 32], [1, 8, 8])
    nn.init.zeros_(model.layers[-1].weight)
    nn.init.constant_(model.layers[-1].bias, logit)
    freeze(model, {"z1": 10, "z2": 32}, path, num_data=5)


def continuous_bernoulli_nll(x: np.ndarray, logit: float) -> np.ndarray:
    """`-sum_i log C e^{logit x_i}`, with `C = logit / (e^logit - 1)`."""
    return -(logit * x + math.log(logit / math.expm1(logit))).sum(1)


def test_digits_of_a_checkpoint_have_the_evidence_written_down(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    flat_digits(tmp_path / "digits.pt", logit=-1.5)
    shown = execute(
        "digits",
        CHECKPOINT=str(tmp_path / "digits.pt"),
        NUM_EVALUATED=20,
        NUM_PARTICLES=4,
        NUM_TEMPERATURES=2,
        STUDY_TEMPERATURES=(1, 2),
        STUDY_PARTICLES=(2, 4),
    )
    assert "digits.pt: 3 particles of each of 5 digits" in shown.text
    data = DigitsData()
    data.setup("test")
    x = data.held_out_set.data[:20].flatten(1).double().numpy()
    nll = continuous_bernoulli_nll(x, logit=-1.5)
    error = nll.std(ddof=1) / math.sqrt(20)
    assert f"{nll.mean():.2f} ± {error:.2f}" in shown.text
    # No latent matters, so that no setting changes anything.
    rows = [line for line in shown.tables.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 4
    shown_nll = f"{nll.mean():.2f} ± {error:.2f}"
    assert all(shown_nll in [cell.strip() for cell in row.split("|")] for row in rows)
    assert sum(row.count("0.00 ± 0.00") for row in rows) == 4
    # sum over the mass of x e^{logit x}, normalised: the mean of the density.
    mean = 1 / (1 - math.exp(1.5)) + 1 / 1.5
    assert shown.number("reconstruction MSE") == pytest.approx(((x - mean) ** 2).mean(), abs=6e-5)
    assert shown.figures_showing([mean] * 3) == 2
    assert len(shown.figures) == 3


@pytest.mark.slow
def test_digits_are_trained_where_there_is_no_checkpoint(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    shown = execute(
        "digits",
        CHECKPOINT="nowhere.pt",
        RUN_FOLDER=str(tmp_path / "run"),
        NUM_EPOCHS=1,
        NUM_EVALUATED=10,
        NUM_PARTICLES=2,
        NUM_TEMPERATURES=2,
        STUDY_TEMPERATURES=(1,),
        STUDY_PARTICLES=(2,),
    )
    # scikit-learn has 1797 digits, of which 297 are held out; four particles by the config.
    assert "last.ckpt: 4 particles of each of 1500 digits" in shown.text
    assert "10 held-out data, 2 particles annealed over 2 temperatures" in shown.text


def pictures(count: int, shape: tuple[int, int, int], levels: tuple[int, int]) -> np.ndarray:
    """Bytes `(count, *shape)`: of either level, in the shares of `UPPER` and `LOWER`, per channel.

    So every picture has the same cross-entropy, squared error and distance from a flat one.
    """
    channels, height, width = shape
    generator = np.random.default_rng(0)
    size = height * width // 2
    images = np.empty((count, channels, 2, size), dtype=np.uint8)
    for half, (low, high) in enumerate((UPPER, LOWER)):
        row = np.repeat(np.array(levels, dtype=np.uint8), [int(low * size), int(high * size)])
        rows = generator.permuted(np.tile(row, (count * channels, 1)), axis=1)
        images[:, :, half] = rows.reshape(count, channels, size)
    return images.reshape(count, *shape)


def save_pictures(folder: Path, images: np.ndarray) -> None:
    """As files, in a folder for each of two classes."""
    for number, image in enumerate(images):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = image.shape[0] == 1
        Image.fromarray(image[0] if grey else image.transpose(1, 2, 0)).save(path)


def mnist_constants(tmp_path: Path, pixel: float, images: np.ndarray) -> dict[str, object]:
    """A tiny checkpoint whose every pixel has one probability, and constants to match."""
    originals = torch.from_numpy(images) / 255
    settings = {"latent_sizes": [3, 4], "image_shape": [1, 8, 8], "likelihood": "bernoulli"}
    model = DeepLatentGaussian(**settings)
    nn.init.zeros_(model.layers[-1].weight)
    nn.init.constant_(model.layers[-1].bias, math.log(pixel / (1 - pixel)))
    freeze(model, {"z1": 3, "z2": 4}, tmp_path / "mnist.pt", originals)
    return {
        "CHECKPOINT": str(tmp_path / "mnist.pt"),
        "MODEL": settings,
    }


def test_mnist_shows_the_checkpoint(execute: Callable[..., Executed], tmp_path: Path) -> None:
    images = pictures(NUM_PICTURES, (1, 8, 8), levels=(0, 255))
    save_pictures(tmp_path / "pictures", images[:20])
    constants = mnist_constants(tmp_path, pixel=0.7, images=images[20:])
    shown = execute("mnist", **constants, DATA_PATH=str(tmp_path / "pictures"))
    assert "3 particles of each of 20 images" in shown.text
    assert shown.number("mean ESS") == pytest.approx(ESS_PERCENT, abs=0.06)
    _, _, mse = costs_of_a_flat_image(0.7)
    assert shown.number("reconstructions:") == pytest.approx(mse, abs=6e-5)
    # Pixels depend on no latent.
    assert shown.number("top latent drawn anew: pixels change by") == 0
    assert shown.number("noise below it drawn anew: pixels change by") == 0
    assert shown.number("mean distance") == pytest.approx(math.sqrt(64 * mse), abs=6e-3)
    assert len(shown.figures) == 8
    assert shown.figures_showing([0.7] * 3) == 8


def test_mnist_metrics_are_those_of_a_checkpoint_that_ignores_its_latents(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    images = pictures(20, (1, 8, 8), levels=(0, 255))
    shown = execute(
        "mnist_metrics",
        **mnist_constants(tmp_path, pixel=0.7, images=images),
        NUM_EVALUATED=3,
        NUM_PARTICLES=2,
        NUM_TEMPERATURES=2,
    )
    upper, lower, mse = costs_of_a_flat_image(0.7)
    assert "3 held-out data, 2 particles annealed over 2 temperatures" in shown.text
    assert f"{upper + lower:.2f} ± 0.00" in shown.text
    nll = shown.number("reconstruction cross-entropy")
    assert nll == pytest.approx(upper + lower, abs=6e-3)
    assert shown.number("reconstruction MSE") == pytest.approx(mse, abs=6e-5)
    assert shown.number("\n  ESS %") == 100  # where no latent matters, particles count alike
    assert shown.number("cross-entropy of the upper half") == pytest.approx(upper, abs=6e-3)
    squares = np.dot(UPPER, [0.7**2, 0.3**2])
    assert shown.number("MSE of the upper half") == pytest.approx(squares, abs=6e-5)
    hidden = images[:, :, :4] / 255
    away = np.square(hidden[:3] - hidden.mean(0)).mean()
    assert shown.number("MSE of the average image") == pytest.approx(away, abs=6e-5)
    assert len(shown.figures) == 2
    assert shown.figures_showing([0.7] * 3) == 1


def costs_of_a_flat_image(pixel: float) -> tuple[float, float, float]:
    """Nats of the upper and the lower half of every picture, and its MSE, all pixels being equal.

    A pixel is white with that probability; of 32 in a half, the share of `UPPER` or `LOWER` is.
    """
    nats, errors = -np.log([1 - pixel, pixel]), np.array([pixel, 1 - pixel]) ** 2
    mse = (np.dot(UPPER, errors) + np.dot(LOWER, errors)) / 2
    return 32 * np.dot(UPPER, nats), 32 * np.dot(LOWER, nats), mse


def colour_constants(
    tmp_path: Path, colour: tuple[float, ...], scale: float, images: np.ndarray
) -> dict[str, object]:
    """A tiny generator of one colour, and constants to match."""
    originals = torch.from_numpy(images) / 127.5 - 1
    settings = {
        "latent_size": 3,
        "image_shape": [3, 16, 16],
        "likelihood": "discretized_normal",
    }
    model = ConvolutionalGenerator(**settings)
    last = model.network[-2]
    nn.init.zeros_(last.weight)
    last.bias.data = torch.atanh(torch.tensor(colour))
    model.scale.raw.data = torch.tensor(math.log(scale - model.scale.floor))
    freeze(model, {"z": 3}, tmp_path / "cifar10.pt", originals)
    return {
        "CHECKPOINT": str(tmp_path / "cifar10.pt"),
        "MODEL": settings,
        "DATA_PATH": str(tmp_path / "pictures"),
        "NUM_EVALUATED": 3,
        "NUM_PARTICLES": 2,
        "NUM_TEMPERATURES": 2,
        "NUM_COMPONENTS": 2,
    }


def test_colour_shows_the_generators_colour_and_its_metrics(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    colour, scale, levels = (0.5, -0.5, 0.0), 0.1, (64, 192)
    images = pictures(NUM_PICTURES, (3, 16, 16), levels)
    save_pictures(tmp_path / "pictures", images[:20])
    shown = execute("colour", **colour_constants(tmp_path, colour, scale, images[20:]))
    assert shown.number("scale of the pixels:") == pytest.approx(scale, abs=6e-4)
    # A bin of levels is 2 / 255 wide; all are so far inside the range that a Normal of this scale
    # has no mass at its ends.
    centres = 2 * np.array(levels) / 255 - 1
    upper, mse, nats = 0.0, 0.0, 0.0
    for loc in colour:
        away = abs(centres - loc)  # from the side where the tail has digits
        inner, outer = (norm.logsf(away + side / 255, scale=scale) for side in (-1, 1))
        bins = -(inner + np.log1p(-np.exp(outer - inner)))
        nats += 128 * (np.dot(UPPER, bins) + np.dot(LOWER, bins))
        squares = (away / 2) ** 2 / 3  # in intensities from 0 to 1; a third of the channels
        upper += np.dot(UPPER, squares)
        mse += (np.dot(UPPER, squares) + np.dot(LOWER, squares)) / 2
    assert "3 held-out data, 2 particles annealed over 2 temperatures" in shown.text
    assert shown.number("evidence NLL") == pytest.approx(nats, rel=1e-5)
    assert shown.number("reconstruction MSE") == pytest.approx(mse, abs=6e-5)
    assert shown.number("MSE of the upper half") == pytest.approx(upper, abs=6e-5)
    # All samples are one picture, whatever its latent comes from.
    (prior,), (pseudo,) = shown.row("prior")[:1], shown.row("pseudo-posterior")[:1]
    assert prior == pseudo > 0
    assert shown.row("training images")[0] >= 0
    assert "distances of 10 originals" in shown.text
    assert len(shown.figures) == 6
    assert shown.figures_showing([(c + 1) / 2 for c in colour]) == 6


def test_sequences_show_positions_beside_the_truth_and_recall(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    shape, count = {"patch_shape": [1, 8, 8], "frames_shape": [3, 1, 16, 16]}, 6
    flat = BouncingDigit(latent_size=2, **shape)
    nn.init.zeros_(flat.patch[2].weight)
    nn.init.zeros_(flat.patch[2].bias)  # every pixel of the patch is one half
    data = BouncingDigits(DigitsData(num_held_out=100), 3, 16)
    data.setup("test")
    x, _, index = data.held_out_set.first(count)
    place = torch.tensor([2.0, 5.0])  # whole pixels, where all particles stay
    FrozenParticles(
        model=flat,
        latents={
            "z": torch.randn(2, count, 2),
            "start": place.expand(2, count, 2),
            "velocity": torch.zeros(2, count, 2),
            "jitter": torch.zeros(2, count, 2, 2),
        },
        log_weight=torch.zeros(2, count),
        index=index,
        originals=x,
    ).save(tmp_path / "bouncing.pt")
    blank = SequenceMemory(state_size=2, frames_shape=[3, 1, 8, 8], cue_size=2)
    nn.init.zeros_(blank.emission.weight)
    nn.init.constant_(blank.emission.bias, 0.25)
    stored = torch.rand(4, 3, 1, 8, 8)
    sizes = {f"z_{t}": 2 for t in range(3)}
    freeze(blank, sizes, tmp_path / "memory.pt", stored)
    shown = execute(
        "sequences",
        BOUNCING=str(tmp_path / "bouncing.pt"),
        MEMORY=str(tmp_path / "memory.pt"),
        CURVES="nowhere.json",
        BOUNCING_MODEL={"latent_size": 2, **shape},
        MEMORY_MODEL={"state_size": 2, "frames_shape": [3, 1, 8, 8], "cue_size": 2},
        NUM_SHOWN=2,
        NUM_PARTICLES=2,
        NUM_TEMPERATURES=2,
    )
    assert "bouncing.pt: 2 particles of each of 6 sequences" in shown.text
    distance = (data.held_out_set.position[:count] - place).square().sum(-1)
    assert shown.number("position RMSE:") == pytest.approx(float(distance.mean().sqrt()), abs=6e-4)
    near = float((distance.mean(1).sqrt() < 0.5).double().mean())
    assert shown.number("within half a pixel:") == pytest.approx(near, abs=6e-3)
    mean = torch.zeros(16, 16)
    mean[2:10, 5:13] = 0.5
    expected = float((x - mean).square().mean())
    assert shown.number("reconstruction MSE:") == pytest.approx(expected, abs=6e-5)
    repeated = float((x[:2, 2] - x[:2, 1]).square().mean())
    assert shown.number("repeated frame MSE:") == pytest.approx(repeated, abs=6e-5)
    recall = float((stored[:, 1:] - 0.25).square().mean())
    assert shown.number("recall MSE:") == pytest.approx(recall, abs=6e-5)
    assert "no curves in nowhere.json yet" in shown.text
    assert len(shown.figures) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "colour"])
def test_without_the_data_set_only_the_training_images_are_missing(
    execute: Callable[..., Executed], tmp_path: Path, name: str
) -> None:
    if name == "mnist":
        images = pictures(20, (1, 8, 8), levels=(0, 255))
        constants, figures = mnist_constants(tmp_path, pixel=0.7, images=images), 7
        constants["DATA_PATH"] = "nowhere"
    else:
        images = pictures(20, (3, 16, 16), levels=(64, 192))
        constants, figures = colour_constants(tmp_path, (0.5, -0.5, 0.0), 0.1, images), 5
    shown = execute(name, **constants)  # there is no folder of pictures
    assert "no training images" in shown.text
    assert len(shown.figures) == figures


# -- labels ----------------------------------------------------------------------------------


def test_labels_that_the_image_tells_nothing_of_have_the_probabilities_written_down(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    embedding, style = LabelledEmbedding(32, [1, 8, 8]), LabelledStyle(12, [1, 8, 8])
    logits = torch.linspace(0.0, 1.8, 10)
    for layer, bias in ((embedding.classes[-1], logits), (style.pixels, torch.tensor(40.0))):
        nn.init.zeros_(layer.weight)
        with torch.no_grad():
            layer.bias.copy_(bias)
    freeze(embedding, {"z": 32}, tmp_path / "embedding.pt", num_data=3)
    freeze(style, {"style": 12}, tmp_path / "style.pt", num_data=3)
    shown = execute(
        "labels",
        EMBEDDING=str(tmp_path / "embedding.pt"),
        STYLE=str(tmp_path / "style.pt"),
        NUM_PARTICLES=4,
        NUM_TEMPERATURES=2,
        CLASSIFIER_EPOCHS=20,
        AUTOENCODER_EPOCHS=1,
        NUM_STYLES=40,
    )
    data = DigitsData()
    data.setup("test")
    labels = data.held_out_set.labels
    wrong, confidence = (labels != 9).double().mean(), logits.softmax(0)[9]
    expected = (
        f"{100 * wrong:.2f}",
        f"{abs(1 - wrong - confidence):.3f}",
        f"{-logits.log_softmax(0)[labels].mean():.3f}",
    )
    rows = {
        cells[1]: tuple(cells[2:5])
        for line in shown.tables.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) == 6
    }
    assert rows["posterior of the label"] == expected
    assert float(rows["classifier"][0]) < 30  # of 90 by chance
    # The density of a pixel rises as e^{40 x}: its mean is 1 - 1 / 40.
    assert shown.figures_showing([1 - 1 / 40] * 3) == 1
    assert len(shown.figures) == 3


# -- the transformer -------------------------------------------------------------------------


def test_a_transformer_that_ignores_its_latents_has_the_bits_of_its_bias(
    execute: Callable[..., Executed], tmp_path: Path
) -> None:
    model = LatentTransformer(num_symbols=8, length=64)
    share = torch.arange(1.0, 9.0) / 36
    nn.init.zeros_(model.head.weight)
    model.head.bias.data.copy_(share.log())
    path = tmp_path / "transformer.pt"
    FrozenParticles(
        model=model,
        latents={f"z{number}": torch.zeros(1, 2, 64, 32) for number in (1, 2, 3, 4)},
        log_weight=torch.zeros(1, 2),
        index=torch.arange(2),
        originals=torch.zeros(2, 1, 8, 8, dtype=torch.long),
        labels=torch.zeros(2, dtype=torch.long),
    ).save(path)
    shown = execute(
        "transformer",
        CHECKPOINT=str(path),
        NUM_EVALUATED=9,
        NUM_SAMPLES=2,
        NUM_GENERATED=2,
        SCALE_RATIOS=(0.5,),
    )
    data = PixelSequences(DigitsData(), num_levels=8)
    data.setup("test")
    x = data.held_out_set.first(9)[0]
    expected = -float(share[x].log2().mean())
    assert shown.number("forward pass") == pytest.approx(expected, abs=6e-4)
    assert shown.number("prior samples") == pytest.approx(expected, abs=6e-4)
    assert shown.number("uniform") == 3.0
    # Nothing moves a latent that nothing depends on, so that only the head learns, as it should.
    assert shown.number("ratio 0.50 relative error") == pytest.approx(0.0, abs=1e-4)
    assert len(shown.figures) == 3
