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
import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

import lossless_caps as caps
from caseops import COUNT_LIMIT, UserError
from caseops.encoder import DocumentError, Encoder, batches, train_tokenizer
from caseops.shards import ShardWriter, write_whole
from caseops.sources import DocumentFile, build_demo, choose_val_docs

PROGRAM_VERSION = "1.0"
MANIFEST_FORMAT = 1


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
