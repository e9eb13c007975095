"""Perplexity per word of WikiText, which models with different tokenizers have in common.

The losses of a model's own tokens are summed over the text and divided by the number of words, as
published figures do. As in the task `wikitext` of EleutherAI's lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness, version 2 of the task), each article stands
alone, the model reads it with the spaces of WikiText's tokens taken out again, and the words and
bytes are those of the file itself.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.kv_cache import KVCache
from engine.losses import start_of_text
from system.errors import UsageError, UserError
from text.stream import read_blocks

SPLITS = ("valid", "test")
FORMS = ("raw", "tokens", "txt")
COMPRESSED = ("", ".xz", ".gz")
CHUNK = 512  # tokens per forward pass of a context without bound
DETOKENIZER = "that of Megatron-LM and lm-evaluation-harness"
LARGEST = 1 << 24  # characters of a file: WikiText's own have 1.3 million
# How WikiText's spaces around its tokens are taken out again (Megatron-LM, Shoeybi et al. 2019,
# https://github.com/NVIDIA/Megatron-LM; lm-evaluation-harness has the same rules): in this order,
# as regular expressions. The second can match nothing; it stays, so that texts are the same.
RULES = (
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
)
PAIRS = ("()", "[]", "{}", '""', "''")  # after these, the spaces just within each pair
LAST_RULES = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def find_wikitext(name):
    """The file of a split of WikiText, `wiki.{valid,test}.{raw,tokens,txt}`, plain, .xz or .gz.

    Args:
        name: a directory, whose test file is taken, or a split, whose file is looked for in data/.

    Raises:
        UsageError: if there is no such file.
    """
    folder, split = (Path("data"), name) if name in SPLITS else (Path(name), "test")
    for form in FORMS:
        for z in COMPRESSED:
            path = folder / f"wiki.{split}.{form}{z}"
            if path.is_file():
                return path
    raise UsageError(
        f"--wikitext {name}: {folder} has no wiki.{split}.raw (or .tokens, .txt, each plain, .xz "
        "or .gz): name the directory that has it"
    )


def articles(text):
    """The articles of a WikiText file, a list of str: each from its title to the next one."""
    found = [[]]
    for line in text.split("\n"):
        title = line.strip()
        if title.startswith("= ") and title.endswith(" =") and not title.startswith("= = "):
            found.append([])
        found[-1].append(line)
    joined = ("\n".join(lines) for lines in found)
    return [article for article in joined if article.strip()]


def detokenized(article):
    """An article as people write it."""
    for pattern, replacement in RULES:
        article = re.sub(pattern, replacement, article)
    for opening, closing in PAIRS:
        article = _closed_up(article, opening, closing)
    for pattern, replacement in LAST_RULES:
        article = re.sub(pattern, replacement, article)
    return article


def _closed_up(text, opening, closing):
    r"""The text without the spaces just within a pair of marks.

    The others' rule is the expression `\(\s*([^\)]*?)\s*\)`, which takes hours for a bracket, many
    spaces and no end. This finds the same in one pass.
    """
    end = text.rfind(closing) + 1  # no pair ends later
    pair = f"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}"
    closed = re.sub(pair, lambda found: opening + found[1].strip() + closing, text[:end])
    return closed + text[end:]


def read_wikitext(path):
    """The text of a WikiText file.

    Raises:
        UserError: if it cannot be read, or is larger than WikiText's files: a small packed file
            could fill the memory.
    """
    blocks, size = [], 0
    for block in read_blocks(path):
        size += len(block)
        if size > LARGEST:
            raise UserError(f"{path} has more than {LARGEST:,} letters: get WikiText's own file")
        blocks.append(block)
    return "".join(blocks)


def wikitext(losses, tokenizer, path, block_size, stride=None):
    """Perplexity per word and bits per byte of a WikiText file.

    Args:
        losses: the `Losses` of the model.
        path: of the file.
        block_size: tokens of a window.
        stride: each window predicts so many new tokens and has the others as context; None: only
            windows that follow each other.

    Returns:
        A dict: `articles`, `words`, `bytes` and `tokens` of the text; `by_context`, a list of dicts
        of `context` in words, `nats` per token, `word_perplexity` and `bits_per_byte`.

    Raises:
        UserError: if the file cannot be read, or the vocabulary leaves characters out.
    """
    texts = articles(read_wikitext(path))
    if not texts:
        raise UserError(f"{path} has no text: get WikiText's own file")
    start = [start_of_text(tokenizer)]
    sequences = [start + tokenizer.encode(detokenized(text)) for text in texts]
    size = {
        "articles": len(texts),
        "words": sum(len(re.split(r"\s+", text)) for text in texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": sum(map(len, sequences)) - len(sequences),
    }
    found = [(f"windows of {block_size:,}", _in_windows(losses, sequences, block_size, block_size))]
    if stride is not None:
        sums = _in_windows(losses, sequences, block_size, stride)
        found.append((f"windows of {block_size:,}, stride {stride:,}", sums))
    if losses.model.max_context is None:
        found.append(("the whole article", _without_bound(losses, sequences)))
    rows = [
        {
            "context": context,
            "nats": nats / size["tokens"],
            "word_perplexity": math.exp(min(700, nats / size["words"])),
            "bits_per_byte": nats / size["bytes"] / math.log(2),
        }
        for context, nats in found
    ]
    return {"file": str(path), "detokenizer": DETOKENIZER, **size, "by_context": rows}


def _in_windows(losses, sequences, block_size, stride):
    """The sum of losses in nats: each window predicts its last `stride` tokens, the first all."""
    groups = {}  # windows of one shape, which fit into one batch: (tokens, predicted) -> list
    for sequence in sequences:
        end = min(block_size, len(sequence) - 1)
        groups.setdefault((end, end), []).append(sequence[: end + 1])
        while end < len(sequence) - 1:
            count = min(stride, len(sequence) - 1 - end)
            end += count
            groups.setdefault((block_size, count), []).append(sequence[end - block_size : end + 1])
    total = 0.0
    for (length, count), windows in groups.items():
        rows = torch.tensor(windows).view(len(windows), length + 1)
        total += float(losses.of_all(rows, count, f"windows of {length}").sum())
    return total


@torch.inference_mode()
def _without_bound(losses, sequences):
    """The sum of losses in nats if every token may feel all of its article."""
    model, total = losses.model, 0.0
    count = sum(map(len, sequences))
    with tqdm(total=count, desc="whole articles", unit=" tokens", leave=False, delay=2) as bar:
        for sequence in sequences:
            cache, tokens = KVCache(), torch.tensor([sequence], device=losses.device)
            for first in range(0, tokens.shape[1] - 1, CHUNK):
                last = min(first + CHUNK, tokens.shape[1] - 1)
                logits = model(tokens[:, first:last], kv_cache=cache)[0].float()
                targets = tokens[0, first + 1 : last + 1]
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
                bar.update(last - first)
    return total
