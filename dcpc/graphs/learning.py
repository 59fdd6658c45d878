"""Sweeps of learning: evaluation, moves and the gradient of the loss as one graph.

Where parameters learn between sweeps, a sweep begins with an evaluation of the particles under the
new ones, and a loss is taken after it. The three share most of what they compute: the moves begin
at what was evaluated, and the loss is taken where moves end, which was evaluated too. As one graph
in stages, nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcpc.graphs.recording import NotRecordable, record
from dcpc.graphs.stages import Run, Stages
from dcpc.graphs.tiers import RECORD_AFTER, Mode, are_results, first_line, pays_to_compile
from dcpc.graphs.trees import leaves_of
from dcpc.seeding import random_state_kept

__all__ = ["EVALUATE", "LOSS", "MOVE", "LearningSweep", "Left", "known_loss"]

Tree = dict[str, Any]

EVALUATE, MOVE, LOSS = range(3)
"""The stages."""


class LearningSweep:
    """A sweep and the loss after it, recorded once there were several.

    Args:
        evaluate: Evaluates the particles: a function of settled and moving trees.
        move: Moves them: a function of these, with what `evaluate` gave among the moving.
        loss: The loss of particles: a function of a settled tree, latents and weights.
        mode: True to compile it, `auto` to compile it where that pays.

    Attributes:
        refusal: Why it is not recorded, or not compiled; empty if it is, or not yet.
        is_compiled: Whether compiled code runs.
    """

    def __init__(
        self,
        evaluate: Callable[[Tree, Tree], Tree],
        move: Callable[[Tree, Tree], Tree],
        loss: Callable[[Tree, Tree, Tensor], Tensor],
        mode: Mode = "auto",
    ) -> None:
        self.refusal = ""
        self.is_compiled = False
        self._mode = mode
        self._evaluate, self._move, self._loss = evaluate, move, loss
        self._parameters: list[Tensor] = []
        self._stages: Stages | None = None
        self._num_calls = 0
        self._num_recorded = 0
        self._follows: bool | None = None

    @property
    def num_operators(self) -> int:
        """Number of operators of the recording; 0 if there is none."""
        return 0 if self._stages is None else self._stages.num_operators

    def start(
        self,
        settled: Tree,
        moving: Tree,
        at_once: bool = False,
        num_expected: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> Run | None:
        """A run of the recording; None as long as there is none.

        Args:
            settled: What does not differ between particles.
            moving: What does.
            at_once: Whether to record now, instead of after a few calls.
            num_expected: Number of calls that are known to come.
            say: Told what takes long.
        """
        self._num_calls += 1
        if self._stages is None and (at_once or self._num_calls > RECORD_AFTER):
            self._record(settled, moving, is_exact=not at_once)
            if self._stages is not None and at_once:
                self._compile(self._stages, settled, moving, num_expected, say)
        if self._stages is None:
            return None
        self._num_recorded += 1
        if self._num_recorded == 2:  # on other values than it was recorded with
            self._check(self._stages, settled, moving)
        return None if self._stages is None else self._stages.start()

    def follows(self, run: Run, ancestors: Tensor, settled: Tree, moving: Tree) -> bool:
        """Whether a run goes on after its evaluation with particles that were resampled.

        Args:
            run: The run.
            ancestors: Whom each particle comes from, `(K, *population)`.
            settled: What does not differ between particles.
            moving: What does, resampled; with their evaluations.
        """
        if self._follows is None:
            trial, given = run.copy(), moving | {"evaluations": {}}
            self._follows = trial.take(ancestors)
            if self._follows:
                leaves = leaves_of((settled, given))
                with random_state_kept():
                    results = tuple(trial.stage(index, leaves) for index in (MOVE, LOSS))
                with torch.no_grad():
                    self._follows = are_results(results, self._after, settled, moving)
        return self._follows and run.take(ancestors)

    def loss(self, run: Run, leaves: Sequence[Tensor]) -> Tensor:
        """The loss after the moves of a run, whose gradient is known."""
        result = run.stage(LOSS, leaves)
        return known_loss(result["loss"], result["gradients"], self._parameters)

    def _record(self, settled: Tree, moving: Tree, is_exact: bool) -> None:
        if self.refusal:
            return
        with torch.enable_grad():
            loss = self._loss(settled, moving["latents"], moving["weights"])
        self._parameters = _leaves_of(loss)
        try:
            with random_state_kept():
                recording = record(self._whole, settled, moving, is_exact=is_exact, inverts=True)
        except NotRecordable as error:
            self.refusal = str(error)
        else:
            self._stages = Stages(recording)

    def _compile(
        self,
        stages: Stages,
        settled: Tree,
        moving: Tree,
        num_expected: int,
        say: Callable[[str], None],
    ) -> None:
        """Compiles the stages where that pays; they run without a compiler where it fails."""
        if not pays_to_compile(stages.recording, self._mode, num_expected):
            return
        say("compiling the training step")
        try:
            with random_state_kept():
                self._stages = stages.compiled(leaves_of((settled, moving)))
        except Exception as error:
            self.refusal = f"torch's compiler failed: {first_line(error)}"
        else:
            self.is_compiled = True

    def _whole(self, settled: Tree, moving: Tree) -> tuple[Tree, Tree, Tree]:
        first = self._evaluate(settled, moving)
        return first, *self._after(settled, moving | first)

    def _after(self, settled: Tree, moving: Tree) -> tuple[Tree, Tree]:
        """Moves and loss after an evaluation."""
        moved = self._move(settled, moving)
        with torch.enable_grad():
            loss = self._loss(settled, moved["latents"], moving["weights"])
            gradients = torch.autograd.grad(loss, self._parameters)
        return moved, {"loss": loss.detach(), "gradients": list(gradients)}

    def _check(self, stages: Stages, settled: Tree, moving: Tree) -> None:
        """Compares the recording with what was recorded."""
        leaves = leaves_of((settled, moving))
        run = stages.start()
        with random_state_kept():
            results = tuple(run.stage(index, leaves) for index in (EVALUATE, MOVE, LOSS))
        with torch.no_grad():
            is_right = are_results(results, self._whole, settled, moving)
        if not is_right:
            self.refusal, self._stages = "its recording does not give the same numbers", None


@dataclass(frozen=True)
class Left:
    """What the moves of a sweep leave behind for the loss after them.

    Attributes:
        sweep: The sweep.
        run: Its run.
        settled: What does not differ between particles.
        moving: What does.
        latents: The latents after the moves.
    """

    sweep: LearningSweep
    run: Run
    settled: Tree
    moving: Tree
    latents: dict[str, Tensor]

    def loss(self, weights: Tensor) -> Tensor:
        """The loss, given the particles' normalised weights."""
        leaves = leaves_of((self.settled, self.moving | {"weights": weights}))
        return self.sweep.loss(self.run, leaves)


class _Known(torch.autograd.Function):
    """A value whose gradients in leaf tensors are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * gradient for gradient in ctx.gradients)


def known_loss(value: Tensor, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """A loss whose gradients in leaf tensors are known already."""
    with torch.enable_grad():
        return _Known.apply(value, gradients, *parameters)


def _leaves_of(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss can be differentiated by."""
    found: dict[int, Tensor] = {}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack.extend(function for function, _ in node.next_functions)
    return list(found.values())
