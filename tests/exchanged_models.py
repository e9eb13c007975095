"""The files that people exchange: a strategy of changed ones per format, and what must hold.

Each function makes a valid file in the current directory and returns `(cases, read)`: the strategy,
and a function that reads a case as the scripts do. It raises `UserError` for what is refused, and
checks what is accepted against what the format promises, by other means than the reader's.
"""

import io
import json
import math
from pathlib import Path

import torch
from hypothesis import strategies as st

import train_shakespeare
from chat import introduction
from conftest import SENTENCES
from engine.checkpoint import load_model
from engine.export import export, restore
from engine.models import weightless_model
from first_release_files import CHARACTERS, ngt_config, ngt_state
from hostile_checkpoints import sealed, train_a_little
from hostile_files import BPE_JSON, GPT4_WORDS, added_token, exported, words
from mutations import (
    PICKLED,
    archive_of,
    changed_archive,
    changed_bytes,
    changed_json,
    changed_safetensors,
    changed_values,
    json_bytes,
    members,
)
from reporting.runs import label_of, load_run
from run_folders import CONFIG, write_run
from small_models import LETTERS, make_checkpoint
from small_runs import SMALL, same
from system.errors import UserError
from system.safe_text import one_line
from talk.suggestions import suggestions
from text.byte_level import BYTE_OF_LETTER
from text.tokenizer import BPETokenizer, load_bpe, tokenizer_from_vocab
from token_folders import prepare
from training.config import SETTINGS, resolve
from training.config_file import take_from_file
from training.options import train_parser

TEXTS = ("The quick brown fox\n", " 12 or 3?\t\r\n", "naïve 한국어 🙂 e\u0301", "\0\x1b")


def write_text():
    Path("text.txt").write_text("".join(SENTENCES) * 30)
    return "text.txt"


def check_tokenizer(tokenizer):
    """Every id is below the vocabulary's size and has a printable label, by either way to encode;
    a vocabulary of all bytes gives a text back."""
    size = tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < size for i in ids)
        assert tokenizer.encode_array([text]).tolist() == ids
        shown = tokenizer.decode(ids)
        assert isinstance(shown, str)
        if tokenizer.name == "bpe":
            file = json.loads(tokenizer.to_vocab()["tokenizer_json"])
            has_all_bytes = BYTE_OF_LETTER.keys() <= file["model"]["vocab"].keys()
            if has_all_bytes and not file.get("normalizer"):
                assert shown.removeprefix(" ") == text.removeprefix(" ")
    for i in {0, size // 2, size - 1}:
        assert tokenizer.label(i).isprintable() and isinstance(tokenizer.bytes_of(i), bytes)
    assert tokenizer_from_vocab(tokenizer.to_vocab()).fingerprint == tokenizer.fingerprint


def check_loaded(model, tokenizer, checkpoint, path):
    """The model computes logits of its vocabulary's size; the rest is what scripts show of it."""
    count = min(3, model.max_context or 3)
    with torch.no_grad():
        logits = model(torch.zeros(1, count, dtype=torch.long))
    assert logits.shape == (1, count, tokenizer.vocab_size)
    assert type(checkpoint.get("iter", 0)) is int and checkpoint.get("best_val", 0) > -math.inf
    assert one_line(introduction(model, checkpoint, path)).isprintable()
    assert all(line.isprintable() for line in suggestions(checkpoint, tokenizer))
    check_tokenizer(tokenizer)


def saved(contents):
    """A sealed checkpoint of these contents, in bytes."""
    file = io.BytesIO()
    torch.save(contents, file)
    return sealed(file.getvalue())


def checkpoint():
    """Three kinds of checkpoint: NGT with letters, vanilla with BPE, and the first release's."""
    data_path = prepare("text", write_text()).directory
    make_checkpoint("a.pt", token_directory=str(data_path))
    make_checkpoint("b.pt", BPETokenizer(BPE_JSON), model_type="vanilla", pos="rotary")
    contents = [torch.load(f"{name}.pt", weights_only=True) for name in "ab"]
    size, letters = len(CHARACTERS), dict(enumerate(CHARACTERS))
    first = {"model_state": ngt_state(size), "config": ngt_config(size), "iter": 3, "best_val": 1.0}
    contents.append(
        first | {"vocab": {"itos": letters, "stoi": {c: i for i, c in letters.items()}}}
    )
    data = [Path(f"{name}.pt").read_bytes() for name in "ab"]

    def read(case):
        kind, file = case
        Path("evil.pt").write_bytes(file)
        found = load_model("evil.pt")
        check_loaded(*found, "evil.pt")
        if kind == "bytes":  # the seal, or the zip's check sums, allow no other contents
            assert same(found[2], original)

    original = load_model("a.pt")[2]
    read(("bytes", data[0]))
    read(("archive", archive_of(members(data[0]))))
    for valid in contents:
        read(("valid", saved(valid)))
    return st.one_of(
        changed_bytes(data[0], data[1:]).map(lambda file: ("bytes", file)),
        changed_archive(data[1]).map(lambda file: ("archive", file)),
        *(
            changed_values(valid, PICKLED).map(lambda value: ("values", saved(value)))
            for valid in contents
        ),
    ), read


def resumed():
    """What a checkpoint says of the optimizer, the progress and the random numbers of its run."""
    trained = train_a_little()
    parts = ("optimizer_state", "scheduler_state", "scaler_state", "rng_state", "data_state")
    flags = ("--checkpoint-path", "c/evil", "--resume", "--max-steps", "3")

    def read(case):
        Path("c/evil_last.pt").write_bytes(saved(trained | case))
        try:
            assert train_shakespeare.main([*flags]) == 0
        finally:
            torch.set_flush_denormal(False)  # as training sets it, and Hypothesis has none
        assert load_model("c/evil_last.pt")[2]["iter"] == 3

    read({})
    some = {name: trained[name] for name in parts}
    return changed_values(some, PICKLED).filter(lambda value: isinstance(value, dict)), read


def tokenizer():
    """Two BPE files: our own, and one with another library's parts."""
    rich = exported(
        pre_tokenizer=words(GPT4_WORDS),
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        added_tokens=[added_token("<end>", special=True)],
    )

    def read(case):
        Path("evil.json").write_bytes(case)
        check_tokenizer(load_bpe("evil.json"))

    for valid in (BPE_JSON, rich):
        read(valid.encode())
    return st.one_of(changed_json(json.loads(BPE_JSON)), changed_json(json.loads(rich))), read


def config():
    """`--config`: the settings of a training run; what is accepted shapes a model."""
    args = train_parser("", "").parse_args([*map(str, SMALL), "--recipe", "modern"])
    valid = resolve(args) | {"command": ["train_shakespeare.py"], "parameters": 9}

    def read(case):
        Path("evil.json").write_bytes(case)
        args = train_parser("", "").parse_args(["--config", "evil.json"])
        take_from_file(args)
        settings = resolve(args)
        for name, field in SETTINGS.items():
            value, choices = settings[name], field.metadata["choices"]
            assert choices is None or value in choices
            if value is None:
                assert field.default is None
                continue
            kind = field.type if isinstance(field.type, type) else field.type.__args__[0]
            assert type(value) is kind or (type(value) is int and kind is float)
            assert kind is not float or math.isfinite(value)
            assert kind is not str or ("\0" not in value or name == "device")
        model = weightless_model(settings | {"vocab_size": 100})
        assert len(model.layers) == settings["num_layers"]

    read(json_bytes(valid))
    return changed_json(valid), read


def run_folder():
    """config.json and metrics.jsonl of a run, for reports."""
    write_run("evil", [3.0, None, 2.0])
    folder = Path("runs/evil")
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]

    def lines(value):
        return b"\n".join(map(json_bytes, value)) if isinstance(value, list) else json_bytes(value)

    def read(case):
        files = {"config.json": json_bytes(CONFIG), "metrics.jsonl": lines(rows)} | case
        for name, data in files.items():
            (folder / name).write_bytes(data)
        run = load_run(folder, "evil")
        assert label_of(run.config).isprintable() and "\n" not in one_line(run.command())
        assert run.best() is None or math.isfinite(run.best()["val_loss"])
        assert math.isfinite(run.median("steps_per_s")) and run.within(0) in [None, *run.rows]
        for row in run.rows:
            assert all(x is None or math.isfinite(x) for x in row.values())

    read({})
    return st.one_of(
        changed_json(CONFIG).map(lambda file: {"config.json": file}),
        changed_values(rows).map(lambda value: {"metrics.jsonl": lines(value)}),
        changed_bytes(lines(rows)).map(lambda file: {"metrics.jsonl": file}),
    ), read


def exported_folder():
    """`export.py --from`: the checkpoint that is made of it can be used; a refused one is gone."""
    make_checkpoint("x.pt", LETTERS)
    folder = Path("folder")
    export("x.pt", folder, "safetensors")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    valid = json.loads(files["config.json"])

    def read(case):
        for name, data in (files | case).items():
            (folder / name).write_bytes(data)
        try:
            restore(folder, Path("again.pt"))
            check_loaded(*load_model("again.pt"), "again.pt")
        except UserError:
            assert not Path("again.pt").exists()
            raise
        finally:
            Path("again.pt").unlink(missing_ok=True)

    read({})
    weights = files["model.safetensors"]
    return st.one_of(
        changed_json(valid).map(lambda file: {"config.json": file}),
        changed_safetensors(weights).map(lambda file: {"model.safetensors": file}),
        changed_bytes(weights).map(lambda file: {"model.safetensors": file}),
    ), read
