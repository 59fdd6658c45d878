"""Images as sequences of symbols."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcpc.errors import OptionError
from dcpc.training.data import DigitsData, ImageData, PixelSequences


class Ramp(ImageData):
    """Images of one pixel, of intensities from black, -1, to white, 1."""

    intensity_range = (-1.0, 1.0)

    def load(self) -> tuple[Tensor, Tensor]:
        return torch.linspace(0, 1, 9).reshape(9, 1, 1, 1), torch.arange(9)

    def image_set(self, images: Tensor, labels: Tensor, rows: Tensor):
        return super().image_set(2 * images - 1, labels, rows)


def test_symbols_are_the_nearest_levels():
    data = PixelSequences(Ramp(num_held_out=1), num_levels=5)
    data.setup("fit")
    x, labels, _ = data.training_set.first(8)
    assert x.shape == (8, 1, 1, 1)
    assert x.dtype == torch.int64
    exact = 4 * labels / 8  # a half lies between two levels
    assert float((x.flatten() - exact).abs().max()) <= 0.5
    assert data.intensity_range == (0.0, 4.0)


def test_as_many_levels_as_the_digits_have_keep_them_all():
    images = DigitsData()
    data = PixelSequences(images, num_levels=17)
    data.setup("fit")
    x, labels, _ = data.held_out_set.first(297)
    expected, same, _ = images.held_out_set.first(297)
    assert torch.equal(x, (16 * expected).long())
    assert torch.equal(labels, same)
    assert torch.equal(data.training_set.all_labels(), images.training_set.all_labels())


def test_a_single_level_is_refused():
    with pytest.raises(OptionError, match=r"data\.num_levels"):
        PixelSequences(DigitsData(), num_levels=1)
