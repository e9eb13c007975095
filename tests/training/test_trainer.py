"""One training step, its optimizer and its precision, against PyTorch's own arithmetic."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from engine.models import build_model
from small_models import SMALL as SMALL_MODEL
from small_runs import same
from training import trainer as training_trainer
from training.loop import check_skipped, evaluation_row
from training.optimizer import learning_rate


@pytest.fixture
def trainer(make_trainer):
    return make_trainer()


@pytest.mark.parametrize("kind", ["ngt", "vanilla"])
def test_a_compiled_step_is_one_graph(kind):
    """Loss included; nothing is left to the interpreter, and loss and gradients are the same."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    config = {"model_type": kind, "mlp_dim": 32, "background": True, "use_radius_cutoff": False}
    model = build_model(SMALL_MODEL | config)
    batch = torch.randint(29, (2, 3, 16))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_trainer.forward, fullgraph=True, backend=counter)
    found = []
    for function in (training_trainer.forward, compiled):
        model.zero_grad()
        loss, z, mass = function(model, *batch, kind == "ngt")
        (loss if z is None else loss + z.square().mean() + mass.mean()).backward()
        found.append([loss, z, mass, {n: p.grad for n, p in model.named_parameters()}])
    # what is compiled on a CPU without the compiler rounds differently
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_accumulation_is_the_mean_over_micro_steps(trainer):
    """The gradient of two micro-steps equals that of both batches at once."""
    from data import get_batch

    seen = {}
    trainer.optimizer.step = lambda *_: seen.update(
        {n: p.grad.clone() for n, p in trainer.raw_model.named_parameters() if p.requires_grad}
    )
    trainer.config["grad_clip"] = 0.0
    trainer.step()
    batches = [get_batch(trainer.data.train, 4, 16, trainer.config["seed"], 0, m) for m in (0, 1)]
    inputs, targets = (torch.cat(pair) for pair in zip(*batches, strict=True))
    logits = trainer.raw_model(inputs)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in trainer.raw_model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(seen.pop(name), parameter.grad, atol=1e-6), name
    assert not seen


def test_what_only_repulsion_needs_rests_without_it(make_trainer):
    """The last layer's motion: no gradient, no step, no decay; with repulsion it learns."""
    moved = {}
    for repulsion in (False, True):
        trainer = make_trainer("--repulsion" if repulsion else "--no-repulsion")
        before = {n: p.detach().clone() for n, p in trainer.raw_model.named_parameters()}
        for _ in range(2):
            trainer.step()
        moved[repulsion] = {
            n for n, p in trainer.raw_model.named_parameters() if not torch.equal(p, before[n])
        }
    last = f"layers.{len(trainer.raw_model.layers) - 1}."
    rests = {n for n in moved[True] if n.startswith((last + "coord_proj", last + "coord_norm"))}
    assert len(rests) == 4 and moved[True] - moved[False] == rests


def test_weight_decay_is_on_matrices_only(trainer):
    decay, keep = trainer.optimizer.param_groups
    assert decay["weight_decay"] == 0.1 and keep["weight_decay"] == 0
    names = {id(p): name for name, p in trainer.raw_model.named_parameters()}
    kept = {names[id(p)] for p in keep["params"]}
    assert "mass_emb.weight" in kept and "layers.0.attn.time_scale_raw" in kept
    decayed = {names[id(p)] for p in decay["params"]}
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert "layers.0.attn.probe_proj.weight" in decayed


def test_learning_rate_schedule():
    config = {
        **{"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 10},
        **{"max_steps": 110, "use_cosine_schedule": True},
    }
    rate = [learning_rate(step, config) for step in (0, 9, 10, 60, 110)]
    assert rate == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])
    config["use_cosine_schedule"] = False
    assert learning_rate(100, config) == 1.0


def test_a_step_that_is_not_finite_changes_nothing(trainer):
    """One NaN loss: weights and optimizer stay, it is counted, and the next step works."""
    trainer.step()
    before = {k: v.clone() for k, v in trainer.raw_model.state_dict().items()}
    loss = trainer.loss
    trainer.loss = lambda *args: tuple(x * float("nan") for x in loss(*args))
    trainer.step()
    assert same(before, trainer.raw_model.state_dict())
    assert trainer.progress["skipped"] == trainer.progress["skipped_in_a_row"] == 1
    trainer.loss = loss
    trainer.step()
    assert not same(before, trainer.raw_model.state_dict())
    assert trainer.progress["skipped_in_a_row"] == 0 and trainer.progress["skipped"] == 1


def with_one_bad_loss(trainer, steps, bad):
    """Take steps, one of them with a loss that is NaN; returns what each returned."""
    loss, results = trainer.loss, []
    for step in range(steps):
        factor = float("nan") if step == bad else 1.0
        trainer.loss = lambda *args, factor=factor: tuple(x * factor for x in loss(*args))
        results.append(trainer.step())
    return results


def test_a_skipped_step_is_told_once(capsys):
    """Of a GPU's steps none, one or two are read between two looks."""
    looks = [(0, 3), (1, 4), (1, 4), (2, 5), (0, 6), (2, 8), (3, 9)]  # in a row, steps read
    before = 0
    for in_a_row, read in looks:
        progress, config = {"skipped_in_a_row": in_a_row}, {"max_skipped_steps": 10}
        trainer = SimpleNamespace(progress=progress, steps_read=read, config=config)
        check_skipped(trainer, None, before)
        before = in_a_row
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["step 4", "step 7"]


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_running_ahead_changes_nothing(recipe, make_trainer):
    """A trainer that reads its losses late and leaves out a bad step on the device, as on a GPU,
    against one that waits."""
    flags = ("--recipe", recipe, "--block-size", 80)
    waiting, ahead = make_trainer(*flags), make_trainer(*flags, runs_ahead=True)
    expected, read = (with_one_bad_loss(each, 8, bad=4) for each in (waiting, ahead))
    assert ahead.steps_read == 7 and waiting.steps_read == 8
    read = [*read[:1], *read[2:], ahead.settle()]
    assert read == [pytest.approx(numbers, rel=1e-4, nan_ok=True) for numbers in expected]
    assert math.isnan(read[4][0]) and ahead.progress["skipped"] == 1
    assert ahead.progress == pytest.approx(waiting.progress, rel=1e-5)
    one, other = waiting.state(), ahead.state()
    for name, weight in one["model_state"].items():
        assert torch.allclose(weight, other["model_state"][name], atol=1e-4), name
    # AdamW's count of steps is without the bad one
    assert one["optimizer_state"]["state"][0]["step"] == 7
    assert other["optimizer_state"]["state"][0]["step"] == 7


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
@pytest.mark.parametrize("first, then", [(True, True), (True, False), (False, True)])
def test_a_run_continues_on_another_kind_of_device(recipe, first, then, make_trainer):
    """A checkpoint of a GPU resumes on a CPU and back; on the same kind bit for bit."""
    flags = ("--recipe", recipe)
    whole, before = (make_trainer(*flags, runs_ahead=first) for _ in range(2))
    for _ in range(6):
        whole.step()
    for _ in range(3):
        before.step()
    after = make_trainer(*flags, runs_ahead=then)
    checkpoint = copy.deepcopy(before.state())
    assert type(checkpoint["optimizer_state"]["param_groups"][0]["lr"]) is float
    after.restore(checkpoint, "c.pt")
    for _ in range(3):
        after.step()
    one, other = whole.state(), after.state()
    if first == then:
        for key in ("model_state", "optimizer_state", "rng_state", "data_state"):
            assert same(one[key], other[key]), key
    for name, weight in one["model_state"].items():
        assert torch.allclose(weight, other["model_state"][name], atol=1e-4), name


def test_evaluation_is_without_dropout_and_counts_bytes(trainer):
    for module in trainer.raw_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trainer.data.meta["splits"]["valid"]["bytes"] *= 3
    rows = [evaluation_row(trainer, 0.0, 1, 1.0) for _ in range(2)]
    assert rows[0]["val_loss"] == rows[1]["val_loss"] and trainer.raw_model.training
    bits = rows[0]["val_loss"] / math.log(2) / 3
    assert rows[0]["bits_per_byte"] == pytest.approx(bits)


def test_autocast_trains_in_bf16(trainer):
    """The losses of a step in bf16 and in fp32 agree to the precision of bf16."""
    from data import get_batch

    inputs, targets = get_batch(trainer.data.train, 4, 16, 0, 0)
    exact = float(trainer.loss(inputs, targets, False)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = trainer.loss(inputs, targets, False)
    assert rounded.item() == pytest.approx(exact, rel=1e-2) and rounded.item() != exact
    rounded.backward()
    assert all(
        bool(torch.isfinite(p.grad).all())
        for p in trainer.raw_model.parameters()
        if p.grad is not None
    )


def test_a_compiler_that_torch_compile_cannot_call(monkeypatch, capsys):
    """It takes a single word: training goes on uncompiled, with one warning."""
    config, device = {"compile": True}, torch.device("cpu")
    monkeypatch.setenv("CXX", "env g++")
    assert training_trainer.maybe_compile(math.sqrt, config, device) is math.sqrt
    assert capsys.readouterr().err.count("warning: --compile needs a C++ compiler") == 1
