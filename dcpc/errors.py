"""Errors that this package raises where a plain `ValueError` would say too little."""


class DCPCError(ValueError):
    """Base class of the package's own errors."""


class DegenerateWeightsError(DCPCError):
    """Every particle of a population cell has zero weight, so that nothing can be normalised."""


class ModelError(DCPCError):
    """The Pyro program cannot be divided into units; names the site and what to change."""


class DataError(DCPCError):
    """Data that the model cannot condition on: NaN, outside a support, of the wrong shape."""


class CertificationError(DCPCError):
    """A divided program disagrees with the plain run of the model; names both sites."""


class EvidenceError(DCPCError):
    """No evidence estimate exists for this run; says why."""


class OptionError(DCPCError):
    """An argument of an inference class that is unknown, out of range, or does not fit another."""


class ThreadError(DCPCError):
    """Two threads at once in what the process has only once: torch's generator, Pyro's handlers."""


class FileError(DCPCError):
    """A file that cannot be written or read, or whose content is not what it should be."""


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Checks an integer argument; unlike pydantic's, the error is one line in the user's own words.

    Raises:
        OptionError: It is below the minimum.
    """
    if value < minimum:
        raise OptionError(f"{name} must be at least {minimum}, got {value}")


def require_seed(name: str, value: int) -> None:
    """Checks a seed; the bounds are NumPy's.

    Raises:
        OptionError: It is negative, or needs more than 32 bits.
    """
    if not 0 <= value < 2**32:
        raise OptionError(f"{name} must be a seed from 0 to 2^32 - 1, got {value}")
