"""`--shard model` on several ranks, against the same steps on one; what it refuses."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from engine.checkpoint import save_checkpoint
from script_runner import run_on_ranks
from sharded_steps import BAD, STEPS, take_steps
from small_runs import SMALL, same
from system.errors import UsageError
from training.config import DEFAULTS, resolve
from training.config_file import take_from_file
from training.options import train_parser
from training.ranks import Ranks
from training.resume import read_to_resume
from training.sharding import Cut, check_shard, place

# no number of rows but those of the embedding fits both 2 and 4 ranks
UNEVEN = ("--hidden-dim", 30, "--num-heads", 3, "--mlp-dim", 35, "--repulsion")


def parsed(*flags):
    return train_parser("", "").parse_args([str(flag) for flag in flags])


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_steps_are_those_of_one_process(ranks, make_trainer, in_tmp, small_text):
    """With Muon, single numbers, repulsion, accumulation, parts of unequal size, and a step that is
    not finite on some ranks only."""
    # outputs that start at 0 would give single numbers no gradient at first
    flags = ("--recipe", "modern", "--no-zero-init-outputs", *UNEVEN)
    more = ("--data-path", small_text, "--dropout", 0, "--shard", "model")
    run_on_ranks(in_tmp, ranks, "tests/sharded_steps.py", *SMALL, *more, *flags)
    found = torch.load(in_tmp / "steps.pt", weights_only=False)
    one = make_trainer(*flags)
    expected = take_steps(one)
    assert found["results"] == [pytest.approx(x, rel=1e-4, nan_ok=True) for x in expected]
    state, of_one = found["state"], one.state()
    assert state["data_state"]["skipped"] == 1 and math.isnan(found["results"][BAD][0])
    assert [*state["model_state"]] == [*of_one["model_state"]]
    for name, weight in of_one["model_state"].items():
        torch.testing.assert_close(state["model_state"][name], weight, atol=1e-4, rtol=0)
    averages, of_one = (x["optimizer_state"]["state"] for x in (state, of_one))
    assert averages.keys() == of_one.keys() and averages[0]["step"] == STEPS - 1
    for number, expected in of_one.items():
        for name, average in expected.items():
            torch.testing.assert_close(averages[number][name], average, atol=2e-4, rtol=1e-2)

    # each rank keeps what torch.chunk gives it, and the optimizer's averages of that only
    for name, weight in one.raw_model.named_parameters():
        chunks = torch.chunk(weight, ranks) if weight.dim() else [weight] * ranks
        lengths = [tuple(chunk.shape) for chunk in chunks]
        lengths += [(0, *weight.shape[1:])] * (ranks - len(chunks))
        assert [shapes[name] for shapes, _ in found["kept"]] == lengths, name
    numbers = sum(x.numel() for part in averages.values() for x in part.values() if x.dim())
    assert sum(count for _, count in found["kept"]) == numbers
    assert max(count for _, count in found["kept"]) < 1.1 * numbers / ranks

    # one process continues where several stopped, and the model to look at is this model
    one.restore(state, "c.pt")
    one.raw_model.eval()
    torch.testing.assert_close(found["logits"], one.raw_model(torch.arange(12)[None]).detach())
    one.raw_model.train()
    assert one.step() == pytest.approx(found["next"], rel=1e-4)
    # an overflow of fp16 on one rank is one on all
    assert same(found["before"], found["after"])


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_are_torchs_chunks(rows, ranks):
    chunks = torch.zeros(rows, 3).chunk(ranks)
    numbers = [chunk.numel() for chunk in chunks] + [0] * (ranks - len(chunks))
    assert Cut(torch.Size((rows, 3)), Ranks(0, ranks)).numbers() == numbers


def test_what_cannot_be_sharded_is_refused():
    """In one line with the remedy; a resumed run or a file may say it to one process."""
    args, config = parsed("--shard", "model"), DEFAULTS | {"shard": "model"}
    with pytest.raises(UsageError, match="start with torchrun --nproc_per_node=2, or drop"):
        check_shard(args, dict(config), Ranks())
    with pytest.raises(UsageError, match="give --no-compile or --shard optimizer"):
        check_shard(args, config | {"compile": True}, Ranks(0, 2))
    with pytest.raises(UsageError, match="does not work on mps: give --device cpu or --shard opt"):
        place(None, config, torch.device("mps"), Ranks(0, 2))
    check_shard(args, config, Ranks(0, 2))
    assert config["shard"] == "model"


def test_one_process_has_nothing_to_shard(capsys):
    """Its config says so; it warns if a checkpoint or a file wanted more."""
    for shard, lines in (("model", 1), ("optimizer", 0), ("none", 0)):
        for args in (parsed(), SimpleNamespace(shard=shard, from_file={"shard"})):
            config = {"shard": shard, "compile": True}
            check_shard(args, config, Ranks())
            assert config["shard"] == "none"
            assert capsys.readouterr().err.count("--shard model has no effect") == lines


def test_the_old_flag_and_what_it_left_behind(make_trainer, in_tmp):
    """--shard-optimizer, its opposite, and both in older checkpoints and config files."""
    assert parsed("--shard-optimizer").shard == "optimizer"
    assert parsed("--no-shard-optimizer").shard == "none" and parsed().shard is None
    state = make_trainer().state()
    for before, after in ((True, "optimizer"), (False, "none")):
        config = state["config"] | {"shard_optimizer": before}
        del config["shard"]
        save_checkpoint("c.pt", state | {"config": config})
        assert resolve(parsed(), read_to_resume("c.pt")["config"])["shard"] == after
        given = parsed("--shard", "model")
        assert resolve(given, read_to_resume("c.pt")["config"])["shard"] == "model"
        (in_tmp / "config.json").write_text(json.dumps(config))
        args = parsed("--config", "config.json")
        take_from_file(args)
        assert (args.shard or "none") == after
