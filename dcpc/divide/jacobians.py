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
    scale: Any = 1
    kernel = curved_part(transform)
    for part in _parts(transform):
        if part is not kernel:
            scale = scale * part.scale
    function = _LOG_DETS.get(type(kernel))
    if function is None:
        return None
    result = function(u)
    if isinstance(scale, Tensor):
        return result + scale.abs().log()
    return result if scale == 1 else result + math.log(abs(scale))


def curved_part(transform: Any) -> Any:
    """The part of a bijection that is not affine; None where there is not exactly one."""
    curved = [part for part in _parts(transform) if type(part) is not transforms.AffineTransform]
    return curved[0] if len(curved) == 1 else None


def is_parameter_free(transform: Any) -> bool:
    """Whether a bijection has no tensors in it, such as the bounds of an interval."""
    if isinstance(transform, transforms.IndependentTransform):
        return is_parameter_free(transform.base_transform)
    return not any(
        isinstance(value, Tensor) for part in _parts(transform) for value in vars(part).values()
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


def _parts(transform: Any) -> list[Any]:
    """The elementary transforms, first to last, without trivial affine ones."""
    if isinstance(transform, transforms.ComposeTransform):
        return [inner for part in transform.parts for inner in _parts(part)]
    if type(transform) is transforms.AffineTransform:
        loc, scale = transform.loc, transform.scale
        if not isinstance(loc, Tensor) and not isinstance(scale, Tensor) and (loc, scale) == (0, 1):
            return []
    return [transform]


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
