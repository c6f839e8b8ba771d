"""Reads mutated program files in a process that watches itself: run with a folder of sound files, a count and a seed.

Every file is either refused by the error made for it or read; nothing else may be raised, and from the moment the mutants are
read no code may be compiled or run, no other file opened, no process started, nothing imported. Prints a report as JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch._subclasses.schema_check_mode  # else PyTorch imports it while the watch is on
from safetensors.torch import load_file, save
from torch import Tensor

import frpc
from frpc.errors import ProgramFileError
from frpc.files import container
from frpc.files.operators import ARITHMETIC, operator_named, operators

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1.5, 1e308, "", "x", "\n", "import os", "__import__('os').system('id')",
    "aten.from_file.default", "aten.relu_.default", "os.system", "operator.attrgetter", "builtins.exec", "\u2028", "\ud800",
    [], {}, [[]], [[[[[[1]]]]]], {"node": 0}, {"node": -1}, {"node": 10**9}, {"constant": "head_weight"}, {"float": "inf"},
    {"device": "cuda"}, {"device": "meta"}, {"dtype": "float16"}, {"memory_format": "channels_last"}, {"layout": "sparse"},
    {"node": [0]}, {"x": 1}, [0] * 1000, "a" * 10_000, {"dtype": "float64", "sizes": [2**40, 2**40]}, [10**9, 10**9],
]  # fmt: skip
FORBIDDEN = (
    "exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
    "socket.connect", "socket.bind", "socket.__new__", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function", "marshal.loads",
    "pickle.find_class", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree", "os.chmod", "os.putenv", "code.__new__",
    "function.__new__", "webbrowser.open", "urllib.Request", "open",
)  # fmt: skip


class Watch:
    """Notes what Python's audit hook tells while it is on."""

    def __init__(self) -> None:
        self.on, self.own, self.seen = False, "", Counter[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in FORBIDDEN and not (event == "open" and str(arguments[0]) == self.own):
            self.seen[f"{event} {str(arguments)[:200]}"] += 1


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything in a document is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, part in items for path in paths(part, (*here, key)))]


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


class Mutator:
    """Makes mutants of one sound file."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.content, self.chance = path.read_bytes(), chance
        document, self.tensors = container.read(path)
        self.text = json.dumps(document)
        self.places = paths(document)[1:]

    def __call__(self) -> bytes:
        kinds = (self.flipped, self.cut, self.relabelled, self.retyped, self.restructured, self.restructured, self.restructured)
        return self.chance.choice(kinds)()

    def flipped(self) -> bytes:
        """A few bytes are others; half of the time in the header."""
        content, (size,) = bytearray(self.content), struct.unpack("<Q", self.content[:8])
        end = 8 + size if self.chance.random() < 0.5 else len(content)
        for _ in range(self.chance.randint(1, 8)):
            content[self.chance.randrange(end)] = self.chance.randrange(256)
        return bytes(content)

    def cut(self) -> bytes:
        """A part is missing, doubled, or there is more."""
        first, second = sorted(self.chance.randrange(len(self.content) + 1) for _ in range(2))
        return self.chance.choice(
            [self.content[:first], self.content[:first] + self.content[second:], self.content[:second] + self.content[first:]]
        )

    def relabelled(self) -> bytes:
        """The header speaks of other tensors."""
        (size,) = struct.unpack("<Q", self.content[:8])
        header = json.loads(self.content[8 : 8 + size])
        if not (names := [k for k in header if k != "__metadata__"]):
            return self.flipped()
        name = self.chance.choice(names)
        change = self.chance.choice(["dtype", "shape", "data_offsets", "name", "gone"])
        if change == "name":
            header[self.chance.choice(["x", "", "\u0000", "a" * 5000])] = header.pop(name)
        elif change == "gone":
            del header[name]
        else:
            header[name][change] = self.chance.choice([*JUNK[:16], "F32", "F8_E4M3", "BOOL", [2, 2], [0, 8], [2**40, 1], [8, 0]])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + self.content[8 + size :]

    def retyped(self) -> bytes:
        """Characters of the document are others, and the checksum fits."""
        text = list(self.text)
        for _ in range(self.chance.randint(1, 3)):
            text[self.chance.randrange(len(text))] = self.chance.choice('{}[]",:0123456789abcxyz._-\\ ')
        return self.signed("".join(text), self.tensors)

    def restructured(self) -> bytes:
        """Parts of the document or tensors are others, and the checksum fits."""
        document, tensors = json.loads(self.text), dict(self.tensors)
        for _ in range(self.chance.randint(1, 3)):
            if self.chance.random() < 0.1:
                self.change_tensor(tensors)
                continue
            path = self.chance.choice(self.places)
            try:
                self.change(at(document, path[:-1]), path[-1], document)
            except (KeyError, IndexError, TypeError):  # an earlier change took it away
                continue
        return self.signed(json.dumps(document), tensors)

    def change(self, parent: Any, key: Any, document: Any) -> None:
        change = self.chance.randrange(6)
        if change == 0:
            del parent[key]
        elif change == 1:
            parent[key] = copy.deepcopy(at(document, self.chance.choice(self.places)))
        elif change == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif change == 3 and isinstance(parent[key], str):
            parent[key] = self.chance.choice([*sorted(operators()), *ARITHMETIC, "input", "constant", "output"])
        elif change == 4 and isinstance(parent[key], int):
            parent[key] += self.chance.choice([-1, 1, 2, 1000])
        else:
            parent[key] = copy.deepcopy(self.chance.choice(JUNK))

    def change_tensor(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            tensors["more"] = torch.zeros(3)
            return
        name = self.chance.choice(sorted(tensors))
        value = tensors[name]
        others = [value.float(), value.reshape(-1), value.reshape(-1)[:0], value.to(torch.int64), value.clone(), value.bool()]
        changed = self.chance.choice(others)
        if self.chance.random() < 0.3:
            del tensors[name]
        tensors[self.chance.choice([name, "more"])] = changed

    def signed(self, text: str, tensors: dict[str, Tensor]) -> bytes:
        kept = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        try:
            metadata = {"frpc.format": "1", "frpc.program": text, "frpc.sha256": container._digest(text, kept)}
            return save(kept, metadata)
        except UnicodeEncodeError:  # half a surrogate pair, which no file can hold
            return self.content


def listed(explainer: frpc.LoadedExplainer) -> bool:
    """Says whether programs that were read hold calls of listed operators alone."""
    known = {operator_named(name) for name in (*operators(), *ARITHMETIC)}
    nodes = [node for source in explainer.sources.values() for node in source.graph.nodes]
    return all(n.target in known if n.op == "call_function" else n.op in ("placeholder", "get_attr", "output") for n in nodes)


def main(folder: Path, count: int, seed: int) -> None:
    """Reads ``count`` mutants of the sound files in ``folder``."""
    torch.set_num_threads(1)
    chance, watch = random.Random(seed), Watch()
    state = load_file(folder / "state.safetensors")
    sound = sorted(folder.glob("*.frpc"))
    given = {path: {"state_dict": state} if "reference" in path.name else {} for path in sound}
    for path in sound:
        frpc.load(path, **given[path])  # what Python imports at the first reading is imported now
    mutators = [(Mutator(path, chance), given[path]) for path in sound]
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2 * 2**30,) * 2)
    target, outcomes, wrong, different = folder / "mutant", Counter[str](), [], set[bytes]()
    watch.own = str(target)
    for number in range(count):
        mutator, how = chance.choice(mutators)
        content = mutator()
        different.add(hashlib.sha256(content).digest())
        target.write_bytes(content)
        watch.on = True
        try:
            found = frpc.load(target, **how)
        except ProgramFileError as error:
            watch.on = False
            outcomes["refused"] += 1
            outcomes[" ".join(str(error).split(":")[1].split()[:2])] += 1
        except BaseException as error:
            watch.on = False
            wrong.append(f"mutant {number}: {type(error).__name__}: {str(error)[:300]}")
        else:
            watch.on = False
            outcomes["read"] += 1
            if not listed(found):
                wrong.append(f"mutant {number}: holds calls that are not listed")
    report = {"outcomes": outcomes, "wrong": wrong[:20], "seen": dict(watch.seen.most_common(20)), "different": len(different)}
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
