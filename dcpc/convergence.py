"""Convergence checks of a posterior on its own draws, and the warning they raise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcpc.advice import advise
from dcpc.draws import mixing, weakest
from dcpc.posterior import Posterior

MAX_R_HAT = 1.01
"""R-hat above which parts of the draws disagree (Vehtari et al. 2021)."""

MIN_ESS = 400.0
"""ESS, of bulk or tails, below which estimates of quality are not to be trusted either (ibid.)."""

MOVED = 1.1
"""Independent draws that every particle must be worth; one that never moves is worth one."""

FEW_FAMILIES = 10.0
"""Effective number of families below which they cannot tell whether they are alike."""

FORGOTTEN = 5.0
"""Independent draws that every particle must be worth for its ancestor to be forgotten.

The warm-up, by default as long as what is kept, is then worth as many: `exp(-5)` is left.
"""

LOW_ACCEPTANCE = 1.0 / 3.0
"""Acceptance, over its target, below which proposals do not fit the target."""

HIGH_ACCEPTANCE = 0.1
"""Rejection, over its target, below which steps are too short, where particles hardly move."""

COLLAPSED = 1e-3
"""Step size, over `d^(-1/3)`, below which it has collapsed, where steps are preconditioned."""

MANY_BAD = 0.01
"""Share of proposals without a log-density that is too large."""

MIN_DISTINCT = 0.5
"""Share of particles that must differ."""

MAX_JUDGED = 1 << 21
"""Draws of a site that are judged; of more, the values that seem to mix worst."""

MAX_NAMES = 4
"""Sites that a message lists."""


class ConvergenceWarning(UserWarning):
    """A posterior may be off: `posterior.warnings` says why, and what to do."""


@dataclass(frozen=True)
class SweepRecord:
    """Diagnostics of the sweeps at the posterior that do not adapt.

    Attributes:
        num_sweeps: Number of sweeps, those that adapted included.
        target: Acceptance (or other statistic) that the step size adapts to; None for none.
        sizes: By unit, number of values that move together.
        adapts_step_size: Whether step sizes were adapted.
        is_preconditioned: Whether step sizes are in units of the target's own scale.
        is_random: Whether moves draw noise; else there is no distribution to judge.
        bad_share: Share of proposals whose log-density was NaN or infinite.
        undefined: Sites whose log-density is NaN or plus infinity near the posterior. Elsewhere
            proposals without one left a support inside the model, as they may.
        bad_scores: By unit, number of scores that were NaN or infinite at a finite log-density.
        forgotten: By latent, independent values that a lineage has taken in the sweeps that do not
            adapt, `(*batch, *event)`, where particles are no chains; else empty.
        active: By latent, which elements are a part of the target; latents whose elements all are
            may be left out.
    """

    num_sweeps: int
    target: float | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    adapts_step_size: bool = True
    is_preconditioned: bool = True
    is_random: bool = True
    bad_share: float = 0.0
    undefined: Sequence[str] = ()
    bad_scores: Mapping[str, float] = field(default_factory=dict)
    forgotten: Mapping[str, Tensor] = field(default_factory=dict)
    active: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Mixing:
    """The worst R-hat and ESS of a latent's values, and the design effect of families there."""

    r_hat: float
    ess: float
    tail_ess: float
    design_effect: float

    @property
    def is_apart(self) -> bool:
        """Whether parts of the draws disagree."""
        return self.r_hat > MAX_R_HAT

    @property
    def chain_ess(self) -> float:
        """ESS of the particles as chains, families apart."""
        return self.ess * self.design_effect


def find_problems(posterior: Posterior, record: SweepRecord) -> tuple[str, ...]:
    """Messages about what is wrong with a posterior; none where nothing is.

    Args:
        posterior: The posterior.
        record: Record of its sweeps.
    """
    if not record.is_random:
        return (*_interruption(posterior), *_densities(record), *_evidence(posterior))
    found = {
        name: _mixing(posterior, name, record.active.get(name))
        for name in posterior.unit_of
        if name in posterior.samples
    }
    return (
        *_interruption(posterior),
        *_draws(posterior, record, found),
        *_lineages(posterior, record),
        *_moves(posterior, record, found),
        *_densities(record),
        *_duplicates(posterior, record),
        *_evidence(posterior),
    )


def format_problems(messages: Sequence[str]) -> str:
    """The text of the warning."""
    lines = ["the posterior may be off:", *(f"- {message}" for message in messages)]
    return "\n".join([*lines, "posterior.summary() shows R-hat, ESS and MCSE of every value."])


# -- draws -----------------------------------------------------------------------------------------


def _draws(
    posterior: Posterior, record: SweepRecord, found: Mapping[str, _Mixing]
) -> Iterator[str]:
    """R-hat, ESS and families, and what to do about them."""
    num_particles = posterior.num_particles
    if posterior.describes_history:
        what, enough = "bulk ESS", max(MIN_ESS, MOVED * num_particles)
    else:
        what, enough = "the effective number of final particles", MIN_ESS
    apart = {name: f"{about.r_hat:.3f}" for name, about in found.items() if about.is_apart}
    slow = {name: f"{about.ess:.0f}" for name, about in found.items() if about.ess < enough}
    thin = {
        name: f"{about.tail_ess:.0f}" for name, about in found.items() if about.tail_ess < MIN_ESS
    }
    few = _few_families(
        posterior, min((about.chain_ess for about in found.values()), default=math.inf)
    )
    if apart:
        yield (
            f"R-hat is {_list(apart)} (more than {MAX_R_HAT}): parts of the particles or of the "
            "sweeps disagree"
        )
    if slow:
        yield f"{what} is {_list(slow)} (less than {enough:.0f})"
    if thin:
        yield (
            f"tail ESS is {_list(thin)} (less than {MIN_ESS:.0f}): few draws tell how much mass "
            "the tails have, or a mode far off; quantiles, and the sd, may be off by more than "
            "they seem"
        )
    if few:
        yield few
    if apart or slow or thin or few:
        yield f"what to do: {advise(posterior, record.num_sweeps, bool(few))}"


def _mixing(posterior: Posterior, name: str, active: Tensor | None) -> _Mixing:
    """R-hat, ESS and design effect of a latent, over the elements that are a part of the target."""
    if not posterior.describes_history:
        ess = posterior.statistics()[name]["ess_bulk"]
        ess = ess[active] if _fits(active, ess) else ess
        return _Mixing(math.nan, _worst(ess, torch.amin, math.inf), math.inf, 1.0)
    draws = posterior.draws(name)
    families = posterior.families_of(name) if posterior.is_chains else None
    shape = posterior.samples[name].shape[1:]
    keep = draws.flatten(1).amax(1) > draws.flatten(1).amin(1)
    if active is not None and active.shape == shape:
        keep &= active.flatten()
    rows = keep.nonzero()[:, 0]
    count = max(2, MAX_JUDGED // (draws.shape[1] * draws.shape[2]))
    if len(rows) > count:
        rows = rows[weakest(draws[rows], count, posterior.is_chains)]
    if not len(rows):
        return _Mixing(math.nan, math.inf, math.inf, 1.0)
    about = mixing(draws[rows], None if families is None else families[rows], posterior.is_chains)
    return _Mixing(
        _worst(about.r_hat, torch.amax, math.nan),
        _worst(about.ess_bulk, torch.amin, math.inf),
        _worst(about.ess_tail, torch.amin, math.inf),
        _worst(about.design_effect, torch.amax, 1.0),
    )


def _few_families(posterior: Posterior, ess: float) -> str:
    """The message that few families are left whose ancestors are not forgotten.

    Args:
        posterior: The posterior.
        ess: The worst ESS of the particles as chains, families apart.
    """
    families = posterior.families
    if families is None or posterior.num_particles == 1:
        return ""
    counts = torch.zeros(families.shape, dtype=torch.float64, device=families.device)
    counts.scatter_add_(0, families, torch.ones_like(counts))
    effective = (counts / posterior.num_particles).square().sum(0).reciprocal().min().item()
    if effective >= min(FEW_FAMILIES, 0.5 * (posterior.num_particles + 1)):
        return ""
    if posterior.describes_history and ess >= FORGOTTEN * posterior.num_particles:
        return ""
    return (
        f"the {posterior.num_particles} particles descend from {effective:.1f} (effectively) of "
        "those that they started as, and nothing shows that they have forgotten it"
    )


def _lineages(posterior: Posterior, record: SweepRecord) -> Iterator[str]:
    """Resampled particles that have not moved far enough to forget their common ancestors."""
    short = {}
    for name, values in record.forgotten.items():
        active = record.active.get(name)
        values = values[active] if _fits(active, values) else values
        least = _worst(values, torch.amin, math.inf)
        if least < FORGOTTEN:
            short[name] = f"{least:.2g}"
    if short:
        yield (
            "particles are resampled, and since the warm-up a lineage has taken no more than "
            f"{_list(short)} independent values (less than {FORGOTTEN:.0f}), so that they may all "
            "be where few ancestors were: sweep longer, or move correlated latents in one block"
        )


def _interruption(posterior: Posterior) -> Iterator[str]:
    told = posterior.continuation
    if told is not None:
        yield (
            f"the run was interrupted after {told.num_done} of {told.num_sweeps} sweeps, of which "
            f"{told.num_warmup} are warm-up; DCPC.resume(posterior, ...), with the arguments of "
            f"the model, makes the other {told.num_left}"
        )


# -- moves, densities, particles, evidence ---------------------------------------------------------


def _moves(
    posterior: Posterior, record: SweepRecord, found: Mapping[str, _Mixing]
) -> Iterator[str]:
    """Acceptance rates and step sizes."""
    if record.target is None or not posterior.is_exact:
        return
    low = LOW_ACCEPTANCE * record.target
    high = 1.0 - HIGH_ACCEPTANCE * (1.0 - record.target)
    lazy = {
        posterior.unit_of[name]
        for name, about in found.items()
        if about.chain_ess < FORGOTTEN * posterior.num_particles
    }
    far = {
        name: f"{rate:.2g}"
        for name, rate in posterior.acceptance.items()
        if rate < low or (rate > high and name in lazy)
    }
    if far:
        yield (
            f"acceptance is {_list(far)}, its target {record.target:g}: adapt longer, "
            "run(..., num_warmup=...), and leave step_size out"
        )
    if not (record.adapts_step_size and record.is_preconditioned):
        return
    collapsed = {
        name: f"{step:.1g}"
        for name, step in posterior.step_size.items()
        if step < COLLAPSED * record.sizes.get(name, 1) ** (-1.0 / 3.0)
    }
    if collapsed:
        yield (
            f"the step size has collapsed to {_list(collapsed)}: the scale of the target varies "
            "by orders of magnitude there; write the model non-centred, or rescale it"
        )


def _densities(record: SweepRecord) -> Iterator[str]:
    if record.bad_share > MANY_BAD and record.undefined:
        yield (
            f"{record.bad_share:.0%} of the proposals were rejected for a log-density that is NaN "
            f"or infinite; near the posterior it is NaN at {_list(dict.fromkeys(record.undefined))}"
            ": look for overflow, logarithms of zero and roots of negative numbers"
        )
    bad = {name: f"{count:.0f} times" for name, count in record.bad_scores.items() if count}
    if bad:
        yield (
            f"the score was NaN or infinite where the log-density is not, {_list(bad)}: the "
            "gradient overflows or hits a kink (torch.where and sqrt at zero are the usual causes)"
        )


def _duplicates(posterior: Posterior, record: SweepRecord) -> Iterator[str]:
    """Particles that are identical in elements that moves should have told apart."""
    if record.num_sweeps == 0 or posterior.num_particles < 4 or not posterior.is_exact:
        return
    same = {}
    for name, u in posterior.state.latents.items():
        if name in posterior.discrete:  # many particles share each of its values
            continue
        active = record.active.get(name)
        values = u.reshape(len(u), -1)
        if active is not None:
            values = values[:, active.flatten()]
        if values.numel():
            changes = values.sort(0).values.diff(dim=0) != 0
            share = (1 + changes.sum(0)).min().item() / posterior.num_particles
            if share < MIN_DISTINCT:
                same[name] = f"{share:.0%}"
    if same:
        single = any(posterior.state.latents[name].dtype == torch.float32 for name in same)
        precision = (
            ", or values are too near to each other for single precision; make the model double, "
            "torch.set_default_dtype(torch.float64)"
        )
        yield (
            f"of the particles only {_list(same)} differ: moves are hardly ever accepted; adapt "
            "longer, run(..., num_sweeps=...), or start nearer, run(..., initial_values={...})"
            f"{precision if single else ''}"
        )


def _evidence(posterior: Posterior) -> Iterator[str]:
    error = posterior.evidence.standard_error
    if posterior.evidence.misses_prior_mass:
        yield (
            "draws of the prior show more evidence than the particles from the guide or the "
            "initial values have found, so that these miss a part of the posterior: leave them "
            "out, or widen them"
        )
    if error is None or not bool(error.isinf().any()):
        return
    cells = f" in {int(error.isinf().sum())} of {error.numel()} cells" if error.dim() else ""
    yield (
        f"the evidence estimate is not reliable{cells}: too few of the initial particles have "
        "descendants; take more particles, or smaller steps of temperature, "
        "run(..., conditional_ess=0.95)"
    )


def _worst(values: Tensor, reduce: Callable[[Tensor], Tensor], default: float) -> float:
    """The largest or smallest number that is not NaN, as `reduce` says."""
    values = values.flatten()
    values = values[~values.isnan()]
    return float(reduce(values)) if len(values) else default


def _fits(active: Tensor | None, values: Tensor) -> bool:
    return active is not None and active.shape == values.shape


def _list(values: Mapping[str, str | None]) -> str:
    """`1.2 at 'a', 1.3 at 'b' and similar at 3 more`; names alone where there are no values."""
    shown = [
        f"'{name}'" if value is None else f"{value} at '{name}'"
        for name, value in list(values.items())[:MAX_NAMES]
    ]
    rest = len(values) - len(shown)
    return ", ".join(shown) + (f" and similar at {rest} more" if rest else "")


__all__ = ["ConvergenceWarning", "SweepRecord", "find_problems", "format_problems"]
