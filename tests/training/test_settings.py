"""Every setting stands in one dataclass field, and its flag and its checks come from there."""

import dataclasses

import pytest

from engine.models import MODELS, build_model
from system.errors import UsageError, UserError
from training.config import DEFAULTS, SETTINGS, resolve, warn_of_no_effect
from training.options import train_parser
from training.resume import check_saved_settings


def test_every_setting_has_one_flag_and_is_in_the_config():
    destinations = [action.dest for action in train_parser("", "")._actions]
    assert all(destinations.count(name) == 1 for name in SETTINGS)
    assert resolve(train_parser("", "").parse_args([])).keys() == SETTINGS.keys()


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_has_the_defaults_of_its_flags(kind):
    config = MODELS[kind][1](vocab_size=66)
    for name, value in dataclasses.asdict(config).items():
        if DEFAULTS.get(name) is not None:
            assert value == DEFAULTS[name], name


def test_flag_model_and_checkpoint_refuse_the_same_value():
    for name, value in (("num_heads", 0), ("dropout", 1.0), ("law", "einstein"), ("radius", -1.0)):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
            MODELS["ngt"][1](vocab_size=66, **{name: value})
        with pytest.raises(SystemExit):
            train_parser("", "").parse_args([f"--{name.replace('_', '-')}={value}"])
        with pytest.raises(UserError, match=rf"x\.pt has an impossible {name}"):
            check_saved_settings({"model": "ngt", "model_type": "ngt", name: value}, "x.pt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--background-start 0.01", "--background-start has no effect without --background"),
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
