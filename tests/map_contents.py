"""The text that maps are made of in tests, and the data that a map page contains."""

import base64
import json
import re

import numpy as np

TEXT = "the quick brown fox jumps over the lazy dog"


def data_of(path):
    """What a page carries: its runs."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', text, re.S).group(1))["runs"]


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def predicted(run, name):
    """`(ids, chances)` of "lens" (L + 1, T, 5) or "off" (L, H, T, 5), ids those of tokens."""
    rows = (run["numLayers"] + 1,) if name == "lens" else (run["numLayers"], run["numHeads"])
    shape = (*rows, len(run["labels"]), -1)
    ids = np.array(run["nameIds"])[unpacked(run[name]["ids"], "<u2")].reshape(shape)
    return ids, unpacked(run[name]["chances"], "<u2").reshape(shape) / 65535


def places(run):
    """Where heads' tokens look from and pull from, or queries and keys: (L, H, T, W) twice."""
    given = run["attention"]
    shape = (run["numLayers"], run["numHeads"], len(run["labels"]), given["width"])
    scale = np.array(given["scale"])[:, :, None, None]
    packed = (given["q"], given["k"] or given["q"])
    return tuple(unpacked(x, "<i2").reshape(shape) * scale for x in packed)


def shares_of(run):
    """Every share of the pull by the formulas, (L, H, T, T), from a page's data in float64."""
    given, (q, k) = run["attention"], places(run)

    def per_head(name):
        numbers = [[head[name] for head in layer] for layer in given["heads"]]
        return None if numbers[0][0] is None else np.array(numbers)[:, :, None, None]

    age = np.subtract.outer(*[np.arange(q.shape[2])] * 2)
    if run["kind"] == "vanilla":
        score = q @ k.swapaxes(2, 3)
        if per_head("slope") is not None:
            score = score - per_head("slope") * age
        weights = np.where(age >= 0, np.exp(score), 0)
        sink = per_head("sink")
        return weights / (weights.sum(-1, keepdims=True) + (0 if sink is None else np.exp(sink)))
    r2 = np.square(q[:, :, :, None] - k[:, :, None]).sum(-1)
    if run["kind"] == "newton":
        r2 = r2 + np.square(per_head("timeScale") * (age - per_head("timeOffset")))
    mass = np.ones(len(age)) if given["massInValue"] else np.array(run["mass"])
    inside = 1.0
    if given["cutoff"] != "none":
        inside = r2 / per_head("radius") ** 2
        inside = inside <= 1 if given["cutoff"] == "hard" else np.maximum(0, 1 - inside)
    if run["kind"] == "newton":
        field = mass * (1 + r2) ** -float(given["exponent"]) * np.square(inside) * (age >= 0)
        background = per_head("background")
        return field / (
            field.sum(-1, keepdims=True) + (1e-30 if background is None else background)
        )
    score = (per_head("bias") - per_head("gamma") / (r2 + 1e-6)) * mass * mass[:, None]
    if given["cutoff"] == "soft":
        score, inside = score * inside, 1.0
    score = np.where((age >= 0) & (inside > 0), score, -np.inf)
    weights = np.exp(score - score.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
