"""`nn.RNN`, `nn.LSTM` and `nn.GRU` as loops of cells, and the cells.

torch runs these modules by fused operators that have no batching rule, so that `torch.vmap` refuses
them. Here are functions with the arguments of those operators (`torch.gru(input, state, ...)`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Sequence[Tensor]], State]


def gru_cell(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    """One step of a gated recurrent unit.

    `r, z = sigmoid(.)`, `n = tanh(W x + r * (U h))`, `h' = (1 - z) n + z h`.

    Args:
        gates: The input's contribution `W x + b`, `(batch, 3 hidden)`, gates in the order r, z, n.
        state: `h`, `(batch, hidden)`.
        weights: Recurrent matrix and, if there is one, bias.
    """
    (h,) = state
    reset, update, new = gates.chunk(3, -1)
    own_reset, own_update, own_new = linear(h, *weights).chunk(3, -1)
    reset = torch.sigmoid(reset + own_reset)
    update = torch.sigmoid(update + own_update)
    new = torch.tanh(new + reset * own_new)
    return (new + update * (h - new),)


def lstm_cell(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    """One step of a long short-term memory, gates in the order i, f, g, o.

    Args:
        gates: The input's contribution `(batch, 4 hidden)`.
        state: `h`, `(batch, hidden or projection)`, and `c`, `(batch, hidden)`.
        weights: Recurrent matrix, bias if there is one, projection if there is one.
    """
    h, c = state
    bias = [weight for weight in weights[1:] if weight.dim() == 1]
    enter, forget, new, leave = (gates + linear(h, weights[0], *bias)).chunk(4, -1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    h = torch.sigmoid(leave) * torch.tanh(c)
    for projection in weights[1 + len(bias) :]:
        h = linear(h, projection)
    return h, c


def plain_cell(
    activation: Callable[[Tensor], Tensor], gates: Tensor, state: State, weights: Sequence[Tensor]
) -> State:
    """One step of an Elman network, `h' = activation(W x + U h)`."""
    (h,) = state
    return (activation(gates + linear(h, *weights)),)


def run_layers(
    cell: Cell,
    inputs: Tensor,
    state: Any,
    flat_weights: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, ...]:
    """A recurrent network, with the arguments and results of torch's fused operators.

    Args:
        cell: One step.
        inputs: `(time, batch, features)`, or `(batch, time, features)` with `batch_first`.
        state: `(layers * directions, batch, hidden)`; a pair of these for an LSTM.
        flat_weights: For each layer and direction: input matrix, recurrent matrix, two biases if
            `has_biases`, and an LSTM's projection.
        options: `has_biases, num_layers, dropout, train, bidirectional, batch_first`.

    Returns:
        The outputs, of the layout of `inputs`, and the final state or states.
    """
    has_biases, num_layers, dropout, train, bidirectional, batch_first = options
    states: State = (state,) if isinstance(state, Tensor) else tuple(state)
    num_directions = 2 if bidirectional else 1
    per_cell = len(flat_weights) // (num_layers * num_directions)
    sequence = list(inputs.unbind(1 if batch_first else 0))
    final: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(num_directions):
            position = layer * num_directions + direction
            weights = flat_weights[position * per_cell : (position + 1) * per_cell]
            current = tuple(part[position] for part in states)
            enter = [weights[0], weights[2]] if has_biases else [weights[0]]
            own = [weights[1], *weights[3 if has_biases else 2 :]]
            steps = sequence[::-1] if direction else sequence
            hidden = []
            for step in steps:
                current = cell(linear(step, *enter), current, own)
                hidden.append(current[0])
            outputs.append(hidden[::-1] if direction else hidden)
            final.append(current)
        sequence = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
        if dropout and train and layer < num_layers - 1:
            sequence = [drop(step, dropout) for step in sequence]
    result = torch.stack(sequence, 1 if batch_first else 0)
    return result, *(torch.stack(parts) for parts in zip(*final, strict=True))


def run_cell(
    cell: Cell,
    inputs: Tensor,
    state: Any,
    input_weight: Tensor,
    own_weight: Tensor,
    input_bias: Tensor | None = None,
    own_bias: Tensor | None = None,
) -> Any:
    """One step, with the arguments and results of `torch.gru_cell` and its like."""
    states: State = (state,) if isinstance(state, Tensor) else tuple(state)
    own = [own_weight] if own_bias is None else [own_weight, own_bias]
    result = cell(linear(inputs, input_weight, input_bias), states, own)
    return result[0] if isinstance(state, Tensor) else result


RECURRENT: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "gru": partial(run_layers, gru_cell),
    "lstm": partial(run_layers, lstm_cell),
    "rnn_tanh": partial(run_layers, partial(plain_cell, torch.tanh)),
    "rnn_relu": partial(run_layers, partial(plain_cell, torch.relu)),
}
"""By the name of torch's fused operator."""

CELLS: dict[str, Callable[..., Any]] = {
    "gru_cell": partial(run_cell, gru_cell),
    "lstm_cell": partial(run_cell, lstm_cell),
    "rnn_tanh_cell": partial(run_cell, partial(plain_cell, torch.tanh)),
    "rnn_relu_cell": partial(run_cell, partial(plain_cell, torch.relu)),
}
"""By the name of torch's operator of one step."""
