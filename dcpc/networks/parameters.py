"""Parameters of a network by kind: values (the E-step) and weights (the M-step).

Predictive coding is expectation maximisation. The E-step relaxes values on the energy, the M-step
learns weights on it, and every parameter of a network belongs to one side. Classes declare theirs
by name:

    @eparameters("value")
    @mparameters("logvar")
    class Node(nn.Module): ...

A parameter named `k`, owned by a module whose class declares E names, is of the E-side if `k` is
among them; else, if its class declares M names and `k` is among them, it is not; else it is where
the `default` puts it. The M-side is the mirror image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from torch import nn

from dcpc.errors import OptionError

__all__ = [
    "Partition",
    "eparameters",
    "get_estep_params",
    "get_mstep_params",
    "get_named_estep_params",
    "get_named_mstep_params",
    "mparameters",
    "partition",
]

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

E_NAMES = "_estep_names"
M_NAMES = "_mstep_names"


def eparameters(*names: str) -> Callable[[ModuleClass], ModuleClass]:
    """Declares parameters of a module's class to be values, which the E-step relaxes.

    Names add up over base classes; to declare none is to declare nothing.

    Raises:
        TypeError: The class is no `nn.Module`, or a name is no string.
    """
    return _declaration(E_NAMES, names)


def mparameters(*names: str) -> Callable[[ModuleClass], ModuleClass]:
    """Declares parameters of a module's class to be weights, which the M-step learns.

    Names add up over base classes; to declare none is to declare nothing.

    Raises:
        TypeError: The class is no `nn.Module`, or a name is no string.
    """
    return _declaration(M_NAMES, names)


def get_named_estep_params(
    module: nn.Module,
    default: bool = False,
    exclude: Iterable[nn.Parameter | nn.Module] = (),
    prefix: str = "",
    recurse: bool = True,
    remove_duplicate: bool = True,
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the E-side with their names, in the order of `named_parameters`.

    Args:
        module: A network, or a part of one.
        default: Whether a parameter about which its class says nothing is of this side.
        exclude: Parameters to leave out, and modules all of whose parameters are left out.
        prefix: Put in front of all names.
        recurse: Whether to go into submodules.
        remove_duplicate: Whether a shared parameter is given once only.
    """
    return _named(module, E_NAMES, M_NAMES, default, exclude, prefix, recurse, remove_duplicate)


def get_named_mstep_params(
    module: nn.Module,
    default: bool = True,
    exclude: Iterable[nn.Parameter | nn.Module] = (),
    prefix: str = "",
    recurse: bool = True,
    remove_duplicate: bool = True,
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the M-side with their names; see `get_named_estep_params`."""
    return _named(module, M_NAMES, E_NAMES, default, exclude, prefix, recurse, remove_duplicate)


def get_estep_params(
    module: nn.Module,
    default: bool = False,
    exclude: Iterable[nn.Parameter | nn.Module] = (),
    recurse: bool = True,
) -> Iterator[nn.Parameter]:
    """The parameters of the E-side; see `get_named_estep_params`."""
    named = get_named_estep_params(module, default, exclude, recurse=recurse)
    return (parameter for _, parameter in named)


def get_mstep_params(
    module: nn.Module,
    default: bool = True,
    exclude: Iterable[nn.Parameter | nn.Module] = (),
    recurse: bool = True,
) -> Iterator[nn.Parameter]:
    """The parameters of the M-side; see `get_named_estep_params`."""
    named = get_named_mstep_params(module, default, exclude, recurse=recurse)
    return (parameter for _, parameter in named)


class Partition(NamedTuple):
    """Both sides of a network, each by name."""

    values: dict[str, nn.Parameter]
    weights: dict[str, nn.Parameter]


def partition(module: nn.Module) -> Partition:
    """Splits a network's parameters into values and weights: each is one or the other.

    Raises:
        OptionError: A parameter is on neither side or on both, by what its class declares.
    """
    values, weights = dict(get_named_estep_params(module)), dict(get_named_mstep_params(module))
    both = sorted(values.keys() & weights.keys())
    neither = [name for name, _ in module.named_parameters() if name not in values | weights]
    if both:
        raise OptionError(
            f"parameter(s) {both} are declared both values and weights; take their names out of "
            "@eparameters or of @mparameters"
        )
    if neither:
        raise OptionError(
            f"parameter(s) {neither} are neither values nor weights: their class declares "
            "@mparameters without them; add their names there, or to @eparameters"
        )
    return Partition(values, weights)


def _declaration(attribute: str, names: tuple[str, ...]) -> Callable[[ModuleClass], ModuleClass]:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names of parameters must be strings, got {name!r}")

    def declare(cls: ModuleClass) -> ModuleClass:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"only subclasses of nn.Module have parameters to declare, got {cls!r}")
        setattr(cls, attribute, (*vars(cls).get(attribute, ()), *names))
        return cls

    return declare


def _declared(module: nn.Module, attribute: str) -> set[str]:
    """The names that a module's class and its base classes declare."""
    return {name for cls in type(module).__mro__ for name in vars(cls).get(attribute, ())}


def _named(
    module: nn.Module,
    side: str,
    other_side: str,
    default: bool,
    exclude: Iterable[nn.Parameter | nn.Module],
    prefix: str,
    recurse: bool,
    remove_duplicate: bool,
) -> Iterator[tuple[str, nn.Parameter]]:
    excluded: set[int] = set()
    for item in exclude:
        members = item.parameters() if isinstance(item, nn.Module) else [item]
        excluded.update(id(parameter) for parameter in members)
    seen = set()
    modules = (
        module.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
        if recurse
        else [(prefix, module)]
    )
    for path, owner in modules:
        own, others = _declared(owner, side), _declared(owner, other_side)
        own_parameters = owner.named_parameters(recurse=False, remove_duplicate=remove_duplicate)
        for name, parameter in own_parameters:
            if remove_duplicate and id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if own:
                belongs = name in own
            elif name in others:
                belongs = False
            else:
                belongs = default
            if belongs and id(parameter) not in excluded:
                yield f"{path}.{name}" if path else name, parameter
