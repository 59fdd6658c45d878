"""Folders and files that a config names: `~` is the home folder, and everything is local."""

from __future__ import annotations

from pathlib import Path

from dcpc.errors import OptionError

__all__ = ["local_path"]


def local_path(key: str, given: str | Path) -> Path:
    """A path of the config, with `~` replaced by the home folder.

    Args:
        key: Key of the config that names it.
        given: The path.

    Raises:
        OptionError: It is a URL, or the home folder of an unknown user.
    """
    if "://" in str(given):
        raise OptionError(f"{key} must be a path of this machine's file system, got '{given}'")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise OptionError(
            f"{key}: '{given}' starts at the home folder of a user that does not exist; write the "
            "path in full"
        ) from error
