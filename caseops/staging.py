"""Where a data set grows: a locked output root, a directory aside with a journal, and the swap.

A set grows in SET.partial. After each full shard the journal there says what is done; a run that
is killed, interrupted or out of disk goes on from it. A whole set has its manifest.json there.
Then SET is renamed SET.old, SET.partial becomes SET, and SET.old is removed; journal.json is what
disappears last, so a set that holds one was cut short in between and `recover` finishes it.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

from caseops import UserError
from caseops.shards import file_sha256, write_whole

JOURNAL, MANIFEST, DIGESTS = "journal.json", "manifest.json", "val_digests"
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")


@contextlib.contextmanager
def locked(out):
    """The directory `out`, made if need be, for this process alone; the kernel lets go of it
    however the process ends. What was made and is empty at the end is removed."""
    out = Path(out)
    created = [p for p in (out, *out.parents) if not p.exists()]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: Not a directory; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is writing there; wait until it has ended, or "
                            "give another --out") from None
        except OSError:
            pass  # a file system without locks
        yield out
    finally:
        for path in [out / "datasets", *created]:
            with contextlib.suppress(OSError):  # those that hold something stay
                path.rmdir()
        os.close(handle)


class Staging:
    """The directory SET.partial of one run; `state` is the journal of the run to go on from.

    `identity` says what the files depend on, as {option or version: value}. Raises UserError if
    an unfinished run of another identity is there and `restart` does not discard it.
    """

    def __init__(self, folder, identity, restart=False):
        self.folder, self.identity = folder.with_name(folder.name + ".partial"), identity
        self.state, self.note = None, None
        if self.folder.exists() and not restart:
            self._resume()
        if self.state is None:
            self.discard()
            self.folder.mkdir(parents=True)
        for path in self.folder.iterdir():  # of the shard that was not whole
            if path.name not in self._known():
                path.unlink()

    def _known(self):
        files = [name for part in (self.state or {}).get("files", {}).values() for name in part]
        return {JOURNAL, DIGESTS, *files} | {(self.state or {}).get("tokenizer")}

    def _resume(self):
        journal = self.folder / JOURNAL
        if not journal.exists():
            return  # killed before the first shard was whole
        try:
            state = json.loads(journal.read_bytes())
            theirs = dict(state["identity"])
            (self.folder / (state["tokenizer"] or JOURNAL)).stat()
            for files in state["files"].values():
                for name, entry in files.items():
                    size = (self.folder / name).stat().st_size
                    if size != 1024 + 2 * entry["tokens"]:
                        raise ValueError(f"{name} has {size} bytes")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            self.note = f"{journal}: cannot be used ({e}); starting anew"
            return
        for key in sorted({*theirs, *self.identity}):
            then, now = theirs.get(key, "unset"), self.identity.get(key, "unset")
            if then != now:
                raise UserError(f"{self.folder}: unfinished work with {key} {then}, not {now}; use "
                                "what it was begun with, or --restart to discard it")
        self.state = state

    def save(self, state):
        """Write the journal; `state` holds at least "files" and maybe "tokenizer", a file name."""
        state = {"identity": self.identity, **state}
        write_whole(self.folder / JOURNAL, json.dumps(state).encode())
        self.state = json.loads(json.dumps(state))

    def discard(self):
        """Remove the directory and all work in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def kept(self):
        """A block whose failure leaves what can be continued, and says so, or else nothing."""
        try:
            yield self
        except BaseException as e:
            if self.state is None or not self.folder.exists():
                self.discard()
            else:
                shards = sum(map(len, self.state["files"].values()))
                e.add_note(f"{shards} whole shards are kept, the same command goes on from there")
            raise


def check_target(folder, tokenizer, overwrite):
    """Raise UserError where the set in `folder`, or `tokenizer` (path, sha256), would replace one
    of another tokenizer, or a directory stands in the way."""
    path, sha256 = tokenizer
    for wanted in (folder, path.parent):
        if wanted.exists() and not wanted.is_dir():
            raise UserError(f"{wanted}: not a directory; remove it or give another --out")
    in_the_way = [p for p in folder.glob("*") if p.is_dir() and (
        SHARD_NAME.fullmatch(p.name) or p.name in (MANIFEST, path.name, JOURNAL, DIGESTS))]
    for wanted in [path, *in_the_way]:
        if wanted.is_dir():
            raise UserError(f"{wanted}: a directory is in the way; remove it or give another --out")
    if overwrite:
        return
    remedy = "give another --out, or --overwrite to replace it"
    if path.exists() and file_sha256(path) != sha256:
        raise UserError(f"{path}: another tokenizer of this name is there; {remedy}")
    if any(SHARD_NAME.fullmatch(p.name) for p in folder.glob("*")):
        try:
            theirs = json.loads((folder / MANIFEST).read_bytes())["tokenizer"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder}: shards without a manifest.json that names their tokenizer; "
                            f"{remedy}") from None
        if theirs != sha256:
            raise UserError(f"{folder}: a data set of another tokenizer (sha256 {theirs[:16]}..., "
                            f"this one has {sha256[:16]}...); {remedy}")


def install(staged, folder, tokenizers):
    """Swap `staged`, a whole set with manifest, journal and tokenizer, for `folder`."""
    if folder.exists():
        os.rename(folder, aside(folder))
    os.rename(staged, folder)
    finish(folder, tokenizers)


def aside(folder):
    """Where the old set stands for the time of the swap."""
    return folder.with_name(folder.name + ".old")


def finish(folder, tokenizers):
    """What is left after the swap: the tokenizer goes to its place, files that are not ours come
    over from the old set, the old set and the journal go."""
    name = json.loads((folder / MANIFEST).read_bytes())["tokenizer"]["file"]
    if (folder / name).exists():
        tokenizers.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, tokenizers / name)
    old = aside(folder)
    if old.is_dir():
        for path in old.iterdir():
            if not SHARD_NAME.fullmatch(path.name) and path.name != MANIFEST:
                os.replace(path, folder / path.name)
        shutil.rmtree(old)
    (folder / DIGESTS).unlink(missing_ok=True)
    (folder / JOURNAL).unlink()


def recover(folder, tokenizers):
    """Finish a swap that was cut short. The identity of that run, or None if there was none."""
    old, staged = aside(folder), folder.with_name(folder.name + ".partial")
    if old.is_dir() and not folder.exists():
        os.rename(staged if (staged / MANIFEST).exists() else old, folder)
    if not (folder / JOURNAL).exists():
        return None
    identity = json.loads((folder / JOURNAL).read_bytes())["identity"]
    finish(folder, tokenizers)
    return identity
