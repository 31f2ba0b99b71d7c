"""The published data, fetched from the Hugging Face hub and checked.

    romeerp/parameter-golf-caseops-v1: datasets/manifest.json, datasets/tokenizers/NAME.model,
        datasets/datasets/SET/fineweb_*.bin
    willdepueoai/parameter-golf: datasets/docs_selected.jsonl (48 GB), and beside it
        docs_selected.source_manifest.json

MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and another
folder in it, as for the challenge's own downloader. A file comes to its place when it has the size
and hash that the hub tells; half of one waits in OUT/.download, and the same command goes on.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from caseops import BOS, UserError
from caseops.console import say
from caseops.encoder import Encoder
from caseops.shards import file_sha256, write_whole
from caseops.sources import require
from caseops.splits import HEADER_BYTES, read_header
from caseops.staging import MANIFEST, locked, recover

SETS = {"caseops": "romeerp/parameter-golf-caseops-v1", "docs": "willdepueoai/parameter-golf"}
SET = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
TOKENIZER = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
DOCS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")


class Remote:
    """The files below `prefix` of one data set repository, at the commit that is its newest."""

    def __init__(self, repository, prefix):
        # Each module by its name: the library's lazy attributes do not name its submodules.
        self.hub, self.utils = require("huggingface_hub"), require("huggingface_hub.utils")
        self.repository, self.prefix = repository, prefix.strip("/")
        self.utils.logging.set_verbosity_error()  # each retry is a warning
        self.api = self.hub.HfApi()
        with self._told_plainly():
            self.commit = self.api.repo_info(repository, repo_type="dataset").sha
            tree = self.api.list_repo_tree(repository, self.prefix or None, recursive=True,
                                      revision=self.commit, repo_type="dataset")
            self.files = {f.path.removeprefix(self.prefix).lstrip("/"): f for f in tree
                          if hasattr(f, "size")}

    def need(self, names):
        """Raise UserError unless all `names` are there."""
        missing = [n for n in names if n not in self.files]
        if missing:
            raise UserError(f"{self.repository}: no {self.prefix}/{missing[0]} there; set "
                            "MATCHED_FINEWEB_REPO_ID to another repository, or give fewer "
                            "--train-shards")

    def fetch(self, name, target, scratch):
        """Bring file `name` to the path `target`, unless it is there and right already."""
        if target.is_file() and self.differs(name, target) is None:
            return
        file = self.files[name]
        got = scratch / f"{file.blob_id}.part"
        scratch.mkdir(exist_ok=True)
        url = self.hub.hf_hub_url(self.repository, file.path, repo_type="dataset",
                                  revision=self.commit)
        # Not hf_hub_download, which begins a file anew in every run: one here has 48 GB.
        with self._told_plainly(name, got), open(got, "ab") as f:
            if f.tell() < file.size:
                require("huggingface_hub.file_download").http_get(
                    url, f, resume_size=f.tell(), expected_size=file.size,
                    headers=self.utils.build_hf_headers(),
                    displayed_filename=name.split("/")[-1])
        if wrong := self.differs(name, got):
            got.unlink()
            raise UserError(f"{self.repository}: {name} came with {wrong}; run the same command "
                            "again")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(got, target)

    def differs(self, name, path):
        """What is wrong with `path` as a copy of the file `name`, or None."""
        told, size = self.files[name], path.stat().st_size
        if size != told.size:
            return f"{size:,} bytes, not {told.size:,}"
        if told.lfs is not None:
            wanted, found = told.lfs.sha256, file_sha256(path)
        else:  # git's own hash; such files are small
            found = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
            wanted = told.blob_id
        return None if found == wanted else f"hash {found[:16]}..., not {wanted[:16]}..."

    @contextlib.contextmanager
    def _told_plainly(self, name="", path=None):
        """The hub's client and the libraries below it raise errors of many kinds. `name` is the
        file that is fetched, to `path`."""
        try:
            yield
        except UserError:
            raise
        except Exception as e:  # noqa: BLE001 - see above
            if getattr(e, "errno", None) == errno.ENOSPC:
                raise OSError(e.errno, e.strerror, str(path)) from None
            words = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise UserError(f"{self.repository}: {name}{': ' * bool(name)}{type(e).__name__}: "
                            f"{words}; check the network and MATCHED_FINEWEB_REPO_ID, then run the "
                            "same command again to go on") from None


def download(what, out, train_shards=None):
    """Fetch `what`, a key of SETS, to the directory `out`. Raises UserError or OSError."""
    remote = Remote(os.environ.get("MATCHED_FINEWEB_REPO_ID") or SETS[what],
                    os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets"))
    with locked(out):
        scratch = Path(out) / ".download"
        if what == "docs":
            download_docs(remote, Path(out), scratch)
        else:
            download_caseops(remote, Path(out), scratch, train_shards)
        shutil.rmtree(scratch, ignore_errors=True)


def download_docs(remote, out, scratch):
    """The challenge's documents: OUT/docs_selected.jsonl, and what is told about them."""
    remote.need(DOCS)
    require_space(remote, {name: out / name for name in DOCS})
    for name in reversed(DOCS):
        say(f"{name}: {remote.files[name].size:,} bytes")
        remote.fetch(name, out / name, scratch)
    told = read_json(out / DOCS[1])
    docs = out / DOCS[0]
    if told.get("docs_bytes", docs.stat().st_size) != docs.stat().st_size:
        raise UserError(f"{docs}: {docs.stat().st_size:,} bytes, but {DOCS[1]} says "
                        f"{told['docs_bytes']:,}; the repository disagrees with itself")
    n_val = told.get("docs_val") or told.get("num_val_docs") or 50_000
    say(f"written: {docs}, {told.get('num_docs', 'unknown number of')} documents; prepare them with"
        f" --name fineweb10B --val-docs {n_val}")


def download_caseops(remote, out, scratch, train_shards):
    """The CaseOps set: where train_gpt.py looks for it with DATA_DIR=OUT, with our manifest."""
    folder, tokenizer = out / "datasets" / SET, out / "tokenizers" / TOKENIZER
    names = chosen_shards(remote, folder, train_shards)
    places = {f"tokenizers/{TOKENIZER}": tokenizer, "manifest.json": folder / "published.json"}
    places = {n: p for n, p in places.items() if n != "manifest.json" or n in remote.files}
    places |= {f"datasets/{SET}/{name}": folder / name for name in names}
    remote.need(places)
    recover(folder, out / "tokenizers")
    refuse_foreign(remote, folder, tokenizer)
    require_space(remote, places)
    total = sum(remote.files[n].size for n in places)
    say(f"{remote.repository} at {remote.commit}: {len(places)} files, {total:,} bytes")
    for name, place in places.items():
        remote.fetch(name, place, scratch)
    manifest = published_manifest(remote, folder, tokenizer, names)
    compare_told(folder / "published.json", manifest)
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    totals = manifest["totals"]
    say(f"val: {totals['val']['tokens']:,} tokens; train: {totals['train']['tokens']:,} tokens in "
        f"{totals['train']['files']} shards; all hashes and headers are right")
    say(f"written: {folder}")


def refuse_foreign(remote, folder, tokenizer):
    """Raise UserError where `folder` or `tokenizer` hold anything that is not the published one;
    half of a download has no manifest, but all its files are right."""
    remedy = "give another --out, or remove it"
    model = f"tokenizers/{tokenizer.name}"
    if tokenizer.exists() and remote.differs(model, tokenizer):
        raise UserError(f"{tokenizer}: another tokenizer of this name is there; {remedy}")
    told = read_json(folder / MANIFEST).get("tokenizer")
    if isinstance(told, dict) and remote.files[model].lfs is not None \
            and told.get("sha256") != remote.files[model].lfs.sha256:
        raise UserError(f"{folder}: a data set of another tokenizer; {remedy}")
    if told is None:
        for path in folder.glob("fineweb_*.bin"):
            name = f"datasets/{SET}/{path.name}"
            if name not in remote.files or remote.differs(name, path):
                raise UserError(f"{path}: a shard of another set; {remedy}")


def chosen_shards(remote, folder, train_shards):
    """Names of the validation shards, their sidecars and the first `train_shards` (default: all)
    training shards, and of further ones that are in `folder` already."""
    found = sorted(Path(n).name for n in remote.files
                   if n.startswith(f"datasets/{SET}/fineweb_") and n.endswith(".bin"))
    train = [n for n in found if re.fullmatch(r"fineweb_train_\d{6}\.bin", n)]
    val = [n for n in found if re.fullmatch(r"fineweb_val_(bytes_)?\d{6}\.bin", n)]
    if not val or not train:
        raise UserError(f"{remote.repository}: no shards in {remote.prefix}/datasets/{SET}; set "
                        "MATCHED_FINEWEB_REPO_ID to another repository")
    if (train_shards or 0) > len(train):
        raise UserError(f"--train-shards {train_shards}: {remote.repository} has {len(train)}; "
                        "give fewer")
    first = train[:train_shards]
    return val + first + [n for n in train if n not in first and (folder / n).exists()]


def require_space(remote, places):
    """Raise UserError unless the disk has room for what is not there yet."""
    missing = sum(remote.files[n].size for n, p in places.items() if not p.exists())
    anywhere = next(iter(places.values()))
    free = shutil.disk_usage(next(p for p in anywhere.parents if p.exists())).free
    if missing > free:
        raise UserError(f"{missing:,} bytes to fetch, but the disk has {free:,} free; free some "
                        "space, or give another --out or fewer --train-shards")


def read_json(path):
    """The object in a JSON file of the hub, {} where it is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_shard(path):
    """The values (uint16 [n]) of a shard, mapped. Raises UserError where the header is wrong."""
    _, problem = read_header(path)
    if problem:
        raise UserError(f"{path}: not a shard of this format ({problem}); the repository holds "
                        "something else")
    return np.memmap(path, "<u2", "r", HEADER_BYTES)


def shard_entry(path, vocab_size):
    """The manifest's entry of one token shard, and where its documents begin (bool [n])."""
    values = read_shard(path)
    if int(values.max()) >= vocab_size:
        raise UserError(f"{path}: id {int(values.max())}, but the tokenizer has {vocab_size} "
                        "pieces; the repository disagrees with itself")
    begins = values == BOS
    return {"sha256": file_sha256(path), "tokens": len(values),
            "documents": int(begins.sum())}, begins


def published_manifest(remote, folder, tokenizer, names):
    """A manifest (a dict) of what was fetched, like that of a set prepared here; every shard's
    header, ids and sidecar are looked at. Raises UserError for what does not fit together."""
    model = tokenizer.read_bytes()
    encoder = Encoder(model, str(tokenizer))
    files, totals = {}, {"train": dict.fromkeys(("files", "tokens", "documents"), 0)}
    totals["val"] = totals["train"] | {"counted_bytes": 0}
    for name in [n for n in names if "_bytes_" not in n]:
        entry, begins = shard_entry(folder / name, encoder.size)
        split = name.split("_")[1]
        for key in ("tokens", "documents"):
            totals[split][key] += entry[key]
        totals[split]["files"] += 1
        files[name] = entry
        if split == "val":
            side = folder / name.replace("val_", "val_bytes_")
            if side.name not in names:
                raise UserError(f"{remote.repository}: no {side.name}; the repository has no byte "
                                "sidecar for a validation shard")
            counts = read_shard(side)
            if len(counts) != len(begins) or counts[begins].any():
                raise UserError(f"{side}: does not fit {name}; the repository disagrees with "
                                "itself")
            files[side.name] = {"sha256": file_sha256(side), "tokens": len(counts),
                                "counted_bytes": int(counts.sum(dtype=np.int64))}
            totals["val"]["counted_bytes"] += files[side.name]["counted_bytes"]
    return {
        "format": "caseops shards", "format_version": 1,
        "source": {"repository": remote.repository, "commit": remote.commit},
        "split": {"rule": "as published", "val_documents": totals["val"]["documents"],
                  "train_documents": totals["train"]["documents"]},
        "tokenizer": {"file": tokenizer.name, "sha256": hashlib.sha256(model).hexdigest(),
                      "bytes": len(model), "vocab_size": encoder.size, "trained_here": False,
                      "keeps_every_byte": encoder.exact},
        "totals": totals, "files": dict(sorted(files.items()))}


def compare_told(path, manifest):
    """Tell where the published manifest has other numbers. It is no error: hashes and headers are
    right, and the layout of that file is nobody's promise."""
    told = read_json(path)
    entries = [x for x in told.get("datasets") or [] if isinstance(x, dict)]
    stats = next((x.get("stats") or {} for x in entries if x.get("name") == SET), {})
    val, train = manifest["totals"]["val"], manifest["totals"]["train"]
    whole = stats.get("files_train") == train["files"]
    for key, found, known in (
            ("tokens_val", val["tokens"], True), ("docs_val", val["documents"], True),
            ("tokens_train", train["tokens"], whole), ("docs_train", train["documents"], whole)):
        if known and isinstance(stats.get(key), int) and stats[key] != found:
            say(f"note: {path.name} says {key} {stats[key]:,}, the shards hold {found:,}")
