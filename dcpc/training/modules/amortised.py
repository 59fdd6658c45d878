"""A variational autoencoder: the rival without particles, on the same models."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dcpc.errors import OptionError, require_at_least
from dcpc.observed import Observed, call, num_data
from dcpc.training.data import Batch
from dcpc.training.modules.base import LearningRateSchedule
from dcpc.training.modules.bounds import negative_importance_weighted_bound, rising_share
from dcpc.training.modules.generative import GenerativeModule, HeldOut
from dcpc.training.processes import share

__all__ = ["AmortisedModule"]


class AmortisedModule(GenerativeModule):
    """Trains a Pyro model and an encoder by stochastic variational inference.

    A step descends minus the evidence lower bound per datum, `E_q[log q(z | x) - log p(x, z)]`,
    by Pyro's `Trace_ELBO` (Kingma & Welling 2014), or minus the importance-weighted bound (Burda,
    Grosse & Salakhutdinov 2016). Beside the annealed evidence of the model, which is the figure to
    compare, two bounds of the encoder are measured on held-out data.

    Args:
        model: The Pyro program, a torch module; called with a batch of data, with all latents in
            one plate over the batch.
        guide: The encoder: a Pyro program, a torch module, that draws the same latents from a
            batch of data; `encoder` for the one that `model.encoder()` makes, `top_down_encoder`
            for that of `model.encoder(top_down=True)`.
        num_samples: Samples of the guide per datum and step.
        objective: `elbo`, or `iwae` for the importance-weighted bound of the `num_samples`.
        kl_warm_up_epochs: Epochs at the start in which the divergence of guide and prior counts by
            a share that rises to one; of `elbo`.
        held_out: How held-out data are measured.
        learning_rate: Adam learning rate; ignored when `--optimizer` is given.
        learning_rate_schedule: `cosine` lowers the rate to zero over the run, by
            `trainer.max_epochs`, `trainer.max_steps` or `trainer.max_time`, whichever is nearest;
            null keeps it.
        particle_batch_size: Particles of a held-out datum that the model is evaluated for at once;
            null for all of them.
        label_site: Site of the model that is a datum's label, predicted for held-out data; null
            for none.

    Raises:
        OptionError: A number out of range, or a model without an encoder of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: Literal["encoder", "top_down_encoder"] | nn.Module = "encoder",
        num_samples: int = 1,
        objective: Literal["elbo", "iwae"] = "elbo",
        kl_warm_up_epochs: int = 0,
        held_out: HeldOut = HeldOut(),
        learning_rate: float = 1e-3,
        learning_rate_schedule: LearningRateSchedule | None = None,
        particle_batch_size: int | None = None,
        label_site: str | None = None,
    ) -> None:
        super().__init__(
            model,
            guide,
            held_out,
            learning_rate,
            learning_rate_schedule,
            particle_batch_size,
            label_site,
        )
        require_at_least("model.num_samples", num_samples, 1)
        require_at_least("model.kl_warm_up_epochs", kl_warm_up_epochs, 0)
        if objective not in ("elbo", "iwae"):
            raise OptionError(f"model.objective must be 'elbo' or 'iwae', got {objective!r}")
        if objective == "iwae" and (num_samples == 1 or kl_warm_up_epochs):
            raise OptionError(
                "model.objective='iwae' weighs samples against each other, all of its divergence "
                f"included: it needs model.num_samples of at least 2, got {num_samples}, and "
                f"model.kl_warm_up_epochs=0, got {kl_warm_up_epochs}; use 'elbo' otherwise"
            )
        self.num_samples = num_samples
        self.objective = objective
        self.kl_warm_up_epochs = kl_warm_up_epochs

    def learn(self, batch: Batch) -> Tensor:
        """Returns minus the bound per datum, in nats."""
        x = batch[0]
        weight = share(x)
        loss = weight * self._negative_bound(x)
        self.log("train/loss", loss, prog_bar=True, batch_size=num_data(x), sync_dist=True)
        return loss

    def _negative_bound(self, x: Observed) -> Tensor:
        if self.objective == "iwae":
            division = call(self.held_out_inference.division, x)
            assert self.guide is not None
            return negative_importance_weighted_bound(
                self.model, self.guide, division, x, self.num_samples
            )
        share_of_kl = rising_share(self.current_epoch, self.kl_warm_up_epochs)
        return self.negative_elbo(x, num_samples=self.num_samples, kl_weight=share_of_kl)
