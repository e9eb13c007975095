"""The parts of a layer that both models share, each as its config says.

Letters in shapes as in `gravity/law.py`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

EPS = torch.finfo(torch.float32).eps  # added to a mean of squares, as PyTorch's rms_norm does


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467); its weight is rounded to the
    precision of what it normalises, without which PyTorch warns and is slow."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if (
            x.device.type == "cpu"
            and not x.dtype.itemsize < 4
            and not torch.compiler.is_compiling()
        ):
            return _RMSNormOnCPU.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """The same to the bit; its backward pass borrows LayerNorm's, which is one kernel on CPUs."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return x * inverse * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        # LayerNorm's gradients for a mean of 0, but that of the mean, which it has subtracted
        to_x, to_weight, _ = torch.ops.aten.native_layer_norm_backward(
            *(grad, x, weight.shape, torch.zeros_like(inverse), inverse, weight, None),
            [True, True, False],
        )
        to_x += inverse * (grad @ weight)[..., None] / len(weight)
        return to_x, to_weight, None


def inverse_rms(x):
    """`1 / sqrt(mean of x^2)` of each token of x (B, T, C), (B, T, 1)."""
    if torch.compiler.is_compiling():  # it fuses what autograd would make passes of
        return (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
    return _InverseRMS.apply(x) if torch.is_grad_enabled() else _inverse_rms(x)


def _inverse_rms(x):
    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()


class _InverseRMS(torch.autograd.Function):
    """With one pass over x in each direction."""

    @staticmethod
    def forward(ctx, x):
        inverse = _inverse_rms(x)
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, inverse = ctx.saved_tensors
        return x * (grad * inverse.pow(3)).div_(-x.shape[-1])


def norm(config, width):
    """The normalisation of so many channels that the config names."""
    return RMSNorm(width) if config.norm == "rmsnorm" else nn.LayerNorm(width)


def linear(config, inputs, outputs):
    """A linear map inside a model, with a bias if the config says so."""
    return nn.Linear(inputs, outputs, bias=config.bias)


class FeedForward(nn.Module):
    """Two linear maps with a nonlinearity between them, (B, T, hidden_dim) to the same shape.

    GELU, or the square of ReLU (So et al. 2021, Primer, arXiv:2109.08668).
    """

    def __init__(self, config):
        super().__init__()
        self.squares = config.activation == "relu2"
        self.up_proj = linear(config, config.hidden_dim, config.mlp_dim)
        self.down_proj = linear(config, config.mlp_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h):
        h = self.up_proj(h)
        h = _SquaredReLU.apply(h) if self.squares else F.gelu(h)
        return self.dropout(self.down_proj(h))


class _SquaredReLU(torch.autograd.Function):
    """`relu(x)^2`, with fewer passes over the gradients than autograd makes."""

    @staticmethod
    def forward(ctx, x):
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


def skip_weights(config):
    """The weights of the hidden state and of the embedding before a layer, (2,); None without
    `--embedding-skip`. At the start the embedding has none."""
    return nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_skip else None


def embedding_skip(h, embedding, weights):
    """`a h + b embedding` with the weights (a, b); `h` itself without weights.

    `h` and `embedding` are (B, T, hidden_dim). The idea is from modded-nanogpt (Jordan et al. 2024,
    https://github.com/KellerJordan/modded-nanogpt).
    """
    return h if weights is None else weights[0] * h + weights[1] * embedding


def value_share(config, layer):
    """The share of the first layer's values in this layer's, (); None in the first layer, and
    without `--value-residual`."""
    return nn.Parameter(torch.tensor(0.5)) if config.value_residual and layer else None


def value_residual(v, first_values, share):
    """The values `(1 - share) v + share first_values`; `v` itself without a share.

    Both are (B, T, hidden_dim) and of the same tokens (Zhou et al. 2024, Value residual learning,
    arXiv:2410.17897).
    """
    return v if share is None else torch.lerp(v, first_values, share.to(v.dtype))


def soft_cap(logits, cap):
    """`cap tanh(logits / cap)`, at least in fp32; the logits themselves for a cap of 0.

    Gemma 2 (2024, arXiv:2408.00118).
    """
    if not cap:
        return logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cap * torch.tanh(logits / cap)


@torch.no_grad()
def init_weights(model):
    """Start as GPT-2: normal(0, 0.02), divided by sqrt(2 layers) for what is added to `h`.

    With `--zero-init-outputs` what is added starts at 0.
    """
    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 0.02
            if name.endswith(("out_proj", "down_proj")):
                std /= math.sqrt(2 * config.num_layers)
                std *= not config.zero_init_outputs
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    if config.tie_head:
        model.head.weight = model.token_emb.weight


def check_context(model, length):
    """Raise `ValueError` if a model has fewer positions than `length` tokens need."""
    if model.max_context is not None and length > model.max_context:
        raise ValueError(f"{length} tokens do not fit block_size {model.max_context} of this model")
