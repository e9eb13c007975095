"""The loss in parts against PyTorch's own in float64."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import head_loss as module
from layers.head_loss import head_loss


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("tokens", [1, 128, 131, 400])  # parts are of 128
def test_loss_and_gradients_in_parts(bias, cap, tokens, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 1)
    head = nn.Linear(5, 7, bias=bias)
    h = 3 * torch.randn(1, tokens, 5)
    targets = torch.randint(7, (1, tokens))
    found = []
    for number in (torch.Tensor.float, torch.Tensor.double):
        inputs = [number(x.detach()).requires_grad_() for x in (h, *head.parameters())]
        layer = nn.Linear(5, 7, bias=bias).to(inputs[0].dtype)
        for name, x in zip(("weight", "bias"), inputs[1:], strict=False):
            setattr(layer, name, nn.Parameter(x.detach().clone()))
        loss = head_loss(inputs[0], layer, cap, targets)
        (3 * loss).backward()  # a loss is divided by micro-steps and may be scaled
        found.append([loss, inputs[0].grad, *(p.grad for p in layer.parameters())])
    logits = F.linear(*(x.double() for x in (h, *head.parameters())))
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found[1][0].double(), expected, rtol=1e-6, atol=0)
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-6)


def test_without_gradients_it_is_the_same_number():
    head, h, targets = nn.Linear(5, 7), torch.randn(2, 9, 5), torch.randint(7, (2, 9))
    with torch.no_grad():
        plain = head_loss(h, head, 2.0, targets)
    torch.testing.assert_close(head_loss(h, head, 2.0, targets), plain)
