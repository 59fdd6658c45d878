"""Programs that `torch.vmap` refuses for how they are written, run as equal ones that it takes.

`vectorised` is entered around a run of the model under `vmap`. Inside, operations that have no
batching rule (recurrent networks, writes under a boolean mask) and functions of Pyro that write in
place, or hide the gradient in an `autograd.Function` of an old kind, are replaced by
others with the same values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import pyro.distributions.coalescent
import pyro.distributions.conjugate
import pyro.distributions.hmm
import pyro.ops.einsum.torch_log
import pyro.ops.gaussian
import pyro.ops.special
import pyro.ops.tensor_utils
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dcpc.divide.recurrent import RECURRENT


@contextmanager
def vectorised() -> Iterator[None]:
    """Lets a model run under `torch.vmap` or `make_fx(torch.vmap(...))` that could not.

    Covers `nn.RNN`, `nn.LSTM` and `nn.GRU` (not packed sequences), `x[mask] = number`,
    `OrderedLogistic`, `Multinomial`, `DiscreteHMM`, `GaussianHMM`, `GaussianMRF`,
    `CoalescentTimesWithRate` and sparse `DirichletMultinomial`. It replaces functions of Pyro while
    it is entered, so it is, like Pyro's handlers, not for several threads at once.
    """
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in _REPLACEMENTS]
    try:
        for owner, name, function in _REPLACEMENTS:
            setattr(owner, name, function)
        with _Replace():
            yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


class _Replace(TorchFunctionMode):
    """Runs torch functions on batched tensors as others that have batching rules."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        replacement = _replacement(func, args)
        return (replacement or func)(*args, **(kwargs or {}))


def _replacement(func: Any, args: tuple) -> Callable[..., Any] | None:
    """The function to run instead of one of torch, or None."""
    if func is Tensor.__setitem__:
        return _fill if _writes_under_mask(*args) else None
    recurrent = RECURRENT.get(getattr(func, "__name__", ""))
    # The arguments of a packed sequence begin with two tensors and the state.
    if recurrent is None or not isinstance(args[3], bool):
        return None
    return recurrent if any(map(_is_batched, pytree.tree_leaves(args))) else None


def _writes_under_mask(target: Tensor, index: Any, value: Any) -> bool:
    """Whether a number is written where a mask with a particle axis is true."""
    return (
        isinstance(index, Tensor)
        and index.dtype is torch.bool
        and _is_batched(index)
        and (not isinstance(value, Tensor) or value.dim() == 0)
    )


def _fill(target: Tensor, mask: Tensor, value: Any) -> None:
    target.masked_fill_(mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim())), value)


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


def _safe_log(x: Tensor) -> Tensor:
    """Logarithm with gradient zero at zero, for `pyro.ops.special.safe_log`.

    Pyro's has the gradient `1 / max(x, eps)`. It is used on sums of `exp`, which are zero only
    where the derivatives of all terms are.
    """
    zero = x == 0
    log = torch.where(zero, torch.ones_like(x), x).log()
    return torch.where(zero, torch.full_like(x, -torch.inf), log)


def _safe_cholesky(x: Tensor) -> Tensor:
    """Cholesky factor with a jitter, for `pyro.ops.tensor_utils.safe_cholesky`."""
    relative = pyro.ops.tensor_utils.CHOLESKY_RELATIVE_JITTER
    finfo = torch.finfo(x.dtype)
    if x.shape[-1] == 1:
        return (x.clamp(min=finfo.tiny) if relative else x).sqrt()
    if relative:
        jitter = relative * finfo.eps * x.detach().abs().max(-1).values
        x = x + torch.diag_embed(jitter)
    return torch.linalg.cholesky(x)


def _ordered_logistic(
    self: dist.OrderedLogistic,
    predictor: Tensor,
    cutpoints: Tensor,
    validate_args: bool | None = None,
) -> None:
    """`OrderedLogistic.__init__`, which fills in the probabilities piece by piece."""
    below = torch.sigmoid(cutpoints - predictor.unsqueeze(-1))
    self.predictor = predictor.expand(below.shape[:-1])
    self.cutpoints = cutpoints.expand(below.shape)
    pieces = [below[..., :1], below[..., 1:] - below[..., :-1], 1 - below[..., -1:]]
    super(dist.OrderedLogistic, self).__init__(torch.cat(pieces, -1), validate_args=validate_args)


def _log_beta_1(alpha: Tensor, value: Tensor, is_sparse: bool) -> Tensor:
    """Terms of `DirichletMultinomial`. They vanish at zero counts, which thus need no mask."""
    return torch.lgamma(1 + value) + torch.lgamma(alpha) - torch.lgamma(value + alpha)


_REPLACEMENTS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (dist.OrderedLogistic, "__init__", _ordered_logistic),
    (pyro.distributions.conjugate, "_log_beta_1", _log_beta_1),
    (pyro.distributions.coalescent, "safe_log", _safe_log),
    (pyro.distributions.hmm, "safe_log", _safe_log),
    (pyro.ops.einsum.torch_log, "safe_log", _safe_log),
    (pyro.ops.special, "safe_log", _safe_log),
    (pyro.distributions.hmm, "safe_cholesky", _safe_cholesky),
    (pyro.ops.gaussian, "safe_cholesky", _safe_cholesky),
    (pyro.ops.tensor_utils, "safe_cholesky", _safe_cholesky),
)
