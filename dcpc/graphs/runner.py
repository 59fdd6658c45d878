"""Sweeps that are recorded as graphs and compiled."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from dcpc.divide import Density, Division, ScoredDensity, UnitGroup
from dcpc.divide.program import GraphProgram
from dcpc.divide.tempering import Reference, Tempering
from dcpc.graphs.learning import EVALUATE, MOVE, LearningSweep, Left
from dcpc.graphs.tiers import Mode, Tiered
from dcpc.graphs.trees import flatten, leaves_of
from dcpc.parts import Adaptation, Parts
from dcpc.recombine import LogWeights
from dcpc.sweep import Adapting, Runner, SweepInfo, SweepState, move_units

__all__ = ["CompileWarning", "RecordedRunner"]

Tree = dict[str, Any]
Function = Callable[[Tree, Tree], Tree]


class CompileWarning(UserWarning):
    """Sweeps that were to be compiled run as they are written; the message says why."""


class RecordedRunner(Runner):
    """Runs sweeps as recordings, one for all temperatures and whatever learns.

    Whether proposals learn is decided outside of the graph, which always computes what they would
    learn, so that a model has one graph of its moves and one of its log-density.

    Args:
        mode: True to compile sweeps, `auto` to compile them where that pays.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._num_expected = 0
        self._say: Callable[[str], None] = _silent
        self._divisions: WeakSet[Division] = WeakSet()
        self._pending: Left | None = None
        self._left: Left | None = None
        self._has_loss: WeakSet[Division] = WeakSet()
        self._learns_now = False
        self._told: set[str] = set()

    def __getstate__(self) -> Mode:
        """Without what was recorded, for pickles and copies: it is recorded again when needed."""
        return self.mode

    def __setstate__(self, mode: Mode) -> None:
        self.__init__(mode)  # type: ignore[misc]

    def num_operators(self) -> list[int]:
        """Number of operators of every graph that was recorded."""
        kept = [value for division in self._divisions for value in division.recordings.values()]
        return [recorded.num_operators for recorded in kept if recorded.num_operators]

    @contextmanager
    def expecting(self, num_sweeps: int, say: Callable[[str], None]) -> Iterator[None]:
        before = self._num_expected, self._say
        self._num_expected, self._say, self._learns_now = num_sweeps, say, False
        try:
            yield
        finally:
            self._num_expected, self._say = before

    def begin(self, density: Density, *, learns: bool) -> None:
        self._learns_now = learns
        if learns:
            self._has_loss.add(density.division)

    def evaluate(
        self, density: Density, state: SweepState, parts: Parts
    ) -> tuple[dict[str, ScoredDensity], Tensor]:
        self._pending = None
        names = {group.name for group in density.division.groups}
        is_first = self._learns_now and not names <= state.adaptation.keys()
        if is_first or self._refuses(density, parts):
            return super().evaluate(density, state, parts)
        if self._learns(density, state):
            groups = density.division.groups
            settled, moving = self._trees(density, state, {}, Adapting(True, True))
            self._pending = self._begin(density, parts, groups, settled, moving)
            if self._pending is not None:
                result = self._pending.run.stage(EVALUATE, leaves_of((settled, moving)))
                return _scored(result["evaluations"]), result["log_joint"]
        # One graph of the moves, which does not begin with an evaluation, is enough for a run.
        is_run = self.mode is True or self._num_expected > 0
        function = _log_joint if is_run else _evaluate_leading
        result = self._run(
            density,
            (function,),
            lambda: _of_density(density.division, function),
            self._settled(density, state),
            _moving(state),
        )
        return _scored(result["evaluations"]), result["log_joint"]

    def move(
        self,
        density: Density,
        state: SweepState,
        info: SweepInfo,
        evaluations: Mapping[str, ScoredDensity],
        parts: Parts,
        groups: Sequence[UnitGroup],
        how: Adapting,
    ) -> tuple[SweepState, SweepInfo]:
        names = {group.name for group in groups}
        pending, self._pending, self._left = self._pending, None, None
        if self._refuses(density, parts) or not names <= state.adaptation.keys():
            return super().move(density, state, info, evaluations, parts, groups, how)
        settled, moving = self._trees(density, state, evaluations, how)
        if pending is not None and self._goes_on(pending, state, info, settled, moving):
            moving["evaluations"] = {}  # they are in the run
        else:
            pending = None
            if evaluations and self._learns(density, state):
                pending = self._begin(density, parts, groups, settled, moving)
        if pending is not None:
            result = pending.run.stage(MOVE, leaves_of((settled, moving)))
            self._left = replace(pending, settled=settled, moving=moving, latents=result["latents"])
        else:
            result = self._run(
                density,
                ("move", parts, tuple(group.name for group in groups)),
                lambda: _of_moves(density.division, parts, groups),
                settled,
                {name: value for name, value in moving.items() if name != "weights"},
            )
        return _moved(state, result, info, how)

    def loss(self, density: Density, state: SweepState) -> Tensor:
        self._has_loss.add(density.division)
        left, self._left = self._left, None
        if left is None or left.latents is not state.latents or not left.run.is_current:
            return super().loss(density, state)
        return left.loss(state.log_weight.normalized())

    def _learns(self, density: Density, state: SweepState) -> bool:
        """Whether a sweep is one of many of which each is followed by a loss."""
        division = density.division
        names = {group.name for group in division.groups}
        return (
            (self.mode is not True or self._learns_now)
            and division in self._has_loss
            and state.num_particles <= division.program.num_particles
            and names <= state.adaptation.keys()
        )

    def _begin(
        self,
        density: Density,
        parts: Parts,
        groups: Sequence[UnitGroup],
        settled: Tree,
        moving: Tree,
    ) -> Left | None:
        """Begins a sweep that is followed by a loss; None as long as it is not recorded."""
        sweeps = self._of(density)
        leaves, structure = flatten((settled, moving))
        names = tuple(group.name for group in groups)
        key = ("learn", parts, names, structure, _likes(leaves))
        if key not in sweeps:
            evaluate = _of_density(density.division, _evaluate_leading)
            sweeps[key] = LearningSweep(
                _given if moving["evaluations"] else evaluate,
                _of_moves(density.division, parts, groups),
                _of_loss(density.division),
                self.mode,
            )
        run = sweeps[key].start(settled, moving, self._learns_now, self._num_expected, self._say)
        if sweeps[key].refusal:
            self._tell(sweeps[key].refusal)
        if run is None:
            return None
        return Left(sweeps[key], run, settled, moving, moving["latents"])

    def _goes_on(
        self, left: Left, state: SweepState, info: SweepInfo, settled: Tree, moving: Tree
    ) -> bool:
        """Whether moves begin at what was evaluated, of the same particles or their children."""
        if info.ancestors is None:
            return left.latents is state.latents
        return left.sweep.follows(left.run, info.ancestors, settled, moving)

    def _trees(
        self,
        density: Density,
        state: SweepState,
        evaluations: Mapping[str, ScoredDensity],
        how: Adapting,
    ) -> tuple[Tree, Tree]:
        """Inputs of the moves: those that all particles share, and those of each particle."""
        adaptation = {
            name: (learned.preconditioner, _in_use(learned.step_size, how), learned.reference)
            for name, learned in state.adaptation.items()
        }
        settled = self._settled(density, state)
        settled |= {"adaptation": adaptation, "active": density.active_values()}
        log_weight = state.log_weight.log_weight
        return settled, _moving(state) | {
            "log_weight": log_weight,
            "weights": log_weight,  # what is normalised of them comes in their place
            "memory": {kind: dict(by_latent) for kind, by_latent in state.memory.items()},
            "evaluations": _pairs(evaluations),
        }

    def _settled(self, density: Density, state: SweepState) -> Tree:
        """Inputs of the density that all particles share: data, temperature, references."""
        tempering = density.tempering
        return {
            "tensors": [value.contiguous() for value in density.tensors],
            "beta": _tensor(tempering.temperature, state.log_joint),
            "references": {
                name: (reference.loc, _tensor(reference.scale, reference.loc))
                for name, reference in tempering.references.items()
                if tempering.temperature != 1.0
            },
        }

    def _run(
        self,
        density: Density,
        what: tuple,
        make: Callable[[], Function],
        settled: Tree,
        moving: Tree,
    ) -> Tree:
        """The result of a function, as fast as it has become."""
        tiers = self._of(density)
        leaves, structure = flatten((settled, moving))
        key = (what, structure, _likes(leaves))
        if key not in tiers:
            tiers[key] = Tiered(make(), self.mode)
        tier = tiers[key]
        result = tier(settled, moving, leaves, self._num_expected, self._say)
        if tier.refusal:
            self._tell(tier.refusal)
        return result

    def _of(self, density: Density) -> dict[Any, Any]:
        """Recordings of sweeps on a division, which live as long as it."""
        self._divisions.add(density.division)
        return density.division.recordings

    def _refuses(self, density: Density, parts: Parts) -> bool:
        tempering = density.tempering
        # A joint reference is that of a few sweeps, which recording would not pay for.
        if tempering.temperature == 0.0 or tempering.starts_jointly:
            return True
        reason = _refusal(density, parts)
        if reason:
            self._tell(reason)
        return bool(reason)

    def _tell(self, reason: str) -> None:
        """Says once why sweeps are not compiled, to who asked for it."""
        if reason in self._told:
            return
        self._told.add(reason)
        if self.mode is True:
            warnings.warn(f"sweeps are not compiled: {reason}", CompileWarning, stacklevel=2)


def _refusal(density: Density, parts: Parts) -> str:
    """Why the sweeps of a density are not recorded; empty if they are."""
    division = density.division
    if not isinstance(division.program, GraphProgram):
        return f"the model is not one graph but runs by backend '{division.program.name}'"
    discrete = [group.name for group in division.groups if group.is_discrete]
    if discrete:
        return f"the latents {discrete} are discrete"
    used = (parts.move, parts.correction, parts.preconditioner, parts.dual_averaging)
    foreign = [type(p).__name__ for p in used if not type(p).__module__.startswith("dcpc.")]
    if foreign:
        return f"{foreign} may do in Python what a graph cannot"
    return ""


def _likes(leaves: Sequence[Tensor]) -> tuple:
    """Shapes, types and devices of tensors."""
    return tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


@dataclass(frozen=True)
class _Bound(Density):
    """A density that is told which values are active.

    Attributes:
        active: As from `active_values`.
    """

    active: Mapping[str, Tensor] = field(default_factory=dict)

    def active_values(self) -> dict[str, Tensor]:
        return dict(self.active)


def _bound(division: Division, settled: Tree) -> _Bound:
    """The density of a settled tree."""
    references = {name: Reference(*pair) for name, pair in settled["references"].items()}
    tempering = Tempering(settled["beta"], references)
    tensors = tuple(settled["tensors"])
    return _Bound(division, tensors, tempering, settled.get("active", {}))


def _of_density(
    division: Division, evaluate: Callable[[Density, Mapping[str, Tensor]], Tree]
) -> Function:
    """A function of the log-density of particles, as one of trees."""

    def function(settled: Tree, moving: Tree) -> Tree:
        return evaluate(_bound(division, settled), moving["latents"])

    return function


def _given(settled: Tree, moving: Tree) -> Tree:
    """The result of an evaluation that was made before."""
    return {"evaluations": moving["evaluations"], "log_joint": moving["log_joint"]}


def _of_loss(division: Division) -> Callable[[Tree, Tree, Tensor], Tensor]:
    """The loss of particles as a function of trees and normalised weights."""

    def function(settled: Tree, latents: Tree, weights: Tensor) -> Tensor:
        detached = {name: u.detach() for name, u in latents.items()}
        return -(weights * _bound(division, settled).learnable_log_joint(detached)).sum()

    return function


def _evaluate_leading(density: Density, latents: Mapping[str, Tensor]) -> Tree:
    evaluations, log_joint = density.evaluate_leading(latents)
    return {"evaluations": _pairs(evaluations), "log_joint": log_joint}


def _log_joint(density: Density, latents: Mapping[str, Tensor]) -> Tree:
    return {"evaluations": {}, "log_joint": density.log_joint(latents)}


def _of_moves(division: Division, parts: Parts, groups: Sequence[UnitGroup]) -> Function:
    """The moves of a sweep as a function of trees; what is learned is always computed."""

    def function(settled: Tree, moving: Tree) -> Tree:
        weights = copy.copy(LogWeights.uniform(1))
        object.__setattr__(weights, "log_weight", moving["log_weight"])
        state = SweepState(
            moving["latents"],
            weights,
            moving["log_joint"],
            {name: Adaptation(*known) for name, known in settled["adaptation"].items()},
            moving["memory"],
        )
        state, info = move_units(
            _bound(division, settled),
            state,
            SweepInfo(ess=moving["log_joint"]),
            _scored(moving["evaluations"]),
            parts,
            groups,
            Adapting(True, True),
        )
        return {
            "latents": state.latents,
            "log_weight": state.log_weight.log_weight,
            "log_joint": state.log_joint,
            "adaptation": {
                name: (learned.preconditioner, learned.step_size)
                for name, learned in state.adaptation.items()
            },
            "memory": dict(state.memory),
            "scored": _pairs(state.scored),
            "statistic": info.statistic,
            "step_size": info.step_size,
            "num_bad": info.num_bad,
            "num_bad_scores": info.num_bad_scores,
        }

    return function


def _pairs(evaluations: Mapping[str, ScoredDensity]) -> Tree:
    return {name: (e.log_density, e.score) for name, e in evaluations.items()}


def _scored(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, ScoredDensity]:
    return {name: ScoredDensity(*pair) for name, pair in pairs.items()}


def _moving(state: SweepState) -> Tree:
    """Inputs of each particle, as contiguous tensors."""
    latents = state.latents
    if not all(u.is_contiguous() for u in latents.values()):
        latents = {name: u.contiguous() for name, u in latents.items()}
    return {"latents": latents, "log_joint": state.log_joint}


def _moved(
    state: SweepState, result: Tree, info: SweepInfo, how: Adapting
) -> tuple[SweepState, SweepInfo]:
    """The state after moves, and the sweep's diagnostics."""
    weights = state.log_weight
    if result["log_weight"] is not weights.log_weight:
        weights = LogWeights(result["log_weight"])
    learned = {
        name: _learned(before, result["adaptation"].get(name), how)
        for name, before in state.adaptation.items()
    }
    moved = SweepState(
        result["latents"],
        weights,
        result["log_joint"],
        learned,
        result["memory"],
        _scored(result["scored"]),
    )
    info.step_size |= result["step_size"]
    info.num_bad_scores |= result["num_bad_scores"]
    info.statistic |= result["statistic"]
    info.num_bad = info.num_bad + result["num_bad"]
    return moved, info


def _in_use(step_size: Mapping[str, Tensor], how: Adapting) -> dict[str, Tensor]:
    """State of a step size whose steps are those that are made, adapting or not."""
    if how.step_size:
        return dict(step_size)
    return {**step_size, "log_step": step_size["log_average"]}


def _learned(before: Adaptation, after: Any, how: Adapting) -> Adaptation:
    """The adaptation state after a sweep; parts that do not adapt stay."""
    if after is None or not how.step_size:
        return before
    preconditioner = after[0] if how.preconditioner else before.preconditioner
    return replace(before, preconditioner=preconditioner, step_size=after[1])


def _tensor(number: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _silent(_: str) -> None: ...
