"""Capture: a module and example inputs become one functional graph of ATen operators that remembers where each node came from.

``torch.export`` does the tracing. The graph is then put into the form the rest of the compiler works on: placeholders are
the inputs, ``get_attr`` nodes the parameters and buffers (a snapshot: the user's module is neither kept nor changed), and
there is one output tensor, the one to be explained.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from frpc import stopped
from frpc.composed import AT_CAPTURE
from frpc.errors import (
    CaptureError,
    EmptyBatchError,
    InputError,
    NonFiniteError,
    OptionError,
    TrainingModeError,
    WeightsError,
    nearest,
)
from frpc.graph import Origin, set_layers
from frpc.stopped import settle, watching
from frpc.torch_compat import FakeTensorMode, fake_mode_of, pytree
from frpc.values import all_hold, is_traced, whole

__all__ = ["Captured", "InputSpec", "argument_order", "capture", "check_finite", "snapshot", "tensors_of", "tree"]


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
    """

    graph_module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    fake_mode: FakeTensorMode
    model_name: str
    static_batch_reason: str | None


def snapshot(model: nn.Module) -> nn.Module:
    """Returns a copy of the module in evaluation mode; the original keeps its mode, parameters and hooks.

    Raises:
        TrainingModeError: if the module cannot be copied, or a part of it stays in training mode after ``eval()``.
        CaptureError: if it is a TorchScript module.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("This is a TorchScript module, which torch.export does not take: compile the module it was made from.")
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise TrainingModeError(
            f"{type(model).__name__} cannot be copied ({error}), so it cannot be put into evaluation mode without changing "
            "yours. Detach tensors kept on the module that need gradients, or define __deepcopy__."
        ) from error
    copied.eval()
    training = [name or "(the model itself)" for name, part in copied.named_modules() if part.training]
    if training:
        raise TrainingModeError(
            f"{', '.join(training[:5])} of {type(model).__name__} stays in training mode after eval(): its train() is "
            "overridden. Explain the model in evaluation mode: let train(False) reach every part."
        )
    return copied.requires_grad_(False)


def argument_order(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Sorts the names of keyword inputs as the model's ``forward`` takes them.

    Raises:
        InputError: for a name it does not take.
    """
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if unknown := [n for n in names if n not in parameters and not anything]:
        raise InputError(f"{type(model).__name__}.forward takes no {unknown[0]!r}; {nearest(unknown[0], list(parameters))}.")
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
        model: the module, in evaluation mode: see :func:`snapshot`.
        inputs: example inputs, batch first.
        output: which output to explain, for models that return several.
        names: names to pass the inputs by, in the order of ``forward``; empty to pass them by position.
        gradients: note where autograd would stop; see :mod:`frpc.stopped`.

    Raises:
        CaptureError: if ``torch.export`` cannot capture the model; carries its reason and the user's line.
        EmptyBatchError: if an example has no samples.
        NonFiniteError: if an example holds NaN or Inf.
    """
    _check_examples(inputs)
    inputs = [x.detach() for x in inputs]
    pair = tuple(_pair(x) for x in inputs)
    reason = None
    try:
        program = _export(model, pair, names, gradients, dynamic=True)
    except Exception as error:
        reason = _first_line(error)
        program = _export_static(model, tuple(inputs), names, gradients, error)
    graph_module = _plain_graph(program, model, output)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    specs = tuple(_spec(node, reason is None) for node in placeholders)
    modes = [fake_mode_of(n.meta["val"]) for n in placeholders if isinstance(n.meta.get("val"), Tensor)]
    return Captured(graph_module, specs, modes[0], type(model).__name__, reason)


def _check_examples(inputs: Sequence[Tensor]) -> None:
    if not inputs:
        raise InputError("No example inputs: pass a tuple with one tensor for each input of the model.")
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"Input {position} is {type(x).__name__}, not a tensor; frpc explains tensors with the batch first.")
        if x.dim() == 0 or x.shape[0] == 0:
            raise EmptyBatchError(f"Input {position} has shape {list(x.shape)}: give at least one sample, batch first.")
        check_finite(x, position)


def check_finite(x: Tensor, name: str | int) -> None:
    """Refuses NaN and Inf.

    Raises:
        NonFiniteError: naming the samples.
    """
    if not x.is_floating_point() or _sum_is_finite(x) or all_hold(torch.isfinite(x), f"Input {name!r} holds NaN or Inf."):
        return
    x = whole(x)
    bad = (~torch.isfinite(x)).reshape(x.shape[0], -1).sum(1)
    worst = ", ".join(str(i) for i in torch.nonzero(bad).flatten()[:5].tolist())
    raise NonFiniteError(
        f"Input {name!r} holds {int(bad.sum())} NaN or Inf values (samples {worst}): no map could sum to its output."
    )


def _sum_is_finite(x: Tensor) -> bool:
    """Says whether numbers sum to one: then all are finite. The other way round it fails where a sum leaves the range."""
    return not is_traced() and math.isfinite(whole(x).sum().item())


def _pair(x: Tensor) -> Tensor:
    """Returns the example as a batch of two: torch.export takes a batch of one for a constant."""
    return torch.cat([x[:1], x[:1]]) if x.shape[0] == 1 else x[:2]


def _export(
    model: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], gradients: bool, dynamic: bool
) -> ExportedProgram:
    batch = Dim("batch", min=1)
    named = dict(zip(names, inputs, strict=True)) if names else {}
    shapes: Any = {n: {0: batch} for n in names} if names else _positional(model, [{0: batch} for _ in inputs])
    with torch.no_grad(), _quiet("The tensor attributes"):  # recurrent layers note their weights anew at every call
        with watching(model, gradients):
            program = torch.export.export(
                model, () if names else inputs, named, dynamic_shapes=shapes if dynamic else None, strict=False
            )
        return program.run_decompositions(
            dict(AT_CAPTURE)
        )  # functional: in-place operators become plain ones, little else changes


def _positional(model: nn.Module, shapes: list[Any]) -> tuple[Any, ...]:
    """Lays shapes out as torch.export wants them: what ``forward(self, *x)`` takes is one tuple."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(shapes)
    rest = (tuple(shapes[first:]),) if len(shapes) > first else ()
    return (*shapes[:first], *rest)


def _export_static(
    model: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], gradients: bool, first: Exception
) -> ExportedProgram:
    try:
        return _export(model, inputs, names, gradients, dynamic=False)
    except CaptureError:  # it says what is wrong in the model
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {_first_line(error)}\n"
            f"  at {_user_line(error)}\n"
            f"{_PACKED if _is_packed(error) else ''}"
            "  Try: replace data-dependent Python branches and .item() by tensor operators (torch.where), keep numpy out of "
            "forward, and pass every varying quantity as an input."
        ) from first


_PACKED = "  Packed sequences have sizes that depend on the lengths: call frpc.recurrent.masked(layer, x, lengths) instead.\n"


def _is_packed(error: Exception) -> bool:
    """Says whether an error comes out of packing a sequence, or of a layer that was given a packed one."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f.f_code.co_filename.endswith("utils/rnn.py") or f.f_locals.get("batch_sizes") is not None for f in frames)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _user_line(error: Exception) -> str:
    """Names the innermost frame that lies outside torch."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    torch_folder = torch.__path__[0]
    user = [f for f in frames if not f[0].startswith(torch_folder) and not f[0].startswith("<") and f[0] != __file__]
    return f"{user[-1][0]}:{user[-1][1]}" if user else "(no line of yours is in the traceback)"


def _plain_graph(program: ExportedProgram, model: nn.Module, output: str | int | None) -> fx.GraphModule:
    """Rebuilds the exported graph with parameters as ``get_attr`` nodes and the explained tensor as its only output."""
    graph = fx.Graph()
    constants: dict[str, Any] = {}
    kinds = {s.arg.name: s for s in program.graph_signature.input_specs}
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and kinds[node.name].kind is not InputKind.USER_INPUT:
            target = kinds[node.name].target
            assert target is not None
            constants[target] = _constant(program, target)
            with _quiet("Attempted to insert a get_attr Node"):
                copies[node] = graph.get_attr(target)
            copies[node].meta = dict(node.meta)
        elif node.op == "output":
            explained = _explained_output(program, node, output)
            copies[node] = graph.output(copies[explained])
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta["origin"] = _origin(node)
    settle(graph)
    set_layers(graph, {name for name, _ in model.named_modules(remove_duplicate=False) if name})
    return fx.GraphModule(tree(constants), graph, class_name="Captured")


@contextmanager
def _quiet(message: str) -> Iterator[None]:
    """Leaves out warnings that begin so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield


def _constant(program: ExportedProgram, target: str) -> Any:
    value = program.state_dict[target] if target in program.state_dict else program.constants[target]
    return value.detach() if isinstance(value, Tensor) else value


def tensors_of(graph_module: fx.GraphModule, model: nn.Module) -> nn.Module:
    """Returns the tensors of a captured graph, with the values they have in ``model``; literals of its code stay.

    Raises:
        WeightsError: if one is missing in the model, or has another shape, dtype or device there.
    """
    found: dict[str, Any] = {}
    for name, old in graph_module.named_buffers(remove_duplicate=False):
        new = _attribute(model, name)
        if new is None and name.startswith(_LIFTED):
            new = old
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            there = "no such tensor" if not isinstance(new, Tensor) else f"{list(new.shape)} {new.dtype} on {new.device}"
            raise WeightsError(
                f"{type(model).__name__} does not fit what was captured: {name} was {list(old.shape)} {old.dtype} on "
                f"{old.device}, and is {there}. Compile the model anew."
            )
        found[name] = new.detach()
    return tree(found)


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


def _explained_output(program: ExportedProgram, node: fx.Node, output: str | int | None) -> fx.Node:
    """Picks the tensor to explain: the one named by ``output``, else ``logits``, else the only floating one."""
    specs = program.graph_signature.output_specs
    user = [a for a, s in zip(node.args[0], specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]  # type: ignore[arg-type]
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    structure = pytree.tree_unflatten(user, out_spec)
    if output is not None:
        chosen = _entry(structure, output)
    else:
        if any(isinstance(n, fx.Node) and n.meta["val"].is_complex() for n in user) and len(user) == 1:
            raise OptionError(
                "The model's output is complex, and relevance is a share of real numbers: return z.abs(), or z.real."
            )
        floating = [n for n in user if isinstance(n, fx.Node) and n.meta["val"].is_floating_point()]
        logits = structure.get("logits") if isinstance(structure, dict) else getattr(structure, "logits", None)
        if len(floating) != 1 and logits is None:
            raise OptionError(
                f"The model returns {len(user)} tensors ({_outline(structure)}): say which to explain with output=."
            )
        chosen = floating[0] if logits is None else logits
    if not isinstance(chosen, fx.Node) or not chosen.meta["val"].is_floating_point():
        raise OptionError(f"output={output!r} is no floating-point tensor of the model's result ({_outline(structure)}).")
    return chosen


def _entry(structure: Any, output: str | int) -> Any:
    try:
        return getattr(structure, output) if isinstance(output, str) and hasattr(structure, output) else structure[output]
    except (KeyError, IndexError, TypeError) as error:
        raise OptionError(f"The model's result has no entry {output!r}: {_outline(structure)}.") from error


def _outline(structure: Any) -> str:
    if isinstance(structure, dict):
        return "a dict with " + ", ".join(map(repr, structure))
    if isinstance(structure, tuple | list):
        return f"a {type(structure).__name__} of {len(structure)}"
    return f"a {type(structure).__name__}"


def _origin(node: fx.Node) -> Origin:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    inside_torch = f"{torch.__path__[0]}/nn/"
    user = [f for f in frames if not f[0].startswith((inside_torch, stopped.__file__, "<eval_with_key>"))] or frames
    file, line, source = user[-1] if user else ("", "0", "")
    return Origin(stack[-1][0] if stack else "", tuple(s[0] for s in stack if s[0]), file, int(line), source.strip())


def _spec(node: fx.Node, dynamic: bool) -> InputSpec:
    value = node.meta["val"]
    fixed = None if dynamic else int(value.shape[0])
    return InputSpec(node.name, tuple(int(s) for s in value.shape[1:]), value.dtype, value.device, fixed)
