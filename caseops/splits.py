"""Reading shard directories, anybody's: which shards stand there, their tokens, their documents."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from caseops import BOS, UserError
from caseops.shards import HEADER_INTS, SHARD_MAGIC, SHARD_VERSION

HEADER_BYTES = 4 * HEADER_INTS
BLOCK_TOKENS = 1 << 18  # half a MiB: what is done to a block finds it in the processor's cache
_NAME = re.compile(r"(?:.+_)?(train|val)(_bytes)?_(\d+)\.bin")


@dataclasses.dataclass
class Shard:
    """One file: its number, how many tokens can be read from it, and what is wrong with it."""

    path: Path
    index: int
    tokens: int
    problem: str = ""


@dataclasses.dataclass
class Block:
    """Whole documents that stand one after another: `tokens` (uint16), of which tokens[0] stands at
    `offset` of the split, and the spans of each document in them without its BOS."""

    offset: int
    tokens: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def shard_directory(folder):
    """The one directory at or below `folder` (at most four levels) that holds shards.

    Raises UserError where there is none, or more than one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        wrong = "not a directory" if folder.exists() else "no such directory"
        raise UserError(f"{folder}: {wrong}; give the directory that holds the shards")
    level = [folder]
    for _ in range(5):
        found = [d for d in level if any(_NAME.fullmatch(n) for n in os.listdir(d))]
        if len(found) > 1:
            raise UserError(f"{folder}: several shard directories ({', '.join(map(str, found))}); "
                            "give one of them")
        if found:
            return found[0]
        level = sorted(e for d in level for e in d.iterdir()
                       if e.is_dir() and not e.name.endswith(".partial"))
    raise UserError(f"{folder}: no shards (*_train_*.bin, *_val_*.bin) here; give the directory "
                    "that holds them, or prepare one with --docs")


def find_shards(folder):
    """{"train" | "val" | "val_bytes" | "train_bytes": [Shard]}, each in the order of the names,
    which is the order in which the trainer reads them."""
    found = {"train": [], "val": [], "val_bytes": [], "train_bytes": []}
    for path in sorted(Path(folder).iterdir()):
        if match := _NAME.fullmatch(path.name):
            tokens, problem = read_header(path)
            found[match[1] + (match[2] or "")].append(
                Shard(path, int(match[3]), tokens, problem))
    return found


def read_header(path):
    """(tokens that can be read, problem or ""). A file of another format has no tokens."""
    if not path.is_file():
        return 0, "a folder, not a shard" if path.is_dir() else "no such file (a dangling link)"
    size = path.stat().st_size
    with open(path, "rb") as f:
        raw = f.read(HEADER_BYTES)
    if not raw:
        return 0, "empty file"
    if len(raw) < HEADER_BYTES:
        return 0, f"{size:,} bytes, but the header alone has {HEADER_BYTES:,}"
    header = np.frombuffer(raw, "<i4")
    if header[0] != SHARD_MAGIC:
        if header.byteswap()[0] == SHARD_MAGIC:
            return 0, "big-endian header; shards are little-endian"
        return 0, f"not a shard: it begins with {header[0]}, not {SHARD_MAGIC}"
    if header[1] != SHARD_VERSION:
        return 0, f"shard version {header[1]}; this program reads version {SHARD_VERSION}"
    count, there = int(header[2]), (size - HEADER_BYTES) // 2
    if count <= 0:
        return 0, f"the header says {count:,} tokens"
    if size != HEADER_BYTES + 2 * count:
        return min(count, there), (
            f"{size:,} bytes, but {HEADER_BYTES + 2 * count:,} for the {count:,} tokens of its "
            f"header: {'truncated' if there < count else 'something follows'}")
    return count, "the header's rest is not zero" if header[3:].any() else ""


def sequence_problems(shards):
    """What is wrong with the numbers of one split's shards: a list of str."""
    numbers = [s.index for s in shards]
    problems = [f"{s.path.name}: {s.problem}" for s in shards if s.problem]
    twice = sorted({i for i in numbers if numbers.count(i) > 1}) if numbers else []
    problems += [f"{shards[0].path.parent}: two shards have number {i}" for i in twice]
    if missing := sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers)):
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        problems.append(f"{shards[0].path.name} and on: shard {names} missing of {max(numbers) + 1}"
                        "; documents that straddle the gap are cut")
    return problems


class Split:
    """The shards of one split as one stream of tokens; `len` is their number."""

    def __init__(self, shards):
        self.shards = [s for s in shards if s.tokens]
        self.starts = np.cumsum([0] + [s.tokens for s in self.shards])

    def __len__(self):
        return int(self.starts[-1])

    def read(self, begin, end):
        """Tokens begin..end-1, uint16 [end - begin], read from the files."""
        out = np.empty(end - begin, "<u2")
        first = int(np.searchsorted(self.starts, begin, "right")) - 1
        for i in range(first, len(self.shards)):
            a, b = max(begin, self.starts[i]), min(end, self.starts[i + 1])
            if a >= b:
                break
            with open(self.shards[i].path, "rb", buffering=0) as f:
                f.seek(HEADER_BYTES + 2 * int(a - self.starts[i]))
                _fill(f, out[a - begin:b - begin], self.shards[i].path)
        return out

    def place(self, position):
        """Name of the shard that holds the token at `position`."""
        return self.shards[int(np.searchsorted(self.starts, position, "right")) - 1].path.name

    def pieces(self, digests=None):
        """(Shard, tokens uint16 [n]) of all tokens, in order, each piece from one file.

        `digests`, a dict, gets the sha256 of every file, by name, when its last piece was taken.
        """
        for shard in self.shards:
            with open(shard.path, "rb", buffering=0) as f:
                digest = hashlib.sha256(f.read(HEADER_BYTES))
                for begin in range(0, shard.tokens, BLOCK_TOKENS):
                    piece = np.empty(min(shard.tokens - begin, BLOCK_TOKENS), "<u2")
                    _fill(f, piece, shard.path)
                    if digests is not None:
                        digest.update(piece)
                    yield shard, piece
                if digests is not None:
                    while rest := f.read(1 << 20):  # what follows the tokens, in a faulty file
                        digest.update(rest)
                    digests[shard.path.name] = digest.hexdigest()


def blocks(pieces):
    """The Blocks of a Split's pieces; each ends where a document ends, so none is cut. Tokens
    before the first BOS are a document of their own, a fragment."""
    offset, parts = 0, []  # the parts hold a document whose end was not seen yet
    for _, piece in pieces:
        bos = np.flatnonzero(piece == BOS)
        parts.append(piece[:bos[-1]] if len(bos) else piece)
        if len(bos):
            tokens = np.concatenate(parts)
            if len(tokens):
                yield _block(offset, tokens)
            offset, parts = offset + len(tokens), [piece[bos[-1]:]]
    if parts:
        yield _block(offset, np.concatenate(parts))


def _block(offset, tokens):
    return Block(offset, tokens, *document_spans(np.flatnonzero(tokens == BOS), len(tokens)))


def _fill(file, array, path):
    view, done = memoryview(array).cast("B"), 0
    while done < len(view):
        n = file.readinto(view[done:])
        if not n:
            raise UserError(f"{path}: changed while it was read; run again when nothing writes it")
        done += n


def document_spans(bos, total):
    """(begins, ends) int64 [documents]: each document's tokens without its BOS.

    `bos` are the positions of all BOS, `total` the number of tokens. Tokens before the first BOS
    are a document of their own, a fragment.
    """
    begins = np.asarray(bos, np.int64) + 1
    ends = np.append(begins[1:] - 1, total) if len(begins) else begins
    if total and (not len(begins) or begins[0] != 1):
        ends = np.insert(ends, 0, begins[0] - 1 if len(begins) else total)
        begins = np.insert(begins, 0, 0)
    return begins, ends


def documents(split):
    """(begin, ids) of each document of `split`, in order: its ids uint16 [n] without BOS, and the
    position of the first of them in the split."""
    for block in blocks(split.pieces()):
        for begin, end in zip(block.begins.tolist(), block.ends.tolist(), strict=True):
            yield block.offset + begin, block.tokens[begin:end]


# ---- what stands beside the shards ---------------------------------------------------------------


def read_manifest(folder):
    """manifest.json of a shard directory, as a dict. "tokenizer", "files" and each entry of it are
    dicts in it, empty where the file does not tell them. Raises UserError where it is not JSON.
    """
    path, value = Path(folder) / "manifest.json", None
    if path.is_file():
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not JSON ({e}); restore or remove it") from None
    value = _dict(value) if isinstance(_dict(value).get("files"), dict) else {}
    files = {name: _dict(entry) for name, entry in _dict(value.get("files")).items()}
    return value | {"files": files, "tokenizer": _dict(value.get("tokenizer"))}


def _dict(value):
    return value if isinstance(value, dict) else {}


def find_tokenizer(folder, manifest):
    """Path of the tokenizer that belongs to a shard directory, or None: the manifest's, else the
    only *.model in a `tokenizers` directory up to two levels above, or in the directory itself."""
    folder = Path(folder).resolve()
    homes = [*(p / "tokenizers" for p in (folder.parent.parent, folder.parent, folder)), folder]
    name = manifest.get("tokenizer", {}).get("file")
    if isinstance(name, str) and name == os.path.basename(name):
        return next((h / name for h in homes if (h / name).is_file()), None)
    for home in homes:
        models = sorted(home.glob("*.model"))
        if models:
            return models[0] if len(models) == 1 else None
    return None
