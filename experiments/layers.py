"""The layers of configs that train an algorithm on a data set."""

from __future__ import annotations

__all__ = ["layers"]

WARM_STARTS = {"mnist": "warm", "cifar10": "warm-restart"}
"""By data set, the layer of algorithms whose names end in `-warm`."""


def layers(data_set: str, algorithm: str) -> list[str]:
    """Arguments of the `dcpc` command, `--config=...`, base first."""
    name = algorithm.removesuffix("-warm")
    algorithms = [name] if name == algorithm else [name, WARM_STARTS[data_set]]
    paths = [data_set, *(f"algorithms/{layer}" for layer in algorithms)]
    return [f"--config=configs/{path}.json" for path in paths]
