"""The dashboard: event files read back, and TensorBoard's real page in a real browser."""

import functools
import json
import math
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray

from conftest import BROWSER, error_line, run
from engine.checkpoint import read_checkpoint
from engine.models import build_model
from reporting.geometry import heads_table
from script_runner import StartedScript
from small_runs import TINY, assert_same_run, evaluation, same
from system.errors import UserError
from text.tokenizer import CharTokenizer
from training import tensorboard_log
from training.run_log import RunLog
from training.tensorboard_log import Dashboard, as_code, sample_text

HOSTILE = (
    "<script>window.executed = 1; alert(1)</script>",
    "<img src=x onerror='window.executed = 2; alert(2)'>",
    "[click](javascript:alert(3))",
    "```\n</code></pre><svg onload=alert(4)>",
)
CONFIG = {
    **{"model": "ngt", "law": "newton", "pos": "learned", "learning_rate": 1e-3, "seed": 1},
    **{"max_steps": 30, "eval_interval": 10, "sample_tokens": 20, "use_soft_cutoff": True},
}
NOTHING = {"background": False, "retardation": False, "use_radius_cutoff": False}


def train(*flags, cwd, check=0):
    return run("train_shakespeare.py", *TINY, *flags, cwd=cwd, check=check)


def read(directory):
    """All events of a file, without TensorBoard's sampling."""
    everything = {"scalars": 0, "tensors": 0, "histograms": 0}
    return EventAccumulator(str(directory), size_guidance=everything).Reload()


def steps(events, tag):
    return [event.step for event in events.Scalars(tag)]


def texts(events):
    return [
        make_ndarray(event.tensor_proto).item().decode()
        for event in events.Tensors("sample/text_summary")
    ]


def hparams(directory, name):
    """The session infos of that name in a run's only event file."""
    from training.event_file import read_events

    (path,) = directory.glob("events.out.tfevents.*")
    values = [value for event in read_events(path) for value in event.summary.value]
    found = [value for value in values if value.tag == f"_hparams_/{name}"]
    return [HParamsPluginData.FromString(v.metadata.plugin_data.content) for v in found]


def small(model_type="ngt", tokenizer=None, **config):
    """`(model, data)` as `Dashboard.learned` takes them."""
    tokenizer = tokenizer or CharTokenizer.train("abcdefgh \n")
    config = {
        **{"model_type": model_type, "vocab_size": tokenizer.vocab_size, "block_size": 32},
        **{"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 16},
        **config,
    }
    valid = np.arange(100, dtype=np.uint16) % tokenizer.vocab_size
    return build_model(config), SimpleNamespace(valid=valid, tokenizer=tokenizer)


def test_a_resumed_run_reads_as_one(in_tmp, small_text):
    """No event twice or later than the resumed step, one session; piped output is plain lines."""
    common = ("--data-path", small_text, "--eval-interval", 10, "--checkpoint-path", "c/x")
    piped = train(*common, "--max-steps", 20, cwd=in_tmp)
    assert not set("\r\x1b") & set(piped.stdout + piped.stderr)
    assert piped.stdout.count("bits/byte") == 1
    directory = in_tmp / "runs" / "x"
    shutil.copy("c/x_last.pt", "c/kept.pt")
    train(*common, "--max-steps", 50, "--resume", cwd=in_tmp)
    shutil.copy("c/kept.pt", "c/x_last.pt")  # as if it had crashed before another was written
    (path,) = directory.glob("events.out.tfevents.*")
    with open(path, "ab") as file:
        file.write(b"\x20\x00\x00\x00\x00\x00\x00\x00torn")
    train(*common, "--max-steps", 30, "--resume", cwd=in_tmp)

    events = read(directory)
    assert steps(events, "val_loss") == [10, 20, 30]
    assert steps(events, "by_tokens/val_loss") == [320, 640, 960]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for name in ("val_loss", "perplexity", "bits_per_byte"):
        expected = pytest.approx([row[name] for row in rows], rel=1e-6)
        assert [event.value for event in events.Scalars(name)] == expected
        assert [event.value for event in events.Scalars(f"by_tokens/{name}")] == expected
    assert [event.step for event in events.Histograms("layer 1/time_scale")] == [10, 20, 30]
    assert not {"repulsion", "skipped_steps"} & set(events.Tags()["scalars"])
    assert len(texts(events)) == 3

    (layout,) = (make_ndarray(e.tensor_proto) for e in events.Tensors("custom_scalars__config__"))
    charts = [chart for c in Layout.FromString(layout.item()).category for chart in c.chart]
    assert [list(chart.multiline.tag) for chart in charts] == [
        [f"^{group}{name}$"]
        for group in ("", "by_tokens/", "by_seconds/")
        for name in ("val_loss", "perplexity", "bits_per_byte")
    ]
    (start,), (experiment,), (end,) = (
        hparams(directory, name)
        for name in ("session_start_info", "experiment", "session_end_info")
    )
    values = start.session_start_info.hparams
    assert values["model"].string_value == "ngt" and values["hidden_dim"].number_value == 16
    assert values["max_steps"].number_value == 30 and "pos" not in values
    metrics = [info.name.tag for info in experiment.experiment.metric_infos]
    assert metrics == ["val_loss", "perplexity", "bits_per_byte"]
    assert end.session_end_info.status == 1  # success

    config = ProjectorConfig()
    text_format.Parse((directory / "projector_config.pbtxt").read_text(), config)
    names = [embedding.tensor_name for embedding in config.embeddings]
    assert names[0] == min(names) == "token_embedding newest, step 30"  # the page opens on it
    assert set(names[1:]) == {f"token_embedding, step {step}" for step in (20, 50)}
    for embedding in config.embeddings:
        points = np.loadtxt(directory / embedding.tensor_path, delimiter="\t")
        labels = (directory / embedding.metadata_path).read_text().splitlines()
        assert labels[0] == "token\tmass" and len(labels) == len(points) + 1
    weights = read_checkpoint("c/x_last.pt")["model_state"]["token_emb.weight"]
    saved = np.loadtxt(directory / config.embeddings[0].tensor_path, delimiter="\t")
    assert np.allclose(saved, weights, rtol=1e-4, atol=1e-7)


def test_what_an_older_release_left_is_taken_in(in_tmp):
    """Its event file, and from metrics.jsonl the series that it did not write. Layers counted from
    0 become layers from 1, once; what says nothing about this run is dropped."""
    from torch.utils.tensorboard import SummaryWriter

    written = [evaluation(step, 3 - step / 100) for step in (10, 20, 30)]
    written[0]["perplexity"] = None  # was infinite
    (in_tmp / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    with SummaryWriter(in_tmp) as writer:
        for row in written:
            for name in ("val_loss", "bits_per_byte"):
                writer.add_scalar(name, row[name], row["step"])
            writer.add_scalar("repulsion", 1.0, row["step"])
            for layer in (0, 1):
                for name in ("radius", "window"):
                    writer.add_histogram(f"layer{layer}/{name}", np.full(3, layer), row["step"])
    names = ("tensor", "metadata")
    files = [Path(f"projector/00020/token_embedding/{name}s.tsv") for name in names]
    listed = "".join(f'{n}_path: "{path}"\n' for n, path in zip(names, files, strict=True))
    files[0].parent.mkdir(parents=True)
    files[0].touch()
    Path("projector_config.pbtxt").write_text(
        f'embeddings {{\ntensor_name: "token_embedding:00020"\n{listed}}}\n'
    )
    config = CONFIG | {"use_soft_cutoff": False, "repulsion": False}
    for _ in range(2):
        log = RunLog(in_tmp, config, start_step=20)
    model, data = small()
    log.dashboard.projector(model, data.tokenizer, 30)
    found = ProjectorConfig()
    text_format.Parse(Path("projector_config.pbtxt").read_text(), found)
    assert [embedding.tensor_name for embedding in found.embeddings] == [
        "token_embedding newest, step 30",
        "token_embedding, step 20",
    ]
    events = read(in_tmp)
    assert set(events.Tags()["histograms"]) == {"layer 1/window", "layer 2/window"}
    kept = events.Histograms("layer 2/window")
    assert [(event.step, event.histogram_value.max) for event in kept] == [(10, 1), (20, 1)]
    assert "repulsion" not in events.Tags()["scalars"]
    assert steps(events, "val_loss") == [10, 20]
    assert steps(events, "by_tokens/val_loss") == [5120, 10240]
    assert steps(events, "by_seconds/val_loss") == [15, 30]
    assert steps(events, "by_tokens/perplexity") == [10240]


def test_samples_change_nothing_of_the_training(in_tmp, small_text):
    """Bit-identical, dropout's random numbers included."""
    common = ("--data-path", small_text, "--max-steps", 20, "--eval-interval", 5)
    train(*common, "--checkpoint-path", "c/with", cwd=in_tmp)
    train(*common, "--checkpoint-path", "c/without", "--sample-tokens", 0, cwd=in_tmp)
    with_samples, without = (read_checkpoint(f"c/{x}_last.pt") for x in ("with", "without"))
    assert_same_run(with_samples, without)
    assert same(
        {**with_samples["data_state"], "wall_time": 0}, {**without["data_state"], "wall_time": 0}
    )
    assert len(texts(read(in_tmp / "runs" / "with"))) == 4
    assert "sample/text_summary" not in read(in_tmp / "runs" / "without").Tags()["tensors"]


@pytest.mark.parametrize("model_type", ["ngt", "vanilla"])
def test_a_sample_is_the_models_own_text(model_type):
    """The prompt is the validation text; the seed decides; the model trains on as before."""
    model, data = small(model_type)
    model.train()
    before = torch.get_rng_state()
    prompt, answer = sample_text(model, data, 50, seed=3)
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert prompt == data.tokenizer.decode(data.valid[:16]) and len(answer) == 50
    again, other = (sample_text(model, data, 50, seed) for seed in (3, 4))
    assert again == (prompt, answer) != other
    with torch.no_grad():
        model.token_emb.weight.fill_(math.nan)
    assert sample_text(model, data, 50, seed=3) == (prompt, "")


def test_a_prompt_that_ends_within_a_character():
    """The answer starts with that character, and nothing is lost."""
    model, data = small()
    whole = "중력" * 12  # 3 bytes a letter: 16 bytes end within the sixth
    data.valid = np.frombuffer(whole.encode(), dtype=np.uint8) % model.config.vocab_size
    data.tokenizer.decode = lambda ids: whole.encode()[: len(ids)].decode(errors="replace")
    assert sample_text(model, data, 20, seed=1) == (whole[:5], whole[5:12])


def test_code_blocks_stay_text():
    """Every line is indented, so no Markdown, HTML or fence ends the block; no control survives."""
    from tensorboard.plugin_util import markdown_to_safe_html

    text = "\n".join(HOSTILE) + "\x1b[2J\r\x00\u2028\u202eend\t\n\n\n  last"
    block = as_code(text)
    assert all(line.startswith("    ") and len(line) <= 104 for line in block.split("\n"))
    assert "".join(line[4:] for line in as_code("  two  words " * 40).split("\n")) == (
        "  two  words " * 40
    )
    assert block.replace("\n", "").isprintable() and "\\x1b[2J\\x0d\\x00\\x2028" in block
    page = markdown_to_safe_html(block)
    assert page.startswith("<pre><code>") and page.endswith("</code></pre>")
    assert page.count("<pre>") == 1 and "<img" not in page and "<a" not in page
    assert "&lt;/code&gt;&lt;/pre&gt;" in page


@pytest.fixture
def most_bytes():
    """The most bytes that one evaluation of a large NGT writes: scalars, histograms and text."""

    def measure(directory, num_layers, num_heads):
        model, data = small(num_layers=num_layers, num_heads=num_heads, hidden_dim=num_heads * 2)
        longest = chr(0x10FFFF)  # escaped, it is longest
        data.tokenizer.decode = lambda ids: longest * 1000 * len(ids)
        board = Dashboard(directory, CONFIG | {"max_steps": 1, "eval_interval": 1})
        sizes = [board._events.path.stat().st_size]
        row = evaluation(1, 4.0) | dict.fromkeys([f"another_number_{n}" for n in range(6)], 1.0)
        board.row(row)
        sizes.append(board._events.path.stat().st_size)
        board.config["sample_tokens"] = 0
        board.learned(model, data, 1)
        sizes.append(board._events.path.stat().st_size)
        board.config["sample_tokens"] = 2
        model.eval()
        board.learned(model, data, 1)
        sizes.append(board._events.path.stat().st_size)
        start, scalars, histograms, both = sizes[0], *np.diff(sizes)
        return start, scalars, histograms, both - histograms

    return measure


@pytest.mark.parametrize("eval_interval", [1, 7, 250, 20000])
def test_event_files_stay_under_50_mb(eval_interval, in_tmp, most_bytes, monkeypatch):
    """15,000 steps: how often each kind is written, times what it measures."""
    for folder, layers, heads in (("usual", 8, 8), ("deep", 96, 2)):
        start, scalars, histograms, text = most_bytes(in_tmp / folder, layers, heads)
        config = CONFIG | {"max_steps": 15000, "eval_interval": eval_interval}
        board = Dashboard(in_tmp / folder, config)
        evaluations = [*range(eval_interval, 15000, eval_interval), 15000]

        def times(most, board=board, evaluations=evaluations):
            return sum(board._is_due(step, most) for step in evaluations)

        counted = times(tensorboard_log.MOST_ROWS)
        assert counted >= min(len(evaluations), 500)  # bounded, not bare
        drawn = times(
            min(tensorboard_log.MOST_TIMES, tensorboard_log.MOST_HISTOGRAMS // (1 + 5 * layers))
        )
        assert drawn >= min(len(evaluations), 20)
        total = start + scalars * counted + histograms * drawn
        total += text * times(tensorboard_log.MOST_SAMPLES)
        assert total < 50e6, (folder, eval_interval, total)


@pytest.mark.slow
def test_a_run_of_15000_steps(in_tmp, small_text):
    """A real training with an evaluation every ten steps."""
    train("--data-path", small_text, "--max-steps", 15000, "--eval-interval", 10, cwd=in_tmp)
    directory = in_tmp / "runs" / "shakespeare"
    assert sum(path.stat().st_size for path in directory.glob("events*")) < 50e6
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 1500
    events = read(directory)
    assert 500 <= len(steps(events, "val_loss")) <= 1002
    assert steps(events, "val_loss")[-1] == 15000
    assert 100 <= len(events.Histograms("mass")) <= 202 and 20 <= len(texts(events)) <= 52


@pytest.mark.parametrize(
    "config, learned",
    [
        (dict(), "time_scale time_offset"),
        (dict(use_radius_cutoff=True), "time_scale time_offset window"),
        (
            dict(use_radius_cutoff=True, use_soft_cutoff=True),
            "radius time_scale time_offset window",
        ),
        (dict(retardation=True), "time_scale time_offset retardation"),
        (dict(law="published", use_radius_cutoff=True), "gamma"),
        (dict(law="published", use_radius_cutoff=True, use_soft_cutoff=True), "gamma radius"),
        (dict(model_type="vanilla"), ""),
    ],
)
def test_a_histogram_of_all_that_is_learned_and_of_nothing_else(config, learned, in_tmp):
    """A radius with a hard edge never changes, and a window without a cutoff is infinite."""
    model, data = small(**NOTHING | config)
    Dashboard(in_tmp, CONFIG).learned(model, data, 10)
    expected = {f"layer {n}/{name}" for n in (1, 2) for name in learned.split()}
    assert set(read(in_tmp).Tags()["histograms"]) == expected | ({"mass"} if learned else set())


@pytest.mark.parametrize("background", [False, True])
def test_every_background_is_in_a_histogram_and_in_the_table_of_heads(background, in_tmp):
    """One number per head, and in the table "none" without one."""
    model, data = small(background=background, background_start=0.03)
    Dashboard(in_tmp, CONFIG | {"background": background}).learned(model, data, 10)
    events = read(in_tmp)
    drawn = {tag for tag in events.Tags()["histograms"] if "background" in tag}
    assert drawn == ({"layer 1/background", "layer 2/background"} if background else set())
    if background:
        (event,) = events.Histograms("layer 2/background")
        values = event.histogram_value
        assert values.num == 2 and values.min == pytest.approx(0.03, rel=1e-5)
    (hyperparameters,) = hparams(in_tmp, "session_start_info")
    shown = hyperparameters.session_start_info.hparams["background"].string_value
    assert shown == ("yes" if background else "no")
    head, _, *rows = [line.split("|") for line in heads_table(model).splitlines()]
    column = [title.strip() for title in head].index("background")
    assert {row[column].strip() for row in rows} == {"0.03" if background else "none"}


def test_skipped_steps_have_a_chart_once_there_are_some(in_tmp):
    board = Dashboard(in_tmp, CONFIG)
    for step, skipped in ((10, 0), (20, 0), (30, 2)):
        board.row(evaluation(step, 3.0) | {"skipped_steps": skipped})
    assert steps(read(in_tmp), "skipped_steps") == [30]


def test_a_directory_that_vanishes_is_made_again(in_tmp):
    log = RunLog(in_tmp / "runs" / "x", CONFIG)
    log.evaluation(evaluation(10, 3.0))
    shutil.rmtree(in_tmp / "runs")
    log.evaluation(evaluation(20, 2.5))
    model, data = small()
    log.dashboard.learned(model, data, 20)
    log.dashboard.projector(model, data.tokenizer, 20)
    log.dashboard.finish(20)
    events = read(in_tmp / "runs" / "x")
    assert steps(events, "val_loss") == [20] and len(texts(events)) == 1
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert len(hparams(in_tmp / "runs" / "x", "session_start_info")) == 1
    (row,) = (in_tmp / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 20
    assert json.loads((in_tmp / "runs" / "x" / "config.json").read_text()) == CONFIG


def test_a_directory_that_cannot_be_written_is_one_line(in_tmp):
    log = RunLog(in_tmp / "runs" / "x", CONFIG)
    shutil.rmtree(in_tmp / "runs")
    (in_tmp / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written .*--resume"):
        log.evaluation(evaluation(10, 3.0))


@pytest.mark.parametrize("what, max_steps", [("events", 600), ("metrics.jsonl", 20000)])
def test_a_disk_that_fills_ends_with_one_line(what, max_steps, in_tmp, small_text):
    """A limit on the size of files stands in for the disk; the saved checkpoint can be resumed."""
    limit = 60_000  # a checkpoint is smaller
    flags = [*TINY, "--data-path", small_text, "--max-steps", max_steps]
    flags += ["--checkpoint-interval", 10, "--eval-interval", 1, "--checkpoint-path", "c/x"]
    # nothing is learned, so that no time goes into writing _best
    flags += ["--hidden-dim", 8, "--sample-tokens", 0, "--learning-rate", 0]
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    process = StartedScript("train_shakespeare.py", flags, in_tmp, prepare=limited)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors.count("\n") == 1, errors
    line = error_line(SimpleNamespace(stderr=errors))
    assert what in line and "free some space" in line and "--resume" in line
    saved = read_checkpoint("c/x_last.pt")["iter"]
    assert saved >= 10
    resumed = train(*flags[len(TINY) :], "--resume", "--max-steps", saved + 5, cwd=in_tmp)
    assert f"resuming at step {saved}" in resumed.stdout
    (directory,) = (in_tmp / "runs").iterdir()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, saved + 6)]
    assert steps(read(directory), "val_loss")[-1] == saved + 5


def test_the_projector_is_bounded(in_tmp, monkeypatch):
    monkeypatch.setattr(tensorboard_log, "PROJECTOR_NUMBERS", 16 * 5)
    model, data = small()
    Dashboard(in_tmp, CONFIG).projector(model, data.tokenizer, 3)
    (tensors,) = in_tmp.rglob("tensors.tsv")
    assert len(tensors.read_text().splitlines()) == 5
    RunLog(in_tmp, CONFIG)  # starts over
    assert sorted(path.name.split(".")[0] for path in in_tmp.iterdir()) == ["config", "events"]


@pytest.fixture
def tensorboard(in_tmp):
    """Starts the real server over runs/ and gives its address."""
    servers = []

    def start():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with open("tensorboard.log", "w") as log:
            servers.append(subprocess.Popen(command, stdout=log, stderr=log))
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                runs = urllib.request.urlopen(f"{address}/data/runs", timeout=5).read()
                if len(json.loads(runs)) == 2:
                    return address
            except OSError:
                assert servers[0].poll() is None
            time.sleep(0.1)
        raise AssertionError((in_tmp / "tensorboard.log").read_text())

    yield start
    for server in servers:
        server.terminate()
        server.wait()


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_real_page(in_tmp, tensorboard):
    """NGT and vanilla on one chart, their hyperparameters and texts; hostile text stays text."""
    sync_api = pytest.importorskip("playwright.sync_api")
    hostile_name = "<img src=x onerror=alert(5)>"
    letters = map(chr, range(0x21, 0x7F))  # so many that masses are coloured as numbers
    tokenizer = CharTokenizer([*HOSTILE, "\x1b]0;title\x07", *letters])
    for name, kind, loss in ((hostile_name, "vanilla", 3.0), ("ngt", "ngt", 2.0)):
        log = RunLog(in_tmp / "runs" / name, CONFIG | {"model": kind})
        model, data = small(kind, tokenizer)
        torch.nn.init.normal_(getattr(model, "mass_emb", model.token_emb).weight)
        for step in (10, 20, 30):
            log.evaluation(evaluation(step, loss - step / 100))
            log.dashboard.learned(model, data, step)
        log.dashboard.projector(model, tokenizer, 30)
        log.dashboard.finish(30)
    address = tensorboard()
    swiftshader = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", *swiftshader]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(12_000)
        dialogs = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))

        page.goto(f"{address}/#custom_scalars")
        for axis in ("steps", "tokens", "seconds of training"):
            page.get_by_text(f"validation loss against {axis}", exact=True).wait_for()
        page.get_by_text("Matches (2)", exact=True).first.wait_for()
        page.get_by_text(hostile_name, exact=True).first.wait_for()
        page.screenshot(path="custom_scalars.png")

        page.goto(f"{address}/#hparams")
        page.reload()
        page.get_by_text("vanilla", exact=True).first.wait_for()
        for cell in ("law", "pos", "newton", "learned", "1.7000", "2.7000"):
            page.get_by_text(cell, exact=True).first.wait_for()
        page.screenshot(path="hparams.png")

        page.goto(f"{address}/#text")
        page.reload()
        page.get_by_text(HOSTILE[0]).first.wait_for()
        assert page.get_by_text("\\x1b]0;title\\x07").count()
        for said in ("The validation text begins:", "The model continues:", "in the tab PROJECTOR"):
            assert page.get_by_text(said).count()
        page.screenshot(path="text.png")

        page.goto(f"{address}/#projector")
        page.reload()
        projector = page.frame_locator("iframe").frame_locator("iframe")
        projector.locator("#colorby").click()
        projector.locator("#colorby paper-item", has_text="mass").click()
        projector.locator("vz-projector-colorlegend, vz-projector-legend").first.wait_for()
        search = projector.locator("vz-projector-inspector-panel input").first
        search.fill("script")
        search.press("Enter")
        found = projector.locator("vz-projector-inspector-panel .matches-list")
        found.get_by_text("alert(1)").first.click()
        projector.locator("vz-projector-metadata-card").get_by_text("alert(1)").first.wait_for()
        page.screenshot(path="projector.png")
        executed = [frame.evaluate("window.executed") for frame in page.frames]
        assert executed == [None] * len(page.frames) and dialogs == []
        browser.close()
