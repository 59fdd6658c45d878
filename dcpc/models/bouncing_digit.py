"""A picture that moves through a box and bounces off its walls: an ordinary Pyro program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dcpc.errors import OptionError, require_at_least

__all__ = ["BouncingDigit", "place", "reflect"]

START_SCALE = 0.35
"""Standard deviation of the first position, as a share of the way between the walls.

That of a uniform distribution is 0.29; positions beyond the walls are reflected.
"""


class BouncingDigit(nn.Module):
    """Sequences of frames through which one picture moves, at an almost constant velocity.

        z                ~ N(0, I)                       appearance, of the whole sequence
        start, velocity  ~ N(L / 2, (0.35 L)^2), N(0, speed^2)
        jitter_t         ~ N(0, jitter_scale^2)
        u_t              = u_{t-1} + velocity + jitter_t,   u_0 = start
        position_t       = reflect(u_t)                  in [0, L], by the walls at 0 and L
        frames_t         ~ N(patch f(z) at position_t, scale^2)

    Positions are of the patch's upper left corner, `(row, column)` in pixels, and `L` is the way
    between the walls: the frame's size minus the patch's. Between pixels the patch is interpolated
    bilinearly. `f` has one hidden layer of rectified units, and ends in a sigmoid.

    Args:
        latent_size: Size of `z`.
        patch_shape: Shape of the picture, `[channels, height, width]`.
        frames_shape: Shape of a sequence, `[frames, channels, height, width]`.
        hidden_size: Width of `f`'s hidden layer.
        speed: Standard deviation of a velocity's components, in pixels per frame.
        jitter_scale: Standard deviation of a step around the velocity, in pixels.
        min_scale: Floor of `scale`, which is learned.

    Raises:
        OptionError: A size or scale out of range, or a patch that does not fit into the frames.
    """

    def __init__(
        self,
        latent_size: int,
        patch_shape: Sequence[int],
        frames_shape: Sequence[int],
        hidden_size: int = 256,
        speed: float = 1.0,
        jitter_scale: float = 0.1,
        min_scale: float = 0.05,
    ) -> None:
        super().__init__()
        require_at_least("latent_size", latent_size, 1)
        require_at_least("hidden_size", hidden_size, 1)
        for name, value in (
            ("speed", speed),
            ("jitter_scale", jitter_scale),
            ("min_scale", min_scale),
        ):
            if not 0.0 < value < math.inf:
                raise OptionError(f"{name} must be a positive number, got {value}")
        _check_shapes(patch_shape, frames_shape)
        self.latent_size = latent_size
        self.patch_shape = tuple(patch_shape)
        self.frames_shape = tuple(frames_shape)
        self.speed = speed
        self.jitter_scale = jitter_scale
        self.min_scale = min_scale
        self.patch = nn.Sequential(
            nn.Linear(latent_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, math.prod(patch_shape)),
            nn.Sigmoid(),
            nn.Unflatten(-1, self.patch_shape),
        )
        self.raw_scale = nn.Parameter(torch.tensor(math.log(0.25)))

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the pixels, `()`."""
        return self.min_scale + self.raw_scale.exp()

    @property
    def way(self) -> Tensor:
        """Pixels between the walls, for rows and for columns, `(2,)`."""
        sizes = zip(self.frames_shape[2:], self.patch_shape[1:], strict=True)
        return torch.tensor([whole - part for whole, part in sizes]).to(self.raw_scale)

    def positions(self, start: Tensor, velocity: Tensor, jitter: Tensor) -> Tensor:
        """Positions of the patch's upper left corner in all frames, `(..., frames, 2)`.

        Args:
            start: `(..., 2)`.
            velocity: `(..., 2)`.
            jitter: `(..., frames - 1, 2)`.
        """
        steps = (velocity.unsqueeze(-2) + jitter).cumsum(-2)
        first = start.unsqueeze(-2)
        return reflect(torch.cat([first, first + steps], -2), self.way)

    def forward(self, frames: Tensor | None = None, num_sequences: int = 1) -> Tensor:
        """The Pyro program.

        Args:
            frames: Observed sequences `(num_sequences, *frames_shape)`; None to draw them.
            num_sequences: Number of sequences to draw.

        Returns:
            The frames, `(num_sequences, *frames_shape)`.
        """
        pyro.module("bouncing_digit", self)
        count = num_sequences if frames is None else len(frames)
        num_frames, _, *size = self.frames_shape
        with pyro.plate("sequences", count):
            zeros = self.raw_scale.new_zeros
            z = pyro.sample("z", dist.Normal(zeros(count, self.latent_size), 1.0).to_event(1))
            way = self.way
            loc, scale = (way / 2).expand(count, 2), START_SCALE * way
            start = pyro.sample("start", dist.Normal(loc, scale).to_event(1))
            velocity = pyro.sample("velocity", dist.Normal(zeros(count, 2), self.speed).to_event(1))
            jitter = pyro.sample(
                "jitter",
                dist.Normal(zeros(count, num_frames - 1, 2), self.jitter_scale).to_event(2),
            )
            where = self.positions(start, velocity, jitter)
            position = pyro.deterministic("position", where, event_dim=2)
            mean = place(self.patch(z).unsqueeze(-4), position, size)
            return pyro.sample("frames", dist.Normal(mean, self.scale).to_event(4), obs=frames)


def reflect(u: Tensor, way: Tensor | float) -> Tensor:
    """Where a point is that moves by `u` in all between walls at 0 and at `way`.

        reflect(u) = way - |(u mod 2 way) - way|

    A triangle wave of period `2 way`: the velocity changes its sign at every wall.

    Args:
        u: Coordinates in a space without walls.
        way: Distance between the walls, positive; broadcasts against `u`.
    """
    return way - (torch.remainder(u, 2 * way) - way).abs()


def place(patch: Tensor, position: Tensor, size: Sequence[int]) -> Tensor:
    """Puts a patch on black frames, interpolated bilinearly where it lies between pixels.

        frame[i, j] = sum over a, b of hat(i - a - y) hat(j - b - x) patch[a, b],
        hat(d) = max(0, 1 - |d|)

    Two matrix products, one over the rows and one over the columns. Where the patch is at whole
    pixels it is copied; what lies beyond the frame is cut off.

    Args:
        patch: `(..., channels, h, w)`.
        position: Rows and columns `(y, x)` of the patch's upper left corner, `(..., 2)`; its batch
            dimensions broadcast against those of the patch.
        size: `(height, width)` of the frames.

    Returns:
        `(..., channels, height, width)`.
    """
    rows, columns = (
        _hat(whole, part, position[..., axis])
        for axis, (whole, part) in enumerate(zip(size, patch.shape[-2:], strict=True))
    )
    return rows.unsqueeze(-3) @ patch @ columns.unsqueeze(-3).mT


def _hat(whole: int, part: int, offset: Tensor) -> Tensor:
    """Weights `(..., whole, part)` of a patch's rows in the rows of a frame."""
    frame, patch = torch.arange(whole).to(offset), torch.arange(part).to(offset)
    distance = frame.unsqueeze(-1) - patch - offset[..., None, None]
    return torch.relu(1.0 - distance.abs())


def _check_shapes(patch_shape: Sequence[int], frames_shape: Sequence[int]) -> None:
    if len(patch_shape) != 3 or min(patch_shape) < 1:
        raise OptionError(f"patch_shape must be [channels, height, width], got {list(patch_shape)}")
    if len(frames_shape) != 4 or min(frames_shape) < 1:
        raise OptionError(
            f"frames_shape must be [frames, channels, height, width], got {list(frames_shape)}"
        )
    frames, channels, *size = frames_shape
    has_room = all(whole > part for whole, part in zip(size, patch_shape[1:], strict=True))
    if frames < 2 or channels != patch_shape[0] or not has_room:
        raise OptionError(
            f"frames_shape must have at least two frames, as many channels as patch_shape, and be "
            f"higher and wider, got {list(frames_shape)} for a patch {list(patch_shape)}"
        )
