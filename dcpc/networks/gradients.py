"""Predictive-coding gradients of an `nn.Sequential`, as a replacement of `loss.backward()`.

With layers `f_1, ..., f_L`, activations `vhat_l = f_l(vhat_{l-1})`, `vhat_0 = x`, beliefs `v_l` and
errors `eps_l`, prediction minus belief, the gradient of layer `l` is `J_theta' eps_l`. Millidge,
Tschantz & Buckley, "Predictive coding approximates backprop along arbitrary computation graphs"
(2022); Rosenbaum, "On the relationship between predictive coding and backpropagation" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dcpc.errors import DataError, OptionError
from dcpc.networks.relaxation import RelaxationError

__all__ = ["Mode", "PCGradients", "pc_gradients"]

Mode = Literal["exact", "fixed_prediction", "strict"]
Loss = Callable[[Tensor, Tensor], Tensor]


class PCGradients(NamedTuple):
    """Diagnostics of `pc_gradients`.

    Attributes:
        activations: `vhat_0, ..., vhat_L` of the forward pass.
        loss: Loss of `vhat_L`, a scalar.
        output_gradient: `dL / dvhat_L`.
        beliefs: `v_0, ..., v_L`.
        errors: `eps_1, ..., eps_L`, at the beliefs.
    """

    activations: tuple[Tensor, ...]
    loss: Tensor
    output_gradient: Tensor
    beliefs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]


def pc_gradients(
    model: nn.Sequential,
    loss_fn: Loss,
    x: Tensor,
    y: Tensor,
    mode: Mode = "exact",
    step_size: float = 0.1,
    num_steps: int = 20,
    init: Sequence[Tensor] | None = None,
) -> PCGradients:
    """Sets every parameter's `.grad` by predictive coding.

    exact: `eps_l = dL / dvhat_l`, `v = vhat - eps`: backpropagation.

    The error of the last layer is the gradient of the loss in all modes, `eps_L = dL / df_L`, at
    the prediction that it has; its belief is that prediction minus the error.

    fixed_prediction: beliefs start at `vhat`, and move by
    `v_l += step_size (eps_l - J_{l+1}(vhat_l)' eps_{l+1})`, `eps_l = vhat_l - v_l`.
    `step_size=1` and `num_steps >= L` give backpropagation.

    strict: the same at the beliefs, `J_{l+1}(v_l)` and `eps_l = f_l(v_{l-1}) - v_l`: descent of
    `L(f_L(v_{L-1}), y) + sum_l |eps_l|^2 / 2`. The gradients are taken at the beliefs. On a loss
    that is half the squared error, summed over the batch, this is `InferenceLearning` of
    `num_steps - 1` steps on squared-error nodes, its weights' gradients summed likewise.

    Errors are evaluated `num_steps` times, and beliefs move in between, so that those returned fit
    each other; after one step, only the last layer has an error. A layer's randomness is drawn
    once per call, batch statistics count once, gradients of a layer that occurs twice add up, and
    parameters that need no gradient get none.

    Args:
        model: Layers in order; each is one node of the algorithm.
        loss_fn: Loss as a function of `(vhat_L, y)`, a scalar.
        x: Inputs, `(batch, ...)`.
        y: Targets, as the loss takes them.
        mode: See above.
        step_size: Step size of the beliefs; ignored by `exact`.
        num_steps: Evaluations of the errors; `exact` does without.
        init: First beliefs `v_1, ..., v_{L-1}` of mode `strict`, by default the activations.

    Raises:
        OptionError: Not a Sequential or an empty one, an unknown mode, or a number out of range.
        DataError: A loss that is not one number, targets or `init` of the wrong shape.
        RelaxationError: Beliefs diverged.
    """
    _check(model, mode, step_size, num_steps)
    if init is not None and mode != "strict":
        raise OptionError(
            f"init is for mode='strict' only: with mode={mode!r} beliefs start at the activations"
        )
    with torch.enable_grad():
        if mode == "exact":
            found, gradients = _exact(model, loss_fn, x, y)
        else:
            found, gradients = _relaxed(model, loss_fn, x, y, mode, step_size, num_steps, init)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = gradients.get(parameter, torch.zeros_like(parameter))
    return found


Gradients = dict[nn.Parameter, Tensor]


def _exact(
    model: nn.Sequential, loss_fn: Loss, x: Tensor, y: Tensor
) -> tuple[PCGradients, Gradients]:
    # A leaf, so that layers in front of all weights have errors, too.
    leaf = x.detach().requires_grad_(x.is_floating_point())
    activations = [leaf]
    for module in model:
        activations.append(module(activations[-1].clone()))  # which it may overwrite
    loss = _loss(loss_fn, activations[-1], y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [v for v in activations[1:] if v.requires_grad]
    slopes = torch.autograd.grad(loss, [*wanted, *parameters], allow_unused=True)
    by_activation = {id(v): g for v, g in zip(wanted, slopes, strict=False)}
    errors = []
    for activation in activations[1:]:
        slope = by_activation.get(id(activation))
        errors.append(torch.zeros_like(activation) if slope is None else slope)
    values = [v.detach() for v in activations]
    beliefs = [x, *(v - e for v, e in zip(values[1:], errors, strict=True))]
    pairs = zip(parameters, slopes[len(wanted) :], strict=True)
    gradients = {p: g for p, g in pairs if g is not None}
    found = PCGradients(tuple(values), loss.detach(), errors[-1], tuple(beliefs), tuple(errors))
    return found, gradients


def _relaxed(
    model: nn.Sequential,
    loss_fn: Loss,
    x: Tensor,
    y: Tensor,
    mode: Mode,
    step_size: float,
    num_steps: int,
    init: Sequence[Tensor] | None,
) -> tuple[PCGradients, Gradients]:
    layers = [_Layer(module) for module in model]
    passes = [layers[0](x)]
    for layer in layers[1:]:
        passes.append(layer(passes[-1].output.detach()))
    activations = [x, *(one.output.detach() for one in passes)]
    loss, output_gradient = _loss_gradient(loss_fn, activations[-1], y)
    beliefs = list(activations)
    if init is not None:
        beliefs[1:-1] = _initial_beliefs(init, activations)
        passes = _passes(layers, beliefs)
    errors = _errors(passes, beliefs, loss_fn, y)
    _require_finite(errors, 0)
    for step in range(1, num_steps):
        for depth in range(1, len(layers)):
            pull = passes[depth].pull(errors[depth])
            beliefs[depth] = beliefs[depth] + step_size * (errors[depth - 1] - pull)
        if mode == "strict":
            passes = _passes(layers, beliefs)
        errors = _errors(passes, beliefs, loss_fn, y)
        _require_finite(errors, step)
    beliefs[-1] = passes[-1].output.detach() - errors[-1]

    gradients: Gradients = {}
    for one, error in zip(passes, errors, strict=True):
        for parameter, gradient in one.parameter_gradients(error).items():
            gradients[parameter] = gradients.get(parameter, 0) + gradient
    found = PCGradients(tuple(activations), loss, output_gradient, tuple(beliefs), tuple(errors))
    return found, gradients


class _Pass(NamedTuple):
    """One evaluation of a layer, as a graph of its own from the input to the output."""

    module: nn.Module
    input: Tensor
    output: Tensor

    def pull(self, error: Tensor) -> Tensor:
        """`J' eps`, of the input's shape."""
        (pulled,) = torch.autograd.grad(
            self.output, self.input, error, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self.input) if pulled is None else pulled

    def parameter_gradients(self, error: Tensor) -> Gradients:
        """`J_theta' eps` of the layer's parameters that need gradients."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not parameters:
            return {}
        found = torch.autograd.grad(
            self.output, parameters, error, retain_graph=True, allow_unused=True
        )
        return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def _require_finite(errors: Sequence[Tensor], step: int) -> None:
    bad = [depth for depth, error in enumerate(errors) if not math.isfinite(error.sum())]
    if bad:
        raise RelaxationError(
            f"the error of model[{bad[-1]}] is NaN or infinite at step {step}; lower step_size, or "
            "look for NaN in the data and the weights"
        )


def _passes(layers: Sequence[_Layer], beliefs: Sequence[Tensor]) -> list[_Pass]:
    """All layers at their inputs' beliefs."""
    return [layer(belief) for layer, belief in zip(layers, beliefs, strict=False)]


def _errors(
    passes: Sequence[_Pass], beliefs: Sequence[Tensor], loss_fn: Loss, y: Tensor
) -> list[Tensor]:
    """Prediction minus belief; of the last layer, the gradient of the loss."""
    predictions = [one.output.detach() for one in passes]
    errors = [u - v for u, v in zip(predictions[:-1], beliefs[1:-1], strict=True)]
    return [*errors, _loss_gradient(loss_fn, predictions[-1], y)[1]]


class _Layer:
    """A layer that is evaluated often, with one draw of its noise, and counts once.

    It is given copies, which it may overwrite.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._noise: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, value: Tensor) -> _Pass:
        leaf = value.detach()
        if leaf.is_floating_point():
            leaf.requires_grad_()
        if self._noise is None:
            self._noise = _random_state(leaf)
            return _Pass(self.module, leaf, self.module(leaf.clone()))
        # On copies of the buffers: batch statistics were counted in the first evaluation.
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        present = _random_state(leaf)
        _set_random_state(self._noise, leaf)
        try:
            output = functional_call(self.module, buffers, (leaf.clone(),))
        finally:
            _set_random_state(present, leaf)
        return _Pass(self.module, leaf, output)


def _random_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    device = torch.cuda.get_rng_state(like.device) if like.is_cuda else None
    return torch.get_rng_state(), device


def _set_random_state(state: tuple[Tensor, Tensor | None], like: Tensor) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], like.device)


def _loss(loss_fn: Loss, output: Tensor, y: Tensor) -> Tensor:
    if not isinstance(y, Tensor):
        raise DataError(f"the targets must be a tensor, got {type(y).__name__}")
    if y.is_floating_point() and y.shape != output.shape:
        raise DataError(
            f"the targets have shape {tuple(y.shape)}, but the model's output has "
            f"{tuple(output.shape)}; a loss would broadcast one against the other"
        )
    if y.dim() and len(y) != len(output):
        raise DataError(f"there are {len(y)} targets, but {len(output)} outputs of the model")
    loss = loss_fn(output, y)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"the loss must be one number, got {got}; reduce it over the batch, for example with "
            "reduction='mean'"
        )
    return loss.reshape(())


def _loss_gradient(loss_fn: Loss, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = output.detach().requires_grad_()
    loss = _loss(loss_fn, leaf, y)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _initial_beliefs(init: Sequence[Tensor], activations: Sequence[Tensor]) -> list[Tensor]:
    expected = [tuple(v.shape) for v in activations[1:-1]]
    got = [tuple(v.shape) for v in init]
    if got != expected:
        raise DataError(
            f"init must hold beliefs of all layers but the last, of shapes {expected}, got {got}"
        )
    return [v.detach().clone() for v in init]


def _check(model: nn.Sequential, mode: Mode, step_size: float, num_steps: int) -> None:
    if not isinstance(model, nn.Sequential):
        raise OptionError(
            f"model must be an nn.Sequential, whose modules are the layers, got "
            f"{type(model).__name__}; wrap it: nn.Sequential(model)"
        )
    if len(model) == 0:
        raise OptionError("model is an nn.Sequential without layers; give it at least one")
    if mode not in get_args(Mode):
        raise OptionError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    if mode != "exact" and not step_size > 0.0:
        raise OptionError(f"step_size must be positive, got {step_size}")
    if mode != "exact" and num_steps < 1:
        raise OptionError(
            f"num_steps must be at least 1 with mode={mode!r}, got {num_steps}: after one "
            "evaluation of the errors, the last layer has one"
        )
