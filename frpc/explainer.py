"""The explainer: a compiled model that returns its output and where the output comes from."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frpc import pipeline, printing
from frpc.assign import Assignment
from frpc.bias import check_policy
from frpc.capture import argument_order, snapshot
from frpc.context import layer_context
from frpc.errors import InputError, LayerNameError, OptionError, nearest
from frpc.explanation import Explanation, LayerRelevance
from frpc.graph import describe, first_result
from frpc.layermaps import LayerMaps
from frpc.layers import layer_maps
from frpc.lower import Refusal
from frpc.methods import method_named
from frpc.neurons import cones_are_cheaper, neuron_maps
from frpc.pipeline import Choice, Compiled, Front, Stage
from frpc.plan import Plan, Query, check_strategy, layer_node
from frpc.rules.ruleset import FRP, RuleSet
from frpc.targets import Target, check_inputs, make_seed
from frpc.top import Top, as_top

__all__ = ["Explainer", "compile"]

# Tracing swaps interpreter-wide state inside torch, so two compilations in one process must take turns, whoever asks.
_TRACING = threading.Lock()

Signature = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


class Explainer(nn.Module):
    """A model compiled together with its account; made by :func:`frpc.compile`.

    ``explainer(x, target=3)`` returns an :class:`~frpc.explanation.Explanation`. The forward pass is a fixed program of ATen
    operators: no hooks, no autograd, no state that changes, so threads may share one explainer.
    """

    def __init__(self, model: nn.Module, choice: Choice, query: Query) -> None:
        super().__init__()
        self._snapshot = (snapshot(model),)  # in a tuple: it is no submodule, programs hold the tensors they use
        self._choice, self._query = choice, query
        self._names: tuple[str, ...] | None = None  # of the inputs, once they were given by keyword
        self._fronts: dict[Signature, Front] = {}
        self._compiled: dict[tuple[Signature, Query], Compiled] = {}
        self._assignments: dict[tuple[Signature, str], Assignment] = {}
        self._ahead = False
        self.model_name = type(model).__name__

    # ---- asking -------------------------------------------------------------------------------------------------

    def forward(
        self, *inputs: Tensor, target: Target | None = None, seed: Tensor | Top | str | None = None, **named: Tensor
    ) -> Explanation:
        """Explains one number of the output, or K of them, for each sample.

        Shapes:
            inputs, named: ``[B, ...]`` each, any B; by position, or all by the names the model's ``forward`` gives them.
            target: an int, a tuple of ints for outputs of several dimensions, ``[B]`` or ``[B, K]`` class indices.
            seed: instead of a target, any linear functional of the output, like the output or ``[B, K, ...]``; beside a target,
                how relevance starts there: ``"logit"``, ``"probability"``, ``"contrastive"``, ... (:mod:`frpc.top`).
            relevance: like the source (the input, or what ``source=`` names), or ``[B, K, ...]``.

        Exact when: the rule set conserves; with the standard one ``relevance[b].sum() == output[b, target]`` to rounding
        (with ``bias="separate"``: plus ``bias[b]``).

        Raises:
            InputError: an input or target that does not fit; each kind has its own class in :mod:`frpc.errors`.

        Source: thesis eqs. 3.5, 3.8, 4.1, 4.2, in transposed form.
        """
        inputs = self._given(inputs, named)
        front = self._front(inputs)
        top, tensor = self._top(seed)
        functional, columns = self._seed(front, inputs, target, tensor)
        compiled = self._program(front, inputs, self._asked(columns=columns, top=top))
        output, *relevances, bias = self._run(compiled, inputs, functional)
        if columns:
            relevances = [r.movedim(0, 1) for r in relevances]
            bias = bias.movedim(0, 1)
        relevances = [r.contiguous() for r in relevances]  # programs compute in channels-last order; callers index freely
        relevance = relevances[0] if len(relevances) == 1 else tuple(relevances)
        return Explanation(output, relevance, bias, tuple(inputs))

    def at(
        self,
        layers: str | Sequence[str],
        *inputs: Tensor,
        target: Target | None = None,
        seed: Tensor | Top | str | None = None,
        **named: Tensor,
    ) -> LayerRelevance:
        """Returns the relevance of every neuron of inner layers, ``R = a * G_a``, all from one pass.

        Args:
            layers: module paths, e.g. ``["features.4", "features.9"]``.
            inputs, target, seed: as for calling the explainer.

        Raises:
            LayerNameError: if a path names no layer; gives the nearest.

        Source: LID paper, relevance of several layers (eqs. 15-18 with values in place of increments).
        """
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        inputs = self._given(inputs, named)
        front = self._front(inputs)
        self._check_layers(front, names)
        top, tensor = self._top(seed)
        functional, columns = self._seed(front, inputs, target, tensor)
        compiled = self._program(front, inputs, self._asked(columns=columns, layers=names, top=top))
        output, *found = self._run(compiled, inputs, functional)
        relevances, values = found[: len(names)], found[len(names) :]
        if columns:
            relevances = [r.movedim(0, 1) for r in relevances]
        return LayerRelevance(
            output, dict(zip(names, relevances, strict=True)), {name: v.detach() for name, v in zip(names, values, strict=True)}
        )

    def neurons(
        self, layer: str, indices: Sequence[tuple[int, ...]], *inputs: Tensor, strategy: str = "auto", **named: Tensor
    ) -> Explanation:
        """Explains K neurons of a layer, for each sample.

        Shapes: ``output [B, K]``, ``relevance [B, K, ...]`` like the input, ``bias [B, K]``.

        Args:
            layer: module path.
            indices: ``(c, i, j)`` of each neuron; ``(c,)`` in linear layers.
            inputs: as for calling the explainer.
            strategy: ``"transposed"`` runs a whole transposed pass for each neuron, ``"windows"`` pulls each back through its
                receptive field alone, ``"auto"`` takes the cheaper.

        Raises:
            LayerNameError: if no layer has that path.
            OptionError: if a forced strategy cannot answer.
            TargetError: if an index is out of range.
        """
        inputs = self._given(inputs, named)
        front = self._front(inputs)
        self._check_layers(front, (layer,))
        node = _layer_example(front, layer)
        sizes = [int(n) for n in node.shape[1:]]
        seeds = [make_seed(tuple(index), None, _empty_like(node), int(inputs[0].shape[0]))[0] for index in indices]
        if not seeds:
            raise InputError(f"Name at least one neuron of {layer} {sizes}.")
        if (found := self._cones(front, layer, indices, inputs, strategy)) is not None:
            return found
        compiled = self._program(front, inputs, self._asked(columns=True, of=layer))
        values, *relevances, bias = self._run(compiled, inputs, torch.stack(seeds))
        relevances = [r.movedim(0, 1) for r in relevances]
        places: list[Any] = [(slice(None), *index) for index in indices]
        chosen = torch.stack([values[place] for place in places], 1)
        return Explanation(
            chosen, relevances[0] if len(relevances) == 1 else tuple(relevances), bias.movedim(0, 1), tuple(inputs)
        )

    def _cones(
        self, front: Front, layer: str, indices: Sequence[tuple[int, ...]], inputs: tuple[Tensor, ...], strategy: str
    ) -> Explanation | None:
        """Answers by transposed windows, or returns None where a program is to answer."""
        if strategy not in ("auto", "transposed", "windows"):
            raise OptionError(f"strategy={strategy!r} is unknown for neurons; choose auto, transposed or windows.")
        account = self._choice.rules.account
        single = account.reference is None or account.reference.count == 1
        possible = len(inputs) == 1 and inputs[0].dim() in (3, 4) and self._query.bias != "receptive_field"
        possible = possible and account.gives == "relevance" and single
        if strategy == "transposed" or (strategy == "auto" and not possible):
            return None
        query = self._asked(columns=True, of=layer, bias="separate")
        assignment = self._assignment(front, inputs, query)
        node = layer_node(assignment, layer)
        assert node is not None
        context = layer_context(assignment, node, inputs)
        if strategy == "windows" and (context.rows is None or not possible):
            raise OptionError(f'strategy="windows" cannot answer for {layer}: windows end at {context.ended}.')
        if strategy == "auto" and not cones_are_cheaper(context, indices):
            return None
        values, local, bias = neuron_maps(context, indices)
        if self._query.bias == "uniform":
            local = local + (bias / inputs[0][0].numel()).reshape([*bias.shape, *[1] * (inputs[0].dim() - 1)])
        return Explanation(values, local, bias, tuple(inputs))

    def neuron(self, layer: str, index: tuple[int, ...], *inputs: Tensor, **named: Tensor) -> Explanation:
        """Explains one neuron of a layer: ``output [B]``, ``relevance`` like the input; see :meth:`neurons`."""
        found = self.neurons(layer, [index], *self._given(inputs, named))
        relevance = found.relevance
        one = tuple(r[:, 0] for r in relevance) if isinstance(relevance, tuple) else relevance[:, 0]
        return Explanation(found.output[:, 0], one, found.bias[:, 0], found.inputs)

    def layer(self, name: str, *inputs: Tensor, strategy: str = "auto", memory_limit: int = 4 * 10**9) -> LayerMaps:
        """Returns the relevance map of every neuron of a layer.

        Args:
            name: module path, e.g. ``"features.3"``.
            inputs: the input, batch first.
            strategy: ``"auto"`` chooses by cost; ``"windows"``, ``"forward"`` (dense columns, thesis algorithm 1) and
                ``"transposed"`` force one.
            memory_limit: bytes that maps held at one time may take; larger layers are streamed by ``maps.blocks()``.

        Raises:
            LayerNameError: if no layer has that path.
            OptionError: if a forced strategy cannot answer for this layer; says where windows end.

        Source: thesis ch. 3; windows beyond it.
        """
        front = self._front(inputs)
        self._check_layers(front, (name,))
        query = self._asked(columns=True, of=name, bias="separate")
        assignment = self._assignment(front, inputs, query)
        node = layer_node(assignment, name)
        assert node is not None

        def pulled(seeds: Tensor) -> Tensor:
            """Local pixel maps ``[K, B, H0, W0]`` of seeds at the layer."""
            _, relevance, _ = self._run(self._program(front, inputs, query), inputs, seeds)
            pixels = relevance.sum(2) if relevance.dim() > 3 else relevance.unsqueeze(-2)
            return pixels if pixels.dim() == 4 else pixels.unsqueeze(-2)

        return layer_maps(assignment, name, node, inputs, self._query.bias, strategy, memory_limit, pulled)

    def _top(self, seed: Tensor | Top | str | None) -> tuple[Top, Tensor | None]:
        """Tells how relevance starts from where: a top or its name says how, a tensor says where."""
        if seed is None or isinstance(seed, Tensor):
            return self._query.top, seed
        return as_top(seed), None

    def _run(self, compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor) -> list[Tensor]:
        """Runs a program; maps are averaged over reference inputs where there are several."""
        self._choice.rules.check(inputs)
        results = [compiled.program(*(x.detach() for x in inputs), functional, *others) for others in compiled.references]
        if len(results) == 1:
            return list(results[0])
        output, *_ = results[0]
        return [output, *(sum(parts[1:], parts[0]) / len(parts) for parts in list(zip(*results, strict=True))[1:])]

    def predict(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Returns the model's output alone, ``[B, ...]``, from the captured graph."""
        inputs = self._given(inputs, named)
        front = self._front(inputs)
        output = front.canonical(*(x.detach() for x in inputs))
        assert isinstance(output, Tensor)
        return output

    def layers(self) -> list[str]:
        """Returns the module paths that :meth:`at` knows, in the order they are computed."""
        return _layer_names(self._first_front())

    # ---- looking ------------------------------------------------------------------------------------------------

    @property
    def code(self) -> str:
        """The compiled program as valid Python, with shape, origin and rule in comments."""
        compiled = self._first()
        return printing.code(compiled.program, {n.name: a.rule.name for n, a in compiled.assignment.rules.items()})

    @property
    def plan(self) -> Plan:
        """What is asked and how it is answered, with costs; prints as a table."""
        return self._first().plan

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage of the compilation with its time; graphs among them can be printed and run."""
        return self._first().stages

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Faster ways that were not taken, with reasons."""
        return self._first().refusals

    @property
    def program(self) -> torch.fx.GraphModule:
        """The compiled program, ``(*inputs, seed) -> (output, relevance..., constants' share)``."""
        return self._first().program

    def compiled(self, *inputs: Tensor) -> Compiled:
        """Returns everything known about the program for inputs like these."""
        return self._program(self._front(inputs), inputs, self._asked())

    @property
    def bias_policy(self) -> str:
        """Where constants go: ``uniform``, ``receptive_field`` or ``separate``."""
        return self._query.bias

    @property
    def rules(self) -> RuleSet:
        """The rule set it was compiled with."""
        return self._choice.rules

    def seed_for(self, *inputs: Tensor, target: Target | None = None, seed: Tensor | None = None) -> Tensor:
        """Returns the linear functional of the output that a target stands for, ``[B, ...]`` or ``[K, B, ...]``."""
        return self._seed(self._front(inputs), inputs, target, seed)[0]

    def table(self) -> str:
        """Which rule and maps each node got, one line a node."""
        return printing.rule_table(self._first().assignment)

    def __repr__(self) -> str:
        rules = self._choice.rules.name
        if not self._compiled:
            return f"Explainer({self.model_name}, {rules}, not compiled yet: call it, or give compile() example inputs)"
        compiled = self._first()
        front = self._first_front()
        takes = ", ".join(describe(n.meta["val"]) for n in front.canonical.graph.find_nodes(op="placeholder"))
        gives = describe(front.canonical.graph.output_node().args[0].meta["val"])  # type: ignore[union-attr]
        calls = sum(n.op == "call_function" for n in compiled.program.graph.nodes)
        seconds = sum(s.seconds for s in compiled.stages)
        return (
            f"Explainer({self.model_name}: {takes} -> {gives})\n"
            f"  rules {rules}, bias {self._query.bias}, {len(compiled.assignment.rules)} nodes carry relevance\n"
            f"  program of {calls} calls, {compiled.plan.flops / 1e9:.2f} GFLOP a sample, compiled in {seconds:.1f} s, "
            f"{len(compiled.refusals)} refusals"
        )

    # ---- compiling ----------------------------------------------------------------------------------------------

    def compile_for(self, *inputs: Tensor, **named: Tensor) -> Explainer:
        """Compiles the program for inputs like these now, checks it against the model, and takes no other shapes from then on."""
        inputs = self._given(inputs, named)
        front = self._front(inputs)
        compiled = self._program(front, inputs, self._asked())
        pipeline.verify(compiled, front, [x.detach() for x in inputs])
        self._ahead = True
        return self

    def _given(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Puts keyword inputs into the order in which the graph takes them; the first call settles their names."""
        if not named:
            return inputs
        if inputs:
            raise InputError("Give all inputs by position or all by name, not some of each.")
        with _TRACING:
            if self._names is None and not self._fronts:
                self._names = argument_order(self._snapshot[0], list(named))
        known = self._names or ()
        if set(known) != set(named):
            raise InputError(
                f"Inputs {', '.join(named)} given; the explainer takes {', '.join(known) or 'its inputs by position'}."
            )
        return tuple(named[name] for name in known)

    def _asked(self, **changes: Any) -> Query:
        return dataclasses.replace(self._query, **changes)

    def _front(self, inputs: Sequence[Tensor]) -> Front:
        """Finds or makes the captured graph for inputs of this signature, and checks the inputs against it."""
        if not all(isinstance(x, Tensor) for x in inputs) or not inputs:
            kinds = ", ".join(type(x).__name__ for x in inputs) or "nothing"
            raise InputError(f"The explainer takes tensors, batch first; got {kinds}.")
        if self._ahead:
            front = self._first_front()
        else:
            signature = _signature(inputs)
            found = self._fronts.get(signature)
            if found is None:
                with _TRACING:
                    found = self._fronts.get(signature) or pipeline.front(
                        self._snapshot[0], inputs, self._choice.output, self._names or ()
                    )
                    self._fronts[signature] = found
            front = found
        check_inputs(inputs, front.captured.inputs)
        return front

    def _program(self, front: Front, inputs: Sequence[Tensor], query: Query) -> Compiled:
        key = (_signature(inputs), query)
        found = self._compiled.get(key)
        if found is None:
            with _TRACING:
                found = self._compiled.get(key) or pipeline.compile_query(front, self._choice, query)
                if key not in self._compiled:
                    self.add_module(f"program{len(self._compiled)}", found.program)
                self._compiled[key] = found
        return found

    def _assignment(self, front: Front, inputs: Sequence[Tensor], query: Query) -> Assignment:
        key = (_signature(inputs), query.of)
        found = self._assignments.get(key)
        if found is None:
            found = self._assignments[key] = pipeline.assign_rules(front, self._choice, query)
        return found

    def _seed(self, front: Front, inputs: Sequence[Tensor], target: Target | None, seed: Tensor | None) -> tuple[Tensor, bool]:
        example = front.canonical.graph.output_node().args[0].meta["val"]  # type: ignore[union-attr]
        return make_seed(target, seed, _empty_like(example), int(inputs[0].shape[0]))

    def _check_layers(self, front: Front, names: Sequence[str]) -> None:
        known = _layer_names(front)
        for name in names:
            if name not in known:
                raise LayerNameError(f"{self.model_name} has no layer {name!r}; {nearest(name, known)}.")

    def _first(self) -> Compiled:
        if not self._compiled:
            raise InputError("Nothing is compiled yet: call the explainer once, or give frpc.compile() example inputs.")
        return next(iter(self._compiled.values()))

    def _first_front(self) -> Front:
        if not self._fronts:
            raise InputError("Nothing is captured yet: call the explainer once, or give frpc.compile() example inputs.")
        return next(iter(self._fronts.values()))


def _signature(inputs: Sequence[Tensor]) -> Signature:
    return tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in inputs)


def _empty_like(example: Tensor) -> Tensor:
    """A real tensor without samples, of an example's other sizes."""
    return torch.empty([0, *(int(s) for s in example.shape[1:])], dtype=example.dtype, device=example.device)


def _layer_example(front: Front, layer: str) -> Tensor:
    node = next(n for n in front.canonical.graph.nodes if layer in n.meta.get("layers", ()))
    example = first_result(node.meta["val"])
    assert isinstance(example, Tensor)
    return example


def _layer_names(front: Front) -> list[str]:
    return [name for node in front.canonical.graph.nodes for name in node.meta.get("layers", ())]


def _names(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (given,) if isinstance(given, str) else None if given is None else tuple(given)


def compile(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    *,
    rule: RuleSet | None = None,
    method: str | None = None,
    seed: Top | str | None = None,
    source: str | Sequence[str] | None = None,
    bias: str | None = None,
    strategy: str = "auto",
    constant: Sequence[str] = (),
    output: str | int | None = None,
) -> Explainer:
    """Compiles a model into an explainer: its output and an account of it that sums to the output.

    Args:
        model: any module that ``torch.export`` captures. It is copied in evaluation mode; yours is not touched, and later
            changes to it do not reach the explainer.
        inputs: example inputs, batch first, a mapping of them for models called with keywords; with them everything is
            compiled now. Without, at the first call, and again for inputs of other shapes.
        rule: the rule set (:mod:`frpc.rules`); forward relevance propagation by default.
        method: instead of a rule set, a method by its name in the papers, e.g. ``"sig-lid-ig"``; ``frpc.methods()`` lists them.
        seed: where relevance starts at the output: ``"logit"`` (default), ``"probability"``, ``"contrastive"``, ... or a
            :class:`~frpc.top.Top`.
        source: what relevance is spread over: ``"input"``, or module paths (``"model.embed_tokens"``), whose output is then
            explained. By default all floating-point inputs, and for integer inputs the embeddings they index.
        bias: where the constants' share goes: ``"uniform"`` over all cells (thesis eq. 3.7), ``"receptive_field"``, or
            ``"separate"``, beside the map. Rule sets that follow no constants leave what they absorb beside the map by default.
        strategy: ``"auto"``, or ``"transposed"`` to force it.
        constant: module path patterns (``"layers.*.attn"``) whose results count as constants.
        output: which output to explain, for models that return several: a key, an attribute or a position; ``logits`` by
            default where there are any.

    Raises:
        CaptureError: if ``torch.export`` cannot capture the model.
        UnsupportedOpError: if operators have no rule; names all of them.
        TrainingModeError: if the model cannot be evaluated deterministically.
        OptionError: for an unknown method, seed or policy, or a method beside a rule set.
    """
    rules, top = _rules_of(rule, method, seed)
    policy = check_policy(bias or ("uniform" if rules.account.constants else "separate"))
    if policy == "receptive_field" and not rules.account.constants:
        raise OptionError(f'bias="receptive_field": {rules.name} follows no constants, so there is nothing to place.')
    query = Query(bias=policy, strategy=check_strategy(strategy), top=top)
    choice = Choice(rules, _names(constant) or (), _names(source), output)
    explainer = Explainer(model, choice, query)
    if inputs is None:
        return explainer
    if isinstance(inputs, Mapping):
        return explainer.compile_for(**inputs)
    return explainer.compile_for(*([inputs] if isinstance(inputs, Tensor) else inputs))


def _rules_of(rule: RuleSet | None, method: str | None, seed: Top | str | None) -> tuple[RuleSet, Top]:
    """Reads which rules are meant, and where relevance starts."""
    if method is None:
        return rule or FRP(), as_top(seed or "logit")
    if rule is not None:
        raise OptionError(f"Give rule= or method= (both given): method={method!r} is a rule set of its own.")
    found = method_named(method)
    return found.rules(), as_top(seed or found.top)
