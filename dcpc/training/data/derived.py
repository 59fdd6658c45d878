"""Data that are made of images."""

from __future__ import annotations

from abc import abstractmethod

from dcpc.training.data.images import ImageData
from dcpc.training.data.labelled import LabelledData, LabelledSet

__all__ = ["DerivedData"]


class DerivedData(LabelledData):
    """Base class: a subclass makes a set of data out of a set of images.

    Batch sizes, the split and the seed of the shuffling are those of the images, so that held-out
    data are made of held-out images.

    Args:
        images: All images.

    Attributes:
        images: All images.
        intensity_range: Their intensities of black and of white.
    """

    def __init__(self, images: ImageData) -> None:
        super().__init__(
            images.batch_size, images.evaluation_batch_size, images.seed, images.num_workers
        )
        self.images = images
        self.intensity_range = images.intensity_range

    @abstractmethod
    def derive(self, images: LabelledSet, is_held_out: bool) -> LabelledSet:
        """The data that are made of those to train on, or of those that are held out."""

    def setup(self, stage: str) -> None:
        """Makes the data, once."""
        if self.training_set is not None:
            return
        self.images.setup(stage)
        training, held_out = self.images.training_set, self.images.held_out_set
        assert training is not None
        assert held_out is not None
        self.training_set = self.derive(training, False)
        self.held_out_set = self.derive(held_out, True)
