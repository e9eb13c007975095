"""A run in TensorBoard: curves, geometry, text samples, hyperparameters, projector."""

import contextlib
import math
import re
import textwrap
from pathlib import Path

import torch
from google.protobuf import text_format
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch.utils.tensorboard import summary

from engine.generation import TokenStream, sample
from engine.models import model_fields
from model import NGT
from system.files import write_whole
from training.event_file import EventFile, is_own_event_file

MOST_ROWS = 1000  # TensorBoard's page draws no more points of a curve
MOST_HISTOGRAMS = 16_000  # per run, half a kilobyte each
MOST_TIMES = 200  # evaluations per run that write histograms
MOST_SAMPLES = 50  # evaluations per run that write text
LONGEST_SAMPLE = 10_000  # characters, however long the tokens are
PROMPT_TOKENS = 16
SAMPLE_WIDTH = 100  # columns
PROJECTOR_LIMIT = 10_000  # labels; with more, TensorBoard's page becomes slow
PROJECTOR_NUMBERS = 1 << 21  # in an embedding's file, about ten bytes each
LISTING = "projector_config.pbtxt"
# The projector's files, and those of the first release, which PyTorch wrote.
POINTS = re.compile(r"(projector/\d+/[^/]+|\d+/token_embedding)/(tensors|metadata)\.tsv")
COMPARED = {"val_loss": "validation loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
REWRITTEN = ("_hparams_", "by_tokens", "by_seconds")  # tags that a resumed run writes again
AGAINST = {"": "steps", "by_tokens/": "tokens", "by_seconds/": "seconds of training"}
HYPERPARAMETERS = (
    *("model", "law", "pos", "dataset", "tokenizer", "vocab_size", "parameters", "hidden_dim"),
    *("coord_dim", "head_coord_dim", "num_layers", "num_heads", "mlp_dim", "block_size"),
    *("recipe", "norm", "bias", "activation", "zero_init_outputs", "value_residual"),
    *("embedding_skip", "logit_softcap", "qk_norm", "smear", "sink", "optimizer", "beta2"),
    *("exponent", "coords_from", "retardation", "retarded_values", "background", "mass_in_value"),
    *("fixed_farthest", "use_radius_cutoff", "use_soft_cutoff", "dropout", "batch_size"),
    "gradient_accumulation_steps",
    *("learning_rate", "weight_decay", "max_steps", "seed"),
)
HISTOGRAMS = ("time_scale", "time_offset", "window", "retardation", "background", "gamma")
SHOWN_FIRST = ("model", "law", "pos", "recipe", "parameters", "learning_rate")
PROJECTOR_PLACE = (
    "The token embeddings of this run are in the tab PROJECTOR: set *Color by* to mass there. "
    "Until the page is reloaded, the tab is in the menu INACTIVE at the top right."
)


def dashboard_files(directory):
    """The files of TensorBoard in a run's directory: `(those of this program, those of others)`."""
    names = ("events.out.tfevents.*", LISTING, "projector", "projector/**/*", "*/token_embedding/*")
    found = sorted(path for name in names for path in directory.glob(name) if path.is_file())
    own = [path for path in found if _is_own(path, path.relative_to(directory).as_posix())]
    return own, [path for path in found if path not in own]


def _is_own(path, name):
    if name == LISTING:
        listed = re.findall('_path: "(.*)"', path.read_text(encoding="utf-8", errors="replace"))
        return bool(listed) and all(map(POINTS.fullmatch, listed))
    return bool(POINTS.fullmatch(name)) or ("/" not in name and is_own_event_file(path))


class Dashboard:
    """The TensorBoard files of a run; their size is bounded, whatever the number of evaluations.

    Args:
        directory: the run's, a `Path`.
        config: all settings and facts of the run.
        start_step: 0 for a new run, else the resumed step; later events are deleted.
        rows: the evaluations up to there, rows of metrics.jsonl.
    """

    def __init__(self, directory, config, start_step=0, rows=()):
        self.directory, self.config = directory, config

        def kept_as(tag, step):
            is_kept = step <= start_step and tag.split("/")[0] not in REWRITTEN
            return _todays_tag(tag, config) if is_kept else None

        *head, self._finished = _hyperparameters(config)
        self._events = EventFile(directory, [_layout(), *head], kept_as)
        self._second = 0
        for row in rows:
            is_whole = {"tokens", "wall_time", *COMPARED} <= row.keys()
            has_place = is_whole and None not in (row["tokens"], row["wall_time"])
            if has_place and self._is_due(row["step"], MOST_ROWS):
                self._compare(row)

    def row(self, row):
        """Write the scalars of one evaluation."""
        if not self._is_due(row["step"], MOST_ROWS):
            return
        shown = {n: v for n, v in row.items() if v is not None and _todays_tag(n, self.config)}
        del shown["step"]
        if shown.get("skipped_steps") == 0:
            del shown["skipped_steps"]
        self._events.append([summary.scalar(*item) for item in shown.items()], row["step"])
        self._compare(row)

    def _compare(self, row):
        """Write the series against tokens, and those against seconds of training."""
        values = {name: row[name] for name in COMPARED if row[name] is not None}
        self._events.append(_grouped("by_tokens", values), row["tokens"])
        second = int(row["wall_time"])
        if second > self._second:  # TensorBoard's steps are whole numbers: one point per second
            self._events.append(_grouped("by_seconds", values), second)
            self._second = second

    def learned(self, model, data, step):
        """Write what the model learned: histograms of an NGT's geometry, and a sample of text."""
        if isinstance(model, NGT):
            histograms = dict(_geometry(model))
            times = min(MOST_TIMES, max(1, MOST_HISTOGRAMS // len(histograms)))
            if self._is_due(step, times):
                self._events.append(
                    [
                        summary.histogram(name, values.float().cpu(), bins=30)
                        for name, values in histograms.items()
                        if bool((values.abs() < 1e20).all())  # the page's axes end there
                    ],
                    step,
                )
        tokens = self.config.get("sample_tokens", 0)
        if tokens and self._is_due(step, MOST_SAMPLES):
            prompt, answer = sample_text(model, data, tokens, self.config["seed"])
            text = f"The validation text begins:\n\n{as_code(prompt)}\n\nThe model continues:\n\n"
            self._events.append([summary.text("sample", text + as_code(answer))], step)

    def _is_due(self, step, most):
        """Whether to write at this evaluation, so that about `most` of the run's do."""
        interval, end = self.config["eval_interval"], self.config["max_steps"]
        every = math.ceil(end / interval / most)
        number = math.ceil(step / interval)
        return number == 1 or number % every == 0 or step == end

    def projector(self, model, tokenizer, step):
        """Write an NGT's token embeddings, with readable labels and masses, for the projector.

        The page opens on the run that started first. So a vanilla transformer is left out: it has
        no masses to colour by.
        """
        if not isinstance(model, NGT):
            return
        count = min(PROJECTOR_LIMIT, max(3, PROJECTOR_NUMBERS // model.config.hidden_dim))
        tokens = _all_tokens(model)[:count]
        columns = {"token": [tokenizer.label(int(i)).replace("\t", " ") for i in tokens]}
        with torch.no_grad():
            embeddings = {"token_embedding": model.token_emb(tokens).float()}
            columns["mass"] = [f"{float(mass):.4f}" for mass in model.mass(tokens)]
        write_projector(self.directory, embeddings, columns, step)
        self._events.append([summary.text("projector", PROJECTOR_PLACE)], step)

    def finish(self, step):
        """Note that the run is finished."""
        self._events.append([self._finished], step)


def _todays_tag(tag, config):
    """A tag as it is written now; None for a chart that would say nothing about this run."""
    if tag == "repulsion" and not config.get("repulsion", True):
        return None  # not part of the loss
    old = re.fullmatch(r"layer(\d+)/(.+)", tag)  # earlier releases counted from 0
    if old is None:
        return tag
    is_constant = old[2] == "radius" and not config.get("use_soft_cutoff")
    return None if is_constant else f"layer {int(old[1]) + 1}/{old[2]}"


def _layout():
    """The custom scalars tab: each measure against each axis."""
    return summary.custom_scalars(
        {
            f"against {axis}": {
                f"{title} against {axis}": ["Multiline", [f"^{group}{name}$"]]
                for name, title in COMPARED.items()
            }
            for group, axis in AGAINST.items()
        }
    )


def _hyperparameters(config):
    """The three summaries of the hparams plugin: experiment, start of this session, its end."""

    def shown(value):
        return ("no", "yes")[value] if isinstance(value, bool) else value

    known = {name: shown(config[name]) for name in HYPERPARAMETERS if name in config}
    metrics = dict.fromkeys(COMPARED, 0.0)
    experiment, _, end = summary.hparams(known, metrics)
    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:  # the page shows only these columns at first
        info.differs = info.name in SHOWN_FIRST
    plugin_data.content = content.SerializeToString()
    model, other = ("ngt", "vanilla") if config.get("model") == "ngt" else ("vanilla", "ngt")
    foreign = set(model_fields(other)) - set(model_fields(model))
    mine = {name: value for name, value in known.items() if name not in foreign}
    return experiment, summary.hparams(mine, metrics)[1], end


def _grouped(group, values):
    return [summary.scalar(f"{group}/{name}", value) for name, value in values.items()]


@torch.no_grad()
def _geometry(model):
    """Yield (tag, values) of what the geometry of an NGT learned."""
    yield "mass", model.mass(_all_tokens(model))
    largest_mass = model.largest_mass()
    # only the soft cutoff has a radius that is learned
    names = (*HISTOGRAMS, "radius") if model.config.cutoff == "soft" else HISTOGRAMS
    for number, layer in enumerate(model.layers, 1):
        for name, values in layer.attn.learned(largest_mass).items():
            if name in names and values is not None:
                yield f"layer {number}/{name}", values.flatten()


def sample_text(model, data, max_new_tokens, seed):
    """The beginning of the validation text, continued by the model, which stays unchanged.

    Returns:
        The prompt and the drawn text, which ends early if the logits are not finite.
    """
    was_training = model.training
    generator = torch.Generator().manual_seed(seed)
    prompt = [int(token) for token in data.valid[:PROMPT_TOKENS]]
    drawn = []
    try:
        stream = TokenStream(model)
        stream.feed(prompt)
        while len(drawn) < max_new_tokens and bool(torch.isfinite(stream.logits).all()):
            drawn.append(sample(stream.logits, temperature=0.8, generator=generator))
            stream.feed(drawn[-1:])
    finally:
        model.train(was_training)
    decode = data.tokenizer.decode
    whole = decode(prompt + drawn)[:LONGEST_SAMPLE]
    # the prompt's last token may be only a part of a character
    end = len(decode(prompt).rstrip("\N{REPLACEMENT CHARACTER}"))
    return whole[:end], whole[end:]


def as_code(text):
    """Markdown that shows any text unchanged: a code block, unprintable characters escaped.

    Long lines are wrapped, since TensorBoard's page cuts them off.
    """
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
        lines += textwrap.wrap(shown, SAMPLE_WIDTH, drop_whitespace=False) or [""]
    return "\n".join("    " + line for line in lines)


def write_projector(directory, embeddings, columns, step):
    """Write the projector's files; embeddings of earlier steps stay in its list.

    The page opens on the name that is first in the alphabet: the newest.

    Args:
        embeddings: name to (N, dim).
        columns: title to N strings; the label first, then values to colour points by.
    """
    listing = directory / LISTING
    config = ProjectorConfig()
    if listing.exists():
        with contextlib.suppress(text_format.ParseError, UnicodeDecodeError):
            text_format.Parse(listing.read_text(encoding="utf-8"), config)
    earlier = [e for e in config.embeddings if (directory / e.tensor_path).exists()]
    del config.embeddings[:]
    for name, points in embeddings.items():
        folder = Path("projector") / f"{step:05d}" / name
        lines = ["\t".join(f"{x:.5g}" for x in point) for point in points.tolist()]
        write_whole(directory / folder / "tensors.tsv", "\n".join(lines).encode())
        rows = [tuple(columns), *zip(*columns.values(), strict=True)]
        write_whole(
            directory / folder / "metadata.tsv", "\n".join("\t".join(row) for row in rows).encode()
        )
        config.embeddings.add(
            tensor_name=f"{name} newest, step {step}",
            tensor_path=str(folder / "tensors.tsv"),
            metadata_path=str(folder / "metadata.tsv"),
        )
    written = {embedding.tensor_path for embedding in config.embeddings}
    for embedding in earlier:
        if embedding.tensor_path not in written:
            if POINTS.fullmatch(embedding.tensor_path):
                *_, of_step, name, _ = embedding.tensor_path.split("/")
                embedding.tensor_name = f"{name}, step {int(of_step)}"
            config.embeddings.append(embedding)
    write_whole(listing, text_format.MessageToString(config).encode())


def _all_tokens(model):
    return torch.arange(model.config.vocab_size, device=model.token_emb.weight.device)
