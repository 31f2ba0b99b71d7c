"""Documents (JSON lines) -> token shards, byte sidecar and manifest.json.

    python prepare_caseops_data.py --docs docs.jsonl --sp TOKENIZER.model --out data
    python prepare_caseops_data.py --docs docs.jsonl --train-tokenizer --vocab-size 8192 --out data
    python prepare_caseops_data.py --demo data/demo --train-tokenizer --vocab-size 1024 \\
        --val-docs 150 --out data/demo

The input holds one JSON value a line: an object with a string "text", or a bare string. Its first
--val-docs documents are the validation set, the rest is training; nothing is reordered. Written:

    OUT/tokenizers/NAME.model
    OUT/datasets/fineweb10B_sp<V>_lossless_caps_caseops_v1_reserved/
        fineweb_train_%06d.bin      tokens; every document begins with BOS (id 1)
        fineweb_val_%06d.bin
        fineweb_val_bytes_%06d.bin  original UTF-8 bytes that each val token stands for (BOS: 0)
        manifest.json               sha256, tokens, documents, bytes of every file; split; versions

A shard is 256 little-endian int32 (20240520, 1, count, 0...) and then `count` uint16. All files
grow in a directory beside the data set and replace the old ones at the end, manifest last: a run
that is killed, or finds bad input or a full disk, leaves the old data set as it was.
Exit code 0, or 2 with one line on standard error.
"""

import argparse
import ast
import codecs
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import time
import tokenize
import types
import warnings
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

import lossless_caps as caps

PROGRAM_VERSION = "1.0"
MANIFEST_FORMAT = 1
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
BOS = 1
OPERATOR_IDS = {op: 4 + i for i, op in enumerate(caps.OPERATORS)}
COUNT_LIMIT = 1 << 16  # token ids and byte counts are uint16
BATCH_BYTES = 1 << 20
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space inside pieces


class UserError(Exception):
    """What a user can cause and mend, said in one line."""


class DocumentError(ValueError):
    """Document number `index` of a batch cannot be prepared; the message says why."""

    def __init__(self, message, index):
        super().__init__(message)
        self.index = index


# ---- input ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Document:
    """One document: its text, size in UTF-8 bytes, and line in the input (from 1)."""

    text: str
    size: int
    line: int


class DocumentFile:
    """The documents of a JSON-lines file, in order, each time it is iterated.

    Raises UserError, naming file and line, for a line that cannot be a document. After a whole
    pass `sha256` is the file's digest; `position` is the number of bytes read so far.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; give --docs a JSON-lines file, or build one "
                            "with --demo DIR")
        self.size = self.path.stat().st_size
        self.position, self.sha256 = 0, None

    def _lines(self):
        digest = hashlib.sha256()
        self.position = 0
        with open(self.path, "rb") as f:
            for number, line in enumerate(f, 1):
                self.position += len(line)
                digest.update(line)
                bare = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
                if bare:
                    yield number, bare
        self.sha256 = digest.hexdigest()

    def __iter__(self):
        return (self._parse(number, line) for number, line in self._lines())

    def _parse(self, number, line):
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as e:
            self.reject(number, f"not UTF-8 ({e.reason} at byte {e.start} of the line)")
        except json.JSONDecodeError as e:
            self.reject(number, f"not JSON ({e.msg} at column {e.colno})")
        except (ValueError, RecursionError) as e:  # a number or a nesting beyond Python's limits
            self.reject(number, f"not JSON that can be read ({e})")
        if isinstance(value, dict):
            if "text" not in value:
                self.reject(number, 'the object has no "text"')
            value = value["text"]
            if not isinstance(value, str):
                self.reject(number, f'"text" must be a string, not {type(value).__name__}')
        elif not isinstance(value, str):
            self.reject(number, f'{type(value).__name__}, where an object with "text" or a string '
                                "was expected")
        try:
            return Document(value, len(value.encode()), number)
        except UnicodeEncodeError as e:
            self.reject(number, f"a lone surrogate (U+{ord(value[e.start]):04X}, "
                                f"character {e.start} of the text)")

    def reject(self, line, reason):
        """Raise the UserError for one line of this file."""
        raise UserError(f"{self.path}:{line}: {reason}; mend or remove this line") from None

    def count(self, at_most):
        """How many documents there are, up to `at_most`; the lines are not looked into."""
        return sum(1 for _ in zip(range(at_most), self._lines(), strict=False))


def choose_val_docs(source, wanted):
    """How many documents to validate on: `wanted`, or a tenth of an input that has no more."""
    found = source.count(wanted + 1)
    if found > wanted:
        return wanted
    if found < 2:
        raise UserError(f"{source.path}: {found} documents; at least 2 are needed, one to validate "
                        "on and one to train on")
    capped = max(1, found // 10)
    print(f"{source.path}: only {found:,} documents, so --val-docs {wanted:,} is capped at "
          f"{capped:,} (one in ten); {found - capped:,} are left for training", flush=True)
    return capped


# ---- text to tokens ------------------------------------------------------------------------------


class Encoder:
    """Texts -> (token ids, original bytes of each token), through the case transform.

    `model` is a serialized SentencePiece model with the four operators at ids 4..7, BOS at 1,
    byte fallback and at most 65,536 pieces; else UserError, which begins with `name`.
    `exact`: this tokenizer keeps every byte, so decode(ids) is the text.
    """

    _PROBE = " \t\n  a\u00a0 \r\n\x00\x01\ufb01 e\u0301\ufeff \ufffd  \n "
    # A piece of 65,536 bytes can only be one whose source is mostly normalised away: it holds at
    # least one long run of something other than visible ASCII.
    _LONG_RUN = re.compile(r"[^!-~]{900}")

    def __init__(self, model, name="tokenizer", threads=None):
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except RuntimeError as e:
            raise UserError(f"{name}: not a SentencePiece model ({e}); give --sp another file, or "
                            "use --train-tokenizer") from None
        self.size = len(self.sp)
        self.threads = threads or os.cpu_count() or 1
        pieces = [self.sp.id_to_piece(i) for i in range(self.size)]
        self._require(name, pieces)
        is_byte = [self.sp.is_byte(i) for i in range(self.size)]
        # Length of each piece in normalised text, where a space is SPACE_MARK (3 bytes).
        self._lengths = np.array([1 if b else len(p.encode())
                                  for p, b in zip(pieces, is_byte, strict=True)])
        self.exact = self.sp.decode(self.sp.encode(self._PROBE)) == self._PROBE
        mark = [self.sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        self._mark = np.array(mark, np.uint16), np.array([0, 0, 3], np.uint16)

    def _require(self, name, pieces):
        problem = None
        if self.size > COUNT_LIMIT:
            problem = f"{self.size:,} pieces, but ids are 16 bits: at most {COUNT_LIMIT:,}"
        elif any(i >= self.size or pieces[i] != op for op, i in OPERATOR_IDS.items()):
            problem = "the case operators U+E001..U+E004 are not the pieces 4..7"
        elif self.sp.bos_id() != BOS:
            problem = f"BOS has id {self.sp.bos_id()}, not {BOS}"
        elif self.sp.piece_to_id("<0xE2>") == self.sp.unk_id():
            problem = "no byte fallback"
        if problem:
            raise UserError(f"{name}: {problem}; use a CaseOps tokenizer, or --train-tokenizer")

    def encode_documents(self, texts, counts=True):
        """[(ids uint16 [n], counts uint16 [n] or None)] for a list of str, without BOS.

        counts[i] is the number of original UTF-8 bytes that token i stands for. A tokenizer that
        is not `exact` may drop white space at either end of a text; those bytes are not counted.
        `counts=False` saves the work. Raises DocumentError for a piece of 65,536 bytes or more.
        """
        data = [caps.encode(text).encode() for text in texts]
        ids = self._encode(data)
        done = []
        for i, text in enumerate(texts):
            if self.exact and SPACE_MARK in text:
                done.append(self._with_space_marks(text, counts))
                continue
            spans = None
            if counts or (len(data[i]) >= COUNT_LIMIT and self._LONG_RUN.search(text)):
                spans = self._count(data[i], ids[i])
                if len(spans) and spans.max() >= COUNT_LIMIT:
                    raise DocumentError(f"a piece of {spans.max():,} bytes (limit "
                                        f"{COUNT_LIMIT - 1:,})", i)
            done.append((ids[i].astype(np.uint16), spans.astype(np.uint16) if counts else None))
        return done

    def decode(self, ids):
        """The text of `ids` (without BOS): the original one where the tokenizer is `exact`."""
        return caps.decode(self.sp.decode([int(i) for i in ids]))

    def _encode(self, data):
        if hasattr(self.sp, "encode_as_numpy"):  # since sentencepiece 0.2.2
            return self.sp.encode(data, out_type="numpy", num_threads=self.threads)
        return [np.array(x, np.int32) for x in self.sp.encode(data, num_threads=self.threads)]

    def _count(self, data, ids):
        normal, origin = self.sp.normalize(data, with_offsets=True)
        ends = np.cumsum(self._lengths[ids], dtype=np.int64)
        assert len(normal) == (ends[-1] if len(ends) else 0), "pieces do not tile the text"
        if not len(ends):
            return ends
        original = caps.cumulative_bytes(data)[np.array(origin)]
        return np.diff(original[ends], prepend=original[0])

    def _with_space_marks(self, text, counts):
        """SentencePiece reads a literal U+2581 as a space: spell it in byte tokens instead."""
        parts = self.encode_documents(text.split(SPACE_MARK), counts)
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [self._mark, part]
        ids, spans = zip(*joined, strict=True)
        return np.concatenate(ids), np.concatenate(spans) if counts else None


def batches(documents, limit=BATCH_BYTES):
    """Lists of consecutive documents of about `limit` bytes together, at least one each."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.size + 64
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- training a tokenizer ------------------------------------------------------------------------

# The trainer skips a sentence that holds NUL or its own U+2585, and reads U+2581 as a space.
_UNTRAINABLE = re.compile("[\0\u2581\u2585]")
# Keeps every byte. Whitespace may form pieces of its own, or indentation costs a token a space.
TOKENIZER_SPEC = {
    "model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "add_dummy_prefix": False, "byte_fallback": True, "split_digits": True,
    "character_coverage": 0.9995, "allow_whitespace_only_pieces": True,
    "user_defined_symbols": list(caps.OPERATORS), "pad_id": 0, "bos_id": 1, "eos_id": 2,
    "unk_id": 3, "max_sentence_length": 1 << 16, "num_threads": 4}


def training_pieces(text, limit=4000):
    """Cut encoded `text` before white space into pieces of at most `limit` characters, so that
    the trainer, which skips long sentences, sees all of a long document."""
    for part in _UNTRAINABLE.split(text):
        start = 0
        while len(part) - start > limit:
            cut = max(part.rfind(c, start + 1, start + limit) for c in " \n")
            cut = cut if cut > 0 else start + limit
            yield part[start:cut]
            start = cut
        if start < len(part):
            yield part[start:]


def train_tokenizer(documents, vocab_size, max_bytes, progress=None):
    """Train a byte-exact BPE on the first `max_bytes` of `documents`; the serialized model.

    Raises UserError where the text is too little or too varied for `vocab_size`.
    """
    pieces, total = [], 0
    for document in documents:
        pieces.extend(training_pieces(caps.encode(document.text)))
        total += document.size
        if progress:
            progress()
        if total >= max_bytes:
            break
    model = io.BytesIO()
    if not pieces:
        raise UserError("--train-tokenizer: the training documents are empty; give more text")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces), model_writer=model, vocab_size=vocab_size,
            minloglevel=2, **TOKENIZER_SPEC)
    except RuntimeError as e:
        low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(e))
        high = re.search(r"value <= (\d+)", str(e))
        advice = f"at least {int(low[1]) + 1}" if low else f"at most {high[1]}" if high else ""
        raise UserError(f"--vocab-size {vocab_size} does not suit {total:,} bytes of training "
                        f"text; use {advice or 'another size or more text'}"
                        + ("" if advice else f" ({' '.join(str(e).split())})")) from None
    return model.getvalue()


# ---- writing -------------------------------------------------------------------------------------


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


class Progress:
    """How far a job of `total` bytes is: a tqdm bar on a terminal, else a line every 10 s."""

    def __init__(self, job, total, every=10.0):
        self.job, self.total, self.every = job, total, every
        self.began = self.told = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=job, unit="B", unit_scale=True)

    def at(self, position):
        """Say that `position` bytes are done."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(position - self.bar.n)
        elif now - self.told >= self.every:
            self.told, rate = now, position / (now - self.began)
            print(f"{self.job}: {position / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, "
                  f"{rate / 1e6:.2f} MB/s, {(self.total - position) / max(rate, 1):,.0f} s left",
                  file=sys.stderr, flush=True)

    def close(self):
        """Take the bar off."""
        if self.bar is not None:
            self.bar.close()


# ---- the whole job -------------------------------------------------------------------------------


def write_shards(source, encoder, val_docs, folder, shard_tokens):
    """Encode every document of `source` into shards in `folder`; {split: ShardWriter}, closed."""
    writers = {split: ShardWriter(folder, split, shard_tokens, sidecar=split == "val")
               for split in ("val", "train")}
    documents = iter(source)
    # Two runs over one iterator, so that no batch holds documents of both splits.
    parts = {"val": itertools.islice(documents, val_docs), "train": documents}
    with contextlib.closing(Progress("encoding", source.size)) as progress:
        for split, part in parts.items():
            for batch in batches(part):
                try:
                    encoded = encoder.encode_documents([d.text for d in batch], split == "val")
                except DocumentError as e:
                    source.reject(batch[e.index].line, str(e))
                for document, (ids, counts) in zip(batch, encoded, strict=True):
                    writers[split].add(ids, counts, document.size)
                progress.at(source.position)
            writers[split].close()
    return writers


def make_manifest(source, writers, tokenizer, requested):
    """The manifest (a dict); `tokenizer` is its entry, `requested` the --val-docs asked for."""
    files, totals = {}, {}
    for split, writer in sorted(writers.items()):
        own = {k: v for k, v in writer.files.items() if "_bytes_" not in k}
        totals[split] = {"files": len(own)} | {
            key: sum(f[key] for f in own.values())
            for key in ("tokens", "documents", "original_bytes")}
        files |= writer.files
    val, val_docs = totals["val"], totals["val"]["documents"]
    val["counted_bytes"] = sum(f.get("counted_bytes", 0) for f in files.values())
    exact = val["counted_bytes"] == val["original_bytes"]
    assert exact or not tokenizer["keeps_every_byte"], "bytes went missing"
    return {
        "format": "caseops shards", "format_version": MANIFEST_FORMAT,
        "transform": caps.TRANSFORM_NAME,
        "source": {"file": source.path.name, "bytes": source.size, "sha256": source.sha256,
                   "documents": val_docs + totals["train"]["documents"]},
        "split": {"rule": f"in the order of the source, the first {val_docs} documents are "
                          "validation and all others training; nothing is left out or reordered",
                  "val_docs_requested": requested, "val_documents": val_docs,
                  "train_documents": totals["train"]["documents"]},
        "tokenizer": tokenizer,
        "shard_tokens": writers["train"].shard_tokens,
        "totals": totals,
        "counted_bytes_equal_original_bytes": exact,
        "original_bytes_of_a_file": "raw UTF-8 bytes of the documents that begin in it",
        "files": dict(sorted(files.items())),
        "versions": {"program": PROGRAM_VERSION, "python": platform.python_version(),
                     "sentencepiece": sentencepiece.__version__, "numpy": np.__version__}}


def install(staged, folder, manifest, tokenizer):
    """Move the finished files from `staged` into place and remove shards of an older set there.

    Everything has been written by now, so only renaming is left; the manifest comes last. What
    would stop a renaming is looked for before the first one.
    """
    targets = [tokenizer, *(folder / name for name in (*manifest["files"], "manifest.json"))]
    for path in targets:
        if path.is_dir():
            raise UserError(f"{path}: a directory is in the way; remove it or give another --out")
    for path in (folder, tokenizer.parent):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: not a directory; remove it or give another --out")
    folder.mkdir(exist_ok=True)
    tokenizer.parent.mkdir(exist_ok=True)
    os.replace(staged / tokenizer.name, tokenizer)
    for name in manifest["files"]:
        os.replace(staged / name, folder / name)
    for old in folder.glob("fineweb_*.bin"):
        if re.fullmatch(r"fineweb_(train|val|val_bytes)_\d{6}\.bin", old.name) \
                and old.name not in manifest["files"]:
            old.unlink()
    os.replace(staged / "manifest.json", folder / "manifest.json")


def prepare(docs, out, *, sp=None, vocab_size=None, val_docs=50_000, shard_tokens=100_000_000,
            tokenizer_bytes=300_000_000):
    """Prepare the data set of `docs` under `out`; the manifest (a dict).

    Give `sp`, a tokenizer's path, or `vocab_size` to train one on the training documents. Raises
    UserError or OSError, and then leaves what was there before untouched.
    """
    source, out = DocumentFile(docs), Path(out)
    if sp is not None:
        if not Path(sp).is_file():
            raise UserError(f"{sp}: no such file; give --sp a SentencePiece model, or use "
                            "--train-tokenizer")
        model, name = Path(sp).read_bytes(), Path(sp).name
        encoder = Encoder(model, str(sp))
        if Path(name).suffix != ".model":
            raise UserError(f"{sp}: the name of a tokenizer must end in .model; rename it")
    n_val = choose_val_docs(source, val_docs)
    if sp is None:
        with contextlib.closing(Progress("reading for the tokenizer", source.size)) as progress:
            model = train_tokenizer(itertools.islice(source, n_val, None), vocab_size,
                                    tokenizer_bytes, lambda: progress.at(source.position))
        encoder = Encoder(model, "the tokenizer just trained")
        assert encoder.exact and encoder.size == vocab_size
        name = f"fineweb_{vocab_size}_bpe_{caps.TRANSFORM_NAME}_reserved.model"
        print(f"tokenizer: {vocab_size} pieces, trained on the training documents", flush=True)
    entry = {"file": name, "sha256": hashlib.sha256(model).hexdigest(), "bytes": len(model),
             "vocab_size": encoder.size, "trained_here": sp is None,
             "keeps_every_byte": encoder.exact}
    folder = out / "datasets" / f"fineweb10B_sp{encoder.size}_{caps.TRANSFORM_NAME}_reserved"
    with staging(folder.with_name(folder.name + ".partial")) as staged:
        writers = write_shards(source, encoder, n_val, staged, shard_tokens)
        manifest = make_manifest(source, writers, entry, val_docs)
        write_whole(staged / name, model)
        write_whole(staged / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        install(staged, folder, manifest, out / "tokenizers" / name)
    report(manifest, folder)
    return manifest


@contextlib.contextmanager
def staging(path):
    """An empty directory `path` for the time of the block; on failure no trace of it is left."""
    shutil.rmtree(path, ignore_errors=True)  # what a killed run left
    created = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        for parent in created:  # those that hold something stay
            with contextlib.suppress(OSError):
                parent.rmdir()


def report(manifest, folder):
    """Print what was made, a line a split."""
    for split, t in manifest["totals"].items():
        print(f"{split}: {t['documents']:,} documents, {t['original_bytes']:,} bytes, "
              f"{t['tokens']:,} tokens in {t['files']} shards")
    val = manifest["totals"]["val"]
    lost = val["original_bytes"] - val["counted_bytes"]
    print("byte sidecar: exact" if not lost else f"byte sidecar: {lost:,} bytes of white space at "
          "the ends of documents are in no token of this tokenizer")
    print(f"written: {folder}", flush=True)


# ---- the demo corpus -----------------------------------------------------------------------------

_SHORTEST = 200  # characters; a shorter document is not worth a BOS
_C_MODULES = ("array", "math", "cmath", "_datetime", "_decimal", "_socket", "_ssl", "select",
              "zlib", "_bz2", "_lzma", "_json", "_pickle", "_struct", "_random", "_csv", "mmap",
              "unicodedata", "_elementtree", "_asyncio", "_bisect", "_heapq", "_zoneinfo")


def module_prose(name, source, seen):
    """The English of one Python module: docstrings under their signatures, and comment blocks,
    in the order of the file. Strings in `seen` (a set, added to) are left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, node.bases))
            head = f"class {node.name}({bases})\n" if bases else f"class {node.name}\n"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            head = f"{node.name}({ast.unparse(node.args)})\n"
        elif isinstance(node, ast.Module):
            head = ""
        else:
            continue
        if text := ast.get_docstring(node):
            found.append((getattr(node, "lineno", 0), text, head + text))
    for block in re.finditer(r"(?:^[ \t]*#.*\n){2,}", source, re.M):
        text = inspect.cleandoc(re.sub(r"(?m)^[ \t]*#+ ?", "", block[0]))
        found.append((source.count("\n", 0, block.start()) + 1, text, text))
    return _joined(name, found, seen)


def _joined(name, found, seen):
    parts = [name]
    for _, text, shown in sorted(found):
        if text.strip() and text not in seen:
            seen.add(text)
            parts.append(shown.rstrip())
    return "\n\n".join(parts) + "\n"


def builtin_prose(name, seen):
    """The docstrings of a module written in C; importing one runs nothing of note. "" if none."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ""
    found = [(0, inspect.getdoc(module) or "", inspect.getdoc(module) or "")]
    for key, value in sorted(vars(module).items()):
        if not isinstance(value, type | types.BuiltinFunctionType):
            continue
        members = sorted(vars(value).items()) if isinstance(value, type) else []
        for label, item in [(key, value)] + [(f"{key}.{k}", v) for k, v in members]:
            text = getattr(item, "__doc__", None)
            if isinstance(text, str) and len(text) > 40:
                found.append((len(found), inspect.cleandoc(text),
                              f"{label}\n{inspect.cleandoc(text)}"))
    return _joined(name, found, seen)


def demo_documents():
    """English that comes with CPython, one document a help topic or module: pydoc's topics and
    the prose of the standard library, each text once, shuffled with a fixed seed."""
    topics = importlib.import_module("pydoc_data.topics").topics
    seen, documents = set(topics.values()), [text for _, text in sorted(topics.items())]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if {"site-packages", "dist-packages", "pydoc_data"} & set(parts):
            continue
        try:
            with tokenize.open(path) as f, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                documents.append(module_prose(".".join(parts), f.read(), seen))
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue  # the library's own tests hold files that are broken on purpose
    for name in sorted({*sys.builtin_module_names, *_C_MODULES}):
        documents.append(builtin_prose(name, seen))
    documents = sorted({d for d in documents if len(d) >= _SHORTEST
                        and not re.search("[\ud800-\udfff]", d)})
    random.Random(0).shuffle(documents)
    return documents


def build_demo(folder):
    """Write `folder`/docs.jsonl, the demo corpus, and return its path."""
    path = Path(folder) / "docs.jsonl"
    documents = demo_documents()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps({"text": d}) + "\n" for d in documents).encode())
    print(f"{path}: {len(documents):,} documents, {sum(len(d.encode()) for d in documents):,} "
          f"bytes of text from Python {platform.python_version()}'s own documentation", flush=True)
    return path


# ---- command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the options")


def parse_arguments(argv):
    """Command line -> namespace. Raises UserError for what does not fit together."""
    p = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False)
    p.add_argument("--docs", help="JSON-lines input (default with --demo: DIR/docs.jsonl)")
    p.add_argument("--out", help="output root")
    p.add_argument("--sp", help="SentencePiece model")
    p.add_argument("--val-docs", type=int, default=50_000, metavar="N",
                   help="the first N documents are validation (default %(default)s)")
    p.add_argument("--train-tokenizer", action="store_true",
                   help="instead of --sp: train a BPE on the training documents")
    p.add_argument("--vocab-size", type=int, metavar="N", help="its size, at most 65536")
    p.add_argument("--tokenizer-bytes", type=int, default=300_000_000, metavar="N",
                   help="train it on the first N bytes of training text (default %(default)s)")
    p.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                   help="tokens a shard (default %(default)s)")
    p.add_argument("--demo", metavar="DIR",
                   help="build DIR/docs.jsonl from Python's own documentation")
    args = p.parse_args(argv)
    problems = [
        (args.val_docs < 1, "--val-docs must be at least 1"),
        (not 1 <= args.shard_tokens < 1 << 31, "--shard-tokens must be 1 to 2147483647"),
        (args.tokenizer_bytes < 1, "--tokenizer-bytes must be at least 1"),
        (not (args.docs or args.demo), "no input; give --docs FILE or --demo DIR"),
        (not args.out and (args.docs or args.sp or args.train_tokenizer),
         "no output; give --out DIR"),
        (args.out and not (args.sp or args.train_tokenizer),
         "no tokenizer; give --sp FILE or --train-tokenizer --vocab-size N"),
        (args.sp and args.train_tokenizer, "--sp and --train-tokenizer: give one of them"),
        (args.train_tokenizer and not args.vocab_size, "--train-tokenizer needs --vocab-size N"),
        (args.vocab_size is not None and not args.train_tokenizer,
         "--vocab-size is for --train-tokenizer"),
        (args.vocab_size is not None and not 1 <= args.vocab_size <= COUNT_LIMIT,
         f"--vocab-size must be 1 to {COUNT_LIMIT} (ids are 16 bits)"),
    ]
    for wrong, message in problems:
        if wrong:
            raise UserError(message)
    return args


def main(argv=None):
    """Command line: returns the exit code: 0, 2 (bad input) or 130 (interrupted)."""
    try:
        args = parse_arguments(argv)
        docs = build_demo(args.demo) if args.demo else None
        if args.out:
            prepare(args.docs or docs, args.out, sp=args.sp, vocab_size=args.vocab_size,
                    val_docs=args.val_docs, shard_tokens=args.shard_tokens,
                    tokenizer_bytes=args.tokenizer_bytes)
        return 0
    except UserError as e:
        message = str(e)
    except OSError as e:
        hint = "free some space" if e.errno == errno.ENOSPC else "check the name and the rights"
        message = f"{e.filename or 'file'}: {e.strerror or e}; {hint} and run again"
    except KeyboardInterrupt:
        print("interrupted; the old files are as they were", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
