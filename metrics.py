"""Evaluation, and what a run leaves behind: metrics.jsonl, config.json and TensorBoard's files."""

import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data import eval_batches, eval_windows
from errors import UserError, warn
from gravity_blocked import cpu_multiplies_bf16
from model import NGT, repulsion_loss
from ranks import Ranks

PROJECTOR_LIMIT = 10_000  # labels beyond which TensorBoard's page becomes sluggish


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
    disable = None if ranks.is_main else True
    for number, (inputs, targets) in enumerate(
        tqdm(batches, "evaluating", count_of_batches, leave=False, delay=2, disable=disable)
    ):
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


HEADER = (
    f"{'step':>7} {'train':>8} {'val':>8} {'ppl':>9} {'bits/byte':>9} {'repulsion':>9} "
    f"{'tokens/s':>9} {'left':>9}"
)


def table_row(row, seconds_left):
    """One evaluation as a line under `HEADER`."""
    repulsion = "-" if row["repulsion"] is None else f"{row['repulsion']:.4f}"
    minutes, seconds = divmod(round(seconds_left), 60)
    return (
        f"{row['step']:>7} {row['train_loss']:>8.4f} {row['val_loss']:>8.4f} "
        f"{row['perplexity']:>9.3f} {row['bits_per_byte']:>9.4f} {repulsion:>9} "
        f"{row['tokens_per_s']:>9,.0f} {f'{minutes}m{seconds:02d}s':>9}"
    )


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
    """

    def __init__(self, directory, config, start_step=0):
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if start_step == 0:
                self._clear()
            self._cut_rows(start_step)
            (self.directory / "config.json").write_text(json.dumps(config, indent=2))
            self._writer = SummaryWriter(self.directory, purge_step=start_step + 1)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be written ({error.strerror or error}): free it or give "
                "another --run-name"
            ) from None

    def _clear(self):
        for path in self.directory.glob("events.out.tfevents.*"):
            path.unlink()
        for path in self.directory.iterdir():
            if path.is_dir() and (path / "default").is_dir():  # the embedding projector's
                shutil.rmtree(path)

    def _cut_rows(self, start_step):
        path = self.directory / "metrics.jsonl"
        if path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= start_step]
            if start_step == 0:
                rows = []
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluation(self, row):
        """Append one evaluation to metrics.jsonl and TensorBoard."""
        # JSON has no NaN
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps(finite) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def geometry(self, model, step):
        """Histograms of what the geometry of an NGT learned."""
        with torch.no_grad():
            self._histogram("mass", model.mass(_all_tokens(model)), step)
            for n, layer in enumerate(model.layers):
                attn = layer.attn
                learned = {"radius": attn.radius}
                if model.config.law == "newton":
                    learned["time_scale"] = attn.time_scale
                    learned["time_offset"] = attn.time_offset
                    learned["window"] = attn.window
                    learned["retardation"] = attn.retardation
                for name, values in learned.items():
                    if values is not None:
                        self._histogram(f"layer{n}/{name}", values.flatten(), step)

    def _histogram(self, name, values, step):
        if bool((values.abs() < 1e20).all()):  # as far as TensorBoard's bins reach
            self._writer.add_histogram(name, values, step)

    def projector(self, model, tokenizer, step):
        """Token embeddings with readable labels and masses for TensorBoard's projector."""
        tokens = _all_tokens(model)[:PROJECTOR_LIMIT]
        with torch.no_grad():
            embeddings = model.token_emb(tokens).float()
            labels = [[tokenizer.label(int(i)).replace("\t", " ")] for i in tokens]
            header = ["token"]
            if isinstance(model, NGT):
                masses = model.mass(tokens)
                labels = [
                    [label[0], f"{float(mass):.4f}"]
                    for label, mass in zip(labels, masses, strict=True)
                ]
                header.append("mass")
        # one column must be a plain list: a header is only allowed for several
        single = len(header) == 1
        metadata = [label[0] for label in labels] if single else labels
        self._writer.add_embedding(
            embeddings,
            metadata=metadata,
            metadata_header=None if single else header,
            global_step=step,
            tag="token_embedding",
        )

    def close(self):
        self._writer.close()


def _all_tokens(model):
    return torch.arange(model.config.vocab_size, device=model.token_emb.weight.device)


def read_metrics(path):
    """Rows of a metrics.jsonl; a last line torn by a crash is left out.

    Raises:
        UserError: where any other line is damaged.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path} line {number} is damaged: remove that line") from None
            warn(f"{path}: the last line is torn and left out")
    return rows


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
