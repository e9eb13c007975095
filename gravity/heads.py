"""Splitting into heads and merging them again, and the inverse of softplus."""

import torch


def softplus_inverse(value):
    """The number whose softplus is `value` (> 0)."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return (value + torch.log(-torch.expm1(-value))).float()


def split_heads(x, num_heads):
    """(B, T, H*C) to (B, H, T, C)."""
    batch, tokens, width = x.shape
    return x.view(batch, tokens, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, C) to (B, T, H*C)."""
    batch, heads, tokens, width = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * width)
