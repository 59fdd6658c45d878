"""Likelihoods of pixels with intensities in [0, 1], from logits."""

from __future__ import annotations

from typing import Literal, get_args

import pyro.distributions as dist
from torch import Tensor

from dcpc.distributions import Bernoulli, ContinuousBernoulli
from dcpc.errors import OptionError

__all__ = ["Likelihood", "check_likelihood", "pixels"]

Likelihood = Literal["continuous_bernoulli", "bernoulli"]
"""A density on intensities in [0, 1]; or one whose log-probability of an intensity is a
cross-entropy and no density."""


def check_likelihood(likelihood: str) -> None:
    """Checks that a likelihood is one of those.

    Raises:
        OptionError: It is not.
    """
    if likelihood not in get_args(Likelihood):
        raise OptionError(
            f"likelihood must be 'continuous_bernoulli' or 'bernoulli', got {likelihood!r}"
        )


def pixels(logits: Tensor, likelihood: Likelihood) -> dist.TorchDistribution:
    """The distribution of images as rows of pixels.

    Args:
        logits: `(..., pixels)`; the last axis is the event's.
        likelihood: Which.
    """
    if likelihood == "bernoulli":
        # Grey intensities are no outcomes of a Bernoulli variable, so nothing is validated.
        return Bernoulli(logits=logits, validate_args=False).to_event(1)
    return ContinuousBernoulli(logits).to_event(1)
