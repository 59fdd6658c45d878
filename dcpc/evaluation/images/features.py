"""Features of images: Inception's where its weights are present, a small classifier's otherwise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dcpc.errors import DataError, DCPCError, require_at_least
from dcpc.evaluation.batches import BATCH_SIZE, gradients_allowed
from dcpc.seeding import seeded

__all__ = ["FeatureClassifier", "InceptionError", "InceptionFeatures"]

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The converted weights of the FID's original network, as torch-fidelity names them."""


class InceptionError(DCPCError):
    """Inception's weights, or the packages that run it, are not on this machine."""


class InceptionFeatures:
    """The 2048 pooled features that the FID is defined by, through torchmetrics.

    Grey images are repeated over the three channels. Nothing is downloaded.

    Args:
        weights: The weights' file; by default where torch-fidelity would have put it.
        device: Where the network runs.

    Raises:
        InceptionError: A package or the weights are missing.
    """

    def __init__(self, weights: str | Path | None = None, device: str = "cpu") -> None:
        path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS)
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            if not path.is_file():
                raise FileNotFoundError(f"there is no file '{path}'")
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        except (ImportError, OSError) as error:
            raise InceptionError(
                f"Inception's features cannot be had here: {error}. They need torchmetrics, "
                f"torch-fidelity and the file {INCEPTION_WEIGHTS} of torch-fidelity's releases (as "
                f"'{path}', or as weights=...). Without them, use FeatureClassifier and "
                "frechet_classifier_distance"
            ) from error
        self.network = network.to(device)
        self.device = torch.device(device)

    def features(self, images: Tensor) -> Tensor:
        """Features `(N, 2048)` of images `(N, 1 or 3, H, W)` in [0, 1].

        Raises:
            DataError: Another number of channels.
        """
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise DataError(
                f"images must have shape (N, 1 or 3, height, width), got {tuple(images.shape)}"
            )
        parts = []
        for part in images.split(BATCH_SIZE):
            colours = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
            levels = (colours.to(self.device).clamp(0, 1) * 255).round().to(torch.uint8)
            with torch.no_grad():
                parts.append(self.network(levels).cpu())
        return torch.cat(parts)


class FeatureClassifier(nn.Module):
    """A small convolutional classifier, whose last hidden layer is its features.

    Two convolutions of stride two, pooled to 4 x 4, and a hidden layer of `num_features`.

    Args:
        image_shape: `[channels, height, width]`.
        num_classes: Number of labels.
        num_features: Size of the features.
        seed: Seed of the initial weights and the order of training.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_features: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_at_least("num_classes", num_classes, 1)
        require_at_least("num_features", num_features, 1)
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.seed = seed
        with seeded(seed):
            self.body = nn.Sequential(
                nn.Conv2d(image_shape[0], 32, kernel_size=3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
                nn.Linear(64 * 16, num_features),
                nn.ReLU(),
            )
            self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, C, H, W)` in [0, 1]."""
        return self.head(self.body(images))

    def fit(
        self,
        images: Tensor,
        labels: Tensor,
        num_epochs: int = 2,
        batch_size: int = 100,
        learning_rate: float = 1e-3,
    ) -> FeatureClassifier:
        """Trains on labelled images by Adam and returns itself.

        The same seed, images and labels give the same features on one machine.

        Args:
            images: `(N, C, H, W)` in [0, 1].
            labels: `(N,)`, integers in `[0, num_classes)`.
            num_epochs: Passes over the images.
            batch_size: Images per step.
            learning_rate: Adam learning rate.

        Raises:
            DataError: Images of another shape, or labels out of range.
            OptionError: A number below one.
        """
        self._check(images)
        require_at_least("num_epochs", num_epochs, 1)
        require_at_least("batch_size", batch_size, 1)
        if (
            labels.shape != (len(images),)
            or not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            raise DataError(
                f"labels must be {len(images)} integers in [0, {self.num_classes}), got shape "
                f"{tuple(labels.shape)} from {int(labels.min())} to {int(labels.max())}"
            )
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        with gradients_allowed(), seeded(self.seed):
            for _ in range(num_epochs):
                for rows in torch.randperm(len(images)).split(batch_size):
                    loss = nn.functional.cross_entropy(self(images[rows]), labels[rows].long())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return self

    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer, `(N, num_features)`, of images `(N, C, H, W)` in [0, 1].

        Raises:
            DataError: Images of another shape.
        """
        self._check(images)
        with torch.no_grad():
            return torch.cat([self.body(part) for part in images.split(BATCH_SIZE)])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images whose own label has the largest logit.

        Features of a classifier that cannot tell the classes apart measure little.
        """
        self._check(images)
        with torch.no_grad():
            logits = torch.cat([self(part) for part in images.split(BATCH_SIZE)])
        return float((logits.argmax(1) == labels).float().mean())

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1:] != self.image_shape or len(images) == 0:
            raise DataError(
                f"images must have shape (N, {', '.join(map(str, self.image_shape))}), got "
                f"{tuple(images.shape)}"
            )
