"""Files that are refused: damaged, forged, of other kinds; and inputs that do not fit what is loaded."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import frpc
from filed_net import X, explainer, randn
from frpc.errors import InputError, ProgramFileError, ShapeError
from frpc.files import container


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explainer().save(tmp_path_factory.mktemp("files") / "net.frpc")


@pytest.fixture(scope="module")
def loaded(saved: Path) -> frpc.LoadedExplainer:
    return frpc.load(saved)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], target: Path) -> Path:
    """The file with its document changed, and a checksum that fits again."""
    document, tensors = container.read(path)
    change(document)
    container.write(target, document, tensors)
    return target


def first(document: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for program in document["programs"] for node in program["nodes"] if node["op"] == op)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown operator": (
        lambda d: first(d, "aten.relu.default").update(op="aten.from_file.default"),
        r"contains the operator 'aten\.from_file\.default', which is not allowed in a file",
    ),
    "python function": (
        lambda d: first(d, "aten.relu.default").update(op="os.system"),
        r"the operator 'os\.system', which is not allowed in a file",
    ),
    "name that is code": (
        lambda d: first(d, "aten.relu.default").update(name="x = __import__('os')"),
        r"the name \"x = __import__\('os'\)\"",
    ),
    "keyword for a name": (lambda d: first(d, "aten.relu.default").update(name="import"), "the name 'import', which Python"),
    "foreign keyword argument": (
        lambda d: first(d, "aten.relu.default").update(kwargs={"out=print()": 1}),
        "an object with 'out=print\\(\\)', which this version does not know",
    ),
    "string argument": (
        lambda d: first(d, "aten.relu.default").update(args=[{"node": 0}, "exec('1')"]),
        "which no operator takes",
    ),
    "reference to later": (
        lambda d: first(d, "aten.relu.default").update(args=[{"node": 99999}]),
        "a reference to node 99999, which does not exist above it",
    ),
    "deep lists": (
        lambda d: first(d, "aten.relu.default").update(args=[[[[[[[1]]]]]]]),
        "lists nested more than 4 deep",
    ),
    "large integer": (lambda d: first(d, "aten.relu.default").update(args=[2**80]), "instead of an integer from"),
    "comment of two lines": (
        lambda d: first(d, "aten.relu.default").update(place="a\nimport os"),
        "instead of one line of text of at most 400 characters",
    ),
    "missing constant": (
        lambda d: first(d, "constant").update(constant="nothing"),
        "the constant 'nothing', which the file does not have",
    ),
    "constant of another shape": (lambda d: d["constants"][0].update(shape=[3, 3]), r"but the programs need \[3, 3\]"),
    "constant of another type": (lambda d: d["constants"][0].update(dtype="float32"), "but the programs need .* torch.float32"),
    "huge constant": (
        lambda d: d["constants"].append(
            {"name": "big", "dtype": "float32", "shape": [2**40], "op": "aten.repeat.default",
             "args": [{"constant": d["constants"][0]["name"]}, [2**40]], "kwargs": {}, "item": None}
        ),
        r"computed by 'aten\.repeat\.default', which is not allowed for constants",
    ),
    "constant that grows": (
        lambda d: d["constants"].extend(
            [
                {"name": "wide", "dtype": "float64", "shape": [2**40, *d["constants"][0]["shape"]], "op": "aten.expand.default",
                 "args": [{"constant": d["constants"][0]["name"]}, [2**40, *d["constants"][0]["shape"]]],
                 "kwargs": {}, "item": None},
                {"name": "big", "dtype": "float64", "shape": [2**40, *d["constants"][0]["shape"]], "op": "aten.clone.default",
                 "args": [{"constant": "wide"}], "kwargs": {}, "item": None},
            ]
        ),
        "constants of .* bytes computed from",
    ),
    "stride 0": (
        lambda d: first(d, "aten.convolution.default")["args"].__setitem__(3, [0, 0]),
        "0 instead of an integer from 1 to",
    ),
    "no output": (lambda d: d["programs"][0]["nodes"].pop(), "a program without an output"),
    "one input more": (
        lambda d: d["programs"][0]["nodes"].insert(0, {"op": "input", "name": "more"}), "of 3 inputs|does not exist above"),
    "no programs": (lambda d: d.update(programs=[]), "no program for inputs 0"),
    "another key": (lambda d: d.update(hook="x"), "an object with 'hook', which this version does not know"),
    "no constants": (lambda d: d.pop("constants"), "an object without 'constants'"),
    "unknown device": (lambda d: d["signatures"][0].update(device="tpu"), "the device 'tpu'"),
    "start of ones own": (lambda d: d["top"].update(name="mine"), "the start of relevance 'mine'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_what_it_does_not_know(name: str, saved: Path, tmp_path: Path) -> None:
    """Also where the checksum fits: it guards against accidents, not against people."""
    change, message = CHANGES[name]
    path = rewritten(saved, change, tmp_path / "m.frpc")
    with pytest.raises(ProgramFileError, match=message) as error:
        frpc.load(path)
    assert str(error.value).startswith("m.frpc is not a usable program file: it contains ")
    assert str(error.value).endswith("Save it again with explainer.save().")


def test_refuses_damaged_files(saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "m.frpc"
    (size,) = struct.unpack("<Q", content[:8])

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ProgramFileError, match=message):
            frpc.load(path)

    refused(b"", "it ends after 0 bytes")
    refused(content[: 8 + size // 2], f"it ends after {8 + size // 2} bytes, inside its header of {size}")
    refused(content[:-1], "it cannot be read")
    refused(content + b"0", "it cannot be read")
    refused(struct.pack("<Q", 2**40) + content[8:], "it declares a header of 1099511627776 bytes, more than 33554432")
    flipped = bytearray(content)
    flipped[-3] ^= 1
    refused(bytes(flipped), "its contents do not match its checksum, so it was damaged or changed")
    refused(content.replace(b'\\"Net\\"', b'\\"Nut\\"', 1), "its contents do not match its checksum")
    refused(content.replace(b'"frpc.format":"1"', b'"frpc.format":"7"', 1), "it has format '7', but this version reads 1")
    refused(b"PK\x03\x04" + bytes(64), "it declares a header of")
    text = b'{"__metadata__":{},"x":' + b"[" * 100_000
    refused(struct.pack("<Q", len(text)) + text, "it cannot be read")
    text = b'{"__metadata__":{"a":' + b"9" * 10_000 + b"}}"
    refused(struct.pack("<Q", len(text)) + text, "it cannot be read")
    with pytest.raises(ProgramFileError, match="the file does not exist"):
        frpc.load(tmp_path / "missing.frpc")
    with pytest.raises(ProgramFileError, match="it is not a regular file"):
        frpc.load(tmp_path)


def test_refuses_other_safetensors_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": X}, tmp_path / "weights.safetensors")
    with pytest.raises(ProgramFileError) as error:
        frpc.load(tmp_path / "weights.safetensors")
    assert str(error.value) == (
        "weights.safetensors is not a usable program file: it was not written by frpc. Save it again with this version's "
        "explainer.save()."
    )


def test_refuses_inputs_that_do_not_fit(loaded: frpc.LoadedExplainer) -> None:
    with pytest.raises(ShapeError, match=r"has shape \[2, 3, 9, 8\]; the program takes .* \[B, 3, 8, 8\] torch\.float64"):
        loaded(randn(2, 3, 9, 8), target=1)
    with pytest.raises(InputError, match=r"is torch\.float32; the program takes torch\.float64"):
        loaded(X.float(), target=1)
    with pytest.raises(InputError, match="Target 4 is out of range"):
        loaded(X, target=4)
    with pytest.raises(InputError, match="NaN or Inf"):
        loaded(X * torch.nan, target=1)
    with pytest.raises(InputError, match="by name; the explainer takes its inputs by position"):
        loaded(x=X, target=1)
