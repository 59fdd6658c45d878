"""Bounds of the evidence that a model and an encoder learn by, together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from dcpc.divide import Arguments, Division
from dcpc.divide.handlers import is_random
from dcpc.errors import OptionError
from dcpc.observed import Observed, as_arguments, call, num_data
from dcpc.start import log_weight

__all__ = ["negative_elbo", "negative_importance_weighted_bound", "rising_share"]

Program = Callable[..., Any]


class _Weighted(Messenger):
    """Counts the density of latents by a share."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def _pyro_sample(self, msg: Any) -> None:
        if is_random(msg) and not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.share


def negative_elbo(
    model: Program, guide: Program, x: Observed, num_samples: int = 1, kl_weight: float = 1.0
) -> Tensor:
    """Minus the evidence lower bound of a batch per datum, in nats, by Pyro's `Trace_ELBO`.

    `E_q[- log p(x | z)] + b KL(q(z | x) | p(z))`, of which a share `b` below one is no bound.

    Args:
        model: The Pyro program.
        guide: One that draws its latents.
        x: The model's arguments, `(B, *shape)`.
        num_samples: Samples of the guide per datum.
        kl_weight: `b`.
    """
    if kl_weight != 1.0:
        model, guide = (_Weighted(kl_weight)(program) for program in (model, guide))
    bound = Trace_ELBO(num_particles=num_samples)
    return call(bound.differentiable_loss, x, model, guide) / num_data(x)


def negative_importance_weighted_bound(
    model: Program, guide: Program, division: Division, x: Observed, num_samples: int
) -> Tensor:
    """Minus the importance-weighted bound of a batch per datum, in nats.

    `log 1/S sum_s p(x, z_s) / q(z_s | x)`, with `z_s ~ q`, datum by datum; its gradient goes
    through the draws. Burda, Grosse & Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.

    Args:
        model: The Pyro program.
        guide: One that draws its latents, with gradients.
        division: The model divided.
        x: The model's arguments, `(B, *shape)`.
        num_samples: S.

    Raises:
        OptionError: The data are tied to each other, latents are summed out, or draws of the guide
            have no gradient.
    """
    counted = [name for name in division.summed_out if name not in division.barren]
    if counted or not division.population:
        what = f"the model sums {counted} out" if counted else "its data are tied to each other"
        raise OptionError(
            f"model.objective='iwae' weighs draws of every datum by itself, but {what}; use 'elbo'"
        )
    arguments = Arguments(*as_arguments(x))
    logs = torch.stack([log_weight(model, guide, division, arguments) for _ in range(num_samples)])
    return (math.log(num_samples) - logs.logsumexp(0)).sum() / num_data(x)


def rising_share(epoch: int, num_epochs: int) -> float:
    """A share that rises over some epochs, to one after them: `1 / n` in the first."""
    return min((epoch + 1) / num_epochs, 1.0) if num_epochs else 1.0
