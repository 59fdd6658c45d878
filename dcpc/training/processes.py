"""Several processes that train one model: what each must agree on with the others."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict

import torch
import torch.distributed as distributed
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from dcpc.errors import OptionError
from dcpc.observed import Observed, main_tensor, num_data
from dcpc.parts import Adaptation
from dcpc.training.data import EpochBatches

__all__ = [
    "average",
    "check_strategy",
    "is_first_process",
    "is_first_to_fail",
    "let_others_fail",
    "share",
]

UNUSED = "ddp_find_unused_parameters_true"

FAILURES = "dcpc_failures"
"""Key of the number of processes that have failed."""

PATIENCE = 10.0
"""Seconds for which the first process stays, after it has failed, for others to do so too."""


def check_strategy(trainer: Trainer, has_guide: bool, averages_gradients: bool = True) -> None:
    """Refuses strategies that cannot train on particles.

    Args:
        trainer: The trainer.
        has_guide: Whether there are parameters that not every step learns.
        averages_gradients: Whether Lightning computes the gradients, and so averages them.

    Raises:
        OptionError: Naming what has to change.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy):
        raise OptionError(
            f"trainer.strategy: {type(strategy).__name__} splits or copies the model in a way that "
            "captured programs cannot follow; use 'ddp', 'ddp_spawn' or 'ddp_fork'"
        )
    if not averages_gradients and trainer.world_size > 1:
        raise OptionError(
            f"trainer.devices={trainer.world_size}: learning rules step the weights themselves, so "
            "that every process would learn weights of its own; use 1"
        )
    if trainer.num_nodes > 1:
        raise OptionError(
            f"trainer.num_nodes={trainer.num_nodes}: processes share particles through files of "
            "one machine; use 1"
        )
    if has_guide and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise OptionError(
            "trainer.strategy: with model.guide, some steps leave parameters without a gradient; "
            f"use '{UNUSED}'"
        )
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(batches, EpochBatches) or batches.num_processes != trainer.world_size:
        raise OptionError(
            "the training data are not shared out by dcpc.training.data.EpochBatches, so that "
            "particles would be of other data in every epoch; use a LabelledData, with "
            "trainer.use_distributed_sampler false"
        )


def is_first_process() -> bool:
    """Whether this process is the first of those that train, from when they are started on."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def num_processes() -> int:
    """Number of processes that train together."""
    is_one = not (distributed.is_available() and distributed.is_initialized())
    return 1 if is_one else distributed.get_world_size()


def is_first_to_fail() -> bool | None:
    """Whether no other process of the training has asked this before; None if nobody can say.

    The processes count in the store by which torch connects them. The first process keeps it, so
    that nobody can say once that one has ended.
    """
    if num_processes() == 1:
        return True
    try:
        return distributed.distributed_c10d._get_default_store().add(FAILURES, 1) == 1
    except RuntimeError:
        return None


def let_others_fail() -> None:
    """Ends what others wait for from the first process, and lets them ask `is_first_to_fail`."""
    if num_processes() == 1 or distributed.get_rank() > 0 or distributed.get_backend() != "gloo":
        return
    store, total = distributed.distributed_c10d._get_default_store(), num_processes()
    distributed.destroy_process_group()
    until = time.monotonic() + PATIENCE
    while store.add(FAILURES, 0) < total and time.monotonic() < until:
        time.sleep(0.05)


def share(data: Observed) -> float:
    """This process's share of the data of a step, times the number of processes: 1 on average."""
    if num_processes() == 1:
        return 1.0
    total = torch.tensor(float(num_data(data)), device=main_tensor(data).device)
    distributed.all_reduce(total)
    return num_processes() * num_data(data) / float(total)


def average(adaptation: Mapping[str, Adaptation], weight: float) -> Mapping[str, Adaptation]:
    """Averages what the proposals have learned over the processes, by their shares of the data.

    The states of step sizes (in logarithms) and of preconditioners are linear in what a sweep
    saw, so that this is what one process would have learned from all the data of the step.
    """
    if num_processes() == 1:
        return adaptation
    states = {name: asdict(learned) for name, learned in adaptation.items()}
    tensors = [value for name in sorted(states) for value in _leaves(states[name])]
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    flat *= weight / num_processes()
    distributed.all_reduce(flat)
    parts = iter(flat.split([tensor.numel() for tensor in tensors]))
    return {
        name: Adaptation(
            **{
                kind: {
                    key: next(parts).to(value).reshape(value.shape) for key, value in kept.items()
                }
                for kind, kept in states[name].items()
            }
        )
        for name in sorted(states)
    }


def _leaves(state: Mapping[str, Mapping[str, Tensor]]) -> list[Tensor]:
    return [value for kept in state.values() for value in kept.values()]
