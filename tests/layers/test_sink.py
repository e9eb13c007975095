"""The sink in the softmax's denominator, against a softmax in float64 with one term more."""

import math

import pytest
import torch
import torch.nn.functional as F

from layers import sink as module

SHAPES = {"causal": (9, 9), "long": (300, 300), "decoding": (1, 50), "chunk": (5, 20)}


@pytest.fixture(params=["kernel for CPUs", "one key more"])
def attention(request):
    """Either way to compute it: `_with_one_key_more` is that of GPUs."""
    if request.param == "one key more":
        return module._with_one_key_more
    return module.attention_with_sink


def inputs(queries, keys, width=6):
    shapes = [(2, 4, queries, width), (2, 4, keys, width), (2, 4, keys, width), (4,)]
    return [torch.randn(shape) for shape in shapes]


def softmax_with_sink(q, k, v, sink, mask):
    """`mask` is added to the scores."""
    weight = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).exp()
    return weight / (weight.sum(-1, keepdim=True) + sink.exp()[:, None, None]) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [6, 32])
def test_output_and_gradients(shape, width, attention):
    queries, keys = SHAPES[shape]
    tensors = [x.requires_grad_() for x in inputs(queries, keys, width)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    mask = None if queries in (1, keys) else ~future
    found = attention(*tensors, mask, queries == keys)
    added = torch.zeros(queries, keys, dtype=torch.float64).masked_fill(future, -math.inf)
    expected = softmax_with_sink(*exact, added)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(found.shape)
    found.backward(upstream)
    expected.backward(upstream.double())
    for x, y in zip(tensors, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)


def test_a_mask_of_numbers_per_head(attention):
    """As ALiBi's."""
    tensors, mask = inputs(7, 7), torch.randn(4, 7, 7)
    found = attention(*tensors, mask, False)
    expected = softmax_with_sink(*(x.double() for x in tensors), mask.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_sink_far_below_or_above(attention):
    """At -100 it is plain attention, at +100 nothing comes out; never NaN."""
    q, k, v, _ = inputs(9, 9)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    low, high = (attention(q, k, v, torch.full((4,), x), None, True) for x in (-100.0, 100.0))
    torch.testing.assert_close(low, plain, rtol=1e-5, atol=1e-6)
    assert high.abs().max() < 1e-30


def test_bf16(attention):
    tensors = inputs(40, 40, 32)
    exact = attention(*tensors, None, True)
    rounded = attention(*(x.bfloat16() for x in tensors[:3]), tensors[3], None, True)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=5e-2, atol=5e-2)
