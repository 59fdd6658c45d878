"""Which parameters are values and which are weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcpc.errors import OptionError
from dcpc.networks import (
    FactorizedGaussianNode,
    eparameters,
    get_estep_params,
    get_mstep_params,
    get_named_estep_params,
    get_named_mstep_params,
    mparameters,
    partition,
)


def named(pairs: object) -> list[str]:
    return [name for name, _ in pairs]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(1)) for _ in range(3))


@eparameters("a")
class Values(Plain):
    pass


@mparameters("b")
class ValuesAndWeights(Values):
    pass


@eparameters("b")
class MoreValues(Values):
    pass


@eparameters()
class DeclaresNothing(Plain):
    pass


@mparameters("b")
class Weights(Plain):
    pass


@eparameters("a")
@mparameters("a", "b", "c")
class Both(Plain):
    pass


def test_a_node_has_its_value_on_one_side_and_its_variance_on_the_other() -> None:
    modules = nn.ModuleList([nn.Linear(784, 256), FactorizedGaussianNode(256)])
    assert named(get_named_estep_params(modules)) == ["1.value"]
    assert named(get_named_mstep_params(modules)) == ["0.weight", "0.bias", "1.logvar"]
    assert [id(p) for p in get_estep_params(modules)] == [id(modules[1].value)]
    assert [id(p) for p in get_mstep_params(modules)] == [
        id(p) for p in (modules[0].weight, modules[0].bias, modules[1].logvar)
    ]


@pytest.mark.parametrize(
    ("module", "values", "weights"),
    [
        # E iff declared E; else not E if declared M; else by default. M is the mirror image.
        (Plain, "", "abc"),
        (Values, "a", "bc"),
        (ValuesAndWeights, "a", "b"),
        (MoreValues, "ab", "c"),
        (DeclaresNothing, "", "abc"),
        (Weights, "", "b"),
        (Both, "a", "abc"),
    ],
)
def test_every_case_of_the_rule(module: type[nn.Module], values: str, weights: str) -> None:
    assert named(get_named_estep_params(module())) == list(values)
    assert named(get_named_mstep_params(module())) == list(weights)


def test_the_default_decides_where_nothing_is_declared() -> None:
    assert named(get_named_estep_params(Plain(), default=True)) == list("abc")
    assert named(get_named_mstep_params(Plain(), default=False)) == []
    assert named(get_named_estep_params(Weights(), default=True)) == list("ac")


def test_exclusion_prefix_depth_and_shared_parameters() -> None:
    modules = nn.Sequential(Plain(), nn.Sequential(Plain()), Plain())
    modules[2].a = modules[0].a
    everything = named(get_named_mstep_params(modules))
    assert everything == named(modules.named_parameters())
    assert "2.a" not in everything
    again = get_named_mstep_params(modules, remove_duplicate=False)
    assert named(again) == named(modules.named_parameters(remove_duplicate=False))
    exclude = [modules[0].b, modules[1]]
    assert named(get_named_mstep_params(modules, exclude=exclude)) == ["0.a", "0.c", "2.b", "2.c"]
    assert named(get_named_mstep_params(modules[0], prefix="top")) == ["top.a", "top.b", "top.c"]
    assert named(get_named_mstep_params(modules, recurse=False)) == []


def test_a_module_that_occurs_twice_is_given_twice_only_on_request() -> None:
    shared = Plain()
    modules = nn.Sequential(shared, shared)
    assert named(get_named_mstep_params(modules)) == ["0.a", "0.b", "0.c"]
    again = get_named_mstep_params(modules, remove_duplicate=False)
    assert named(again) == named(modules.named_parameters(remove_duplicate=False))


def test_a_parameter_of_two_names_is_given_twice_only_on_request() -> None:
    module = Plain()
    module.b = module.a
    assert named(get_named_mstep_params(module)) == ["a", "c"]
    assert named(get_named_mstep_params(module, remove_duplicate=False)) == ["a", "b", "c"]


def test_partition_is_disjoint_and_exhaustive() -> None:
    modules = nn.Sequential(nn.Linear(2, 3), FactorizedGaussianNode(3), Values(), MoreValues())
    values, weights = partition(modules)
    assert not values.keys() & weights.keys()
    assert {**values, **weights}.keys() == dict(modules.named_parameters()).keys()
    assert list(values) == ["1.value", "2.a", "3.a", "3.b"]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Weights, r"\['0.a', '0.c'\] are neither values nor weights.*@mparameters"),
        (Both, r"\['0.a'\] are declared both values and weights"),
    ],
)
def test_partition_refuses_parameters_on_no_side_or_on_both(
    module: type[nn.Module], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        partition(nn.Sequential(module()))


@pytest.mark.parametrize("declare", [eparameters, mparameters])
def test_only_modules_have_parameters_to_declare(declare: object) -> None:
    with pytest.raises(TypeError, match=r"names of parameters must be strings, got 3"):
        declare("a", 3)
    for thing in (int, Plain()):
        with pytest.raises(TypeError, match=r"only subclasses of nn\.Module"):
            declare("a")(thing)
