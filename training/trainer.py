"""What a run holds: model, optimizer, precision and the state that a checkpoint saves."""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import get_batch
from engine.checkpoint import FORMAT_VERSION
from engine.models import build_model
from gravity.attention import step_around_when_compiling
from gravity.cpu import cpp_compiler
from model import NGT, repulsion_loss
from system.errors import UserError, warn
from system.machine import cpu_multiplies_bf16
from training.ranks import Ranks

LARGEST_SEED = 1 << 63


def choose_precision(use_amp, device):
    """`(autocast, scaler)`: a context factory and a GradScaler that may do nothing."""
    dtype = None
    if use_amp and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    elif use_amp and device.type == "cpu" and cpu_multiplies_bf16():
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
    if device.type == "cpu" and cpp_compiler() is None:
        warn("--compile needs a C++ compiler (g++) and there is none: training uncompiled")
        return model
    step_around_when_compiling()
    return torch.compile(model)


def distribute(model, device, ranks):
    """The model with its gradients averaged over all ranks; itself where there is but one."""
    if ranks.size == 1:
        return model
    c = model.config
    # the published law without a cutoff has a radius that nothing reads
    unused = getattr(c, "law", None) == "published" and c.cutoff == "none"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=unused,
        gradient_as_bucket_view=True,  # else every gradient is in memory twice
    )


def make_optimizer(model, config, device, ranks):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), decaying matrices only.

    With `shard_optimizer` every rank keeps its share of the state (ZeRO stage 1, Rajbhandari et
    al. 2020, arXiv:1910.02054).
    """
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.startswith("mass_emb")
        (decay if is_matrix else keep).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config["weight_decay"]},
        {"params": keep, "weight_decay": 0.0},
    ]
    settings = {
        **{"lr": config["learning_rate"], "betas": (0.9, 0.99)},
        "fused": device.type in ("cpu", "cuda"),
    }
    if config["shard_optimizer"] and ranks.size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # a second to import

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def _numbers(named):
    """A dict, if it is one of finite numbers.

    Raises:
        ValueError: where it is not.
    """
    for name, value in named.items():
        if type(value) not in (int, float) or not -1e300 < value < 1e300:
            raise ValueError(f"{name[:40]} is no number")
    return named


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


class Trainer:
    """All that a run holds: what a checkpoint saves and `step` changes.

    Args:
        ranks: the processes that share each batch; the numbers of a step are those of all of them.
    """

    def __init__(self, config, data, device, ranks=None):
        self.config, self.data, self.device = config, data, device
        self.ranks = ranks or Ranks()
        vocab_size = data.tokenizer.vocab_size
        self.raw_model = build_model(config | {"vocab_size": vocab_size}).to(device)
        distributed = distribute(self.raw_model, device, self.ranks)
        self.model = maybe_compile(distributed, config, device)
        self.optimizer = make_optimizer(self.raw_model, config, device, self.ranks)
        if not self.ranks.is_main:  # dropout of its own
            torch.manual_seed(self._seed(self.ranks.rank))
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

    def _seed(self, rank, step=0):
        """What another rank than the first starts its random numbers from."""
        return (self.config["seed"] + 1_000_003 * rank + step) % LARGEST_SEED

    @property
    def parameters(self):
        return sum(p.numel() for p in self.raw_model.parameters())

    @property
    def tokens_per_step(self):
        c = self.config
        return c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]

    def state(self):
        """The checkpoint of this moment; all ranks call it, the main one's is whole."""
        rng = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        others = self.ranks.gathered(dict(rng))[1:]
        if others:
            rng["other_ranks"] = others
        optimizer_state = self._optimizer_state()
        return {
            "format_version": FORMAT_VERSION,
            "model_state": self.raw_model.state_dict(),
            "optimizer_state": optimizer_state,
            "iter": self.iter,
            "best_val": self.best_val,
            "config": self.saved_config(),
            "vocab": self.data.tokenizer.to_vocab(),
            "scheduler_state": {"step": self.iter, "learning_rate": self.learning_rate_now()},
            "scaler_state": self.scaler.state_dict(),
            "rng_state": rng,
            "data_state": dict(self.progress),
        }

    def _optimizer_state(self):
        """Of all ranks; None on others than the main one where the state is shared out."""
        if hasattr(self.optimizer, "consolidate_state_dict"):
            self.optimizer.consolidate_state_dict(to=0)
            if not self.ranks.is_main:
                return None
        return self.optimizer.state_dict()

    def saved_config(self):
        """The flags, the model's shape, and which text and tokenizer it learned from."""
        return {
            **self.config,
            **dataclasses.asdict(self.raw_model.config),
            "model": self.config["model_type"],  # the flag's name: files keep both
            "token_directory": str(self.data.directory),
            "source_sha256": self.data.meta["source_sha256"],
            "tokenizer_sha256": self.data.tokenizer.fingerprint,
        }

    def learning_rate_now(self):
        return self.optimizer.param_groups[0]["lr"]

    def restore(self, checkpoint, path):
        """Continue from a checkpoint that `state` made, read from `path`.

        Raises:
            UserError: where it is of another text or tokenizer, or damaged in what it holds.
        """
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
            state = checkpoint["optimizer_state"]["state"]
            if checkpoint["iter"] and not state:
                raise ValueError("optimizer_state is empty")
            self._restore_optimizer(state)
            if checkpoint["scaler_state"]:  # none where the run was in fp32 or bf16
                self.scaler.load_state_dict(_numbers(checkpoint["scaler_state"]))
            self._restore_rng(checkpoint["rng_state"], checkpoint["iter"])
            self.iter, self.best_val = checkpoint["iter"], checkpoint["best_val"]
            progress = _numbers(checkpoint["data_state"])
            self.progress = {name: progress.get(name, 0) for name in self.progress}
        except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} cannot be resumed ({reason}): name another with --resume-from"
            ) from None

    def _restore_optimizer(self, state):
        """AdamW's averages; its settings are this run's own.

        Raises:
            ValueError: where they are not of these parameters.
        """
        groups, parameters = [], []
        for group in self.optimizer.param_groups:
            numbers = range(len(parameters), len(parameters) + len(group["params"]))
            groups.append(group | {"params": [*numbers]})
            parameters += group["params"]
        for number, averages in state.items():
            if number not in range(len(parameters)):
                raise ValueError("optimizer_state is of more parameters than there are")
            parameter = parameters[number]
            if averages.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError("optimizer_state is not AdamW's")
            for name, average in averages.items():
                shape = () if name == "step" else parameter.shape
                if average.shape != shape or average.dtype != torch.float32:
                    raise ValueError(f"optimizer_state is of other parameters than number {number}")
                if not bool(torch.isfinite(average).all()) or average.layout != torch.strided:
                    raise ValueError("optimizer_state holds NaN or infinity")
                if name != "exp_avg" and bool((average < 0).any()):
                    raise ValueError("optimizer_state holds negative squares or steps")
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _restore_rng(self, states, step):
        """Every rank its own; one that the checkpoint's run did not have gets a new one."""
        if not self.ranks.is_main:
            others = states.get("other_ranks", [])
            if len(others) != self.ranks.size - 1:
                torch.manual_seed(self._seed(self.ranks.rank, step))
                return
            states = others[self.ranks.rank - 1]
        torch.set_rng_state(states["torch"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def loss(self, inputs, targets, with_repulsion, micro_step=0):
        """What is minimised, and the cross-entropy alone."""
        if not isinstance(self.raw_model, NGT):
            logits = self.model(inputs)
            cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            return cross_entropy, cross_entropy.detach()
        logits, geometry = self.model(inputs, return_geometry=True)
        cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        if with_repulsion:
            # the same positions on every rank
            sample = torch.Generator().manual_seed(
                ((self.config["seed"] * 1_000_003 + self.iter) * 1_009 + micro_step) % LARGEST_SEED
            )
            repulsion = repulsion_loss(geometry.z, geometry.mass, generator=sample)
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
        share = c["batch_size"] // self.ranks.size
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        last = c["gradient_accumulation_steps"] - 1
        for micro_step in range(last + 1):
            inputs, targets = get_batch(
                self.data.train,
                c["batch_size"],
                c["block_size"],
                c["seed"],
                self.iter,
                micro_step,
            )
            inputs, targets = inputs[mine].to(self.device), targets[mine].to(self.device)
            with self._no_sync() if micro_step < last else contextlib.nullcontext():
                with self.autocast():
                    loss, cross_entropy = self.loss(inputs, targets, with_repulsion, micro_step)
                self.scaler.scale(loss / c["gradient_accumulation_steps"]).backward()
            mean += float(cross_entropy) / c["gradient_accumulation_steps"]
        mean = self.ranks.mean(mean)
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

    def _no_sync(self):
        """Gradients are averaged over the ranks only once a step."""
        model = getattr(self.model, "_orig_mod", self.model)
        return model.no_sync() if self.ranks.size > 1 else contextlib.nullcontext()

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
