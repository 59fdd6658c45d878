"""Operators of our own for torch's dispatcher: one node in every capture, with a gradient.

A `torch.autograd.Function` would lose its backward in a capture by `make_fx(torch.vmap(...))`, and
an operator given one by `torch.library.register_autograd` raises under `torch.func.grad` and
returns zero tangents under `torch.func.jvp` (torch 2.13). So our operators bring their own
kernel for the dispatcher's `Autograd` key.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

__all__ = ["ELEMENTWISE", "KERNELS", "define_elementwise"]

ELEMENTWISE: set[Any] = set()
"""Operators whose result at an element depends on that element of their arguments."""

KERNELS: dict[Any, Callable[..., Tensor]] = {}
"""Kernels of the operators, to be called where nothing is differentiated or captured."""

LIBRARY = torch.library.Library("dcpc", "FRAGMENT")


def _define(
    schema: str,
    kernel: Callable[..., Tensor],
    *,
    vjp: Callable[..., Sequence[Tensor | None]],
    jvp: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    vmap: Callable[..., tuple[Tensor, int]],
) -> Any:
    """Defines a differentiable operator that is one node in every capture.

    Args:
        schema: the operator's schema; every argument and the result are tensors.
        kernel: the value. It runs below autograd and may work in place on its own temporaries.
        vjp: for each argument its gradient or None, as a function of the result's gradient, of
            what is needed (a bool for each argument), and of all arguments.
        jvp: the result's tangent, as a function of the arguments' tangents (a tuple of tensors and
            None) and of all arguments.
        fake: an empty result of the right shape.
        vmap: the operator with a mapped axis, as `torch.library.register_vmap` calls it.

    Returns:
        The operator. `torch.autograd` in both modes, any nesting of `torch.func` transforms,
        `make_fx` and `torch.compile` understand it.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.dcpc, name).default

    def push_forward(ctx: Any, *tangents: Tensor | None) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]
            return jvp(tangents[3:], *saved)

    class Operator(_SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, grad: bool, forward_grad: bool, *inputs: Tensor) -> Tensor:
            # A Function turns both modes off, here and in jvp; outer transforms still need them.
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.set_grad_enabled(grad),
                forward_ad._set_fwd_grad_enabled(forward_grad),
            ):
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs[3:])
            ctx.save_for_forward(*inputs[3:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            needed = ctx.needs_input_grad[3:]
            return None, None, None, *vjp(grad, needed, *ctx.saved_tensors)

        jvp = staticmethod(push_forward)

    def autograd_kernel(keyset: Any, *inputs: Tensor) -> Tensor:
        modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        with enable_single_level_autograd_function():
            return Operator.apply(keyset, *modes, *inputs)  # type: ignore[attr-defined]

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_fake(f"dcpc::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"dcpc::{name}", vmap, lib=LIBRARY)
    return op


def define_elementwise(
    schema: str, kernel: Callable[..., Tensor], partials: tuple[Callable[..., Tensor], ...]
) -> Any:
    """Defines a broadcasting elementwise operator.

    Args:
        schema: the operator's schema; every argument and the result are tensors.
        kernel: the value. It runs below autograd and may work in place on its own temporaries.
        partials: for each argument, the partial derivative as a function of all arguments.

    Returns:
        The operator. `torch.autograd` in both modes, any nesting of `torch.func` transforms,
        `make_fx` and `torch.compile` understand it.
    """

    def vjp(grad: Tensor, needed: Sequence[bool], *inputs: Tensor) -> list[Tensor | None]:
        # Autograd sums what was broadcast.
        columns = zip(needed, partials, strict=True)
        return [grad * partial(*inputs) if wanted else None for wanted, partial in columns]

    def jvp(tangents: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        columns = zip(tangents, partials, strict=True)
        terms = [t * partial(*inputs) for t, partial in columns if t is not None]
        return functools.reduce(torch.add, terms)

    def fake(*inputs: Tensor) -> Tensor:
        return torch.empty_like(functools.reduce(torch.add, inputs))

    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        rank = max(x.dim() - (dim is not None) for x, dim in zip(inputs, dims, strict=True))
        aligned = []
        for x, dim in zip(inputs, dims, strict=True):
            if dim is not None:
                x = x.movedim(dim, 0)
                x = x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])
            aligned.append(x)
        return op(*aligned), 0

    op = _define(schema, kernel, vjp=vjp, jvp=jvp, fake=fake, vmap=vmap)
    ELEMENTWISE.add(op)
    KERNELS[op] = kernel
    return op
