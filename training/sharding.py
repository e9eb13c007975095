"""The weights of a run: whole on every rank, or under `--shard model` in parts, one per rank.

Sharded weights are PyTorch's FSDP2, `fully_shard` (Zhao et al. 2023, arXiv:2304.11277; ZeRO stage
3, Rajbhandari et al. 2020, arXiv:1910.02054): before a layer computes, its weights are gathered,
and its gradients are divided among the ranks as soon as they are there.
"""

import contextlib
import dataclasses
import warnings

import torch
import torch.distributed as dist
from torch import nn

from engine.models import weightless_model
from system.errors import UsageError, warn
from training.ranks import Ranks, distribute


def check_shard(args, config, ranks):
    """Refuse a --shard that cannot work here; one process has nothing to share.

    Raises:
        UsageError: it names the flags that help.
    """
    if ranks.size == 1:
        if config["shard"] == "model":
            if args.shard and "shard" not in getattr(args, "from_file", ()):
                raise UsageError(
                    "--shard model divides a model among processes: start with "
                    "torchrun --nproc_per_node=2, or drop the flag"
                )
            warn("--shard model has no effect in a single process")
        config["shard"] = "none"  # a run's config says what it did
    elif config["shard"] == "model" and config["compile"]:
        raise UsageError(
            "--compile does not work with --shard model: give --no-compile or --shard optimizer"
        )


def place(model, config, device, ranks):
    """The `Weights` of a model on its device, as `--shard` says."""
    if config["shard"] != "model" or ranks.size == 1:
        return Weights(model.to(device), device, ranks)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"--shard model does not work on {device.type}: give --device cpu or --shard optimizer"
        )
    return ShardedWeights(model, device, ranks, config["model_type"])


class Weights:
    """The weights of a model, whole on every rank.

    `model` computes, and averages gradients over the ranks; `named` holds the parameters that this
    rank's optimizer changes, by name.
    """

    are_sharded = False

    def __init__(self, model, device, ranks):
        self.raw_model, self.ranks = model, ranks
        self.model = distribute(model, device, ranks)
        self.named = dict(model.named_parameters())

    def without_averaging(self):
        """A context in which backward does not average over the ranks: once per step is enough."""
        return self.model.no_sync() if self.ranks.size > 1 else contextlib.nullcontext()

    def hand_over_gradients(self):
        """Give the parameters in `named` the gradients that backward has made."""

    def clip_gradients(self, limit):
        """Scale all gradients so that their norm is at most `limit`; returns it before that, ()."""
        return torch.nn.utils.clip_grad_norm_(self.named.values(), limit)

    def are_finite(self):
        return all(bool(torch.isfinite(weight).all()) for weight in self.named.values())

    def state(self):
        """The model's state dict. All ranks call it; only the main one's is whole."""
        return self.raw_model.state_dict()

    def load(self, state):
        """Take the weights of a state dict, which is whole on every rank."""
        self.raw_model.load_state_dict(state)

    def whole_model(self):
        """The model to look at or to generate with. All ranks call it; only the main one has it."""
        return self.raw_model


class ShardedWeights(Weights):
    """The weights of a model of which every rank keeps its part.

    The optimizer sees each part as a parameter of its own, an ordinary tensor that shares memory
    with FSDP's. So it needs to know nothing of FSDP; `part.cut` tells of what it is a part.
    """

    are_sharded = True

    def __init__(self, model, device, ranks, model_type):
        from torch.distributed.device_mesh import init_device_mesh  # they take a second to import
        from torch.distributed.fsdp import fully_shard

        # it warns of views among a layer's outputs: changed in place they would lose their hooks
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device.type, (ranks.size,))
        # FSDP cannot divide a single number: every rank keeps it
        single = {weight for weight in model.parameters() if weight.dim() == 0}
        for weight in single:
            weight.data = weight.data.to(device)
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, ignored_params=single)
        self.raw_model = self.model = model
        self.ranks = ranks
        self._config = dataclasses.asdict(model.config) | {"model_type": model_type}
        # after an evaluation the model itself may hold gathered weights in place of these
        self._sharded = dict(model.named_parameters(remove_duplicate=False))
        parts = {id(w): w if w in single else _part_of(w, ranks) for w in self._sharded.values()}
        self._part = {name: parts[id(weight)] for name, weight in self._sharded.items()}
        self.named = {name: parts[id(weight)] for name, weight in model.named_parameters()}

    def without_averaging(self):
        # gradients that are not yet averaged would not be divided among the ranks either
        return contextlib.nullcontext()

    def hand_over_gradients(self):
        single = [part for part in self.named.values() if part.dim() == 0]
        single = [part for part in single if part.grad is not None]
        if single:
            mean = self.ranks.mean(torch.stack([part.grad for part in single]))
            for part, gradient in zip(single, mean.unbind(), strict=True):
                part.grad = gradient
        for name, part in self.named.items():
            weight = self._sharded[name]
            if weight is not part and weight.grad is not None:
                part.grad, weight.grad = weight.grad.to_local(), None

    def clip_gradients(self, limit):
        parts = [part for part in self.named.values() if part.grad is not None]
        of_parts = torch.nn.utils.get_total_norm([x.grad for x in parts if x.dim()])
        norm = self.ranks.sum(of_parts.double().square())
        single = [part.grad for part in parts if part.dim() == 0]
        if single:
            norm = norm + torch.stack(single).square().sum()
        norm = norm.sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(parts, limit, norm)
        return norm

    def are_finite(self):
        return not self.ranks.largest(not super().are_finite())

    def state(self):
        whole = {}
        for part in self._part.values():
            if id(part) not in whole:
                whole[id(part)] = gathered(part.detach(), part)
        return {name: whole[id(part)] for name, part in self._part.items()}

    @torch.no_grad()
    def load(self, state):
        if state.keys() != self._part.keys():
            raise ValueError("model_state is of another model")
        for name, part in self._part.items():
            if state[name].shape != whole_shape(part):
                raise ValueError("model_state is of another model")
            part.copy_(part_for(state[name], part))

    def whole_model(self):
        state = self.state()
        if not self.ranks.is_main:
            return None
        model = weightless_model(self._config)
        model.load_state_dict(state, assign=True)
        return model.eval()


@dataclasses.dataclass(frozen=True)
class Cut:
    """A division of a tensor among ranks, as FSDP does it: by rows, as `torch.chunk`."""

    shape: torch.Size
    ranks: Ranks

    @property
    def rows(self):
        """Of every part but the last ones, which may have fewer or none."""
        return -(-self.shape[0] // self.ranks.size)

    def numbers(self):
        """How many numbers each rank's part has, a list."""
        per_row = self.shape[1:].numel()
        starts = range(0, self.rows * self.ranks.size, self.rows)
        return [per_row * max(0, min(self.rows, self.shape[0] - start)) for start in starts]


def _part_of(weight, ranks):
    part = nn.Parameter(weight.detach().to_local(), requires_grad=weight.requires_grad)
    part.cut = Cut(weight.shape, ranks)
    return part


def whole_shape(parameter):
    """The shape of the parameter of which this may be a part."""
    return parameter.cut.shape if hasattr(parameter, "cut") else parameter.shape


def part_for(whole, parameter):
    """What of a whole tensor belongs to a parameter that may be a part of it."""
    if not hasattr(parameter, "cut"):
        return whole
    rows, rank = parameter.cut.rows, parameter.cut.ranks.rank
    return whole[rank * rows : (rank + 1) * rows].clone()  # a view would keep the whole


def gathered(tensor, parameter):
    """The whole of which every rank has a part, on the main rank and there on the CPU; else None.

    Args:
        tensor: this rank's part, in the shape of `parameter`; itself whole if that is no part.
    """
    if not hasattr(parameter, "cut"):
        return tensor
    cut = parameter.cut
    padded = tensor.new_zeros(cut.rows, *tensor.shape[1:])  # all ranks must send equally many
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(cut.ranks.size)] if cut.ranks.is_main else None
    dist.gather(padded, parts)
    return torch.cat([part.cpu() for part in parts])[: cut.shape[0]] if cut.ranks.is_main else None


def on_whole_matrices(function, tensors, parameters):
    """A function of matrices, applied to whole ones even if every rank has only parts of them.

    Args:
        function: of one matrix; returns another of its shape.
        tensors: parts of at most as many matrices as there are ranks; each rank computes one.
            Any number of whole matrices.
        parameters: the parts of the model that they belong to.

    Returns:
        The results, or this rank's parts of them.
    """
    if not hasattr(parameters[0], "cut"):
        return [function(tensor) for tensor in tensors]
    cuts, ranks = [parameter.cut for parameter in parameters], parameters[0].cut.ranks
    none = [0] * ranks.size
    here = [tensor.numel() for tensor in tensors]
    to_ranks = here + none[len(here) :]
    mine = cuts[ranks.rank] if ranks.rank < len(cuts) else None
    from_ranks = none if mine is None else mine.numbers()
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    whole = flat.new_empty(sum(from_ranks))
    dist.all_to_all_single(whole, flat, from_ranks, to_ranks)
    if mine is not None:
        whole = function(whole.view(mine.shape)).to(flat.dtype).flatten()
    dist.all_to_all_single(flat, whole, to_ranks, from_ranks)
    return [x.view_as(tensor) for x, tensor in zip(flat.split(here), tensors, strict=True)]
