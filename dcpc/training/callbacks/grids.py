"""Grids of images and film strips of sequences, for TensorBoard and for files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import image
from torch import Tensor

from dcpc.evaluation.intensities import IntensityRange, to_unit

__all__ = ["NUM_SEQUENCES", "film_strips", "image_grid", "save_png"]

GAP = 1
SEQUENCE_GAP = 3
MAGNIFICATION = 4

NUM_SEQUENCES = 8
"""Sequences in a picture of film strips."""


def image_grid(
    images: Tensor, columns: int, intensity_range: IntensityRange = (0.0, 1.0)
) -> Tensor:
    """Arranges images row by row, with a grey line between them.

    Args:
        images: `(N, channels, height, width)`; intensities beyond the range are clamped to it. Of
            other channels than grey or colours the mean is shown.
        columns: Images per row.
        intensity_range: The intensities of black and of white.

    Returns:
        `(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)`, in [0, 1].
    """
    images = _visible(images)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cell_height, cell_width = height + GAP, width + GAP
    grid = torch.full((channels, rows * cell_height + GAP, columns * cell_width + GAP), 0.5)
    for position, picture in enumerate(to_unit(images.cpu(), intensity_range).clamp(0, 1)):
        top = GAP + position // columns * cell_height
        left = GAP + position % columns * cell_width
        grid[:, top : top + height, left : left + width] = picture
    return grid


def _visible(images: Tensor) -> Tensor:
    """Images of one or three channels; the mean over others, which have no colours of a screen."""
    return images if images.shape[1] in (1, 3) else images.float().mean(1, keepdim=True)


def film_strips(strips: Sequence[Tensor], intensity_range: IntensityRange = (0.0, 1.0)) -> Tensor:
    """Arranges sequences below each other, each as rows of its frames.

    The rows of a sequence, one for each of `strips`, are a grey line apart, sequences a wider one.

    Args:
        strips: `(N, T, channels, height, width)` each, all of one shape; as originals and
            reconstructions.
        intensity_range: The intensities of black and of white.

    Returns:
        `(channels, N * (rows * (height + 1) + 1) + 3 (N - 1), T * (width + 1) + 1)`, in [0, 1].
    """
    pictures = [
        image_grid(torch.cat(rows), len(rows[0]), intensity_range)
        for rows in zip(*strips, strict=True)
    ]
    gap = torch.full((pictures[0].shape[0], SEQUENCE_GAP, pictures[0].shape[2]), 0.5)
    return torch.cat([part for picture in pictures for part in (gap, picture)][1:], 1)


def save_png(path: Path, grid: Tensor) -> None:
    """Writes a grid `(channels, height, width)`, every pixel as a square of pixels."""
    large = grid.repeat_interleave(MAGNIFICATION, 1).repeat_interleave(MAGNIFICATION, 2)
    rgb = large.expand(3, -1, -1) if large.shape[0] == 1 else large
    image.imsave(path, rgb.permute(1, 2, 0).contiguous().numpy())
