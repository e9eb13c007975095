"""What a token passes on, mixed with what the token before it does; compiled on CPUs.

Letters in shapes as in `law.py`.
"""

import ctypes

import torch

from gravity.cpu import cpu_handles, library


def mix_with_token_before(x, share, kv_cache, name):
    """`(1 - share) x_j + share x_(j-1)` for each token j; a text's first token keeps its own.

    Args:
        x: (B, T, C).
        share: (C,).
        kv_cache: remembers the last token for the first one of the next call; or None.
        name: under which the cache remembers it.
    """
    if kv_cache is None and not torch.compiler.is_compiling() and cpu_handles(x, x):
        return _CompiledMix.apply(x, share)
    before = x[:, :1] if kv_cache is None else kv_cache.exchange(name, x)
    if x.shape[1] > 1:
        before = torch.cat([before, x[:, :-1]], 1)
    return torch.lerp(x, before, share.to(x.dtype))


class _Mix(ctypes.Structure):
    """`struct Mix` of cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "channels", "is_bf16", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "share", "result", "grad", "d_x", "d_share")),
    ]


class _CompiledMix(torch.autograd.Function):
    """`(1 - share) x_j + share x_(j-1)` for each token j of x (B, T, C), a text's first token as it
    is, and share (C,); in fp32 or bf16, in one pass over the memory, and its gradients in one."""

    @staticmethod
    def forward(ctx, x, share):
        x, share = x.contiguous(), share.float().contiguous()
        ctx.save_for_backward(x, share)
        result = torch.empty_like(x)
        _run_mix("mix_forward", x, share, result=result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, share = ctx.saved_tensors
        d_x, d_share = torch.empty_like(x), torch.empty_like(share)
        _run_mix("mix_backward", x, share, grad=grad.contiguous(), d_x=d_x, d_share=d_share)
        return d_x, d_share


def _run_mix(kernel, x, share, **tensors):
    """Call a kernel with the fields of a `_Mix`, whose other tensors are given by name."""
    problem = _Mix(*x.shape, x.dtype == torch.bfloat16, torch.get_num_threads())
    for name, tensor in dict(x=x, share=share, **tensors).items():
        setattr(problem, name, tensor.data_ptr())
    getattr(library(), kernel)(ctypes.byref(problem))
