"""Softmax attention with a learned sink: a token that every token sees and that passes on nothing.

The softmax's denominator has one more term, so that a head can attend to nothing:

    out_i = sum_j exp(q_i k_j / sqrt(D)) v_j / (exp(sink) + sum_j exp(q_i k_j / sqrt(D)))

As in gpt-oss (2025); kin: attention sinks (Xiao et al. 2023, arXiv:2309.17453) and softmax off by
one (Miller 2023). Letters in shapes as in `gravity/law.py`.
"""

import math

import torch
import torch.nn.functional as F


def attention_with_sink(q, k, v, sink, mask=None, is_causal=False):
    """Attention of each token to itself and those before it, (B, H, Tq, D).

    Args:
        q, k, v: (B, H, Tq, D), (B, H, Tk, D) twice.
        sink: a logit per head, (H,).
        mask, is_causal: as for `scaled_dot_product_attention`, of which only one is given.
    """
    if q.is_cpu:
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
            mask = mask.expand(*q.shape[:2], -1, -1)
        return _SinkOnCPU.apply(q, k, v, sink, mask, is_causal)
    return _with_one_key_more(q, k, v, sink, mask, is_causal)


class _SinkOnCPU(torch.autograd.Function):
    """PyTorch's kernel for CPUs, scaled by what the sink leaves of the softmax's sum.

    The kernel's backward pass takes the output and the logarithm of the sum; with those of the
    softmax that has a sink, it gives the gradients of that softmax.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, mask, is_causal):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = kernel(q, k, v, is_causal=is_causal, attn_mask=mask)
        sink = sink.to(log_sum.dtype)[:, None]  # (H, 1) beside (B, H, Tq)
        log_total = torch.logaddexp(log_sum, sink)
        out = out * (log_sum - log_total).exp().to(out.dtype)[..., None]
        ctx.is_causal = is_causal
        ctx.save_for_backward(q, k, v, mask, out, log_total, (sink - log_total).exp())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        q, k, v, mask, out, log_total, share_of_sink = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = kernel(*(grad_out, q, k, v, out, log_total, 0.0, ctx.is_causal), attn_mask=mask)
        d_sink = -((grad_out * out).sum(-1) * share_of_sink).sum((0, 2))  # (H,)
        return *grads, d_sink, None, None


def _with_one_key_more(q, k, v, sink, mask, is_causal):
    """The sink as one more key, felt through a channel of its own: the fast kernels for GPUs take
    no mask that learns."""
    width = q.shape[-1]
    padding = 8 - width % 8  # their widths are multiples of 8
    # a first query, dropped at the end, keeps the triangle of is_causal where it was
    q = F.pad(q, (0, padding, int(is_causal), 0))
    k, v = (F.pad(x, (0, padding, 1, 0)) for x in (k, v))
    q[..., width] = 1
    k[:, :, 0, width] = sink.to(k.dtype) * math.sqrt(width)
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=mask.dtype == torch.bool)  # all tokens see the sink
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=1 / math.sqrt(width)
    )
    return out[:, :, int(is_causal) :, :width]
