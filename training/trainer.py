"""The state of a run: model, optimizer, precision, random numbers; what a checkpoint saves."""

import contextlib
import dataclasses
import math

import torch

from data import get_batch
from engine.checkpoint import FORMAT_VERSION
from engine.models import build_model
from gravity.cpu import cpp_compiler
from model import MAX_POSITIONS, NGT, repulsion_loss
from system.errors import UserError, warn
from system.machine import keep_freed_memory
from system.safe_text import short_reason
from system.threads import adapt_waiting
from training.optimizer import (
    make_optimizer,
    recordable,
    restore_optimizer,
    set_learning_rates,
    state_of,
    step_unless,
)
from training.precision import choose_precision
from training.ranks import Ranks
from training.sharding import place
from training.step_graph import GraphedStep

SEEDS = 1 << 63  # PyTorch's generators take seeds from 0 to below this


def forward(model, inputs, targets, with_geometry):
    """Cross-entropy of a batch, and if wanted an NGT's coordinates and masses (otherwise None).

    Args:
        inputs, targets: (B, T) ids.

    Returns:
        `(cross-entropy, z, mass)`: a scalar in fp32, (B, T, coord_dim), (B, T).
    """
    if not with_geometry:
        return model(inputs, targets=targets), None, None
    loss, geometry = model(inputs, targets=targets, return_geometry=True)
    return loss, geometry.z, geometry.mass


def maybe_compile(function, config, device):
    """The compiled function, or itself with one warning if nothing can compile it."""
    if not config["compile"]:
        return function
    if device.type == "cpu" and len(cpp_compiler() or ()) != 1:  # torch.compile takes one word
        warn("--compile needs a C++ compiler, g++ or that in CXX: training uncompiled")
        return function
    return torch.compile(function)


class Trainer:
    """The state of a run: what `step` changes and a checkpoint saves.

    Args:
        config: a value for every setting, as `training.config.resolve` returns it.
        data: a `TokenData`.
        device: a `torch.device`.
        ranks: the processes that share each batch; losses and counts are those of all of them.
        runs_ahead: prepare a step while the device still computes the one before (default: on a
            GPU); what came out of a step is then read one step later.
    """

    def __init__(self, config, data, device, ranks=None, runs_ahead=None):
        self.config, self.data, self.device = config, data, device
        self.ranks = ranks or Ranks()
        if config["shard"] != "model":  # gathered layers would leave gaps that nothing fills
            keep_freed_memory()
        self.runs_ahead = device.type == "cuda" if runs_ahead is None else runs_ahead
        vocab_size = data.tokenizer.vocab_size
        self.raw_model = build_model(config | {"vocab_size": vocab_size})
        self.has_repulsion = config["repulsion"] and isinstance(self.raw_model, NGT)
        if isinstance(self.raw_model, NGT) and not self.has_repulsion:
            self.raw_model.layers[-1].leave_motion_unlearned()
        self.weights = place(self.raw_model, config, device, self.ranks)
        # with the loss, so that the compiler can fuse it with the logits
        self.forward = maybe_compile(forward, config, device)
        self.optimizer = make_optimizer(
            *(self.raw_model, config, device, self.ranks),
            on_device=self.runs_ahead,
            named=self.weights.named,
        )
        # the weights above must be the same on all ranks, but dropout must not
        if not self.ranks.is_main:
            torch.manual_seed(self._seed(self.ranks.rank))
        self.autocast, self.scaler = choose_precision(
            config["use_amp"], device, self.weights.are_sharded
        )
        self.work = self._work
        if self._can_be_graphed():
            self.work = GraphedStep(self._work, lambda: recordable(self.optimizer))
        self.iter = 0
        self._unread = []  # what came out of the newest steps, still on the device
        self.newest = None  # (cross-entropy, norm) of the newest step that was read
        self.best_val = math.inf
        self.progress = {
            "tokens": 0,
            "train_loss_sum": 0.0,
            "train_loss_count": 0,
            "skipped_in_a_row": 0,
            "skipped": 0,
            "wall_time": 0.0,
        }

    def _can_be_graphed(self):
        is_published = getattr(self.raw_model.config, "law", None) == "published"  # asks the host
        on_gpu = self.config["compile"] and self.device.type == "cuda" and not is_published
        return on_gpu and self.ranks.size == 1 and not self.scaler.is_enabled()

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
        self.settle()
        rng = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        others = self.ranks.gathered(dict(rng))[1:]
        if others:
            rng["other_ranks"] = others
        optimizer_state = state_of(self.optimizer, self.ranks)
        return {
            "format_version": FORMAT_VERSION,
            "model_state": self.weights.state(),
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
        return float(self.optimizer.param_groups[0]["lr"])

    def restore(self, checkpoint, path):
        """Continue from a checkpoint that `state` returned, read from `path`.

        Raises:
            UserError: if it is of another text or tokenizer, or its contents are damaged.
        """
        directory = self.config["prepared_tokens"]
        where, flag = self.data.meta["source"], "--data-path"
        if directory is not None:
            where, flag = directory, "--token-directory"
        for name, mine in (
            ("source_sha256", self.data.meta["source_sha256"]),
            ("tokenizer_sha256", self.data.tokenizer.fingerprint),
        ):
            if checkpoint["config"][name] != mine:
                what = "text" if name == "source_sha256" else "tokenizer"
                raise UserError(
                    f"{path} was trained on another {what} than {where}: give {flag} of the one "
                    "it was trained on, or start anew with another --checkpoint-path"
                )
        try:
            self.weights.load(checkpoint["model_state"])
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

    def loss(self, inputs, targets, with_repulsion, sample=None):
        """Forward pass: returns the loss to minimise and the cross-entropy in it, both scalars.

        Args:
            inputs, targets: (B, T) ids.
            sample: the positions that repel each other; None for all.
        """
        cross_entropy, z, mass = self.forward(
            self.weights.model, inputs, targets, self.has_repulsion
        )
        loss = cross_entropy
        if with_repulsion:
            if sample is not None:
                z, mass = z[:, sample], mass[:, sample]
            loss = cross_entropy + self.config["lambda_repulsion"] * repulsion_loss(z, mass)
        elif self.has_repulsion:
            # a gradient of 0: DistributedDataParallel expects one for every parameter, and the last
            # layer's coordinates feed nothing else
            loss = cross_entropy + 0.0 * z.sum()
        return loss, cross_entropy.detach()

    def step(self):
        """One optimizer step: fetch, forward and backward per micro-step, then the optimizer.

        Returns:
            `(cross-entropy, norm of the gradient)`, floats, of the newest step that was read: this
            one, or if the host runs ahead the one before. A step in which either is not finite
            changed no weight.
        """
        c = self.config
        adapt_waiting()
        set_learning_rates(self.optimizer, self.iter, c)
        with_repulsion = self.has_repulsion and self.iter % c["repulsion_interval"] == 0
        batches = [
            self._fetch(micro_step, with_repulsion)
            for micro_step in range(c["gradient_accumulation_steps"])
        ]
        result = self.work(with_repulsion, batches)
        self.iter += 1
        self._unread.append(_Numbers(result))
        # the first step is slow anyway, and somebody may want to show its loss
        return self._read_all_but(1 if self.runs_ahead and self.newest else 0)

    def settle(self):
        """Wait until the device has done all steps, and count them; returns as `step`."""
        return self._read_all_but(0)

    def _work(self, with_repulsion, batches):
        """A step on the device. If the host runs ahead, nothing in here waits for the device.

        Returns:
            Cross-entropy and the gradient's norm, (2,).
        """
        mean, micro_steps = 0.0, len(batches)
        for number, (inputs, targets, *sample) in enumerate(batches, 1):
            is_last = number == micro_steps
            with contextlib.nullcontext() if is_last else self.weights.without_averaging():
                with self.autocast():
                    loss, cross_entropy = self.loss(inputs, targets, with_repulsion, *sample)
                self.scaler.scale(loss / micro_steps).backward()
            mean = mean + cross_entropy.to(self._exact) / micro_steps
        mean = self.ranks.mean(mean)
        self.weights.hand_over_gradients()
        self.scaler.unscale_(self.optimizer)
        limit = self.config["grad_clip"] or math.inf  # the norm is wanted even without clipping
        norm = self.weights.clip_gradients(limit)
        result = torch.stack([mean, norm.to(self._exact)])
        is_finite = torch.isfinite(result).all()
        if self.scaler.is_enabled():  # the scaler itself skips a step that overflowed
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.runs_ahead:
            step_unless(self.optimizer, ~is_finite)
        elif is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    @property
    def _exact(self):
        return torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64

    def _fetch(self, micro_step, with_repulsion):
        """This rank's part of a batch, on its way to the device.

        Returns:
            Inputs and targets, (batch_size / ranks, block_size) ids. If more tokens could repel
            each other than `repulsion_loss` takes, also the positions that do.
        """
        c, share = self.config, self.config["batch_size"] // self.ranks.size
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        batch = get_batch(
            self.data.train, c["batch_size"], c["block_size"], c["seed"], self.iter, micro_step
        )
        batch = [part[mine] for part in batch]
        if with_repulsion and c["block_size"] > MAX_POSITIONS:
            # seeded by the step, so that every rank samples the same positions
            seed = (c["seed"] * 1_000_003 + self.iter) * 1_009 + micro_step
            generator = torch.Generator().manual_seed(seed % SEEDS)
            batch.append(torch.randperm(c["block_size"], generator=generator)[:MAX_POSITIONS])
        if self.device.type != "cuda":  # elsewhere a copy that does not wait may read freed memory
            return tuple(part.to(self.device) for part in batch)
        # from pinned memory a copy does not wait for the device
        return tuple(part.pin_memory().to(self.device, non_blocking=True) for part in batch)

    def _read_all_but(self, newest):
        """Read what came out of all steps but so many of the newest."""
        while len(self._unread) > newest:
            loss, norm = self.newest = self._unread.pop(0).read()
            self._count(loss, math.isfinite(loss) and math.isfinite(norm))
        return self.newest

    @property
    def steps_read(self):
        return self.iter - len(self._unread)

    def _count(self, loss, finite):
        """Count a step, and whether it was skipped."""
        p = self.progress
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
        self.settle()
        p = self.progress
        mean = p["train_loss_sum"] / p["train_loss_count"] if p["train_loss_count"] else math.nan
        p["train_loss_sum"], p["train_loss_count"] = 0.0, 0
        return mean

    def is_sound(self):
        """Whether every weight is finite; otherwise no checkpoint is written."""
        return self.weights.are_finite()


class _Numbers:
    """The numbers of a tensor, on their way from the device to the host."""

    def __init__(self, tensor):
        self._tensor, self._arrived = tensor.to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self):
        """A list of floats; waits until they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.tolist()


def _finite_numbers(named):
    """The dict itself, checked to hold finite numbers only.

    Raises:
        ValueError: if one is no finite number.
    """
    for name, value in named.items():
        if type(value) not in (int, float) or not -1e300 < value < 1e300:
            raise ValueError(f"{name[:40]} is no number")
    return named
