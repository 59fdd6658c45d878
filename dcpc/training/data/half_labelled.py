"""Images of which few have labels that a model sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcpc.errors import OptionError, require_at_least, require_seed
from dcpc.observed import main_tensor
from dcpc.training.data.derived import DerivedData
from dcpc.training.data.images import ImageData
from dcpc.training.data.labelled import Batch, LabelledSet

__all__ = ["HalfLabelledData", "choose_labelled"]


class HalfLabelledData(DerivedData):
    """Images with labels, few of which a model sees.

    A batch's data are `x`, the images `(B, *shape)`, `label`, `(B,)`, and `seen`, boolean `(B,)`:
    the arguments of a model that says `pyro.sample("label", ..., obs=label, obs_mask=seen)`. No
    label of held-out data is seen, and where one is not seen, `label` is 0. Training labels to be
    seen are drawn by the seed alone, as many of every class as of the others, or one more.

    Where few labels are seen, few of a batch's data have one, and what predicts labels learns
    slowly. Copies of the labelled images, each a datum with particles of its own, make up for
    that: the loss then weighs an image with a label `labelled_copies` times.

    Args:
        images: All images.
        num_labelled: Number of training images whose label is seen.
        seed: Seed of the choice of these.
        labelled_copies: How often a training image whose label is seen occurs in an epoch.

    Raises:
        OptionError: More labels than training images, or fewer than classes.
    """

    def __init__(
        self, images: ImageData, num_labelled: int, seed: int = 0, labelled_copies: int = 1
    ) -> None:
        super().__init__(images)
        require_at_least("data.num_labelled", num_labelled, 1)
        require_seed("data.seed", seed)
        require_at_least("data.labelled_copies", labelled_copies, 1)
        self.num_labelled = num_labelled
        self.label_seed = seed
        self.labelled_copies = labelled_copies

    def derive(self, images: LabelledSet, is_held_out: bool) -> LabelledSet:
        if is_held_out:
            return _HalfLabelledSet(images, torch.zeros(len(images), dtype=torch.bool))
        seen = choose_labelled(images.all_labels(), self.num_labelled, self.label_seed)
        return _HalfLabelledSet(images, seen, self.labelled_copies)


def choose_labelled(labels: Tensor, num_labelled: int, seed: int) -> Tensor:
    """Which data are labelled, boolean `(N,)`: as many of every class as there can be.

    Args:
        labels: `(N,)`.
        num_labelled: Their number.
        seed: Seed of the choice.

    Raises:
        OptionError: More labels than data, or fewer than classes.
    """
    classes = labels.unique()
    if not len(classes) <= num_labelled <= len(labels):
        raise OptionError(
            f"data.num_labelled must be at least the number of classes, {len(classes)}, and at "
            f"most the number of training images, {len(labels)}, got {num_labelled}"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(labels)  # of a datum among those of its class, in that order
    for number in classes:
        rows = order[labels[order] == number]
        rank[rows] = torch.arange(len(rows))
    first = torch.argsort(rank[order], stable=True)[:num_labelled]
    seen = torch.zeros(len(labels), dtype=torch.bool)
    seen[order[first]] = True
    return seen


class _HalfLabelledSet(LabelledSet):
    """A set whose data are images, labels, and which of these are seen.

    Args:
        images: The images, first once each; the further copies of labelled ones follow.
        seen: Which labels are seen, boolean `(N,)`.
        copies: How often an image whose label is seen occurs.
    """

    def __init__(self, images: LabelledSet, seen: Tensor, copies: int = 1) -> None:
        self.images, self.seen = images, seen
        once = torch.arange(len(seen))
        self.rows = torch.cat([once, once[seen].repeat(copies - 1)])

    def __len__(self) -> int:
        return len(self.rows)

    def all_labels(self) -> Tensor:
        return self.images.all_labels()[self.rows]

    def __getitems__(self, index: Sequence[int]) -> Batch:
        indices = torch.as_tensor(index)
        rows = self.rows[indices]
        x, labels, _ = self.images.__getitems__(rows.tolist())
        seen = self.seen[rows]
        data = {"x": main_tensor(x), "label": torch.where(seen, labels, 0), "seen": seen}
        return data, labels, indices

    def set_epoch(self, epoch: int) -> None:
        self.images.set_epoch(epoch)
