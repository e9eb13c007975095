"""Every setting stands in one dataclass field, and its flag and its checks come from there."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from engine.models import CONFIGS, build_model
from system.cli import choose_device
from system.errors import UsageError, UserError
from training import config as module
from training.config import (
    DEFAULTS,
    PRESETS,
    RECIPES,
    SETTINGS,
    described,
    resolve,
    warn_of_no_effect,
)
from training.optimizer import learning_rate, set_learning_rates
from training.options import train_parser
from training.precision import uses_amp_by_default
from training.resume import check_saved_settings


def test_every_setting_has_one_flag_and_is_in_the_config():
    destinations = [action.dest for action in train_parser("", "")._actions]
    assert all(destinations.count(name) == 1 for name in SETTINGS)
    assert resolve(train_parser("", "").parse_args([])).keys() == SETTINGS.keys()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_has_the_defaults_of_its_flags(kind):
    config = CONFIGS[kind](vocab_size=66)
    for name, value in dataclasses.asdict(config).items():
        if DEFAULTS.get(name) is not None:
            assert value == DEFAULTS[name], name


def test_flag_model_and_checkpoint_refuse_the_same_value():
    for name, value in (("num_heads", 0), ("dropout", 1.0), ("law", "einstein"), ("radius", -1.0)):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
            CONFIGS["ngt"](vocab_size=66, **{name: value})
        with pytest.raises(SystemExit):
            train_parser("", "").parse_args([f"--{name.replace('_', '-')}={value}"])
        with pytest.raises(UserError, match=rf"x\.pt has an impossible {name}"):
            check_saved_settings({"model": "ngt", "model_type": "ngt", name: value}, "x.pt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--no-background --background-start 0.01",
            "--background-start has no effect without --background",
        ),
        (
            "--background-start 0.01 --law published",
            "--background-start has no effect under --law published",
        ),
        ("--background --model vanilla", "--background has no effect on --model vanilla"),
        ("--background --background-start 0.01", None),
    ],
)
def test_a_background_where_it_is_not_used(flags, words, capsys):
    """One line of warning, or none if it is used."""
    args = train_parser("", "").parse_args(flags.split())
    warn_of_no_effect(args, resolve(args))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (words is not None) and (words is None or words in lines[0])


def test_a_background_contradicts_the_published_law():
    args = train_parser("", "").parse_args(["--background", "--law", "published"])
    with pytest.raises(UsageError, match="--background and --law published"):
        build_model(resolve(args) | {"vocab_size": 66})


def test_a_checkpoint_that_names_two_kinds_of_model_is_refused():
    check_saved_settings({"model": "ngt", "model_type": "ngt"}, "x.pt")
    with pytest.raises(UserError, match=r"x\.pt has an impossible model"):
        check_saved_settings({"model": "vanilla", "model_type": "ngt"}, "x.pt")


def resolved(*flags, resumed=None):
    return resolve(train_parser("", "").parse_args([str(flag) for flag in flags]), resumed)


def test_a_recipe_gives_defaults_and_flags_win():
    modern = resolved("--recipe", "modern", "--no-qk-norm", "--beta2", 0.9)
    given = {"recipe": "modern", "qk_norm": False, "beta2": 0.9}
    for name, value in (RECIPES["modern"] | given).items():
        assert modern[name] == value, name
    assert (modern["smear"], modern["sink"]) == ("none", False)
    old = resolved("--recipe", "gpt2")
    assert all(old[name] == DEFAULTS[name] for name in RECIPES["modern"])
    assert old == resolved()
    text = resolved("--dataset", "text")
    assert (text["recipe"], text["learning_rate"]) == ("modern", 8e-3)
    published = resolved("--dataset", "text", "--law", "published")
    assert (published["recipe"], published["learning_rate"]) == ("gpt2", 4e-3)


def test_a_checkpoint_says_it_all(capsys):
    """Resuming takes no defaults from a recipe; without one in its config it is of gpt2."""
    saved = resolved("--recipe", "modern", "--norm", "layernorm")
    assert resolved(resumed=saved) == resolved("--recipe", "modern", resumed=saved) == saved
    for name in RECIPES["modern"]:
        older = {key: value for key, value in saved.items() if key not in (name, "recipe")}
        assert resolved("--recipe", "gpt2", resumed=older)[name] == DEFAULTS[name]
        with pytest.raises(UsageError, match="--recipe modern contradicts"):
            resolved("--recipe", "modern", resumed=older)
    assert capsys.readouterr().err == ""
    changed = resolved("--beta2", 0.9, resumed=saved)
    assert changed["beta2"] == 0.9 and "--beta2 changes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, background, cutoff",
    [
        ((), True, False),
        (("--no-background",), False, True),
        (("--radius", 8), True, True),
        (("--use-soft-cutoff",), True, True),
        (("--no-background", "--no-radius-cutoff"), False, False),
        (("--law", "published"), False, True),
    ],
)
def test_a_new_run_has_a_background_or_a_radius(flags, background, cutoff):
    """A checkpoint from before, whose config names no background, has none and keeps its radius."""
    config = resolved(*flags)
    assert (config["background"], config["use_radius_cutoff"]) == (background, cutoff)
    before = {k: v for k, v in resolved().items() if not k.startswith(("background", "use_radius"))}
    resumed = resolved(resumed=before)
    assert (resumed["background"], resumed["use_radius_cutoff"]) == (False, True)


def test_a_new_run_has_the_newest_law_and_a_checkpoint_its_own():
    """A config that names none of these parts is of the law before them."""
    newest = {"coords_from": "state", "retarded_values": True, "repulsion": False}
    older = {"coords_from": "pull", "retarded_values": False, "repulsion": True}
    new, published = resolved(), resolved("--law", "published")
    resumed = resolved(resumed={k: v for k, v in new.items() if k not in newest})
    assert {name: new[name] for name in newest} == newest
    assert {name: published[name] for name in older} == older
    assert {name: resumed[name] for name in older} == older


@pytest.mark.parametrize(
    "flags, minimum",
    [
        ((), 1e-4),
        (("--dataset", "text"), 8e-4),
        (("--dataset", "text", "--recipe", "gpt2"), 4e-4),
        (("--dataset", "wikitext103"), 6e-5),
        (("--learning-rate", 5e-5), 5e-6),
        (("--dataset", "wikitext103", "--learning-rate", 1e-5), 1e-6),
        (("--learning-rate", 5e-5, "--min-learning-rate", 3e-5), 3e-5),
        (("--learning-rate", 0), 0),
    ],
)
def test_the_minimum_rate_follows_the_peak_unless_it_is_given(flags, minimum):
    config = resolved(*flags)
    assert config["min_learning_rate"] == minimum
    low = min(
        learning_rate(step, config) for step in (config["max_steps"], config["max_steps"] + 1)
    )
    assert low == pytest.approx(minimum)


def test_the_minimum_rate_of_a_resumed_run(capsys):
    """A changed peak takes it along; what was chosen, and what an older run had, stays."""
    saved = resolved()
    assert resolved(resumed=saved)["min_learning_rate"] == 1e-4 and not capsys.readouterr().err
    assert resolved("--learning-rate", 5e-5, resumed=saved)["min_learning_rate"] == 5e-6
    assert "--min-learning-rate changes from 0.0001 to 5e-06" in capsys.readouterr().err
    older = saved | {"learning_rate": 5e-5}  # its minimum was the default of its time
    assert resolved(resumed=older) == older
    chosen = resolved("--min-learning-rate", 3e-5)
    assert resolved("--learning-rate", 5e-5, resumed=chosen)["min_learning_rate"] == 3e-5
    both = ("--learning-rate", 5e-5, "--min-learning-rate", 1e-5)
    assert resolved(*both, resumed=saved)["min_learning_rate"] == 1e-5
    # a file of a stranger
    assert resolved(resumed=saved | {"min_learning_rate": None})["min_learning_rate"] == 1e-4


@pytest.mark.parametrize("peak, lowest", [(1e-4, [1e-5, 2e-3]), (0, [0, 2e-3])])
def test_muons_minimum_is_a_tenth_of_its_own_peak(peak, lowest):
    rates = ("--learning-rate", peak, "--matrix-learning-rate", 0.02)
    config = resolved("--recipe", "modern", *rates)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}, {"lr": 1.0, "adjust_lr_fn": ""}])
    set_learning_rates(optimizer, config["max_steps"], config)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(lowest)


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), None),
        (("--learning-rate", 5e-5), None),
        (("--learning-rate", 5e-5, "--min-learning-rate", 1e-4), "stays at 5e-05"),
        (("--min-learning-rate", 1, "--no-use-cosine-schedule"), None),
        (("--warmup-steps", 99, "--max-steps", 100), None),
        (("--max-steps", 100), "rises, to 0.001 of 0.001"),
        (("--warmup-steps", 400, "--max-steps", 100), "rises, to 0.00025 of 0.001"),
    ],
)
def test_a_schedule_that_is_none_is_one_warning(flags, words, capsys):
    module.warn_of_rates(resolved(*flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (words is not None) and (words is None or words in lines[0])


def test_a_preset_may_have_rates_by_recipe_and_kind(monkeypatch):
    modern = {"learning_rate": {"newton": 3e-3, "published": 2e-3, "vanilla": 1e-3}}
    modern |= {"matrix_learning_rate": 5e-3}
    monkeypatch.setitem(PRESETS, "text", PRESETS["text"] | {"modern": modern})
    text = ("--dataset", "text", "--recipe")
    rates = [
        resolved(*text, "modern", *kind)["learning_rate"]
        for kind in ((), ("--law", "published"), ("--model", "vanilla"))
    ]
    assert rates == [3e-3, 2e-3, 1e-3]
    assert resolved(*text, "modern")["matrix_learning_rate"] == 5e-3
    assert resolved(*text, "modern", "--learning-rate", 1)["learning_rate"] == 1
    assert resolved(*text, "gpt2")["learning_rate"] == 4e-3
    assert resolved(*text, "modern").keys() == SETTINGS.keys()
    help = train_parser("", "").format_help()
    assert "0.003 for newton, 0.002 for published, 0.001 for vanilla" in " ".join(help.split())


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--smear", "keys"), "--smear has no effect on --model ngt"),
        (("--sink",), "--sink has no effect on --model ngt"),
        (("--qk-norm", "--recipe", "modern"), "--qk-norm has no effect on --model ngt"),
        (("--model", "vanilla", "--exponent", 3), "--exponent has no effect on --model vanilla"),
        (("--matrix-learning-rate", 0.1, "--recipe", "gpt2"), "--matrix-learning-rate has no"),
    ],
    ids=str,
)
def test_a_flag_without_effect_is_one_warning(flags, named, capsys):
    args = train_parser("", "").parse_args([str(flag) for flag in flags])
    module.warn_of_no_effect(args, resolve(args))
    assert capsys.readouterr().err.count("\n") == 1
    module.warn_of_no_effect(train_parser("", "").parse_args([]), resolve(args))
    assert capsys.readouterr().err == ""


def test_a_model_in_words():
    modern = resolved("--recipe", "modern", "--model", "vanilla", "--smear", "keys", "--sink")
    assert described(modern) == "vanilla (rotary, smear keys, sink, modern)"
    assert described({"model_type": "ngt", "law": "published", "mass_in_value": True}) == (
        "ngt (published, mass in value)"
    )
    assert described({"model_type": "vanilla"}) == "vanilla (learned)"


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    """Otherwise events and graphs are of another GPU: losses are read too early, graphs empty."""
    current = []
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") == current.pop()
    assert choose_device("cuda") == torch.device("cuda") and not current


def test_a_gpu_with_bf16_uses_it_if_nobody_says_otherwise(monkeypatch):
    """New runs only; what was given, and what a resumed run had, stays."""
    for has_bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **_: has)
        assert uses_amp_by_default(torch.device("cuda")) == has_bf16
        assert not uses_amp_by_default(torch.device("cpu"))
    parser = train_parser("", "")
    assert resolve(parser.parse_args([]))["use_amp"] is None
    assert resolve(parser.parse_args(["--no-use-amp"]))["use_amp"] is False
    for resumed in ({"use_amp": True}, {"use_amp": False}, {}):
        resumed = {"model_type": "ngt"} | resumed
        kept = resolve(parser.parse_args([]), resumed)["use_amp"]
        assert kept is resumed.get("use_amp", False)
