"""scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dcpc.training.data.images import ImageData

__all__ = ["DigitsData"]


class DigitsData(ImageData):
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels, intensities 0 to 16 scaled to [0, 1].

    They come with scikit-learn: nothing is downloaded.
    """

    def load(self) -> tuple[Tensor, Tensor]:
        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.get_default_dtype()) / 16.0
        return images.unsqueeze(1), torch.as_tensor(digits.target)
