"""Frechet distance between images, each set of features under its own name."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dcpc.errors import DataError
from dcpc.evaluation.images.features import FeatureClassifier, InceptionFeatures

__all__ = [
    "frechet_classifier_distance",
    "frechet_distance",
    "frechet_feature_distance",
    "frechet_inception_distance",
]


class Features(Protocol):
    """Feature extractor."""

    def features(self, images: Tensor) -> Tensor:
        """Features `(N, d)` of images `(N, C, H, W)` in [0, 1]."""
        ...


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    r"""Squared Frechet (2-Wasserstein) distance of two Gaussians.

    .. math:: \|m_1 - m_2\|^2
        + \mathrm{tr}\big(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\big)

    By eigenvalues of symmetric matrices in double precision, so that singular covariances (fewer
    images than features) do no harm and nothing complex appears. Dowson & Landau, 1982; as a
    score of images, Heusel et al., NeurIPS 2017. Four lines of our own: scipy's matrix root is
    complex for singular covariances, and torchmetrics, which hands a feature module bytes, loses
    half the digits there.

    Args:
        mean1: `(d,)`.
        cov1: `(d, d)`, symmetric and positive semidefinite.
        mean2: `(d,)`.
        cov2: `(d, d)`, likewise.

    Raises:
        DataError: Other shapes.
    """
    mean1, cov1, mean2, cov2 = (t.detach().double() for t in (mean1, cov1, mean2, cov2))
    shapes = [tuple(t.shape) for t in (mean1, cov1, mean2, cov2)]
    size = mean1.numel()
    if shapes != [(size,), (size, size)] * 2:
        raise DataError(f"expected means (d,) and covariances (d, d) of one d, got {shapes}")
    root = _square_root(cov1)
    eigenvalues = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0.0)
    overlap = eigenvalues.sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2.0 * overlap
    return max(float(distance), 0.0)  # rounding may take equal Gaussians below zero


def frechet_feature_distance(features: Features, images: Tensor, others: Tensor) -> float:
    """Frechet distance of two sets' features, by their sample means and covariances.

    It falls as the sets grow, towards its value for infinitely many images: compare sets of equal
    sizes only.

    Args:
        features: Feature extractor.
        images: `(N, C, H, W)` in [0, 1], N at least 2.
        others: `(M, C, H, W)` in [0, 1], M at least 2.

    Raises:
        DataError: Fewer than two images, or features that are not finite.
    """
    moments = []
    for name, batch in (("images", images), ("others", others)):
        if batch.dim() != 4 or len(batch) < 2:
            raise DataError(
                f"{name} must hold at least two images (N, C, H, W), got shape {tuple(batch.shape)}"
            )
        rows = features.features(batch).double()
        if not bool(rows.isfinite().all()):
            raise DataError(f"the features of {name} are not all finite; are the images?")
        moments += [rows.mean(0), rows.T.cov().reshape(rows.shape[1], rows.shape[1])]
    return frechet_distance(*moments)


def frechet_inception_distance(
    inception: InceptionFeatures, images: Tensor, others: Tensor
) -> float:
    """The FID of the literature: `frechet_feature_distance` of Inception's pooled features."""
    return frechet_feature_distance(inception, images, others)


def frechet_classifier_distance(
    classifier: FeatureClassifier, images: Tensor, others: Tensor
) -> float:
    """`frechet_feature_distance` in the features of a classifier that was trained here.

    On another scale than the FID, and comparable only between figures of the same classifier.
    """
    return frechet_feature_distance(classifier, images, others)


def _square_root(covariance: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return (vectors * eigenvalues.clamp(min=0.0).sqrt()) @ vectors.T
