"""The graph of a training step: what is recorded when, and what a replay reads and returns.

No CUDA device is needed: a graph is replaced by a function that does the work again, on the memory
that was there when it was recorded.
"""

import contextlib

import pytest
import torch

from small_runs import same
from training import step_graph
from training.optimizer import recordable
from training.step_graph import STEPS_BEFORE, GraphedStep


class Recorded:
    """In place of a CUDA graph."""

    def __init__(self, pool, work, arguments):
        self.own_pool, self.work, self.arguments = pool or object(), work, arguments
        self.result = torch.full((2,), -1.0, dtype=torch.float64)
        self.replays = 0

    def pool(self):
        return self.own_pool

    def replay(self):
        self.replays += 1
        self.result.copy_(self.work(*self.arguments))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were recorded, in order."""
    made = []

    def record(pool, work, *arguments):
        made.append(Recorded(pool, work, arguments))
        return made[-1], made[-1].result

    monkeypatch.setattr(step_graph, "record", record)
    monkeypatch.setattr(step_graph, "on_side_stream", lambda work, *arguments: work(*arguments))
    return made


def work(kind, batches):
    """Numbers that depend on every tensor of every batch, and on the kind."""
    total = sum(float(tensor.sum()) * 10**n for batch in batches for n, tensor in enumerate(batch))
    return torch.tensor([total, float(kind)], dtype=torch.float64)


def batches(step):
    return [tuple(torch.full((3,), step + n + part / 8) for n in range(2)) for part in range(2)]


def test_each_kind_is_recorded_and_gives_what_the_work_gives(graphs):
    step = GraphedStep(work, contextlib.nullcontext)
    results = [step(number % 4 == 0, batches(number)) for number in range(24)]
    for number, result in enumerate(results):  # none was written over by a later replay
        assert torch.equal(result, work(number % 4 == 0, batches(number))), number
    assert [graph.replays for graph in graphs] == [18 - STEPS_BEFORE, 6 - STEPS_BEFORE]
    assert graphs[0].own_pool is graphs[1].own_pool


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_a_training_of_replays_is_the_same_training(recipe, graphs, make_trainer):
    """Batches, learning rates and samples of a replayed step are its own: bit-identical weights."""
    flags = ("--recipe", recipe, "--block-size", 80, "--repulsion", "--repulsion-interval", 2)
    plain, graphed = (make_trainer(*flags, runs_ahead=True) for _ in range(2))
    graphed.work = GraphedStep(graphed.work, lambda: recordable(graphed.optimizer))
    for _ in range(10):
        plain.step()
        graphed.step()
    assert [graph.replays for graph in graphs] == [2, 2]
    for key, value in plain.state().items():
        assert same(value, graphed.state()[key]), key


def test_a_recording_that_fails_leaves_nothing_in_the_next_step(monkeypatch, graphs, make_trainer):
    """It may fail after the backward pass, whose gradients nothing has computed."""

    def fail(pool, work, kind, own):
        for parameter in graphed.raw_model.parameters():
            parameter.grad = torch.full_like(parameter, 1e3)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step_graph, "record", fail)
    plain, graphed = (make_trainer(runs_ahead=True) for _ in range(2))
    graphed.work = GraphedStep(graphed.work, lambda: recordable(graphed.optimizer))
    for _ in range(STEPS_BEFORE + 2):
        plain.step()
        graphed.step()
    for key, value in plain.state().items():
        assert same(value, graphed.state()[key]), key


def test_what_cannot_be_recorded_is_done_step_by_step(monkeypatch, graphs, capsys):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step_graph, "record", refuse)
    step = GraphedStep(work, contextlib.nullcontext)
    for number in range(3 * STEPS_BEFORE):
        kind = number % 2 == 0
        assert torch.equal(step(kind, batches(number)), work(kind, batches(number)))
    assert capsys.readouterr().err.count("--compile") == 1
