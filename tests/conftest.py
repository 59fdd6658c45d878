"""What every test shares: the search path of the oracles, a clean Pyro, and seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import pyro
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)  # the tensors are small, and test processes share the cores


@pytest.fixture(autouse=True)
def clean_pyro():
    """An empty parameter store, seeded generators, and the default dtype put back."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def float64():
    """Double precision, for tests whose claim is exactness."""
    torch.set_default_dtype(torch.float64)
