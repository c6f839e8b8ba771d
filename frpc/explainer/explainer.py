"""The explainer: a compiled model that returns its output and where the output comes from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from frpc.core.graph import describe
from frpc.core.refusal import Refusal
from frpc.driver import printing
from frpc.driver.explanation import Explanation, LayerRelevance, explanation_of, layer_relevance_of
from frpc.driver.pipeline import Compiled, Stage
from frpc.driver.targets import Target
from frpc.emit.plan import Plan
from frpc.explainer.asking import ask_layer, ask_neurons
from frpc.explainer.module import ExplainerModule
from frpc.layers.maps import LayerMaps
from frpc.rules.sets.ruleset import RuleSet
from frpc.rules.top import Top, as_top

__all__ = ["Explainer"]


class Explainer(ExplainerModule):
    """A compiled model that returns its output and relevance maps; made by :func:`frpc.compile`.

    ``explainer(x, target=3)`` returns an :class:`~frpc.driver.explanation.Explanation`. The forward pass is a fixed program of
    ATen operators: no hooks, no autograd, no state that changes, so threads may share one explainer.
    """

    # ---- asking -------------------------------------------------------------------------------------------------

    def forward(
        self, *inputs: Tensor, target: Target | None = None, seed: Tensor | Top | str | None = None, **named: Tensor
    ) -> Explanation:
        """Explains one number of the output, or K of them, for each sample.

        Shapes:
            inputs, named: ``[B, ...]`` each, any B; all by position, or all by the argument names of the model's ``forward``.
            target: an int, a tuple of ints for outputs of several dimensions, a list with one of these for each sample, or
                ``[B]`` or ``[B, K]`` class indices.
            seed: instead of a target, a weight for each output, like the output or ``[B, K, ...]``; together with a target,
                how relevance starts there: ``"logit"``, ``"probability"``, ``"contrastive"``, ... (:mod:`frpc.rules.top`).
            relevance: like the source (the input, or the module chosen with ``source=``), or ``[B, K, ...]``.

        Exact when: the rule set conserves; with the default ``relevance[b].sum() == output[b, target]`` up to rounding
        (with ``bias="separate"``: plus ``bias[b]``).

        Raises:
            InputError: for a wrong input or target; each kind has its own class in :mod:`frpc.errors`.

        Source: thesis eqs. 3.5, 3.8, 4.1, 4.2, in transposed form.
        """
        inputs = self.programs.in_order(inputs, named)
        prepared = self.programs.prepared(inputs)
        top, tensor = self._top(seed)
        functional, columns = self.programs.seed(prepared, inputs, target, tensor)
        compiled = self.programs.program(prepared, inputs, self.programs.query_with(columns=columns, top=top))
        results = self.programs.run(compiled, inputs, functional)
        balance = self.programs.balance(compiled, inputs, functional, results)
        return explanation_of(results, columns, inputs, None if balance is None else balance.errors, compiled.places)

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
            LayerNameError: if a path is not that of a layer; suggests the nearest.

        Source: LID paper, relevance of several layers (eqs. 15-18 with values in place of increments).
        """
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        inputs = self.programs.in_order(inputs, named)
        prepared = self.programs.prepared(inputs)
        self.programs.check_layers(prepared, names)
        top, tensor = self._top(seed)
        functional, columns = self.programs.seed(prepared, inputs, target, tensor)
        compiled = self.programs.program(prepared, inputs, self.programs.query_with(columns=columns, layers=names, top=top))
        return layer_relevance_of(self.programs.run(compiled, inputs, functional), columns, names)

    def neurons(
        self, layer: str, indices: Sequence[int | tuple[int, ...]], *inputs: Tensor, strategy: str | None = None, **named: Tensor
    ) -> Explanation:
        """Explains K neurons of a layer, for each sample.

        Shapes: ``output [B, K]``, ``relevance [B, K, ...]`` like the input, ``bias [B, K]``.

        Args:
            layer: module path.
            indices: ``(c, i, j)`` of each neuron; ``(c,)`` or ``c`` in linear layers.
            inputs: as for calling the explainer.
            strategy: ``"transposed"`` runs a whole transposed pass for each neuron, ``"windows"`` pulls each back through its
                receptive field only, ``"auto"`` takes the cheaper. By default the strategy given to ``compile``.

        Raises:
            LayerNameError: if no layer has that path.
            OptionError: if a forced strategy does not work for this layer.
            TargetError: if an index is out of range.
        """
        strategy = strategy or self.programs.options.strategy
        return ask_neurons(self.programs, layer, indices, self.programs.in_order(inputs, named), strategy)

    def neuron(self, layer: str, index: int | tuple[int, ...], *inputs: Tensor, **named: Tensor) -> Explanation:
        """Explains one neuron of a layer: ``output [B]``, ``relevance`` like the input; see :meth:`neurons`."""
        found = self.neurons(layer, [index], *inputs, strategy=None, **named)
        relevance = found.relevance
        one = tuple(r[:, 0] for r in relevance) if isinstance(relevance, tuple) else relevance[:, 0]
        errors = None if found.conservation is None else found.conservation[:, 0]
        return Explanation(found.output[:, 0], one, found.bias[:, 0], found.inputs, errors, found.places)

    def layer(
        self, name: str, *inputs: Tensor, strategy: str | None = None, memory_limit: int = 4 * 10**9, **named: Tensor
    ) -> LayerMaps:
        """Returns the relevance map of every neuron of a layer.

        Args:
            name: module path, e.g. ``"features.3"``.
            inputs, named: as for calling the explainer.
            strategy: ``"auto"`` chooses by cost; ``"windows"``, ``"forward"`` (dense columns, thesis algorithm 1) and
                ``"transposed"`` force one. By default the strategy given to ``compile``.
            memory_limit: maximum number of bytes of maps in memory at one time; stream larger layers with ``maps.blocks()``.

        Raises:
            LayerNameError: if no layer has that path.
            OptionError: if a forced strategy does not work for this layer; says where windows end.

        Source: thesis ch. 3; windows beyond it.
        """
        strategy = strategy or self.programs.options.strategy
        return ask_layer(self.programs, name, self.programs.in_order(inputs, named), strategy, memory_limit)

    def _top(self, seed: Tensor | Top | str | None) -> tuple[Top, Tensor | None]:
        """Separates the two kinds of seed: a top or its name says how relevance starts, a tensor says where."""
        if seed is None or isinstance(seed, Tensor):
            return self.programs.query.top, seed
        return as_top(seed), None

    def predict(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Returns only the model's output, ``[B, ...]``, from the captured graph."""
        inputs = self.programs.in_order(inputs, named)
        prepared = self.programs.prepared(inputs)
        return self.programs.predicted(prepared, inputs)

    def layers(self) -> list[str]:
        """Returns the module paths that :meth:`at` accepts, in the order they are computed."""
        return self.programs.first_prepared().layer_names()

    # ---- looking ------------------------------------------------------------------------------------------------

    @property
    def code(self) -> str:
        """The compiled program as valid Python, with shape, origin and rule in comments."""
        compiled = self.programs.first()
        return printing.code(compiled.program, {n.name: a.rule.name for n, a in compiled.assignment.rules.items()})

    @property
    def plan(self) -> Plan:
        """What is computed and with which strategies, with costs; prints as a table."""
        return self.programs.first().plan

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage of the compilation with its time; the graphs of stages can be printed and run."""
        return self.programs.first().stages

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What was not done, mostly optimizations, with the reasons."""
        return self.programs.first().refusals

    @property
    def conservation(self) -> float | None:
        """The conservation error of the maps of the example inputs, ``|sum V + bias - y| / sum|V|``.

        The largest over the samples, for the sum of the outputs. None if ``compile`` got no example inputs, and for methods
        that do not track constants.
        """
        return self.programs.conservation

    @property
    def constants_share(self) -> float | None:
        """The constants' share of the relevance in maps of the example inputs, from 0 to 1; at 1, the maps say nothing.

        None if ``compile`` was not given example inputs, and for methods that do not track constants.
        """
        return self.programs.constants_share

    @property
    def program(self) -> fx.GraphModule:
        """The compiled program, ``(*inputs, seed) -> (output, relevance..., constants' share)``."""
        return self.programs.first().program

    def compiled(self, *inputs: Tensor, **named: Tensor) -> Compiled:
        """Returns all information about the program for inputs like these."""
        inputs = self.programs.in_order(inputs, named)
        return self.programs.program(self.programs.prepared(inputs), inputs, self.programs.query_with())

    @property
    def bias_policy(self) -> str:
        """Where constants go: ``uniform``, ``receptive_field`` or ``separate``."""
        return self.programs.query.bias

    @property
    def top(self) -> Top:
        """Where relevance starts unless a call says otherwise."""
        return self.programs.query.top

    @property
    def rules(self) -> RuleSet:
        """The rule set it was compiled with."""
        return self.programs.options.rules

    def functional_for(
        self, *inputs: Tensor, target: Target | None = None, seed: Tensor | None = None, **named: Tensor
    ) -> tuple[Tensor, bool]:
        """Returns the linear functional that a target stands for, ``[B, ...]`` or ``[K, B, ...]``, and whether there are K."""
        inputs = self.programs.in_order(inputs, named)
        return self.programs.seed(self.programs.prepared(inputs), inputs, target, seed)

    def seed_for(self, *inputs: Tensor, target: Target | None = None, seed: Tensor | None = None, **named: Tensor) -> Tensor:
        """Returns the seed of a target, one weight per output: ``[B, ...]`` or ``[K, B, ...]``."""
        return self.functional_for(*inputs, target=target, seed=seed, **named)[0]

    def forward_graph(self, *inputs: Tensor, **named: Tensor) -> fx.GraphModule:
        """Returns the graph of the model alone for inputs like these, in canonical form: inputs in, output out."""
        return self.programs.prepared(self.programs.in_order(inputs, named)).canonical

    def layer_shapes(self, *inputs: Tensor, **named: Tensor) -> dict[str, list[int]]:
        """Returns the sizes of one sample of every layer's result, by module path, in the order they are computed."""
        prepared = self.programs.prepared(self.programs.in_order(inputs, named))
        with self.programs.reading_graphs():
            return {name: [int(n) for n in prepared.layer_example(name).shape[1:]] for name in prepared.layer_names()}

    def check_layers(self, names: Sequence[str], *inputs: Tensor, **named: Tensor) -> None:
        """Refuses names of no layer.

        Raises:
            LayerNameError: gives the nearest.
        """
        self.programs.check_layers(self.programs.prepared(self.programs.in_order(inputs, named)), names)

    def agrees_with(self, model: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        """Says whether a module still gives, up to rounding, what this explainer gave for these inputs. Runs the module once."""
        return self.programs.agrees_with(model, inputs, output)

    def with_rules(self, rules: RuleSet, top: Top | None = None) -> Explainer:
        """Returns an explainer of the same model and options with another rule set, which compiles when it is first asked.

        Args:
            rules: the rule set.
            top: where relevance starts; where it starts here if left out.
        """
        return Explainer(self.programs.with_rules(rules, top))

    def table(self) -> str:
        """The rule and the linear maps of each node, one line per node."""
        return printing.rule_table(self.programs.first().assignment)

    def __repr__(self) -> str:
        rules = self.programs.options.rules.name
        if not self.programs.compiled:
            return f"Explainer({self.model_name}, {rules}, not compiled yet: call it, or give compile() example inputs)"
        compiled = self.programs.first()
        with self.programs.reading_graphs():
            prepared = self.programs.first_prepared()
            takes = ", ".join(describe(n.meta["val"]) for n in prepared.canonical.graph.find_nodes(op="placeholder"))
            gives = describe(prepared.canonical.graph.output_node().args[0].meta["val"])  # type: ignore[union-attr]
        calls = sum(n.op == "call_function" for n in compiled.program.graph.nodes)
        seconds = sum(s.seconds for s in compiled.stages)
        return (
            f"Explainer({self.model_name}: {takes} -> {gives})\n"
            f"  rules {rules}, bias {self.programs.query.bias}, {len(compiled.assignment.rules)} nodes carry relevance\n"
            f"  program of {calls} calls, {compiled.plan.flops / 1e9:.2f} GFLOP per sample, compiled in {seconds:.1f} s, "
            f"{len(compiled.refusals)} refusals"
            + (f"\n  conservation error {self.conservation:.0e} of sum|V|" if self.conservation is not None else "")
            + (f", constants receive {self.constants_share:.0%} of the relevance" if self.constants_share is not None else "")
        )

    # ---- compiling ----------------------------------------------------------------------------------------------

    def compile_for(self, *inputs: Tensor, **named: Tensor) -> Explainer:
        """Compiles the program for inputs like these now, compares it with the model, and accepts no other shapes afterwards."""
        self.programs.compile_ahead(self.programs.in_order(inputs, named))
        return self
