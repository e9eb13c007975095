"""The optimizer of a run, its learning rates, and its state in a checkpoint."""

import contextlib
import math

import torch
from torch import nn
from torch.optim import _muon

from training.sharding import gathered, on_whole_matrices, part_for, whole_shape


def make_optimizer(model, config, device, ranks, on_device=False, named=None):
    """AdamW, or under `--optimizer muon` a `MuonAndAdamW`, with weight decay on matrices only.

    AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. With `--shard optimizer` every rank keeps a
    share of the state (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054).

    Args:
        on_device: keep learning rates on the device, so that a step can be recorded as a CUDA
            graph, and taken or left out by `step_unless`.
        named: the parameters by name (default: the model's); under `--shard model` this rank's
            parts of them.
    """
    named = dict(model.named_parameters()) if named is None else named
    of_muon = matrices_inside(model) if config["optimizer"] == "muon" else []
    for_muon = [named[name] for name in of_muon]
    decay, keep = [], []
    for name, parameter in named.items():
        if name in of_muon:
            continue
        # biases, norms and masses have no reason to be near 0
        is_matrix = parameter.dim() >= 2 and not name.startswith("mass_emb")
        (decay if is_matrix else keep).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config["weight_decay"]},
        {"params": keep, "weight_decay": 0.0},
    ]
    rate = config["learning_rate"]
    if on_device:
        rate = torch.tensor(rate, device=device)
    settings = {"lr": rate, "betas": (0.9, config["beta2"])}
    settings["fused"] = device.type in ("cpu", "cuda")
    is_shared = config["shard"] == "optimizer" and ranks.size > 1
    has_parts = any(hasattr(parameter, "cut") for parameter in for_muon)
    adamw = _optimizer(torch.optim.AdamW, groups, settings, is_shared)
    if not for_muon:
        return adamw
    # the factor gives Muon's steps the size of AdamW's (Liu et al. 2025, arXiv:2502.16982)
    if on_device or has_parts:
        rate = torch.as_tensor(rate, device=device).clone()  # it need not be that of AdamW
    settings = {"lr": rate, "adjust_lr_fn": "match_rms_adamw"}
    settings["weight_decay"] = config["weight_decay"]
    kind = MuonOnDevice if on_device or has_parts else torch.optim.Muon
    return MuonAndAdamW(_optimizer(kind, for_muon, settings, is_shared), adamw)


def _optimizer(kind, parameters, settings, is_shared):
    if not is_shared:
        return kind(parameters, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import

    return ZeroRedundancyOptimizer(parameters, kind, **settings)


def matrices_inside(model):
    """The names of the matrices of all linear maps but the last, the head; no embeddings."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name in linear if name != "head"]


class MuonOnDevice(torch.optim.Muon):
    """Muon whose learning rate is a tensor, and that leaves out a step if its `found_inf` is 1, as
    PyTorch's fused AdamW does: the host need not know. If its matrices are parts, as `--shard
    model` makes them, each rank orthogonalises other whole ones."""

    found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            taken = torch.ones_like(group["lr"]) if self.found_inf is None else 1 - self.found_inf
            cuts = [parameter.cut for parameter in parameters if hasattr(parameter, "cut")]
            at_once = cuts[0].ranks.size if cuts else 1
            matrices = [*zip(parameters, gradients, momenta, strict=True)]
            for first in range(0, len(matrices), at_once):
                self._change(matrices[first : first + at_once], group, taken)

    def _change(self, matrices, group, taken):
        """Change some `(parameter, gradient, momentum)`; nothing changes where `taken` is 0."""
        directions = []
        for _, gradient, momentum in matrices:
            gradient = gradient.where(taken > 0, 0)  # what is not finite stays so times 0
            momentum.lerp_(gradient, (1 - group["momentum"]) * taken)
            directions.append(gradient.lerp(momentum, group["momentum"]))
        parameters = [parameter for parameter, *_ in matrices]
        settings = group["ns_coefficients"], group["ns_steps"], group["eps"]

        def orthogonal(matrix):
            return _muon._zeropower_via_newtonschulz(matrix, *settings)

        updates = on_whole_matrices(orthogonal, directions, parameters)
        for parameter, update in zip(parameters, updates, strict=True):
            rate = group["lr"] * taken
            adjusted = _muon._adjust_lr(rate, group["adjust_lr_fn"], whole_shape(parameter))
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.sub_(update.to(parameter.dtype) * adjusted)


class MuonAndAdamW:
    """Muon for the matrices inside a model and AdamW for the rest, used as one optimizer.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. In `state_dict` AdamW's
    parameters are numbered first, then Muon's.
    """

    def __init__(self, muon, adamw):
        self.parts = adamw, muon

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        saved, first = {"state": {}, "param_groups": []}, 0
        for part in self.parts:
            state, groups = _renumbered(part.state_dict(), first)
            saved["state"] |= state
            saved["param_groups"] += groups
            first += _size(part)
        return saved

    def load_state_dict(self, saved):
        first, groups = 0, [*saved["param_groups"]]
        for part in self.parts:
            count, numbers = len(part.param_groups), range(first, first + _size(part))
            own = {number: x for number, x in saved["state"].items() if number in numbers}
            state, own_groups = _renumbered({"state": own, "param_groups": groups[:count]}, -first)
            part.load_state_dict({"state": state, "param_groups": own_groups})
            first, groups = numbers.stop, groups[count:]


def step_unless(optimizer, is_skipped):
    """Take a step unless `is_skipped`, () bool on the device, is true; the host need not know.

    Args:
        optimizer: one made with `on_device`.
    """
    for part in getattr(optimizer, "parts", [optimizer]):
        part = getattr(part, "optim", part)  # the one that works, if it is shared out
        part.grad_scale, part.found_inf = None, is_skipped.float()
    optimizer.step()


@contextlib.contextmanager
def recordable(optimizer):
    """A context in which PyTorch lets a CUDA graph record the optimizer's steps."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:  # at other times AdamW warns of it
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
        # a recording that failed leaves gradients that nothing has computed
        optimizer.zero_grad(set_to_none=True)


def _size(optimizer):
    """How many parameters an optimizer has."""
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _renumbered(saved, shift):
    """The state and the groups of a saved optimizer, with all numbers of parameters shifted."""
    state = {number + shift: averages for number, averages in saved["state"].items()}
    groups = [
        group | {"params": [number + shift for number in group["params"]]}
        for group in saved["param_groups"]
    ]
    return state, groups


def is_muons(group):
    """Whether a group of parameters is Muon's."""
    return "adjust_lr_fn" in group


def set_learning_rates(optimizer, step, config):
    """Give every group of parameters its learning rate for a step.

    Muon's follows the same schedule, scaled so that it ends at the same share of its peak.
    """
    peak, of_matrices = config["learning_rate"], config["matrix_learning_rate"]
    low = config["min_learning_rate"]
    if of_matrices is None:
        of_matrices = peak
    elif peak:
        low *= of_matrices / peak
    scaled = config | {"learning_rate": of_matrices, "min_learning_rate": low}
    for group in optimizer.param_groups:
        rate = learning_rate(step, scaled if is_muons(group) else config)
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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


def state_of(optimizer, ranks):
    """An optimizer's state, for a checkpoint; only the main rank's is whole. All ranks call it."""
    parts = getattr(optimizer, "parts", [optimizer])
    shared = [part for part in parts if hasattr(part, "consolidate_state_dict")]
    for part in shared:
        part.consolidate_state_dict(to=0)
    if shared and not ranks.is_main:
        return None
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number in sorted(state["state"]):  # in one order on all ranks
        state["state"][number] = {
            name: average if name == "step" else gathered(average, parameters[number])
            for name, average in state["state"][number].items()
        }
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def restore_optimizer(optimizer, state):
    """Load an optimizer's averages; learning rate and weight decay stay those of this run.

    Args:
        state: what `state_of` returned under "state".

    Raises:
        ValueError: if they do not belong to these parameters.
    """
    groups, parameters, expected = [], [], []
    for group in optimizer.param_groups:
        numbers = range(len(parameters), len(parameters) + len(group["params"]))
        groups.append(group | {"params": [*numbers]})
        parameters += group["params"]
        names = {"momentum_buffer"} if is_muons(group) else {"step", "exp_avg", "exp_avg_sq"}
        expected += [names] * len(numbers)
    for number, averages in state.items():
        if number not in range(len(parameters)):
            raise ValueError("optimizer_state is of more parameters than there are")
        if averages.keys() != expected[number]:
            raise ValueError("optimizer_state is of another --optimizer")
        for name, average in averages.items():
            shape = () if name == "step" else whole_shape(parameters[number])
            if average.shape != shape or average.dtype != torch.float32:
                raise ValueError(f"optimizer_state is of other parameters than number {number}")
            if not bool(torch.isfinite(average).all()) or average.layout != torch.strided:
                raise ValueError("optimizer_state holds NaN or infinity")
            if name in ("step", "exp_avg_sq") and bool((average < 0).any()):
                raise ValueError("optimizer_state holds negative squares or steps")
    parts = {
        number: {
            name: average if name == "step" else part_for(average, parameters[number])
            for name, average in averages.items()
        }
        for number, averages in state.items()
    }
    optimizer.load_state_dict({"state": parts, "param_groups": groups})
