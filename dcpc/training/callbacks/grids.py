"""Grids of images, for TensorBoard and for files."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import image
from torch import Tensor

from dcpc.evaluation.intensities import IntensityRange, to_unit

__all__ = ["image_grid", "save_png"]

GAP = 1
MAGNIFICATION = 4


def image_grid(
    images: Tensor, columns: int, intensity_range: IntensityRange = (0.0, 1.0)
) -> Tensor:
    """Arranges images row by row, with a grey line between them.

    Args:
        images: `(N, channels, height, width)`; intensities beyond the range are clamped to it.
        columns: Images per row.
        intensity_range: The intensities of black and of white.

    Returns:
        `(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)`, in [0, 1].
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cell_height, cell_width = height + GAP, width + GAP
    grid = torch.full((channels, rows * cell_height + GAP, columns * cell_width + GAP), 0.5)
    for position, picture in enumerate(to_unit(images.cpu(), intensity_range).clamp(0, 1)):
        top = GAP + position // columns * cell_height
        left = GAP + position % columns * cell_width
        grid[:, top : top + height, left : left + width] = picture
    return grid


def save_png(path: Path, grid: Tensor) -> None:
    """Writes a grid `(channels, height, width)`, every pixel as a square of pixels."""
    large = grid.repeat_interleave(MAGNIFICATION, 1).repeat_interleave(MAGNIFICATION, 2)
    rgb = large.expand(3, -1, -1) if large.shape[0] == 1 else large
    image.imsave(path, rgb.permute(1, 2, 0).contiguous().numpy())
