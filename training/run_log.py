"""Evaluation, and what a run leaves behind: metrics.jsonl, config.json and TensorBoard's files."""

import contextlib
import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from dashboard import Dashboard
from data import eval_batches, eval_windows
from errors import UserError, warn, write_whole
from event_file import append_whole
from gravity_blocked import cpu_multiplies_bf16
from model import NGT, repulsion_loss
from progress import evaluation_bar
from ranks import Ranks


@torch.no_grad()
def evaluate(model, data, block_size, eval_iters, device, autocast, ranks=None):
    """Cross-entropy on the fixed validation windows, and for NGT the repulsion there.

    Args:
        ranks: processes that share the windows out among them, all of which call this.

    Returns:
        dict with `val_loss` (nats a token), `perplexity`, `bits_per_byte`, `repulsion` (None for
        vanilla).
    """
    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    windows = max(1, min(8192, (1 << 26) // data.tokenizer.vocab_size) // block_size)
    total, count, repulsion = 0.0, 0, None
    batches = eval_batches(data.valid, block_size, eval_iters, windows)
    count_of_batches = -(-len(eval_windows(data.valid, block_size, eval_iters)) // windows)
    bar = evaluation_bar(batches, count_of_batches, ranks.is_main)
    for number, (inputs, targets) in enumerate(bar):
        if number % ranks.size != ranks.rank:
            continue
        inputs, targets = inputs.to(device), targets.to(device)
        with autocast():
            if isinstance(model, NGT):
                logits, geometry = model(inputs, return_geometry=True)
                if repulsion is None:
                    sample = torch.Generator().manual_seed(0)
                    repulsion = float(repulsion_loss(geometry.z, geometry.mass, generator=sample))
            else:
                logits = model(inputs)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        total += float(losses)
        count += targets.numel()
    model.train(was_training)
    loss = ranks.sum(total) / ranks.sum(count)
    return {
        "val_loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) / data.bytes_per_token,
        "repulsion": repulsion,
    }


def perplexity(loss):
    """exp(loss); inf where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_bytes(device):
    """Most memory used so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent held when it started us
        lines = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RunLog:
    """Writes `runs/<name>/`.

    Args:
        directory: where.
        config: the run's full configuration, plain types.
        start_step: 0 for a new run, else the resumed step; later rows of an earlier attempt go.

    Raises:
        UserError: as all its methods, where something cannot be written.
    """

    def __init__(self, directory, config, start_step=0):
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if start_step == 0:
                self._clear()
            rows = self._cut_rows(start_step)
            self._config = json.dumps(config, indent=2).encode()
            write_whole(self.directory / "config.json", self._config)
            self.dashboard = Dashboard(self.directory, config, start_step, rows)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be written ({error.strerror or error}): free it or give "
                "another --run-name"
            ) from None

    def _clear(self):
        for path in self.directory.glob("events.out.tfevents.*"):
            path.unlink()
        (self.directory / "projector_config.pbtxt").unlink(missing_ok=True)
        for path in self.directory.iterdir():
            # an older release kept the projector's files in folders named after the step
            if path.name == "projector" or (path / "token_embedding").is_dir():
                shutil.rmtree(path)

    def _cut_rows(self, start_step):
        """Keep the rows up to `start_step`, and return them."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        if start_step:
            rows = [row for row in read_metrics(path) if row["step"] <= start_step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return rows

    def evaluation(self, row):
        """Append one evaluation to metrics.jsonl and TensorBoard."""
        # JSON has no NaN
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
        append_whole(self.directory / "metrics.jsonl", (json.dumps(finite) + "\n").encode())
        if not (self.directory / "config.json").exists():  # somebody has tidied runs/ up
            write_whole(self.directory / "config.json", self._config)
        self.dashboard.row(row)


def read_metrics(path):
    """Rows of a metrics.jsonl; a last line torn by a crash is left out.

    Raises:
        UserError: where any other line is damaged.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: remove it, or what is damaged in it") from None
    rows = []
    for number, line in enumerate(lines, 1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if row is None and number == len(lines):
            warn(f"{path}: the last line is torn and left out")
        elif _is_row(row):
            rows.append(row)
        else:
            raise UserError(f"{path} line {number} is damaged: remove that line")
    return rows


def _is_row(row):
    """Whether it is an evaluation: named numbers, and the step they were measured at."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(isinstance(value, int | float | None) for value in row.values())
    )


def code_version():
    """The commit of this repository, with `+` where files were changed; None outside git."""
    here = Path(__file__).resolve().parent

    def git(*command):
        return subprocess.run(
            ["git", "-C", str(here), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device):
    """What this runs on, in one line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    bf16 = "multiplies" if cpu_multiplies_bf16() else "does not multiply"
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return (
        f"{name} ({capability}, {bf16} bf16 in hardware), {platform.machine()} CPU, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )
