"""Names of a package that are imported when they are first used, as by PEP 562."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["exported"]


def exported(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names live in its modules.

    The `dcpc` command can then show a help screen without importing torch.

    Args:
        package: The package's `__name__`.
        homes: For every module, the names that the package takes from it.
    """
    owners = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in owners:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(owners[name]), name)

    def names() -> list[str]:
        return sorted([*vars(import_module(package)), *owners])

    return get, names
