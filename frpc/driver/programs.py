"""What an explainer has compiled so far: one captured graph for each kind of input, one program for each question about it."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from frpc.assign.assignment import Assignment
from frpc.canonicalize.precision import computing_in
from frpc.capture.export import argument_order
from frpc.core.graph import unknown_layer
from frpc.core.refusal import Refusal
from frpc.core.snapshot import snapshot
from frpc.core.torch_compat import copied_by, trace_lock
from frpc.core.values import is_plain, is_traced
from frpc.driver import pipeline
from frpc.driver.balance import Balance, balance_of, check_balance, constants_share
from frpc.driver.calling import InputKinds, NamedInputs, in_order_of, kinds_of, refuse_inside_torch_compile, wrapper
from frpc.driver.finite import demand_finite
from frpc.driver.pipeline import Compiled, CompileOptions
from frpc.driver.prepare import PreparedModel, prepare, with_weights
from frpc.driver.running import Form, run
from frpc.driver.targets import Target, check_inputs, make_seed
from frpc.driver.verify import (
    Model,
    Verify,
    agrees,
    check_output,
    compare_with_parts,
    confirm,
    verify,
    weights,
)
from frpc.emit.plan import Query
from frpc.errors import InputError, LayerNameError
from frpc.rules.sets.ruleset import RuleSet
from frpc.rules.top import Logit, Top

__all__ = ["Programs"]


class Programs:
    """Captures and compiles on demand, once for each kind of inputs and each question, whichever thread asks first.

    Attributes:
        model: the copy of the user's module that graphs are captured from.
        dtype: what it computes in, if that is not what its inputs come in.
        options: what was chosen for all questions.
        query: the question asked unless another is.
        prepared_models: captured graphs by the inputs' sizes, types and devices.
        compiled: programs by the inputs' kinds and the question.
        verifying: when programs are held against the model (:mod:`frpc.driver.verify`).
    """

    def __init__(
        self,
        model: nn.Module,
        options: CompileOptions,
        query: Query,
        dtype: torch.dtype | None = None,
        verifying: Verify = "first",
    ) -> None:
        self.dtype, self.verifying = dtype, verifying
        self.model = self._snapshot(model)
        self.options, self.query = options, query
        self.prepared_models: dict[InputKinds, PreparedModel] = {}
        self.compiled: dict[tuple[InputKinds, Query], Compiled] = {}
        self._assignments: dict[tuple[InputKinds, str], Assignment] = {}
        self._names: tuple[str, ...] | None = None  # of the inputs, once they were given by keyword
        self._ahead = False
        self._graphs = threading.RLock()
        self._apart: set[InputKinds] = set()  # of which batches of several samples were tried
        self._agreed: set[InputKinds] = set()  # of which an output was compared with the model's
        self.conservation: float | None = None  # |sum V - y| / sum|V| of the example inputs, once they were given
        self.constants_share: float | None = None  # what part of their maps constants are

    def _snapshot(self, model: nn.Module) -> nn.Module:
        copied = snapshot(model)
        return copied if self.dtype is None else computing_in(copied, self.dtype)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the inputs, once they were given by keyword."""
        return self._names

    @property
    def model_name(self) -> str:
        return type(self.model).__name__

    def with_rules(self, rules: RuleSet, top: Top | None = None) -> Programs:
        """The same model and options with another rule set, nothing compiled."""
        query = dataclasses.replace(self.query, bias="separate", top=top or self.query.top)
        return Programs(self.model, dataclasses.replace(self.options, rules=rules), query, self.dtype, self.verifying)

    @contextmanager
    def reading_graphs(self) -> Iterator[None]:
        """Keeps other threads from these graphs: their example values are fake tensors, which know one thread at a time.

        Whatever reads ``node.meta`` after compilation does so in here; running a program needs no graph and takes no turns.
        A size of an example value may be a symbol, and what is asked of a symbol goes into the trace of whichever thread is
        tracing, so no thread traces meanwhile.
        """
        with self._graphs, trace_lock:
            yield

    def query_with(self, **changes: Any) -> Query:
        """The usual question with changes."""
        if all(getattr(self.query, name) == value for name, value in changes.items()):
            return self.query
        return dataclasses.replace(self.query, **changes)

    def in_order(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Puts keyword inputs into the order in which the graph takes them; the first that are captured settle their names."""
        if not named:
            return inputs
        if inputs:
            raise InputError("Give all inputs by position or all by name, not some of each.")
        settled = self._names is not None or bool(self.prepared_models)
        names = self._names or () if settled else argument_order(self.model, list(named))
        if set(names) != set(named):
            raise InputError(
                f"Inputs {', '.join(named)} given; the explainer takes {', '.join(names) or 'its inputs by position'}."
            )
        return in_order_of(names, named)

    def prepared(self, inputs: Sequence[Tensor]) -> PreparedModel:
        """Finds or makes the captured graph for inputs of this kind, and checks the inputs against it."""
        if not all(isinstance(x, Tensor) for x in inputs) or not inputs:
            kinds = ", ".join(type(x).__name__ for x in inputs) or "nothing"
            way = wrapper(inputs, getattr(inputs, "names", ()))
            how = f"\n  Hand in the tensors alone, and let a module make the call:\n{way}" if way else ""
            raise InputError(f"The explainer takes tensors, batch first; got {kinds}.{how}")
        found = self.first_prepared() if self._ahead and self.prepared_models else self._captured(inputs)
        check_inputs(inputs, found.captured.inputs)
        return found

    def _captured(self, inputs: Sequence[Tensor]) -> PreparedModel:
        kinds = kinds_of(inputs)
        found = self.prepared_models.get(kinds)
        if found is None:
            refuse_inside_torch_compile()
            with self.reading_graphs():
                found = self.prepared_models.get(kinds)
                if found is None:
                    names = self._names or (inputs.names if isinstance(inputs, NamedInputs) else ())
                    gradients = self.options.rules.account.gradients
                    found = prepare(self.model, inputs, self.options.output, names, gradients, self.verifying != "never")
                    self._names = names or None
                    self.prepared_models[kinds] = found
        return found

    def program(self, prepared: PreparedModel, inputs: Sequence[Tensor], query: Query) -> Compiled:
        """Finds or compiles the program that answers a question."""
        found = self.compiled.get((kinds_of(inputs), query))
        return found or self._compile(kinds_of(inputs), prepared, query)

    def compiled_for(self, kinds: InputKinds, query: Query) -> Compiled:
        """Finds or compiles the program that answers a question about inputs that were captured."""
        return self.compiled.get((kinds, query)) or self._compile(kinds, self.prepared_models[kinds], query)

    def _compile(self, kinds: InputKinds, prepared: PreparedModel, query: Query) -> Compiled:
        refuse_inside_torch_compile()
        with self.reading_graphs():
            found = self.compiled.get((kinds, query))
            if found is None:
                prepared = self.prepared_models.get(kinds, prepared)  # it may have been renewed while this thread waited
                found = pipeline.compile_query(prepared, self.options, query)
                if prepared is self.prepared_models.get(kinds):
                    self.compiled[kinds, query] = found
        return found

    def assignment(self, prepared: PreparedModel, inputs: Sequence[Tensor], query: Query) -> Assignment:
        """Finds or makes the rules of the graph's nodes for a question about one layer."""
        key = (kinds_of(inputs), query.of)
        with self.reading_graphs():
            found = self._assignments.get(key)
            if found is None:
                found = pipeline.assign_rules(prepared, self.options, query)
                if prepared is self.prepared_models.get(key[0]):
                    self._assignments[key] = found
        return found

    def run(self, compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor) -> list[Tensor]:
        """Runs a program; maps are averaged over reference inputs where there are several."""
        self.options.rules.check(inputs)
        query = compiled.plan.query
        form = Form(len(inputs), query.columns, len(query.layers), compiled.fixed_batch, compiled.places)
        program = compiled.portable if is_traced() else compiled.function
        results = run(program, inputs, functional, compiled.references, form)
        demand_finite(compiled, inputs, functional, results)
        if compiled.pending < math.inf and self.verifying != "never":
            self._verify(compiled, inputs, functional, results)
        return results

    def _verify(self, compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor, results: Sequence[Tensor]) -> None:
        """Holds a program against the model at its first call, and once more where that call had one sample only."""
        if not is_plain(inputs) or len(inputs[0]) < compiled.pending:
            return
        kinds, given = kinds_of(inputs), [x.detach() for x in inputs]
        with self.reading_graphs():  # while another thread exports, PyTorch tells the model that it is being compiled
            if self.compiled.get((kinds, compiled.plan.query)) is not compiled:
                return  # the model has been renewed since this call began
            model, prepared = Model(self.model, self._names or (), self.options.output), self.prepared_models[kinds]
            known = kinds in self._apart
            if compiled.pending == 1:
                reason = verify(compiled, prepared, model, given, functional, results, known)
                self._agreed.add(kinds)
            else:
                reason = None if known else compare_with_parts(prepared, model, given)
            if reason is not None:
                refusal = Refusal("the test that samples are independent", "verification", reason)
                compiled.refusals = (*compiled.refusals, refusal)
        apart = len(inputs[0]) > 1 or prepared.captured.inputs[0].batch is not None
        if apart:
            self._apart.add(kinds)
        compiled.pending = math.inf if kinds in self._apart else 2

    def predicted(self, prepared: PreparedModel, inputs: Sequence[Tensor]) -> Tensor:
        """The model's output from the captured graph, which is compared with the model's own once."""
        output: Tensor = prepared.canonical(*(x.detach() for x in inputs))
        kinds = kinds_of(inputs)
        if kinds not in self._agreed and self.verifying != "never" and is_plain(inputs):
            with self.reading_graphs():
                if self.prepared_models.get(kinds) is prepared:
                    check_output(prepared, Model(self.model, self._names or ()), [x.detach() for x in inputs], output)
                    self._agreed.add(kinds)
        return output

    def balance(
        self, compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor, results: Sequence[Tensor]
    ) -> Balance | None:
        """The account of one call where every call is verified; None otherwise, and for methods that make none.

        Raises:
            ConservationError: if it does not balance.
        """
        found = balance_of(compiled, functional, results) if self.verifying == "always" else None
        if found is not None and is_plain(inputs):
            prepared = self.prepared_models.get(kinds_of(inputs)) or self.first_prepared()
            check_balance(found, compiled, prepared, [x.detach() for x in inputs], functional, results[0])
        return found

    def agrees_with(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        """Says whether a module still gives what a program of it gave for these inputs; runs it once."""
        prepared, given = self.prepared(inputs), [x.detach() for x in inputs]
        with self.reading_graphs():  # while another thread exports, PyTorch tells the module that it is being compiled
            return agrees(prepared, module, self._names or (), given, output)

    def seed(
        self, prepared: PreparedModel, inputs: Sequence[Tensor], target: Target | None, seed: Tensor | None
    ) -> tuple[Tensor, bool]:
        """The linear functional that a target or a seed stands for, and whether there are K of them."""
        return make_seed(target, seed, prepared.output, int(inputs[0].shape[0]))

    def check_layers(self, prepared: PreparedModel, names: Sequence[str]) -> None:
        """Refuses names of no layer.

        Raises:
            LayerNameError: names the nearest.
        """
        known = prepared.layer_names()
        for name in names:
            if name not in known:
                raise LayerNameError(f"{self.model_name} has no layer {name!r}; {unknown_layer(name, known)}.")

    def compile_ahead(self, inputs: Sequence[Tensor]) -> None:
        """Compiles for inputs like these, checks the program against the model, and takes no other shapes from then on."""
        prepared = self.prepared(inputs)
        compiled = self.program(prepared, inputs, self.query)
        if self.verifying != "never":
            output = prepared.canonical(*(x.detach() for x in inputs))
            self.run(compiled, inputs, weights(output))
            results = self.run(compiled, inputs, torch.ones_like(output))
            plain = balance_of(compiled, torch.ones_like(output), results) if self.query.top == Logit() else None
            if plain is not None:
                self.conservation, self.constants_share = float(plain.errors.max()), constants_share(compiled, results)
        self._ahead = True

    def refresh(self, model: nn.Module) -> None:
        """Takes the weights of ``model`` into everything that was captured and compiled; see :meth:`frpc.Explainer.refresh`."""
        with self.reading_graphs():
            fresh = self._snapshot(model)
            prepared_models = {kinds: with_weights(prepared, fresh) for kinds, prepared in self.prepared_models.items()}
            for prepared in prepared_models.values():
                confirm(prepared, Model(fresh, self._names or (), self.options.output))
            programs = {
                (kinds, query): pipeline.compile_query(prepared_models[kinds], self.options, query)
                for kinds, query in self.compiled
            }
            self._replace_contents(fresh, prepared_models, programs)
            self.conservation = self.constants_share = None  # which were those of other weights

    def convert(self, change: Callable[[Tensor], Tensor]) -> None:
        """Moves the model to another device or type. What was captured there is dropped; the next call captures again."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        probes = {(t.dtype, t.device): torch.empty(0, dtype=t.dtype, device=t.device) for t in tensors}
        if all((change(probe).dtype, change(probe).device) == kind for kind, probe in probes.items()):
            return
        with self.reading_graphs():
            if self.dtype is not None:
                self.dtype = change(torch.empty(0, dtype=self.dtype)).dtype
            self._replace_contents(copied_by(copy.deepcopy(self.model), change), {}, {})

    def copied(self, memo: dict[int, Any]) -> Programs:
        """Returns a copy with tensors of its own, compiled as far as this one."""
        other = copy.copy(self)  # which also waits its turn at the graphs: their fake tensors stay common to both
        with self.reading_graphs():
            return self._copied_into(other, memo)

    def _copied_into(self, other: Programs, memo: dict[int, Any]) -> Programs:
        prepared_models: dict[InputKinds, PreparedModel] = {}
        programs: dict[tuple[InputKinds, Query], Compiled] = {}
        for kinds, prepared in self.prepared_models.items():
            keys = [key for key in self.compiled if key[0] == kinds]
            prepared_models[kinds], compiled = pipeline.deep_copy(prepared, [self.compiled[key] for key in keys], memo)
            programs |= dict(zip(keys, compiled, strict=True))
        other._replace_contents(copy.deepcopy(self.model, memo), prepared_models, {key: programs[key] for key in self.compiled})
        return other

    def _replace_contents(
        self,
        model: nn.Module,
        prepared_models: dict[InputKinds, PreparedModel],
        compiled: dict[tuple[InputKinds, Query], Compiled],
    ) -> None:
        """Sets new contents; calls that run in other threads go on with what they hold."""
        self.model, self.prepared_models, self.compiled, self._assignments = model, prepared_models, compiled, {}
        self._apart, self._agreed = set(), set()

    def first(self) -> Compiled:
        """The program compiled first."""
        if not self.compiled:
            raise InputError("Nothing is compiled yet: call the explainer once, or give frpc.compile() example inputs.")
        return next(iter(self.compiled.values()))

    def first_prepared(self) -> PreparedModel:
        """The graph captured first."""
        if not self.prepared_models:
            raise InputError("Nothing is captured yet: call the explainer once, or give frpc.compile() example inputs.")
        return next(iter(self.prepared_models.values()))
