"""Train a Newton Gravity Transformer, or the vanilla one it is compared with, on any corpus."""

import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from data import check_long_enough
from engine.checkpoint import check_writable, save_checkpoint
from engine.models import model_config
from system.cli import choose_device
from system.errors import UsageError, UserError, run_script, warn
from system.machine import code_version, machine, peak_memory_bytes
from text.preparation import check_tokenizer_file, prepare_data
from training.config import resolve, warn_of_no_effect
from training.display import TrainingDisplay, above_the_line
from training.options import train_parser
from training.ranks import is_restarted, joined
from training.resume import check_tokenizer_is_here, read_to_resume
from training.run_files import RunFiles, flag
from training.run_log import RunLog
from training.stop_request import StopRequest, ignore_requests_to_save
from training.trainer import Trainer
from training.validation import evaluate

EXAMPLES = """examples:
  python train_shakespeare.py                               NGT on Shakespeare, minutes on a CPU
  python train_shakespeare.py --model vanilla               what it is compared with
  python train_shakespeare.py --resume                      go on where it stopped
  python train_shakespeare.py --dataset text --data-path book.txt --checkpoint-path checkpoints/b.pt
  torchrun --nproc_per_node=2 train_shakespeare.py --batch-size 12      the same batches, shared out
"""


STEPS_TO_ESTIMATE = 20


def checkpoint_path(args, config):
    """PATH of PATH_best.pt and PATH_last.pt: as given, that of --resume-from, or the dataset's."""
    if args.checkpoint_path is not None:
        return args.checkpoint_path
    if args.resume_from is not None:
        return args.resume_from.removesuffix("_last.pt").removesuffix("_best.pt")
    suffix = "_vanilla" if config["model_type"] == "vanilla" else ""
    return f"checkpoints/{config['dataset']}{suffix}.pt"


def main(argv=None):
    """Train; returns the exit code."""
    args = train_parser(__doc__, EXAMPLES).parse_args(argv)
    ignore_requests_to_save()
    with joined() as ranks:
        return run(args, ranks, argv)


def run(args, ranks, argv=None):
    """One process's part of the training; returns the exit code."""
    check_tokenizer_file(args.tokenizer_path, args.bpe_vocab_size)
    config = resolve(args)
    files = RunFiles(checkpoint_path(args, config), args.run_name)
    if is_restarted() and files.has_begun():
        args.resume, args.overwrite = True, False
        if files.last.exists():
            args.resume_from = None
    source = checkpoint = None
    if args.resume or args.resume_from:
        source = Path(args.resume_from) if args.resume_from else files.to_resume()
        if source is None:
            print(f"nothing to resume at {files.last}: starting")
        else:
            checkpoint = read_to_resume(source)
            config = resolve(args, checkpoint["config"])
            check_tokenizer_is_here(args, config)
            other_end = config["max_steps"] != checkpoint["config"]["max_steps"]
            if other_end and config["use_cosine_schedule"]:
                warn("another --max-steps changes the learning-rate cosine from here on")
    if not args.overwrite:
        files.check_nothing_is_lost(source, args.resume)
    warn_of_no_effect(args, config)
    if config["batch_size"] % ranks.size:
        raise UsageError(
            f"--batch-size {config['batch_size']} cannot be shared out among {ranks.size} "
            f"processes: give a multiple of {ranks.size}"
        )
    trainer = set_up(config, ranks)
    check_same_files(trainer, checkpoint)
    if checkpoint is not None:
        trainer.restore(checkpoint, source)
        if not files.is_own(source):  # its best is not here
            trainer.best_val = math.inf
    announce(trainer)
    ranks.wait()  # all have looked at what is on disk before one of them writes
    if args.dry_run:
        return 0
    if not ranks.is_main:
        return train(trainer, files)
    with files.locked():
        check_writable(files.path)
        if args.overwrite and not files.is_own(source):
            files.set_aside()
        return train(trainer, files, source, argv)


def set_up_torch(config):
    """Seeds, and arithmetic that is neither slow nor left to chance."""
    torch.manual_seed(config["seed"])
    torch.set_flush_denormal(True)  # denormals make CPU products 150 times slower
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def set_up(config, ranks):
    """The trainer of a run, before its first step."""
    # sizes that cannot be are refused before any text is fetched
    model_config(config | {"vocab_size": 1})
    device = choose_device(config["device"])
    data = prepare_data(
        config["dataset"],
        config["data_path"],
        config["tokenizer"],
        config["bpe_vocab_size"],
        config["tokenizer_path"],
        config["tiktoken_encoding"],
    )
    for split in ("train", "valid"):
        check_long_enough(data.splits[split], config["block_size"], split, data)
    set_up_torch(config)
    return Trainer(config, data, device, ranks)


def check_same_files(trainer, checkpoint):
    """Refuse to train where one host sees other files than another."""
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


def announce(trainer):
    """Say what will be trained."""
    config, ranks = trainer.config, trainer.ranks
    print(f"text: {trainer.data.meta['source']}")
    kind = config["pos"] if config["model_type"] == "vanilla" else config["law"]
    print(
        f"{config['model_type']} ({kind}): {trainer.parameters:,} parameters; "
        f"{trainer.tokens_per_step:,} tokens a step, {config['max_steps']:,} steps; "
        f"{trainer.device}" + (f", {ranks.size} processes" if ranks.size > 1 else "")
    )


def train(trainer, files, source=None, argv=None):
    """The run itself: loop, and leave everything on disk.

    Args:
        source: the checkpoint that it goes on from, or None.
    """
    config = trainer.config
    if trainer.iter >= config["max_steps"]:
        print(f"finished already at step {trainer.iter}; a larger --max-steps goes on")
        return 0
    if trainer.iter:
        print(f"resuming at step {trainer.iter} of {source}")
    if not trainer.ranks.is_main:
        return loop(trainer, None, files)
    log = RunLog(
        files.directory,
        {
            **trainer.saved_config(),
            "parameters": trainer.parameters,
            "source": trainer.data.meta["source"],
            "command": ["train_shakespeare.py", *(sys.argv[1:] if argv is None else argv)],
            "code_version": code_version(),
            "torch_version": torch.__version__,
            "machine": machine(trainer.device),
            "processes": trainer.ranks.size,
            "checkpoint_path": files.path,
        },
        trainer.iter,
    )
    files.begin()
    try:
        return loop(trainer, log, files)
    finally:
        files.bring_back()


def loop(trainer, log, files):
    """Step, evaluate, save, until done or asked to stop.

    Args:
        log: where evaluations go; None on ranks but the main one.
    """
    c, ranks = trainer.config, trainer.ranks
    trained, seconds = 0, 0.0
    saved_at = first_step = trainer.iter
    first_second = trainer.progress["wall_time"]
    display = TrainingDisplay(c["max_steps"], trainer.iter, trainer.tokens_per_step, ranks.is_main)
    with display, StopRequest() as stop:
        while trainer.iter < c["max_steps"] and stop.signal is None:
            started = time.perf_counter()
            loss, norm = trainer.step()
            elapsed = time.perf_counter() - started
            trainer.progress["wall_time"] += elapsed
            trained, seconds = trained + 1, seconds + elapsed
            save_now = stop.agree(ranks)
            if trainer.iter == first_step + STEPS_TO_ESTIMATE:
                say_expected_time(display, trainer, first_step, first_second)
            display.step(loss, elapsed)
            check_skipped(trainer, files)
            done = trainer.iter == c["max_steps"]
            # after a skipped step the weights are under suspicion
            sound = trainer.progress["skipped_in_a_row"] == 0
            if trainer.iter % c["eval_interval"] == 0 or done:
                row = evaluation_row(trainer, norm, trained, seconds)
                left = (c["max_steps"] - trainer.iter) * seconds / trained
                display.row(row, left)
                if log is not None:
                    log.evaluation(row)
                    log.dashboard.learned(trainer.raw_model, trainer.data, trainer.iter)
                trained, seconds = 0, 0.0
                sound = sound and math.isfinite(row["val_loss"])
                if sound and row["val_loss"] < trainer.best_val:
                    trainer.best_val = row["val_loss"]
                    save(trainer, files, files.best)
                save_now |= stop.agree(ranks)  # an evaluation may take long
            due = trainer.iter % c["checkpoint_interval"] == 0 or done or stop.signal is not None
            if save_now:
                display.say(f"SIGUSR1 at step {trainer.iter}: {files.last}")
            due = due or save_now
            if due and sound and trainer.is_sound():
                save(trainer, files, files.last)
                saved_at = trainer.iter
    if stop.signal is not None and trainer.iter < c["max_steps"]:
        where = f"stopped at step {trainer.iter}"
        if saved_at != trainer.iter:
            where += ", whose numbers are in doubt"
            where += f"; {files.last} is of step {saved_at}" if files.last.exists() else ""
        how = f"go on with: {files.resume_command()}"
        print(f"{where}; {how if files.to_resume() else 'nothing was saved'}", flush=True)
        return stop.exit_code
    if log is None:
        return 0
    log.dashboard.projector(trainer.raw_model, trainer.data.tokenizer, trainer.iter)
    log.dashboard.finish(trainer.iter)
    if trainer.best_val < math.inf:
        print(f"best validation loss {trainer.best_val:.4f} in {files.best}")
        command = ["python", "chat.py", *flag("--checkpoint-path", files.best)]
        print(f"chat with it: {shlex.join(command)}")
    return 0


def save(trainer, files, path):
    """All ranks give what they have, the main one writes it."""
    state = trainer.state()
    if trainer.ranks.is_main:
        save_checkpoint(path, state)
        files.forget_earlier()


def say_expected_time(display, trainer, first_step, first_second):
    """How long the rest will take, by the time of the steps since `first_step`."""
    left = trainer.config["max_steps"] - trainer.iter
    seconds = trainer.progress["wall_time"] - first_second
    minutes = round(left * seconds / (trainer.iter - first_step) / 60)
    if minutes:
        hours, minutes = divmod(minutes, 60)
        time_left = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
        display.say(
            f"expected: {time_left} for the {left:,} steps that are left, besides evaluations"
        )


def check_skipped(trainer, files):
    """Give up after too many steps in a row whose loss or gradient was not finite."""
    in_a_row = trainer.progress["skipped_in_a_row"]
    if in_a_row == 0:
        return
    if in_a_row == 1:
        with above_the_line():
            warn(f"step {trainer.iter}: loss or gradient is not finite, step skipped")
    if in_a_row >= trainer.config["max_skipped_steps"]:
        kept = files.last if files.last.exists() else files.best
        where = f"{kept} is the last good checkpoint" if kept.exists() else "nothing was saved yet"
        raise UserError(
            f"loss or gradient was not finite for {in_a_row} steps in a row (--max-skipped-steps), "
            f"up to step {trainer.iter} (the batch of step {trainer.iter - 1} of --seed "
            f"{trainer.config['seed']}); {where}: try a lower --learning-rate"
        )


def evaluation_row(trainer, norm, trained, seconds):
    """One line of metrics.jsonl."""
    c = trainer.config
    result = evaluate(
        trainer.raw_model,
        trainer.data,
        c["block_size"],
        c["eval_iters"],
        trainer.device,
        trainer.autocast,
        trainer.ranks,
    )
    return {
        "step": trainer.iter,
        "tokens": trainer.progress["tokens"],
        "train_loss": trainer.mean_train_loss(),
        **result,
        "tokens_per_s": trained * trainer.tokens_per_step / seconds,
        "steps_per_s": trained / seconds,
        "learning_rate": trainer.learning_rate_now(),
        "grad_norm": norm,
        "skipped_steps": trainer.progress["skipped"],
        "wall_time": trainer.progress["wall_time"],
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
    }


if __name__ == "__main__":
    run_script(main)
