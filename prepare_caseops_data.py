"""Documents -> token shards, byte sidecar and manifest.json; the published sets, fetched.

    python prepare_caseops_data.py --docs docs.jsonl --sp TOKENIZER.model --out data
    python prepare_caseops_data.py --docs a.jsonl.zst b.parquet FOLDER --text-column text ...
    zcat docs.jsonl.gz | python prepare_caseops_data.py --docs - --sp TOKENIZER.model --out data
    python prepare_caseops_data.py --docs docs.jsonl --sp TOKENIZER.model --fuse-markers --out data
    python prepare_caseops_data.py --docs docs.jsonl --train-tokenizer --vocab-size 8192 --out data
    python prepare_caseops_data.py --demo data/demo --train-tokenizer --vocab-size 1024 \\
        --val-docs 32 --out data/demo
    python prepare_caseops_data.py --download caseops --train-shards 80 --out data
    python prepare_caseops_data.py --download docs --out data
    python prepare_caseops_data.py --audit DATASET_FOLDER [--sp TOKENIZER.model] [--val PATH]
    python prepare_caseops_data.py --export DATASET_FOLDER --out docs.jsonl

The input holds one JSON value a line: an object with a string "text", or a bare string; plain or
in gzip, bzip2, zstd or xz. Or it is Parquet with a text column. Its first --val-docs documents are
the validation set, the rest is training; nothing is reordered. Written:

    OUT/tokenizers/NAME.model
    OUT/datasets/NAME_sp<V>_lossless_caps_caseops_v1_reserved/    (NAME: --name, default own)
        fineweb_train_%06d.bin      tokens; every document begins with BOS (id 1)
        fineweb_val_%06d.bin
        fineweb_val_bytes_%06d.bin  original UTF-8 bytes that each val token stands for (BOS: 0)
        manifest.json               sha256, tokens, documents, bytes of every file; split; versions

A shard is 256 little-endian int32 (20240520, 1, count, 0...) and then `count` uint16. The files
are the same for any number of --workers. All grow in a directory beside the data set, which they
replace as a whole at the end: a run that is killed, or finds bad input or a full disk, leaves the
old data set as it was. The same command then goes on from the last whole shard and ends in the
same bytes; --restart discards that work.

Memory does not grow with the input. At most 2N + 2 chunks are under way with N workers; a chunk is
1.3 MB (plus what 16 kB unpack to, if compressed) or one longer document. The parent takes 130 MB
and 10 MB a worker, 100 bytes a validation document, and for Parquet the text column of one row
group; a worker takes 350 MB (and one worker alone, which is the parent, 500 MB), and 120 MB more
where the text has no spaces. A document larger than a chunk takes up to 110 times its size where it
is encoded.

The manifest's split says where validation ends and training begins in the source ("overlap":
false), and how many training documents have the very text of a validation document. They stay in,
as in the published split, unless --drop-val-duplicates leaves them out. "content" identifies the
documents of a split whatever the tokenizer, the shards and the input's format: blake2b over
(identity so far + digest of the document's text), 16 bytes each.

Exit code 0, or 2 with one line on standard error.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib
import itertools
import json
import os
import platform
import re
import signal
import sys
from pathlib import Path

try:
    import numpy as np
    import sentencepiece

    import lossless_caps as caps
    from caseops import COUNT_LIMIT, UserError, sources
    from caseops.console import Progress, mute, say
    from caseops.demo import build_demo
    from caseops.encoder import Encoder, fuse_markers, train_tokenizer
    from caseops.shards import ShardWriter, write_whole
    from caseops.sources import DocumentProblem, Source, choose_val_docs
    from caseops.staging import (
        DIGESTS,
        MANIFEST,
        Staging,
        check_target,
        install,
        locked,
        recover,
    )
    from caseops.workers import DIGEST_BYTES, encode_all, text_digest
except ModuleNotFoundError as missing:
    print(f"error: {missing.name} is not installed; source .venv/bin/activate, or pip install -r "
          "requirements.txt", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

PROGRAM_VERSION = "1.1"
MANIFEST_FORMAT = 1


# ---- the whole job -------------------------------------------------------------------------------


class Writing:
    """Encodes every document of a Source into the shards of a Staging, from where that stands.

    The journal's cursor is the chunk and the document in it that the last full shard ends in, and
    how many of that document's tokens it and those before hold.
    """

    def __init__(self, source, staged, n_val, shard_tokens, drop_duplicates):
        self.source, self.staged, self.n_val = source, staged, n_val
        self.drop_duplicates = drop_duplicates
        state = staged.state if staged.state and "cursor" in staged.state else {}
        self.cursor = state.get("cursor", [0, 0, 0])
        self.expected, self.complete = state.get("fingerprint"), state.get("complete", False)
        self.content = state.get("content", {"val": "", "train": ""})
        self.duplicates = state.get("duplicates", 0)
        seen = (staged.folder / DIGESTS).read_bytes() if self.expected else b""
        self.fingerprint = ""
        self.val_digests = {seen[i:i + DIGEST_BYTES] for i in range(0, len(seen), DIGEST_BYTES)}
        self.stored = len(self.val_digests)
        files = state.get("files", {})
        self.writers = {split: ShardWriter(staged.folder, split, shard_tokens, split == "val",
                                           files=files.get(split), filled=self._save)
                        for split in ("val", "train")}

    def run(self, encoder, model, workers):
        """Write all shards; `model` is the encoder's, serialized. Raises UserError."""
        chunks = self.source.chunks(self.n_val)
        try:
            rest = self._skip(chunks)
            workers = min(workers, self._most_workers())
            with contextlib.closing(Progress("encoding", self.source.size,
                                             self.source.position)) as progress, \
                    contextlib.closing(encode_all(rest, encoder, model, workers)) as results:
                for number, (chunk, encoded) in enumerate(results, self.cursor[0]):
                    self._write(number, chunk, encoded)
                    progress.at(chunk.position)
            for writer in self.writers.values():
                writer.close()
        except DocumentProblem as e:
            raise self.source.explain(e, chunks) from None
        finally:
            for writer in self.writers.values():
                writer.abandon()
        self._save(None, complete=True)

    def _most_workers(self):
        """One for every chunk that is left: a process takes longer to start than a chunk."""
        if self.source.size is None:
            return sys.maxsize
        return max(1, -(-(self.source.size - self.source.position) // sources.CHUNK_BYTES))

    def _skip(self, chunks):
        """Read what the last run has done; the chunks from there on."""
        if not self.expected:
            return chunks
        with contextlib.closing(Progress("skipping what is done", self.source.size)) as progress:
            for number, chunk in enumerate(chunks):
                progress.at(chunk.position)
                if number == self.cursor[0]:
                    break
            else:
                chunk = None
        if chunk is None or chunk.fingerprint != self.expected:
            self._refuse_changed()
        return itertools.chain([chunk], chunks)

    def _refuse_changed(self):
        raise UserError(f"{self.source.name}: not what {self.staged.folder} was begun with; give "
                        "the same input, or --restart to discard that work")

    def _write(self, number, chunk, encoded):
        split, first, skip = "val" if chunk.held_out else "train", 0, 0
        if self.expected:  # the chunk that the last run stopped in
            first, skip, self.expected = self.cursor[1], self.cursor[2], None
        elif self.complete and encoded.lengths:
            self._refuse_changed()
        if split == "train":
            self.writers["val"].close()
        self.fingerprint = chunk.fingerprint
        for i, (tokens, counts, size, digest) in enumerate(encoded.documents()):
            if i < first:
                continue
            self.cursor = [number, i, len(tokens)]
            if not (skip and i == first):
                if self._is_left_out(split, digest):
                    continue
                self.content[split] = text_digest(bytes.fromhex(self.content[split])
                                                  + digest).hex()
            self.writers[split].add(tokens, counts, size, skip if i == first else 0)

    def _is_left_out(self, split, digest):
        if split == "val":
            self.val_digests.add(digest)
            return False
        self.duplicates += digest in self.val_digests
        return self.drop_duplicates and digest in self.val_digests

    def _save(self, tokens, complete=False):
        """Write the journal; `tokens` of the document at the cursor are in whole shards."""
        if tokens is not None:
            self.cursor[2] = tokens
        if self.stored != len(self.val_digests):
            write_whole(self.staged.folder / DIGESTS, b"".join(sorted(self.val_digests)))
            self.stored = len(self.val_digests)
        self.staged.save({
            "tokenizer": (self.staged.state or {}).get("tokenizer"),
            "cursor": self.cursor, "fingerprint": self.fingerprint, "complete": complete,
            "content": self.content, "duplicates": self.duplicates,
            "files": {split: writer.files for split, writer in self.writers.items()}})


def make_manifest(source, writing, tokenizer, requested):
    """The manifest (a dict); `tokenizer` is its entry, `requested` the --val-docs asked for."""
    files, totals = {}, {}
    for split, writer in sorted(writing.writers.items()):
        own = {k: v for k, v in writer.files.items() if "_bytes_" not in k}
        totals[split] = {"files": len(own)} | {
            key: sum(f[key] for f in own.values())
            for key in ("tokens", "documents", "original_bytes")}
        files |= writer.files
    val, n_val, n_train = totals["val"], totals["val"]["documents"], totals["train"]["documents"]
    val["counted_bytes"] = sum(f.get("counted_bytes", 0) for f in files.values())
    exact = val["counted_bytes"] == val["original_bytes"]
    assert exact or not tokenizer["keeps_every_byte"], "bytes went missing"
    dropped = writing.duplicates if writing.drop_duplicates else 0
    inputs = [{"file": Path(path).name, "bytes": size, "sha256": digest} for path, size, digest in
              zip(source.paths, source.sizes or [source.position], source.digests, strict=True)]
    return {
        "format": "caseops shards", "format_version": MANIFEST_FORMAT,
        "transform": caps.TRANSFORM_NAME,
        "source": {"files": inputs, "bytes": source.position,
                   "documents": n_val + n_train + dropped},
        "split": {"rule": f"in the order of the source, the first {n_val} documents are validation "
                          "and all others training; nothing is reordered, and "
                          + ("training documents with the text of a validation document are left "
                             "out" if writing.drop_duplicates else "nothing is left out"),
                  "val_docs_requested": requested, "val_documents": n_val,
                  "train_documents": n_train, "overlap": False,
                  "val_first_document": 0, "val_end_document": n_val,
                  "train_first_document": n_val, "train_end_document": n_val + n_train + dropped,
                  "train_documents_equal_to_validation": writing.duplicates - dropped,
                  "train_documents_dropped": dropped,
                  "content": writing.content},
        "tokenizer": tokenizer,
        "shard_tokens": writing.writers["train"].shard_tokens,
        "totals": totals,
        "counted_bytes_equal_original_bytes": exact,
        "original_bytes_of_a_file": "raw UTF-8 bytes of the documents that begin in it",
        "files": dict(sorted(files.items())),
        "versions": versions()}


def versions():
    """What the bytes of a set may depend on."""
    return {"program": PROGRAM_VERSION, "python": platform.python_version(),
            "sentencepiece": sentencepiece.__version__, "numpy": np.__version__}


def read_tokenizer(path, fuse=False):
    """(model bytes, Encoder, file name) of the SentencePiece model at `path`, where asked for with
    fused markers. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a directory; give --sp the SentencePiece model in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --sp a SentencePiece model, or use "
                        "--train-tokenizer")
    model = path.read_bytes()
    encoder = Encoder(model, str(path), threads=1)
    if path.suffix != ".model":
        raise UserError(f"{path}: the name of a tokenizer must end in .model; rename it")
    if fuse:
        model = fuse_markers(model, str(path))
        return model, Encoder(model, str(path), threads=1), f"{path.stem}_fused.model"
    return model, encoder, path.name


def trained_tokenizer(source, staged, n_val, vocab_size, max_bytes, fuse):
    """(model bytes, file name): the one that an earlier run left in `staged`, else a new one."""
    name = f"fineweb_{vocab_size}_bpe_{caps.TRANSFORM_NAME}_reserved{'_fused' * fuse}.model"
    path = staged.folder / name
    if not staged.state:
        chunks = source.chunks()
        documents = (document for chunk in chunks for document in chunk.parse())
        try:
            with contextlib.closing(Progress("reading for the tokenizer", source.size)) as progress:
                model = train_tokenizer(itertools.islice(documents, n_val, None), vocab_size,
                                        max_bytes, lambda: progress.at(source.position))
        except DocumentProblem as e:
            raise source.explain(e, chunks) from None
        if fuse:
            model = fuse_markers(model)
        write_whole(path, model)
        staged.save({"tokenizer": name, "files": {}})
        say(f"tokenizer: {vocab_size} pieces, trained on the training documents")
    return path.read_bytes(), name


def prepare(docs, out, *, sp=None, vocab_size=None, val_docs=50_000, shard_tokens=100_000_000,
            tokenizer_bytes=300_000_000, text_column="text", workers=1, drop_duplicates=False,
            fuse=False, restart=False, overwrite=False, name="own"):
    """Prepare the data set of `docs`, a path or several, under `out`; the manifest (a dict).

    Give `sp`, a tokenizer's path, or `vocab_size` to train one on the training documents; `fuse`
    gives it fused markers; `name` begins the set's name. With several `workers` the caller's module
    must be importable without side effects. Raises UserError or OSError, and then leaves what was
    there before untouched.
    """
    source = Source(docs, text_column)
    if not source.rereadable and sp is None:
        raise UserError("--train-tokenizer reads the input twice, standard input comes once; give "
                        "--docs a file")
    identity = {"--val-docs": val_docs, "--shard-tokens": shard_tokens, **versions(),
                "--text-column": text_column, "--drop-val-duplicates": drop_duplicates,
                **({"--fuse-markers": True} if fuse else {})}
    if sp is not None:
        model, encoder, file = read_tokenizer(sp, fuse)
        identity["tokenizer"] = hashlib.sha256(model).hexdigest()
        vocab_size = encoder.size
    else:  # another input may give another tokenizer, though it begins with the same documents
        identity |= {"--tokenizer-bytes": tokenizer_bytes, "input": [
            [size, Path(p).stat().st_mtime_ns] for p, size in
            zip(source.paths, source.sizes, strict=True)]}
    n_val, note = choose_val_docs(source, val_docs)
    if note:
        say(note)
    identity |= {"validation documents": n_val}
    with locked(out):
        folder = Path(out) / "datasets" / f"{name}_sp{vocab_size}_{caps.TRANSFORM_NAME}_reserved"
        tokenizers = Path(out) / "tokenizers"
        if recover(folder, tokenizers) == identity:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            say("the last run was cut short while it put its files into place; done")
            report(manifest, folder)
            return manifest
        if sp is not None:
            check_target(folder, (tokenizers / file, identity["tokenizer"]), overwrite)
        staged = Staging(folder, identity, restart)
        with staged.kept():
            if staged.note:
                say(staged.note)
            if sp is None:
                model, file = trained_tokenizer(source, staged, n_val, vocab_size, tokenizer_bytes,
                                                fuse)
                encoder = Encoder(model, "the tokenizer just trained", threads=1)
                assert encoder.exact and encoder.size == vocab_size
            entry = {"file": file, "sha256": hashlib.sha256(model).hexdigest(),
                     "bytes": len(model), "vocab_size": encoder.size, "trained_here": sp is None,
                     "keeps_every_byte": encoder.exact}
            check_target(folder, (tokenizers / file, entry["sha256"]), overwrite)
            manifest = fill(source, staged, encoder, model, entry, n_val, val_docs, shard_tokens,
                            drop_duplicates, workers)
            install(staged.folder, folder, tokenizers)
    report(manifest, folder)
    return manifest


def fill(source, staged, encoder, model, tokenizer, n_val, requested, shard_tokens, drop_duplicates,
         workers):
    """Put the whole set into `staged`: shards, tokenizer and, last, the manifest, returned."""
    writing = Writing(source, staged, n_val, shard_tokens, drop_duplicates)
    writing.run(encoder, model, workers)
    manifest = make_manifest(source, writing, tokenizer, requested)
    if not manifest["split"]["train_documents"]:
        staged.discard()
        raise UserError(f"{source.name}: {manifest['source']['documents']:,} documents, none of "
                        "them left to train on; give more, or a smaller --val-docs")
    write_whole(staged.folder / tokenizer["file"], model)
    write_whole(staged.folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def report(manifest, folder):
    """Print what was made, a line a split."""
    for split, t in manifest["totals"].items():
        say(f"{split}: {t['documents']:,} documents, {t['original_bytes']:,} bytes, "
            f"{t['tokens']:,} tokens in {t['files']} shards")
    val, split = manifest["totals"]["val"], manifest["split"]
    lost = val["original_bytes"] - val["counted_bytes"]
    say("byte sidecar: exact" if not lost else f"byte sidecar: {lost:,} bytes of white space at "
        "the ends of documents are in no token of this tokenizer")
    if same := split["train_documents_equal_to_validation"]:
        say(f"duplicates: {same:,} training documents have the text of a validation document; "
            "--drop-val-duplicates leaves them out")
    elif gone := split["train_documents_dropped"]:
        say(f"duplicates: {gone:,} training documents with the text of a validation document were "
            "left out")
    say(f"written: {folder}")


# ---- command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the options")


def make_parser():
    """The command line's options."""
    p = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False)
    p.add_argument("--docs", nargs="+", metavar="FILE",
                   help="input, read in this order; a folder stands for its files, - for standard "
                        "input (default with --demo: DIR/docs.jsonl)")
    p.add_argument("--text-column", default="text", metavar="NAME",
                   help="the column or key that holds the text (default %(default)s)")
    p.add_argument("--name", default="own", metavar="NAME",
                   help="how the data set's name begins (default %(default)s; the published one: "
                        "fineweb10B)")
    p.add_argument("--out", help="output root; the file to write for --export")
    p.add_argument("--sp", help="SentencePiece model")
    p.add_argument("--val-docs", type=int, default=50_000, metavar="N",
                   help="the first N documents are validation (default %(default)s)")
    p.add_argument("--drop-val-duplicates", action="store_true",
                   help="leave out training documents with the text of a validation document")
    p.add_argument("--train-tokenizer", action="store_true",
                   help="instead of --sp: train a BPE on the training documents")
    p.add_argument("--vocab-size", type=int, metavar="N", help="its size, at most 65536")
    p.add_argument("--tokenizer-bytes", type=int, default=300_000_000, metavar="N",
                   help="train it on the first N bytes of training text (default %(default)s)")
    p.add_argument("--fuse-markers", action="store_true",
                   help="one id for the space before a capital word and its case operator: about "
                        "8%% fewer tokens; the tokenizer is written as NAME_fused.model")
    p.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                   help="tokens a shard (default %(default)s)")
    p.add_argument("-j", "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                   help="processes that encode (default: the cores there are, %(default)s)")
    p.add_argument("--restart", action="store_true",
                   help="discard the unfinished work of an earlier run")
    p.add_argument("--overwrite", action="store_true",
                   help="replace a data set of another tokenizer")
    p.add_argument("--demo", metavar="DIR",
                   help="build DIR/docs.jsonl from Python's own documentation")
    p.add_argument("--download", choices=("caseops", "docs"),
                   help="fetch the published CaseOps set, or the challenge's documents (48 GB)")
    p.add_argument("--train-shards", type=int, metavar="N",
                   help="with --download caseops: only the first N training shards")
    p.add_argument("--audit", metavar="DIR", help="check a data set, byte by byte")
    p.add_argument("--val", metavar="PATH", help="with --audit: take validation from here instead")
    p.add_argument("--export", metavar="DIR", help="turn a data set's shards into text again")
    return p


def parse_arguments(argv):
    """Command line -> namespace. Raises UserError for what does not fit together."""
    args = make_parser().parse_args(argv)
    tools = [name for name in ("download", "audit", "export") if getattr(args, name)]
    data = args.docs or args.demo or args.train_tokenizer
    problems = [
        (args.val_docs < 1, "--val-docs must be at least 1"),
        (not 1 <= args.shard_tokens < 1 << 31, "--shard-tokens must be 1 to 2147483647"),
        (args.tokenizer_bytes < 1, "--tokenizer-bytes must be at least 1"),
        (not re.fullmatch(r"\w[\w.-]*", args.name),
         "--name must be letters, digits, '_', '-' and '.'"),
        (args.workers < 1, "--workers must be at least 1"),
        (len(tools) > 1, f"{' and '.join('--' + t for t in tools)}: give one of them"),
        (tools and data, f"--{''.join(tools[:1])} goes without --docs, --demo and "
                         "--train-tokenizer"),
        (args.train_shards is not None and args.download != "caseops",
         "--train-shards is for --download caseops"),
        (args.train_shards is not None and args.train_shards < 0,
         "--train-shards must be at least 0"),
        (args.val is not None and not args.audit, "--val is for --audit"),
        (args.download and not args.out, "no output; give --out DIR"),
        (not (args.docs or args.demo or tools), "no input; give --docs FILE or --demo DIR"),
        (not (args.out or tools) and (args.docs or args.sp or args.train_tokenizer),
         "no output; give --out DIR"),
        (args.out and not (args.sp or args.train_tokenizer or tools),
         "no tokenizer; give --sp FILE or --train-tokenizer --vocab-size N"),
        (args.sp and args.train_tokenizer, "--sp and --train-tokenizer: give one of them"),
        (args.train_tokenizer and args.vocab_size is None,
         "--train-tokenizer needs --vocab-size N"),
        (args.fuse_markers and (tools or not (args.sp or args.train_tokenizer)),
         "--fuse-markers is for --sp or --train-tokenizer, where a data set is made"),
        (args.vocab_size is not None and not args.train_tokenizer,
         "--vocab-size is for --train-tokenizer"),
        (args.vocab_size is not None and not 1 <= args.vocab_size <= COUNT_LIMIT,
         f"--vocab-size must be 1 to {COUNT_LIMIT} (ids are 16 bits)"),
    ]
    for wrong, message in problems:
        if wrong:
            raise UserError(message)
    return args


def audit(folder, tokenizer, val):
    """Check a data set and tell what is wrong with it; the exit code."""
    bars = []

    def watch(done, total):
        if not bars:
            bars.append(Progress("auditing", total))
        bars[0].at(done)
    try:
        return importlib.import_module("caseops.audit").audit(
            folder, tokenizer=tokenizer, val=val, out=say, progress=watch).exit_code
    finally:
        for bar in bars:
            bar.close()


def run(args):
    """Do what the arguments (a namespace) ask for; the exit code."""
    if args.download:
        importlib.import_module("caseops.hub").download(args.download, args.out, args.train_shards)
        return 0
    if args.audit:
        return audit(args.audit, args.sp, args.val)
    if args.export:
        to_stdout = args.out in (None, "-")  # then the report goes to standard error
        importlib.import_module("caseops.export").export(
            args.export, args.out, tokenizer=args.sp, out=None if to_stdout else say)
        return 0
    docs = build_demo(args.demo) if args.demo else None
    if args.out:
        prepare(args.docs or docs, args.out, sp=args.sp, vocab_size=args.vocab_size,
                val_docs=args.val_docs, shard_tokens=args.shard_tokens,
                tokenizer_bytes=args.tokenizer_bytes, text_column=args.text_column,
                workers=args.workers, drop_duplicates=args.drop_val_duplicates,
                fuse=args.fuse_markers, restart=args.restart, overwrite=args.overwrite,
                name=args.name)
    return 0


def main(argv=None):
    """Command line: returns the exit code: 0, 2 (bad input), 130 (interrupted) or 141 (closed
    pipe)."""
    try:
        return run(parse_arguments(argv))
    except UserError as e:
        code, message, problem = 2, f"error: {e}", e
    except BrokenPipeError:  # the reader of --export has enough
        mute()
        return 128 + signal.SIGPIPE
    except OSError as e:
        hint = "free some space" if e.errno == errno.ENOSPC else "check the name and the rights"
        message = f"error: {e.filename or 'file'}: {e.strerror or e}; {hint} and run again"
        code, problem = 2, e
    except KeyboardInterrupt as e:
        code, message, problem = 130, "interrupted; the old files are as they were", e
    finally:
        try:
            if sys.stdout is not None:  # not even open
                sys.stdout.flush()
        except OSError:
            mute()
    print("; ".join([message, *getattr(problem, "__notes__", [])]), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
