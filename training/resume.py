"""Reads the checkpoint that a training continues; refuses one that no run can have written."""

from collections import defaultdict
from pathlib import Path

from engine.checkpoint import read_checkpoint, tokenizer_of
from engine.first_release import is_first_release
from system.errors import UserError, warn
from system.settings import objection
from text.corpora import SHAKESPEARES
from training.config import DEFAULTS, SETTINGS

# A checkpoint may come from a stranger, so it must not make this machine run out of memory or
# time. Real runs stay far below: 2^28 tokens of activations fit no machine.
LARGEST_ALLOWED = defaultdict(lambda: 1 << 31, seed=1 << 63, sample_tokens=100_000)
MOST_TOKENS_PER_MICRO_STEP = 1 << 28
MOST_TOKENS_PER_STEP = 1 << 33
LONGEST_SETTING = 4096  # characters


def read_to_resume(path):
    """Read the checkpoint that training continues.

    Raises:
        UserError: if it is damaged, of the first release, or lacks what resuming needs.
    """
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; name a good one with --resume-from") from None
    if is_first_release(checkpoint):
        raise UserError(
            f"{path} is of the first release: it can be chatted with and mapped, not resumed; "
            "start anew with --law published and another --checkpoint-path"
        )
    wanted = {"optimizer_state", "iter", "best_val", "rng_state", "scaler_state", "data_state"}
    settings = {"model", "dataset", "max_steps", "source_sha256", "tokenizer_sha256"}
    if not wanted <= checkpoint.keys() or not settings <= checkpoint["config"].keys():
        raise UserError(f"{path} lacks what resuming needs: name another with --resume-from")
    check_saved_settings(checkpoint["config"], path)
    forget_missing_text(checkpoint["config"])
    return checkpoint


def check_saved_settings(config, path):
    """Refuse settings of a checkpoint that the command line would refuse.

    Raises:
        UserError: for the first of them.
    """
    for name in SETTINGS:
        if name in config and not _is_acceptable(name, config[name]):
            raise UserError(f"{path} has an impossible {name}: use another checkpoint")
    # a checkpoint names the kind of model twice
    if config["model"] != config["model_type"]:
        raise UserError(f"{path} has an impossible model: use another checkpoint")
    c = DEFAULTS | config
    tokens = c["batch_size"] * c["block_size"]
    per_step = tokens * c["gradient_accumulation_steps"]
    if tokens > MOST_TOKENS_PER_MICRO_STEP or per_step > MOST_TOKENS_PER_STEP:
        raise UserError(f"{path} trains on {tokens:,} tokens at once: use another checkpoint")


def _is_acceptable(name, value):
    if isinstance(value, int) and abs(value) >= LARGEST_ALLOWED[name]:
        return False
    if type(value) not in (bool, int, float, str, type(None)):
        return False
    return len(str(value)) <= LONGEST_SETTING and objection(SETTINGS[name], value) is None


def forget_missing_text(config):
    """Take the public Shakespeare for a checkpoint that was trained on it under another path.

    Runs of earlier versions took it if --data-path did not exist.
    """
    path = config.get("data_path")
    is_public = config["dataset"] == "shakespeare" and config["source_sha256"] in [*SHAKESPEARES]
    if is_public and path is not None and not Path(path).exists():
        config["data_path"] = None


def tokenizer_to_resume(args, checkpoint, path):
    """The BPE tokenizer in a checkpoint, so that no file of it is needed; None if there is none, or
    if the user names a file that exists.

    Args:
        path: of the checkpoint, for messages.

    Raises:
        UserError: if it is damaged.
    """
    if checkpoint is None or checkpoint["config"].get("tokenizer") != "bpe":
        return None
    named = args.tokenizer_path
    if named is not None and Path(named).exists():
        return None
    if named is not None:  # a new run would train it
        warn(f"--tokenizer-path {named} does not exist: using the tokenizer in {path}")
    return tokenizer_of(checkpoint, path)
