"""Images as sequences of symbols: intensities rounded to few levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dcpc.errors import require_at_least
from dcpc.evaluation.intensities import to_unit
from dcpc.observed import main_tensor
from dcpc.training.data.derived import DerivedData
from dcpc.training.data.images import ImageData
from dcpc.training.data.labelled import Batch, LabelledSet

__all__ = ["PixelSequences"]


class PixelSequences(DerivedData):
    """Images whose intensities are the integers 0 to `num_levels` - 1.

    A batch's data are `x`, 64-bit integers `(B, channels, height, width)`: symbols for a model of
    sequences, which reads them channel by channel and row by row, as `x.flatten(1)` does.

    Args:
        images: The images, with intensities of any range, which are rounded to levels.
        num_levels: Number of levels, black and white among them.

    Attributes:
        intensity_range: The levels of black and of white, so that grids show the symbols as grey.

    Raises:
        OptionError: Less than two levels.
    """

    def __init__(self, images: ImageData, num_levels: int = 8) -> None:
        super().__init__(images)
        require_at_least("data.num_levels", num_levels, 2)
        self.num_levels = num_levels
        self.intensity_range = (0.0, num_levels - 1.0)

    def derive(self, images: LabelledSet, is_held_out: bool) -> LabelledSet:
        return _SymbolSet(images, self._symbols)

    def _symbols(self, images: Tensor) -> Tensor:
        """The nearest level of every intensity."""
        unit = to_unit(images, self.images.intensity_range)
        return (unit * (self.num_levels - 1)).round().long()


class _SymbolSet(LabelledSet):
    """A set whose images are rounded to levels."""

    def __init__(self, images: LabelledSet, symbols: Callable[[Tensor], Tensor]) -> None:
        self.images, self.symbols = images, symbols

    def __len__(self) -> int:
        return len(self.images)

    def all_labels(self) -> Tensor:
        return self.images.all_labels()

    def __getitems__(self, index: Sequence[int]) -> Batch:
        x, labels, indices = self.images.__getitems__(index)
        return self.symbols(main_tensor(x)), labels, indices

    def set_epoch(self, epoch: int) -> None:
        self.images.set_epoch(epoch)
