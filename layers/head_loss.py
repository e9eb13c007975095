"""The loss of a model's last product, without ever keeping all of its logits."""

import torch
import torch.nn.functional as F

from layers.parts import soft_cap

NUMBERS_AT_ONCE = 1 << 18  # logits that a core's cache holds


def head_loss(h, head, cap, targets):
    """The mean cross-entropy of `soft_cap(head(h), cap)`, in nats, a scalar in fp32.

    On a CPU in fp32 a part of the tokens at a time is taken from logits to gradients while it is in
    the cache, and the logits of a batch are never in memory together, as in Liger Kernel (Hsu et
    al. 2024, arXiv:2410.10989) and Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009).

    Args:
        h: (B, T, hidden_dim).
        head: the linear map to the vocabulary.
        targets: ids, (B, T).
    """
    in_parts = (
        h.is_cpu
        and h.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if in_parts:
        return _LossInParts.apply(h.flatten(0, 1), head.weight, head.bias, cap, targets.flatten())
    logits = soft_cap(head(h), cap)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class _LossInParts(torch.autograd.Function):
    """The forward pass computes the gradients, too."""

    @staticmethod
    def forward(ctx, h, weight, bias, cap, targets):
        count, vocab_size = len(h), len(weight)
        d_h, d_weight = torch.empty_like(h), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float64)
        rows = max(128, NUMBERS_AT_ONCE // vocab_size)
        for x, to_x, target in zip(*(y.split(rows) for y in (h, d_h, targets)), strict=True):
            logits = F.linear(x, weight, bias)  # (rows, vocab_size), and so are all that follow
            if cap:
                logits.div_(cap).tanh_()
                slope = 1 - logits.square()
                logits.mul_(cap)
            losses = torch.logsumexp(logits, 1, keepdim=True)
            target = target[:, None]
            total += (losses - logits.gather(1, target)).sum(dtype=torch.float64)
            gradient = logits.sub_(losses).exp_()  # the softmax
            gradient.scatter_add_(1, target, gradient.new_full((), -1.0).expand_as(target))
            gradient.div_(count)
            if cap:
                gradient.mul_(slope)
            torch.mm(gradient, weight, out=to_x)
            d_weight.addmm_(gradient.T, x)
            if bias is not None:
                d_bias += gradient.sum(0)
        ctx.save_for_backward(d_h, d_weight, d_bias)
        return (total / count).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients = ctx.saved_tensors
        if grad != 1:
            gradients = [None if x is None else x * grad for x in gradients]
        return *gradients, None, None
