"""Shards: the token ids of a split in one file, or in several that read as one array."""

import hashlib
import os

import numpy as np

from system.errors import UserError
from text.stream import byte_bar, sha256_of

SHARD_TOKENS = 1 << 28  # 512 MB of 16 bits: WikiText-103 by BPE and all smaller texts fit in one
CHECKED_AT_ONCE = 1 << 22  # ids


class TokenFilesError(UserError):
    """Token files that cannot be used; `reason` says why, without the remedy."""

    def __init__(self, reason, directory):
        super().__init__(f"{reason}: delete {directory} to have it made again")
        self.reason = reason


class ShardedTokens:
    """The ids of several shards, read like one array: by a slice, a number or an array of numbers.

    Args:
        shards: memory maps of the same type, none of them empty.
    """

    def __init__(self, shards):
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self.dtype = shards[0].dtype
        self.shape = (int(self._ends[-1]),)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._from_to(start, stop)
        index = np.asarray(index)
        if index.size and not (-len(self) <= index.min() and index.max() < len(self)):
            raise IndexError(f"an index outside of {len(self):,} tokens")
        index = np.where(index < 0, index + len(self), index)
        shard_of = np.searchsorted(self._ends, index, side="right")
        ids = np.empty(index.shape, self.dtype)
        for number in np.unique(shard_of):
            is_here = shard_of == number
            shard = self._shards[number]
            ids[is_here] = shard[index[is_here] - (self._ends[number] - len(shard))]
        return ids[()]

    def __array__(self, dtype=None, copy=None):
        return self._from_to(0, len(self)).astype(dtype or self.dtype)

    def _from_to(self, start, stop):
        """The ids from `start` to before `stop`; a view of the memory map if one shard has all."""
        parts = []
        for shard, end in zip(self._shards, self._ends.tolist(), strict=True):
            first = end - len(shard)
            part = shard[max(0, start - first) : max(0, stop - first)]
            if len(part):
                parts.append(part)
        if not parts:
            return np.empty(0, self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def open_split(directory, split, meta, dtype, vocab_size):
    """The ids of a split: a memory map, or `ShardedTokens` if `meta` lists several shards.

    Args:
        meta: what meta.json says about the split. It never names a file.

    Raises:
        TokenFilesError: if a shard has another size or content, or ids above the vocabulary.
        ValueError, KeyError, TypeError, OSError: if it is missing or `meta` is malformed.
    """
    paths, shards = [directory / f"{split}.bin"], [meta]
    if "shards" in meta:
        shards = meta["shards"]
        counts = [shard["tokens"] for shard in shards]
        if not all(type(n) is int and n > 0 for n in counts) or sum(counts) != meta["tokens"]:
            raise TokenFilesError(f"{directory}/meta.json has impossible shards", directory)
        paths = [_shard_path(directory, split, number) for number in range(len(shards))]
    maps = []
    for path, shard in zip(paths, shards, strict=True):
        count = path.stat().st_size / dtype.itemsize
        if count != shard["tokens"]:
            raise TokenFilesError(
                f"{path} has {count:,} tokens, not {shard['tokens']:,}", directory
            )
        digest = hashlib.sha256() if "shards" in meta else None
        if _largest_id(path, dtype, digest) >= vocab_size:
            raise TokenFilesError(f"{path} has ids above the vocabulary", directory)
        if digest is not None and digest.hexdigest() != shard["sha256"]:
            raise TokenFilesError(f"{path} is not what was written (SHA-256)", directory)
        maps.append(np.memmap(path, dtype=dtype, mode="r"))
    return maps[0] if len(maps) == 1 else ShardedTokens(maps)


def _shard_path(directory, split, number):
    return directory / f"{split}-{number:05}.bin"


def _largest_id(path, dtype, digest):
    """The largest id in a token file, whose bytes are added to `digest` unless that is None.

    Raises:
        ValueError: if the file has holes. No corpus has, and a malicious file of 2 TB of holes
            takes no disk but a day to read.
    """
    # read in parts: pages of a memory map that was read through would count as memory used
    largest, size = -1, path.stat().st_size
    with open(path, "rb") as file, byte_bar(f"checking {path.name}", size) as bar:
        if _data_before_a_hole(file, size) < size:
            raise ValueError(f"{path.name} has holes in it")
        while len(ids := np.fromfile(file, dtype, CHECKED_AT_ONCE)):
            largest = max(largest, int(ids.max()))
            if digest is not None:
                digest.update(ids)
            bar.update(ids.nbytes)
    return largest


def _data_before_a_hole(file, size):
    """The number of bytes before the first hole; `size` if the system cannot tell.

    The number of disk blocks proves nothing: compressing file systems use few for any file.
    """
    try:
        return file.seek(0, os.SEEK_HOLE)
    except (AttributeError, OSError):
        return size
    finally:
        file.seek(0)


class ShardWriter:
    """Appends ids to the shards of a split: each has SHARD_TOKENS, the last one what is left.

    Args:
        tokens: how many were safely written before. What a crash left beyond them is cut off.
    """

    def __init__(self, directory, split, dtype, tokens):
        self._directory, self._split, self._dtype = directory, split, dtype
        self._tokens = tokens
        if tokens % SHARD_TOKENS:
            os.truncate(self._path(), tokens % SHARD_TOKENS * dtype.itemsize)

    def _path(self):
        return _shard_path(self._directory, self._split, self._tokens // SHARD_TOKENS)

    def write(self, ids):
        while len(ids):
            filled = self._tokens % SHARD_TOKENS
            part, ids = ids[: SHARD_TOKENS - filled], ids[SHARD_TOKENS - filled :]
            with open(self._path(), "ab" if filled else "wb") as file:
                part.astype(self._dtype).tofile(file)
                if filled + len(part) == SHARD_TOKENS:
                    file.flush()
                    os.fsync(file.fileno())
            self._tokens += len(part)

    def to_disk(self):
        """Wait until all that was written is on disk; full shards are already."""
        if self._tokens % SHARD_TOKENS:
            with open(self._path(), "rb+") as file:
                os.fsync(file.fileno())


def are_written(directory, split, dtype, tokens):
    """Whether the shards hold at least the first `tokens` ids of a split."""
    for number in range(-(-tokens // SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)
        path = _shard_path(directory, split, number)
        if not path.is_file() or path.stat().st_size < count * dtype.itemsize:
            return False
    return True


def finish_split(directory, split, tokens):
    """Give the file of a split its name if it is the only one.

    Returns:
        What meta.json says about the shards: nothing about a single one.
    """
    count = max(1, -(-tokens // SHARD_TOKENS))
    paths = [_shard_path(directory, split, number) for number in range(count)]
    if count > 1:
        sizes = [min(SHARD_TOKENS, tokens - n * SHARD_TOKENS) for n in range(count)]
        shards = zip(sizes, paths, strict=True)
        return {"shards": [{"tokens": n, "sha256": sha256_of(path)} for n, path in shards]}
    if paths[0].exists():  # a call that was killed here may have renamed it
        paths[0].rename(directory / f"{split}.bin")
    return {}
