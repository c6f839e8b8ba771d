"""Recurrent layers, one time step after another, in operators that have rules.

    RNN    h' = f(W x + b + U h + d),  f = tanh or ReLU                                              T 4.12
    LSTM   i, f, g, o = W x + b + U h + d;   c' = sig(f) c + sig(i) tanh(g);   h' = sig(o) tanh(c')
    GRU    r, z, n = W x + b,  r', z', n' = U h + d;   s = sig(z + z');   h' = n'' + s (h - n''),  n'' = tanh(n + sig(r + r') n')

Sigmoids are gates: coefficients of what they let through. Relevance so flows from step to step as in T 4.13-4.15, where the
thesis's ``f(U * x)`` is the secant of f times ``U * x`` here, which conserves for every f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from frpc.core.editor import Editor
from frpc.core.graph import bind, origin_of, replace, replace_items
from frpc.core.torch_compat import OpOverload, expression_of, flat_weights
from frpc.errors import BatchError, InputError, TrainingModeError

__all__ = ["masked", "unroll_recurrent_layers"]

aten = torch.ops.aten

Value = Any
"""A tensor, or the graph node that stands for one."""

Emit = Callable[..., Value]
"""Calls an operator: at once on tensors, or into a graph on nodes. The recurrences below are written once for both."""

State = tuple[Value, ...]
"""``(h,)``, and for an LSTM ``(h, c)``."""


@dataclass(frozen=True)
class Weights:
    """The parameters of one layer in one direction: ``W x + b``, ``U h + d``, and the projection of an LSTM's output."""

    w: Value
    u: Value
    b: Value | None
    d: Value | None
    projection: Value | None


def _rnn(activation: Any) -> Step:
    def step(emit: Emit, weights: Weights, drive: Value, state: State) -> State:
        (h,) = state
        return (emit(activation, emit(aten.add.Tensor, drive, emit(aten.linear.default, h, weights.u, weights.d))),)

    return step


def _lstm(emit: Emit, weights: Weights, drive: Value, state: State) -> State:
    h, c = state
    i, f, g, o = _parts(emit, emit(aten.add.Tensor, drive, emit(aten.linear.default, h, weights.u, weights.d)), 4)
    kept = emit(aten.mul.Tensor, emit(aten.sigmoid.default, f), c)
    added = emit(aten.mul.Tensor, emit(aten.sigmoid.default, i), emit(aten.tanh.default, g))
    c = emit(aten.add.Tensor, kept, added)
    h = emit(aten.mul.Tensor, emit(aten.sigmoid.default, o), emit(aten.tanh.default, c))
    return h if weights.projection is None else emit(aten.linear.default, h, weights.projection), c


def _gru(emit: Emit, weights: Weights, drive: Value, state: State) -> State:
    (h,) = state
    from_x, from_h = (_parts(emit, v, 3) for v in (drive, emit(aten.linear.default, h, weights.u, weights.d)))
    r, z = (emit(aten.sigmoid.default, emit(aten.add.Tensor, from_x[k], from_h[k])) for k in (0, 1))
    n = emit(aten.tanh.default, emit(aten.add.Tensor, from_x[2], emit(aten.mul.Tensor, r, from_h[2])))
    return (emit(aten.add.Tensor, n, emit(aten.mul.Tensor, z, emit(aten.sub.Tensor, h, n))),)


def _parts(emit: Emit, gates: Value, count: int) -> list[Value]:
    """Cuts ``[B, count * H]`` into the pre-activations of the gates, ``[B, H]`` each."""
    size = int(_shape(gates)[-1]) // count
    return [emit(aten.slice.Tensor, gates, -1, k * size, (k + 1) * size) for k in range(count)]


Step = Callable[[Emit, Weights, Value, State], State]
STEPS: dict[Any, Step] = {
    aten.lstm.input: _lstm,
    aten.gru.input: _gru,
    aten.rnn_tanh.input: _rnn(aten.tanh.default),
    aten.rnn_relu.input: _rnn(aten.relu.default),
}
CELLS: dict[Any, Step] = {
    aten.lstm_cell.default: _lstm,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: _rnn(aten.tanh.default),
    aten.rnn_relu_cell.default: _rnn(aten.relu.default),
}


def _shape(value: Value) -> Sequence[Any]:
    return tuple((value.meta["val"] if isinstance(value, fx.Node) else value).shape)


def _weights(given: Sequence[Value], has_biases: bool, count: int) -> list[Weights]:
    """Deals a flat list of parameters out to ``count`` layers and directions, in PyTorch's order."""
    each = len(given) // count
    groups = [list(given[i * each : (i + 1) * each]) for i in range(count)]
    projected = each % 2 == 1  # W, U, two biases or none, and the projection if there is one
    none = (None, None)
    biases = [(g[2], g[3]) if has_biases else none for g in groups]
    return [Weights(g[0], g[1], b, d, g[-1] if projected else None) for g, (b, d) in zip(groups, biases, strict=True)]


def _scan(
    emit: Emit, step: Step, weights: Weights, x: Value, state: State, time: int, steps: Sequence[int], masks: Sequence[Value]
) -> tuple[Value, State]:
    """Runs one direction of one layer.

    Args:
        emit: see :data:`Emit`.
        step: one time step.
        weights: of this layer and direction.
        x: the whole input.
        state: the initial state, ``[B, H]`` each.
        time: which dimension of x counts time steps.
        steps: their order.
        masks: for each step, whether a sample has one, ``[B, 1]``; empty where all have.

    Returns:
        the states h in order of time, stacked like x, and the last state.
    """
    drive = emit(aten.linear.default, x, weights.w, weights.b)  # all time steps at once
    outputs = {}
    for t in steps:
        after = step(emit, weights, emit(aten.select.int, drive, time, t), state)
        if masks:  # a sample that has ended keeps its state, and puts out nothing
            after = tuple(emit(aten.where.self, masks[t], new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs[t] = emit(aten.where.ScalarOther, masks[t], state[0], 0.0) if masks else state[0]
    return emit(aten.stack.default, [outputs[t] for t in sorted(outputs)], time), state


def _run(
    emit: Emit,
    step: Step,
    layers: Sequence[Weights],
    directions: int,
    x: Value,
    initial: State,
    time: int,
    masks: Sequence[Value] = (),
) -> tuple[Value, State]:
    """Runs all layers: returns the last layer's states in order of time, and every layer's last state, ``[L, B, H]`` each."""
    order = range(int(_shape(x)[time]))
    last: list[State] = []
    for first in range(0, len(layers), directions):
        found = []
        for k in range(first, first + directions):
            state = tuple(emit(aten.select.int, s, 0, k) for s in initial)
            steps = order if k == first else order[::-1]
            output, state = _scan(emit, step, layers[k], x, state, time, steps, masks)
            found.append(output)
            last.append(state)
        x = emit(aten.cat.default, found, -1) if directions == 2 else found[0]
    return x, tuple(emit(aten.stack.default, parts, 0) for parts in zip(*last, strict=True))


def unroll_recurrent_layers(graph_module: fx.GraphModule) -> bool:
    """``lstm(x)``, ``gru(x)``, ``rnn(x) -> step(... step(step(h, x_1), x_2) ..., x_T)``; a cell is one step.

    Exact when: the number of steps is fixed, and nothing is dropped out between layers; packed sequences stay.

    Raises:
        BatchError: where time steps lie in the batch's dimension.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in STEPS | CELLS:
            continue
        unroll = _unroll_layer if node.target in STEPS else _unroll_cell
        changed = unroll(node, Editor(graph_module, node).call) or changed
    graph_module.graph.eliminate_dead_code()
    return changed


def _unroll_layer(node: fx.Node, emit: Emit) -> bool:
    assert isinstance(node.target, OpOverload)
    given = bind(node.target, node.args, node.kwargs)
    if given["train"] and given["dropout"] > 0:
        return False  # it draws random numbers: no rule will be found for it
    _check_time(node, given)
    directions = 2 if given["bidirectional"] else 1
    layers = _weights(given["params"], given["has_biases"], given["num_layers"] * directions)
    time = 1 if given["batch_first"] else 0
    output, last = _run(emit, STEPS[node.target], layers, directions, given["input"], _state(given["hx"]), time)
    replace_items(node, (output, *last))
    return True


def _unroll_cell(node: fx.Node, emit: Emit) -> bool:
    assert isinstance(node.target, OpOverload)
    given = bind(node.target, node.args, node.kwargs)
    weights = Weights(given["w_ih"], given["w_hh"], given["b_ih"], given["b_hh"], None)
    drive = emit(aten.linear.default, given["input"], weights.w, weights.b)
    state = CELLS[node.target](emit, weights, drive, _state(given["hx"]))
    if len(state) == 1:
        replace(node, state[0])
    else:
        replace_items(node, state)
    return True


def _state(hx: Value) -> State:
    return tuple(hx) if isinstance(hx, list | tuple) else (hx,)


def _check_time(node: fx.Node, given: dict[str, Any]) -> None:
    """Raises an error if the number of time steps is the batch size: with a free batch, time is the batch dimension."""
    length = _shape(given["input"])[1 if given["batch_first"] else 0]
    if isinstance(length, torch.SymInt) and expression_of(length).free_symbols:
        origin = origin_of(node)
        raise BatchError(
            f"{node.target} runs over the samples: it treats the first dimension as time steps, but the batch is there.\n"
            f"    {origin.module or '(top level)'}   {origin.where}   {origin.source}\n"
            "  Create the layer with batch_first=True, or transpose its input to [T, B, features]."
        )


def masked(
    layer: nn.RNNBase, x: Tensor, lengths: Tensor, state: Tensor | tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """``pad_packed_sequence(layer(pack_padded_sequence(x, lengths)))`` in operators that can be captured.

    ``torch.export`` cannot capture packed sequences, whose sizes depend on the lengths' values. This computes the same: a
    sample that has ended keeps its state, its output is 0, and the reverse direction starts at the sample's own end. What lies
    behind a sample's end has no influence, so no relevance.

    Args:
        layer: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, with any of its options.
        x: padded sequences, in the layer's layout.
        lengths: how many steps each sample has, ``[B]``, an integer tensor, which may be an input of the model.
        state: the initial state, in the layer's form; zeros by default.

    Shapes: ``x [B, T, E]``, or ``[T, B, E]`` without ``batch_first``; the output has T steps too.

    Raises:
        InputError: if x is not a batch of sequences.
        TrainingModeError: if the layer would drop out states between its layers.

    Source: thesis eqs. 4.13-4.15, for samples of different lengths.
    """
    if x.dim() != 3:
        raise InputError(f"masked() takes a batch of padded sequences, three dimensions; got {list(x.shape)}.")
    if layer.training and layer.dropout > 0:
        raise TrainingModeError(
            "masked() does not support dropout between layers: call layer.eval(), or use packed sequences for training."
        )
    time = 1 if layer.batch_first else 0
    directions = 2 if layer.bidirectional else 1
    steps = torch.arange(x.shape[time], device=x.device)
    masks = [m.unsqueeze(-1) for m in (steps.unsqueeze(-1) < lengths.to(x.device)).unbind(0)]  # T times [B, 1]
    layers = _weights(flat_weights(layer), layer.bias, layer.num_layers * directions)
    initial = _initial(layer, x, state)
    output, last = _run(_execute, _step_of(layer), layers, directions, x, initial, time, masks)
    return output, last if isinstance(layer, nn.LSTM) else last[0]


def _execute(op: Any, *args: Any) -> Value:
    return op(*args)


def _step_of(layer: nn.RNNBase) -> Step:
    names = {"LSTM": aten.lstm.input, "GRU": aten.gru.input, "RNN_TANH": aten.rnn_tanh.input, "RNN_RELU": aten.rnn_relu.input}
    return STEPS[names[layer.mode]]


def _initial(layer: nn.RNNBase, x: Tensor, state: Tensor | tuple[Tensor, Tensor] | None) -> State:
    """The initial state as a tuple, ``[L, B, H]`` each."""
    if state is not None:
        return state if isinstance(state, tuple) else (state,)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = x.shape[0 if layer.batch_first else 1]
    h = x.new_zeros(count, batch, layer.proj_size or layer.hidden_size)
    return (h, x.new_zeros(count, batch, layer.hidden_size)) if isinstance(layer, nn.LSTM) else (h,)
