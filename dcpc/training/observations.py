"""Whether a model can be run on data, and learn from every datum."""

from __future__ import annotations

import re
from pathlib import Path
from traceback import extract_tb
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from dcpc.divide.handlers import is_random, running
from dcpc.divide.masking import element_mask
from dcpc.divide.model import Model
from dcpc.errors import DataError, DCPCError, ModelError
from dcpc.observed import Observed, as_arguments, named_tensors, num_data
from dcpc.seeding import random_state_kept

__all__ = ["check_observed", "check_runs"]

LIBRARIES = re.compile(
    rf"site-packages|lib/python\d|^<|^{re.escape(str(Path(__file__).parents[1]))}"
)
"""Files that are not the user's own."""

FAULTS = (RuntimeError, ValueError, TypeError, IndexError)
"""Errors of torch and Pyro where data and a model have shapes that do not go together."""


def check_observed(model: Model, data: Observed, index: Tensor, dim: int) -> None:
    """Checks that no mask takes all observations of a datum away.

    Args:
        model: The Pyro program.
        data: Its arguments.
        index: Indices of the data in the training set, `(B,)`.
        dim: Axis of the plate over the data among the batch dimensions, negative.

    Raises:
        DataError: Naming the first datum that has none.
    """
    args, kwargs = as_arguments(data)
    with random_state_kept(), torch.no_grad(), running(model, args, kwargs):
        nodes: dict[str, Any] = pyro.poutine.trace(model).get_trace(*args, **kwargs).nodes
    observed = {n: s for n, s in nodes.items() if is_random(s) and s["is_observed"]}
    has_any = torch.zeros(num_data(data), dtype=torch.bool, device=index.device)
    for site in observed.values():
        has_any = has_any | _observes(site, dim).to(index.device)
    if bool(has_any.all()):
        return
    raise DataError(
        f"datum {int(index[int((~has_any).nonzero()[0])])} of the training set has no observation: "
        f"the masks of {sorted(observed)} take all of it away; drop the datum"
    )


def check_runs(model: nn.Module, data: Observed) -> None:
    """Runs a model once, in evaluation mode.

    Args:
        model: The Pyro program.
        data: A few data.

    Raises:
        DataError: It cannot be run on them.
        ModelError: It has a parameter that no module holds, which training would leave as it is.
    """
    args, kwargs = as_arguments(data)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with random_state_kept(), torch.no_grad(), running(model, args, kwargs):
            trace = pyro.poutine.trace(model).get_trace(*args, **kwargs)
            trace.compute_log_prob()
    except DCPCError:
        raise
    except FAULTS as error:
        shapes = {name: list(values.shape[1:]) for name, values in named_tensors(data)}
        shown = next(iter(shapes.values())) if isinstance(data, Tensor) else shapes
        reason = str(error).strip().splitlines()
        raise DataError(
            f"model.model: {type(model).__name__} cannot be run on data of shape {shown} each: "
            f"{reason[0] if reason else type(error).__name__}{_line_of(error)}; give the model "
            "arguments that fit the data, or choose other data"
        ) from error
    finally:
        for module, is_training in modes.items():
            module.training = is_training
    held = [name.removesuffix("_unconstrained") for name, _ in model.named_parameters()]
    loose = [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "param"
        and "$$$" not in name  # what pyro.module names
        and not any(f".{name}".endswith(f".{own}") for own in held)
    ]
    if loose:
        raise ModelError(
            f"model.model: pyro.param '{loose[0]}' of {type(model).__name__} would not be trained, "
            "since no module holds it; make it a torch.nn.Parameter, or of a PyroModule a PyroParam"
        )


def _line_of(error: BaseException) -> str:
    """The innermost line of the user's own code that an error arose in; empty for none."""
    own = [
        f" ({Path(frame.filename).name}, line {frame.lineno})"
        for frame in extract_tb(error.__traceback__)
        if not LIBRARIES.search(frame.filename)
    ]
    return own[-1] if own else ""


def _observes(site: Any, dim: int) -> Tensor:
    """Data of which a site observes something, boolean `(B,)` or of one element for all."""
    shape = site["fn"].batch_shape
    mask = element_mask(site, shape)
    if site["mask"] is False:
        mask = torch.zeros_like(mask)
    if -dim > len(shape):
        return mask.any().reshape(1)
    return mask.movedim(dim, 0).flatten(1).any(1) if mask.dim() > 1 else mask
