"""Random models written as people write them: classes with a ``forward`` of ordinary statements, in a file of their own.

:class:`Writer` draws one statement after another from those that fit the values at hand, and keeps track of every value's sizes,
the batch among them. What it draws from is whatever ``choose`` returns: Hypothesis, which then shrinks a failure to few
statements, or a plain random generator.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from user_models import HEAD, Program, Size, Value

T = TypeVar("T")
Choose = Callable[[Sequence[Any]], Any]


@dataclass
class Writer:
    """Writes one program.

    Attributes:
        choose: takes a sequence and returns one of its elements.
        statements: how many there are at most, before the output is made.
    """

    choose: Choose
    statements: int = 8
    setup: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    linear: bool = True
    _numbers: Any = field(default_factory=itertools.count)
    _shared: dict[tuple[str, int], str] = field(default_factory=dict)

    # ---- pieces -------------------------------------------------------------------------------------------------

    def new(self, stem: str) -> str:
        return f"{stem}{next(self._numbers)}"

    def module(self, text: str) -> str:
        name = self.new("part")
        self.setup.append(f"self.{name} = {text}")
        return f"self.{name}"

    def shared(self, text: str) -> str:
        """A module that is used again where the same one is asked for."""
        if (text, 0) not in self._shared or self.choose([False, True]):
            self._shared[text, 0] = self.module(text)
        return self._shared[text, 0]

    def parameter(self, *sizes: int) -> str:
        name = self.new("weight")
        self.setup.append(f"self.{name} = nn.Parameter(torch.randn({', '.join(map(str, sizes))}))")
        return f"self.{name}"

    def buffer(self, text: str) -> str:
        name = self.new("held")
        self.setup.append(f'self.register_buffer("{name}", {text})')
        return f"self.{name}"

    def let(self, text: str, sizes: Sequence[Size]) -> Value:
        value = Value(self.new("h"), tuple(sizes))
        self.body.append(f"{value.name} = {text}")
        return value

    # ---- statements ---------------------------------------------------------------------------------------------

    def step(self, values: list[Value]) -> None:
        """Adds one statement about the last value, or about one before."""
        h = values[-1] if self.choose([True, True, True, False]) else self.choose(values)
        if h.elements > 600:
            values.append(self.reduced(h))
            return
        kind = self.choose(
            [
                self.weighted, self.weighted, self.piecewise, self.piecewise, self.smooth, self.moved, self.moved, self.indexed,
                self.indexed, self.reduced, self.broadcast, self.paired, self.paired, self.written, self.called, self.batch_moved,
                self.chained,
            ]
        )  # fmt: skip
        found = kind(h) if kind != self.paired else self.joined(h, values)
        if found is not None:
            values.append(found)

    def weighted(self, h: Value) -> Value | None:
        last = h.sizes[-1]
        if not isinstance(last, int):
            return None
        out = self.choose([2, 3, 4, 6])
        wide = (*h.sizes[:-1], out)
        kinds = ["module", "functional", "matmul", "einsum"]
        if h.batch == 0 and len(h.sizes) == 3 and isinstance(h.sizes[1], int):
            kinds += ["conv1d", "batch_norm"]
        if h.batch == 0 and len(h.sizes) == 4 and all(isinstance(n, int) and n >= 3 for n in h.sizes[2:]):
            kinds += ["conv2d", "conv2d"]
        kind = self.choose(kinds)
        if kind == "module":
            return self.let(f"{self.module(f'nn.Linear({last}, {out})')}({h.name})", wide)
        if kind == "functional":
            bias = self.choose([", " + self.parameter(out), ""])
            return self.let(f"F.linear({h.name}, {self.parameter(out, last)}{bias})", wide)
        if kind == "matmul":
            return self.let(f"{h.name} @ {self.parameter(last, out)} + {self.parameter(out)}", wide)
        if kind == "einsum":
            return self.let(f'torch.einsum("...i,io->...o", {h.name}, {self.parameter(last, out)})', wide)
        channels = h.sizes[1]
        if kind == "batch_norm":
            return self.let(f"{self.module(f'nn.BatchNorm1d({channels})')}({h.name})", h.sizes)
        if kind == "conv1d":
            made = self.module(f"nn.Conv1d({channels}, {out}, 3, padding=1)")
            return self.let(f"{made}({h.name})", ("B", out, h.sizes[2]))
        made = self.module(f"nn.Conv2d({channels}, {out}, 3, padding={self.choose([0, 1])})")
        keeps = "padding=1" in self.setup[-1]
        return self.let(f"{made}({h.name})", ("B", out, *(n if keeps else n - 2 for n in h.sizes[2:])))  # type: ignore[operator]

    def piecewise(self, h: Value) -> Value:
        """Piecewise linear functions of which relevance is the slope times the value, and the rest a constant."""
        x, held = h.name, self.buffer("torch.tensor([0.3])")
        texts = [
            f"torch.relu({x})", f"F.relu({x})", f"{self.shared('nn.ReLU()')}({x})", f"{x}.clamp(min=0)", f"{x}.abs()",
            f"F.leaky_relu({x}, 0.2)", f"torch.where({x} > 0, {x}, 0.1 * {x})", f"torch.where({x}.abs() <= 0.5, 0.0, {x})",
            f"torch.where({x}.abs() > 0.5, {x} - {x}.sign() * 0.5, {x})", f"torch.maximum({x}, 0.3 * {x})",
            f"torch.minimum({x}, 1 - {x})", f"({x} > 0.1) * {x}", f"{x} * ({x} > 0).double()", f"F.prelu({x}, {held})",
            f"{x}.masked_fill({x} < -0.2, 0.5)", f"torch.where({x} > 0, {x} + 1, torch.where({x} < -1, -1.0, {x}))",
        ]  # fmt: skip
        return self.let(self.choose(texts), h.sizes)

    def smooth(self, h: Value) -> Value:
        """Other functions: their secants are not their slopes."""
        self.linear = False
        x = h.name
        texts = [
            f"torch.tanh({x})", f"torch.sigmoid({x})", f"F.gelu({x})", f"F.silu({x})", f"F.softplus({x}, beta=2.0)",
            f"F.elu({x})", f"torch.exp(-{x}.abs())", f"torch.sqrt({x} * {x} + 1)", f"{x} * torch.sigmoid({x})", f"{x} ** 2",
            f"torch.log1p({x}.abs())", f"F.mish({x})", f"1 / (1 + {x} ** 2)", f"torch.sin({x})", f"F.logsigmoid({x})",
            f"torch.erf({x})", f"{x}.square() / 3", f"{x}.clamp(-1, 1)", f"F.hardtanh({x}, -0.5, 2.0)", f"F.softshrink({x}, 0.3)",
            f"torch.where({x}.abs() > 0.5, {x} - {x}.sign() * 0.5, 0 * {x})", f"F.relu6(2 * {x})", f"F.threshold({x}, 0.1, -0.1)",
        ]  # fmt: skip
        if isinstance(h.sizes[-1], int) and h.sizes[-1] > 1:
            texts += [
                f"{x}.softmax(-1)", f"F.layer_norm({x}, [{h.sizes[-1]}])", f"{x} / {x}.norm(dim=-1, keepdim=True).clamp(min=0.1)",
                f"F.log_softmax({x}, dim=-1)", f"F.normalize({x}, dim=-1)",
            ]  # fmt: skip
        return self.let(self.choose(texts), h.sizes)

    def moved(self, h: Value) -> Value | None:
        x, sizes, rank = h.name, h.sizes, len(h.sizes)
        free = h.others()
        kinds = ["unsqueeze", "contiguous"]
        kinds += ["transpose", "permute"] if len(free) >= 2 else []
        kinds += ["roll", "flip"] if free else []
        kinds += ["merge"] if any(a + 1 in free for a in free) else []
        kinds += ["split"] if any(sizes[d] in (4, 6) for d in free) else []
        kinds += ["squeeze"] if any(sizes[d] == 1 for d in free) else []
        kind = self.choose(kinds)
        if kind == "unsqueeze":
            at = self.choose(range(1, rank + 1)) if rank < 5 else None
            if at is None:
                return None
            text = self.choose([f"{x}.unsqueeze({at})", f"{x}[{', '.join([':'] * at)}, None]"])
            return self.let(text, (*sizes[:at], 1, *sizes[at:]))
        if kind == "squeeze":
            at = self.choose([d for d in free if sizes[d] == 1])
            return self.let(f"{x}.squeeze({at})", (*sizes[:at], *sizes[at + 1 :]))
        if kind == "contiguous":
            return self.let(self.choose([f"{x}.contiguous()", f"{x}.clone()", f"{x} + 0", f"{x}[...]"]), sizes)
        if kind == "transpose":
            a, b = self.choose(free), self.choose(free)
            order = list(range(rank))
            order[a], order[b] = b, a
            return self.let(f"{x}.transpose({a}, {b - rank})", [sizes[d] for d in order])
        if kind == "permute":
            turned = iter([*free[1:], free[0]])
            order = [next(turned) if d in free else d for d in range(rank)]
            return self.let(f"{x}.permute({', '.join(map(str, order))})", [sizes[d] for d in order])
        if kind in ("roll", "flip"):
            at = self.choose(free)
            return self.let(f"{x}.roll(1, {at})" if kind == "roll" else f"{x}.flip({at})", sizes)
        if kind == "merge":
            a = self.choose([d for d in free if d + 1 in free])
            return self.let(f"{x}.flatten({a}, {a + 1})", (*sizes[:a], sizes[a] * sizes[a + 1], *sizes[a + 2 :]))  # type: ignore[operator]
        at = self.choose([d for d in free if sizes[d] in (4, 6)])
        half = sizes[at] // 2  # type: ignore[operator]
        text = self.choose([f"{x}.unflatten({at}, (2, {half}))", f"torch.stack({x}.chunk(2, {at}), {at})"])
        return self.let(text, (*sizes[:at], 2, half, *sizes[at + 1 :]))

    def indexed(self, h: Value) -> Value | None:
        free = h.others(2)
        if not free:
            return None
        x, sizes, at = h.name, h.sizes, self.choose(free)
        size: Any = sizes[at]
        before = ", ".join([":"] * at) + (", " if at else "")
        kept = self.buffer(f"torch.tensor([{size - 1}, 0])")
        forms = {
            f"{x}[{before}1:]": size - 1, f"{x}[{before}:-1]": size - 1, f"{x}[{before}::2]": (size + 1) // 2,
            f"{x}[{before}[0, {size - 1}, 0]]": 3, f"{x}[{before}{kept}]": 2, f"{x}.index_select({at}, {kept})": 2,
            f"{x}.narrow({at}, 1, {size - 1})": size - 1, f"torch.cat([{x}, -{x}], {at})": 2 * size,
            f"{x}.split([1, {size - 1}], {at})[1]": size - 1, f"torch.cumsum({x}, {at})": size,
            f"torch.cat([{x}, torch.zeros_like({x}[{before}:1])], {at})": size + 1,
            f"{x}.sort({at}).values": size, f"{x}.topk({size - 1}, dim={at}).values": size - 1, f"{x}[{before}0]": None,
            f"{x}.unbind({at})[{size - 1}]": None, f"{x}.select({at}, -1)": None,
        }  # fmt: skip
        if at == len(sizes) - 1:
            forms |= {f"F.pad({x}, (1, 0))": size + 1, f"F.pad({x}, (1, 2), value=0.5)": size + 3}
        text = self.choose(list(forms))
        rest = [] if forms[text] is None else [forms[text]]
        return self.let(text, (*sizes[:at], *rest, *sizes[at + 1 :]))

    def reduced(self, h: Value) -> Value | None:
        free = h.others(2)
        if not free or len(h.sizes) < 2:
            return None
        at, keep = self.choose(free), self.choose([True, False])
        kinds = ["sum", "mean", "amax", "max", "min", "median"]
        smooth = ["logsumexp", "norm", "std"]
        kind = self.choose([*kinds, *smooth])
        self.linear = self.linear and kind not in smooth
        end = f"({at}, keepdim={keep})" if kind not in ("norm", "std") else f"(dim={at}, keepdim={keep})"
        text = f"{h.name}.{kind}{end}" + (".values" if kind in ("max", "min", "median") else "")
        return self.let(text, (*h.sizes[:at], *([1] if keep else []), *h.sizes[at + 1 :]))

    def broadcast(self, h: Value) -> Value | None:
        free = h.others()
        if not free:
            return None
        at = self.choose(free)
        size: Any = h.sizes[at]
        tail = len(h.sizes) - 1 - at
        held = self.parameter(size) + (f"[:{', None' * tail}]" if tail else "")
        x = h.name
        texts = [
            f"{x} + {held}", f"{x} * {held}", f"{held} - {x}", f"torch.add({x}, {held}, alpha=0.5)", f"{x} / (1 + {held}.abs())",
            f"{x} - {x}.mean({at}, keepdim=True)", f"{x} * 0.5 - 1", f"3 - {x}", f"torch.addcmul({x}, {held}, {held}, value=0.3)",
            f"torch.lerp({x}, {held}.expand_as({x}), 0.25)", f"{x} + {x}.amax({at}, keepdim=True)", f"-{x}",
            f"torch.rsub({x}, 1.5)",
        ]  # fmt: skip
        return self.let(self.choose(texts), h.sizes)

    def paired(self, h: Value) -> Value | None:
        raise NotImplementedError("joined() takes the other values too")

    def joined(self, h: Value, values: Sequence[Value]) -> Value | None:
        other = self.choose([v for v in values if v.sizes == h.sizes])
        a, b, at = h.name, other.name, self.choose(h.others() or [0])
        texts = [
            f"{a} + {b}", f"{a} - 0.5 * {b}", f"torch.maximum({a}, 0.7 * {b} + 0.1)", f"torch.where({b} > 0, {a}, {b} - 1)",
            f"torch.where({self.buffer('torch.tensor(True)')}, {a}, {b})", f"sum([{a}, {b}])", f"torch.add({a}, {b}, alpha=-2)",
        ]  # fmt: skip
        products = [
            f"{a} * {b}",
            f"{a} * torch.sigmoid({b})",
            f"torch.addcmul({a}, {a}, {b}, value=0.5)",
            f"{a} / (1 + {b} * {b})",
        ]
        text = self.choose([*texts, *products])
        self.linear = self.linear and text not in products
        if h.others() and self.choose([True, False, False]):
            size: Any = h.sizes[at]
            return self.let(f"torch.cat(({a}, {b}), dim={at})", (*h.sizes[:at], 2 * size, *h.sizes[at + 1 :]))
        return self.let(text, h.sizes)

    def written(self, h: Value) -> Value | None:
        """In-place forms."""
        free = h.others(2)
        if not free:
            return None
        at = self.choose(free)
        before = ", ".join([":"] * at) + (", " if at else "")
        made = self.let(f"{h.name}.clone()", h.sizes)
        x = made.name
        lines = [
            f"{x}[{before}0] = 0", f"{x}[{before}1:] *= 2", f"{x} += 1", f"{x}.mul_(0.5)", f"F.relu_({x})",
            f"{x}[{before}0] = {h.name}[{before}1]", f"{x}[{x} < -0.5] = 0.25", f"{x}.masked_fill_({x} > 1, 1.0)",
            f"{x}[{before}:1] += {h.name}[{before}1:2]",
        ]  # fmt: skip
        self.body.append(self.choose(lines))
        return made

    def called(self, h: Value) -> Value | None:
        """Modules of the user's own, which return tuples and dicts, take numbers, or are used twice."""
        last = h.sizes[-1]
        if not isinstance(last, int):
            return None
        kind = self.choose(["tuple", "dict", "residual", "loop", "sequential"])
        if kind == "tuple":
            name = self.new("aux")
            made = self.let("None", h.sizes)
            self.body[-1] = f"{made.name}, {name} = {self.shared(f'Pair({last})')}({h.name})"
            if self.choose([True, False]):
                self.body.append(f"{made.name} = {made.name} + {name}.unsqueeze(-1)")
            return made
        if kind == "dict":
            found = self.new("found")
            self.body.append(f"{found} = {self.shared(f'Named({last})')}({h.name}, scale=1.5)")
            return self.let(f'{found}["{self.choose(["out", "aux"])}"]', h.sizes)
        if kind == "residual":
            return self.let(f"{self.shared(f'Residual({last})')}({h.name})", h.sizes)
        if kind == "sequential":
            made = self.module(
                f"nn.Sequential(nn.Linear({last}, 5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, {last}))"
            )
            return self.let(f"{made}({h.name})", h.sizes)
        made = self.let(h.name, h.sizes)
        layer = self.shared(f"nn.Linear({last}, {last})")
        self.body += ["for _ in range(2):", f"    {made.name} = torch.relu({layer}({made.name}))"]
        return made

    def batch_moved(self, h: Value) -> Value | None:
        """The batch goes elsewhere, something is done there, and it comes back."""
        free = h.others()
        if h.batch != 0 or not free:
            return None
        first: Any = h.sizes[1] if len(h.sizes) > 1 else None
        kind = self.choose(["time-major", "merged", "loop", "last"])
        x, last = h.name, h.sizes[-1]
        if kind == "time-major" and len(h.sizes) >= 2:
            turned = self.let(f"{x}.transpose(0, 1)", (h.sizes[1], "B", *h.sizes[2:]))
            added = self.parameter(first) + f"[:{', None' * (len(h.sizes) - 1)}]"
            texts = [f"torch.relu({turned.name} + {added})", f"{turned.name}.roll(1, 0) + {added}", f"{turned.name}.cumsum(0)"]
            done = self.let(self.choose(texts), turned.sizes)
            return self.let(f"{done.name}.transpose(0, 1)", h.sizes)
        if kind == "merged" and len(h.sizes) >= 3:
            flat = self.let(f"{x}.reshape(-1, {', '.join(str(n) for n in h.sizes[2:])})", (f"{first}*B", *h.sizes[2:]))
            if isinstance(last, int) and self.choose([True, False]):
                flat = self.let(f"torch.relu({self.module(f'nn.Linear({last}, {last})')}({flat.name}))", flat.sizes)
            back = ", ".join(map(str, h.sizes[1:]))
            return self.let(self.choose([f"{flat.name}.view({x}.shape[0], {back})", f"{flat.name}.reshape(-1, {back})"]), h.sizes)
        if kind == "last":
            order = [*range(1, len(h.sizes)), 0]
            turned = self.let(f"{x}.permute({', '.join(map(str, order))})", (*h.sizes[1:], "B"))
            done = self.let(f"torch.relu({turned.name} - 0.1) + {self.parameter(1)}", turned.sizes)
            return self.let(f"{done.name}.movedim(-1, 0)", h.sizes)
        return None

    def chained(self, h: Value) -> Value | None:
        """Several views behind one another, as in attention heads, patches and channel shuffles."""
        if h.batch != 0 or len(h.sizes) != 3 or not all(isinstance(n, int) for n in h.sizes[1:]):
            return None
        t, d, x = h.sizes[1], h.sizes[2], h.name
        assert isinstance(t, int) and isinstance(d, int)
        forms = {f"{x}.transpose(1, 2).reshape({x}.shape[0], {t}, {d})": (t, d)}
        if d % 2 == 0:
            forms |= {
                f"{x}.view(-1, {t}, 2, {d // 2}).transpose(1, 2).flatten(2)": (2, t * d // 2),
                f"{x}.reshape(-1, {t}, {d // 2}, 2).permute(0, 3, 1, 2).reshape(-1, {2 * t}, {d // 2})": (2 * t, d // 2),
            }  # fmt: skip
        if t % 2 == 0:
            forms |= {
                f"{x}.view({x}.size(0), 2, {t // 2}, {d}).transpose(1, 2).reshape({x}.size(0), {t}, {d})": (t, d),
                f"{x}.reshape(2 * {x}.shape[0], {t // 2}, {d}).reshape(-1, {t}, {d})": (t, d),
            }
        if t % 2 == 0 and d % 2 == 0:
            dealt = f"{x}.reshape(2 * {x}.shape[0], {t // 2}, 2, {d // 2}).transpose(1, 2)"
            forms[f"{dealt}.reshape({x}.shape[0], {2 * t}, {d // 2})"] = (2 * t, d // 2)
        text = self.choose(list(forms))
        return self.let(text, ("B", *forms[text]))

    # ---- the whole ----------------------------------------------------------------------------------------------

    def write(self) -> Program:
        choose = self.choose
        kind = choose(["vector", "vector", "sequence", "sequence", "image", "ids", "ids", "two"])
        shapes: dict[str, tuple[int, ...]] = {
            "vector": {"x": (choose([4, 6]),)}, "sequence": {"x": (choose([2, 3, 4]), choose([4, 6]))}, "image": {"x": (2, 6, 5)},
            "ids": {"ids": (choose([1, 3, 4]),)}, "two": {"x": (3, 4), "y": (4,)},
        }[kind]  # fmt: skip
        fixed = choose([None, None, None, None, 2, 3])
        values = [Value(name, ("B", *shape)) for name, shape in shapes.items() if name != "ids"]
        if fixed is not None:
            name = next(iter(shapes))
            self.body.append(f"assert {name}.shape[0] == {fixed}")
        if kind == "ids":
            width = choose([4, 6])
            values = [self.let(f"{self.module(f'nn.Embedding(7, {width})')}(ids)", ("B", *shapes["ids"], width))]
            if choose([True, False]):
                position = self.module(f"nn.Embedding(5, {width})")
                values.append(self.let(f"{values[0].name} + {position}(torch.arange(ids.shape[1]))", values[0].sizes))
        if kind == "two":
            values.append(self.let("x * y.unsqueeze(1).sigmoid()" if choose([True, False]) else "x + y[:, None]", ("B", 3, 4)))
            self.linear = self.linear and "*" not in self.body[-1]
        for _ in range(choose(range(2, self.statements + 1))):
            self.step(values)
        result = self.outcome(values)
        output, returned = self.returned(result, values)
        source = HEAD + self._class(", ".join(shapes), returned)
        named = choose([False, False, True])
        return Program(source, shapes, output, self.linear, fixed, named, choose([True, False]), fixed or choose([1, 2, 3]))

    def outcome(self, values: Sequence[Value]) -> Value:
        """``[B, K]`` of the last value, into which every other may flow once more."""
        h = values[-1]
        flat = self.let(f"{h.name}.flatten(1)", ("B", h.elements)) if len(h.sizes) > 2 else h
        if len(flat.sizes) == 1:
            flat = self.let(f"{flat.name}.unsqueeze(1)", ("B", 1))
        if self.choose([True, True, False]):
            return self.let(f"{self.module(f'nn.Linear({flat.sizes[1]}, 3)')}({flat.name})", ("B", 3))
        return flat

    def returned(self, result: Value, values: Sequence[Value]) -> tuple[str | int | None, str]:
        aux = self.choose(values).name
        forms: list[tuple[str | int | None, str]] = [
            (None, result.name), (None, result.name), (None, result.name), (0, f"{result.name}, {aux}"),
            (1, f"{aux}, {result.name}"),
            (None, f'{{"logits": {result.name}, "hidden": {aux}}}'), ("score", f'{{"hidden": {aux}, "score": {result.name}}}'),
        ]  # fmt: skip
        return self.choose(forms)  # type: ignore[no-any-return]

    def _class(self, arguments: str, returned: str) -> str:
        lines = ["", "class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.setup if self._is_read(line)]
        lines += ["", f"    def forward(self, {arguments}):", *(f"        {line}" for line in self.body)]
        return "\n".join([*lines, f"        return {returned}", ""])

    def _is_read(self, line: str) -> bool:
        """Forms that were offered and not chosen have made parts too."""
        found = re.search(r"(part|held|weight)\d+", line)
        assert found is not None
        return any(re.search(rf"self\.{found.group()}\b", text) for text in self.body)
