from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from dcpc.errors import DataError, OptionError
from dcpc.evaluation import (
    FeatureClassifier,
    InceptionError,
    InceptionFeatures,
    frechet_classifier_distance,
    frechet_distance,
    frechet_feature_distance,
    frechet_inception_distance,
)


def covariance(size: int) -> Tensor:
    factor = torch.randn(size, size, dtype=torch.float64)
    return factor @ factor.T


class Pixels:
    """Features that are the pixels themselves."""

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_gaussians_with_diagonal_covariances_differ_by_their_standard_deviations() -> None:
    mean1, mean2 = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 5.0])
    cov1, cov2 = torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 25.0]))
    # |m1 - m2|^2 + (2 - 1)^2 + (3 - 5)^2
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(9 + 16 + 1 + 4)


def test_any_gaussians_agree_with_the_formula_by_a_general_matrix_root() -> None:
    mean1, mean2 = torch.randn(5).double(), torch.randn(5).double()
    cov1, cov2 = covariance(5), covariance(5)
    root = sqrtm((cov1 @ cov2).numpy()).real
    expected = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace())
    expected -= 2 * root.trace()
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(expected)


def test_a_gaussian_is_at_no_distance_from_itself_and_a_point_at_its_variance() -> None:
    mean, cov = torch.randn(6), covariance(6)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-9)
    singular = torch.zeros(6, 6)
    assert frechet_distance(mean, cov, mean, singular) == pytest.approx(float(cov.trace()))


def test_sets_of_images_differ_by_the_moments_of_their_features() -> None:
    images = torch.rand(500, 1, 2, 1)
    shifted = images + 0.5
    assert frechet_feature_distance(Pixels(), images, shifted) == pytest.approx(0.5, rel=1e-5)
    # Twice the image has twice the standard deviations: tr C; and its mean moves by the mean.
    rows = images.flatten(1).double()
    expected = float(rows.mean(0).square().sum() + rows.T.cov().trace())
    assert frechet_feature_distance(Pixels(), images, 2 * images) == pytest.approx(expected)


@pytest.fixture(scope="module")
def stripes() -> tuple[Tensor, Tensor]:
    """Noisy images with horizontal (0) or vertical (1) stripes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    rows = (torch.arange(8) % 2).float()
    pattern = torch.stack([rows.unsqueeze(1).expand(8, 8), rows.unsqueeze(0).expand(8, 8)])
    noise = 0.3 * torch.rand(400, 1, 8, 8, generator=generator)
    return (0.7 * pattern[labels].unsqueeze(1) + noise).clamp(0, 1), labels


def test_a_trained_classifier_tells_classes_apart_and_so_does_its_distance(stripes) -> None:
    images, labels = stripes
    classifier = FeatureClassifier((1, 8, 8), 2, num_features=8).fit(
        images[:300], labels[:300], num_epochs=6, batch_size=20
    )
    assert classifier.accuracy(images[300:], labels[300:]) == 1.0
    assert classifier.features(images).shape == (400, 8)
    zeros, ones = images[labels == 0], images[labels == 1]
    same = frechet_classifier_distance(classifier, zeros[:100], zeros[100:])
    other = frechet_classifier_distance(classifier, zeros[:100], ones[:100])
    # One class's two halves differ by sampling noise: a hundredth of their spread.
    assert other > 20 * same


def test_the_same_seed_trains_the_same_features(stripes) -> None:
    images, labels = stripes
    before = torch.get_rng_state()

    def features(seed: int) -> Tensor:
        classifier = FeatureClassifier((1, 8, 8), 2, num_features=8, seed=seed)
        return classifier.fit(images, labels, num_epochs=1).features(images)

    first, again, other = features(1), features(1), features(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_training_improves_the_likelihood_of_the_labels(stripes) -> None:
    images, labels = stripes
    classifier = FeatureClassifier((1, 8, 8), 2, num_features=8)
    entropy = torch.nn.functional.cross_entropy
    before = entropy(classifier(images).detach(), labels)
    after = entropy(classifier.fit(images, labels)(images).detach(), labels)
    assert float(before) == pytest.approx(math.log(2), rel=0.2)
    assert float(after) < 0.9 * float(before)


def test_what_cannot_be_compared_is_refused(stripes) -> None:
    images, labels = stripes
    classifier = FeatureClassifier((1, 8, 8), 2)
    with pytest.raises(DataError, match=r"shape \(N, 1, 8, 8\), got \(400, 1, 8\)"):
        classifier.features(images[..., 0])
    with pytest.raises(DataError, match=r"integers in \[0, 2\)"):
        classifier.fit(images, labels + 1)
    with pytest.raises(OptionError, match="num_epochs must be at least 1"):
        classifier.fit(images, labels, num_epochs=0)
    with pytest.raises(DataError, match="others must hold at least two images"):
        frechet_feature_distance(Pixels(), images, images[:1])
    with pytest.raises(DataError, match="the features of images are not all finite"):
        frechet_feature_distance(Pixels(), images / 0, images)
    with pytest.raises(DataError, match=r"means \(d,\) and covariances \(d, d\)"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


def test_missing_inception_weights_are_named_once(tmp_path) -> None:
    with pytest.raises(InceptionError, match=r"torchmetrics.*torch-fidelity.*FeatureClassifier"):
        InceptionFeatures(tmp_path / "absent.pth")


def test_inception_gets_colours_in_bytes(monkeypatch) -> None:
    seen = []

    class Network(torch.nn.Module):
        def forward(self, levels: Tensor) -> Tensor:
            seen.append(levels)
            return levels.flatten(1).float()

    inception = InceptionFeatures.__new__(InceptionFeatures)
    inception.network, inception.device = Network(), torch.device("cpu")
    images = torch.tensor([[0.0, 1.0], [0.5, 2.0], [0.2, -1.0]]).reshape(3, 1, 1, 2)
    frechet_inception_distance(inception, images, images)
    assert seen[0].dtype == torch.uint8
    assert seen[0][:, 0, 0].tolist() == [[0, 255], [128, 255], [51, 0]]
    assert bool((seen[0] == seen[0][:, :1]).all())
    assert seen[0].shape == (3, 3, 1, 2)
