"""Visits: the particles of a batch come from the store, and go back to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from dcpc.divide import Division
from dcpc.problem import Problem
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState
from dcpc.training.store import ParticleStore, StoreError

__all__ = ["FreshVisit", "TiedVisit", "Visit", "datum_axes", "visit"]


@dataclass(frozen=True)
class Visit:
    """A batch whose data are independent given the parameters, so that each has weights of its own.

    Attributes:
        store: The particles of all data.
        index: Indices of the batch's data in the training set, `(B,)`.
        axes: By latent, the axis of its value that runs over the data.
    """

    store: ParticleStore
    index: Tensor
    axes: dict[str, int]

    @property
    def is_first(self) -> bool:
        """Whether some datum of the batch has no particles yet."""
        return not bool(self.store.visited(self.index).all())

    def recall(self, draw: Callable[[], SweepState]) -> SweepState:
        """The stored particles, and drawn ones for data that have none yet."""
        return self.store.read(self.index, draw, self.axes)

    def keep(self, state: SweepState) -> None:
        """Stores the particles."""
        self.store.write(self.index, state, self.axes)

    def reserve(self, state: SweepState) -> None:
        """Takes the space of all data's particles on the disk, given those of the batch."""
        self.store.reserve(state, self.axes)


class TiedVisit(Visit):
    """A batch whose data share one density, as under batch normalisation, and so one weight."""

    def recall(self, draw: Callable[[], SweepState]) -> SweepState:
        """The stored particles, as one cell: they start with equal weights."""
        state = super().recall(lambda: self._spread(draw()))
        return _with_weights(state, lambda value: value.new_zeros(value.shape[:1]))

    def keep(self, state: SweepState) -> None:
        """Stores the particles, every datum's with the weights of the batch."""
        super().keep(self._spread(state))

    def reserve(self, state: SweepState) -> None:
        super().reserve(self._spread(state))

    def _spread(self, state: SweepState) -> SweepState:
        num_data = len(self.index)
        return _with_weights(state, lambda value: value.unsqueeze(1).expand(-1, num_data))


class FreshVisit(Visit):
    """A batch whose particles are drawn anew at every visit, so that none are kept."""

    def recall(self, draw: Callable[[], SweepState]) -> SweepState:
        return draw()

    def keep(self, state: SweepState) -> None:
        """Remembers that the data have been visited."""
        self.store.mark(self.index)

    def reserve(self, state: SweepState) -> None:
        """Takes no space."""


def visit(problem: Problem, store: ParticleStore, index: Tensor, *, keeps: bool = True) -> Visit:
    """The visit of a batch.

    Args:
        problem: The model, bound to the batch.
        store: The particles of all data.
        index: Indices of the batch's data in the training set, `(B,)`.
        keeps: Whether particles are kept from visit to visit.

    Raises:
        StoreError: The latents are not in one plate over the data.
    """
    axes = datum_axes(problem.division, len(index))
    if not keeps:
        return FreshVisit(store, index, axes)
    kind = Visit if problem.division.population else TiedVisit
    return kind(store, index, axes)


def datum_axes(division: Division, num_data: int) -> dict[str, int]:
    """By latent, the axis of its value `(K, *batch, *event)` that runs over a batch's data."""
    sites = [division.sites[name] for name in division.latents]
    plates = [plate for plate in sites[0].plates if all(plate in site.plates for site in sites)]
    sizes = [plate.size for plate in plates]
    if sizes != [num_data]:
        whole = {p.name for site in sites for p in site.plates if p.size == num_data}
        outside = [
            name
            for name, site in zip(division.latents, sites, strict=True)
            if not whole & {plate.name for plate in site.plates}
        ]
        if whole and outside:
            raise StoreError(
                f"training keeps particles per datum, so all latents must be in the plate over the "
                f"{num_data} data of a batch; {outside} are outside of it. Make each a parameter "
                "(torch.nn.Parameter, PyroParam), which is learned, or draw it within the plate"
            )
        raise StoreError(
            f"training keeps particles per datum, so all latents must be in one plate over the "
            f"{num_data} data of a batch; the plates around every latent of this model have "
            f"sizes {sizes}. Wrap the model's body in: with pyro.plate('data', len(x))"
        )
    return {site.name: 1 + len(site.batch_shape) + plates[0].dim for site in sites}


def _with_weights(state: SweepState, change: Callable[[Tensor], Tensor]) -> SweepState:
    log_weight = LogWeights(change(state.log_weight.log_weight))
    return replace(state, log_weight=log_weight, log_joint=change(state.log_joint))
