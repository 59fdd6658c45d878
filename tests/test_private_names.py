"""Private names of torch that the package uses are there; where one goes, here is what to do."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import dcpc

PRIVATE = {
    "torch.utils._pytree": "Flattens arguments. torch.utils.pytree, or optree, has the same.",
    "torch.utils._python_dispatch.TorchDispatchMode": (
        "Sees reads of data while a program is captured: documented, but private by its module."
    ),
    "torch.ops.aten._local_scalar_dense": "The operator behind .item(): print a graph to see it.",
    "torch._ops.OpOverload": "The type of a captured operator: type(torch.ops.aten.add.Tensor).",
    "torch._C._functorch.is_batchedtensor": (
        "Tells batched tensors in divide/vectorised: look for its successor in torch.func's tests."
    ),
    "torch._C._functorch.peek_interpreter_stack": "The same: whether a vmap is under way.",
    "torch._C._disabled_torch_function_impl": (
        "Makes a plate's indices a plain subclass (divide/handlers.py): define __torch_function__."
    ),
    "torch._standard_gamma": "Gamma draws that vmap takes: torch.distributions.Gamma calls it too.",
    "torch._functorch.utils.enable_single_level_autograd_function": (
        "Operators with a gradient of their own (operators.py). Try "
        "torch.library.register_autograd anew (the docstring says what it failed at), or go back "
        "to plain torch in kernels.py."
    ),
    "torch.autograd.function._SingleLevelFunction": "As for enable_single_level_autograd_function.",
    "torch.autograd.forward_ad._set_fwd_grad_enabled": (
        "As for enable_single_level_autograd_function."
    ),
    "torch._C._AutoDispatchBelowAutograd": "As for enable_single_level_autograd_function.",
    "torch._C._after_autograd_keyset": "As for enable_single_level_autograd_function.",
    "torch._C._is_fwd_grad_enabled": "As for enable_single_level_autograd_function.",
    "torch._inductor.compile_fx.compile_fx_inner": (
        "Compiles a graph (graphs/compiler.py): torch.compile takes the same module, and more "
        "time; where compiling fails, sweeps run as they are written."
    ),
    "torch._inductor.config": "As for compile_fx_inner.",
    "torch._inductor.decomposition.select_decomp_table": "As for compile_fx_inner.",
    "torch._inductor.cpu_vec_isa.valid_vec_isa_list": (
        "Width of the vectors in compiled code: leave it out; eight schools takes longer then."
    ),
    "torch._guards.TracingContext": (
        "As for compile_fx_inner; and in captures (divide/capture.py): leave it out; they take "
        "half as long again."
    ),
    "torch._guards.tracing": "As for TracingContext.",
    "torch._subclasses.fake_tensor.FakeTensorMode": "As for TracingContext.",
}


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_there(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[length:]:
        assert hasattr(found, part), f"torch has no {name} any more. {PRIVATE[name]}"
        found = getattr(found, part)


def test_no_other_is_used():
    pattern = re.compile(
        r"(?:from (torch[\w.]*) import (_\w+|\w+)|(torch(?:\.\w+)+)|\bforward_ad\.(_\w+))"
    )
    unknown = set()
    for path in Path(dcpc.__file__).parent.rglob("*.py"):
        for module, imported, dotted, forward in pattern.findall(path.read_text()):
            name = dotted or (f"{module}.{imported}" if module else "")
            name = f"torch.autograd.forward_ad.{forward}" if forward else name
            if not re.search(r"\._[a-zA-Z]", name):
                continue
            if not any(name == one or name.startswith(f"{one}.") for one in PRIVATE):
                unknown.add(f"{name} ({path.name})")
    assert not unknown
