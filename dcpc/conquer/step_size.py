"""Step sizes: fixed, or adapted by dual averaging towards a target statistic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class DualAveraging:
    """Dual averaging of the log step size (Nesterov 2009; Hoffman & Gelman 2014, section 3.2).

    With error `e_t = target - statistic_t`:

        h_t        = (1 - 1/(t + t0)) h_{t-1} + e_t / (t + t0)
        log eta_t  = mu - sqrt(t) / gamma h_t
        log eta'_t = t^-kappa log eta_t + (1 - t^-kappa) log eta'_{t-1}

    The first is used while adapting, the average `eta'` once frozen. Vectorised over units.

    Attributes:
        gamma: Shrinkage towards `mu`, the initial value.
        t0: Stabilises the first steps.
        kappa: Forgetting of the average.
    """

    gamma: float = 0.05
    t0: float = 10.0
    kappa: float = 0.75

    def init(self, step_size: Tensor) -> State:
        """State that starts from step sizes `(n,)`."""
        log_step = step_size.log()
        return {
            "log_step": log_step,
            "log_average": log_step.clone(),
            "centre": log_step.clone(),
            "error": torch.zeros_like(log_step),
            "count": step_size.new_zeros(()),
        }

    def update(self, state: State, error: Tensor) -> State:
        """State after a sweep whose target minus statistic was `error`, `(n,)`."""
        count = state["count"] + 1
        weight = 1.0 / (count + self.t0)
        mean_error = torch.lerp(state["error"], error.nan_to_num(nan=0.0), weight)
        log_step = state["centre"] - count.sqrt() / self.gamma * mean_error
        return {
            "log_step": log_step,
            "log_average": torch.lerp(state["log_average"], log_step, count**-self.kappa),
            "centre": state["centre"],
            "error": mean_error,
            "count": count,
        }

    def restart(self, state: State) -> State:
        """Starts anew from the present step size, for a target that has changed."""
        return self.init(self.step_size(state, adapting=True))

    def step_size(self, state: State, adapting: bool) -> Tensor:
        """Step sizes `(n,)` to move with."""
        return state["log_step" if adapting else "log_average"].exp()
