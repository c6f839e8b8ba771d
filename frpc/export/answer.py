"""An explainer's answer to one question as one module of tensors in, tensors out: targets become seeds inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import frpc
from frpc.core.graph import describe
from frpc.core.stages import copy_graph
from frpc.driver.pipeline import Compiled
from frpc.driver.prepare import PreparedModel
from frpc.errors import OptionError
from frpc.explainer.explainer import Explainer
from frpc.export.layer import LayerAnswer
from frpc.export.question import Input, Question, Signature, described, examples

__all__ = ["About", "Answer", "Exportable", "Rewrite", "exportable"]

aten = torch.ops.aten
Rewrite = Callable[[fx.GraphModule], None]


@dataclass(frozen=True, eq=False)
class Exportable:
    """The input of an exporter.

    Attributes:
        module: tensors in, tensors out.
        example: example inputs, two samples (or the fixed number of samples).
        signature: its inputs and outputs.
    """

    module: nn.Module
    example: tuple[Tensor, ...]
    signature: Signature


@dataclass(frozen=True)
class About:
    """What is known of an exported file before its program is made; the attributes are those of :class:`Signature`."""

    frpc: str
    model: str
    rules: str
    bias: str
    device: str
    question: Question
    batch: int | None
    inputs: tuple[Input, ...]

    def signature(self, classes: int, outputs: tuple[str, ...], window: tuple[tuple[int, int, int], ...] = ()) -> Signature:
        """The signature of the file with a program that gives these outputs."""
        return Signature(**vars(self), classes=classes, outputs=outputs, window=window)


class Answer(nn.Module):
    """Takes the inputs and a target (or seed), and returns what the explainer returns.

    Shapes: ``target [B]`` or ``[B, K]``, ``seed [B, *O]``; relevance like the input, ``[B, ...]`` or ``[B, K, ...]``; bias
    ``[B]`` or ``[B, K]``.
    """

    def __init__(self, compiled: Compiled, program: fx.GraphModule, question: Question, output: Tensor) -> None:
        super().__init__()
        self.program, self.question = program, question
        self.classes, self.dtype = _classes(question, output), output.dtype
        self.counts = [len(given) for given in compiled.references]
        for which, given in enumerate(compiled.references):
            for position, value in enumerate(given):
                self.register_buffer(f"reference_{which}_{position}", _whole(value))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        if self.question.targets == "top":
            output, *found = self._run(given)
        else:
            *inputs, asked = given
            output, *found = self._run([*inputs, self._seed(asked)])
        if self.question.grad_cam:
            multiplier, activation = found  # [*K, B, C, h, w], [B, C, h, w]
            weights = multiplier.mean((-2, -1), keepdim=True)
            return output, self._in_front((weights * activation).sum(-3).relu())
        wanted = found[: len(self.question.at)] if self.question.at else found  # behind relevances of layers come their values
        return output, *map(self._in_front, wanted)

    def _seed(self, asked: Tensor) -> Tensor:
        if self.question.targets == "seed":
            return asked
        index = asked.t().unsqueeze(-1) if self.question.columns else asked.unsqueeze(-1)  # [K, B, 1] or [B, 1]
        seed = torch.zeros([*index.shape[:-1], self.classes], dtype=self.dtype, device=index.device)
        # PyTorch and ONNX Runtime refuse to scatter out of range, but the latter counts from the end below 0, and compiled code
        # leaves zeros, which would pass for a map.
        strange = (index < 0) | (index >= self.classes)
        return seed.scatter(-1, index, 1.0) + torch.where(strange, torch.nan, 0.0).to(self.dtype)

    def _run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Runs the program; with several reference inputs, maps are averaged over them."""
        results = []
        for which, count in enumerate(self.counts):
            others = [getattr(self, f"reference_{which}_{position}") for position in range(count)]
            results.append(list(self.program(*given, *others)))
        if len(results) == 1:
            return results[0]
        parts = list(zip(*results, strict=True))[1:]
        return [results[0][0], *(sum(part[1:], part[0]) / len(part) for part in parts)]

    def _in_front(self, relevance: Tensor) -> Tensor:
        return relevance.movedim(0, 1) if self.question.columns else relevance


def _classes(question: Question, output: Tensor) -> int:
    """The number of outputs that a target chooses from; 0 with a seed.

    Raises:
        OptionError: if the output is not ``[B, C]``.
    """
    if question.targets == "seed":
        return 0
    if output.dim() != 2:
        raise OptionError(
            f'The output is {describe(output)}: one class index does not select a number of it. Export with targets="seed"; '
            "explainer.seed_for(x, target=...) makes seeds."
        )
    return int(output.shape[1])


def exportable(
    explainer: Explainer, question: Question, inputs: Sequence[Tensor] | None, rewrites: Sequence[Rewrite] = ()
) -> Exportable:
    """Returns the module that computes a question, with example inputs and a description.

    Args:
        explainer: compiled, or with ``inputs`` to compile it for.
        question: what to compute.
        inputs: an example, batch first; drawn at random if left out.
        rewrites: passes over the program's graph before it is traced; each keeps the function.

    Raises:
        InputError: if nothing is compiled and no example given; or an input of integers has no example.
        OptionError: for targets of an output that is not ``[B, C]``, or class activation maps without gradients.
        LayerNameError: for a layer that does not exist.
    """
    programs = explainer.programs
    prepared = programs.first_prepared() if inputs is None else programs.prepared(inputs)
    takes = _inputs(prepared, inputs)
    fixed = prepared.captured.inputs[0].batch
    if question.layer:
        fixed = fixed or (1 if inputs is None else len(inputs[0]))
    example = _example(prepared, takes, fixed or 2)
    device = prepared.captured.inputs[0].device.type
    about = About(
        frpc=frpc.__version__,
        model=explainer.model_name,
        rules=explainer.rules.name,
        bias=explainer.bias_policy,
        device=device,
        question=question,
        batch=fixed,
        inputs=takes,
    )
    if question.layer:
        return _every_neuron(explainer, prepared, example, about)
    return _one_number(explainer, prepared, example, about, rewrites)


def _every_neuron(explainer: Explainer, prepared: PreparedModel, example: list[Tensor], about: About) -> Exportable:
    programs, name = explainer.programs, about.question.layer
    programs.check_layers(prepared, (name,))
    assignment = programs.assignment(prepared, example, programs.query_with(of=name))
    node = assignment.layer_node(name)
    assert node is not None, "the layer's name is known"
    module = LayerAnswer(assignment, name, node)
    signature = about.signature(0, ("values", "windows", "bias"), module.window(*example))
    return Exportable(_by_name(module, signature.names), tuple(example), signature)


def _one_number(
    explainer: Explainer, prepared: PreparedModel, example: list[Tensor], about: About, rewrites: Sequence[Rewrite]
) -> Exportable:
    programs, question = explainer.programs, about.question
    if question.grad_cam and explainer.rules.account.gives != "multiplier":
        raise OptionError(
            f"{explainer.rules.name} gives relevance, but class activation maps need gradients. Compile the model "
            "with rule=frpc.rules.Gradient(times_input=False)."
        )
    layers = (question.grad_cam,) if question.grad_cam else question.at
    programs.check_layers(prepared, layers)
    compiled = programs.program(prepared, example, programs.query_with(columns=question.columns, layers=layers))
    program = _functional(compiled)
    for rewrite in rewrites:
        rewrite(program)
    program.recompile()
    output = prepared.canonical.graph.output_node().args[0].meta["val"]  # type: ignore[union-attr]
    module = Answer(compiled, program, question, output)
    if question.targets == "top":
        _seed_by_output(program, module.classes)
    signature = about.signature(module.classes, _outputs(compiled, question))
    asked = _asked(question, output, len(example[0]))
    return Exportable(_by_name(module, signature.names), (*example, *asked), signature)


def _seed_by_output(program: fx.GraphModule, classes: int) -> None:
    """``seed -> (argmax output == arange)``: relevance starts at the largest output, which the program has computed by then."""
    (seed,) = program.graph.find_nodes(op="placeholder", target="seed")
    output = program.graph.output_node().args[0][0]  # type: ignore[index]
    assert isinstance(output, fx.Node)
    example = output.meta["val"]
    program.register_buffer("class_numbers", torch.arange(classes, device=example.device))
    with program.graph.inserting_after(output):
        numbers = program.graph.get_attr("class_numbers")
    with program.graph.inserting_after(numbers):
        largest = program.graph.call_function(aten.argmax.default, (output, 1, True))
    with program.graph.inserting_after(largest):
        chosen = program.graph.call_function(aten.eq.Tensor, (largest, numbers))
    with program.graph.inserting_after(chosen):
        start = program.graph.call_function(aten._to_copy.default, (chosen,), {"dtype": example.dtype})
    start.meta = dict(seed.meta)
    seed.replace_all_uses_with(start)
    program.graph.erase_node(seed)
    program.graph.lint()
    program.recompile()


def _functional(compiled: Compiled) -> fx.GraphModule:
    """The program before lowering, which overwrites tensors and orders memory for PyTorch's own kernels."""
    stage = next(stage for stage in compiled.stages if stage.name == "optimize")
    program = copy_graph(stage.program)
    for name, value in list(program.named_buffers()):
        program.register_buffer(name, _whole(value))
    return program


def _whole(value: Tensor) -> Tensor:
    """Copies a tensor that is a part or a view of another: files would store all of the memory behind it."""
    whole = value.is_contiguous() and value.numel() * value.element_size() == value.untyped_storage().nbytes()
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def _inputs(prepared: PreparedModel, given: Sequence[Tensor] | None) -> tuple[Input, ...]:
    specs = prepared.captured.inputs
    values: Sequence[Tensor | None] = [None] * len(specs) if given is None else given
    return tuple(described(s.name, x, s.shape, s.dtype) for s, x in zip(specs, values, strict=True))


def _example(prepared: PreparedModel, takes: Sequence[Input], batch: int) -> list[Tensor]:
    drawn = examples(takes, batch, torch.Generator().manual_seed(0))
    return [x.to(s.device) for x, s in zip(drawn, prepared.captured.inputs, strict=True)]


def _asked(question: Question, output: Tensor, batch: int) -> list[Tensor]:
    """An example of the last input, if there is one; K is 3, since torch.export takes a size of 1 for a constant."""
    if question.targets == "top":
        return []
    if question.targets == "seed":
        return [torch.ones([batch, *(int(n) for n in output.shape[1:])], dtype=output.dtype, device=output.device)]
    size = [batch, 3] if question.columns else [batch]
    return [torch.zeros(size, dtype=torch.int64, device=output.device)]


def _outputs(compiled: Compiled, question: Question) -> tuple[str, ...]:
    """Names of the results, in order."""
    if question.grad_cam:
        return "output", "map"
    if question.at:
        return "output", *(f"relevance_{name}" for name in question.at)
    sources = [node.name for node in compiled.plan.wanted]
    return "output", *(["relevance"] if len(sources) == 1 else [f"relevance_{name}" for name in sources]), "bias"


def _by_name(module: nn.Module, names: Sequence[str]) -> fx.GraphModule:
    """Gives a module's inputs the names that files show."""
    graph = fx.Graph()
    graph.output(graph.call_module("answer", tuple(graph.placeholder(name) for name in names)))
    return fx.GraphModule({"answer": module}, graph, class_name="Exported")
