"""Warm starts: particles from an encoder, and what the encoder learns from in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from dcpc.annealing import spaced_ladder
from dcpc.divide.handlers import quiet
from dcpc.errors import OptionError, require_at_least
from dcpc.observed import Observed, num_data
from dcpc.problem import Problem
from dcpc.progress import ProgressBar
from dcpc.recombine import LogWeights
from dcpc.sweep import SweepState
from dcpc.training.modules.generative import GenerativeModule

__all__ = ["GuideObjective", "Start", "annealed", "guide_objective"]


@dataclass(frozen=True)
class Start:
    """Where particles start.

    Args:
        warm_up_epochs: Epochs at the start in which model and guide descend minus the evidence
            lower bound, as with `AmortisedModule`, and there are no particles yet.
        restart: Whether particles start from the guide at every visit, instead of where the last
            visit left them; null for what the algorithm does: `lpc` restarts.
        first_sweeps: Further sweeps where a batch holds data that have no particles yet.
        temperatures: Length of the annealing ladder by which particles of such data come from the
            prior, instead of by a draw: where posteriors have several modes, as those of positions
            do, particles that are drawn stay in poor ones. Costs a sweep per temperature; 0 for
            none.
        afresh: Where particles start at every visit without a guide: `prior` for draws of the
            latents, `means` for their conditional means, top down, the forward pass of classical
            predictive coding (for algorithms that do not weigh particles). Nothing is kept from
            visit to visit then, nor in checkpoints; null keeps particles.
        kl_warm_up_epochs: Of the warm-up, the epochs at its start in which the divergence of guide
            and prior counts by a share that rises to one.
        proposals: Whether every particle is offered a draw of the guide at every visit, which it
            takes by a Metropolis rule: those that lag behind start anew, and the posterior stays
            what it is. The guide then learns from the particles throughout.

    Raises:
        OptionError: A number below zero, or an unknown `afresh`.
    """

    warm_up_epochs: int = 0
    restart: bool | None = None
    first_sweeps: int = 0
    temperatures: int = 0
    afresh: Literal["prior", "means"] | None = None
    kl_warm_up_epochs: int = 0
    proposals: bool = False

    def __post_init__(self) -> None:
        require_at_least("model.start.warm_up_epochs", self.warm_up_epochs, 0)
        require_at_least("model.start.kl_warm_up_epochs", self.kl_warm_up_epochs, 0)
        if self.kl_warm_up_epochs > self.warm_up_epochs:
            raise OptionError(
                f"model.start.kl_warm_up_epochs={self.kl_warm_up_epochs} are a part of the "
                f"warm-up, which has model.start.warm_up_epochs={self.warm_up_epochs}; have fewer"
            )
        require_at_least("model.start.first_sweeps", self.first_sweeps, 0)
        require_at_least("model.start.temperatures", self.temperatures, 0)
        if self.afresh not in (None, "prior", "means"):
            raise OptionError(
                f"model.start.afresh must be null, 'prior' or 'means', got {self.afresh!r}"
            )

    def check(self, has_guide: bool, is_exact: bool) -> None:
        """Checks that particles can start so.

        Args:
            has_guide: Whether there is a guide.
            is_exact: Whether the algorithm leaves posteriors invariant.

        Raises:
            OptionError: They cannot.
        """
        given = "give model.guide, an encoder that draws the model's latents, or"
        annealing = f"model.start.temperatures={self.temperatures}"
        refusals = {
            f"model.start.warm_up_epochs={self.warm_up_epochs} needs a guide to warm up with: "
            f"{given} leave the epochs at 0": self.warm_up_epochs and not has_guide,
            "model.start.proposals=True needs a guide to draw proposals from: "
            f"{given} leave it at false": self.proposals and not has_guide,
            "model.start.proposals=True needs an algorithm that leaves posteriors invariant, dcpc "
            "or dcpc-smc; choose one as model.algorithm, or leave it at false": self.proposals
            and not is_exact,
            "model.start.proposals=True offers kept particles draws of the guide, and "
            "model.start.restart=True keeps none; leave one of them out": self.proposals
            and self.restart,
            "model.start.restart=True needs a guide to start particles from: "
            f"{given} leave restart at null": self.restart and not has_guide,
            f"model.start.afresh={self.afresh!r} is a start without a guide, and there is one; "
            "leave it at null, and set model.start.restart to start from the guide at every "
            "visit": self.afresh is not None and has_guide,
            "model.start.afresh='means' gives particles no density, by which dcpc and dcpc-smc "
            "weigh them; use 'prior', or an algorithm that does not weigh: pgd, mpgd, lpc, mcpc, "
            "pc or ipc": self.afresh == "means" and is_exact,
            f"{annealing} anneals particles from the prior, but model.guide gives them another "
            "start; leave one of the two out": self.temperatures and has_guide,
            f"{annealing} needs an algorithm that leaves posteriors invariant, dcpc or dcpc-smc; "
            "choose one as model.algorithm, or set temperatures to 0": self.temperatures
            and not is_exact,
        }
        for refusal, holds in refusals.items():
            if holds:
                raise OptionError(refusal)


def annealed(problem: Problem, num_temperatures: int) -> SweepState:
    """Particles that come from the prior along a ladder, with weights of mean one.

    One climb, in which the proposals adapt: the particles are to be swept on, not to tell the
    evidence.

    Args:
        problem: A model bound to its data.
        num_temperatures: Length of the ladder.
    """
    ladder = spaced_ladder(num_temperatures)
    start, silent = problem.starting_density({}), ProgressBar(show=False)
    state = problem.anneal_once(start, "", 1.0, silent, ladder).state
    weights = state.log_weight
    return replace(state, log_weight=LogWeights(weights.log_weight - weights.log_mean()))


GuideObjective = Callable[[GenerativeModule, Problem, SweepState, Observed], dict[str, Tensor]]
"""The guide's losses per datum, in nats, by name, once the particles of a batch have been swept."""


def guide_objective(start: Start, has_guide: bool, restarts: bool) -> GuideObjective:
    """What the guide learns from beside particles.

    It learns from the swept particles, unless it has warmed up and makes no proposals. Single
    particles are noisy teachers, so then it goes on by its bound where particles start from it, and
    rests elsewhere.
    """
    if has_guide and (start.proposals or not start.warm_up_epochs):
        return _from_particles
    return _by_its_bound if has_guide and restarts else _at_rest


def _from_particles(
    module: GenerativeModule, problem: Problem, state: SweepState, x: Observed
) -> dict[str, Tensor]:
    with _frozen(module.model):
        return {"guide_loss": problem.guide_loss(state) / num_data(x)}


def _by_its_bound(
    module: GenerativeModule, problem: Problem, state: SweepState, x: Observed
) -> dict[str, Tensor]:
    with quiet(), _frozen(module.model):  # Pyro warns of parameters that do not learn
        return {"negative_elbo": module.negative_elbo(x)}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A block of code in which a model does not learn, nor through a guide that uses its layers."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _at_rest(
    module: GenerativeModule, problem: Problem, state: SweepState, x: Observed
) -> dict[str, Tensor]:
    return {}
