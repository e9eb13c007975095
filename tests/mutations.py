"""Hypothesis strategies that change a valid file: its bytes, its plain values, or its archive."""

import copy
import io
import json
import struct
import warnings
import zipfile

import torch
from hypothesis import strategies as st

from hostile_checkpoints import laughs, nested, sealed

FRAGMENTS = (
    *(b"\0", b"\xff", b"\xff\xff\xff\x7f", b"\0" * 400, b" " * 3000, b"(" * 3000, b"\n" * 500),
    *(b"[" * 100_000, b'{"a":' * 3000, b"NaN", b"-1", b"1e999", b"9" * 5000, b"PK\x03\x04"),
    *(
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\\ud800",
        b"\x1b]0;x\x07",
        b"c__builtin__\neval\n",
    ),
)
SCALARS = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 256, 1000, 1 << 16, (1 << 31) - 1, 1 << 31),
    *(1 << 53, (1 << 63) - 1, 1 << 63, -(1 << 63), 10**12, 10**18, 10**400, 0.5, -0.0, 1e-320),
    *(1e300, -1e308, float("inf"), float("-inf"), float("nan"), "", "x", "x" * 3000, "4", "nan"),
    *("\ud800", "\0", "\x1b[2J", "\u202e", "\ufffd", "a\nb", "/etc/passwd", "../..", "~", "%s%n"),
    *("ngt", "vanilla", "newton", "published", "char", "bpe", "tiktoken", "ByteLevel", "Sequence"),
)
PLAIN = st.one_of(
    st.sampled_from(SCALARS),
    st.sampled_from(SCALARS),
    st.builds(nested, st.sampled_from((1, 2, 150))),
    st.builds(lambda x: [x], st.sampled_from(SCALARS)),
    st.builds(lambda x: {"type": x}, st.sampled_from(SCALARS)),
    st.builds(lambda x, n: [x] * n, st.sampled_from(SCALARS), st.sampled_from((2, 50, 3000))),
    st.builds(dict),
    *(st.integers(), st.floats(), st.text(max_size=8)),
)
"""Values that JSON can say, most of them wrong wherever they stand."""

TENSORS = (
    *(lambda x: x * float("nan"), lambda x: x / 0, lambda x: -x, lambda x: x * 1e38),
    *(lambda x: x.double() * 1e300, lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x.long()),
    *(lambda x: x.to(torch.float8_e4m3fn), lambda x: x.to(torch.complex64), lambda x: x.bool()),
    *(lambda x: torch.zeros(1).expand(x.shape), lambda x: x.to_sparse(), lambda x: x.to("meta")),
    *(lambda x: x.flatten(), lambda x: x[None], lambda x: x[:1], lambda x: x[:0], lambda x: x.mT),
    *(lambda x: torch.cat([x, x]), lambda x: torch.zeros(()), lambda x: x.requires_grad_()),
    *(lambda x: torch.nn.Parameter(x), lambda x: x.numpy(), lambda x: x.tolist()),
)
PICKLED = st.one_of(
    PLAIN,
    st.builds(laughs),
    st.builds(torch.zeros, st.sampled_from((0, 3, (2, 2)))),
    st.sampled_from(((1, 2), b"x", {1}, 1j, torch.float32, bytearray(b"x"))),
)
"""Values that a pickle of plain types can hold."""


@st.composite
def changed_bytes(draw, data, others=()):
    """The data with up to three places changed, cut, repeated, or taken from another file."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from((1, 1, 2, 8, 64, 1000, len(data)))))
        kind = draw(st.sampled_from(("flip", "flip", "cut", "insert", "repeat", "splice", "end")))
        if kind == "flip" and at < len(data):
            middle = bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 : end]
        elif kind == "cut" or kind == "flip":
            middle = b""
        elif kind == "insert":
            middle = draw(st.sampled_from(FRAGMENTS)) + data[at:end]
        elif kind == "repeat":
            middle = data[at : min(end, at + 64)] * draw(st.sampled_from((2, 3, 100)))
            middle += data[at + 64 : end]
        elif kind == "splice":
            other = draw(st.sampled_from([data, *others]))
            start = draw(st.integers(0, len(other)))
            middle = other[start : start + end - at]
        else:
            return data[:at]
        data = data[:at] + middle + data[end:]
    return data


def _place(draw, value):
    """`(container, key)` of some value in nested dicts and lists."""
    while True:
        keys = [*value] if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        child = value[key]
        if not isinstance(child, dict | list) or not child or draw(st.integers(0, 3)) == 0:
            return value, key
        value = child


def _changed(tensor, change):
    try:
        return change(tensor)
    except (RuntimeError, IndexError):  # of this shape or type it cannot be
        return tensor[None]


@st.composite
def changed_values(draw, value, hostile=PLAIN):
    """A copy of nested dicts and lists with up to three values replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not value or draw(st.integers(0, 29)) == 0:
            return draw(hostile)
        container, key = _place(draw, value)
        old = container[key]
        kind = draw(st.sampled_from(("replace", "replace", "near", "near", "remove", "move")))
        if kind == "near" and isinstance(old, torch.Tensor):
            container[key] = _changed(old, draw(st.sampled_from(TENSORS)))
        elif kind == "near" and isinstance(old, int | float) and abs(old) < 1e300:
            near = (-old, old + 1, old - 1, old * 2, old * 1000, float(old), str(old), not old)
            container[key] = draw(st.sampled_from(near))
        elif kind == "near" and isinstance(old, str):
            near = (old + "\ud800", old[:-1], old.upper(), old * 400, old + "\x1b[2J")
            container[key] = draw(st.sampled_from(near))
        elif kind == "remove":
            del container[key]
        elif kind == "move":
            elsewhere, other_key = _place(draw, value)
            if not isinstance(old, dict | list):  # or it would hold itself
                elsewhere[other_key] = old
            elif isinstance(container, dict):
                name = draw(st.one_of(st.text(max_size=4), st.sampled_from([*container])))
                container[name] = container.pop(key)
        else:
            container[key] = draw(hostile)
    return value


def members(data):
    """The `(name, content)` of every member of a zip archive, a list."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def archive_of(entries, compression=zipfile.ZIP_STORED):
    """A sealed archive of these members, with correct check sums; a name may come twice."""
    data = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(data, "w", compression) as file:
        warnings.simplefilter("ignore")
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return sealed(data.getvalue())


@st.composite
def changed_archive(draw, data):
    """A sealed archive in which a member is changed, renamed, missing, doubled or exchanged."""
    entries = members(data)
    kinds = ("pickle", "pickle", "pickle", "content", "rename", "drop", "double", "swap", "pack")
    compression = zipfile.ZIP_STORED
    for _ in range(draw(st.integers(1, 2))):
        n = draw(st.integers(0, len(entries) - 1))
        kind = draw(st.sampled_from(kinds))
        if kind == "pickle":
            n = next((n for n, entry in enumerate(entries) if entry[0].endswith("data.pkl")), 0)
        name, content = entries[n]
        m = draw(st.integers(0, len(entries) - 1))
        if kind in ("pickle", "content"):
            entries[n] = (name, draw(changed_bytes(content, [entries[m][1]])))
        elif kind == "rename":
            names = ("../../pwned", "/pwned", name + "x", entries[m][0], "")
            entries[n] = (draw(st.sampled_from(names)), content)
        elif kind == "drop" and len(entries) > 1:
            del entries[n]
        elif kind == "double":
            entries.append((name, draw(changed_bytes(content))))
        elif kind == "swap":
            entries[n], entries[m] = (name, entries[m][1]), (entries[m][0], content)
        elif kind == "pack":
            compression = zipfile.ZIP_DEFLATED
    return archive_of(entries, compression)


@st.composite
def changed_safetensors(draw, data):
    """A safetensors file whose header is other JSON, with the header's length made right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = draw(changed_values(json.loads(data[8 : 8 + length])))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def json_bytes(value):
    return json.dumps(value).encode()


def changed_json(value):
    """A strategy of JSON files: changed values, or a few changed bytes."""
    return st.one_of(
        changed_values(value).map(json_bytes),
        changed_values(value).map(json_bytes),
        changed_bytes(json_bytes(value)),
    )
