"""A variational autoencoder: the rival without particles, on the same models."""

from __future__ import annotations

from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from dcpc.errors import require_at_least
from dcpc.training.data import Batch
from dcpc.training.modules.base import LearningRateSchedule
from dcpc.training.modules.generative import GenerativeModule

__all__ = ["AmortisedModule"]


class AmortisedModule(GenerativeModule):
    """Trains a Pyro model and an encoder by stochastic variational inference.

    A step descends minus the evidence lower bound per datum, `E_q[log q(z | x) - log p(x, z)]`,
    by Pyro's `Trace_ELBO` (Kingma & Welling 2014). Beside the annealed evidence of the model,
    which is the figure to compare, two bounds of the encoder are measured on held-out data.

    Args:
        model: The Pyro program, a torch module; called with a batch of data, with all latents in
            one plate over the batch.
        guide: The encoder: a Pyro program, a torch module, that draws the same latents from a
            batch of data.
        num_samples: Samples of the guide per datum and step.
        bound_samples: Samples per held-out datum of the importance-weighted bound.
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.
        evaluation_particles: Particles per held-out datum.
        num_temperatures: Length of the annealing ladder on held-out data while training.
        test_temperatures: Its length for `test` and `predict`. A short ladder overstates the
            evidence NLL, by Jensen's inequality; lengthen it until the figure stands still.
        test_completion: Whether `test` also completes the upper half of images from the lower one,
            which takes as long again.

    Raises:
        OptionError: A number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        num_samples: int = 1,
        bound_samples: int = 100,
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
        evaluation_particles: int = 16,
        num_temperatures: int = 100,
        test_temperatures: int = 400,
        test_completion: bool = False,
    ) -> None:
        super().__init__(
            model,
            guide,
            bound_samples,
            learning_rate,
            learning_rate_schedule,
            evaluation_particles,
            num_temperatures,
            test_temperatures,
            test_completion,
        )
        require_at_least("model.num_samples", num_samples, 1)
        self.objective = Trace_ELBO(num_particles=num_samples)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns minus the evidence lower bound per datum, in nats."""
        x = batch[0]
        with self.stream(self._num_steps):
            loss = self.objective.differentiable_loss(self.model, self.guide, x) / len(x)
        self._num_steps += 1
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        return loss
