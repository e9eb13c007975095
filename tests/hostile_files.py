"""Malicious files, and the error that each produces.

python tests/hostile_files.py        prints them as a table
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "talk")]

import report
from conftest import SENTENCES
from hostile_checkpoints import (
    BIG,
    CONTENTS,
    FILES,
    TRAINING,
    attempt_checkpoint,
    attempt_file,
    attempt_resume,
    error_of,
    train_a_little,
)
from text.preparation import prepare_data
from text.token_files import open_token_data
from text.tokenizer import GPT4_WORDS, BPETokenizer, load_bpe


def meta(**changes):
    """A change of a prepared text's meta.json."""

    def change(directory):
        path = directory / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def split(**changes):
    def change(directory):
        splits = json.loads((directory / "meta.json").read_text())["splits"]
        splits["train"] |= changes
        meta(splits=splits)(directory)

    return change


def elsewhere(directory):
    """A split whose name is a path outside the directory."""
    splits = json.loads((directory / "meta.json").read_text())["splits"]
    meta(splits=splits | {"../../../../etc/passwd": splits["train"]})(directory)


def overwrite(name, data):
    return lambda directory: (directory / name).write_bytes(data)


def too_large_ids(directory):
    path = directory / "valid.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)


def two_terabytes_of_holes(directory):
    os.truncate(directory / "train.bin", 2 << 40)
    split(tokens=1 << 40)(directory)


TOKEN_FILES = {
    "2 TB of holes": two_terabytes_of_holes,
    "ids that are objects": meta(dtype="|O"),
    "ids of 10^9 bytes": meta(dtype="|V1000000000"),
    "ids as a list": meta(dtype=["<u2"]),
    "a split elsewhere": elsewhere,
    "splits as a list": meta(splits=["train", "valid"]),
    "10^12 tokens": split(tokens=BIG),
    "no tokens": split(tokens=0),
    "half a token": split(tokens=0.5),
    "tokens as text": split(tokens="9"),
    "no bytes": split(bytes=0),
    "an odd length": overwrite("train.bin", b"x" * 12345),
    "ids above the vocabulary": too_large_ids,
    "deep JSON": overwrite("meta.json", b"[" * 1_000_000),
    "a deep vocabulary": overwrite("vocab.json", b'{"a":' * 1_000_000),
    "no UTF-8": overwrite("meta.json", b"\xff\xfe"),
    "a later format": meta(format_version=99),
    "another tokenizer's hash": meta(tokenizer_sha256="0" * 64),
}
"""Changes of a directory of token files."""


def evaluation(**changes):
    """A change of a run's last evaluation."""

    def change(run):
        *lines, last = (run / "metrics.jsonl").read_text().splitlines()
        lines.append(json.dumps(json.loads(last) | changes))
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    return change


def run_setting(**changes):
    def change(run):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))

    return change


def a_pipe(run):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")


ESCAPE = "x\x1b]0;PWNED\x07"
RUNS = {
    "a deep config": overwrite("config.json", b"[" * 1_000_000),
    "a config of null": overwrite("config.json", b"null"),
    "a deep evaluation": overwrite("metrics.jsonl", b"[" * 1_000_000 + b"\n{}\n"),
    "an evaluation of text": overwrite("metrics.jsonl", b'{"step": "x"}\n'),
    "a pipe for evaluations": a_pipe,
    "a loss of text": evaluation(val_loss="<script>"),
    "a loss of 10^4000": evaluation(val_loss=10**4000),
    "a loss of NaN": evaluation(val_loss=float("nan")),
    "a step of null": evaluation(step=None),
    "half a step": evaluation(step=1.5),
    "a step as a boolean": evaluation(step=True),
    "tokens of null": evaluation(tokens=None),
    "no tokens": evaluation(tokens=0),
    "a speed of null": evaluation(steps_per_s=None),
    "tokens per second of null": evaluation(tokens_per_s=None),
    "0 tokens per second": evaluation(tokens_per_s=0),
    "a time of null": evaluation(wall_time=None),
    "an infinite time": evaluation(wall_time=float("inf")),
    "a negative time": evaluation(wall_time=-1.0),
    "a perplexity of 0": evaluation(perplexity=0),
    "memory as text": evaluation(peak_memory_bytes="all of it"),
    "bits as text": evaluation(bits_per_byte="8"),
    "a list among numbers": evaluation(note=[1]),
    "a formula for a spreadsheet": evaluation(**{"=cmd|' /C calc'!A0": 1}),
    "a command that is a number": run_setting(command=5),
    "a command of numbers": run_setting(command=[1]),
    "another command": run_setting(command=["-c", "import os; os.mkdir('pwned')"]),
    "parameters as text": run_setting(parameters="many"),
    "a source of sources": run_setting(source={"a": "b"}),
    "a source of 10^6 letters": run_setting(source="x" * 10**6),
    "a machine that is a list": run_setting(machine=["x"]),
    "a model that is a list": run_setting(model=["ngt"]),
    "a law that is a number": run_setting(law=1),
    "a law of 10^6 letters": run_setting(law="x" * 10**6),
    "a seed of NaN": run_setting(seed=float("nan")),
    "a seed of 10^4000": run_setting(seed=10**4000),
    "a checkpoint that is a list": run_setting(checkpoint_path=["x"]),
    "a setting named by an escape sequence": run_setting(**{ESCAPE: 1}),
}
"""Changes of a run, which is then reported."""


BPE_JSON = BPETokenizer.train(["The quick brown fox\n"], 260).to_vocab()["tokenizer_json"]


def exported(**parts):
    """A trained tokenizer file with some parts replaced."""
    return json.dumps(json.loads(BPE_JSON) | parts)


def with_model(**parts):
    return exported(model=json.loads(BPE_JSON)["model"] | parts)


def added_token(content, **parts):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 260, "content": content, **flags, **parts}


def words(regex, behavior="Isolated", invert=False):
    """A pre-tokenizer like those in Llama 3's files."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}


DOUBLING = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
BYTE_LEVEL = json.loads(BPE_JSON)["pre_tokenizer"]
TOKENIZERS = {
    "text doubled forty times": exported(
        normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 40}
    ),
    "a regex of exponential time": exported(
        normalizer={"type": "Replace", "pattern": {"Regex": "(e+)+$"}, "content": "e"}
    ),
    "a split of exponential time": exported(pre_tokenizer=words("(e+)+$")),
    "a split that removes the text": exported(pre_tokenizer=words(GPT4_WORDS, "Removed")),
    "bytes of bytes of bytes": exported(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 3}
    ),
    "a hundred normalizers": exported(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 100}
    ),
    "a sequence in a sequence": exported(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}
    ),
    "a normalizer of a list": exported(normalizer={"type": ["NFC"]}),
    "a normalizer that is text": exported(normalizer="NFC"),
    "no pre-tokenizer": exported(pre_tokenizer=None),
    "another pre-tokenizer": exported(pre_tokenizer={"type": "Whitespace"}),
    "an empty sequence": exported(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
    "a suffix": with_model(end_of_word_suffix="</w>"),
    "an unknown token outside the vocabulary": with_model(unk_token="<unk>"),
    "a token that is no bytes": with_model(vocab={"\u0416": 0, "a": 1}, merges=[]),
    "two tokens with one id": with_model(vocab={"a": 0, "b": 0, "c": 2}, merges=[]),
    "an id of 2^40": with_model(vocab={"a": 0, "b": 1 << 40}, merges=[]),
    "an id as text": with_model(vocab={"a": "0"}, merges=[]),
    "a token of 10^6 letters": with_model(vocab={"a": 0, "b" * 10**6: 1}, merges=[]),
    "an added token of 10^6 letters": exported(added_tokens=[added_token("b" * 10**6)]),
    "an empty added token": exported(added_tokens=[added_token("")]),
    "an added token of a list": exported(added_tokens=[added_token(["b"])]),
    "an added token without a text": exported(added_tokens=[{"id": 260}]),
    "deep JSON": BPE_JSON[:-1] + ',"x":' + "[" * 100_000,
}
"""Files for --tokenizer-path."""


def attempt_tokenizer(content):
    """The error of `load_bpe` for a tokenizer file; empty if it is accepted."""
    Path("evil.json").write_text(content)
    return error_of(lambda: load_bpe("evil.json"))


def attempt_tokens(change):
    """The error of `open_token_data` for changed token files; empty if they are accepted."""
    Path("text.txt").write_text("".join(SENTENCES) * 100)
    directory = prepare_data("text", "text.txt", say=lambda line: None).directory
    change(directory)
    return error_of(lambda: open_token_data(directory))


def attempt_report(trained_in, change):
    """The error of report.py for a run with a changed file; empty if it is accepted."""
    run = Path("runs/evil")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(Path(trained_in) / run, run)
    change(run)
    return error_of(lambda: report.main(["--runs", "evil", "--output", "r.md"]))


def everything():
    """Yield `(kind, name, error)` of every file, written in the current directory."""
    for name, change in CONTENTS.items():
        yield "checkpoint", name, attempt_checkpoint(change)
    for name, make in FILES.items():
        yield "file", name, attempt_file(make())
    with contextlib.redirect_stdout(io.StringIO()):
        trained = train_a_little()
    for name, change in TRAINING.items():
        yield "resumed", name, attempt_resume(trained, change)
    shutil.copytree("runs", "trained/runs")
    for name, content in TOKENIZERS.items():
        yield "tokenizer", name, attempt_tokenizer(content)
    for name, change in TOKEN_FILES.items():
        yield "token files", name, attempt_tokens(change)
    for name, change in RUNS.items():
        yield "run", name, attempt_report("trained", change)


def main():
    """Print the table. Returns 1 if a file was accepted, else 0."""
    accepted = 0
    print("| kind | file | error |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for kind, name, message in everything():
            accepted += not message
            print(f"| {kind} | {name} | {message.replace('|', '/') or 'ACCEPTED'} |", flush=True)
    return int(accepted > 0)


if __name__ == "__main__":
    sys.exit(main())
