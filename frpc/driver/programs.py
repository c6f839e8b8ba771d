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
from frpc.core.graph import empty_like, first_result, unknown_layer
from frpc.core.snapshot import snapshot
from frpc.core.torch_compat import copied_by, trace_lock
from frpc.core.values import is_plain, is_traced
from frpc.driver import pipeline
from frpc.driver.calling import wrapper
from frpc.driver.finite import demand_finite
from frpc.driver.pipeline import Choice, Compiled, Front
from frpc.driver.running import Form, run
from frpc.driver.targets import Target, check_inputs, make_seed
from frpc.driver.verify import (
    Balance,
    Model,
    Verify,
    account_of,
    agrees,
    confirm,
    constants_share,
    demand_balance,
    demand_output,
    held_apart,
    verify,
    weights,
)
from frpc.emit.plan import Query
from frpc.errors import InputError, LayerNameError
from frpc.optimize.lower import Refusal
from frpc.rules.top import Logit

__all__ = ["NamedInputs", "Programs", "Signature", "empty_like", "layer_example", "layer_names"]

Signature = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


class NamedInputs(tuple[Tensor, ...]):
    """Inputs that were given by keyword, in the order of the model's ``forward``.

    Attributes:
        names: the name of each.
    """

    names: tuple[str, ...] = ()


class Programs:
    """Captures and compiles on demand, once for each signature and question, whichever thread asks first.

    Attributes:
        model: the copy of the user's module that graphs are captured from.
        dtype: what it computes in, if that is not what its inputs come in.
        choice: what was chosen for all questions.
        query: the question asked unless another is.
        fronts: captured graphs by the inputs' sizes, types and devices.
        compiled: programs by signature and question.
        verifying: when programs are held against the model (:mod:`frpc.driver.verify`).
    """

    def __init__(
        self, model: nn.Module, choice: Choice, query: Query, dtype: torch.dtype | None = None, verifying: Verify = "first"
    ) -> None:
        self.dtype, self.verifying = dtype, verifying
        self.model = self._snapshot(model)
        self.choice, self.query = choice, query
        self.fronts: dict[Signature, Front] = {}
        self.compiled: dict[tuple[Signature, Query], Compiled] = {}
        self._assignments: dict[tuple[Signature, str], Assignment] = {}
        self._names: tuple[str, ...] | None = None  # of the inputs, once they were given by keyword
        self._ahead = False
        self._graphs = threading.RLock()
        self._apart: set[Signature] = set()  # of which batches of several samples were tried
        self._agreed: set[Signature] = set()  # of which an output was compared with the model's
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

    @contextmanager
    def reading_graphs(self) -> Iterator[None]:
        """Keeps other threads from these graphs: their example values are fake tensors, which know one thread at a time.

        Whatever reads ``node.meta`` after compilation does so in here; running a program needs no graph and takes no turns.
        A size of an example value may be a symbol, and what is asked of a symbol goes into the trace of whichever thread is
        tracing, so no thread traces meanwhile.
        """
        with self._graphs, trace_lock:
            yield

    def asked(self, **changes: Any) -> Query:
        """The usual question with changes."""
        if all(getattr(self.query, name) == value for name, value in changes.items()):
            return self.query
        return dataclasses.replace(self.query, **changes)

    def given(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Puts keyword inputs into the order in which the graph takes them; the first that are captured settle their names."""
        if not named:
            return inputs
        if inputs:
            raise InputError("Give all inputs by position or all by name, not some of each.")
        settled = self._names is not None or bool(self.fronts)
        names = self._names or () if settled else argument_order(self.model, list(named))
        if set(names) != set(named):
            raise InputError(
                f"Inputs {', '.join(named)} given; the explainer takes {', '.join(names) or 'its inputs by position'}."
            )
        ordered = NamedInputs(named[name] for name in names)
        ordered.names = names
        return ordered

    def front(self, inputs: Sequence[Tensor]) -> Front:
        """Finds or makes the captured graph for inputs of this signature, and checks the inputs against it."""
        if not all(isinstance(x, Tensor) for x in inputs) or not inputs:
            kinds = ", ".join(type(x).__name__ for x in inputs) or "nothing"
            way = wrapper(inputs, getattr(inputs, "names", ()))
            how = f"\n  Hand in the tensors alone, and let a module make the call:\n{way}" if way else ""
            raise InputError(f"The explainer takes tensors, batch first; got {kinds}.{how}")
        found = self.first_front() if self._ahead and self.fronts else self._captured(inputs)
        check_inputs(inputs, found.captured.inputs)
        return found

    def _captured(self, inputs: Sequence[Tensor]) -> Front:
        signature = _signature(inputs)
        found = self.fronts.get(signature)
        if found is None:
            _refuse_inside_torch_compile()
            with self.reading_graphs():
                found = self.fronts.get(signature)
                if found is None:
                    names = self._names or (inputs.names if isinstance(inputs, NamedInputs) else ())
                    gradients = self.choice.rules.account.gradients
                    found = pipeline.front(self.model, inputs, self.choice.output, names, gradients, self.verifying != "never")
                    self._names = names or None
                    self.fronts[signature] = found
        return found

    def program(self, front: Front, inputs: Sequence[Tensor], query: Query) -> Compiled:
        """Finds or compiles the program that answers a question."""
        found = self.compiled.get((_signature(inputs), query))
        return found or self._compile(_signature(inputs), front, query)

    def compiled_for(self, signature: Signature, query: Query) -> Compiled:
        """Finds or compiles the program that answers a question about inputs that were captured."""
        return self.compiled.get((signature, query)) or self._compile(signature, self.fronts[signature], query)

    def _compile(self, signature: Signature, front: Front, query: Query) -> Compiled:
        _refuse_inside_torch_compile()
        with self.reading_graphs():
            found = self.compiled.get((signature, query))
            if found is None:
                front = self.fronts.get(signature, front)  # it may have been renewed while this thread waited
                found = pipeline.compile_query(front, self.choice, query)
                if front is self.fronts.get(signature):
                    self.compiled[signature, query] = found
        return found

    def assignment(self, front: Front, inputs: Sequence[Tensor], query: Query) -> Assignment:
        """Finds or makes the rules of the graph's nodes for a question about one layer."""
        key = (_signature(inputs), query.of)
        with self.reading_graphs():
            found = self._assignments.get(key)
            if found is None:
                found = pipeline.assign_rules(front, self.choice, query)
                if front is self.fronts.get(key[0]):
                    self._assignments[key] = found
        return found

    def run(self, compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor) -> list[Tensor]:
        """Runs a program; maps are averaged over reference inputs where there are several."""
        self.choice.rules.check(inputs)
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
        signature, given = _signature(inputs), [x.detach() for x in inputs]
        with self.reading_graphs():  # while another thread exports, PyTorch tells the model that it is being compiled
            if self.compiled.get((signature, compiled.plan.query)) is not compiled:
                return  # the model has been renewed since this call began
            model, front = Model(self.model, self._names or (), self.choice.output), self.fronts[signature]
            known = signature in self._apart
            if compiled.pending == 1:
                reason = verify(compiled, front, model, given, functional, results, known)
                self._agreed.add(signature)
            else:
                reason = None if known else held_apart(front, model, given)
            if reason is not None:
                refusal = Refusal("the trial that samples are treated apart", "verification", reason)
                compiled.refusals = (*compiled.refusals, refusal)
        apart = len(inputs[0]) > 1 or front.captured.inputs[0].batch is not None
        if apart:
            self._apart.add(signature)
        compiled.pending = math.inf if signature in self._apart else 2

    def predicted(self, front: Front, inputs: Sequence[Tensor]) -> Tensor:
        """The model's output from the captured graph, which is compared with the model's own once."""
        output: Tensor = front.canonical(*(x.detach() for x in inputs))
        signature = _signature(inputs)
        if signature not in self._agreed and self.verifying != "never" and is_plain(inputs):
            with self.reading_graphs():
                if self.fronts.get(signature) is front:
                    demand_output(front, Model(self.model, self._names or ()), [x.detach() for x in inputs], output)
                    self._agreed.add(signature)
        return output

    def balance(
        self, compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor, results: Sequence[Tensor]
    ) -> Balance | None:
        """The account of one call where every call is verified; None otherwise, and for methods that make none.

        Raises:
            ConservationError: if it does not balance.
        """
        found = account_of(compiled, functional, results) if self.verifying == "always" else None
        if found is not None and is_plain(inputs):
            front = self.fronts.get(_signature(inputs)) or self.first_front()
            demand_balance(found, compiled, front, [x.detach() for x in inputs], functional, results[0])
        return found

    def follows(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        """Says whether a module still gives what a program of it gave for these inputs; runs it once."""
        front, given = self.front(inputs), [x.detach() for x in inputs]
        with self.reading_graphs():  # while another thread exports, PyTorch tells the module that it is being compiled
            return agrees(front, module, self._names or (), given, output)

    def seed(self, front: Front, inputs: Sequence[Tensor], target: Target | None, seed: Tensor | None) -> tuple[Tensor, bool]:
        """The linear functional that a target or a seed stands for, and whether there are K of them."""
        return make_seed(target, seed, front.output, int(inputs[0].shape[0]))

    def check_layers(self, front: Front, names: Sequence[str]) -> None:
        """Refuses names of no layer.

        Raises:
            LayerNameError: names the nearest.
        """
        known = layer_names(front)
        for name in names:
            if name not in known:
                raise LayerNameError(f"{self.model_name} has no layer {name!r}; {unknown_layer(name, known)}.")

    def settle(self, inputs: Sequence[Tensor]) -> None:
        """Compiles for inputs like these, checks the program against the model, and takes no other shapes from then on."""
        front = self.front(inputs)
        compiled = self.program(front, inputs, self.query)
        if self.verifying != "never":
            output = front.canonical(*(x.detach() for x in inputs))
            self.run(compiled, inputs, weights(output))
            self._measure(compiled, inputs, torch.ones_like(output))
        self._ahead = True

    def _measure(self, compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor) -> None:
        """Notes how well the account of the example inputs balances, and how much of it constants have."""
        results = self.run(compiled, inputs, functional)
        plain = account_of(compiled, functional, results) if self.query.top == Logit() else None
        if plain is not None:
            self.conservation, self.constants_share = float(plain.errors.max()), constants_share(compiled, results)

    def refresh(self, model: nn.Module) -> None:
        """Takes the weights of ``model`` into everything that was captured and compiled; see :meth:`frpc.Explainer.refresh`."""
        with self.reading_graphs():
            fresh = self._snapshot(model)
            fronts = {signature: pipeline.renewed(front, fresh) for signature, front in self.fronts.items()}
            for front in fronts.values():
                confirm(front, Model(fresh, self._names or (), self.choice.output))
            programs = {
                (signature, query): pipeline.compile_query(fronts[signature], self.choice, query)
                for signature, query in self.compiled
            }
            self._take(fresh, fronts, programs)
            self.conservation = self.constants_share = None  # which were those of other weights

    def convert(self, change: Callable[[Tensor], Tensor]) -> None:
        """Moves the model to another device or type. What was captured there is forgotten; the next call captures anew."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        probes = {(t.dtype, t.device): torch.empty(0, dtype=t.dtype, device=t.device) for t in tensors}
        if all((change(probe).dtype, change(probe).device) == kind for kind, probe in probes.items()):
            return
        with self.reading_graphs():
            if self.dtype is not None:
                self.dtype = change(torch.empty(0, dtype=self.dtype)).dtype
            self._take(copied_by(copy.deepcopy(self.model), change), {}, {})

    def copied(self, memo: dict[int, Any]) -> Programs:
        """Returns a copy with tensors of its own, compiled as far as this one."""
        other = copy.copy(self)  # which also waits its turn at the graphs: their fake tensors stay common to both
        with self.reading_graphs():
            return self._copied_into(other, memo)

    def _copied_into(self, other: Programs, memo: dict[int, Any]) -> Programs:
        fronts: dict[Signature, Front] = {}
        programs: dict[tuple[Signature, Query], Compiled] = {}
        for signature, front in self.fronts.items():
            keys = [key for key in self.compiled if key[0] == signature]
            fronts[signature], compiled = pipeline.duplicated(front, [self.compiled[key] for key in keys], memo)
            programs |= dict(zip(keys, compiled, strict=True))
        other._take(copy.deepcopy(self.model, memo), fronts, {key: programs[key] for key in self.compiled})
        return other

    def _take(self, model: nn.Module, fronts: dict[Signature, Front], compiled: dict[tuple[Signature, Query], Compiled]) -> None:
        """Sets new contents; calls that run in other threads go on with what they hold."""
        self.model, self.fronts, self.compiled, self._assignments = model, fronts, compiled, {}
        self._apart, self._agreed = set(), set()

    def first(self) -> Compiled:
        """The program compiled first."""
        if not self.compiled:
            raise InputError("Nothing is compiled yet: call the explainer once, or give frpc.compile() example inputs.")
        return next(iter(self.compiled.values()))

    def first_front(self) -> Front:
        """The graph captured first."""
        if not self.fronts:
            raise InputError("Nothing is captured yet: call the explainer once, or give frpc.compile() example inputs.")
        return next(iter(self.fronts.values()))


def _refuse_inside_torch_compile() -> None:
    if is_traced():
        raise InputError("This question is not compiled yet: call the explainer once before torch.compile traces it.")


def _signature(inputs: Sequence[Tensor]) -> Signature:
    return tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in inputs)


def layer_example(front: Front, layer: str) -> Tensor:
    """The example value of a layer's result."""
    node = next(n for n in front.canonical.graph.nodes if layer in n.meta.get("layers", ()))
    example = first_result(node.meta["val"])
    assert isinstance(example, Tensor)
    return example


def layer_names(front: Front) -> list[str]:
    """Module paths of the layers, in the order they are computed."""
    return [name for node in front.canonical.graph.nodes for name in node.meta.get("layers", ())]
