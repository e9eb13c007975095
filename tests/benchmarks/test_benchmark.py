"""Tests benchmark.py: it times the real models, writes all numbers, and reports bad input clearly.

No speed is asserted.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import make_parser
from benchmarks import attention, correctness, models, timing
from benchmarks.plain_gpt import PlainGPT, PlainTraining
from benchmarks.training import first_release_attention, make_trainer, step_bytes
from conftest import ROOT, error_line, needs_bf16, run
from engine.flops import training_flops
from engine.models import build_model
from gravity.attention import gravity_attention
from gravity.published import published_gravity_attention
from system.machine import cpu_multiplies_bf16
from training.config import DEFAULTS

TINY = ("--preset", "shakespeare", "--batch-size", "2", "--block-size", "16", "--steps", "2")


def arguments(*words):
    return make_parser().parse_args(words)


def all_positive(value):
    """Whether every number in nested dicts and lists is finite and above 0."""
    if isinstance(value, dict):
        return all(all_positive(x) for name, x in value.items() if name != "settings")
    if isinstance(value, list):
        return all(all_positive(x) for x in value)
    return not isinstance(value, (int, float)) or (math.isfinite(value) and value > 0)


def numbers_of(in_tmp, *words):
    said = run("benchmark.py", *words, "--json", "out.json", cwd=in_tmp, check=0).stdout
    assert ("operations a step" in said) == ("--profile" in words)
    numbers = json.loads((in_tmp / "out.json").read_text())
    assert all_positive(numbers) and "PyTorch" in numbers["machine"]
    return numbers


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_train_writes_what_was_promised(in_tmp, dtype):
    only = ("--no-peak",) if dtype == "bf16" else ()  # `test_train_with_another_law` measures it
    numbers = numbers_of(in_tmp, "train", *TINY, "--dtype", dtype, *only)
    promised = "ngt_tokens_per_s vanilla_tokens_per_s ratio ngt_peak_bytes vanilla_peak_bytes"
    assert set(promised.split()) <= numbers.keys()
    assert len(numbers["ratio_rounds"]) == 2 and 0 < numbers["ngt_mfu"] < 1
    # weights, gradients and two moments are 16 bytes a parameter, a Python with PyTorch 100 MB
    for name in () if only else ("ngt", "vanilla"):
        assert 13e6 + 1e8 < numbers[f"{name}_peak_bytes"] < 4e9


def test_train_of_one_model_and_of_the_published_law(in_tmp):
    numbers = numbers_of(in_tmp, "train", *TINY, "--model", "vanilla", "--profile", "--no-peak")
    assert "vanilla_tokens_per_s" in numbers and "ratio" not in numbers
    numbers = numbers_of(in_tmp, "train", *TINY, "--law", "published", "--against", "first-release")
    assert {"ratio", "first_release_tokens_per_s", "first_release_peak_bytes"} <= numbers.keys()


def test_train_against_plain_gpt2_and_vanilla_in_one_run(in_tmp):
    flags = ("--against", "eager", "vanilla", "--no-peak")
    numbers = numbers_of(in_tmp, "train", *TINY, *flags)
    assert numbers["ratio"] == numbers["eager_ratio"] and numbers["vanilla_ratio"] > 0
    assert numbers["eager_peak_bytes"] is None
    # 66 tokens, 16 positions, per layer 12 width^2 and two LayerNorms without bias, one at the end
    weights = 128 * (66 + 16) + 4 * (12 * 128**2 + 2 * 128) + 128
    assert numbers["eager_parameters"] == weights


def test_plain_gpt2_is_the_vanilla_model():
    """The same logits from the same weights, and a training that learns."""
    sizes = dict(vocab_size=31, block_size=12, hidden_dim=32, mlp_dim=48, num_layers=2, num_heads=4)
    plain = PlainGPT(SimpleNamespace(**sizes), bias=True).double()
    vanilla = build_model(DEFAULTS | sizes | {"model_type": "vanilla"}).double()
    weights = dict(plain.named_parameters())
    for parameter in weights.values():
        torch.nn.init.normal_(parameter, std=0.3)
    same = {"out": "attn.out_proj", "norm1": "norm1", "norm2": "norm2"}
    same |= {"up": "ffn.up_proj", "down": "ffn.down_proj"}
    with torch.no_grad():
        for one, other in ((plain.token_emb, vanilla.token_emb), (plain.pos_emb, vanilla.pos_emb)):
            other.weight.copy_(one.weight)
        vanilla.norm.load_state_dict(plain.norm.state_dict())
        for plainly, layer in zip(plain.layers, vanilla.layers, strict=True):
            for name, place in same.items():
                layer.get_submodule(place).load_state_dict(getattr(plainly, name).state_dict())
            for n, name in enumerate("qkv"):
                part, proj = slice(32 * n, 32 * n + 32), getattr(layer.attn, f"{name}_proj")
                proj.weight.copy_(plainly.qkv.weight[part])
                proj.bias.copy_(plainly.qkv.bias[part])
    tokens = torch.randint(31, (2, 12))
    assert (plain(tokens) - vanilla(tokens)).abs().max() < 1e-10
    tokens = np.arange(400).astype(np.uint16) % 31
    config = sizes | {"batch_size": 4}
    training = PlainTraining(config, tokens, torch.device("cpu"), torch.float32, compiled=False)
    window = torch.arange(13)[None]
    losses = []
    for steps in (0, 100):
        for _ in range(steps):
            training.step()
        with torch.no_grad():
            losses.append(float(training.raw_model(window[:, :-1], window[:, 1:])))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.slow
def test_train_against_compiled(in_tmp):
    numbers = numbers_of(in_tmp, "train", *TINY, "--against", "compiled")
    assert numbers["compiled_peak_bytes"] > 1e8


def test_train_with_another_law(in_tmp):
    """A background and no radius as in training, or what the flags say; the process that measures
    the peak reads them too."""
    flags = ("--no-background", "--radius-cutoff")
    for given, has_background in (((), True), (flags, False)):
        trainer = make_trainer(arguments("train", *TINY, *given), "ngt", torch.device("cpu"))
        attn = trainer.raw_model.layers[0].attn
        assert (attn.background is not None) == (attn.radius is None) == has_background
    flags += ("--dtype", "bf16") if cpu_multiplies_bf16() else ()
    numbers = numbers_of(in_tmp, "train", *TINY, *flags, "--model", "ngt")
    assert 13e6 + 1e8 < numbers["ngt_peak_bytes"] < 4e9


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_rows(in_tmp, dtype):
    numbers = numbers_of(
        *(in_tmp, "attention", "--block-sizes", "7,64", "--steps", "2", "--dtype", dtype),
        *("--batch-tokens", "21"),
    )
    assert [row["block_size"] for row in numbers["rows"]] == [7, 64]
    assert [row["batch_size"] for row in numbers["rows"]] == [3, 1]
    for row in numbers["rows"]:
        assert row["ratio"] == row["sdpa_ratio"] and row["sdpa_ms"] > 0
        assert {"ngt_tokens_per_s", "vanilla_tokens_per_s", "ratio"} <= row.keys()


@pytest.mark.parametrize("law", [(), ("--no-background",)], ids=str)
def test_attention_with_a_checkpoint_and_decode(in_tmp, small_text, law):
    """The points, masses and values timed are those of the checkpoint on its text."""
    run(
        *("train_shakespeare.py", "--dataset", "text", "--data-path", small_text, *law),
        *("--tokenizer", "char", "--max-steps", "2", "--hidden-dim", "16", "--num-heads", "2"),
        *("--num-layers", "2", "--block-size", "16", "--checkpoint-path", "checkpoints/a.pt"),
        cwd=in_tmp,
        check=0,
    )
    checkpoint = "checkpoints/a.pt_best.pt"
    numbers = numbers_of(
        *(in_tmp, "attention", "--checkpoint", checkpoint, "--block-sizes", "40", "--steps", "1")
    )
    assert numbers["rows"][0]["heads"] == 2
    network, tokenizer, contents = models.load_newton(checkpoint, "cpu")
    args = SimpleNamespace(checkpoint=checkpoint, text=str(small_text))
    tokens = models.some_tokens(args, network, tokenizer, contents, 40)
    assert tokenizer.decode(tokens.tolist()) == small_text.read_text()[:40]
    calls = attention.operator_inputs(network, tokens[None])
    assert len(calls) == 2 and torch.equal(calls[0]["mass"], network.mass(tokens[None]))
    timed = len(attention.operator_and_inputs(calls[0])[1])
    assert timed == (6 if law else 7)  # with a background its gradient is timed too

    numbers = numbers_of(
        *(in_tmp, "decode", "--checkpoint", checkpoint, "--contexts", "8,33"),
        *("--preset", "shakespeare", "--steps", "2", "--chat-tokens", "30"),
    )
    assert [row["context"] for row in numbers["rows"]] == [8, 33]
    assert numbers["rows"][0]["ngt_speed_of_shortest_context"] == 1
    assert numbers["chat"][-1]["tokens"] == 31 and len(numbers["chat"]) == 10

    result = run("benchmark.py", "attention", "--checkpoint", checkpoint, cwd=in_tmp)
    assert result.returncode == 1 and "longer" in error_line(result)  # valid has 1,200 tokens


SMALL_CHECK = ("correctness", "--batch-size", "2", "--block-size", "17", "--longest", "40")


def test_correctness_writes_rows_at_once(in_tmp):
    """Planned rows first, then each with its numbers, appended to what was there."""
    (in_tmp / "all.jsonl").write_text('{"row": "older"}\n')
    assert benchmark.main([*SMALL_CHECK, "--json", "all.jsonl"]) == 0
    lines = [json.loads(line) for line in (in_tmp / "all.jsonl").read_text().splitlines()]
    planned, found = lines[1:14], lines[14:]
    assert [line["row"] for line in planned] == [line["row"] for line in found]
    assert planned[0]["command"] == "benchmark.py " + " ".join(SMALL_CHECK)
    assert all(line["good"] and line["same_twice"] for line in found) and len(found) == 13
    assert not any("good" in line for line in planned)


@pytest.mark.slow
def test_correctness_in_several_processes(in_tmp):
    numbers = numbers_of(in_tmp, *SMALL_CHECK, "--jobs", "3")
    assert len({row["case"] for row in numbers["rows"]}) == 13


@pytest.mark.parametrize("fault", ["wrong output", "wrong gradient", "NaN", "exception"])
def test_correctness_sees_a_wrong_operator(monkeypatch, fault):
    def wrong(q, k, v, mass, **law):
        if fault == "exception":
            raise RuntimeError("no kernel")
        out = gravity_attention(q, k, v, mass, **law)
        if fault == "wrong gradient":  # of v alone
            return out + 0.1 * (v - v.detach())
        return out * (1.05 if fault == "wrong output" else math.nan)

    monkeypatch.setattr(correctness, "gravity_attention", wrong)
    case = correctness.Case(2, 17, torch.float32)
    found = correctness.compare(case, torch.device("cpu"))
    assert not found["good"]
    assert found.get("failed") == ("no kernel" if fault == "exception" else None)


def test_data(in_tmp, small_text):
    numbers = numbers_of(in_tmp, "data", "--data-path", small_text, "--steps", "1")
    assert numbers["megabytes"] == pytest.approx(0.024)
    names = ("char", "encode_batch", "bpe", "batches")
    assert {f"{name}_mb_per_s" for name in names} <= numbers.keys()


def test_preparing_a_large_text(in_tmp, small_text, monkeypatch):
    """A real preparation of 200 files is watched to its end, and nothing of it stays."""
    (in_tmp / "big").mkdir()
    monkeypatch.setenv("TMPDIR", str(in_tmp / "big"))
    flags = ("--gigabytes", "0.001", "--bpe-vocab-size", "300", "--json", "out.json")
    run("benchmark.py", "data", "--data-path", small_text, *flags, cwd=in_tmp, check=0)
    numbers = json.loads((in_tmp / "out.json").read_text())
    assert numbers["gigabytes"] == pytest.approx(200 * 24_000 / 1e9)  # no file is smaller
    seconds, _, megabytes = zip(*numbers["curve"], strict=True)
    assert list(seconds) == sorted(seconds) and numbers["peak_mb"] == max(megabytes) > 20
    assert numbers["hours_for_target"] > 0.9 * max(seconds) / 3600
    # PyTorch may leave an empty folder
    assert not [path for path in (in_tmp / "big").rglob("*") if path.is_file()]


def test_models_take_turns():
    """Every second round runs in reverse order, and the warm-up round is not counted."""
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.interleaved(functions, 3, torch.device("cpu"), "turns", warm_up=1)
    assert "".join(order) in ("abbaabba", "baabbaab")
    assert [len(x) for x in seconds.values()] == [3, 3]


@pytest.mark.parametrize("cutoff", ["none", "hard", "soft"])
@pytest.mark.parametrize("mass_in_value", [False, True])
def test_first_release_is_the_published_law(cutoff, mass_in_value):
    q, v = torch.randn(2, 3, 30, 16), torch.randn(2, 3, 30, 8)
    mass = torch.rand(2, 30) + 0.5
    law = dict(gamma=torch.rand(3), bias=torch.randn(3), radius=torch.tensor(5.3), cutoff=cutoff)
    if cutoff == "none":
        law["radius"] = None
    both = [
        function(q, q, v, mass, mass, mass_in_value=mass_in_value, **law)
        for function in (first_release_attention, published_gravity_attention)
    ]
    assert (both[0] - both[1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["ngt", "vanilla"])
def test_floor_counts_what_pytorch_counts(name):
    """Flops of all linear layers in forward and backward, against PyTorch's own counter."""
    args = arguments("train", *TINY)
    trainer = make_trainer(args, name, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        trainer.step()
    linear = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if str(operation) in ("aten.mm", "aten.addmm")
    )
    c = trainer.raw_model.config
    width = c.hidden_dim // c.num_heads
    distance = c.head_coord_dim if name == "ngt" else width
    pairs = 2 * 4 * 4 * sum(range(1, 17))  # batch, heads, layers, causal pairs
    flops = training_flops(trainer.raw_model, trainer.tokens_per_step)
    assert flops == pytest.approx(linear + 3 * 2 * (distance + width) * pairs, rel=0.01)
    assert step_bytes(trainer.raw_model) == 40 * sum(
        p.numel() for p in trainer.raw_model.parameters()
    )


BAD = [
    (("train", "--batch-size", "0"), "at least 1"),
    (("train", "--block-size", "-4"), "at least 1"),
    (("train", "--steps", "x"), "is not a whole number"),
    (("train", "--device", "cuda"), "--device"),
    (("train", "--against", "first-release"), "--law published"),
    (("train", "--json", "no/such/folder.json"), "--json"),
    (("attention", "--block-sizes", "0,64"), "at least 1"),
    (("attention", "--block-sizes", "64,"), "is not a whole number"),
    (("attention", "--checkpoint", "missing.pt"), "does not exist"),
    (("attention", "--checkpoint", "a.pt", "--background"), "--background shapes a fresh NGT"),
    (("train", "--law", "published", "--background", "--model", "ngt"), "exclude each other"),
    (("decode", "--contexts", "many"), "is not a whole number"),
    (("data", "--data-path", "missing.txt"), "--data-path"),
    (("scaling", "--ranks", "1,x"), "is not a whole number"),
    (("scaling", "--steps", "5"), "at least 6"),
    (("correctness", "--block-size", "11"), "at least 12"),
    ((), "required"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=str)
def test_bad_input_is_one_line(flags, words, in_tmp):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = run("benchmark.py", *flags, cwd=in_tmp)
    assert result.returncode in (1, 2) and words in error_line(result)


def test_a_checkpoint_of_the_other_model_is_refused(in_tmp, small_text):
    run(
        *("train_shakespeare.py", "--dataset", "text", "--data-path", small_text),
        *("--model", "vanilla", "--tokenizer", "char", "--max-steps", "1", "--hidden-dim", "16"),
        *("--num-layers", "1", "--block-size", "16", "--checkpoint-path", "checkpoints/v.pt"),
        cwd=in_tmp,
        check=0,
    )
    for command in ("attention", "decode", "scaling"):
        result = run(
            "benchmark.py", command, "--checkpoint", "checkpoints/v.pt_best.pt", cwd=in_tmp
        )
        assert result.returncode == 1 and "newton" in error_line(result)


@pytest.mark.parametrize(
    "command", ["train", "attention", "decode", "data", "scaling", "correctness"]
)
def test_help_shows_an_example_and_every_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"python benchmark.py {command}" in text
    assert (ROOT / "benchmark.py").exists()
