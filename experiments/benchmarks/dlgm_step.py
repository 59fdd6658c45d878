"""Benchmark (a): a training step against the same by hand in torch, and against one gradient.

    python -m experiments.benchmarks.dlgm_step

The model is the deep latent Gaussian model of MNIST size, 20-128-256-784, with K = 4 particles of
256 images. A step reweights the particles to the present parameters, resamples where the ESS is
low, moves every layer by a Metropolis-adjusted Langevin proposal with an adapted diagonal
preconditioner, and takes a gradient step of the parameters. `HandWritten` does that without Pyro
and without this package, but for the log-density kernel of the continuous Bernoulli, which both
use, so that the ratio measures the engine.

The second ratio is to a single gradient of the joint log-density, in the latents and in the
parameters, with nothing but torch: its own `ContinuousBernoulli` and triangular solves. A step
takes a dozen gradients of parts of that density.

The third is of fetching a batch of random images from 60,000 to the step that uses it.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dcpc import DCPC
from dcpc.conquer import SecondMoment
from dcpc.distributions import ContinuousBernoulli
from dcpc.models import DeepLatentGaussian
from dcpc.training.data import Batch
from dcpc.training.data.pixels import PixelSet
from experiments.benchmarks.timing import describe_machine, interleaved_medians

Density = Callable[[Tensor], Tensor]


class HandWritten:
    """One training step, spelt out."""

    def __init__(self, model: DeepLatentGaussian, x: Tensor, num_particles: int) -> None:
        self.model, self.x, self.num_particles = model, x.flatten(1), num_particles
        sizes = model.latent_sizes
        self.z = [torch.randn(num_particles, len(x), size) for size in sizes]
        self.log_weight = torch.zeros(num_particles, len(x))
        self.log_joint = self.joint().detach()
        self.second_moment = [torch.ones(size) for size in sizes]
        self.step_size = [size ** (-1 / 3) for size in sizes]
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def normal(self, index: int, value: Tensor, above: Tensor) -> Tensor:
        """log N(value; W relu(above) + b, L L^T), one triangular solve for all rows."""
        loc = self.model.layers[index](above.relu())
        scale = self.model.scales[index]()
        rows = (value - loc).flatten(0, 1)
        white = torch.linalg.solve_triangular(scale.mT, rows, upper=True, left=False)
        norm = scale.diagonal().log().sum() + 0.5 * len(scale) * math.log(2 * math.pi)
        return -0.5 * white.square().sum(-1).reshape(value.shape[:-1]) - norm

    def prior(self, value: Tensor) -> Tensor:
        """log N(value; 0, I)."""
        return -0.5 * (value.square() + math.log(2 * math.pi)).sum(-1)

    def pixels(self, above: Tensor) -> Tensor:
        """Log-density of the images."""
        logits = self.model.layers[-1](above.relu())
        return ContinuousBernoulli(logits, validate_args=False).log_prob(self.x).sum(-1)

    def joint(self) -> Tensor:
        """log p(x, z), one number per particle and image."""
        one, two, three = self.z
        return (
            self.prior(one)
            + self.normal(0, two, one)
            + self.normal(1, three, two)
            + self.pixels(three)
        )

    def gradient(self) -> None:
        """The gradient of the joint log-density in latents and parameters."""
        self.z = [z.detach().requires_grad_() for z in self.z]
        torch.autograd.grad(self.joint().sum(), [*self.z, *self.model.parameters()])

    def conditional(self, layer: int) -> Density:
        """Complete conditional of a layer."""
        one, two, three = self.z
        return (
            lambda u: self.prior(u) + self.normal(0, two, u),
            lambda u: self.normal(0, u, one) + self.normal(1, three, u),
            lambda u: self.normal(1, u, two) + self.pixels(u),
        )[layer]

    def reweight(self) -> None:
        """Weights follow the parameters; whole particles are resampled where the ESS is low."""
        with torch.no_grad():
            log_joint = self.joint()
        self.log_weight = self.log_weight + log_joint - self.log_joint
        self.log_joint = log_joint
        weight = torch.softmax(self.log_weight, 0)
        low = 1 / weight.square().sum(0) < 0.5 * self.num_particles
        if not low.any():
            return
        slots = torch.arange(self.num_particles)
        position = (slots + torch.rand(len(self.x), 1)) / self.num_particles
        drawn = torch.searchsorted(weight.cumsum(0).T.contiguous(), position).T
        ancestors = torch.where(low, drawn.clamp(max=self.num_particles - 1), slots[:, None])
        images = torch.arange(len(self.x))
        self.z = [z[ancestors, images] for z in self.z]
        self.log_joint = self.log_joint[ancestors, images]
        mean = torch.logsumexp(self.log_weight, 0) - math.log(self.num_particles)
        self.log_weight = torch.where(low, mean, self.log_weight)

    def move(self, layer: int) -> None:
        """A Metropolis-adjusted Langevin step of one layer, which adapts as it goes."""
        density, u = self.conditional(layer), self.z[layer]
        eta, scale = self.step_size[layer], self.second_moment[layer].rsqrt()
        value, score = value_and_gradient(density, u)
        noise = torch.randn_like(u)
        white = eta * scale * score + math.sqrt(2 * eta) * noise
        proposal = u + scale * white
        new_value, new_score = value_and_gradient(density, proposal)
        backward = (white + eta * scale * new_score).square().sum(-1) / (4 * eta)
        ratio = new_value - value - backward + 0.5 * noise.square().sum(-1)
        accepted = torch.rand_like(ratio).log() < ratio
        self.z[layer] = torch.where(accepted[..., None], proposal, u)
        self.log_joint = self.log_joint + torch.where(accepted, new_value - value, 0.0)
        self.second_moment[layer].lerp_(score.square().mean((0, 1)), 0.05)
        acceptance = ratio.clamp(max=0).exp().mean().item()
        self.step_size[layer] = eta * math.exp(0.1 * (acceptance - 0.574))

    def step(self) -> None:
        """The whole training step."""
        self.reweight()
        for layer in (2, 1, 0):
            self.move(layer)
        weight = torch.softmax(self.log_weight, 0)
        self.optimizer.zero_grad()
        (-(weight * self.joint()).sum() / len(self.x)).backward()
        self.optimizer.step()


class PlainTorch(HandWritten):
    """The same with torch's own density of pixels."""

    def pixels(self, above: Tensor) -> Tensor:
        logits = self.model.layers[-1](above.relu())
        density = torch.distributions.ContinuousBernoulli(logits=logits, validate_args=False)
        return density.log_prob(self.x).sum(-1)


def value_and_gradient(density: Density, u: Tensor) -> tuple[Tensor, Tensor]:
    """Values of a density and its gradient in `u`."""
    u = u.detach().requires_grad_()
    value = density(u)
    (gradient,) = torch.autograd.grad(value.sum(), u)
    return value.detach(), gradient


def engine_step(
    model: nn.Module, x: Tensor, num_particles: int, certify: bool = True
) -> Callable[[], None]:
    """The same step by `DCPC` on the Pyro model, with the same diagonal preconditioner."""
    dcpc = DCPC(model, num_particles=num_particles, preconditioner=SecondMoment(), certify=certify)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    state = dcpc.init(x)

    def step() -> None:
        nonlocal state
        problem = dcpc.bind(x)
        state, _ = problem.sweep(state)
        optimizer.zero_grad()
        (problem.loss(state) / len(x)).backward()
        optimizer.step()

    return step


def fetch(batch_size: int) -> Callable[[], Batch]:
    """Fetches a random batch as training does; bytes in memory stand for the mapped file."""
    pixels = torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8)
    images = PixelSet(pixels, torch.zeros(len(pixels)), torch.arange(len(pixels)))
    return lambda: images.__getitems__(torch.randint(len(pixels), (batch_size,)).tolist())


def main() -> None:
    """Prints the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-particles", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(describe_machine())
    x = torch.rand(options.batch_size, 1, 28, 28)
    models = [DeepLatentGaussian([20, 128, 256], [1, 28, 28]) for _ in range(3)]
    ours = engine_step(models[0], x, options.num_particles)
    by_hand = HandWritten(models[1], x, options.num_particles).step
    one_gradient = PlainTorch(models[2], x, options.num_particles).gradient
    engine, hand, gradient, loading = interleaved_medians(
        ours, by_hand, one_gradient, fetch(options.batch_size), repeats=options.repeats
    )
    print(f"engine {engine:.1f} ms, by hand {hand:.1f} ms, ratio {engine / hand:.2f}")
    print(f"one gradient in plain torch {gradient:.1f} ms, ratio {engine / gradient:.2f}")
    print(f"fetching a batch {loading:.2f} ms, {loading / engine:.1%} of a step")


if __name__ == "__main__":
    main()
