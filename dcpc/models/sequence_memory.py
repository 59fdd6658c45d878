"""A memory of sequences: hidden states that predict each other, and a frame each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dcpc.errors import OptionError, require_at_least

__all__ = ["SequenceMemory"]

Nonlinearity = Literal["tanh", "identity"]


class SequenceMemory(nn.Module):
    """A state-space model with one latent and one observed site per frame.

        z_0 ~ N(0, I),  h_0 = A z_0
        z_t ~ N(W f(h_{t-1}) + b, state_scale^2 I),  h_t = z_t
        x_t ~ N(U f(h_t) + c, frame_scale^2 I)

    Beside its first state, the generative model of temporal predictive coding with two layers:
    Tang, Barron & Bogacz, "Sequential memory with temporal predictive coding", NeurIPS 2023. A
    sequence is recalled from its first frame: what follows from the posterior of `z_0` given `x_0`
    alone. `z_0` is smaller than a frame, so that this posterior is narrow: of a first state that is
    larger than a frame, some directions would be known from the later frames only.

    Args:
        state_size: Size of the states `h_t`.
        frames_shape: Shape of a sequence, `[frames, channels, height, width]`.
        cue_size: Size of `z_0`.
        nonlinearity: `f`: `tanh`, or `identity` for a linear-Gaussian model.
        state_scale: Standard deviation of the states around their predictions.
        frame_scale: Standard deviation of the pixels around theirs.

    Raises:
        OptionError: A size or scale out of range, or an unknown nonlinearity.
    """

    def __init__(
        self,
        state_size: int,
        frames_shape: Sequence[int],
        cue_size: int = 24,
        nonlinearity: Nonlinearity = "tanh",
        state_scale: float = 0.1,
        frame_scale: float = 0.1,
    ) -> None:
        super().__init__()
        require_at_least("state_size", state_size, 1)
        require_at_least("cue_size", cue_size, 1)
        if len(frames_shape) != 4 or min(frames_shape) < 1:
            raise OptionError(
                f"frames_shape must be [frames, channels, height, width], got {list(frames_shape)}"
            )
        if nonlinearity not in ("tanh", "identity"):
            raise OptionError(f"nonlinearity must be 'tanh' or 'identity', got {nonlinearity!r}")
        for name, value in (("state_scale", state_scale), ("frame_scale", frame_scale)):
            if not 0.0 < value < math.inf:
                raise OptionError(f"{name} must be a positive number, got {value}")
        self.state_size = state_size
        self.frames_shape = tuple(frames_shape)
        self.nonlinearity = torch.tanh if nonlinearity == "tanh" else nn.Identity()
        self.state_scale = state_scale
        self.frame_scale = frame_scale
        self.cue_size = cue_size
        self.initial = nn.Linear(cue_size, state_size, bias=False)
        nn.init.normal_(self.initial.weight, std=cue_size**-0.5)
        self.transition = nn.Linear(state_size, state_size)
        self.emission = nn.Linear(state_size, math.prod(frames_shape[1:]))

    def forward(self, frames: Tensor | None = None, num_sequences: int = 1) -> Tensor:
        """The Pyro program.

        Args:
            frames: Observed sequences `(num_sequences, *frames_shape)`; None to draw them.
            num_sequences: Number of sequences to draw.

        Returns:
            The frames as rows of pixels, `(num_sequences, frames, pixels)`.
        """
        pyro.module("sequence_memory", self)
        count = num_sequences if frames is None else len(frames)
        loc, scale = self.emission.weight.new_zeros(count, self.cue_size), 1.0
        shown = []
        with pyro.plate("sequences", count):
            for t in range(self.frames_shape[0]):
                z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).to_event(1))
                active = self.nonlinearity(z if t else self.initial(z))
                pixels = dist.Normal(self.emission(active), self.frame_scale).to_event(1)
                obs = None if frames is None else frames[:, t].flatten(1)
                shown.append(pyro.sample(f"x_{t}", pixels, obs=obs))
                loc, scale = self.transition(active), self.state_scale
        return torch.stack(shown, 1)
