"""In which precision a device trains."""

import contextlib

import torch

from system.errors import warn
from system.machine import cpu_multiplies_bf16


def multiplies_bf16(device):
    """Whether the device multiplies bf16 in hardware; without it bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies_bf16()


def uses_amp_by_default(device):
    """Whether a new run on this device trains in bf16 if nobody says otherwise: on a GPU only."""
    return device.type == "cuda" and multiplies_bf16(device)


def choose_precision(use_amp, device, is_sharded=False):
    """The precision of training, with one warning if `use_amp` is not possible.

    Args:
        is_sharded: every rank has gradients of its own, and all must skip the same steps.

    Returns:
        `(autocast, scaler)`: a function that makes a context for the forward pass, and a
        `GradScaler`, which only works for fp16. Neither does anything in fp32.
    """
    dtype = None
    if use_amp and multiplies_bf16(device):
        dtype = torch.bfloat16
    elif use_amp and device.type == "cuda":
        dtype = torch.float16
    elif use_amp:
        warn(f"--use-amp: this {device.type} has no fast bf16, so training runs in fp32")
    scaler_class = torch.amp.GradScaler
    if is_sharded:
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as scaler_class
    scaler = scaler_class(device.type, enabled=dtype == torch.float16)
    if dtype is None:
        return contextlib.nullcontext, scaler
    return lambda: torch.autocast(device.type, dtype=dtype), scaler
