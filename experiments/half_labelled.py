"""Few labels: the posterior of the label against a classifier and a semi-supervised autoencoder.

    python -m experiments.half_labelled [--path <folder of MNIST>] [--num-labelled 300] [--seeds 3]

Without `--path`, scikit-learn's digits and `configs/digits-semi.json`; else the images of a folder
and `configs/mnist-semi.json`. All see the same labels, and are measured on the same held-out
images, none of whose labels they see:

- `dcpc`: the config, trained by `dcpc fit`; posterior probabilities by annealing.
- classifier: a network with one hidden layer, trained on the labelled images alone, by AdamW.
- autoencoder: the model M2 of Kingma, Rezende, Mohamed & Welling (2014), "Semi-supervised learning
  with deep generative models": `q(label | x)` predicts, labels that are not seen are summed out.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcpc.distributions import Bernoulli, ContinuousBernoulli
from dcpc.evaluation import Calibration, calibration
from dcpc.seeding import seeded
from dcpc.tables import table
from dcpc.training import GenerativeModule
from dcpc.training.cli import ConfiguredCLI
from dcpc.training.command import main as dcpc
from dcpc.training.data import HalfLabelledData

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_CLASSES = 10


class Autoencoder(nn.Module):
    """M2: an image from a label and a style, with an encoder for both.

    Args:
        num_pixels: Pixels of an image.
        hidden_size: Width of all hidden layers.
        style_size: Size of the style.
        likelihood: `bernoulli` or `continuous_bernoulli`.
    """

    def __init__(self, num_pixels: int, hidden_size: int, style_size: int, likelihood: str) -> None:
        super().__init__()
        self.style_size = style_size
        self.likelihood = likelihood
        self.label = network(num_pixels, hidden_size, NUM_CLASSES)
        self.style = network(num_pixels + NUM_CLASSES, hidden_size, 2 * style_size)
        self.pixels = network(style_size + NUM_CLASSES, hidden_size, num_pixels)

    def bound(self, x: Tensor, label: Tensor) -> Tensor:
        """Evidence lower bound of images with their labels `(B,)`, by one draw of the style."""
        known = F.one_hot(label, NUM_CLASSES).to(x)
        loc, raw = self.style(torch.cat([x, known], -1)).chunk(2, -1)
        posterior = torch.distributions.Normal(loc, F.softplus(raw) + 1e-4)
        style = posterior.rsample()
        logits = self.pixels(torch.cat([style, known], -1))
        pixels = (
            Bernoulli(logits=logits, validate_args=False)
            if self.likelihood == "bernoulli"
            else ContinuousBernoulli(logits)
        )
        prior = torch.distributions.Normal(0.0, 1.0)
        divergence = torch.distributions.kl_divergence(posterior, prior.expand(loc.shape)).sum(-1)
        return pixels.log_prob(x).sum(-1) - divergence - torch.tensor(NUM_CLASSES).log()

    def loss(self, x: Tensor, label: Tensor, seen: Tensor, weight: float) -> Tensor:
        """Minus the bound per image, and the classifier's cross-entropy of seen labels."""
        log_share = self.label(x).log_softmax(-1)
        every = torch.stack(
            [self.bound(x[~seen], torch.full_like(label[~seen], c)) for c in range(NUM_CLASSES)], -1
        )
        share = log_share[~seen].exp()
        total = (share * (every - log_share[~seen])).sum()
        if bool(seen.any()):
            total = total + self.bound(x[seen], label[seen]).sum()
            total = total - weight * F.nll_loss(log_share[seen], label[seen], reduction="sum")
        return -total / len(x)


def network(num_inputs: int, hidden_size: int, num_outputs: int) -> nn.Sequential:
    """One hidden layer of rectified units."""
    return nn.Sequential(
        nn.Linear(num_inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_outputs)
    )


def train_classifier(data: HalfLabelledData, hidden_size: int, num_epochs: int) -> nn.Module:
    """A network trained on the labelled images alone."""
    assert data.training_set is not None
    observed, _, _ = data.training_set.first(len(data.training_set))
    x, label = observed["x"][observed["seen"]].flatten(1), observed["label"][observed["seen"]]
    classifier = network(x.shape[1], hidden_size, NUM_CLASSES)
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(classifier(x[rows]), label[rows]).backward()
            optimizer.step()
    return classifier


def train_autoencoder(
    data: HalfLabelledData, hidden_size: int, style_size: int, likelihood: str, num_epochs: int
) -> nn.Module:
    """The encoder of the label of an autoencoder trained on all images."""
    loader = data.train_dataloader()
    num_pixels = int(data.training_set.first(1)[0]["x"][0].numel())
    model = Autoencoder(num_pixels, hidden_size, style_size, likelihood)
    weight = 0.1 * len(data.training_set) / data.num_labelled
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(num_epochs):
        loader.batch_sampler.set_epoch(epoch)
        for observed, _, _ in loader:
            optimizer.zero_grad()
            x = observed["x"].flatten(1)
            model.loss(x, observed["label"], observed["seen"], weight).backward()
            optimizer.step()
    return model.label


def predicted(classifier: nn.Module, data: HalfLabelledData) -> Calibration:
    """How well a network predicts the held-out labels."""
    assert data.held_out_set is not None
    observed, labels, _ = data.held_out_set.first(len(data.held_out_set))
    with torch.no_grad():
        probabilities = classifier(observed["x"].flatten(1)).softmax(-1)
    return calibration(probabilities, labels)


def by_dcpc(arguments: Sequence[str], seed: int) -> Calibration:
    """How well the posterior of the label predicts, after `dcpc fit`."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*arguments, f"--trainer.default_root_dir={folder}", f"--seed_everything={seed}"]
        dcpc(["fit", *options])
        built = ConfiguredCLI(["test", *options])
        built.trainer.test(built.model, built.datamodule, ckpt_path=f"{folder}/last.ckpt")
        assert isinstance(built.model, GenerativeModule)
        assert built.model.calibration is not None
        return built.model.calibration


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", help="folder of images, as HubImages takes it; digits without")
    parser.add_argument("--num-labelled", type=int, help="labels that are seen; the config's")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the parameters")
    parser.add_argument("--classifier-epochs", type=int, default=300)
    parser.add_argument("--autoencoder-epochs", type=int, help="those of the config by default")
    parser.add_argument("--only", nargs="+", choices=("dcpc", "classifier", "autoencoder"))
    parser.add_argument("options", nargs="*", help="further options of dcpc fit, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of held-out errors."""
    options = parse(arguments)
    config = CONFIGS / ("mnist-semi.json" if options.path else "digits-semi.json")
    shown = json.loads(config.read_text())
    given = [f"--config={config}", *options.options]
    given += [f"--data.images.path={options.path}"] if options.path else []
    if options.num_labelled is not None:
        given.append(f"--data.num_labelled={options.num_labelled}")
    data = ConfiguredCLI(["fit", *given]).datamodule
    assert isinstance(data, HalfLabelledData)
    data.setup("fit")
    model = shown["model"]["model"]["init_args"]
    hidden, likelihood = (
        model.get("hidden_size", 256),
        model.get("likelihood", "continuous_bernoulli"),
    )
    epochs = options.autoencoder_epochs or shown["trainer"]["max_epochs"]
    contenders = {
        "dcpc": lambda seed: by_dcpc(given, seed),
        "classifier": lambda seed: predicted(
            train_classifier(data, hidden, options.classifier_epochs), data
        ),
        "autoencoder": lambda seed: predicted(
            train_autoencoder(data, hidden, model["latent_size"], likelihood, epochs), data
        ),
    }
    rows = []
    for name in options.only or contenders:
        for seed in range(options.seeds):
            start = time.process_time()
            with seeded(seed):
                told = contenders[name](seed)
            rows.append(
                (
                    name,
                    seed,
                    f"{100 * told.error_rate:.2f}",
                    f"{told.expected_error:.3f}",
                    f"{told.log_loss:.3f}",
                    f"{time.process_time() - start:.0f}",
                )
            )
            print(*rows[-1], flush=True)
    header = ("", "seed", "labels wrong, %", "calibration error", "log loss", "CPU s")
    print(table(header, rows, "github"))


if __name__ == "__main__":
    main()
