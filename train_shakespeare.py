"""Train a Newton Gravity Transformer, or the vanilla one it is compared with, on any corpus."""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import (
    FORMAT_VERSION,
    best_path,
    build_model,
    check_writable,
    is_first_release,
    last_path,
    model_fields,
    read_checkpoint,
    save_checkpoint,
)
from data import check_long_enough, get_batch, prepare_data
from errors import UsageError, UserError, run_script, warn
from gravity import step_around_when_compiling
from metrics import HEADER, RunLog, code_version, evaluate, machine, peak_memory_bytes, table_row
from model import NGT, repulsion_loss
from options import choose_device, resolve, train_parser, warn_of_no_effect

EXAMPLES = """examples:
  python train_shakespeare.py                               NGT on Shakespeare, minutes on a CPU
  python train_shakespeare.py --model vanilla               what it is compared with
  python train_shakespeare.py --resume                      go on where it stopped
  python train_shakespeare.py --dataset text --data-path book.txt --checkpoint-path checkpoints/b.pt
"""


def choose_precision(use_amp, device):
    """`(autocast, scaler)`: a context factory and a GradScaler that may do nothing."""
    dtype = None
    if use_amp and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    elif use_amp and device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.bfloat16
    elif use_amp:
        warn(f"--use-amp: this {device.type} has no fast bf16, so training runs in fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if dtype is None:
        return contextlib.nullcontext, scaler
    return lambda: torch.autocast(device.type, dtype=dtype), scaler


def maybe_compile(model, config, device):
    """The compiled model, or the model itself with one warning where nothing can compile it."""
    if not config["compile"]:
        return model
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        warn("--compile needs a C++ compiler (g++) and there is none: training uncompiled")
        return model
    step_around_when_compiling()
    return torch.compile(model)


def make_optimizer(model, config, device):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), decaying matrices only."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.startswith("mass_emb")
        (decay if is_matrix else keep).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config["weight_decay"]},
        {"params": keep, "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(0.9, 0.99), fused=fused)


def learning_rate(step, config):
    """The learning rate of a step: linear warm-up, then constant or a cosine to the minimum."""
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    if step < warmup:
        return peak * (step + 1) / warmup
    if not config["use_cosine_schedule"]:
        return peak
    progress = (step - warmup) / max(1, config["max_steps"] - warmup)
    low = min(config["min_learning_rate"], peak)
    return low + (peak - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def make_model(config, vocab_size):
    """The model that the resolved flags describe."""
    names = model_fields(config["model"])
    shape = {name: config[name] for name in names if name in config}
    return build_model({**shape, "model_type": config["model"], "vocab_size": vocab_size})


class Trainer:
    """All that a run holds: what a checkpoint saves and `step` changes."""

    def __init__(self, config, data, device):
        self.config, self.data, self.device = config, data, device
        self.raw_model = make_model(config, data.tokenizer.vocab_size).to(device)
        self.model = maybe_compile(self.raw_model, config, device)
        self.optimizer = make_optimizer(self.raw_model, config, device)
        self.autocast, self.scaler = choose_precision(config["use_amp"], device)
        self.iter = 0
        self.best_val = math.inf
        self.progress = {
            "tokens": 0,
            "train_loss_sum": 0.0,
            "train_loss_count": 0,
            "skipped_in_a_row": 0,
            "skipped": 0,
            "wall_time": 0.0,
        }

    @property
    def tokens_per_step(self):
        c = self.config
        return c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]

    def state(self):
        """The checkpoint of this moment."""
        rng = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        shape = {name: getattr(self.raw_model.config, name) for name in self.shape_names}
        return {
            "format_version": FORMAT_VERSION,
            "model_state": self.raw_model.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "iter": self.iter,
            "best_val": self.best_val,
            "config": {
                **self.config,
                **shape,
                "model_type": self.config["model"],
                "token_directory": str(self.data.directory),
                "source_sha256": self.data.meta["source_sha256"],
                "tokenizer_sha256": self.data.tokenizer.fingerprint,
            },
            "vocab": self.data.tokenizer.to_vocab(),
            "scheduler_state": {"step": self.iter, "learning_rate": self._rate()},
            "scaler_state": self.scaler.state_dict(),
            "rng_state": rng,
            "data_state": dict(self.progress),
        }

    @property
    def shape_names(self):
        return model_fields(self.config["model"])

    def _rate(self):
        return self.optimizer.param_groups[0]["lr"]

    def restore(self, checkpoint, path):
        """Continue from a checkpoint that `state` made."""
        for name, mine in (
            ("source_sha256", self.data.meta["source_sha256"]),
            ("tokenizer_sha256", self.data.tokenizer.fingerprint),
        ):
            if checkpoint["config"][name] != mine:
                what = "text" if name == "source_sha256" else "tokenizer"
                raise UserError(
                    f"{path} was trained on another {what} than {self.data.meta['source']}: "
                    "give --data-path of the one it was trained on, or start anew with another "
                    "--checkpoint-path"
                )
        try:
            self.raw_model.load_state_dict(checkpoint["model_state"])
            self.optimizer.load_state_dict(checkpoint["optimizer_state"])
            self.scaler.load_state_dict(checkpoint["scaler_state"])
            torch.set_rng_state(checkpoint["rng_state"]["torch"])
            if self.device.type == "cuda" and "cuda" in checkpoint["rng_state"]:
                torch.cuda.set_rng_state(checkpoint["rng_state"]["cuda"], self.device)
            self.iter, self.best_val = checkpoint["iter"], checkpoint["best_val"]
            self.progress |= checkpoint["data_state"]
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be resumed ({reason}): use another") from None

    def loss(self, inputs, targets, with_repulsion):
        """What is minimised, and the cross-entropy alone."""
        if not isinstance(self.raw_model, NGT):
            logits = self.model(inputs)
            cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            return cross_entropy, cross_entropy.detach()
        logits, geometry = self.model(inputs, return_geometry=True)
        cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        if with_repulsion:
            repulsion = repulsion_loss(geometry.z, geometry.mass)
            return cross_entropy + self.config["lambda_repulsion"] * repulsion, (
                cross_entropy.detach()
            )
        # the last block's z keeps its place in the graph
        return cross_entropy + 0.0 * geometry.z.sum(), cross_entropy.detach()

    def step(self):
        """One optimizer step.

        Returns:
            `(cross-entropy, norm of the gradient)`, floats. Where either is not finite nothing was
            changed.
        """
        c = self.config
        rate = learning_rate(self.iter, c)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with_repulsion = c["repulsion"] and self.iter % c["repulsion_interval"] == 0
        mean = 0.0
        for micro_step in range(c["gradient_accumulation_steps"]):
            inputs, targets = get_batch(
                self.data.train,
                c["batch_size"],
                c["block_size"],
                c["seed"],
                self.iter,
                micro_step,
            )
            with self.autocast():
                loss, cross_entropy = self.loss(
                    inputs.to(self.device), targets.to(self.device), with_repulsion
                )
            self.scaler.scale(loss / c["gradient_accumulation_steps"]).backward()
            mean += float(cross_entropy) / c["gradient_accumulation_steps"]
        self.scaler.unscale_(self.optimizer)
        limit = c["grad_clip"] or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), limit))
        finite = math.isfinite(mean) and math.isfinite(norm)
        if finite or self.scaler.is_enabled():  # the scaler itself skips where fp16 overflowed
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(mean, finite)
        return mean, norm

    def _count(self, loss, finite):
        p = self.progress
        self.iter += 1
        p["tokens"] += self.tokens_per_step
        overflow_only = self.scaler.is_enabled() and math.isfinite(loss)
        if finite or overflow_only:
            p["skipped_in_a_row"] = 0
        else:
            p["skipped_in_a_row"] += 1
            p["skipped"] += 1
        if math.isfinite(loss):
            p["train_loss_sum"] += loss
            p["train_loss_count"] += 1

    def mean_train_loss(self):
        """Mean training loss since it was last asked for."""
        p = self.progress
        mean = p["train_loss_sum"] / p["train_loss_count"] if p["train_loss_count"] else math.nan
        p["train_loss_sum"], p["train_loss_count"] = 0.0, 0
        return mean

    def is_sound(self):
        """Whether every weight is finite, so that a checkpoint is worth keeping."""
        return all(bool(torch.isfinite(p).all()) for p in self.raw_model.parameters())


class StopRequest:
    """Within it Ctrl-C and SIGTERM let the current step finish; a second one stops at once."""

    def __init__(self):
        self.signal = None
        self._before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number, _frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def exit_code(self):
        return 128 + self.signal


def find_resume_file(args, path):
    """The checkpoint to go on from, or None to start."""
    if args.resume_from is not None:
        return Path(args.resume_from)
    for candidate in (last_path(path), best_path(path), Path(path)):
        if candidate.exists():
            return candidate
    return None


def read_to_resume(path):
    """Read a checkpoint that training is to go on from."""
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; name a good one with --resume-from") from None
    if is_first_release(checkpoint):
        raise UserError(
            f"{path} is of the first release: it can be chatted with and mapped, not resumed; "
            "start anew with --law published and another --checkpoint-path"
        )
    return checkpoint


def checkpoint_path(args, config):
    """PATH of PATH_best.pt and PATH_last.pt: as given, that of --resume-from, or the dataset's."""
    if args.checkpoint_path is not None:
        return args.checkpoint_path
    if args.resume_from is not None:
        return args.resume_from.removesuffix("_last.pt").removesuffix("_best.pt")
    suffix = "_vanilla" if config["model"] == "vanilla" else ""
    return f"checkpoints/{config['dataset']}{suffix}.pt"


def check_nothing_is_lost(path, run_directory, source):
    """Refuse to write over checkpoints or metrics of another run.

    Args:
        source: the checkpoint that is being resumed, or None.
    """
    remedy = "or start over with --overwrite"
    for file in (last_path(path), best_path(path)):
        if file.exists() and source not in (last_path(path), best_path(path), Path(path)):
            raise UsageError(
                f"{file} exists already: go on with --resume, give another --checkpoint-path, "
                f"{remedy}"
            )
    metrics = run_directory / "metrics.jsonl"
    if source is None and metrics.exists() and metrics.stat().st_size:
        raise UsageError(
            f"{metrics} holds the metrics of another run: give another --run-name, {remedy}"
        )


def main(argv=None):
    """Train; returns the exit code."""
    args = train_parser(__doc__, EXAMPLES).parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("training over several processes is not built yet: start without torchrun")
    config = resolve(args)
    path = checkpoint_path(args, config)
    run_directory = Path("runs") / (args.run_name or Path(path).name.removesuffix(".pt"))
    source = checkpoint = None
    if args.resume or args.resume_from:
        source = find_resume_file(args, path)
        if source is None:
            print(f"nothing to resume at {last_path(path)}: starting")
        else:
            checkpoint = read_to_resume(source)
            config = resolve(args, checkpoint["config"])
            other_end = config["max_steps"] != checkpoint["config"]["max_steps"]
            if other_end and config["use_cosine_schedule"]:
                warn("another --max-steps changes the learning-rate cosine from here on")
    if not args.overwrite:
        check_nothing_is_lost(path, run_directory, source)
    warn_of_no_effect(args, config)
    return train(config, checkpoint, path, run_directory, argv)


def set_up_torch(config):
    """Seeds, and arithmetic that is neither slow nor left to chance."""
    torch.manual_seed(config["seed"])
    torch.set_flush_denormal(True)  # denormals make CPU products 150 times slower
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def train(config, checkpoint, path, run_directory, argv=None):
    """The run itself: set up, loop, and leave everything on disk."""
    make_model(config, vocab_size=2)  # sizes that cannot be are refused before any text is fetched
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
    check_writable(path)
    set_up_torch(config)
    trainer = Trainer(config, data, device)
    if checkpoint is not None:
        trainer.restore(checkpoint, path)
    parameters = sum(p.numel() for p in trainer.raw_model.parameters())
    print(f"text: {data.meta['source']}")
    print(
        f"{config['model']}: {parameters:,} parameters; {trainer.tokens_per_step:,} tokens a step, "
        f"{config['max_steps']:,} steps; {device}"
    )
    if trainer.iter >= config["max_steps"]:
        print(f"finished already at step {trainer.iter}; a larger --max-steps goes on")
        return 0
    if trainer.iter:
        print(f"resuming at step {trainer.iter}")
    log = RunLog(
        run_directory,
        {
            **trainer.state()["config"],
            "parameters": parameters,
            "source": data.meta["source"],
            "command": ["train_shakespeare.py", *(sys.argv[1:] if argv is None else argv)],
            "code_version": code_version(),
            "torch_version": torch.__version__,
            "machine": machine(),
            "checkpoint_path": path,
        },
        trainer.iter,
    )
    try:
        return loop(trainer, log, path)
    finally:
        log.close()


def loop(trainer, log, path):
    """Step, evaluate, save, until done or asked to stop."""
    c = trainer.config
    print(HEADER)
    trained, seconds = 0, 0.0
    bar = tqdm(
        total=c["max_steps"], initial=trainer.iter, desc="training", unit="step", disable=None
    )
    with bar, StopRequest() as stop:
        while trainer.iter < c["max_steps"] and stop.signal is None:
            started = time.perf_counter()
            loss, norm = trainer.step()
            elapsed = time.perf_counter() - started
            trainer.progress["wall_time"] += elapsed
            trained, seconds = trained + 1, seconds + elapsed
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            check_skipped(trainer, path)
            done = trainer.iter == c["max_steps"]
            # after a skipped step the weights are under suspicion
            sound = trainer.progress["skipped_in_a_row"] == 0
            if trainer.iter % c["eval_interval"] == 0 or done:
                row = evaluation_row(trainer, norm, trained, seconds)
                left = (c["max_steps"] - trainer.iter) * seconds / trained
                tqdm.write(table_row(row, left), file=sys.stdout)
                sys.stdout.flush()
                log.evaluation(row)
                if isinstance(trainer.raw_model, NGT):
                    log.geometry(trainer.raw_model, trainer.iter)
                trained, seconds = 0, 0.0
                sound = sound and math.isfinite(row["val_loss"])
                if sound and row["val_loss"] < trainer.best_val:
                    trainer.best_val = row["val_loss"]
                    save_checkpoint(best_path(path), trainer.state())
            due = trainer.iter % c["checkpoint_interval"] == 0 or done or stop.signal is not None
            if due and sound and trainer.is_sound():
                save_checkpoint(last_path(path), trainer.state())
    if stop.signal is not None and trainer.iter < c["max_steps"]:
        print(f"stopped at step {trainer.iter}; go on with --resume")
        return stop.exit_code
    log.projector(trainer.raw_model, trainer.data.tokenizer, trainer.iter)
    if trainer.best_val < math.inf:
        print(f"best validation loss {trainer.best_val:.4f} in {best_path(path)}")
        print(f"chat with it: python chat.py --checkpoint-path {best_path(path)}")
    return 0


def check_skipped(trainer, path):
    """Give up after too many steps in a row whose loss or gradient was not finite."""
    in_a_row = trainer.progress["skipped_in_a_row"]
    if in_a_row == 0:
        return
    if in_a_row == 1:
        warn(f"step {trainer.iter}: loss or gradient is not finite, step skipped")
    if in_a_row >= trainer.config["max_skipped_steps"]:
        kept = last_path(path) if last_path(path).exists() else best_path(path)
        where = f"{kept} is the last good checkpoint" if kept.exists() else "nothing was saved yet"
        raise UserError(
            f"loss or gradient was not finite for {in_a_row} steps in a row (--max-skipped-steps), "
            f"up to step {trainer.iter}; {where}: try a lower --learning-rate"
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
    )
    return {
        "step": trainer.iter,
        "tokens": trainer.progress["tokens"],
        "train_loss": trainer.mean_train_loss(),
        **result,
        "tokens_per_s": trained * trainer.tokens_per_step / seconds,
        "steps_per_s": trained / seconds,
        "learning_rate": trainer._rate(),
        "grad_norm": norm,
        "skipped_steps": trainer.progress["skipped"],
        "wall_time": trainer.progress["wall_time"],
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
    }


if __name__ == "__main__":
    run_script(main)
