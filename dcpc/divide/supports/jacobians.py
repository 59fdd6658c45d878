"""Log-determinants of torch's bijections onto supports, by the unconstrained value alone.

torch's own take the logarithm of the constrained value where that is at hand, which is minus
infinity as soon as the value has rounded to an edge of the support.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transforms
from torch.nn.functional import logsigmoid, pad


def log_abs_det(transform: Any, u: Tensor) -> Tensor | None:
    """`log |det dT/du|` of one event, or None for a bijection that is not known here.

    Args:
        transform: A bijection from `biject_to`.
        u: Unconstrained value `(*batch, *event)`.

    Returns:
        Log-determinant `(*batch)`, with the event dimensions of the transform summed.
    """
    if isinstance(transform, transforms.IndependentTransform):
        base = log_abs_det(transform.base_transform, u)
        dims = tuple(range(-transform.reinterpreted_batch_ndims, 0))
        return base.sum(dims) if base is not None and dims else base
    parts = elementary_parts(transform)
    curved = [part for part in parts if type(part) is not transforms.AffineTransform]
    if len(curved) != 1 or type(curved[0]) not in _LOG_DETS:
        return None
    result = _LOG_DETS[type(curved[0])](u)
    for part in parts:
        if part is not curved[0]:
            scale = torch.as_tensor(part.scale, dtype=u.dtype, device=u.device)
            result = result + scale.abs().log()
    return result


def elementary_parts(transform: Any) -> list[Any]:
    """The transforms that a bijection is composed of, first to last, but for trivial ones."""
    if isinstance(transform, transforms.IndependentTransform):
        return elementary_parts(transform.base_transform)
    if isinstance(transform, transforms.ComposeTransform):
        return [inner for part in transform.parts for inner in elementary_parts(part)]
    if type(transform) is transforms.AffineTransform:
        bounds = (transform.loc, transform.scale)
        if not any(isinstance(bound, Tensor) for bound in bounds) and bounds == (0, 1):
            return []
    return [transform]


def is_parameter_free(transform: Any) -> bool:
    """Whether a bijection has no tensors in it, such as the bounds of an interval."""
    return not any(
        isinstance(value, Tensor)
        for part in elementary_parts(transform)
        for value in vars(part).values()
    )


def log_stick_breaking(u: Tensor) -> Tensor:
    """Logarithms of the simplex entries that `StickBreakingTransform` gives.

    `log y_k = log z_k + sum_{j<k} log(1 - z_j)` with `z_k = sigmoid(u_k - log(K - k))` for the
    `K - 1` entries of `u`, counted from one, and `z_K = 1`.

    Args:
        u: Unconstrained values `(*batch, K - 1)`.

    Returns:
        `log y`, `(*batch, K)`.
    """
    logits = u - _log_offsets(u)
    left = logsigmoid(-logits).cumsum(-1)
    return pad(logsigmoid(logits), [0, 1]) + pad(left, [1, 0])


def stick_breaking_logits(log_weights: Tensor) -> Tensor:
    """Unconstrained value of the simplex point in proportion to `exp(log_weights)`.

    `u_k = log w_k - log sum_{j>k} w_j + log(K - k)`, the inverse of `log_stick_breaking`.

    Args:
        log_weights: Logarithms of positive weights `(*batch, K)`.
    """
    rest = torch.logcumsumexp(log_weights.flip(-1), -1).flip(-1)[..., 1:]
    u = log_weights[..., :-1] - rest
    return u + _log_offsets(u)


def log_sech(u: Tensor) -> Tensor:
    """`log(1 - tanh(u)^2) / 2`."""
    return math.log(2) + logsigmoid(2 * u) - u


def _log_offsets(u: Tensor) -> Tensor:
    return torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device).log()


def _sigmoid(u: Tensor) -> Tensor:
    return logsigmoid(u) + logsigmoid(-u)


def _stick_breaking(u: Tensor) -> Tensor:
    """The sum of `log z_k + log(1 - z_k) + sum_{j<k} log(1 - z_j)`."""
    remaining = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device)
    logits = u - remaining.log()
    return (logsigmoid(logits) + remaining * logsigmoid(-logits)).sum(-1)


def _corr_cholesky(u: Tensor) -> Tensor:
    """The sum of `2 log sech u_ij`, and `log sech u_ij` for each entry of row i between j and i."""
    dim = round((1 + math.sqrt(1 + 8 * u.shape[-1])) / 2)
    rows, columns = torch.tril_indices(dim, dim, -1, device=u.device)
    return ((1 + rows - columns) * log_sech(u)).sum(-1)


_LOG_DETS = {
    transforms.ExpTransform: lambda u: u,
    transforms.SigmoidTransform: _sigmoid,
    transforms.StickBreakingTransform: _stick_breaking,
    transforms.CorrCholeskyTransform: _corr_cholesky,
}
