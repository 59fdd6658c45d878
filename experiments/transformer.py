"""A transformer trained by local gradients against the same transformer by backpropagation.

    python -m experiments.transformer [--seconds 20] [--seeds 3] [--only ...] [--folder ...]

Every contender is `configs/transformer.json` with a few keys changed: the same network, data,
batches, optimiser and learning-rate schedule, and the same CPU time. Between the blocks of all but
`backpropagation` are Gaussian latents, and a block learns by the gradient of its own factor at
particles that are constants. Measured on held-out sequences, in bits per symbol:

- forward pass: the network without noise, every latent at its mean; backpropagation's own loss.
- prior samples: `- log mean_k p(x | z_k)` by some samples of the latents, more than the evidence
  NLL in expectation.

CPU time is that of training steps; measuring and the capture of the model, some seconds once, are
left out. What has been trained is in `--folder`, and is not trained again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from dcpc.evaluation import ImportanceSampler
from dcpc.models import LatentTransformer
from dcpc.observed import main_tensor
from dcpc.seeding import seeded
from dcpc.tables import table
from dcpc.training import ParticleModule
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.data import PixelSequences

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "transformer.json"
NUM_POINTS = 10
"""Points of a learning curve."""

BACKPROPAGATION = "backpropagation"
SAME_STEPS = "backpropagation, as many steps"
FULL = "4 latents"
CONTENDERS = {
    BACKPROPAGATION: ["--model.model.latent_after=[]"],
    SAME_STEPS: ["--model.model.latent_after=[]"],
    "1 latent": ["--model.model.latent_after=[4]"],
    "2 latents": ["--model.model.latent_after=[2,4]"],
    "3 latents": ["--model.model.latent_after=[1,2,4]"],
    FULL: [],
    "4 latents, equal scales": ["--model.model.scale_ratio=1.0"],
    "4 latents, mcpc": [
        "--model.model.scale_ratio=1.0",
        "--model.algorithm=mcpc",
        "--model.step_size=0.5",
    ],
    "4 latents, dcpc": [
        "--model.model.scale_ratio=1.0",
        "--model.algorithm=dcpc",
        "--model.schedule=null",
        "--model.num_particles=2",
        "--model.step_size=null",
        "--model.start.afresh=prior",
    ],
}
"""By contender, what it changes in the config; `SAME_STEPS` takes as many as `FULL` does."""


@dataclass(frozen=True)
class Trained:
    """A contender after training.

    Attributes:
        name: Its name.
        seed: Of its weights and batches.
        steps: Steps of the parameters.
        seconds: CPU seconds of these.
        curve: By point of the learning curve, steps, CPU seconds and the forward pass's bits.
        forward_pass: Bits per symbol at the end.
        prior_samples: Likewise, of the evidence's estimate; the forward pass's without latents.
    """

    name: str
    seed: int
    steps: int
    seconds: float
    curve: list[tuple[int, float, float]]
    forward_pass: float
    prior_samples: float


def train(
    name: str, seed: int, seconds: float, num_steps: int | None = None, options: Sequence[str] = ()
) -> Trained:
    """Trains a contender for some CPU seconds, or for some steps if their number is given."""
    changes = [*CONTENDERS[name], *options, f"--seed_everything={seed}"]
    built = ConfiguredCLI(["fit", f"--config={CONFIG}", *changes])
    module, data = built.model, built.datamodule
    assert isinstance(module, ParticleModule)
    assert isinstance(module.model, LatentTransformer)
    data.setup("fit")
    held_out = main_tensor(data.held_out_set.first(len(data.held_out_set))[0])
    loader, optimizer = data.train_dataloader(), module.configure_optimizers()
    learn = losses(module)
    learn(main_tensor(data.training_set.first(data.batch_size)[0]))  # the model is captured
    curve, used, steps, epoch = [(0, 0.0, forward_pass(module.model, held_out))], 0.0, 0, 0

    def done() -> float:
        return used / seconds if num_steps is None else steps / num_steps

    while done() < 1.0:
        loader.batch_sampler.set_epoch(epoch)
        epoch += 1
        for x, _, _ in loader:
            start = time.process_time()
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * module.learning_rate * (1.0 + math.cos(math.pi * done()))
            optimizer.zero_grad()
            learn(x).backward()
            optimizer.step()
            used, steps = used + time.process_time() - start, steps + 1
            if done() >= min(len(curve) / NUM_POINTS, 1.0):
                curve.append((steps, used, forward_pass(module.model, held_out)))
            if done() >= 1.0:
                break
    final = curve[-1][2]
    sampled = prior_samples(module.model, held_out, module.held_out.prior_samples)
    return Trained(name, seed, steps, used, curve, final, final if sampled is None else sampled)


def losses(module: ParticleModule) -> Callable[[Tensor], Tensor]:
    """The loss of a batch per symbol: cross-entropy without latents, else after the sweeps."""
    model, inference = module.model, module.inference
    assert isinstance(model, LatentTransformer)
    if not model.latent_after:
        return lambda x: F.cross_entropy(model.network(x).flatten(0, 1), x.flatten())
    adaptation: dict = {}

    def loss(x: Tensor) -> Tensor:
        problem = inference.bind(x)
        at_means = module.start.afresh == "means"
        state = problem.init_at_means() if at_means else problem.init()
        state = replace(state, adaptation=dict(adaptation))
        for _ in range(module.sweeps_per_step):
            state, _ = problem.sweep(state, learns=True)
        adaptation.update(state.adaptation)
        return problem.loss(state) / x.numel()

    return loss


def forward_pass(model: LatentTransformer, x: Tensor) -> float:
    """Bits per symbol of the network without noise."""
    with torch.no_grad():
        nats = F.cross_entropy(model.network(x).flatten(0, 1), x.flatten())
    return float(nats) / math.log(2.0)


def prior_samples(model: LatentTransformer, x: Tensor, num_samples: int) -> float | None:
    """Bits per symbol by samples of the latents; None where there are no latents."""
    if not model.latent_after:
        return None
    # What is captured, once, is small: one sample of each datum of parts of equal size.
    sampler = ImportanceSampler(model, chunk_size=1, batch_size=-(-len(x) // 3))
    bound = sampler.bounds(x, num_samples, seed=0).importance_weighted
    return -float(bound.mean()) / (model.length * math.log(2.0))


def baselines(data: PixelSequences) -> dict[str, float]:
    """Bits per held-out symbol of models without a context, fitted to the training set."""
    data.setup("fit")
    sets = (data.training_set, data.held_out_set)
    training, held_out = (main_tensor(part.first(len(part))[0]).flatten(1) for part in sets)
    symbols = F.one_hot(training, data.num_levels).double()
    everywhere, by_place = symbols.sum((0, 1)) + 1, symbols.sum(0) + 1  # (S,), (T, S)

    def bits(count: Tensor) -> float:
        told = -(count / count.sum(-1, keepdim=True)).log2().expand(held_out.shape[1], -1)
        return float(told[torch.arange(held_out.shape[1]), held_out].mean())

    return {
        "uniform": math.log2(data.num_levels),
        "frequencies": bits(everywhere),
        "frequencies by place": bits(by_place),
    }


def draw(results: Sequence[Trained]) -> Figure:
    """Learning curves by CPU time and by steps, a line per seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(result.name for result in results))
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), (1, 0), ("CPU seconds", "steps"), strict=True
    ):
        for result in results:
            place = names.index(result.name)
            points = list(zip(*result.curve[1:], strict=True))
            first = result.seed == min(r.seed for r in results if r.name == result.name)
            axes.plot(
                points[column],
                points[2],
                color=f"C{place}",
                linewidth=1,
                label=result.name if first else None,
            )
        axes.set(xlabel=label, xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out bits per symbol, forward pass")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return figure


def report(results: Sequence[Trained], told: dict[str, float]) -> str:
    """A table of means and ranges over the seeds."""
    rows = [(name, "", "", f"{bits:.3f}", "") for name, bits in told.items()]
    for name in CONTENDERS:
        mine = [result for result in results if result.name == name]
        if mine:
            steps = sum(result.steps for result in mine) / len(mine)
            seconds = sum(result.seconds for result in mine) / len(mine)
            shown = [_spread([getattr(r, kind) for r in mine]) for kind in KINDS]
            rows.append((f"{name} ({len(mine)} seeds)", f"{seconds:.0f}", f"{steps:.0f}", *shown))
    header = ("", "CPU s", "steps", "forward pass", "prior samples")
    return table(header, rows, "github")


KINDS = ("forward_pass", "prior_samples")


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of training steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="all by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/transformer-study"))
    parser.add_argument("options", nargs="*", help="further options of dcpc fit, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing; writes a table and learning curves."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    given = [*options.options, f"--trainer.default_root_dir={options.folder}"]
    names = options.only or list(CONTENDERS)
    if SAME_STEPS in names:  # after the one whose steps it takes
        names = [*(name for name in names if name != SAME_STEPS), SAME_STEPS]
    for seed in options.seeds:
        for name in names:
            path = _path(options.folder, name, seed)
            if path.is_file():
                continue
            num_steps = None
            if name == SAME_STEPS:
                num_steps = _read(_path(options.folder, FULL, seed)).steps
            with seeded(seed):
                result = train(name, seed, options.seconds, num_steps, given)
            path.write_text(json.dumps(asdict(result)))
            print(f"{name}, seed {seed}: {result.forward_pass:.3f}", flush=True)
    paths = [_path(options.folder, name, seed) for name in CONTENDERS for seed in options.seeds]
    results = [_read(path) for path in paths if path.is_file()]
    told = baselines(ConfiguredCLI(["fit", f"--config={CONFIG}", *given]).datamodule)
    (options.folder / "transformer.md").write_text(report(results, told) + "\n")
    draw(results).savefig(options.folder / "transformer.png", dpi=120)
    print(report(results, told))


def _path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def _read(path: Path) -> Trained:
    return Trained(**json.loads(path.read_text()))


if __name__ == "__main__":
    main()
