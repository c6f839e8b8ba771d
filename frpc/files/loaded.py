"""An explainer read from a file: it answers from programs, without the model's class and without the compiler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from frpc.capture.export import InputSpec
from frpc.core.graph import describe
from frpc.core.torch_compat import trace_lock
from frpc.core.values import is_traced
from frpc.driver import printing
from frpc.driver.explanation import Explanation, LayerRelevance, explanation_of, layer_relevance_of
from frpc.driver.running import Form, run
from frpc.driver.targets import Target, check_inputs, make_seed
from frpc.errors import InputError, OptionError, PickleRefusedError
from frpc.files.graphs import runnable
from frpc.files.questions import FileQuestion
from frpc.optimize.backends.backends import Backend, executable, lower_program
from frpc.optimize.backends.bound import Program
from frpc.rules.sets.ruleset import Box, check_boxes
from frpc.rules.top import Top, as_top

__all__ = ["FileSignature", "Header", "LoadedExplainer", "StoredProgram"]


@dataclass(frozen=True, eq=False)
class FileSignature:
    """Inputs that programs take, and the output they explain.

    Attributes:
        inputs: the requirements of each input.
        output: an output without samples.
        shown: the output in words.
    """

    inputs: tuple[InputSpec, ...]
    output: Tensor
    shown: str


@dataclass(frozen=True)
class Header:
    """What a file contains besides its programs; bounds of inputs are names of constants."""

    frpc: str
    model: str
    rules: str
    bias: str
    top: Top
    names: tuple[str, ...]
    boxes: tuple[tuple[float | str, float | str], ...]


@dataclass(frozen=True)
class StoredProgram:
    """A program as it was read.

    Attributes:
        graph: its calls; ``get_attr`` nodes name constants.
        references: constants it takes in addition to the inputs, for each reference input that maps are averaged over.
    """

    graph: fx.Graph
    references: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _RunnableProgram:
    """A program that can run, before and after it was put into the form for one device."""

    portable: fx.GraphModule
    lowered: fx.GraphModule
    run: Program


Key = tuple[int, FileQuestion]  # which signature, and what is asked


class LoadedExplainer(nn.Module):
    """An explainer read from a file by :func:`frpc.load`; runs the programs it was saved with.

    ``loaded(x, target=3)`` returns an :class:`~frpc.driver.explanation.Explanation`, as :class:`frpc.Explainer` does.
    """

    def __init__(
        self,
        header: Header,
        signatures: Sequence[FileSignature],
        sources: Mapping[Key, StoredProgram],
        constants: Mapping[str, Tensor],
        backend: Backend,
    ) -> None:
        super().__init__()
        self._backend = backend
        self.header, self.signatures, self.sources = header, tuple(signatures), dict(sources)
        self.constants = dict(constants)
        self._ready: dict[Key, _RunnableProgram] = {}
        self._predictors: dict[int, fx.GraphModule] = {}

    # ---- asking -------------------------------------------------------------------------------------------------

    def forward(
        self, *inputs: Tensor, target: Target | None = None, seed: Tensor | Top | str | None = None, **named: Tensor
    ) -> Explanation:
        """Explains one number of the output, or K of them, for each sample; see :meth:`frpc.Explainer.forward`.

        Raises:
            InputError: an input or target that does not fit, or a question that the file holds no program for.
        """
        inputs, results, columns = self._answered((), inputs, named, target, seed)
        return explanation_of(results, columns, inputs)

    def at(
        self,
        layers: str | Sequence[str],
        *inputs: Tensor,
        target: Target | None = None,
        seed: Tensor | Top | str | None = None,
        **named: Tensor,
    ) -> LayerRelevance:
        """Returns the relevance of inner layers, if exactly these were used before the explainer was saved."""
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        _, results, columns = self._answered(names, inputs, named, target, seed)
        return layer_relevance_of(results, columns, names)

    def predict(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Returns the model's output alone, ``[B, ...]``."""
        inputs, which = self._given(inputs, named)
        key = self._first(which)
        predictor = self._predictors.get(which)
        if predictor is None:
            predictor = self._predictors[which] = _values_only(self._prepared(key).lowered)
        unused = self.signatures[which].output  # in place of a seed
        found: Tensor = predictor(*(x.detach() for x in inputs), unused, *self._references(key)[0])
        return found

    def _answered(
        self,
        layers: tuple[str, ...],
        inputs: tuple[Tensor, ...],
        named: Mapping[str, Tensor],
        target: Target | None,
        seed: Tensor | Top | str | None,
    ) -> tuple[tuple[Tensor, ...], list[Tensor], bool]:
        inputs, which = self._given(inputs, named)
        tensor, top = (seed, self.header.top) if seed is None or isinstance(seed, Tensor) else (None, as_top(seed))
        functional, columns = make_seed(target, tensor, self.signatures[which].output, int(inputs[0].shape[0]))
        key = (which, FileQuestion(columns, layers, top))
        if key not in self.sources:
            held = "; ".join(str(question) for place, question in self.sources if place == which)
            raise InputError(
                f"The file has no program for {key[1]} (it has: {held}). Call the original explainer that way once, and save it "
                "again; columns=True saves the program for K targets."
            )
        check_boxes(inputs, self._boxes())
        fixed = self.signatures[which].inputs[0].batch is not None
        form = Form(len(inputs), columns, len(layers), fixed)
        return inputs, run(self._program(key), inputs, functional, self._references(key), form), columns

    def _program(self, key: Key) -> Program:
        """The program that runs; torch.compile gets the operators as they are in the file."""
        found = self._prepared(key)
        return found.portable if is_traced() else found.run

    def _prepared(self, key: Key) -> _RunnableProgram:
        """The program that answers a question, put into the form for this device when it is first wanted."""
        found = self._ready.get(key)
        if found is None:
            if is_traced():
                raise InputError(
                    "There is no program for these arguments yet: call the loaded explainer once before torch.compile traces it."
                )
            with trace_lock, torch.no_grad():
                found = self._ready.get(key)
                if found is None:
                    device = self.signatures[key[0]].output.device
                    portable = runnable(self.sources[key].graph, self.constants, device)
                    lowered = lower_program(portable, self._backend).program
                    found = self._ready[key] = _RunnableProgram(portable, lowered, executable(lowered, self._backend))
        return found

    def _references(self, key: Key) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tuple(self.constants[name] for name in names) for names in self.sources[key].references)

    def _boxes(self) -> tuple[Box, ...]:
        def bound(value: float | str) -> Tensor | float:
            return self.constants[value] if isinstance(value, str) else value

        return tuple((bound(low), bound(high)) for low, high in self.header.boxes)

    def _given(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], int]:
        """Puts inputs into order and finds the programs that take them."""
        known = self.header.names
        if named:
            if inputs or set(named) != set(known):
                takes = ", ".join(known) or "its inputs by position"
                raise InputError(f"Inputs {', '.join(named)} given by name; the explainer takes {takes}.")
            inputs = tuple(named[name] for name in known)
        shapes = [tuple(x.shape[1:]) if isinstance(x, Tensor) else () for x in inputs]
        dtypes = [getattr(x, "dtype", None) for x in inputs]
        fitting = (
            position
            for position, signature in enumerate(self.signatures)
            if shapes == [s.shape for s in signature.inputs] and dtypes == [s.dtype for s in signature.inputs]
        )
        which = next(fitting, 0)
        check_inputs(inputs, self.signatures[which].inputs)
        return inputs, which

    def _first(self, which: int) -> Key:
        """The first program for inputs of a kind."""
        return next(key for key in self.sources if key[0] == which)

    # ---- looking ------------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """Class name of the model."""
        return self.header.model

    @property
    def bias_policy(self) -> str:
        """Where constants go: ``uniform``, ``receptive_field`` or ``separate``."""
        return self.header.bias

    @property
    def code(self) -> str:
        """The first program as valid Python, with shape, origin and rule in comments."""
        return printing.code(self.program, {})

    @property
    def program(self) -> fx.GraphModule:
        """The first program, ``(*inputs, seed) -> (output, relevance..., constants' share)``."""
        return self._prepared(self._first(0)).lowered

    @property
    def questions(self) -> tuple[str, ...]:
        """What the file holds programs for, in words."""
        return tuple(dict.fromkeys(str(question) for _, question in self.sources))

    def __repr__(self) -> str:
        first = self.signatures[0]
        takes = ", ".join(describe(_example(spec)).replace("[0", "[B", 1) for spec in first.inputs)
        return (
            f"LoadedExplainer({self.model_name}: {takes} -> {first.shown})\n"
            f"  rules {self.header.rules}, bias {self.header.bias}, saved by frpc {self.header.frpc}\n"
            f"  {len(self.sources)} programs: {'; '.join(self.questions)}"
        )

    # ---- moving -------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoadedExplainer:
        """Moves all tensors to another device; what programs share stays shared.

        Raises:
            OptionError: for another dtype, which programs do not take.
        """
        probe = fn(torch.empty(0, device=self.signatures[0].output.device))
        if probe.dtype is not torch.float32:
            raise OptionError(
                f"A loaded explainer keeps the dtypes it was compiled for, and cannot be converted to {probe.dtype}: compile the "
                "model in that dtype, and save it."
            )
        if probe.device != self.signatures[0].output.device:
            moved: dict[int, tuple[Tensor, Tensor]] = {}
            for value in self.constants.values():
                moved.setdefault(id(value), (value, fn(value)))
            self.constants = {name: moved[id(value)][1] for name, value in self.constants.items()}
            self.signatures = tuple(_signature_on(s, fn(s.output)) for s in self.signatures)
            self._ready, self._predictors = {}, {}
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PickleRefusedError(
            "A loaded explainer cannot be pickled, because opening a pickle can run code. Pass the path of its file to the "
            "other process, and call frpc.load(path) there."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedExplainer:
        copied = LoadedExplainer(self.header, self.signatures, self.sources, copy.deepcopy(self.constants, memo), self._backend)
        memo[id(self)] = copied
        return copied


def _signature_on(signature: FileSignature, output: Tensor) -> FileSignature:
    return FileSignature(tuple(replace(s, device=output.device) for s in signature.inputs), output, signature.shown)


def _example(spec: InputSpec) -> Tensor:
    return torch.empty([0, *spec.shape], dtype=spec.dtype, device="meta")


def _values_only(program: nn.Module) -> fx.GraphModule:
    """The part of a program that the model's output needs."""
    assert isinstance(program, fx.GraphModule)
    results: Any = program.graph.output_node().args[0]
    needed, stack = set(), [results[0]]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    graph, root = fx.Graph(), nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node in needed and node.op == "get_attr":
            root.register_buffer(str(node.target), getattr(program, str(node.target)))
    graph.output(copies[results[0]])
    return fx.GraphModule(root, graph, class_name="Values")
