"""Shard files: 256 little-endian int32 (20240520, 1, count, 0...), then `count` uint16."""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256


def shard_header(tokens):
    """The header (bytes) of a shard of `tokens`."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def file_sha256(path):
    """sha256 (hex) of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def named(path):
    """OSErrors of the block say which file: a failed write does not."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None


class GrowingFile:
    """A file that grows aside, in PATH.tmp, and gets its name when it is whole."""

    def __init__(self, path):
        self.path = Path(path)
        self.aside = self.path.with_name(self.path.name + ".tmp")
        with named(self.path):
            self._file = open(self.aside, "wb", buffering=1 << 20)  # noqa: SIM115 - kept open

    def write(self, data):
        """Append a bytes-like object."""
        with named(self.path):
            self._file.write(data)

    def finish(self, head=b""):
        """Give the file its name; `head` replaces its first bytes."""
        with named(self.path):
            if head:
                self._file.seek(0)
                self._file.write(head)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.aside, self.path)

    def abandon(self):
        """Remove what there is."""
        with contextlib.suppress(OSError):  # what is buffered may find no room again
            self._file.close()
        self.aside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path):
    """A GrowingFile for a block: the file appears at the block's end, or not at all."""
    file = GrowingFile(path)
    try:
        yield file
        file.finish()
    except BaseException:
        file.abandon()
        raise


def write_whole(path, *chunks):
    """Write `chunks` (bytes-like) to the file `path`, whole or not at all. Its sha256 (hex)."""
    with whole_file(path) as file:
        for chunk in chunks:
            file.write(chunk)
    return file_sha256(path)


class ShardWriter:
    """One split's documents -> shards (and, with `sidecar`, byte shards beside them) in `folder`.

    Shards hold exactly `shard_tokens` tokens, documents run across their borders. Tokens go to the
    disk as they come. `files` is the manifest's entry of each whole file; a document's raw bytes
    count where it begins. `filled(tokens)` is called after each full shard with the number of
    tokens of the current document that are in whole shards: together with `files` that is all
    that a writer needs to go on from there.
    """

    def __init__(self, folder, split, shard_tokens, sidecar, *, files=None, filled=None):
        self.folder, self.shard_tokens = Path(folder), shard_tokens
        self.files, self._filled = dict(files or {}), filled
        self._names = [split] + [f"{split}_bytes"] * sidecar
        self._index = len(self.files) // len(self._names)
        self._begin()

    def _begin(self):
        self._open = {}
        self._tokens = self._documents = self._raw = self._counted = 0

    def add(self, tokens, counts, raw_bytes, skip=0):
        """Append one document: tokens and counts uint16 [n], BOS first; counts may be None.

        The first `skip` tokens are in whole shards already, so the document has been counted.
        """
        if not skip:
            self._documents += 1
            self._raw += raw_bytes
        done = skip
        while done < len(tokens):
            n = min(len(tokens) - done, self.shard_tokens - self._tokens)
            self._append([x[done:done + n] for x in (tokens, counts) if x is not None])
            done += n
            if self._tokens == self.shard_tokens:
                self._finish()
                if self._filled:
                    self._filled(done)

    def _append(self, arrays):
        for name, array in zip(self._names, arrays, strict=True):
            if name not in self._open:
                path = self.folder / f"fineweb_{name}_{self._index:06d}.bin"
                self._open[name] = GrowingFile(path)
                self._open[name].write(shard_header(self.shard_tokens))
            self._open[name].write(array.astype("<u2", copy=False))
        self._tokens += len(arrays[0])
        if len(arrays) > 1:
            self._counted += int(arrays[1].sum(dtype=np.int64))

    def _finish(self):
        head = b"" if self._tokens == self.shard_tokens else shard_header(self._tokens)
        for name, file in self._open.items():
            file.finish(head)
            entry = {"sha256": file_sha256(file.path), "tokens": self._tokens,
                     "documents": self._documents, "original_bytes": self._raw}
            if name.endswith("_bytes"):
                entry["counted_bytes"] = self._counted
            self.files[file.path.name] = entry
        self._index += 1
        self._begin()

    def close(self):
        """Finish what is left as a short shard."""
        if self._tokens:
            self._finish()

    def abandon(self):
        """Remove the shard that is not whole."""
        for file in self._open.values():
            file.abandon()
