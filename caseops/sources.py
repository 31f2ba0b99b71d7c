"""Where documents come from: JSON lines (plain, .gz, .bz2, .zst, .xz, standard input) and Parquet.

A file is what its first bytes say, whatever its name. It is read once, in order, in chunks of
about 1 MB that hold whole documents; what is in a chunk is looked at by whoever encodes it.
"""

import bz2
import codecs
import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caseops import UserError

CHUNK_BYTES = 1 << 20  # a chunk is at most this, one block and the rest of a document
BLOCK_BYTES = 1 << 18
PACKED_BYTES = 1 << 14  # given to a decompressor at a time: 1 MB of it could become gigabytes
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.zst", ".jsonl.xz", ".parquet")
# Whole numbers are not read: their value matters nowhere, and Python refuses 4,301 digits.
JSON = json.JSONDecoder(parse_int=len)


class DocumentProblem(UserError):
    """A document that cannot be one. `path` is its file."""

    def __init__(self, message, path=None):
        super().__init__(message)
        self.path = path


@dataclasses.dataclass
class Document:
    """One document: its text, size in UTF-8 bytes, and line (or row) in its file (from 1)."""

    text: str
    size: int
    line: int


@dataclasses.dataclass
class Chunk:
    """Consecutive documents of one file as they were read.

    `first` is the number of the first line or row. `held_out`: they are validation documents.
    `position` (bytes) and `fingerprint` tell how much of the input had been read, and what.
    """

    path: str
    first: int
    data: bytes | list
    held_out: bool = False
    position: int = 0
    fingerprint: str = ""
    column: str = "text"

    def reject(self, number, reason):
        """Raise DocumentProblem for the document at line or row `number`."""
        raise DocumentProblem(f"{self.path}:{self.unit}{number}: {reason}; mend or remove this "
                              f"{self.noun}", self.path) from None

    def _document(self, value, number):
        if not isinstance(value, str):
            self.reject(number, f'"{self.column}" must be a string, not {type(value).__name__}')
        try:
            return Document(value, len(value.encode()), number)
        except UnicodeEncodeError as e:
            self.reject(number, f"a lone surrogate (U+{ord(value[e.start]):04X}, "
                                f"character {e.start} of the text)")


class Lines(Chunk):
    """JSON lines: a string, or an object with a string `column`, a line."""

    unit, noun = "", "line"

    def _lines(self):
        start = 0
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            start += len(line) + 1
            bare = line.removeprefix(codecs.BOM_UTF8).strip()  # also where files were joined
            if bare:
                yield number, bare, start

    def count(self):
        """How many documents there are; the lines are not looked into."""
        return sum(1 for _ in self._lines())

    def cut(self, n):
        """Two chunks: the first `n` documents, and the rest."""
        for i, (number, _, end) in enumerate(self._lines(), 1):
            if i == n:
                return (dataclasses.replace(self, data=self.data[:end]),
                        dataclasses.replace(self, data=self.data[end:], first=number + 1))
        raise IndexError(n)

    def parse(self):
        """Iterate over the Documents. Raises DocumentProblem."""
        for number, line, _ in self._lines():
            yield self._parse(number, line)

    def _parse(self, number, line):
        try:
            value = JSON.decode(line.decode())
        except UnicodeDecodeError as e:
            self.reject(number, f"not UTF-8 ({e.reason} at byte {e.start} of the line)")
        except json.JSONDecodeError as e:
            self.reject(number, f"not JSON ({e.msg.removesuffix(' at')} at column {e.colno})")
        except RecursionError as e:  # a nesting beyond Python's limits
            self.reject(number, f"not JSON that can be read ({e})")
        if isinstance(value, dict):
            if self.column not in value:
                self.reject(number, f'the object has no "{self.column}"{self._advice(value)}')
            value = value[self.column]
        elif not isinstance(value, str):
            self.reject(number, f'{type(value).__name__}, where an object with "{self.column}" or '
                                "a string was expected")
        return self._document(value, number)

    def _advice(self, value):
        """What an object without the key that holds the text has instead."""
        texts = [key for key, x in value.items() if isinstance(x, str)]
        nested = [key for key, x in value.items() if isinstance(x, dict) and self.column in x]
        if nested:
            return f', only inside of "{nested[0]}", which is not read: write it one level higher'
        named = ", ".join(repr(key[:40]) for key in texts[:8]) + ", ..." * (len(texts) > 8)
        return f", but {named}: give --text-column one of these" if texts else ""


class Rows(Chunk):
    """Rows of a Parquet file: `data` is a list of the texts as UTF-8, None where there is none."""

    unit, noun = "row ", "row"

    def count(self):
        """How many documents there are."""
        return len(self.data)

    def cut(self, n):
        """Two chunks: the first `n` documents, and the rest."""
        return (dataclasses.replace(self, data=self.data[:n]),
                dataclasses.replace(self, data=self.data[n:], first=self.first + n))

    def parse(self):
        """Iterate over the Documents. Raises DocumentProblem."""
        for number, data in enumerate(self.data, self.first):
            try:
                value = data if data is None else data.decode()
            except UnicodeDecodeError as e:
                self.reject(number, f"not UTF-8 ({e.reason} at byte {e.start} of the text)")
            yield self._document(value, number)


def batches(items, limit, size_of):
    """Lists of consecutive items of about `limit` together, at least one each."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def require(module):
    """Import an optional package. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs {module.split('.')[0]}; pip install -r "
                        "requirements-data.txt") from None


# ---- file formats --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Packing:
    """A compression: the file's first bytes, a fresh decompressor, and its error."""

    name: str
    magic: bytes | tuple[bytes, ...]
    machine: Callable[[], Any]
    error: Callable[[], type]


# A frame, or one to be skipped, with which pzstd begins.
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd", *(bytes([x, 0x2a, 0x4d, 0x18]) for x in range(0x50, 0x60))
PACKINGS = (
    Packing("gzip", b"\x1f\x8b", lambda: zlib.decompressobj(31), lambda: zlib.error),
    Packing("bzip2", b"BZh", bz2.BZ2Decompressor, lambda: OSError),
    Packing("zstd", ZSTD_MAGIC, lambda: require("zstandard").ZstdDecompressor(
        max_window_size=1 << 31).decompressobj(), lambda: require("zstandard").ZstdError),
    Packing("xz", b"\xfd7zXZ\0", lzma.LZMADecompressor, lambda: lzma.LZMAError))
PARQUET = b"PAR1"
OTHERS = {b"PK\3\4": "a zip archive", b"ARROW1": "an Arrow file", b"7z\xbc\xaf": "a 7z archive",
          b"%PDF": "a PDF", b"<": "HTML or XML"}


def packing_of(head):
    """The Packing of a file that begins with `head`, or None."""
    return next((p for p in PACKINGS if head.startswith(p.magic)), None)


def refuse_other_format(name, head):
    """Raise UserError where the text that begins with the bytes `head` is no JSON lines at all:
    then no line of it is to blame."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    line, _, rest = start.partition(b"\n")
    begins = start[:1]
    known = next((kind for magic, kind in OTHERS.items() if start.startswith(magic)), None) \
        or ("a tar archive" if head[257:262] == b"ustar" else None)
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    rewrite = f"write one document a line, as with: jq -c {{}} {name} > docs.jsonl"
    for fault, holds, remedy in (
            ("a Git LFS pointer, not the file itself",
             start.startswith(b"version https://git-lfs"), "fetch it with git lfs pull"),
            ("UTF-16 or UTF-32, not UTF-8", wide or head[:2].count(0) == 1,
             f"convert it, as with: iconv -f UTF-16 -t UTF-8 {name} > docs.jsonl"),
            (f"{known}, not JSON lines or Parquet", known, "unpack or convert it"),
            ("lines that end in CR alone", re.match(rb"[^\n]*[^\s]\r\s*[^\s][^\n]*\Z", start),
             f"convert them, as with: tr '\\r' '\\n' < {name} > docs.jsonl"),
            ("one JSON array, not JSON lines",
             begins == b"[" and not (rest.strip() and is_json(line)), rewrite.format("'.[]'")),
            ("JSON over several lines, not JSON lines", line.strip() == b"{", rewrite.format(".")),
            ("CSV, TSV or plain text, not JSON lines",
             (begins and begins not in b'{["' or re.match(rb'"[^"\\\n]*"\s*[,\t;]', line))
             and not is_json(line), "convert it to JSON lines or Parquet")):
        if holds:
            raise UserError(f"{name}: {fault}; {remedy}")


def is_json(line):
    """Whether the bytes are one JSON value."""
    try:
        JSON.decode(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def find_files(paths):
    """The files of `paths`, in order; a directory stands for the ones in it that have one of
    SUFFIXES, sorted by name. "-" is standard input. Raises UserError."""
    found = []
    for path in map(str, paths):
        if path == "-":
            if len(paths) > 1:
                raise UserError("--docs -: standard input cannot be mixed with files; give one")
            if sys.stdin is None:
                raise UserError("--docs -: standard input is closed; pipe the documents in")
            found.append(path)
        elif not path:
            raise UserError("--docs '': an empty name; give a file")
        elif Path(path).is_dir():
            inside = sorted(str(p) for p in Path(path).iterdir()
                            if p.name.endswith(SUFFIXES) and p.is_file())
            if not inside:
                raise UserError(f"{path}: a directory without files that end in "
                                f"{', '.join(SUFFIXES)}; give --docs a file")
            found += inside
        elif Path(path).is_file():
            found.append(path)
        elif Path(path).exists():
            raise UserError(f"{path}: not a regular file; pipe it in with --docs -")
        else:
            dangling = " (a dangling link)" if Path(path).is_symlink() else ""
            raise UserError(f"{path}: no such file{dangling}; give --docs a JSON-lines file, or "
                            "build one with --demo DIR")
    return found


class Source:
    """The documents of one or more files, in order, each time it is iterated.

    `size` is the number of bytes of all files, None for standard input; `position` how many have
    been read. After a whole pass `digests` holds the sha256 of every file as it lies on the disk.
    Raises UserError for a file that is damaged, and for a document that cannot be one.
    """

    def __init__(self, paths, column="text"):
        self.paths = find_files([paths] if isinstance(paths, str | Path) else paths)
        self.column, self.rereadable = column, self.paths != ["-"]
        self.name = "standard input" if not self.rereadable else self.paths[0] \
            if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"
        self.sizes = [Path(p).stat().st_size for p in self.paths] if self.rereadable else []
        self.size = sum(self.sizes) if self.rereadable else None
        self._packed, self._damage = set(), {}
        self._start()
        for path in self.paths if self.rereadable else []:  # a missing package shows at once
            with open(path, "rb") as f:
                head = f.read(8)
            if packing := packing_of(head):
                packing.machine()
            elif head.startswith(PARQUET):
                self._open_parquet(path)

    def _start(self):
        self.position, self.digests, self._digest = 0, [], hashlib.sha256()

    def chunks(self, held_out=0):
        """Iterate over the Chunks; one of them ends with document number `held_out`."""
        self._start()
        return self._chunks(held_out)

    def _chunks(self, left):
        for path in self.paths:
            for chunk in self._file_chunks(path):
                parts = [chunk]
                if left:
                    found = chunk.count()
                    parts = chunk.cut(left) if found > left else parts
                    parts[0].held_out = True
                    left -= min(found, left)
                for part in parts:
                    part.position, part.fingerprint = self.position, self._fingerprint()
                    part.column = self.column
                    yield part
            self.digests.append(self._digest.hexdigest())
            self._digest = hashlib.sha256()

    def __iter__(self):
        return (document for chunk in self.chunks() for document in chunk.parse())

    def count(self, at_most):
        """How many documents there are, up to `at_most`; they are not looked into."""
        found = 0
        for chunk in self.chunks():
            found += chunk.count()
            if found >= at_most:
                return at_most
        return found

    def explain(self, problem, chunks):
        """The error to show for a DocumentProblem: nonsense in a compressed file can come of
        damage that only its checksum tells, so read `chunks`, an iterator, to the file's end."""
        if problem.path in self._packed:
            with contextlib.suppress(UserError):
                for chunk in chunks:
                    if chunk.path != problem.path:
                        break
        return self._damage.get(problem.path, problem)

    def _fingerprint(self):
        return hashlib.sha256("".join([*self.digests, self._digest.hexdigest()]).encode()) \
            .hexdigest()

    def _file_chunks(self, path):
        name = path if self.rereadable else "standard input"
        with open(path if self.rereadable else sys.stdin.fileno(), "rb",
                  closefd=self.rereadable) as f:
            blocks = self._blocks(f)
            first = next(blocks, b"")
            if first.startswith(PARQUET):
                if not self.rereadable:
                    raise UserError("standard input: Parquet cannot be read from a pipe; give "
                                    "--docs the file")
                yield from self._rows(path)
                return
            stream = itertools.chain([first], blocks)
            if packing := packing_of(first):
                self._packed.add(name)
                stream = self._unpacked(name, stream, packing)
            head = next(stream, b"")
            while len(head) < len(codecs.BOM_UTF8) + 262 and (more := next(stream, b"")):
                head += more
            refuse_other_format(name, head)
            yield from line_chunks(name, itertools.chain([head], stream))

    def _blocks(self, f):
        while block := f.read(BLOCK_BYTES):
            self.position += len(block)
            self._digest.update(block)
            yield block

    def _unpacked(self, name, blocks, packing):
        machine, read = None, 0
        for block in blocks:
            for start in range(0, len(block), PACKED_BYTES):
                data = block[start:start + PACKED_BYTES]
                size = len(data)
                # After one another may follow, or zeros that fill up a tape's block.
                while data := data if machine else data.lstrip(b"\0"):
                    machine = machine or packing.machine()
                    try:
                        out = machine.decompress(data)
                    except packing.error() as e:
                        self._fail(name, f"damaged {packing.name} data in the {size:,} bytes after "
                                         f"byte {read:,} ({e})")
                    data = b""
                    if machine.eof:
                        data, machine = machine.unused_data, None
                    for i in range(0, len(out), BLOCK_BYTES):  # bzip2 gives 900 kB at once
                        yield out[i:i + BLOCK_BYTES]
                read += size
        if machine is not None:
            self._fail(name, f"the {packing.name} data break off at byte {read:,}, the file's end")

    def _fail(self, name, reason):
        self._damage[name] = UserError(f"{name}: {reason}; fetch the file again")
        raise self._damage[name] from None

    def _open_parquet(self, path):
        arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        try:
            file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES,
                                       page_checksum_verification=True)
        except (arrow.ArrowException, OSError) as e:
            raise UserError(f"{path}: damaged Parquet file, its footer cannot be read "
                            f"({first_line(e)}); fetch the file again") from None
        schema = file.schema_arrow
        if (n := schema.names.count(self.column)) != 1:
            raise UserError(f"{path}: {n or 'no'} column{'s'[:n]} {self.column!r}; give "
                            f"--text-column one of {', '.join(schema.names)}")
        kind = schema.field(self.column).type
        if isinstance(kind, arrow.DictionaryType):  # each text stored once; `_rows` gives it back
            kind = kind.value_type
        if kind not in (arrow.string(), arrow.large_string(), arrow.string_view()):
            raise UserError(f"{path}: column {self.column!r} holds {kind}, not strings; give "
                            "--text-column another one")
        return file

    def _rows(self, path):
        arrow = require("pyarrow")
        file = self._open_parquet(path)
        with open(path, "rb") as f:  # rows are not read in the order of the bytes
            self._digest = hashlib.file_digest(f, "sha256")
        begin, size, row = sum(self.sizes[:len(self.digests)]), Path(path).stat().st_size, 1
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(256, [group], [self.column], use_threads=False):
                    column = batch.column(0)
                    if isinstance(column.type, arrow.DictionaryType):
                        column = column.dictionary_decode()
                    texts = column.cast(arrow.large_binary()).to_pylist()
                    for part in batches(texts, CHUNK_BYTES, lambda x: len(x or b"")):
                        yield Rows(path, row, part)
                        row += len(part)
                    self.position = begin + size * (row - 1) // max(file.metadata.num_rows, 1)
            except (arrow.ArrowException, OSError) as e:
                raise UserError(f"{path}: damaged Parquet data in row group {group}, after row "
                                f"{row - 1} ({first_line(e)}); fetch the file again") from None
        self.position = begin + size


def first_line(error):
    """An error's own words, without the lines that follow the first."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def line_chunks(path, blocks):
    """Cut an iterator of bytes into Lines chunks of whole lines."""
    number, parts, size, complete = 1, [], 0, False
    for block in blocks:
        parts.append(block)
        size += len(block)
        complete = complete or b"\n" in block
        if complete and size >= CHUNK_BYTES:  # a line of gigabytes is not joined at every block
            data = b"".join(parts)
            end = data.rfind(b"\n") + 1
            yield Lines(path, number, data[:end])
            number += data.count(b"\n", 0, end)
            parts, size, complete = [data[end:]], len(data) - end, False
    if data := b"".join(parts):
        yield Lines(path, number, data)


def choose_val_docs(source, wanted):
    """(How many documents to validate on, what to tell): `wanted`, or a tenth of an input that
    has no more. Standard input is read only once, so there it is `wanted`. Raises UserError."""
    if not source.rereadable:
        return wanted, None
    found = source.count(wanted + 1)
    if found > wanted:
        return wanted, None
    if found < 2:
        raise UserError(f"{source.name}: {found} documents"
                        + (" (the file is empty)" if not source.size else "")
                        + "; at least 2 are needed, one to validate on and one to train on")
    capped = max(1, found // 10)
    return capped, (f"{source.name}: only {found:,} documents, so --val-docs {wanted:,} is capped "
                    f"at {capped:,} (one in ten); {found - capped:,} are left for training")
