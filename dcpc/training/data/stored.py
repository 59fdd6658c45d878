"""Sequences of images to be memorised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcpc.errors import OptionError, require_at_least, require_seed
from dcpc.observed import main_tensor
from dcpc.training.data.digits import DigitsData
from dcpc.training.data.images import ImageData
from dcpc.training.data.labelled import Batch, LabelledData, LabelledSet

__all__ = ["StoredSequences"]


class StoredSequences(LabelledData):
    """Sequences of images without any rule, which a model can only learn by heart.

    Data are `(B, num_frames, channels, height, width)`; no image is in two places, and a label is
    that of a sequence's first image. What a memory is measured by is the recall of what it stored:
    the held-out sequences are those that are trained on, so that evidence on them is evidence on
    training data. More sequences of the same seed begin with fewer.

    Args:
        images: All images, of which those to train on are used.
        num_sequences: Number of sequences.
        num_frames: Frames per sequence.
        batch_size: Sequences per batch; null for all at once.
        seed: Seed of the choice of images.

    Raises:
        OptionError: A number out of range, or fewer images than frames.
    """

    def __init__(
        self,
        images: ImageData | None = None,
        num_sequences: int = 16,
        num_frames: int = 10,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        images = DigitsData() if images is None else images
        require_at_least("data.num_sequences", num_sequences, 1)
        require_at_least("data.num_frames", num_frames, 2)
        require_seed("data.seed", seed)
        size = num_sequences if batch_size is None else batch_size
        super().__init__(size, size, images.seed, images.num_workers)
        self.images = images
        self.num_sequences = num_sequences
        self.num_frames = num_frames
        self.choice_seed = seed
        self.intensity_range = images.intensity_range

    def setup(self, stage: str) -> None:
        """Chooses the images, once.

        Raises:
            OptionError: There are fewer images than frames.
        """
        if self.training_set is not None:
            return
        self.images.setup(stage)
        images = self.images.training_set
        assert images is not None
        needed = self.num_sequences * self.num_frames
        if needed > len(images):
            raise OptionError(
                f"data.num_sequences={self.num_sequences} of data.num_frames={self.num_frames} "
                f"need {needed} images, but there are {len(images)} to train on; store fewer or "
                "shorter sequences"
            )
        order = torch.randperm(
            len(images), generator=torch.Generator().manual_seed(self.choice_seed)
        )
        rows = order[:needed].reshape(self.num_sequences, self.num_frames)
        self.training_set = self.held_out_set = _ImageSequences(images, rows)


class _ImageSequences(LabelledSet):
    """Sequences of a set's images.

    Args:
        images: The images.
        rows: Which ones, `(N, T)`.
    """

    def __init__(self, images: LabelledSet, rows: Tensor) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, index: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(index)
        rows = self.rows[chosen]
        x, labels, _ = self.images.__getitems__(rows.flatten().tolist())
        frames = main_tensor(x)
        return (
            frames.reshape(*rows.shape, *frames.shape[1:]),
            labels.reshape(rows.shape)[:, 0],
            chosen,
        )
