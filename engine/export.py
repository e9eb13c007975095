"""Checkpoints as folders that other programs open, and back: safetensors, and Hugging Face's form.

Both hold `model.safetensors` with the weights under their own names and `config.json`. Hugging
Face's also has the model and the tokenizer as its library wants them, so that
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads it.
"""

import json
from pathlib import Path

from engine.checkpoint import (
    FORMAT_VERSION,
    load_model,
    read_checkpoint,
    save_checkpoint,
    tokenizer_of,
)
from engine.models import model_config, model_fields
from system.errors import UserError
from system.files import write_whole
from system.safe_text import short_reason

HERE = Path(__file__).resolve().parent
WEIGHTS, CONFIG, OURS = "model.safetensors", "config.json", "newton_gravity"
LARGEST_JSON = 1 << 28  # bytes
NEEDED = ("config", "vocab")  # of a checkpoint, beside its weights
KEPT = (*NEEDED, "iter", "best_val")


def export(path, folder, format):
    """Write a checkpoint as a folder.

    Args:
        path: of the checkpoint.
        folder: a `Path` that does not exist, or is empty.
        format: "safetensors" or "huggingface".

    Raises:
        UserError: if the checkpoint or the folder cannot be used.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    if format == "huggingface" and (config["model_type"], config.get("law")) != ("ngt", "newton"):
        kind = config.get("law") or "vanilla"
        raise UserError(
            f"--format huggingface: {path} is {kind}, and only NGT's law newton has this form: "
            "take --format safetensors"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} is there already: name a new folder")
    from safetensors.torch import save  # only this script needs the package

    weights = {name: tensor.contiguous() for name, tensor in checkpoint["model_state"].items()}
    if model_config(config).tie_head:  # one matrix, under one name
        weights.pop("head.weight", None)
    given = {OURS: {name: checkpoint[name] for name in KEPT if name in checkpoint}}
    if format == "huggingface":
        given |= _hugging_face_config(config)
        _write_hugging_face_files(folder, tokenizer_of(checkpoint, path))
    write_whole(folder / CONFIG, json.dumps(given, indent=1))
    write_whole(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))


def _hugging_face_config(config):
    model = model_config(config)
    known = {name: getattr(model, name) for name in model_fields("ngt")}
    return {
        "architectures": ["NGTForCausalLM"],
        "model_type": "ngt",
        "auto_map": {
            "AutoConfig": "modeling_ngt.NGTConfig",
            "AutoModelForCausalLM": "modeling_ngt.NGTForCausalLM",
        },
        "dtype": "float32",
        "tie_word_embeddings": model.tie_head,
        "cutoff": model.cutoff,
        **known,
    }


def _write_hugging_face_files(folder, tokenizer):
    """The code of the model, and the tokenizer in the form that transformers reads."""
    write_whole(folder / "modeling_ngt.py", (HERE / "modeling_ngt.py").read_bytes())
    vocab = tokenizer.to_vocab()
    settings = {"clean_up_tokenization_spaces": False}
    if tokenizer.name == "bpe":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_whole(folder / "tokenizer.json", vocab["tokenizer_json"])
    elif tokenizer.name == "char":
        settings["tokenizer_class"] = "NGTCharTokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_ngt.NGTCharTokenizer", None]}
        write_whole(folder / "characters.json", json.dumps(vocab["itos"], ensure_ascii=False))
        write_whole(folder / "tokenization_ngt.py", (HERE / "tokenization_ngt.py").read_bytes())
    else:
        raise UserError(
            "--format huggingface: this checkpoint's tokenizer is tiktoken's, which has no file "
            "of this form: take --format safetensors"
        )
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=1))


def restore(folder, path):
    """Write a folder that `export` made as a checkpoint again; it can be read, not resumed.

    Args:
        folder, path: a `Path` each; `path` must not exist.

    Raises:
        UserError: if this is no such folder, its parts contradict each other, or `path` exists.
    """
    if path.exists():
        raise UserError(f"--output {path} is there already: name a new file")
    given = _read_config(folder / CONFIG)
    checkpoint = {
        **{"format_version": FORMAT_VERSION, "model_state": _read_weights(folder / WEIGHTS)},
        **{name: given[name] for name in KEPT if name in given},
    }
    state = checkpoint["model_state"]
    if "head.weight" not in state and "token_emb.weight" in state:
        state["head.weight"] = state["token_emb.weight"]
    save_checkpoint(path, checkpoint)
    try:
        load_model(path)  # as whoever uses it will
    except UserError as error:
        path.unlink()
        raise UserError(f"--from {folder} is damaged: {error}") from None


def _read_config(path):
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("too large")
        given = json.loads(path.read_text(encoding="utf-8"))[OURS]
        if not isinstance(given, dict) or not given.keys() >= {*NEEDED}:
            raise ValueError(f"{OURS} lacks parts")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no config that export.py wrote ({short_reason(error)}): name its folder"
        ) from None
    return given


def _read_weights(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({short_reason(error)}): export it again") from None
