"""`frpc explain-text` on tiny models of the transformers library, made here with vocabularies made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from frpc.cli.commands import app

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'frpc[text]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own, of which there are many

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "dull",
    "plot",
    "play",
    "##ed",
    "##ing",
    "brilliant",
    "##ly",
    ",",
    ".",
    "the",
    "first",
    "half",
]
TEXT = "a dull plot, brilliantly played."
CORPUS = ["the first half of the play", "a dull plot brilliantly played", "the plot of the first play"] * 20


def run(*arguments: object):
    return CliRunner().invoke(app, ["explain-text", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=2, id2label={0: "negative", 1: "positive"}, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def check_account(entry: dict, limit: float) -> None:
    """What was written adds up to what the model said."""
    tokens = sum(token["relevance"] for token in entry["tokens"])
    assert sum(word["relevance"] for word in entry["words"]) == pytest.approx(tokens, abs=1e-12)
    assert tokens + entry["padding"] == pytest.approx(entry["sum"], abs=1e-12)
    assert entry["conservation_error"] <= limit


def test_a_classifier_with_texts_of_two_lengths(bert, tmp_path):
    page = tmp_path / "page.html"
    result = run("--model", bert, "--text", TEXT, "--text", "the first half", "--out", page, "--dtype", "float64")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "page.json").read_text())
    long, short = record["texts"]
    assert [word["text"] for word in long["words"]] == [
        "[CLS]",
        *["a", "dull", "plot", ",", "brilliantly", "played", "."],
        "[SEP]",
    ]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    for entry in (long, short):
        check_account(entry, 1e-12)
        with torch.no_grad():
            logits = model(**tokenizer(entry["text"], return_tensors="pt")).logits[0]
        assert entry["output"] == pytest.approx(float(logits.max()), abs=1e-10)
        assert entry["label"] == ["negative", "positive"][int(logits.argmax())]
        assert f"“{entry['label']}” (class {entry['target']})" in result.stdout
    assert "padding" in result.stdout
    assert "brilliantly</span>" in page.read_text()


def test_a_text_has_one_map_whatever_stands_beside_it(bert, tmp_path):
    """Padding takes no share of the constants: alone, and with longer texts, the numbers are the same."""
    short, others = "the dull half", ([], [TEXT, "the first play " * 4])
    maps = []
    for count, more in enumerate(others):
        texts = [part for text in [short, *more] for part in ("--text", text)]
        result = run("--model", bert, *texts, "--out", tmp_path / str(count), "--dtype", "float64", "--target", 1, "--json")
        assert result.exit_code == 0, result.output
        entry = json.loads(result.stdout)["texts"][0]
        check_account(entry, 1e-12)
        assert entry["padding"] == pytest.approx(0, abs=1e-12)
        maps.append([word["relevance"] for word in entry["words"]])
    assert maps[0] == pytest.approx(maps[1], abs=1e-12)


def test_most_words_unknown_is_said(bert, tmp_path):
    result = run("--model", bert, "--text", "zebra quartz jumping", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "3 of 5 tokens are unknown to the tokenizer" in " ".join(result.stdout.split())


def test_a_folder_without_a_tokenizer(bert, tmp_path):
    """The library would make one that knows no word, and every word would be [UNK]."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((bert / name).read_bytes())
    refused(
        run("--model", bare, "--text", TEXT, "--out", tmp_path / "out"),
        "WeightsError",
        "no tokenizer",
        "tokenizer.json",
        "vocab.txt",
    )
    empty = copy_of(bert, tmp_path / "empty")
    for path in empty.glob("*"):
        if path.name.startswith(("tokenizer", "vocab", "special")):
            path.unlink()
    (empty / "vocab.txt").write_text("\n".join(WORDS[:5]), encoding="utf-8")
    refused(run("--model", empty, "--text", TEXT, "--out", tmp_path / "out"), "WeightsError", "but no words")


def test_a_language_model_names_its_next_token(gpt2, tmp_path):
    result = run("--model", gpt2, "--text", "the first play", "--out", tmp_path, "--dtype", "float64", "--json")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)["texts"]
    check_account(entry, 1e-12)
    assert [word["text"] for word in entry["words"]] == ["the", "first", "play"]
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    ids = tokenizer("the first play", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(ids).logits[0, -1]
    assert entry["target"] == [ids.shape[1] - 1, int(scores.argmax())]
    assert entry["output"] == pytest.approx(float(scores.max()), abs=1e-10)
    assert {path.name for path in tmp_path.iterdir()} == {"explanation.html", "explanation.json"}


def test_a_long_text_is_cut_and_says_so(bert, tmp_path):
    result = run("--model", bert, "--text", "a dull plot " * 10, "--target", "positive", "--bias", "separate", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "its last 16 tokens were cut off" in " ".join(result.stdout.split())
    assert "“positive” (class 1)" in result.stdout
    assert "constants" in result.stdout


def copy_of(folder: Path, to: Path, *, without: str = "", **config: object) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.name != without:
            (to / path.name).write_bytes(path.read_bytes())
    if config:
        read = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(read | config))
    return to


def refused(result, kind: str, *messages: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"{kind}: ")
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_refused(bert, tmp_path):
    out = ("--text", TEXT, "--out", tmp_path / "out")
    refused(run("--model", tmp_path / "none", *out), "WeightsError", "does not exist", "frpc downloads nothing")
    refused(run("--model", bert / "config.json", *out), "WeightsError", "is a file, not a model folder")
    bare = copy_of(bert, tmp_path / "bare", without="model.safetensors")
    refused(run("--model", bare, *out), "WeightsError", "contains no safetensors file")
    (bare / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refused(run("--model", bare, *out), "WeightsError", "only pytorch_model.bin, a pickle", "save_pretrained")
    masked = copy_of(bert, tmp_path / "masked", architectures=["BertForMaskedLM"])
    refused(run("--model", masked, *out), "ModelNameError", "BertForMaskedLM", "sequence classifiers")
    own = {"architectures": ["MineForCausalLM"], "model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.MineForCausalLM"}}
    custom = copy_of(bert, tmp_path / "custom", **own)
    (custom / "m.py").write_text("raise SystemExit('this ran')")
    refused(run("--model", custom, *out), "ModelNameError", "has no MineForCausalLM", "is not run")
    refused(run("--model", bert, "--device", "abacus", *out), "DeviceError", "abacus")
    refused(run("--model", bert, "--text", " ", "--out", tmp_path / "out"), "OptionError", "--text is empty")
    assert not (tmp_path / "out").exists()


def test_without_the_library(bert, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(run("--model", bert, "--text", TEXT, "--out", tmp_path / "out"), "PackageError", "pip install 'frpc[text]'")
