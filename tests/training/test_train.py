"""Training as a user runs it: resuming, stopping, refusing, and what is left on disk."""

import json
import math
import signal
import time
import zipfile

import pytest
import torch

import train_shakespeare
from conftest import error_line, run
from data import eval_batches
from engine.checkpoint import load_model, read_checkpoint
from script_runner import StartedScript
from small_runs import SMALL, assert_same_run
from system.errors import run_script
from text.token_files import open_token_data
from training import trainer as training_trainer
from training.run_log import RunLog

NGT = ("--repulsion", "--repulsion-interval", 7, "--use-soft-cutoff")


def train(*flags, cwd, check=0, env=None):
    return run("train_shakespeare.py", *SMALL, *flags, cwd=cwd, check=check, env=env)


def refuse(capsys, *flags):
    """Run main in this process; returns (exit code, stderr)."""
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: train_shakespeare.main([str(flag) for flag in flags]))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stop.value.code, error


def curve(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["val_loss"], row["train_loss"]) for row in rows]


@pytest.mark.parametrize(
    "kind",
    [
        ("--model", "ngt", *NGT),
        ("--model", "ngt", "--law", "published", "--mass-in-value"),
        ("--model", "vanilla", "--pos", "rotary"),
        ("--model", "ngt", *NGT, "--use-amp"),
        ("--model", "vanilla", "--use-amp"),
        ("--model", "ngt", *NGT, "--recipe", "modern"),
        ("--model", "vanilla", "--recipe", "modern", "--smear", "keys-values", "--sink"),
        pytest.param(("--model", "ngt", *NGT, "--compile"), marks=pytest.mark.slow),
        pytest.param(("--model", "vanilla", "--compile", "--use-amp"), marks=pytest.mark.slow),
    ],
    ids=[
        *("newton", "published", "vanilla", "newton-amp", "vanilla-amp"),
        *("newton-modern", "vanilla-modern"),
        *("newton-compiled", "vanilla-compiled-amp"),
    ],
)
def test_resuming_is_bit_identical(kind, in_tmp, small_text):
    """60 steps in one go against 30 and, in a new process, 30 more: with accumulation, warm-up,
    dropout and evaluations between, and in bf16 if the hardware has it."""
    flags = (*kind, "--data-path", small_text, "--no-use-cosine-schedule")
    train(*flags, "--max-steps", 60, "--checkpoint-path", "c/one", cwd=in_tmp)
    train(*flags, "--max-steps", 30, "--checkpoint-path", "c/two", cwd=in_tmp)
    again = train("--resume", "--max-steps", 60, "--checkpoint-path", "c/two", cwd=in_tmp)
    assert "resuming at step 30" in again.stdout
    assert_same_run(read_checkpoint("c/one_last.pt"), read_checkpoint("c/two_last.pt"))
    # the run of 30 also evaluated at its own end
    rows = [row[:2] for row in curve(in_tmp / "runs" / "two") if row[0] != 30]
    assert rows == [row[:2] for row in curve(in_tmp / "runs" / "one")]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_bit_identical(number, code, in_tmp, small_text):
    """A run stopped by a signal and resumed, against one that was never interrupted."""
    flags = [*SMALL, *NGT, "--data-path", small_text, "--max-steps", 160]
    flags = [str(flag) for flag in flags]
    train_whole = [*flags, "--checkpoint-path", "c/whole"]
    run("train_shakespeare.py", *train_whole, cwd=in_tmp, check=0)
    cut = (*flags, "--checkpoint-path", "c/cut")
    process = StartedScript("train_shakespeare.py", cut, in_tmp)
    metrics = in_tmp / "runs" / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "--resume" in output
    stopped_at = read_checkpoint("c/cut_last.pt")["iter"]
    assert 20 <= stopped_at < 160
    run("train_shakespeare.py", "--resume", "--checkpoint-path", "c/cut", cwd=in_tmp, check=0)
    assert_same_run(read_checkpoint("c/whole_last.pt"), read_checkpoint("c/cut_last.pt"))
    assert curve(in_tmp / "runs" / "whole") == curve(in_tmp / "runs" / "cut")


def test_sigusr1_writes_a_checkpoint_and_training_continues(in_tmp, small_text):
    flags = (*SMALL, *NGT, "--data-path", small_text, "--max-steps", 3000)
    flags = [*flags, "--checkpoint-interval", 3000, "--checkpoint-path", "c/x"]
    process = StartedScript("train_shakespeare.py", flags, in_tmp)
    metrics, last = in_tmp / "runs" / "x" / "metrics.jsonl", in_tmp / "c" / "x_last.pt"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not last.exists()
    process.send_signal(signal.SIGUSR1)
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    saved_at = read_checkpoint(last)["iter"]
    rows = len(curve(in_tmp / "runs" / "x"))
    while len(curve(in_tmp / "runs" / "x")) == rows and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None  # it continues
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert f"SIGUSR1 at step {saved_at}" in output and 20 <= saved_at < 3000


def test_it_learns_and_reports_the_truth(in_tmp, small_text):
    """The reported validation loss is that of the best checkpoint, computed here by hand."""
    first = train(
        *("--data-path", small_text, "--max-steps", 60, "--dropout", 0, "--learning-rate", 3e-3),
        *("--eval-iters", 1000, "--checkpoint-path", "c/x.pt"),
        cwd=in_tmp,
    )
    rows = curve(in_tmp / "runs" / "x")
    assert [row[0] for row in rows] == [20, 40, 60]
    assert rows[-1][1] < rows[0][1] < math.log(60)
    model, _, checkpoint = load_model("c/x.pt_best.pt")
    data = open_token_data(checkpoint["config"]["token_directory"])
    losses = []
    for inputs, targets in eval_batches(data.valid, 16, 1000, 1):
        with torch.no_grad():
            probability = model(inputs).double().softmax(-1)
        losses.append(-probability[0].gather(1, targets[0, :, None]).log().mean())
    assert float(torch.stack(losses).mean()) == pytest.approx(checkpoint["best_val"], abs=1e-4)
    assert len(losses) == (len(data.valid) - 1) // 16
    config = json.loads((in_tmp / "runs" / "x" / "config.json").read_text())
    assert config["parameters"] == sum(p.numel() for p in model.parameters())
    assert f"{config['parameters']:,} parameters" in first.stdout
    # a second call neither overwrites nor repeats
    before = (in_tmp / "c" / "x.pt_last.pt").read_bytes()
    refused = train("--data-path", small_text, "--checkpoint-path", "c/x.pt", cwd=in_tmp, check=2)
    assert "--resume" in error_line(refused) and "--overwrite" in error_line(refused)
    done = run(
        "train_shakespeare.py", "--resume", "--checkpoint-path", "c/x.pt", cwd=in_tmp, check=0
    )
    assert "finished already" in done.stdout
    assert (in_tmp / "c" / "x.pt_last.pt").read_bytes() == before


def test_tensorboard_gets_curves_geometry_and_labels(in_tmp, small_text):
    """Read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--data-path", small_text, "--max-steps", 20, "--repulsion")
    train(*flags, "--checkpoint-path", "c/x", cwd=in_tmp)
    events = EventAccumulator(str(in_tmp / "runs" / "x")).Reload()
    tags = events.Tags()
    wanted = {"val_loss", "train_loss", "perplexity", "bits_per_byte", "repulsion", "tokens_per_s"}
    assert wanted | {"learning_rate", "grad_norm"} <= set(tags["scalars"])
    layer = {f"layer 2/{name}" for name in ("time_scale", "time_offset", "background", "window")}
    assert layer | {"mass"} <= set(tags["histograms"])
    logged = curve(in_tmp / "runs" / "x")[0][1]
    assert events.Scalars("val_loss")[0].value == pytest.approx(logged, rel=1e-6)
    labels = next((in_tmp / "runs" / "x").rglob("metadata.tsv")).read_text().splitlines()
    assert labels[0] == "token\tmass"
    assert {line.split("\t")[0] for line in labels[1:]} >= {"␣", "⏎", "T"}


def test_too_many_steps_that_are_not_finite_stop_the_run(in_tmp, small_text):
    """The last good checkpoint stays, byte for byte."""
    common = ("--data-path", small_text, "--checkpoint-path", "c/x")
    train(*common, "--max-steps", 15, "--no-use-cosine-schedule", cwd=in_tmp)
    good = (in_tmp / "c" / "x_last.pt").read_bytes()
    flags = ("--resume", "--max-steps", 90, "--learning-rate", 1e38, "--max-skipped-steps", 5)
    result = train(*common, *flags, cwd=in_tmp, check=1)
    line = error_line(result)
    assert "--max-skipped-steps" in line and "step" in line and "x_last.pt" in line
    assert (in_tmp / "c" / "x_last.pt").read_bytes() == good


def test_nothing_of_another_run_is_written_over(in_tmp, small_text, capsys):
    """Neither checkpoints nor metrics; --overwrite replaces both."""
    flags = ("--data-path", small_text, "--max-steps", 3)
    train(*flags, "--checkpoint-path", "a/x", cwd=in_tmp)
    metrics = (in_tmp / "runs" / "x" / "metrics.jsonl").read_text()
    code, error = refuse(capsys, *SMALL, *flags, "--checkpoint-path", "b/x")
    assert code == 2 and "--run-name" in error and not (in_tmp / "b").exists()
    train(*flags, "--checkpoint-path", "b/x", "--run-name", "y", cwd=in_tmp)
    code, error = refuse(capsys, "--resume-from", "a/x_last.pt", "--checkpoint-path", "b/x")
    assert code == 2 and "b/x_last.pt exists" in error
    assert (in_tmp / "runs" / "x" / "metrics.jsonl").read_text() == metrics
    # --resume-from continues the run that the checkpoint belongs to
    train("--resume-from", "a/x_best.pt", "--max-steps", 5, cwd=in_tmp)
    assert read_checkpoint("a/x_last.pt")["iter"] == 5
    assert read_checkpoint("b/x_last.pt")["iter"] == 3
    train(*flags, "--checkpoint-path", "b/x", "--run-name", "y", "--overwrite", cwd=in_tmp)
    assert len(curve(in_tmp / "runs" / "y")) == 1


def test_no_checkpoint_is_written_while_steps_are_skipped(in_tmp, small_text, monkeypatch, capsys):
    flags = ("--data-path", small_text, "--checkpoint-path", "c/x", "--max-steps", 5)
    train(*flags, cwd=in_tmp)
    good = (in_tmp / "c" / "x_last.pt").read_bytes()
    loss = training_trainer.Trainer.loss
    nan = float("nan")
    monkeypatch.setattr(
        training_trainer.Trainer, "loss", lambda *args: tuple(x * nan for x in loss(*args))
    )
    flags = ("--resume", "--checkpoint-path", "c/x", "--max-steps", 50)
    code, error = refuse(capsys, *flags, "--checkpoint-interval", 1, "--max-skipped-steps", 5)
    assert code == 1 and "--max-skipped-steps" in error
    assert (in_tmp / "c" / "x_last.pt").read_bytes() == good


def test_rows_past_the_resumed_step_are_cut(in_tmp):
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    (in_tmp / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "val']))
    RunLog(in_tmp, {}, start_step=2)
    kept = (in_tmp / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2]


def test_resume_with_nothing_there_starts_and_says_so(in_tmp, small_text):
    flags = ("--data-path", small_text, "--max-steps", 5, "--checkpoint-path", "c/x")
    assert "starting" in train(*flags, "--resume", cwd=in_tmp).stdout


def test_a_run_that_took_the_public_text_for_a_missing_one_resumes(in_tmp, tiny_shakespeare):
    """Earlier versions did; a text of the user's own that is gone is an error."""
    public = in_tmp / "data/shakespeare/input.txt"
    public.parent.mkdir(parents=True)
    texts = {"public": tiny_shakespeare.read_text(), "own": tiny_shakespeare.read_text()[:20_000]}
    for name, text in texts.items():
        given = in_tmp / f"{name}.txt"
        given.write_text(text)
        path = ("--checkpoint-path", f"c/{name}")
        flags = (*SMALL, "--data-path", given, *path, "--max-steps", 2)
        run("train_shakespeare.py", *flags, cwd=in_tmp, check=0)
        given.unlink()
    public.write_text(texts["public"])
    again = ("--resume", "--max-steps", 3, "--checkpoint-path")
    result = run("train_shakespeare.py", *again, "c/public", cwd=in_tmp, check=0)
    assert "resuming at step 2" in result.stdout
    assert read_checkpoint("c/public_last.pt")["config"]["data_path"] is None
    result = run("train_shakespeare.py", *again, "c/own", cwd=in_tmp, check=1)
    assert "own.txt does not exist" in error_line(result)


def test_resume_refuses_what_contradicts_the_checkpoint(in_tmp, small_text, capsys):
    flags = ("--checkpoint-path", "c/x", "--data-path", small_text, "--max-steps", 5)
    train(*flags, cwd=in_tmp)
    resume = ("--checkpoint-path", "c/x", "--resume", "--max-steps", 10)
    for flag, value in (
        *(("--hidden-dim", 64), ("--model", "vanilla"), ("--law", "published")),
        *(("--recipe", "modern"), ("--optimizer", "muon"), ("--norm", "rmsnorm")),
    ):
        code, error = refuse(capsys, *resume, flag, value)
        assert code == 2 and flag in error and "contradicts" in error
    other = in_tmp / "other.txt"
    other.write_text("another text, of other words, long enough.\n" * 400)
    code, error = refuse(capsys, *resume, "--data-path", other)
    assert code == 1 and "trained on another text" in error
    # a damaged _last is an error; _best is not used silently instead
    last = in_tmp / "c" / "x_last.pt"
    data = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    # behind the header and its padding
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    last.write_bytes(data)
    code, error = refuse(capsys, *resume)
    assert code == 1 and "--resume-from" in error and "damaged" in error
    last.unlink()
    done = train("--resume", "--checkpoint-path", "c/x", "--max-steps", 10, cwd=in_tmp)
    assert "resuming at step 5" in done.stdout


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (("--data-path", "empty.txt"), 1, ("empty.txt", "empty")),
        (("--dataset", "text", "--data-path", "no.txt"), 1, ("--data-path", "no.txt")),
        (("--dataset", "text"), 2, ("--data-path",)),
        (("--data-path", "short.txt"), 1, ("--block-size", "tokens")),
        (("--data-path", "latin.txt"), 1, ("latin.txt", "UTF-8")),
        (("--hidden-dim", "30", "--num-heads", "4"), 2, ("--hidden-dim", "--num-heads")),
        (("--no-radius-cutoff", "--use-soft-cutoff"), 2, ("--no-radius-cutoff", "--use-soft")),
        (("--hidden-dim", "0"), 2, ("--hidden-dim",)),
        (("--batch-size", "-3"), 2, ("--batch-size",)),
        (("--learning-rate", "nan"), 2, ("--learning-rate",)),
        (("--dropout", "1"), 2, ("--dropout",)),
        (("--max-steps", "many"), 2, ("--max-steps",)),
        (("--hidden-dim", "4000000", "--coord-dim", "1"), 1, ("memory",)),
        (("--device", "warp"), 2, ("--device", "cpu")),
        (("--resume-from", "none.pt"), 1, ("none.pt", "does not exist")),
        (("--tokenizer", "bpe", "--bpe-vocab-size", "9"), 2, ("--bpe-vocab-size",)),
        (("--model", "vanilla", "--pos", "sideways"), 2, ("--pos",)),
        (("--recipe", "stale"), 2, ("--recipe", "modern")),
        (("--smear", "everything"), 2, ("--smear", "keys-values")),
        (("--logit-softcap", "-1"), 2, ("--logit-softcap",)),
        (("--beta2", "1"), 2, ("--beta2",)),
    ],
)
def test_bad_input_is_one_line(flags, code, words, in_tmp, capsys, small_text):
    (in_tmp / "empty.txt").write_text("")
    (in_tmp / "short.txt").write_text("too short")
    (in_tmp / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    if "--data-path" not in flags and "--dataset" not in flags:
        flags = (*flags, "--data-path", small_text)
    got, error = refuse(capsys, *flags)
    assert got == code, error
    assert all(word in error for word in words), error
    assert not (in_tmp / "checkpoints").exists()


def test_a_checkpoint_path_that_cannot_be_written(in_tmp, small_text, capsys):
    (in_tmp / "file").write_text("not a directory")
    flags = [*SMALL, "--data-path", small_text, "--max-steps", 2, "--checkpoint-path", "file/x"]
    code, error = refuse(capsys, *flags)
    assert code == 1 and "--checkpoint-path" in error
    assert (in_tmp / "file").read_text() == "not a directory"


def test_presets_fill_what_is_not_given_and_flags_win(in_tmp):
    from training.config import resolve
    from training.options import train_parser

    parser = train_parser("", "")
    config = resolve(parser.parse_args(["--dataset", "wikitext103", "--num-layers", "3"]))
    assert (config["hidden_dim"], config["num_layers"], config["mlp_dim"]) == (512, 3, 2048)
    assert config["tokenizer"] == "bpe" and config["use_radius_cutoff"] is False
    config = resolve(parser.parse_args(["--radius-cutoff", "--no-repulsion"]))
    assert config["use_radius_cutoff"] is True and config["repulsion"] is False


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *(("--model", "ngt"), ("--model", "vanilla"), ("--model", "ngt", "--recipe", "modern")),
        ("--model", "vanilla", "--recipe", "modern", "--smear", "keys-values", "--sink"),
    ],
    ids=["ngt", "vanilla", "ngt-modern", "vanilla-modern"],
)
def test_compiled_training_gives_the_same_curve(kind, in_tmp, small_text):
    flags = (*kind, "--data-path", small_text, "--max-steps", 20, "--dropout", 0)
    train(*flags, "--checkpoint-path", "c/plain", cwd=in_tmp)
    train(*flags, "--compile", "--checkpoint-path", "c/compiled", cwd=in_tmp)
    plain, compiled = (curve(in_tmp / "runs" / name)[-1][1] for name in ("plain", "compiled"))
    assert plain == pytest.approx(compiled, abs=2e-3)


def test_compile_without_a_compiler_warns_and_trains(in_tmp, small_text):
    flags = ("--data-path", small_text, "--max-steps", 2, "--checkpoint-path", "c/x")
    result = train(*flags, "--compile", cwd=in_tmp, env={"CXX": "no-such-compiler"})
    assert "warning: --compile" in result.stderr
