"""The optimizer of a run, its learning rates, and its state in a checkpoint."""

import contextlib
import math

import torch
from torch import nn
from torch.optim import _muon


def make_optimizer(model, config, device, ranks, on_device=False):
    """AdamW, or under `--optimizer muon` a `MuonAndAdamW`, with weight decay on matrices only.

    AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. With `shard_optimizer` every rank keeps a
    share of the state (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054).

    Args:
        on_device: keep learning rates on the device, so that a step can be recorded as a CUDA
            graph, and taken or left out by `step_unless`.
    """
    for_muon = matrices_inside(model) if config["optimizer"] == "muon" else []
    of_muon = {id(parameter) for parameter in for_muon}
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if id(parameter) in of_muon:
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
    is_shared = config["shard_optimizer"] and ranks.size > 1
    adamw = _optimizer(torch.optim.AdamW, groups, settings, is_shared)
    if not for_muon:
        return adamw
    # the factor gives Muon's steps the size of AdamW's (Liu et al. 2025, arXiv:2502.16982)
    if on_device:
        rate = rate.clone()  # it need not be that of AdamW
    settings = {"lr": rate, "adjust_lr_fn": "match_rms_adamw"}
    settings["weight_decay"] = config["weight_decay"]
    kind = MuonOnDevice if on_device else torch.optim.Muon
    return MuonAndAdamW(_optimizer(kind, for_muon, settings, is_shared), adamw)


def _optimizer(kind, parameters, settings, is_shared):
    if not is_shared:
        return kind(parameters, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import

    return ZeroRedundancyOptimizer(parameters, kind, **settings)


def matrices_inside(model):
    """The matrices of all linear maps but the last, which is the head; no embeddings."""
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
    return [m.weight for m in linear]


class MuonOnDevice(torch.optim.Muon):
    """Muon whose learning rate is a tensor, and that leaves out a step if its `found_inf` is 1, as
    PyTorch's fused AdamW does: the host need not know."""

    found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            taken = torch.ones_like(group["lr"]) if self.found_inf is None else 1 - self.found_inf
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                gradient = gradient.where(taken > 0, 0)  # what is not finite stays so times 0
                momentum.lerp_(gradient, (1 - group["momentum"]) * taken)
                update = _muon._zeropower_via_newtonschulz(
                    gradient.lerp(momentum, group["momentum"]),
                    *(group["ns_coefficients"], group["ns_steps"], group["eps"]),
                )
                rate = group["lr"] * taken
                adjusted = _muon._adjust_lr(rate, group["adjust_lr_fn"], parameter.shape)
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
    """An optimizer's state, for a checkpoint; None on all ranks but the main one if it is shared
    out. All ranks call it."""
    parts = getattr(optimizer, "parts", [optimizer])
    shared = [part for part in parts if hasattr(part, "consolidate_state_dict")]
    for part in shared:
        part.consolidate_state_dict(to=0)
    if shared and not ranks.is_main:
        return None
    state = optimizer.state_dict()
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
            shape = () if name == "step" else parameters[number].shape
            if average.shape != shape or average.dtype != torch.float32:
                raise ValueError(f"optimizer_state is of other parameters than number {number}")
            if not bool(torch.isfinite(average).all()) or average.layout != torch.strided:
                raise ValueError("optimizer_state holds NaN or infinity")
            if name in ("step", "exp_avg_sq") and bool((average < 0).any()):
                raise ValueError("optimizer_state holds negative squares or steps")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
