"""Seeds of parts of a computation, which leave the global random state as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dcpc.threads import exclusive


def derived_seed(seed: int, *key: int) -> int:
    """The seed of one part of a computation, independent of those of the others."""
    return int(np.random.SeedSequence([seed, *key]).generate_state(1)[0])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """A block of code after which the random state, of every device in use, is what it was.

    Torch's default generator is one for all threads. Where another thread draws from it meanwhile,
    it takes numbers out of the block's own, and its draws are undone at the end: threads that run
    beside such a block draw from a `torch.Generator` of their own.

    Raises:
        ThreadError: Another thread is in such a block, or in an inference.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with exclusive("a seeded block"), torch.random.fork_rng(list(devices)):
        yield


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A block of code with a seed of its own; None draws from the global random state.

    Raises:
        ThreadError: Another thread is in such a block, or in an inference.
    """
    if seed is None:
        yield
        return
    with random_state_kept():
        _seed(seed)
        yield


def random_state() -> dict[str, Tensor]:
    """State of torch's default generators by device, of those in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    by_device = {f"cuda:{index}": torch.cuda.get_rng_state(index) for index in devices}
    return {"cpu": torch.get_rng_state(), **by_device}


@contextmanager
def continued(state: Mapping[str, Tensor]) -> Iterator[None]:
    """A block of code that goes on from a random state; an empty one draws from the global ones.

    States of devices that this machine lacks are left out.

    Raises:
        ThreadError: Another thread is in such a block, or in an inference.
    """
    if not state:
        yield
        return
    with random_state_kept():
        torch.set_rng_state(state["cpu"].cpu())
        for device, generator in state.items():
            if device != "cpu" and torch.device(device).index < torch.cuda.device_count():
                torch.cuda.set_rng_state(generator.cpu(), device)
        yield


def _seed(seed: int) -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would record a trace of all callers for a device that may come later
        torch.default_generator.manual_seed(seed)
