"""Shard files: 256 little-endian int32 (20240520, 1, count, 0...), then `count` uint16."""

import hashlib
import os
from pathlib import Path

import numpy as np

from caseops import BOS

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256


def write_whole(path, *chunks):
    """Write `chunks` (bytes-like) to `path` aside, then rename: whole or not at all. sha256 hex."""
    path, digest = Path(path), hashlib.sha256()
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
                digest.update(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException as e:
        aside.unlink(missing_ok=True)
        if isinstance(e, OSError):  # a failed write does not say which file
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise
    return digest.hexdigest()


class ShardWriter:
    """One split's documents -> shards (and, with `sidecar`, byte shards beside them) in `folder`.

    Shards hold exactly `shard_tokens` tokens, documents run across their borders. `files` is the
    manifest's entry of each file so far; a document's raw bytes count where it begins.
    """

    def __init__(self, folder, split, shard_tokens, sidecar):
        self.folder, self.shard_tokens, self.files = Path(folder), shard_tokens, {}
        self._names = [split] + [f"{split}_bytes"] * sidecar
        self._index = -1
        self._begin()

    def _begin(self):
        self._index += 1
        self._parts = {name: [] for name in self._names}
        self._tokens = self._documents = self._raw = 0

    def add(self, ids, counts, raw_bytes):
        """Append one document: ids and counts uint16 [n], without BOS."""
        self._documents += 1
        self._raw += raw_bytes
        arrays = [np.concatenate((np.array([first], "<u2"), values)).astype("<u2", copy=False)
                  for first, values in ((BOS, ids), (0, counts)) if values is not None]
        done, total = 0, len(arrays[0])
        while done < total:
            n = min(total - done, self.shard_tokens - self._tokens)
            for name, array in zip(self._names, arrays, strict=True):
                self._parts[name].append(array[done:done + n])
            self._tokens += n
            done += n
            if self._tokens == self.shard_tokens:
                self._flush()

    def _flush(self):
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self._tokens
        for name, parts in self._parts.items():
            filename = f"fineweb_{name}_{self._index:06d}.bin"
            entry = {"sha256": write_whole(self.folder / filename, header, *parts),
                     "tokens": self._tokens, "documents": self._documents,
                     "original_bytes": self._raw}
            if name.endswith("_bytes"):
                entry["counted_bytes"] = sum(int(p.sum(dtype=np.int64)) for p in parts)
            self.files[filename] = entry
        self._begin()

    def close(self):
        """Write what is left as a short shard."""
        if self._tokens:
            self._flush()
