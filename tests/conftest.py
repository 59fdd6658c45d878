"""What every test shares: the oracles' search path, a clean Pyro, seeds, and a small training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine import runtime
from pytorch_lightning import Trainer
from torch import Tensor, nn

from dcpc.models import DeepLatentGaussian
from dcpc.training import HeldOut, ImageData, ParticleModule

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)  # the tensors are small, and test processes share the cores


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a CUDA device where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def clean_pyro():
    """An empty parameter store, seeded generators, the default dtype put back, no handler left."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    left = list(runtime._PYRO_STACK)
    runtime._PYRO_STACK.clear()
    assert left == []


@pytest.fixture
def float64():
    """Double precision, for tests whose claim is exactness."""
    torch.set_default_dtype(torch.float64)


class TinyImages(ImageData):
    """Random 1 x 2 x 2 images."""

    def __init__(self, num_images: int = 24, **options: int) -> None:
        super().__init__(**{"batch_size": 8, "num_held_out": 4, **options})
        self.num_images = num_images

    def load(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        images = torch.rand(self.num_images, 1, 2, 2, generator=generator)
        return images, torch.zeros(self.num_images, dtype=torch.long)


class ShiftedGaussian(nn.Module):
    """z ~ N(0, I), x ~ N(shift + z, I): marginally x ~ N(shift, 2 I)."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> None:
        rows = x.flatten(1)
        with pyro.plate("data", len(rows)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(rows), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.shift + z, 1.0).to_event(1), obs=rows)


class LinearEncoder(nn.Module):
    """`q(z | x) = N(slope x + offset, scale^2)`, the family of `ShiftedGaussian`'s posterior."""

    def __init__(self, slope: float = 0.0, offset: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.offset = nn.Parameter(torch.tensor(offset))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor) -> None:
        rows = x.flatten(1)
        with pyro.plate("data", len(rows)):
            loc = self.slope * rows + self.offset
            pyro.sample("z", dist.Normal(loc, self.log_scale.exp()).to_event(1))


@pytest.fixture
def images() -> type[TinyImages]:
    return TinyImages


@pytest.fixture
def shifted_gaussian() -> type[ShiftedGaussian]:
    return ShiftedGaussian


@pytest.fixture
def linear_encoder() -> type[LinearEncoder]:
    return LinearEncoder


@pytest.fixture
def deep_module() -> Callable[..., ParticleModule]:
    """A module around a deep latent Gaussian of 2 x 2 images, always from the same weights."""

    def make(latent_sizes: tuple[int, ...] = (2, 3), **options: object) -> ParticleModule:
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = DeepLatentGaussian(latent_sizes, [1, 2, 2])
        settings = {"held_out": HeldOut(2, num_temperatures=2, test_temperatures=2), **options}
        return ParticleModule(model, **settings)

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**options: object) -> Trainer:
        settings = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "logger": False,
            "max_epochs": 1,
        }
        return Trainer(**{**settings, **options})

    return make
