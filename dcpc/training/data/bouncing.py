"""Sequences of frames in which an image moves through a box."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dcpc.errors import OptionError, require_at_least, require_seed
from dcpc.models.bouncing_digit import place, reflect
from dcpc.observed import main_tensor
from dcpc.seeding import derived_seed
from dcpc.training.data.derived import DerivedData
from dcpc.training.data.digits import DigitsData
from dcpc.training.data.images import ImageData
from dcpc.training.data.labelled import Batch, LabelledSet

__all__ = ["BouncingDigits"]


class BouncingDigits(DerivedData):
    """An image per sequence, which moves at constant velocity and bounces off the frames' walls.

    Data are `(B, num_frames, channels, canvas_size, canvas_size)`, black where the image is not,
    with labels of the images. Where a sequence starts is uniform, and so is the direction in which
    it moves; both are functions of `seed` and of the sequence's number alone. Frames are made when
    they are fetched. Between pixels an image is interpolated bilinearly. Held-out sequences are of
    held-out images. The truth about a sequence is its `position`, `(num_frames, 2)`: row and column
    of the image's upper left corner, in pixels.

    Args:
        images: All images.
        num_frames: Frames per sequence.
        canvas_size: Height and width of a frame, in pixels.
        speed: Pixels per frame.
        sequences_per_image: Sequences made of every image, each with a motion of its own.
        seed: Seed of the motions.

    Raises:
        OptionError: A number out of range.
        DataError: Images do not fit into the frames.
    """

    def __init__(
        self,
        images: ImageData | None = None,
        num_frames: int = 8,
        canvas_size: int = 16,
        speed: float = 1.5,
        sequences_per_image: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(DigitsData() if images is None else images)
        require_at_least("data.num_frames", num_frames, 2)
        require_at_least("data.canvas_size", canvas_size, 2)
        require_at_least("data.sequences_per_image", sequences_per_image, 1)
        require_seed("data.seed", seed)
        if not 0.0 <= speed < math.inf:
            raise OptionError(f"data.speed must be at least 0, got {speed}; give a finite number")
        self.num_frames = num_frames
        self.canvas_size = canvas_size
        self.speed = speed
        self.sequences_per_image = sequences_per_image
        self.motion_seed = seed

    def derive(self, images: LabelledSet, is_held_out: bool) -> LabelledSet:
        """Draws the motions.

        Raises:
            OptionError: The images do not fit into the frames.
        """
        *_, height, width = main_tensor(images.first(1)[0]).shape
        if max(height, width) >= self.canvas_size:
            raise OptionError(
                f"data.canvas_size must be larger than the images, which are {height} x {width} "
                f"pixels, got {self.canvas_size}"
            )
        count = self.sequences_per_image * len(images)
        generator = torch.Generator().manual_seed(derived_seed(self.motion_seed, int(is_held_out)))
        draws = torch.rand(count, 3, generator=generator, dtype=torch.float64)
        way = self.canvas_size - torch.tensor([height, width], dtype=torch.float64)
        angle = 2 * math.pi * draws[:, 2]
        velocity = self.speed * torch.stack([angle.sin(), angle.cos()], -1)
        time = torch.arange(self.num_frames, dtype=torch.float64).reshape(-1, 1)
        path = (draws[:, :2] * way).unsqueeze(1) + time * velocity.unsqueeze(1)
        position = reflect(path, way).to(torch.get_default_dtype())
        return _Sequences(images, position, self.canvas_size, self.intensity_range[0])


class _Sequences(LabelledSet):
    """Sequences of images, made when they are fetched.

    Args:
        images: The images; sequence `n` is of image `n mod len(images)`.
        position: `(N, num_frames, 2)`.
        canvas_size: Height and width of a frame.
        black: Intensity of the background.
    """

    def __init__(
        self, images: LabelledSet, position: Tensor, canvas_size: int, black: float
    ) -> None:
        self.images, self.position = images, position
        self.canvas_size, self.black = canvas_size, black

    def __len__(self) -> int:
        return len(self.position)

    def all_labels(self) -> Tensor:
        return self.images.all_labels().repeat(len(self) // len(self.images))

    def __getitems__(self, index: Sequence[int]) -> Batch:
        rows = torch.as_tensor(index)
        x, labels, _ = self.images.__getitems__((rows % len(self.images)).tolist())
        size = (self.canvas_size, self.canvas_size)
        light = (main_tensor(x) - self.black).unsqueeze(1)
        frames = self.black + place(light, self.position[rows], size)
        return frames, labels, rows

    def truth(self, index: Tensor) -> Mapping[str, Tensor]:
        return {"position": self.position[index]}

    def set_epoch(self, epoch: int) -> None:
        self.images.set_epoch(epoch)
