"""Data-parallel training under torchrun: which process this is, and how processes agree."""

import contextlib
import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from system.errors import UsageError

# a rank that dies is noticed at once, one that hangs after this time
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one's `rank` among `size`, and its number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self):
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def mean(self, value):
        """The mean over all ranks of a number, or of a tensor, which is not read here."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.size

    def sum(self, value):
        """The sum of a number over all ranks."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def largest(self, value):
        """The largest of a number over all ranks."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value, operation):
        if self.size == 1:
            return value
        if torch.is_tensor(value):
            dist.all_reduce(value, operation)
            return value
        on_gpu = dist.get_backend() == "nccl"  # NCCL reduces tensors on GPUs only
        tensor = torch.tensor(float(value), dtype=torch.float64, device="cuda" if on_gpu else "cpu")
        dist.all_reduce(tensor, operation)
        return float(tensor)

    def gathered(self, value):
        """A list of every rank's object."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self):
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined():
    """A context with this process's `Ranks`, from torchrun's environment; only the first prints.

    Raises:
        UsageError: if the environment is incomplete.
    """
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    except (KeyError, ValueError):
        ranks = Ranks()
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError("WORLD_SIZE is set but not RANK: start with torchrun") from None
    if ranks.size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    _init_process_group(ranks)
    try:
        with contextlib.ExitStack() as stack:
            if not ranks.is_main:  # every line would come once per process
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield ranks
            ranks.wait()
    finally:
        dist.destroy_process_group()


def _init_process_group(ranks):
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") != str(ranks.size):
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    # after a restart torchrun's store still holds the addresses of the earlier processes, so
    # every start uses keys with a prefix of its own
    store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=TIMEOUT
    )


def is_restarted():
    """Whether torchrun has restarted these processes after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def distribute(model, device, ranks):
    """The model with its gradients averaged over all ranks; itself if there is only one."""
    if ranks.size == 1:
        return model
    c = model.config
    # the published law without a cutoff has a radius that gets no gradient
    unused = getattr(c, "law", None) == "published" and c.cutoff == "none"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=unused,
        gradient_as_bucket_view=True,  # otherwise every gradient is in memory twice
    )
