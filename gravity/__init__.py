"""The gravity operator: its law, and implementations for CPUs and CUDA GPUs."""

from gravity.attention import gravity_attention
from gravity.law import CUTOFFS, gravity_attention_reference, gravity_field
from gravity.published import published_gravity_attention

__all__ = [
    "CUTOFFS",
    "gravity_attention",
    "gravity_attention_reference",
    "gravity_field",
    "published_gravity_attention",
]
