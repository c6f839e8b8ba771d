"""Capture: a module and example inputs become one functional graph of ATen operators that remembers where each node came from.

``torch.export`` does the tracing; :mod:`frpc.capture.plain` puts its graph into the form that the rest of the compiler works on.
The parameters and buffers are a snapshot: the user's module is neither kept nor changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from frpc.capture.composed import AT_CAPTURE
from frpc.capture.plain import plain_graph
from frpc.capture.regions import enter_regions
from frpc.capture.tracing import Traced, tensors_by_name
from frpc.core.reasons import StoppedError, failure, first_line, quiet_logs, without_warnings
from frpc.core.stopped import watching
from frpc.core.torch_compat import FakeTensorMode, fake_mode_of, fixed_size
from frpc.core.values import all_hold, is_traced, whole
from frpc.errors import EmptyBatchError, FrpcError, InputError, NonFiniteError, WeightsError, nearest

__all__ = ["Captured", "InputSpec", "argument_order", "capture", "check_decisive", "check_finite", "tensors_of", "tree"]


@dataclass(frozen=True)
class InputSpec:
    """What a program expects of one input.

    Attributes:
        name: name of the placeholder.
        shape: sizes of one sample, without the batch.
        dtype: element type.
        device: where it lives.
        batch: the fixed batch size, or None where any is accepted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batch: int | None


@dataclass(frozen=True, eq=False)
class Captured:
    """A model as one graph.

    Attributes:
        graph_module: the graph; runs like the model and returns the explained output.
        inputs: what it expects.
        fake_mode: the mode the nodes' example values live in.
        model_name: class name of the user's module.
        static_batch_reason: why the batch size is fixed, or None where it is free.
        decisive: tensors of the model, by name, whose values shaped the graph (a mask that became indices), as they were.
    """

    graph_module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    fake_mode: FakeTensorMode
    model_name: str
    static_batch_reason: str | None
    decisive: Mapping[str, Tensor] = field(default_factory=dict)


def argument_order(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Sorts the names of keyword inputs as the model's ``forward`` takes them.

    Raises:
        InputError: for a name it does not take.
    """
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if unknown := [n for n in names if n not in parameters and not anything]:
        raise InputError(
            f"{type(model).__name__}.forward has no argument {unknown[0]!r}; {nearest(unknown[0], list(parameters))}."
        )
    return (*(n for n in parameters if n in names), *(n for n in names if n not in parameters))


def capture(
    model: nn.Module,
    inputs: Sequence[Tensor],
    output: str | int | None = None,
    names: Sequence[str] = (),
    gradients: bool = False,
) -> Captured:
    """Captures ``model`` at ``inputs`` as one functional ATen graph with a free batch size where the model allows it.

    Args:
        model: the module, in evaluation mode: see :func:`frpc.core.snapshot.snapshot`.
        inputs: example inputs, batch first.
        output: which output to explain, for models that return several.
        names: names to pass the inputs by, in the order of ``forward``; empty to pass them by position.
        gradients: note where autograd would stop; see :mod:`frpc.core.stopped`.

    Raises:
        CaptureError: if ``torch.export`` cannot capture the model; carries its reason and the user's line.
        EmptyBatchError: if an example has no samples.
        NonFiniteError: if an example holds NaN or Inf.
    """
    _check_examples(inputs)
    inputs = tuple(x.detach() for x in inputs)
    traced = Traced(model, names, output)
    reason = None
    with quiet_logs():
        try:
            program = _export(traced, tuple(_pair(x) for x in inputs), gradients, dynamic=True)
        except Exception as error:
            reason = first_line(error)
            program = _export_static(traced, inputs, gradients, error)
    graph, constants = plain_graph(program, traced)
    graph_module = fx.GraphModule(tree(constants), graph, class_name="Captured")
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    specs = tuple(_spec(node, reason is None) for node in placeholders)
    modes = [fake_mode_of(n.meta["val"]) for n in placeholders if isinstance(n.meta.get("val"), Tensor)]
    decisive = {name: value.clone() for name, value in tensors_by_name(model) if name in traced.decisive}
    return Captured(graph_module, specs, modes[0], type(model).__name__, reason, decisive)


def _check_examples(inputs: Sequence[Tensor]) -> None:
    if not inputs:
        raise InputError("No example inputs: pass a tuple with one tensor for each input of the model.")
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"Input {position} is {type(x).__name__}, not a tensor; give tensors with the batch first.")
        if x.dim() == 0 or x.shape[0] == 0:
            raise EmptyBatchError(f"Input {position} has shape {list(x.shape)}: give at least one sample, batch first.")
        check_finite(x, position)


def check_finite(x: Tensor, name: str | int) -> None:
    """Refuses NaN and Inf.

    Raises:
        NonFiniteError: naming the samples.
    """
    if not x.is_floating_point() or _sum_is_finite(x) or all_hold(torch.isfinite(x), f"Input {name!r} contains NaN or Inf."):
        return
    x = whole(x)
    bad = (~torch.isfinite(x)).reshape(x.shape[0], -1).sum(1)
    worst = ", ".join(str(i) for i in torch.nonzero(bad).flatten()[:5].tolist())
    raise NonFiniteError(
        f"Input {name!r} contains {int(bad.sum())} NaN or Inf values (samples {worst}): a map could not sum to the output."
    )


def _sum_is_finite(x: Tensor) -> bool:
    """Says whether numbers sum to one: then all are finite. The other way round it fails where a sum leaves the range."""
    return not is_traced() and math.isfinite(whole(x).sum().item())


def _pair(x: Tensor) -> Tensor:
    """Returns the example as a batch of two: torch.export takes a batch of one for a constant."""
    return torch.cat([x[:1], x[:1]]) if x.shape[0] == 1 else x[:2]


def _export(traced: Traced, inputs: tuple[Tensor, ...], gradients: bool, dynamic: bool) -> ExportedProgram:
    batch = Dim("batch", min=1)
    shapes: Any = (tuple({0: batch} for _ in inputs),) if dynamic else None
    with torch.no_grad(), without_warnings("The tensor attribute"):  # recurrent layers note their weights again at every call
        with watching(traced.model, gradients):
            program = torch.export.export(traced, inputs, dynamic_shapes=shapes, strict=False)
        enter_regions(program.graph_module)
        program = program.run_decompositions(dict(AT_CAPTURE))  # functional: in-place operators become plain ones, little else
    if dynamic:
        _demand_free_batch(program)
    return program


def _demand_free_batch(program: ExportedProgram) -> None:
    """Makes sure that no operator has fixed the batch at the size of the example on the way.

    Raises:
        RuntimeError: if one has.
    """
    kinds = {s.arg.name: s.kind for s in program.graph_signature.input_specs}
    for node in program.graph.find_nodes(op="placeholder"):
        if kinds[node.name] is InputKind.USER_INPUT and fixed_size(node.meta["val"].shape[0]) is not None:
            raise RuntimeError("an operator of the model is written for the batch size it is captured with")


def _export_static(traced: Traced, inputs: tuple[Tensor, ...], gradients: bool, first: Exception) -> ExportedProgram:
    if isinstance(first, StoppedError) and isinstance(first.error, FrpcError):
        raise first.error
    try:
        return _export(traced, inputs, gradients, dynamic=False)
    except Exception as error:
        raise failure(traced.model, lambda: traced.called(inputs), error) from first


def tensors_of(graph_module: fx.GraphModule, model: nn.Module) -> nn.Module:
    """Returns the tensors of a captured graph, with the values they have in ``model``; literals of its code stay.

    Raises:
        WeightsError: if one is missing in the model, or has another shape, dtype or device there.
    """
    found: dict[str, Any] = {}
    for name, old in graph_module.named_buffers(remove_duplicate=False):
        new = _attribute(model, name)
        if new is None and name.rpartition(".")[2].startswith(_LIFTED):
            new = old
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            there = "no such tensor" if not isinstance(new, Tensor) else f"{list(new.shape)} {new.dtype} on {new.device}"
            raise WeightsError(
                f"{type(model).__name__} differs from the captured model: {name} was {list(old.shape)} {old.dtype} on "
                f"{old.device}, and is now {there}. Compile the model again."
            )
        found[name] = new.detach()
    return tree(found)


def check_decisive(captured: Captured, model: nn.Module) -> None:
    """Makes sure that a model has the values that a graph was shaped by.

    Raises:
        WeightsError: naming one that differs.
    """
    for name, old in captured.decisive.items():
        new = _attribute(model, name)
        if not isinstance(new, Tensor) or new.shape != old.shape or not torch.equal(new.to(old), old):
            raise WeightsError(
                f"{name} of {type(model).__name__} has changed since the model was captured. The graph depends on its values (a "
                "mask that chooses elements, a number that decides a branch): compile the model again."
            )


_LIFTED = ("lifted_tensor_", "c_lifted_tensor_", "_tensor_constant")  # names that torch.export gives to literals


def _attribute(model: nn.Module, name: str) -> Any:
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def tree(constants: dict[str, Any]) -> nn.Module:
    """Hangs tensors on nested modules by their dotted names, so that the graph keeps the model's parameter names."""
    root = nn.Module()
    for name, value in constants.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, value)
    return root


def _spec(node: fx.Node, dynamic: bool) -> InputSpec:
    value = node.meta["val"]
    fixed = None if dynamic else int(value.shape[0])
    return InputSpec(node.name, tuple(int(s) for s in value.shape[1:]), value.dtype, value.device, fixed)
