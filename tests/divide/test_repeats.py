"""Equal operators of a capture are computed once; what only looks equal is not."""

from __future__ import annotations

import math
import operator
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from zoo import CASES

from dcpc.divide import Arguments, capture, prior_particles, read_sites
from dcpc.divide.program import GraphProgram
from dcpc.divide.repeats import key_of, without_repeats

aten = torch.ops.aten


def of(build: Callable[[fx.Graph, fx.Node], list[fx.Node]]) -> fx.Graph:
    """A graph of one input whose outputs are what is built from it, each plus one."""
    graph = fx.Graph()
    built = build(graph, graph.placeholder("x"))
    graph.output(tuple(graph.call_function(aten.add.Tensor, (node, 1)) for node in built))
    graph.lint()
    return graph


def run(graph: fx.Graph, *inputs: Tensor) -> tuple[Tensor, ...]:
    graph.lint()
    return fx.GraphModule({}, graph)(*inputs)


def test_equal_operators_become_one_and_what_they_lead_to_too():
    def build(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        ends = []
        for _ in range(3):
            sine = graph.call_function(aten.sin.default, (x,))
            total = graph.call_function(aten.sum.dim_IntList, (sine, [0]), {"keepdim": True})
            parts = graph.call_function(aten.split.Tensor, (total, 1, 1))
            ends.append(graph.call_function(operator.getitem, (parts, 0)))
        return ends

    graph, x = of(build), torch.randn(2, 3)
    once = without_repeats(graph)
    # One of each for the three, and an output for each.
    assert Counter(node.op for node in once.nodes) == {
        "placeholder": 1,
        "call_function": 4 + 3,
        "output": 1,
    }
    expected = x.sin().sum(0, keepdim=True)[:, :1] + 1
    found = run(once, x)
    assert len(found) == 3
    for value in found:
        assert torch.equal(value, expected)
    assert len({value.data_ptr() for value in found}) == 3  # one may be written to


def draws(target: object, *args: object) -> object:
    return pytest.param(target, args, id=str(target))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        draws(aten.bernoulli.default),
        draws(aten.bernoulli.p, 0.5),
        draws(aten.normal.float_Tensor),
        draws(aten.poisson.default),
        draws(aten._standard_gamma.default),
        draws(aten.rand_like.default),
        draws(aten.randn_like.default),
        draws(aten.randint_like.default, 1000),
        draws(aten.multinomial.default, 2, True),
        draws(aten.native_dropout.default, 0.5, True),
        draws(aten.empty_like.default),
        draws(aten.new_empty.default, [2]),
    ],
)
def test_draws_and_memory_that_is_not_filled_stay_apart(target, args):
    first = (0.0,) if target is aten.normal.float_Tensor else ()
    graph = of(lambda graph, x: [graph.call_function(target, (*first, x, *args)) for _ in range(2)])
    assert len(without_repeats(graph).nodes) == len(graph.nodes)


def test_what_a_write_changes_is_computed_again():
    def build(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        own = graph.call_function(aten.clone.default, (x,))
        sums = []
        for _ in range(3):
            sums += [graph.call_function(aten.sum.default, (own,)) for _ in range(2)]
            graph.call_function(aten.mul_.Scalar, (own, 2.0))
        return sums

    graph, x = of(build), torch.randn(5, dtype=torch.float64)
    once = without_repeats(graph)
    assert sum(node.target is aten.mul_.Scalar for node in once.nodes) == 3
    assert sum(node.target is aten.sum.default for node in once.nodes) == 3
    expected = [x.sum() * 2**power + 1 for power in (0, 0, 1, 1, 2, 2)]
    for value, wanted in zip(run(once, x), expected, strict=True):
        torch.testing.assert_close(value, wanted)


CONSTANTS = [1, 1.0, True, 0, 0.0, -0.0, False, math.nan, math.inf, "nan", None]


def test_numbers_that_are_equal_in_python_but_not_in_torch_have_different_keys():
    for nested in (lambda v: v, lambda v: [v], lambda v: {"a": (v,)}, lambda v: slice(v, None)):
        keys = [key_of(nested(value)) for value in CONSTANTS]
        assert len(set(keys)) == len(CONSTANTS)
        assert keys == [key_of(nested(value)) for value in CONSTANTS]
    assert key_of(float("nan")) == key_of(-math.nan)
    assert key_of(complex(0.0, -0.0)) != key_of(complex(0.0, 0.0))
    assert key_of([1, 2]) != key_of((1, 2))


def test_results_of_such_numbers_stay_apart():
    numbers = [number for number in CONSTANTS if isinstance(number, int | float)]

    def build(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        whole = [graph.call_function(aten.full.default, ([2], n)) for n in numbers]
        signs = [graph.call_function(aten.copysign.Scalar, (x, n)) for n in (0.0, -0.0)]
        return [*whole, *signs]

    graph = of(build)
    once = without_repeats(graph)
    assert len(once.nodes) == len(graph.nodes)
    got = run(once, torch.tensor([1.0, -2.0]))
    dtypes = {int: torch.int64, float: torch.float32, bool: torch.int64}  # bool + 1
    assert [value.dtype for value in got[:-2]] == [dtypes[type(n)] for n in numbers]
    assert [value.tolist() for value in got[-2:]] == [[2.0, 3.0], [0.0, -1.0]]


def test_nodes_of_other_metadata_stay_apart_and_metadata_is_kept():
    values = [
        torch.zeros(2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, 1),
        torch.zeros(2),
    ]

    def build(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        nodes = [graph.call_function(aten.sin.default, (x,)) for _ in values]
        for node, value in zip(nodes, values, strict=True):
            node.meta["val"] = value
        return nodes

    kept = [n for n in without_repeats(of(build)).nodes if n.target is aten.sin.default]
    assert [node.meta["val"] is value for node, value in zip(kept, values[:3], strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_factors_are_bit_for_bit_those_of_the_whole_graph(case, monkeypatch):
    model, args, kwargs = case.build()
    sites, arguments = read_sites(model, args, kwargs), Arguments(args, kwargs)
    latents = prior_particles(model, sites, arguments, 3)
    factors = []
    for rewrite in (without_repeats, lambda graph: graph):
        with monkeypatch.context() as patched:
            patched.setattr(capture, "without_repeats", rewrite)
            program = GraphProgram(model, sites, arguments, latents)
        factors.append(program.select(list(sites))(latents, arguments.tensors))
    assert factors[0].keys() == factors[1].keys() == set(sites)
    for name, value in factors[0].items():
        assert torch.equal(value, factors[1][name]), name


FRESH = """
import sys
import dcpc

def compilers():
    return {name for name in sys.modules if name.startswith(("torch._inductor", "torch._dynamo"))}

assert not compilers()
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from dcpc.divide.capture import capture

make_fx(lambda x: x + 1)(torch.zeros(1))
before = compilers()
assert not any(name.startswith("torch._inductor.compile_fx") for name in before)
capture(lambda x: (x.sin() + x.sin(),), [torch.zeros(3, 2)], [])
assert compilers() == before, compilers() - before
"""


def test_neither_the_package_nor_a_first_capture_imports_a_compiler():
    """None but what `make_fx` imports itself."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
