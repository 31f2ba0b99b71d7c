"""Shards -> JSON lines again: {"text": ...} a document, validation first, then training.

With a tokenizer that keeps every byte the texts are the original ones. The published tokenizer
collapses white space and applies NFKC before it splits, so the lengths of what was lost are told,
as far as they can be known: for validation the sidecar has each document's original bytes; for
training a manifest may have their sum. A change that keeps the length (a newline read as a
space) cannot be seen from the shards.

NFKC may also leave an operator with nothing to act on (`A` U+0301 becomes TITLE á), which
lossless_caps.decode refuses. Such a document is written by `restore`, and counted.
"""

import contextlib
import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np

import lossless_caps as caps
from caseops import UserError
from caseops.encoder import Encoder
from caseops.shards import file_sha256, whole_file
from caseops.sources import batches
from caseops.splits import (
    Split,
    documents,
    find_shards,
    find_tokenizer,
    read_manifest,
    sequence_problems,
    shard_directory,
)

BATCH_TOKENS = 1 << 19
_MARKED = re.compile(f"{caps.ESC}(.)|{caps.ALLCAPS}([A-Za-z](?:{caps.CAPNEXT}?[A-Za-z])*)"
                     f"|[{caps.TITLE}{caps.CAPNEXT}]([A-Za-z])|[{caps.OPERATORS}]", re.S)


def _unmarked(match):
    literal, word, letter = match.groups()
    if word:
        return word.replace(caps.CAPNEXT, "").upper()
    return literal or (letter or "").upper()


def restore(text):
    """(original text, True) of an encoded text, or the nearest text and False.

    The nearest: TITLE and CAPNEXT make a capital of the ASCII letter right after them, ALLCAPS of
    all the letters right after it, ESC takes the next character as it is; an operator that has
    nothing such after it is dropped. Where lossless_caps.decode has an answer, that is the one.
    """
    lenient = _MARKED.sub(_unmarked, text)
    if caps.encode(lenient) == text:  # encoding is one-to-one: then this is what was encoded
        return lenient, True
    try:
        return caps.decode(text), True
    except caps.LosslessCapsError:
        return lenient, False


def decode_documents(encoder, batch):
    """[(text, whether its operators could be undone)] for a list of id arrays without BOS.

    Raises UserError where an id is not in the tokenizer.
    """
    highest = max((int(ids.max(initial=0)) for ids in batch), default=0)
    if highest >= encoder.size:
        raise UserError(f"id {highest:,} in the shards, but the tokenizer has {encoder.size:,} "
                        "pieces: give the one they were made with")
    texts = encoder.sp.decode([ids.tolist() for ids in batch], num_threads=encoder.threads)
    return [restore(text) for text in texts]


def open_tokenizer(path):
    """The Encoder of the tokenizer at `path`. Raises UserError where it cannot be used."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the tokenizer that made the shards")
    return Encoder(Path(path).read_bytes(), str(path))


@dataclasses.dataclass
class Loss:
    """What is known of the text that a split's tokens do not give back; sizes in UTF-8 bytes.

    `original` is None where nothing tells. `changed` documents have another length than the
    original, by `differing` bytes in all (None: only the sum is known); `unmarked` documents
    hold operators that could not be undone, `unknown` tokens have no text.
    """

    documents: int = 0
    decoded: int = 0
    original: int | None = None
    changed: int = 0
    differing: int | None = None
    unmarked: int = 0
    unknown: int = 0

    def add(self, unknown, text, whole, original=None):
        """Count a document: how many of its ids have no text, its text, whether its operators were
        undone, and its original bytes, if known."""
        size = len(text.encode())
        self.documents += 1
        self.decoded += size
        self.unmarked += not whole
        self.unknown += unknown
        if original is not None:
            self.original = (self.original or 0) + original
            self.changed += original != size
            self.differing = (self.differing or 0) + abs(original - size)

    def line(self, name, exact):
        """One line that says it all."""
        text = f"{name}: {self.documents:,} documents, {self.decoded:,} bytes of text"
        if self.differing is not None and (self.differing or not exact):
            share = self.differing / max(self.original, 1)
            text += (f"; {self.changed:,} documents differ in length from the original, by "
                     f"{self.differing:,} of {self.original:,} bytes ({share:.3%})")
        elif self.original is not None:
            missing = self.original - self.decoded
            text += "; as many as the original" if not missing else (
                f"; {abs(missing):,} bytes ({abs(missing) / max(self.original, 1):.3%}) "
                f"{'fewer' if missing > 0 else 'more'} than the original")
        elif not exact:
            text += "; how much was lost is not known"
        if self.unmarked:
            text += f"; {self.unmarked:,} documents with operators that cannot be undone"
        if self.unknown:
            text += f"; {self.unknown:,} tokens without text"
        return text


# ---- the whole job -------------------------------------------------------------------------------


def export(folder, destination=None, *, tokenizer=None, out=None):
    """Write the documents of the shards in `folder` as JSON lines; {"val" | "train": Loss}.

    `destination`: a file, a directory (docs.jsonl in it), or None or "-" for standard output. The
    file appears whole or not at all. `tokenizer` overrules the one found beside the shards. `out`
    takes the lines of the report (default: print, to standard error where the texts go to
    standard output). Raises UserError or OSError.
    """
    folder = shard_directory(folder)
    to_stdout = destination is None or str(destination) == "-"
    out = out or (lambda line: print(line, file=sys.stderr if to_stdout else sys.stdout,
                                     flush=True))
    shards, manifest = find_shards(folder), read_manifest(folder)
    for name in ("val", "train"):
        if problems := sequence_problems(shards[name]):
            raise UserError(f"{problems[0]}; nothing was written; --audit tells all that is wrong")
    path = tokenizer or find_tokenizer(folder, manifest)
    if path is None:
        raise UserError(f"{folder}: no tokenizer beside these shards; give --sp the one that made "
                        "them")
    encoder, told = open_tokenizer(path), manifest["tokenizer"].get("sha256")
    if tokenizer and told and file_sha256(tokenizer) != told:
        raise UserError(f"{tokenizer}: not the tokenizer of the manifest (other sha256); give the "
                        "one that made the shards")
    with _sink(None if to_stdout else Path(destination)) as (file, place):
        losses = {name: _write(file, shards, name, encoder)
                  for name in ("val", "train") if shards[name]}
    _sums_of_manifest(manifest, shards, losses)
    if not encoder.exact:
        out("note: this tokenizer loses text; a change that keeps the length (a newline read as a "
            "space) cannot be seen from the shards, so what follows is a lower bound")
    for name, loss in losses.items():
        out(loss.line(name, encoder.exact))
    out(f"written: {place}")
    return losses


def _write(file, shards, name, encoder):
    loss, side = Loss(), sidecar(shards) if name == "val" else None
    for batch in batches(documents(Split(shards[name])), BATCH_TOKENS, lambda x: len(x[1]) + 16):
        texts = decode_documents(encoder, [ids for _, ids in batch])
        for (begin, ids), (text, whole) in zip(batch, texts, strict=True):
            original = side and int(side.read(begin, begin + len(ids)).sum(dtype=np.int64))
            loss.add(encoder.count_textless(ids), text, whole, original)
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return loss


def sidecar(shards):
    """The Split of validation's byte counts, or None where they do not fit the tokens."""
    tokens, counts = shards["val"], shards["val_bytes"]
    same = [(s.index, s.tokens) for s in tokens] == [(s.index, s.tokens) for s in counts]
    return Split(counts) if same and not any(s.problem for s in counts) else None


def _sums_of_manifest(manifest, shards, losses):
    """Where a split's original bytes are not known yet, take the manifest's, if it has all."""
    files = manifest["files"]
    for name, loss in losses.items():
        sizes = [files.get(s.path.name, {}).get("original_bytes") for s in shards[name]]
        listed = [n for n in files if f"_{name}_" in n and "_bytes_" not in n]
        if loss.original is None and len(listed) == len(sizes) \
                and all(isinstance(x, int) for x in sizes):
            loss.original = sum(sizes)


@contextlib.contextmanager
def _sink(path):
    """(what to write bytes to, its name): standard output where `path` is None, or a file that
    gets its name when it is whole."""
    if path is None:
        if sys.stdout is None:
            raise UserError("standard output is closed; give --out FILE")
        yield sys.stdout.buffer, "standard output"
        sys.stdout.buffer.flush()
        return
    if path.is_dir() or not path.suffix:
        path = path / "docs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        yield file, path
