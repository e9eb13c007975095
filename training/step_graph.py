"""A training step as CUDA graphs: the host launches one graph per step instead of 1,000 kernels.

How to record one: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

import collections
import functools

import torch

from system.errors import warn
from system.safe_text import short_reason

STEPS_BEFORE = 3  # of a kind, until all that a step allocates or compiles once is there


class GraphedStep:
    """The work of a step on a GPU: done by Python for a few steps, then recorded and replayed.

    Replays repeat the recorded kernels on the same memory. So what changes from step to step must
    be in the batches, which are copied to that memory, or live on the device: weights, learning
    rates, PyTorch's random numbers.

    Args:
        work: called with a kind of step and its batches, tuples of tensors; returns a tensor.
        recording: makes a context in which the work may be recorded.
    """

    def __init__(self, work, recording):
        self.work, self.recording = work, recording
        self._done = collections.Counter()  # steps by kind
        self._recorded = {}  # (graph, its batches, its result) by kind
        self._pool = None  # memory that the graphs share: only one runs at a time
        self._gave_up = False

    def __call__(self, kind, batches):
        """Do the work of a step; returns what it returned."""
        if kind in self._recorded:
            graph, own, result = self._recorded[kind]
            for mine, given in zip(own, batches, strict=True):
                for to, tensor in zip(mine, given, strict=True):
                    to.copy_(tensor, non_blocking=True)
            graph.replay()
            return result.clone()  # the next replay writes over it
        result = on_side_stream(self.work, kind, batches)
        self._done[kind] += 1
        if self._done[kind] == STEPS_BEFORE and not self._gave_up:
            self._record(kind, batches)
        return result

    def _record(self, kind, batches):
        own = [tuple(tensor.clone() for tensor in batch) for batch in batches]
        try:
            with self.recording():
                graph, result = record(self._pool, self.work, kind, own)
        except RuntimeError as error:
            warn(
                f"--compile: the step cannot be recorded as a CUDA graph ({short_reason(error)}): "
                "training continues without one, slower"
            )
            self._gave_up = True
            return
        self._pool = graph.pool()
        self._recorded[kind] = graph, own, result


@functools.cache
def side_stream():
    """One stream for all steps before the recording: memory is kept apart for each stream."""
    return torch.cuda.Stream()


def on_side_stream(work, *arguments):
    """Work as it will be recorded, on a stream other than the default one; returns its result."""
    main, side = torch.cuda.current_stream(), side_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = work(*arguments)
    main.wait_stream(side)
    return result


def record(pool, work, *arguments):
    """Record the work without doing it; returns `(graph, result)`, which a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work(*arguments)
    return graph, result
