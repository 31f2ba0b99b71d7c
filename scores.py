"""SCORES_PATH=FILE.npz read back: `python submission.py --scores FILE.npz [LOG]`.

The file holds one entry per scored target, in the order of the validation stream: `nats` float32,
`bytes`, `document` int32, `order` int64 (each target's place in the coding order), and `meta`, JSON
as text. Loss and BPB are computed again from them, and the order is checked: it must be the one
that train_gpt.py's schedule gives for document lengths, settings and number of processes.
"""

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from runlogs import UserError, figures_told, finite, load, parse_json

ARRAYS = {"nats": "f", "bytes": "iu", "document": "iu", "order": "iu"}  # kinds of their types
NUMBERS = ("val_loss", "val_bpb", "tokens", "bytes", "world")
NEEDED = ("artifact_sha256", "program_sha256", "data", "settings", *NUMBERS)
TOLERANCE = 1e-6  # relative: float32 entries summed in float64, against the program's sum
ROUNDING = -1e-5  # nats of a target with probability 1, in float32


def read_scores(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, meta) of a file of scores; UserError where it is none, or is damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the evaluation with SCORES_PATH={path}")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: one array, not a file of scores (.npz)")
        with file:
            missing = [name for name in (*ARRAYS, "meta") if name not in file.files]
            if missing:
                raise UserError(f"{path}: not a file of scores; missing: {', '.join(missing)}")
            arrays = {name: file[name] for name in ARRAYS}
            text = file["meta"]
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, SyntaxError,
            OverflowError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(f"{path}: a damaged file of scores ({line[:120]})") from None
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in ARRAYS[name]:
            raise UserError(f"{path}: {name} is {array.dtype} of shape {array.shape}; it must be a "
                            f"list of {'floats' if name == 'nats' else 'whole numbers'}")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or not lengths["nats"]:
        told = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise UserError(f"{path}: arrays of one length above 0 are wanted: {told}")
    whole = {name: array if name == "nats" else array.astype(np.int64)
             for name, array in arrays.items()}
    return whole, read_meta(path, text)


def read_meta(path: Path, text: np.ndarray) -> dict[str, Any]:
    """What the file says of its run."""
    if text.ndim or text.dtype.kind != "U":
        raise UserError(f"{path}: meta is {text.dtype} of shape {text.shape}; it must be text")
    try:
        meta = parse_json(str(text[()]))
    except ValueError as error:
        raise UserError(f"{path}: meta is no JSON ({str(error)[:120]})") from None
    missing = [name for name in NEEDED if not isinstance(meta, dict) or name not in meta]
    if missing:
        raise UserError(f"{path}: meta lacks {', '.join(missing)}")
    if not isinstance(meta["settings"], dict):
        raise UserError(f"{path}: settings in meta is no object")
    odd = [name for name in NUMBERS if not finite(meta[name])]
    if odd:
        raise UserError(f"{path}: {odd[0]} in meta is no figure: {str(meta[odd[0]])[:40]}")
    return meta


def recompute(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Loss in nats a token, BPB, targets and bytes, of the entries; sums in float64."""
    with np.errstate(all="ignore"):  # what is not finite is found by check_entries
        nats, size = float(arrays["nats"].sum(dtype=np.float64)), int(arrays["bytes"].sum())
    bits = nats / math.log(2)
    return {"val_loss": nats / len(arrays["nats"]), "val_bpb": bits / size if size else math.nan,
            "tokens": len(arrays["nats"]), "bytes": size}


def check_entries(arrays: dict[str, np.ndarray]) -> list[str]:
    """Entries that no evaluation gives."""
    nats, size, document = arrays["nats"], arrays["bytes"], arrays["document"]
    found = []
    for wrong, words in ((~np.isfinite(nats), "nats is not finite"), (size < 0, "bytes below 0"),
                         (nats < ROUNDING, "nats below 0")):
        if wrong.any():
            at = int(np.argmax(wrong))
            found.append(f"{words} at {int(wrong.sum()):,} target(s), first at target {at:,}")
    step = np.diff(document, prepend=document[:1])
    if document[0] != 0 or ((step != 0) & (step != 1)).any():
        at = int(np.argmax((step != 0) & (step != 1))) if document[0] == 0 else 0
        found.append("documents are not numbered 0, 1, ... in the order of the stream, first at "
                     f"target {at:,}")
    return found


def check_order(arrays: dict[str, np.ndarray]) -> list[str]:
    """Whether `order` is one order of all targets, in which documents are read left to right."""
    order, document, found = arrays["order"], arrays["document"], []
    n, inside = len(order), (order >= 0) & (order < len(order))
    if not inside.all() or np.bincount(order[inside], minlength=n).max() > 1:
        at = int(np.argmax(~inside)) if not inside.all() else _twice(order)
        found.append(f"order is no permutation of 0 to {n - 1:,}: {order[at]} at target {at:,}")
    falls = (np.diff(document) == 0) & (order[1:] <= order[:-1])
    if falls.any():
        at = int(np.argmax(falls)) + 1
        found.append(f"within a document the order falls at {int(falls.sum()):,} target(s), first "
                     f"at target {at:,}, document {document[at]}: scored after a later token")
    return found


def check_schedule(arrays: dict[str, np.ndarray],
                   meta: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(findings, what could not be compared): is `order` that of the schedule which document
    lengths, settings and number of processes give? For a file whose entries are in order."""
    try:
        import train_gpt as t  # PyTorch is needed here alone
    except ModuleNotFoundError as error:
        return [], [f"order against the schedule ({error.name} is not installed)"]
    document, world = arrays["document"], meta["world"]
    if int(world) != world or world < 1:
        return [f"world in meta is no number of processes: {world}"], []
    ids = np.full(len(document) + 1, t.BOS + 1)
    ids[:-1][np.diff(document, prepend=-1) > 0] = t.BOS
    try:
        cfg = t.Config.from_env({}, Path(), meta["settings"], check=False)
        want = t.target_places(t.ValSet(ids, np.zeros(0, np.int32)), cfg, int(world))[1]
    except (t.UserError, TypeError, ValueError, ArithmeticError) as error:
        return [], [f"order against the schedule (settings in meta: {str(error)[:120]})"]
    wrong = np.argsort(want, kind="stable") != np.argsort(arrays["order"], kind="stable")
    if not wrong.any():
        return [], []
    return [f"order is not the one that document lengths, settings and {int(world)} process(es) "
            f"give: they differ at place {int(np.argmax(wrong)):,}"], []


def _twice(order: np.ndarray) -> int:
    """The first target whose place in the order an earlier target has, too."""
    _, first = np.unique(order, return_index=True)
    rest = np.ones(len(order), bool)
    rest[first] = False
    return int(np.argmax(rest))


def describe(arrays: dict[str, np.ndarray]) -> list[str]:
    """What the order looks like: documents, first and last one, how their targets interleave."""
    order, document = arrays["order"], arrays["document"]
    by_place = document[np.argsort(order, kind="stable")]
    documents = len(np.unique(document))
    runs = 1 + int((np.diff(by_place) != 0).sum())
    lines = [f"order: {len(order):,} targets of {documents:,} documents; document {by_place[0]} is "
             f"coded first, document {by_place[-1]} last"]
    if (np.diff(order) > 0).all():
        return [*lines, "order: that of the stream"]
    return [*lines, "order: " + ("one document after another" if runs == documents else
                                 f"documents in turns, {runs:,} pieces")]


def against_log(meta: dict[str, Any], path: Path) -> tuple[list[str], list[str]]:
    """(findings, what could not be compared) of a file of scores and the log of its run."""
    log = load(path)
    run = {**log.figures, **figures_told(log.told)}
    artifact = next((digest for name, digest in (run.get("sha256") or {}).items()
                     if name.endswith(".ptz")), None)
    found, unknown = [], []
    pairs = (("val_bpb", run["val_bpb"], 1e-8), ("val_loss", run["val_loss"], 1e-8),
             ("tokens", run["val_tokens"], 0), ("bytes", run.get("val_bytes"), 0))
    for name, value, most in pairs:
        if value is None:
            unknown.append(f"{name} (not in {path})")
        elif not abs(meta[name] - value) <= most:
            found.append(f"{name}: the scores say {meta[name]}, {path} says {value}")
    for name, digest in (("program_sha256", run["program_sha256"]), ("artifact_sha256", artifact)):
        if digest is None:
            unknown.append(f"{name} (not in {path})")
        elif meta[name] != digest:
            found.append(f"{name}: the scores are of {str(meta[name])[:16]}, {path} of "
                         f"{str(digest)[:16]}")
    return found, unknown


def check_scores(path: Path, logs: list[Path]) -> tuple[list[str], int]:
    """(report, number of findings) for --scores."""
    arrays, meta = read_scores(path)
    got, found, unknown = recompute(arrays), [], []
    for name, value in got.items():
        same = (math.isclose(value, meta[name], rel_tol=TOLERANCE) if name.startswith("val") else
                value == meta[name])
        if not same:
            found.append(f"{name}: the entries give {value}, meta says {meta[name]}")
    disorder = check_entries(arrays) + check_order(arrays)
    found += disorder
    if not disorder:
        wrong, lacking = check_schedule(arrays, meta)
        found, unknown = found + wrong, unknown + lacking
    for log in logs:
        wrong, lacking = against_log(meta, log)
        found, unknown = found + wrong, unknown + lacking
    preset = meta.get("preset")
    lines = [f"val_loss {got['val_loss']:.8f}, val_bpb {got['val_bpb']:.8f}, {got['tokens']:,} "
             f"targets, {got['bytes']:,} bytes (meta: {meta['val_loss']:.8f}, "
             f"{meta['val_bpb']:.8f})",
             f"artifact {str(meta['artifact_sha256'])[:16]}, program "
             f"{str(meta['program_sha256'])[:16]}, {meta['world']} process(es)"
             + (f", preset {preset}" if preset else ""),
             f"data: {str(meta['data']).removeprefix('data: ')[:160]}",
             f"settings: {json.dumps(meta['settings'])[:300]}", *describe(arrays)]
    lines += [f"compared with {log}" for log in logs]
    lines += [f"not compared: {line}" for line in unknown]
    return [*lines, *(f"finding: {line}" for line in found),
            f"{len(found)} finding(s) in {path}"], len(found)
