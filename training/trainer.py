"""The state of a run: model, optimizer, precision, random numbers; what a checkpoint saves."""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import get_batch
from engine.checkpoint import FORMAT_VERSION
from engine.models import build_model
from gravity.cpu import cpp_compiler
from model import NGT, repulsion_loss
from system.errors import UserError, warn
from system.machine import cpu_multiplies_bf16
from system.safe_text import short_reason
from training.optimizer import (
    make_optimizer,
    restore_optimizer,
    set_learning_rates,
    state_of,
)
from training.ranks import Ranks

SEEDS = 1 << 63  # PyTorch's generators take seeds from 0 to below this


def choose_precision(use_amp, device):
    """The precision of training, with one warning if `use_amp` is not possible.

    Returns:
        `(autocast, scaler)`: a function that makes a context for the forward pass, and a
        `GradScaler`, which only works for fp16. Neither does anything in fp32.
    """
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


def forward(model, inputs, targets, is_ngt):
    """Cross-entropy of a batch, and an NGT's coordinates and masses (None for vanilla).

    Args:
        inputs, targets: (B, T) ids.

    Returns:
        `(cross-entropy, z, mass)`: a scalar in fp32, (B, T, coord_dim), (B, T).
    """
    z = mass = None
    if is_ngt:
        logits, geometry = model(inputs, return_geometry=True)
        z, mass = geometry.z, geometry.mass
    else:
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), z, mass


def maybe_compile(function, config, device):
    """The compiled function, or itself with one warning if nothing can compile it."""
    if not config["compile"]:
        return function
    if device.type == "cpu" and cpp_compiler() is None:
        warn("--compile needs a C++ compiler (g++) and there is none: training uncompiled")
        return function
    return torch.compile(function)


def distribute(model, device, ranks):
    """The model with its gradients averaged over all ranks; itself if there is only one."""
    if ranks.size == 1:
        return model
    c = model.config
    # the published law without a cutoff has a radius that gets no gradient
    unused = getattr(c, "law", None) == "published" and c.cutoff == "none"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=unused,
        gradient_as_bucket_view=True,  # otherwise every gradient is in memory twice
    )


class Trainer:
    """The state of a run: what `step` changes and a checkpoint saves.

    Args:
        config: a value for every setting, as `training.config.resolve` returns it.
        data: a `TokenData`.
        device: a `torch.device`.
        ranks: the processes that share each batch; losses and counts are those of all of them.
    """

    def __init__(self, config, data, device, ranks=None):
        self.config, self.data, self.device = config, data, device
        self.ranks = ranks or Ranks()
        vocab_size = data.tokenizer.vocab_size
        self.raw_model = build_model(config | {"vocab_size": vocab_size}).to(device)
        self.model = distribute(self.raw_model, device, self.ranks)
        # with the loss, so that the compiler can fuse it with the logits
        self.forward = maybe_compile(forward, config, device)
        self.optimizer = make_optimizer(self.raw_model, config, device, self.ranks)
        # the weights above must be the same on all ranks, but dropout must not
        if not self.ranks.is_main:
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
        """The seed of a rank other than the main one."""
        return (self.config["seed"] + 1_000_003 * rank + step) % SEEDS

    @property
    def num_parameters(self):
        return sum(p.numel() for p in self.raw_model.parameters())

    @property
    def tokens_per_step(self):
        """Of all ranks and micro-steps together."""
        c = self.config
        return c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]

    def state(self):
        """The checkpoint of this moment. All ranks call it; only the main one's is whole."""
        rng = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        others = self.ranks.gathered(dict(rng))[1:]
        if others:
            rng["other_ranks"] = others
        optimizer_state = state_of(self.optimizer, self.ranks)
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

    def saved_config(self):
        """The settings, the model's shape, and which text and tokenizer it learned from."""
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
        """Continue from a checkpoint that `state` returned, read from `path`.

        Raises:
            UserError: if it is of another text or tokenizer, or its contents are damaged.
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
            restore_optimizer(self.optimizer, state)
            if checkpoint["scaler_state"]:  # empty for runs in fp32 or bf16
                self.scaler.load_state_dict(_finite_numbers(checkpoint["scaler_state"]))
            self._restore_rng(checkpoint["rng_state"], checkpoint["iter"])
            self.iter, self.best_val = checkpoint["iter"], checkpoint["best_val"]
            progress = _finite_numbers(checkpoint["data_state"])
            self.progress = {name: progress.get(name, 0) for name in self.progress}
        except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be resumed ({short_reason(error)}): name another with --resume-from"
            ) from None

    def _restore_rng(self, states, step):
        """Give this rank the state it had; a new one if the number of ranks has changed."""
        if not self.ranks.is_main:  # the main rank's state is there for any number of ranks
            others = states.get("other_ranks", [])
            if len(others) != self.ranks.size - 1:
                torch.manual_seed(self._seed(self.ranks.rank, step))
                return
            states = others[self.ranks.rank - 1]
        torch.set_rng_state(states["torch"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def loss(self, inputs, targets, with_repulsion, micro_step=0):
        """Forward pass: returns the loss to minimise and the cross-entropy in it, both scalars.

        Args:
            inputs, targets: (B, T) ids.
        """
        is_ngt = isinstance(self.raw_model, NGT)
        cross_entropy, z, mass = self.forward(self.model, inputs, targets, is_ngt)
        loss = cross_entropy
        if is_ngt and with_repulsion:
            # seeded by the step, so that every rank samples the same positions
            seed = (self.config["seed"] * 1_000_003 + self.iter) * 1_009 + micro_step
            sample = torch.Generator().manual_seed(seed % SEEDS)
            repulsion = repulsion_loss(z, mass, generator=sample)
            loss = cross_entropy + self.config["lambda_repulsion"] * repulsion
        elif is_ngt:
            # a gradient of 0: DistributedDataParallel expects one for every parameter, and the last
            # layer's coordinates feed nothing else
            loss = cross_entropy + 0.0 * z.sum()
        return loss, cross_entropy.detach()

    def step(self):
        """One optimizer step: fetch, forward and backward per micro-step, then the optimizer.

        Returns:
            `(cross-entropy, norm of the gradient)`, floats. If either is not finite, no weight was
            changed.
        """
        c = self.config
        set_learning_rates(self.optimizer, self.iter, c)
        with_repulsion = c["repulsion"] and self.iter % c["repulsion_interval"] == 0
        mean, micro_steps = 0.0, c["gradient_accumulation_steps"]
        for micro_step in range(micro_steps):
            inputs, targets = self._fetch(micro_step)
            is_last = micro_step == micro_steps - 1
            with contextlib.nullcontext() if is_last else self._no_sync():
                with self.autocast():
                    loss, cross_entropy = self.loss(inputs, targets, with_repulsion, micro_step)
                self.scaler.scale(loss / micro_steps).backward()
            mean += float(cross_entropy) / micro_steps
        mean = self.ranks.mean(mean)
        self.scaler.unscale_(self.optimizer)
        limit = c["grad_clip"] or math.inf  # the norm is wanted even without clipping
        norm = float(torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), limit))
        finite = math.isfinite(mean) and math.isfinite(norm)
        if finite or self.scaler.is_enabled():  # the scaler itself skips a step that overflowed
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(mean, finite)
        return mean, norm

    def _fetch(self, micro_step):
        """This rank's part of a batch, (batch_size / ranks, block_size) inputs and targets."""
        c, share = self.config, self.config["batch_size"] // self.ranks.size
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        batch = get_batch(
            self.data.train, c["batch_size"], c["block_size"], c["seed"], self.iter, micro_step
        )
        return [part[mine].to(self.device) for part in batch]

    def _no_sync(self):
        """A context in which backward does not average over the ranks: once per step is enough."""
        return self.model.no_sync() if self.ranks.size > 1 else contextlib.nullcontext()

    def _count(self, loss, finite):
        """Count a step, and whether it was skipped."""
        p = self.progress
        self.iter += 1
        p["tokens"] += self.tokens_per_step
        # an overflow of fp16 gradients is the scaler's search for its scale, no fault of the run
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
        """Mean training loss since the last call; NaN if there was no finite one."""
        p = self.progress
        mean = p["train_loss_sum"] / p["train_loss_count"] if p["train_loss_count"] else math.nan
        p["train_loss_sum"], p["train_loss_count"] = 0.0, 0
        return mean

    def is_sound(self):
        """Whether every weight is finite; otherwise no checkpoint is written."""
        return all(bool(torch.isfinite(p).all()) for p in self.raw_model.parameters())


def _finite_numbers(named):
    """The dict itself, checked to hold finite numbers only.

    Raises:
        ValueError: if one is no finite number.
    """
    for name, value in named.items():
        if type(value) not in (int, float) or not -1e300 < value < 1e300:
            raise ValueError(f"{name[:40]} is no number")
    return named
