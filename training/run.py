"""One process's part of a run, from its flags to its exit code."""

import math
import os
from pathlib import Path

import torch

from data import check_long_enough, eval_windows
from engine.checkpoint import check_writable
from engine.models import model_config
from gravity.trial import computes
from system.cli import choose_device
from system.errors import UsageError, UserError, warn
from system.machine import code_version, machine
from system.threads import choose_threads
from text.preparation import check_tokenizer_file, prepare_data
from text.token_files import TokenFilesError, open_token_data
from training.config import (
    CORPUS,
    DEFAULTS,
    described,
    resolve,
    warn_of_no_effect,
    warn_of_rates,
)
from training.config_file import take_from_file
from training.loop import loop
from training.precision import uses_amp_by_default
from training.ranks import is_restarted
from training.resume import read_to_resume, tokenizer_to_resume
from training.run_files import RunFiles
from training.run_log import RunLog
from training.sharding import check_shard
from training.trainer import Trainer


def run(args, ranks, words):
    """Train as the flags say.

    Args:
        args: what `train_parser` returned.
        ranks: the processes that train together, this one included.
        words: the flags as typed, for the run's log.

    Returns:
        The exit code.

    Raises:
        UserError: if a flag, a file or the machine does not allow it.
    """
    if args.config is not None:
        take_from_file(args)
    files = RunFiles(_checkpoint_path(args), args.run_name)
    # torchrun repeats the same flags after a crash; the run must continue, not start over
    if is_restarted() and files.has_begun():
        args.resume, args.overwrite = True, False
        if files.last.exists():
            args.resume_from = None
    source = _source(args, files)
    checkpoint = None if source is None else read_to_resume(source)
    config = resolve(args, checkpoint and checkpoint["config"])
    _check(args, config, checkpoint, ranks)
    if not args.overwrite:
        files.check_nothing_is_lost(source, args.resume)
    warn_of_no_effect(args, config)
    warn_of_rates(config)
    trainer = _set_up(config, ranks, tokenizer_to_resume(args, checkpoint, source))
    _check_same_files(trainer, checkpoint)
    _choose_threads(trainer, args.threads, checkpoint)
    if checkpoint is not None:
        trainer.restore(checkpoint, source)
        # another run's best checkpoint is not among this run's files
        if not files.is_own(source) or _windows_changed(trainer, checkpoint["config"], files.best):
            trainer.best_val = math.inf
    _announce(trainer)
    ranks.wait()  # no rank writes before every rank has looked at what is on disk
    if args.dry_run:
        return 0
    if not ranks.is_main:
        return _train(trainer, files, source, words)
    with files.locked():
        check_writable(files.path)
        if args.overwrite and not files.is_own(source):
            files.set_aside()
        return _train(trainer, files, source, words)


def _checkpoint_path(args):
    """PATH of PATH_best.pt and PATH_last.pt: as given, that of --resume-from, or the dataset's."""
    if args.checkpoint_path is not None:
        return args.checkpoint_path
    if args.resume_from is not None:
        return args.resume_from  # `RunFiles` takes the names of these files too
    suffix = "_vanilla" if args.model_type == "vanilla" else ""
    return f"checkpoints/{args.dataset or DEFAULTS['dataset']}{suffix}.pt"


def _source(args, files):
    """The checkpoint to continue from, or None for a new run."""
    if args.resume_from:
        return Path(args.resume_from)
    source = files.to_resume() if args.resume else None
    if args.resume and source is None:
        print(f"nothing to resume at {files.last}: starting a new run")
    return source


def _check(args, config, checkpoint, ranks):
    """Refuse flags that cannot work here, before any text is fetched."""
    check_tokenizer_file(args.tokenizer_path, args.bpe_vocab_size)
    if checkpoint is not None:
        other_end = config["max_steps"] != checkpoint["config"]["max_steps"]
        if other_end and config["use_cosine_schedule"]:
            warn("another --max-steps changes the learning-rate cosine from here on")
    if config["batch_size"] % ranks.size:
        raise UsageError(
            f"--batch-size {config['batch_size']} cannot be shared out among {ranks.size} "
            f"processes: give a multiple of {ranks.size}"
        )
    check_shard(args, config, ranks)
    model_config(config | {"vocab_size": 1})  # refuses impossible sizes


def _set_up(config, ranks, tokenizer):
    """The trainer of a run, before its first step; `tokenizer` is the checkpoint's, or None."""
    device = choose_device(config["device"], computes)
    if config["use_amp"] is None:
        config["use_amp"] = uses_amp_by_default(device)
    data = _token_data(config, tokenizer)
    for split in ("train", "valid"):
        check_long_enough(data.splits[split], config["block_size"], split, data)
    _set_up_torch(config)
    return Trainer(config, data, device, ranks)


def _token_data(config, tokenizer):
    """The `TokenData` of the text, or of --token-directory."""
    directory = config["prepared_tokens"]
    if directory is None:
        return prepare_data(**{name: config[name] for name in CORPUS}, given=tokenizer)
    try:
        data = open_token_data(directory)
    except TokenFilesError as error:
        raise UserError(
            f"--token-directory: {error.reason}: name one that prepare_data.py has written"
        ) from None
    config["tokenizer"] = data.tokenizer.to_vocab()["type"]
    return data


def _set_up_torch(config):
    torch.manual_seed(config["seed"])
    torch.set_flush_denormal(True)  # denormals make CPU products 150 times slower
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _windows_changed(trainer, before, best):
    """Whether --eval-iters makes a resumed run evaluate on other windows; says so in one line.

    Args:
        before: the config of the checkpoint.
        best: the path of the best checkpoint so far.
    """
    c, valid = trainer.config, trainer.data.valid
    earlier = before.get("eval_iters", DEFAULTS["eval_iters"])
    counts = [len(eval_windows(valid, c["block_size"], n)) for n in (earlier, c["eval_iters"])]
    if counts[0] == counts[1]:
        return False
    warn(
        f"--eval-iters changes from {earlier} to {c['eval_iters']}, and losses on {counts[1]:,} "
        f"windows do not compare with those on {counts[0]:,}: the best starts anew"
        + (f" ({best} becomes {best}.old)" if best.exists() else "")
    )
    return True


def _choose_threads(trainer, given, checkpoint):
    """Set the number of CPU threads and put it into the config.

    On a CPU a resumed run keeps its number: another one changes the last bits of the results.
    """
    c, here = trainer.config, torch.get_num_threads()
    asked = given
    if given is None and checkpoint is not None and trainer.device.type == "cpu":
        asked = c["threads"] or here  # older runs took what PyTorch chose and did not record it
        if asked > here:
            warn(f"the run had {asked} threads, here are {here}: the last bits will differ")
            asked = here
    windows = c["batch_size"] // trainer.ranks.size
    c["threads"] = choose_threads(asked, trainer.raw_model, windows * c["block_size"])


def _check_same_files(trainer, checkpoint):
    """Refuse to train if one host sees other files than another."""
    here = (
        checkpoint and checkpoint["iter"],
        trainer.data.meta["source_sha256"],
        trainer.data.tokenizer.fingerprint,
    )
    if any(there != here for there in trainer.ranks.gathered(here)):
        raise UserError(
            "the hosts see different texts or checkpoints: put --data-path and --checkpoint-path "
            "on a file system that all of them share"
        )


def _announce(trainer):
    """Print what will be trained."""
    config, ranks = trainer.config, trainer.ranks
    threads = config["threads"]  # of each process
    print(f"text: {trainer.data.meta['source']}")
    print(
        f"{described(config)}: {trainer.num_parameters:,} parameters; "
        f"{trainer.tokens_per_step:,} tokens per step, {config['max_steps']:,} steps; "
        f"{trainer.device}"
        + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")
        + (f", {ranks.size} processes" if ranks.size > 1 else "")
    )


def _train(trainer, files, source, words):
    """Open the run's log and train; returns the exit code."""
    max_steps = trainer.config["max_steps"]
    if trainer.iter >= max_steps:
        print(f"finished already at step {trainer.iter}; give a larger --max-steps to continue")
        return 0
    if trainer.iter:
        print(f"resuming at step {trainer.iter} of {source}")
    if not trainer.ranks.is_main:
        return loop(trainer, None, files)
    description = {
        **trainer.saved_config(),
        "parameters": trainer.num_parameters,
        "source": trainer.data.meta["source"],
        "command": ["train_shakespeare.py", *words],
        "code_version": code_version(),
        "torch_version": torch.__version__,
        "machine": machine(trainer.device),
        "processes": trainer.ranks.size,
        "checkpoint_path": files.path,
    }
    if files.is_own(source) and trainer.best_val == math.inf:
        files.keep_best()
    log = RunLog(files.directory, description, trainer.iter)
    files.begin()
    try:
        return loop(trainer, log, files)
    finally:
        files.bring_back()
