"""Warm starts: particles from an encoder, and what the encoder learns from in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.func import functional_call

from dcpc.divide.handlers import quiet
from dcpc.errors import OptionError, require_at_least
from dcpc.observed import Observed, num_data
from dcpc.problem import Problem
from dcpc.sweep import SweepState
from dcpc.training.modules.generative import GenerativeModule

__all__ = ["GuideObjective", "Start", "guide_objective"]


@dataclass(frozen=True)
class Start:
    """Where particles start.

    Args:
        warm_up_epochs: Epochs at the start in which model and guide descend minus the evidence
            lower bound, as with `AmortisedModule`, and there are no particles yet.
        restart: Whether particles start from the guide at every visit, instead of where the last
            visit left them; null for what the algorithm does: `lpc` restarts.
        first_sweeps: Further sweeps where a batch holds data that have no particles yet.
        afresh: Where particles start at every visit without a guide: `prior` for draws of the
            latents, `means` for their conditional means, top down, the forward pass of classical
            predictive coding (for algorithms that do not weigh particles). Nothing is kept from
            visit to visit then, nor in checkpoints; null keeps particles.

    Raises:
        OptionError: A number below zero, or an unknown `afresh`.
    """

    warm_up_epochs: int = 0
    restart: bool | None = None
    first_sweeps: int = 0
    afresh: Literal["prior", "means"] | None = None

    def __post_init__(self) -> None:
        require_at_least("model.start.warm_up_epochs", self.warm_up_epochs, 0)
        require_at_least("model.start.first_sweeps", self.first_sweeps, 0)
        if self.afresh not in (None, "prior", "means"):
            raise OptionError(
                f"model.start.afresh must be null, 'prior' or 'means', got {self.afresh!r}"
            )

    def check_no_guide(self) -> None:
        """Checks that nothing here is at odds with a guide.

        Raises:
            OptionError: Something is.
        """
        if self.afresh is not None:
            raise OptionError(
                f"model.start.afresh={self.afresh!r} is a start without a guide, and there is one; "
                "leave it at null, and set model.start.restart to start from the guide at every "
                "visit"
            )

    def check_guide(self) -> None:
        """Checks that nothing here needs a guide.

        Raises:
            OptionError: Something does.
        """
        given = "give model.guide, an encoder that draws the model's latents, or"
        if self.warm_up_epochs:
            raise OptionError(
                f"model.start.warm_up_epochs={self.warm_up_epochs} needs a guide to warm up with: "
                f"{given} leave the epochs at 0"
            )
        if self.restart:
            raise OptionError(
                "model.start.restart=True needs a guide to start particles from: "
                f"{given} leave restart at null"
            )


GuideObjective = Callable[[GenerativeModule, Problem, SweepState, Observed], dict[str, Tensor]]
"""The guide's losses per datum, in nats, by name, once the particles of a batch have been swept."""


def guide_objective(start: Start, has_guide: bool, restarts: bool) -> GuideObjective:
    """What the guide learns from beside particles.

    It learns from the swept particles, unless it has warmed up. Single particles are noisy
    teachers, so then it goes on by its bound where particles start from it, and rests elsewhere.
    """
    if has_guide and not start.warm_up_epochs:
        return _from_particles
    return _by_its_bound if has_guide and restarts else _at_rest


def _from_particles(
    module: GenerativeModule, problem: Problem, state: SweepState, x: Observed
) -> dict[str, Tensor]:
    return {"guide_loss": problem.guide_loss(state) / num_data(x)}


def _by_its_bound(
    module: GenerativeModule, problem: Problem, state: SweepState, x: Observed
) -> dict[str, Tensor]:
    frozen = {name: value.detach() for name, value in module.model.named_parameters()}
    with quiet():  # Pyro's warning of parameters that do not learn
        return {
            "negative_elbo": module.negative_elbo(x, partial(functional_call, module.model, frozen))
        }


def _at_rest(
    module: GenerativeModule, problem: Problem, state: SweepState, x: Observed
) -> dict[str, Tensor]:
    return {}
