"""The pseudo-posterior: a Gaussian mixture fitted to training particles, to sample data from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dcpc.errors import DataError, OptionError
from dcpc.seeding import seeded

__all__ = ["PseudoPosterior"]


@dataclass(frozen=True)
class PseudoPosterior:
    """A Gaussian mixture over one latent's unconstrained values: the aggregate of its posteriors.

    Where the aggregate differs from the prior, samples decoded from it look better than the prior's
    and say less of the model: it has seen the training data. Report the two apart.

    `fit` makes one; `sample` feeds `dcpc.evaluation.decode`, which draws the latents below.

    Attributes:
        site: The latent.
        shape: Shape of one value.
        weights: Shares of the components, `(C,)`, summing to one over all labels.
        means: `(C, d)`.
        scale_trils: Cholesky factors of the covariances, lower triangular, `(C, d, d)`.
        labels: Label that each component was fitted to, `(C,)`; empty without labels.
    """

    site: str
    shape: tuple[int, ...]
    weights: Tensor
    means: Tensor
    scale_trils: Tensor
    labels: Tensor

    @classmethod
    def fit(
        cls,
        site: str,
        particles: Tensor,
        *,
        num_components: int = 10,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> PseudoPosterior:
        """Fits scikit-learn's Gaussian mixture by expectation maximisation.

        Args:
            site: The latent: the top one of a hierarchy, from which the others follow.
            particles: Its unconstrained values, equally weighted, `(K, N, *event)`.
            num_components: Number of mixture components; per label, where labels are given.
            labels: Labels of the data, `(N,)` integers; a mixture is then fitted for each of them.
            seed: Seed of the fit's starting point.

        Raises:
            DataError: Fewer particles than components, particles that are not finite, or labels of
                another number of data.
        """
        if particles.dim() < 2:
            raise DataError(
                f"particles must have shape (K, N, *event), got {tuple(particles.shape)}"
            )
        shape = tuple(particles.shape[2:])
        rows = particles.detach().cpu().double().reshape(*particles.shape[:2], -1)
        if not bool(rows.isfinite().all()):
            raise DataError(
                f"{int((~rows.isfinite()).sum())} of {rows.numel()} values of site '{site}' are "
                "NaN or infinite; training has diverged there: lower its step size or learning rate"
            )
        groups, labels = _by_label(rows, labels)
        fits = [_fit(group.flatten(0, 1), num_components, seed, site) for group in groups]
        share = [group.shape[1] / rows.shape[1] for group in groups]
        dtype = particles.dtype
        return cls(
            site=site,
            shape=shape,
            weights=_joined(s * fit.weights_ for s, fit in zip(share, fits, strict=True)).to(dtype),
            means=_joined(fit.means_ for fit in fits).to(dtype),
            # In double precision: a covariance may be singular to single precision.
            scale_trils=torch.linalg.cholesky(_joined(f.covariances_ for f in fits)).to(dtype),
            labels=labels.repeat_interleave(num_components),
        )

    def distribution(self, label: int | None = None) -> MixtureSameFamily:
        """The mixture over flattened values `(d,)`; with a label, of its components only.

        Raises:
            OptionError: A label that nothing was fitted to.
        """
        chosen = torch.ones(len(self.weights), dtype=torch.bool)
        if label is not None:
            chosen = self.labels == label if len(self.labels) else ~chosen
            if not bool(chosen.any()):
                raise OptionError(
                    f"no component was fitted to the label {label}; there are the labels "
                    f"{self.labels.unique().tolist()}"
                )
        components = MultivariateNormal(self.means[chosen], scale_tril=self.scale_trils[chosen])
        return MixtureSameFamily(Categorical(self.weights[chosen]), components)

    def sample(self, num_samples: int, seed: int, label: int | None = None) -> dict[str, Tensor]:
        """Draws values `(num_samples, *event)` of the site, by its name.

        The global random state is left as it was.

        Raises:
            OptionError: A label that nothing was fitted to.
        """
        mixture = self.distribution(label)
        with seeded(seed):
            values = mixture.sample(torch.Size([num_samples]))
        return {self.site: values.reshape(num_samples, *self.shape)}


def _by_label(rows: Tensor, labels: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Particles `(K, n, d)` of every label, and the labels in that order."""
    if labels is None:
        return [rows], torch.empty(0, dtype=torch.long)
    labels = labels.cpu().long()
    if labels.shape != rows.shape[1:2]:
        raise DataError(
            f"labels must have shape ({rows.shape[1]},), one per datum of the particles, got "
            f"{tuple(labels.shape)}"
        )
    unique = labels.unique()
    return [rows[:, labels == label] for label in unique], unique


def _fit(rows: Tensor, num_components: int, seed: int, site: str) -> GaussianMixture:
    if not 1 <= num_components <= len(rows) or len(rows) < 2:
        raise DataError(
            f"num_components must lie between 1 and the number of particles of site '{site}' (of "
            f"every label, where there are labels), got {num_components} and {len(rows)} particles"
        )
    if len(rows) < num_components * rows.shape[1]:
        warnings.warn(
            f"{len(rows)} particles of site '{site}' do not determine {num_components} covariances "
            f"of {rows.shape[1]} values: samples will be mixtures of few particles. Use fewer "
            "components or more data",
            stacklevel=3,
        )
    mixture = GaussianMixture(num_components, covariance_type="full", random_state=seed)
    return mixture.fit(rows.numpy())


def _joined(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))
