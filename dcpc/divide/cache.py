"""Divisions of a model, kept as long as they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dcpc.divide.dividing import divide
from dcpc.divide.division import DataIdentity, Division
from dcpc.divide.graph import Schedule
from dcpc.divide.model import Model
from dcpc.divide.program import Arguments
from dcpc.divide.sites import Sites, read_sites
from dcpc.divide.watch import Snapshot
from dcpc.seeding import random_state_kept
from dcpc.threads import exclusive

ALL: Literal["all"] = "all"
"""All continuous latents as one block."""

Blocks = Sequence[Sequence[str]] | Literal["all"]
"""Latents to move jointly."""

MAX_DIVISIONS = 16
"""Divisions kept for different argument shapes; the least recently used one goes first."""


class Divisions:
    """The divisions of a model for the shapes of arguments that it was called with.

    Args:
        model: The Pyro program.
        num_particles: K.
        batch_size: Particles that the model is evaluated for at once; None for all of them.
        schedule: Order in which units move.
        blocks: Latents to move jointly, or `all` for the continuous ones.
        backend: `auto`, `graph`, `vmap` or `loop`.
        certify: Whether new divisions are compared with plain runs of the model.
    """

    def __init__(
        self,
        model: Model,
        num_particles: int,
        *,
        batch_size: int | None = None,
        schedule: Schedule,
        blocks: Blocks = (),
        backend: str = "auto",
        certify: bool = True,
    ) -> None:
        self.model = model
        self.num_particles = num_particles
        self.batch_size = batch_size
        self._schedule = schedule
        self._blocks = blocks
        self._backend = backend
        self._certify = certify
        self._captured: OrderedDict[tuple, _Captured] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was captured, for pickles and copies: it is captured again when needed."""
        return {**vars(self), "_captured": OrderedDict()}

    def __len__(self) -> int:
        """Number of divisions that are kept."""
        return len(self._captured)

    @exclusive("DCPC.bind")
    def find(self, arguments: Arguments, *, thorough: bool = False) -> Division:
        """The divided model for these arguments: as captured before, where that still holds.

        Args:
            arguments: The model's arguments.
            thorough: Whether the sites, the data and what was captured are compared with a run of
                the model, whatever seems to be unchanged.

        Raises:
            ModelError, DataError, CertificationError: The model or data cannot be handled.
        """
        snapshot = Snapshot(self.model, arguments.objects)
        key = (arguments.key, snapshot.modes)
        captured = self._captured.get(key)
        if captured is not None and captured.holds(snapshot, arguments, thorough):
            self._captured.move_to_end(key)
            return captured.division
        with random_state_kept():
            sites = read_sites(self.model, *arguments.rebuild(arguments.tensors))
            division = divide(
                self.model,
                arguments,
                sites,
                min(self.batch_size or self.num_particles, self.num_particles),
                schedule=self._schedule,
                blocks=_resolved(self._blocks, sites),
                backend=self._backend,
                certify=self._certify,
            )
        # The first run may have created parameters.
        snapshot = Snapshot(self.model, arguments.objects)
        data = DataIdentity((*arguments.tensors, *snapshot.tensors))
        self._captured[key] = _Captured(division, snapshot, data)
        if len(self._captured) > MAX_DIVISIONS:
            self._captured.popitem(last=False)
        return division


def _resolved(blocks: Blocks, sites: Sites) -> Sequence[Sequence[str]]:
    if blocks != ALL:
        return blocks
    continuous = [name for name in sites.latents if sites[name].discrete is None]
    return [continuous] if len(continuous) > 1 else ()


@dataclass
class _Captured:
    """A division in the cache, and what has to be the same for it to be used again."""

    division: Division
    snapshot: Snapshot
    data: DataIdentity

    def holds(self, snapshot: Snapshot, arguments: Arguments, thorough: bool) -> bool:
        """Whether the division is that of the model as it is now, for these arguments."""
        if snapshot != self.snapshot:
            return False
        unsure = thorough or not snapshot.is_complete
        if self.division.program.reads_data:
            data = DataIdentity((*arguments.tensors, *snapshot.tensors))
            unsure = unsure or data != self.data
            self.data = data
        if not unsure:
            return True
        with random_state_kept():
            return self.division.matches(arguments)
