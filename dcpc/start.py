"""Initial particles: from the prior, a reference distribution or a guide, with proper weights.

In every case the state's `log_joint` is the log-density that the particles were drawn from, so
that the first reweighting to the target gives each its importance weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from dcpc.divide import Arguments, Density, Division, Reference, prior_particles
from dcpc.divide.handlers import layers, running
from dcpc.divide.masking import masked
from dcpc.divide.model import Model, constrained_shapes, sample_prior, unconstrain
from dcpc.divide.program import map_particles
from dcpc.divide.transport import coordinates_of, values_of
from dcpc.divide.unit import sum_to_plates
from dcpc.divide.vectorised import drawing
from dcpc.errors import ModelError, OptionError
from dcpc.recombine import LogWeights
from dcpc.seeding import random_state_kept
from dcpc.sweep import SweepState

NUM_REFERENCE_DRAWS = 200
"""Prior draws by whose spread latents start whose prior a handler masks or scales."""

REFERENCE_SCALE = 2.0
"""Spread, in unconstrained space, that latents with flat priors start with."""

INITIAL_SCALE = 1.0
"""Spread, in unconstrained space, around initial values that the user gives."""


def starting_references(
    density: Density, arguments: Arguments, initial_values: Mapping[str, Tensor]
) -> dict[str, Reference]:
    """Starting distributions of the latents with flat priors or with initial values.

    Args:
        initial_values: Constrained values by site.

    Raises:
        OptionError: A name that is not a latent, or a value that the site cannot have.
        ModelError: A handler masks or scales the prior of a discrete latent.
    """
    division, references = density.division, {}
    if initial_values:
        given = _unconstrained(division, initial_values, *arguments.rebuild(arguments.tensors))
        references = {name: Reference(u, INITIAL_SCALE) for name, u in given.items()}
    missing = [name for name in density.without_prior() if name not in references]
    if not missing:
        return references
    discrete = [name for name in missing if division.sites[name].discrete]
    if discrete:
        raise ModelError(
            f"the prior of discrete latent '{discrete[0]}' is masked or scaled by a handler, so "
            "that there is no distribution to draw its first values from; take the handler away "
            "from its site, or put the power of its probability into a pyro.factor"
        )
    draws = prior_particles(division.program.model, division.sites, arguments, NUM_REFERENCE_DRAWS)
    for name in missing:
        if division.sites[name].is_improper:
            references[name] = Reference(torch.zeros_like(draws[name][0]), REFERENCE_SCALE)
        else:  # as wide as the prior before a handler scaled or masked it
            spread = draws[name].std(0).clamp(min=1e-6)
            references[name] = Reference(draws[name].mean(0), spread)
    return references


def _unconstrained(
    division: Division, values: Mapping[str, Tensor], args: tuple, kwargs: dict
) -> dict[str, Tensor]:
    """Unconstrained initial values, checked one by one.

    Raises:
        OptionError: A value that is NaN, of the wrong shape or outside its support, or a name
            that is not a continuous latent.
    """
    unknown = set(values) - set(division.latents)
    if unknown:
        raise OptionError(
            f"initial_values names {sorted(unknown)}, but the latents are {division.latents}"
        )
    discrete = [name for name in values if division.sites[name].discrete]
    if discrete:
        raise OptionError(
            f"initial_values names '{discrete[0]}', a discrete latent, which is drawn given the "
            "others; leave it out"
        )
    tensors = {}
    for name, value in values.items():
        try:
            tensor = torch.as_tensor(value, device=division.program.example[name].device)
        except (TypeError, ValueError, RuntimeError):
            raise OptionError(
                f"initial_values['{name}'] must be a tensor or a number, got {value!r}"
            ) from None
        if not tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        if not bool(tensor.isfinite().all()):
            raise OptionError(
                f"initial_values['{name}'] has NaN or infinite entries; give finite values"
            )
        tensors[name] = tensor
    model = division.program.model
    supports = constrained_shapes(model, args, kwargs, list(tensors))
    for name, tensor in tensors.items():
        shape, support = supports[name]
        if tensor.shape != shape:
            raise OptionError(
                f"initial_values['{name}'] has shape {tuple(tensor.shape)}, but site '{name}' has "
                f"values of shape {tuple(shape)}"
            )
        if not bool(support.check(tensor).all()):
            raise OptionError(
                f"initial_values['{name}'] lies outside the support {support} of site '{name}': "
                f"got, for example, {float(tensor.flatten()[0]):.6g}"
            )
    given = unconstrain(model, tensors, args, kwargs, set(tensors))
    for name, u in given.items():
        if not bool(u.isfinite().all()):
            raise OptionError(
                f"initial_values['{name}'] lies on the edge of the support of site '{name}'; give "
                "a value inside of it"
            )
    return given


def draw_from_prior(density: Density, arguments: Arguments, num_particles: int) -> SweepState:
    """Independent particles from the prior, or from references where a latent has one.

    What depends on a latent with a reference is drawn given its value from there.
    """
    program, given = density.division.program, {}
    for name, reference in density.tempering.references.items():
        like = program.example[name]
        noise = like.new_empty((num_particles, *like.shape[1:])).normal_()
        given[name] = reference.loc + reference.scale * noise
    latents = prior_particles(program.model, program.sites, arguments, num_particles, given)
    if density.tempering.joint is not None:
        (group,) = density.division.groups
        drawn = density.tempering.joint.draw(group.pack(latents).squeeze(-2))
        latents = group.unpack(drawn.unsqueeze(-2))
    log_joint = density.at(0.0).log_joint(latents)
    return SweepState(latents, LogWeights(torch.zeros_like(log_joint)), log_joint)


def place_at_means(division: Division, arguments: Arguments, num_particles: int) -> SweepState:
    """Particles at the latents' conditional means, top down: a forward pass through the model.

    All are alike, and have no density: for algorithms that do not weigh particles.

    Raises:
        ModelError: The conditional distribution of a latent has no mean that it could take.
    """
    program = division.program
    args, kwargs = arguments.rebuild(arguments.tensors)
    latents = sample_prior(program.model, args, kwargs, program.sites.latents, at_means=True)
    for name, u in latents.items():
        if program.sites[name].discrete or not bool(u.isfinite().all()):
            raise ModelError(
                f"site '{name}' has no value at the mean of its prior for particles to start from: "
                "it is discrete, or the mean is none of its values; start them from the prior"
            )
    latents = {name: u.expand(num_particles, *u.shape).clone() for name, u in latents.items()}
    zeros = next(iter(latents.values())).new_zeros((num_particles, *division.population_shape))
    return SweepState(latents, LogWeights(zeros), zeros)


def draw_from_guide(
    guide: Model, division: Division, arguments: Arguments, num_particles: int
) -> SweepState:
    """Independent particles from a guide; the state refers to its log-density.

    Values that are masked out in the model are no part of either density.

    Raises:
        OptionError: The guide does not sample all latents, or their coordinates are relative to
            latents that are summed out.
    """
    standardised = [name for name in division.latents if division.sites[name].is_standardised]
    if standardised and set(division.summed_out) - set(division.barren):
        raise OptionError(
            f"sites {standardised} are non-centred in a model that sums {division.summed_out} out, "
            "so that draws of a guide have no coordinates of their own; leave either out"
        )
    args, kwargs = arguments.rebuild(arguments.tensors)
    active = division.activity(arguments.tensors).latents

    def draw(_: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), running(guide, args, kwargs), drawing():
            trace = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
            missing = set(division.latents) - set(trace.nodes)
            if missing:
                raise OptionError(
                    f"the guide does not sample latent site(s) {sorted(missing)}; it samples "
                    f"{list(trace.stochastic_nodes)}"
                )
            nodes: dict[str, Any] = trace.nodes
            values = {name: nodes[name]["value"] for name in division.latents}
            drawn, log_dets = coordinates_of(division.program.model, values, args, kwargs)
            log_guide = _with_log_dets(
                _log_density(trace, division, active, observed=False), log_dets, division, active
            )
        return {**drawn, "_log_guide": log_guide}

    with running(guide, args, kwargs):
        guide(*args, **kwargs)  # an autoguide sets itself up in its first call
    latents = map_particles(draw, torch.zeros(num_particles))
    log_guide = latents.pop("_log_guide")
    return SweepState(latents, LogWeights(torch.zeros_like(log_guide)), log_guide)


def guide_log_density(
    guide: Model, division: Division, arguments: Arguments, latents: Mapping[str, Tensor]
) -> Tensor:
    """Log-density of particles under a guide, `(K, *population)`.

    That of unconstrained values, as `draw_from_guide` has it.

    Args:
        latents: Unconstrained values `(K, *batch, *event)` of all latents.
    """
    args, kwargs = arguments.rebuild(arguments.tensors)
    active = division.activity(arguments.tensors).latents

    def evaluate(particle: dict[str, Tensor]) -> dict[str, Tensor]:
        values, log_dets = values_of(division.program.model, particle, args, kwargs)
        with torch.no_grad(), running(guide, args, kwargs):
            given = pyro.poutine.block(
                pyro.poutine.condition(guide, values), expose=division.latents
            )
            trace = pyro.poutine.trace(given).get_trace(*args, **kwargs)
            log_guide = _log_density(trace, division, active, observed=True)
        return {"": _with_log_dets(log_guide, log_dets, division, active)}

    return map_particles(evaluate, dict(latents))[""]


def guide_refusal(guide: Model, division: Division, arguments: Arguments) -> str:
    """Why a guide's draws have no proper weights; empty if they have.

    Its density is that of all its random numbers, which must be as many as the latents that it
    gives: a point (`AutoDelta`) has fewer, a guide whose auxiliary variables are to be summed out
    has more. The latents of `AutoContinuous` are `Delta`s at images of auxiliary numbers, one to
    one.
    """
    args, kwargs = arguments.rebuild(arguments.tensors)
    with torch.no_grad(), random_state_kept(), running(guide, args, kwargs):
        guide(*args, **kwargs)  # an autoguide sets itself up in its first call
        nodes: dict[str, Any] = pyro.poutine.trace(guide).get_trace(*args, **kwargs).nodes
    random = {
        name: node["value"].numel()
        for name, node in nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and not node["is_observed"]
        and name not in division.summed_out
        and not any(isinstance(part, dist.Delta) for part in layers(node["fn"]))
    }
    points = [name for name in division.latents if name not in random]
    needed = sum(division.sites[name].unconstrained_shape.numel() for name in points)
    got = sum(count for name, count in random.items() if name not in division.latents)
    if got == needed:
        return ""
    what = f"the points that it gives to {points}" if points else "the latents"
    return (
        f"the guide draws {got} numbers beside latents where {what} take {needed}: its density is "
        "not one of the latents (a point, as of AutoDelta, has none; auxiliary variables would "
        "have to be summed out), so that its particles have no proper weights. Leave the guide out "
        "for an evidence estimate, or use one such as AutoNormal"
    )


def guide_loss(
    guide: Model,
    division: Division,
    arguments: Arguments,
    state: SweepState,
    values: Mapping[str, Tensor],
) -> Tensor:
    """`- sum_cells sum_k W_k log q(z_k | x)`: the cross-entropy of the particles and the guide.

    Particles and weights are constants, so that its gradient trains the guide alone, as in
    reweighted wake-sleep (Bornschein & Bengio 2015). What the guide itself observes (a label that
    is seen, which it is to predict where it is not) counts too; latents that are masked out in the
    model do not.

    Args:
        values: Constrained values of the particles, `(K, *batch, *event)` by name.
    """
    args, kwargs = arguments.rebuild(arguments.tensors)
    active = division.activity(arguments.tensors).latents
    log_guide = []
    for k in range(state.num_particles):
        particle = {name: values[name][k].detach() for name in division.latents}
        trace = pyro.poutine.trace(pyro.poutine.condition(guide, particle)).get_trace(
            *args, **kwargs
        )
        log_guide.append(_log_density(trace, division, active, observed=True))
    return -(state.log_weight.normalized() * torch.stack(log_guide)).sum()


def log_weight(model: Model, guide: Model, division: Division, arguments: Arguments) -> Tensor:
    """`log p(x, z) - log q(z | x)` of one draw `z` of a guide, by population cell.

    With gradients, through the draw.

    Args:
        model: The Pyro program.
        guide: The guide.
        division: The model divided.
        arguments: The model's arguments.

    Raises:
        OptionError: A draw of the guide has no gradient.
    """
    args, kwargs = arguments.rebuild(arguments.tensors)
    active = division.activity(arguments.tensors).latents
    drawn = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
    nodes: dict[str, Any] = drawn.nodes
    fixed = [name for name in division.latents if not nodes[name]["fn"].has_rsample]
    if fixed:
        raise OptionError(
            f"the guide's draws of {fixed} have no gradient (no rsample), through which it is to "
            "learn; draw them from a distribution that has"
        )
    replayed = pyro.poutine.replay(pyro.poutine.block(model, hide=division.barren), drawn)
    joint = pyro.poutine.trace(replayed).get_trace(*args, **kwargs)
    of_guide = _log_density(drawn, division, active, observed=False)
    return _log_density(joint, division, active, observed=True) - of_guide


def _log_density(
    trace: pyro.poutine.Trace, division: Division, active: Mapping[str, Tensor], *, observed: bool
) -> Tensor:
    """One particle's log-density under a traced guide, by population cell.

    Latents that the model sums out are no part of it.

    Args:
        active: By latent that the model masks in part, what is active.
        observed: Whether to count what the guide observes.
    """
    trace.compute_log_prob()
    terms = [
        _by_cell(_of_active(_masked(node), active.get(name)), division)
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and (observed or not node["is_observed"])
        and name not in division.summed_out
    ]
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _with_log_dets(
    log_density: Tensor,
    log_dets: Mapping[str, Tensor],
    division: Division,
    active: Mapping[str, Tensor],
) -> Tensor:
    """One particle's log-density of values as that of coordinates, by population cell."""
    terms = [
        _by_cell(_of_active(log_det, active.get(name)), division)
        for name, log_det in log_dets.items()
    ]
    return torch.stack(torch.broadcast_tensors(log_density, *terms)).sum(0)


def _masked(node: Any) -> Tensor:
    """A site's log-density without its scale; of an observed one, with its mask."""
    log_prob = node["unscaled_log_prob"]
    return masked(log_prob, node["mask"]) if node["is_observed"] else log_prob


def _of_active(log_prob: Tensor, active: Tensor | None) -> Tensor:
    """Log-densities `(*batch)` where anything is active, `(*batch, *event)`."""
    if active is None:
        return log_prob
    extra = active.dim() - log_prob.dim()
    batch = active.flatten(-extra).any(-1) if extra > 0 else active
    return torch.where(batch, log_prob, 0.0)


def _by_cell(log_prob: Tensor, division: Division) -> Tensor:
    """Sums one particle's log-density over all but the population plates."""
    plates = [plate for plate in division.population if -plate.dim <= log_prob.dim()]
    return sum_to_plates(log_prob.unsqueeze(0), plates).squeeze(0)
