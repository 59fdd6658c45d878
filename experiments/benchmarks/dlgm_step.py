"""One training step of the engine against the same step by hand, with care, in torch.

    python -m experiments.benchmarks.dlgm_step

The model is the deep latent Gaussian model of MNIST size, 20-128-256-784, of 256 images. A step
reweights the particles to the present parameters, resamples where the ESS is low, moves every
layer by a Metropolis-adjusted Langevin proposal with an adapted diagonal preconditioner, and takes
a gradient step of the parameters. `HandWritten` does that without Pyro, without this package and
without autograd: scales are inverted once, scores are closed formulas, predictions of layers that
do not move are kept, and the gradient of the loss is made of what the moves leave behind. Only the
kernel of the continuous Bernoulli is the package's, so that the ratio measures the engine.

The engine's step is measured recorded, and compiled as long trainings compile it. With a batch of
two images, the time is the fixed cost of a step.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dcpc import DCPC, kernels
from dcpc.conquer import SecondMoment
from dcpc.models import DeepLatentGaussian
from dcpc.training.data import Batch
from dcpc.training.data.pixels import PixelSet
from experiments.benchmarks.timing import describe_machine, interleaved_medians


class Normal:
    """`log N(value; W relu(above) + b, L L^T)`, with all that is kept of it."""

    def __init__(self, layer: torch.nn.Linear, scale: torch.nn.Module) -> None:
        self.layer, self.scale = layer, scale

    def prepare(self) -> None:
        """Inverts the scale, once for a step."""
        self.factor = self.scale()
        identity = torch.eye(len(self.factor))
        self.inverse = torch.linalg.solve_triangular(self.factor, identity, upper=False)
        half_log_two_pi = 0.5 * math.log(2 * math.pi)
        self.norm = self.factor.diagonal().log().sum() + len(self.factor) * half_log_two_pi

    def predict(self, above: Tensor) -> Tensor:
        """The mean, given the layer above."""
        return torch.nn.functional.linear(above.relu(), self.layer.weight, self.layer.bias)

    def evaluate(self, value: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density and whitened error."""
        error = (value - mean) @ self.inverse.T
        return -0.5 * error.square().sum(-1) - self.norm, error

    def by_mean(self, error: Tensor) -> Tensor:
        """Gradient in the mean; in the value it is minus that."""
        return error @ self.inverse

    def learn(self, weight: Tensor, above: Tensor, error: Tensor) -> None:
        """Gradients of minus the weighted log-density in the parameters."""
        push = (weight[..., None] * self.by_mean(error)).flatten(0, 1)
        learn_linear(self.layer, push, above)
        gradient = (push.T @ error.flatten(0, 1)).tril()
        gradient.diagonal().sub_(weight.sum() / self.factor.diagonal())
        gradient.diagonal().mul_(self.factor.diagonal() - self.scale.floor)
        self.scale.raw.grad = -gradient


class HandWritten:
    """One training step, spelt out."""

    def __init__(self, model: DeepLatentGaussian, x: Tensor, num_particles: int) -> None:
        self.model, self.x, self.num_particles = model, x.flatten(1), num_particles
        sizes = model.latent_sizes
        self.is_continuous = model.likelihood == "continuous_bernoulli"
        self.normals = [Normal(*pair) for pair in zip(model.layers[:-1], model.scales, strict=True)]
        self.z = [torch.randn(num_particles, len(x), size) for size in sizes]
        self.log_weight = torch.zeros(num_particles, len(x))
        self.second_moment = [torch.ones(size) for size in sizes]
        self.step_size = [size ** (-1 / 3) for size in sizes]
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        with torch.no_grad():
            self.look()
        self.log_joint = sum(self.density)

    def pixels(self, logits: Tensor) -> Tensor:
        """Log-density of the images."""
        if self.is_continuous:
            return kernels.continuous_bernoulli_log_prob(self.x, logits).sum(-1)
        return (self.x * logits - torch.nn.functional.softplus(logits)).sum(-1)

    def pixel_errors(self, logits: Tensor) -> Tensor:
        """Its gradient in the logits."""
        mean = kernels.continuous_bernoulli_mean if self.is_continuous else torch.sigmoid
        return self.x - mean(logits)

    def look(self) -> None:
        """Evaluates everything at the particles: log-densities, and the errors of each layer."""
        one, two, three = self.z
        first, second = self.normals
        first.prepare()
        second.prepare()
        self.mean = [first.predict(one), second.predict(two)]
        second_density, second_error = first.evaluate(two, self.mean[0])
        third_density, third_error = second.evaluate(three, self.mean[1])
        logits = self.decode(three)
        self.density = [self.prior(one), second_density, third_density, self.pixels(logits)]
        self.error = [second_error, third_error, self.pixel_errors(logits)]

    def prior(self, value: Tensor) -> Tensor:
        """log N(value; 0, I)."""
        return -0.5 * (value.square() + math.log(2 * math.pi)).sum(-1)

    def decode(self, value: Tensor) -> Tensor:
        """Logits of the pixels."""
        layer = self.model.layers[-1]
        return torch.nn.functional.linear(value.relu(), layer.weight, layer.bias)

    def reweight(self) -> None:
        """Weights follow the parameters; whole particles are resampled where the ESS is low."""
        log_joint = sum(self.density)
        self.log_weight = self.log_weight + log_joint - self.log_joint
        self.log_joint = log_joint
        weight = torch.softmax(self.log_weight, 0)
        low = 1 / weight.square().sum(0) < 0.5 * self.num_particles
        if self.num_particles == 1 or not low.any():
            return
        slots = torch.arange(self.num_particles)
        position = (slots + torch.rand(len(self.x), 1)) / self.num_particles
        drawn = torch.searchsorted(weight.cumsum(0).T.contiguous(), position).T
        ancestors = torch.where(low, drawn.clamp(max=self.num_particles - 1), slots[:, None])
        images = torch.arange(len(self.x))
        for kept in (self.z, self.mean, self.density, self.error):
            kept[:] = [value[ancestors, images] for value in kept]
        self.log_joint = self.log_joint[ancestors, images]
        mean = torch.logsumexp(self.log_weight, 0) - math.log(self.num_particles)
        self.log_weight = torch.where(low, mean, self.log_weight)

    def score(self, layer: int, value: Tensor, errors: list[Tensor]) -> Tensor:
        """Gradient of a layer's complete conditional."""
        own = -value if layer == 0 else -self.normals[layer - 1].by_mean(errors[layer - 1])
        if layer == 2:
            back = errors[2] @ self.model.layers[2].weight
        else:
            below = self.normals[layer]
            back = below.by_mean(errors[layer]) @ below.layer.weight
        return own + back * (value > 0)

    def at(self, layer: int, value: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Densities, errors and means at another value of a layer, the other layers kept."""
        density, error, mean = list(self.density), list(self.error), list(self.mean)
        if layer == 0:
            density[0] = self.prior(value)
        else:
            own = self.normals[layer - 1].evaluate(value, mean[layer - 1])
            density[layer], error[layer - 1] = own
        if layer == 2:
            logits = self.decode(value)
            density[3], error[2] = self.pixels(logits), self.pixel_errors(logits)
        else:
            mean[layer] = self.normals[layer].predict(value)
            below = self.normals[layer].evaluate(self.z[layer + 1], mean[layer])
            density[layer + 1], error[layer] = below
        return density, error, mean

    def move(self, layer: int) -> None:
        """A Metropolis-adjusted Langevin step of one layer, which adapts as it goes."""
        u, eta = self.z[layer], self.step_size[layer]
        scale = self.second_moment[layer].rsqrt()
        score = self.score(layer, u, self.error)
        noise = torch.randn_like(u)
        white = eta * scale * score + math.sqrt(2 * eta) * noise
        proposal = u + scale * white
        density, error, mean = self.at(layer, proposal)
        new_score = self.score(layer, proposal, error)
        backward = (white + eta * scale * new_score).square().sum(-1) / (4 * eta)
        gained = density[layer] + density[layer + 1] - self.density[layer] - self.density[layer + 1]
        ratio = gained - backward + 0.5 * noise.square().sum(-1)
        accepted = torch.rand_like(ratio).log() < ratio
        self.log_joint = self.log_joint + torch.where(accepted, gained, 0.0)
        everything = ((self.density, density), (self.error, error), (self.mean, mean))
        for kept, new in everything:
            for index, (old, proposed) in enumerate(zip(kept, new, strict=True)):
                if proposed is not old:
                    where = accepted if old.dim() == accepted.dim() else accepted[..., None]
                    kept[index] = torch.where(where, proposed, old)
        self.z[layer] = torch.where(accepted[..., None], proposal, u)
        self.second_moment[layer].lerp_(score.square().mean((0, 1)), 0.05)
        acceptance = ratio.clamp(max=0).exp().mean().item()
        self.step_size[layer] = eta * math.exp(0.1 * (acceptance - 0.574))

    def learn(self) -> None:
        """Gradients of the loss per datum in the parameters."""
        weight = torch.softmax(self.log_weight, 0) / len(self.x)
        learn_linear(
            self.model.layers[2], (weight[..., None] * self.error[2]).flatten(0, 1), self.z[2]
        )
        for layer, normal in enumerate(self.normals):
            normal.learn(weight, self.z[layer], self.error[layer])

    @torch.no_grad()
    def step(self) -> None:
        """The whole training step."""
        self.look()
        self.reweight()
        for layer in (2, 0, 1):
            self.move(layer)
        self.learn()
        self.optimizer.step()


def learn_linear(layer: torch.nn.Linear, push: Tensor, above: Tensor) -> None:
    """Gradients of minus a log-density in a layer that predicts, by that in what it predicts."""
    layer.weight.grad = -(push.T @ above.relu().flatten(0, 1))
    layer.bias.grad = -push.sum(0)


def engine_step(
    model: DeepLatentGaussian,
    x: Tensor,
    num_particles: int,
    certify: bool = True,
    compile: bool | str = "auto",
) -> Callable[[], None]:
    """The same step by `DCPC` on the Pyro model, with the same diagonal preconditioner."""
    dcpc = DCPC(
        model,
        num_particles=num_particles,
        preconditioner=SecondMoment(),
        certify=certify,
        compile=compile,
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    state = dcpc.init(x)

    def step() -> None:
        nonlocal state
        problem = dcpc.bind(x)
        state, _ = problem.sweep(state, learns=True)
        optimizer.zero_grad()
        (problem.loss(state) / len(x)).backward()
        optimizer.step()

    return step


def fetch(batch_size: int) -> Callable[[], Batch]:
    """Fetches a random batch as training does; bytes in memory stand for the mapped file."""
    pixels = torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8)
    images = PixelSet(pixels, torch.zeros(len(pixels)), torch.arange(len(pixels)))
    return lambda: images.__getitems__(torch.randint(len(pixels), (batch_size,)).tolist())


def compare(likelihood: str, num_particles: int, batch_size: int, repeats: int) -> None:
    """Prints the times of one setting and their ratios."""
    x = torch.rand(batch_size, 1, 28, 28)
    models = [DeepLatentGaussian([20, 128, 256], [1, 28, 28], likelihood) for _ in range(3)]
    engine, compiled, hand, loading = interleaved_medians(
        engine_step(models[0], x, num_particles),
        engine_step(models[1], x, num_particles, compile=True),
        HandWritten(models[2], x, num_particles).step,
        fetch(batch_size),
        repeats=repeats,
        warmup=15,
    )
    print(
        f"{likelihood}, K = {num_particles}, {batch_size} images: by hand {hand:.1f} ms, "
        f"engine {engine:.1f} ms ({engine / hand:.2f} times), compiled {compiled:.1f} ms "
        f"({compiled / hand:.2f} times); fetching {loading / engine:.1%}"
    )


def main() -> None:
    """Prints the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-particles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[256, 2])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(describe_machine())
    for likelihood in ("continuous_bernoulli", "bernoulli"):
        for num_particles in options.num_particles:
            for batch_size in options.batch_size:
                compare(likelihood, num_particles, batch_size, options.repeats)


if __name__ == "__main__":
    main()
