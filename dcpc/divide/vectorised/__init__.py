"""Programs that `torch.vmap` refuses for how they are written, run as equal ones that it takes.

`vectorised` is entered around a run of the model under `vmap`. Some operations have no batching
rule (recurrent networks, writes under a boolean mask), or one that loops over the particles, which
a capture would unroll (attention, recurrent cells); some functions of Pyro write in place, or hide
the gradient in an `autograd.Function` of an old kind. All are replaced by others with the same
values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dcpc.divide.vectorised.recurrent import CELLS, RECURRENT


@contextmanager
def vectorised() -> Iterator[None]:
    """Lets a model run under `torch.vmap` or `make_fx(torch.vmap(...))` that could not.

    Covers `nn.RNN`, `nn.LSTM` and `nn.GRU` (not packed sequences) and their cells, attention,
    `x[mask] = number`, `squeeze` and `flip` of numbers, sequential plates, `OrderedLogistic`,
    `Multinomial`, `DiscreteHMM`, `GaussianHMM`, `GaussianMRF`, `CoalescentTimesWithRate`,
    `SineSkewed`, and the sparse `DirichletMultinomial` and `Poisson`. It replaces functions of Pyro
    while it is entered, so it is, like Pyro's handlers, not for several threads at once.
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


@contextmanager
def drawing() -> Iterator[None]:
    """Lets samplers that fill a tensor in place draw under `vmap(..., randomness="different")`.

    torch's samplers of the multivariate normal, Student's t, Cauchy, exponential, Laplace and
    others fill an empty tensor, which has no particle axis where the parameters have none, and
    `vmap` refuses. Here an empty tensor has a particle axis, as random numbers have. Enter it
    inside of `vectorised`, for draws only.
    """
    with _EmptyWithParticles():
        yield


@contextmanager
def writable() -> Iterator[None]:
    """Lets a model write what has a particle axis into tensors that it makes itself.

    `torch.zeros` and its like then have the axis too. Enter it inside of `vectorised`, for what is
    not captured: it draws random numbers, which is how a tensor gets the axis.
    """
    with _FactoriesWithParticles():
        yield


class _FactoriesWithParticles(TorchFunctionMode):
    """Makes new tensors inside of a `vmap` have its axis."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _FACTORIES or not _is_unbatched(result):
            return result
        return torch.where(torch.rand(result.shape, device=result.device) < 1, result, result)


def all_of_plate(indices: Tensor) -> Tensor:
    """Marks indices as all those of a plate in order, which iterate as integers of Python.

    Pyro takes the indices of a sequential plate out of torch one by one, which a program that is
    captured cannot. A plate that is entered gives its indices to the model, as a plain tensor.
    """
    indices._dcpc_all_of_plate = True  # type: ignore[attr-defined]
    return indices


def _iterate(self: Any) -> Iterator[int | float]:
    """`IndepMessenger.__iter__` with Python's integers for all elements of a plate."""
    if getattr(self._indices, "_dcpc_all_of_plate", False):
        self._indices = range(len(self._indices))
    return _ITERATE(self)


class _EmptyWithParticles(TorchFunctionMode):
    """Makes empty tensors inside of a `vmap` have its axis."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _EMPTY or not _is_unbatched_float(result):
            return result
        # What is in an empty tensor does not matter: random numbers do, and have the axis.
        return torch.rand(result.shape, dtype=result.dtype, device=result.device)


def _is_unbatched_float(value: Any) -> bool:
    return _is_unbatched(value) and value.is_floating_point()


def _is_unbatched(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and torch._C._functorch.peek_interpreter_stack() is not None
        and not _is_batched(value)
    )


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
    if func == Tensor.data.__get__ and _is_batched(args[0]):  # type: ignore[attr-defined]
        return Tensor.detach
    name = getattr(func, "__name__", "")
    if name in RECURRENT and not isinstance(args[3], bool):
        return None  # a packed sequence: its third argument is the state, and then come weights
    replacement = _BATCHED.get(name)
    if replacement is None or not any(map(_is_batched, pytree.tree_leaves(args))):
        return None
    return replacement


def _writes_under_mask(target: Tensor, index: Any, value: Any) -> bool:
    """Whether a number is written where a mask with a particle axis is true."""
    return (
        isinstance(index, Tensor)
        and index.dtype is torch.bool
        and _is_batched(index)
        and (not isinstance(value, Tensor) or value.dim() == 0)
    )


def _fill(target: Tensor, mask: Tensor, value: Any) -> None:
    mask = mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim()))
    target.copy_(torch.where(mask, value, target))


def _clamp(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return target.copy_(target.clamp(*args, **kwargs))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(scale Q K^T + mask) V`, in place of fused kernels that run particle by particle."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = torch.where(attn_mask, scores, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    return (functional.dropout(weights, dropout_p) if dropout_p else weights) @ value


def _attention_where_batched(*args: Any, **kwargs: Any) -> Tensor:
    """Attention as called within torch's own functions, where a mode does not see it."""
    leaves = pytree.tree_leaves((args, kwargs))
    return (_attention if any(map(_is_batched, leaves)) else _FUSED_ATTENTION)(*args, **kwargs)


def _cholesky(x: Tensor, *, upper: bool = False) -> Tensor:
    """Cholesky factors, NaN of the particles whose matrix has none.

    Their density is then NaN, which counts as zero, as in Pyro's own samplers; torch's function
    raises for all particles.
    """
    factor, info = torch.linalg.cholesky_ex(x, upper=upper)
    return torch.where((info > 0)[..., None, None], torch.nan, factor)


def _squeeze(x: Tensor, *dim: Any, **kwargs: Any) -> Tensor:
    """`squeeze`, of numbers too, whose last axis batching rules do not know."""
    return x if x.dim() == 0 else torch.squeeze(x, *dim, **kwargs)


def _flip(x: Tensor, *dims: Any, **kwargs: Any) -> Tensor:
    """`flip`, of numbers too."""
    return x if x.dim() == 0 else Tensor.flip(x, *dims, **kwargs)


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


def _logmatmulexp(x: Tensor, y: Tensor) -> Tensor:
    """Logarithm of the product of `exp(x)` and `exp(y)`, for `pyro.distributions.hmm`."""
    lowest = torch.finfo(x.dtype).min  # avoids NaN due to inf - inf
    x_shift = x.detach().amax(-1, keepdim=True).clamp(min=lowest)
    y_shift = y.detach().amax(-2, keepdim=True).clamp(min=lowest)
    return _safe_log((x - x_shift).exp() @ (y - y_shift).exp()) + x_shift + y_shift


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


def _sine_skewed(
    self: dist.SineSkewed, base_dist: Any, skewness: Tensor, validate_args: bool | None = None
) -> None:
    """`SineSkewed.__init__` without its warning, which branches on the skewness."""
    batch_shape = torch.broadcast_shapes(base_dist.batch_shape, skewness.shape[:-1])
    event_shape = skewness.shape[-1:]
    self.skewness = skewness.broadcast_to(batch_shape + event_shape)
    self.base_dist = base_dist.expand(batch_shape)
    super(dist.SineSkewed, self).__init__(batch_shape, event_shape, validate_args=validate_args)


def _log_beta_1(alpha: Tensor, value: Tensor, is_sparse: bool) -> Tensor:
    """Terms of `DirichletMultinomial`. They vanish at zero counts, which thus need no mask."""
    return torch.lgamma(1 + value) + torch.lgamma(alpha) - torch.lgamma(value + alpha)


def _poisson_log_prob(self: torch.distributions.Poisson, value: Tensor) -> Tensor:
    """`Poisson.log_prob` with the gradient -1 of a rate of zero at a count of zero, not NaN."""
    zero = value == 0
    log_rate = torch.where(zero, torch.ones_like(self.rate), self.rate).log()
    return torch.where(zero, 0.0, value * log_rate) - self.rate - (value + 1).lgamma()


def _multinomial_log_prob(self: torch.distributions.Multinomial, value: Tensor) -> Tensor:
    """`Multinomial.log_prob`, which writes into the logits; `0 log 0` is zero."""
    log_powers = torch.where(value == 0, 0.0, value * self.logits).sum(-1)
    return torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1) + log_powers


def _multinomial_sample(
    self: torch.distributions.Multinomial, sample_shape: Sequence[int] = ()
) -> Tensor:
    """`Multinomial.sample`, which counts by adding in place."""
    draws = self._categorical.sample(torch.Size((self.total_count, *sample_shape)))
    categories = torch.arange(self.event_shape[-1], device=draws.device)
    return (draws.unsqueeze(-1) == categories).sum(0).type_as(self.probs)


_FACTORIES = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("zeros", "ones", "full")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
)

_EMPTY = frozenset(("empty", "empty_like", "new", "new_empty"))

_ITERATE = IndepMessenger.__iter__

_FUSED_ATTENTION = functional.scaled_dot_product_attention

_BATCHED: dict[str, Callable[..., Any]] = {
    **RECURRENT,
    **CELLS,
    "clamp_": _clamp,
    "flip": _flip,
    "linalg_cholesky": _cholesky,
    "squeeze": _squeeze,
    "scaled_dot_product_attention": _attention,
}
"""Replacements of torch functions with a batched argument, by name."""

_REPLACEMENTS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (IndepMessenger, "__iter__", _iterate),
    (functional, "scaled_dot_product_attention", _attention_where_batched),
    (dist.OrderedLogistic, "__init__", _ordered_logistic),
    (dist.SineSkewed, "__init__", _sine_skewed),
    (torch.distributions.Multinomial, "sample", _multinomial_sample),
    (torch.distributions.Multinomial, "log_prob", _multinomial_log_prob),
    (dist.Poisson, "log_prob", _poisson_log_prob),
    (pyro.distributions.conjugate, "_log_beta_1", _log_beta_1),
    (pyro.distributions.coalescent, "safe_log", _safe_log),
    (pyro.distributions.hmm, "_logmatmulexp", _logmatmulexp),
    (pyro.ops.einsum.torch_log, "safe_log", _safe_log),
    (pyro.ops.special, "safe_log", _safe_log),
    (pyro.distributions.hmm, "safe_cholesky", _safe_cholesky),
    (pyro.ops.gaussian, "safe_cholesky", _safe_cholesky),
    (pyro.ops.tensor_utils, "safe_cholesky", _safe_cholesky),
)
