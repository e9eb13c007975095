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
