"""Is the score legal? `python train_gpt.py audit`, or LEGALITY_CHECK=1 for a whole run.

Two parts. `guard` stands around a run and refuses data where it may not be read. `audit` scores a
sample of the real validation set with the artifact that was written, many times over, through the
program's own functions, changes what may not matter and compares the bits. It knows nothing of how
a score comes about: a target's index travels in place of its byte count through the evaluation to
`Meter.add`, so any path to the score can be followed. docs/legality.md lists what is caught."""

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train_gpt as t
from submission import LIMIT_BYTES, LIMIT_SECONDS

DOCUMENTS, CHUNKS = 10, 2.5  # of the sample: how many documents, chunks of each
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}  # of a sum of probabilities
PATIENCE = 25.0  # seconds for the slow way of adding up a distribution


class Illegal(t.UserError):
    """A violation that ends the run at once."""


class Finding(NamedTuple):
    """One violation: which check, where, the settings that rule it, and what to do."""

    check: str
    position: str
    settings: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}: {self.position} ({self.settings}); {self.remedy}"


# ---- data access, during a run

class Sealed:
    """Validation ids that answer only while `access` says so; their number is no secret."""

    def __init__(self, ids: np.ndarray, access: "Access"):
        self._ids, self._access = ids, access

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, key: Any) -> np.ndarray:
        self._access.check_val(f"validation ids [{key}]")
        return self._ids[key]

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self[:], *args)

    def __eq__(self, other: object) -> Any:
        return self[:] == other

    __hash__ = None


class Access:
    """What may be read now. The stages of a run: start, warm-up, training, trained (calibration is
    over), fixed (the artifact was read back and its hash is known)."""

    def __init__(self) -> None:
        self.stage, self.measuring, self.artifact = "start", False, ""

    def check_val(self, what: str) -> None:
        """Validation data: from the artifact's hash on; before that only to measure."""
        if self.stage == "warm-up" or not (self.artifact or self.measuring):
            raise Illegal(
                f"data access: {what} read in stage {self.stage!r}, before the artifact's hash is "
                "fixed and outside a plain evaluation (LEGALITY_CHECK=1); train and warm up on "
                "other data: synthetic ids, or the training shards")

    def check_train(self, what: str) -> None:
        """Training data: after warm-up, until calibration ends."""
        if self.stage not in ("start", "training"):
            raise Illegal(f"data access: {what} read in stage {self.stage!r}, where the training "
                          "clock does not run (LEGALITY_CHECK=1); calibrate inside the budget, and "
                          "warm up on synthetic ids")

    # each of these stands in for the program's function of the same name

    def load_val(self, load: Callable, cfg: t.Config) -> t.ValSet:
        if self.stage == "warm-up":
            self.check_val("the validation shards")
        val = load(cfg)
        return val if self.artifact else val._replace(ids=Sealed(val.ids, self))

    def load_train(self, load: Callable, cfg: t.Config, rt: t.Runtime) -> t.TrainRows:
        self.check_train("the training shards")
        rows = load(cfg, rt)
        row = rows.row

        def guarded(g: int) -> t.Row:
            self.check_train(f"training row {g}")
            return row(g)
        rows.row = guarded
        return rows

    def warm_up(self, function: Callable, *args: Any) -> Any:
        self.stage = "warm-up"
        result = function(*args)
        self.stage = "training"
        return result

    def pack(self, function: Callable, *args: Any) -> Any:
        self.stage = "trained"
        return function(*args)

    def evaluate(self, function: Callable, forward: Callable, *args: Any) -> t.Score:
        """A plain evaluation may look before the artifact exists, and must leave no trace."""
        before = digest(forward)
        self.measuring = True
        try:
            score = function(forward, *args)
        finally:
            self.measuring = False
        if digest(forward) != before:
            raise Illegal("data access: a plain evaluation changed the weights (LEGALITY_CHECK=1); "
                          "nothing may be learnt from validation data before it is scored")
        return score

    def decode_artifact(self, function: Callable, blob: bytes, *args: Any) -> Any:
        self.artifact = hashlib.sha256(blob).hexdigest()
        self.stage = "fixed"
        return function(blob, *args)


def digest(forward: Callable) -> str:
    """sha256 of all weights behind a forward."""
    found = hashlib.sha256()
    for p in forward.parameters():
        found.update(p.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def patched(functions: dict[str, Callable], owner: Any = t) -> Iterator[None]:
    """Inside, owner.NAME(...) is function(the original, ...)."""
    originals = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, functools.partial(function, originals[name]) if owner is t else
                functools.partialmethod(function, originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


@contextlib.contextmanager
def guard() -> Iterator[Access]:
    """A run inside may read training and validation data only where the rules allow it."""
    access = Access()
    names = ("load_val", "load_train", "warm_up", "pack", "evaluate", "decode_artifact")
    with patched({name: getattr(access, name) for name in names}):
        yield access


# ---- the ledger

class Ledger:
    """Append-only: every scored target with its loss, the call that scored it and the number of
    updates (version) before; what updates used. Problems are noted when they happen."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.call_of: dict[int, int] = {}
        self.calls, self.version, self.problems = 0, 0, []
        self.latest, self.logits = None, []  # of the last forward; of every target that counts

    def add(self, meter: t.Meter, original: Callable, losses: Any, sizes: Any, mask: Any) -> None:
        """In place of Meter.add; `sizes` holds the targets' indices."""
        self.calls += 1
        if self.latest is not None:
            self.logits.append(self.latest[mask.flatten()])
        for index, loss in zip(sizes[mask].tolist(), losses.detach()[mask].tolist(), strict=True):
            if index in self.losses:
                self.problems.append((index, f"scored again at version {self.version}"))
            self.losses[index], self.call_of[index] = loss, self.calls
        original(meter, losses, sizes, mask)

    def learn(self, adapter: t.Adapter, original: Callable, scored: t.Scored) -> None:
        """In place of Adapter.learn: the gradient of targets that must be in the ledger."""
        window = scored.window
        self.need(window.sizes[window.mask].tolist(), "an adapter")
        original(adapter, scored)

    def step(self, adapter: t.Adapter, original: Callable) -> None:
        self.version += 1
        original(adapter)

    def train_globally(self, original: Callable, model: Any, documents: Any, val: t.ValSet,
                       *args: Any) -> int:
        """In place of train_globally: documents whose targets must be in the ledger."""
        for doc in documents:
            self.need(range(doc.begin + 1, doc.end), "a global phase")
        self.version += 1
        return original(model, documents, val, *args)

    def need(self, indices: Any, who: str) -> None:
        missing = [index for index in indices if index not in self.losses]
        if missing:
            self.problems.append((missing[0], f"{who} learns from it at version {self.version}, "
                                  "but it is not scored yet"))


# ---- the audit

class Quiet(t.Runtime):
    """This rank alone, without a log."""

    def log(self, text: str) -> None:
        """Nothing: the sample is scored many times."""


@dataclass
class Bench:
    """The artifact and how it is scored, on samples."""

    cfg: t.Config
    rt: t.Runtime
    model: t.GPT
    weights: dict[str, torch.Tensor]

    def run(self, path: str, val: t.ValSet, cfg: t.Config | None = None,
            follow: bool = True, ledger: Ledger | None = None) -> tuple[Ledger, t.Score]:
        """Score `val` by one path (plain or ttt) from the artifact's weights; with `follow` byte
        counts are replaced by indices."""
        cfg, ledger = cfg or self.cfg, ledger or Ledger()
        self.model.load_state_dict(self.weights)
        if follow:
            val = val._replace(bytes=np.arange(len(val.ids), dtype=np.int32))
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            if follow:
                enter(patched_method(t.Meter, "add", ledger.add))
                enter(patched_method(t.Adapter, "learn", ledger.learn))
                enter(patched_method(t.Adapter, "step", ledger.step))
                enter(patched({"train_globally": ledger.train_globally}))
            if path == "plain":
                score = t.evaluate(self.model, val, cfg, self.rt)
            else:
                rules = t.make_rules(cfg, self.rt, self.model, val)
                if rules:
                    rules.wait()
                score = t.score_phased(self.model, val, cfg, self.rt, rules=rules)
        return ledger, score


@contextlib.contextmanager
def patched_method(owner: type, name: str, function: Callable) -> Iterator[None]:
    """Inside, object.name(...) is function(object, the original, ...)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args: function(self, original, *args))
    try:
        yield
    finally:
        setattr(owner, name, original)


def sample_of(val: t.ValSet, cfg: t.Config) -> t.ValSet:
    """The beginnings of DOCUMENTS documents spread over the real validation set."""
    length, parts = int(CHUNKS * cfg.ttt_chunk_size) + DOCUMENTS, []
    documents = val.documents()
    step = max(1, len(documents) // DOCUMENTS)
    for n, (begin, end) in enumerate(documents[::step][:DOCUMENTS]):
        parts.append(np.arange(begin, min(end - 1, begin + length - n)))
    if len(parts) < 2:
        raise t.UserError("audit: the validation set has fewer than 2 documents; add documents")
    at = np.concatenate(parts)
    return t.ValSet(val.ids[at], val.bytes[at])


def small(cfg: t.Config) -> t.Config:
    """The evaluation that the settings choose, at the sample's size: fewer documents a batch and
    in the phases, shorter rows. What decides about a token's score stays as it is."""
    docs = 6 if cfg.phased_ttt_prefix_docs else 0
    return replace(
        cfg, compile=False, checkpoint_every_seconds=0.0, ttt_batch_size=2,
        phased_ttt_prefix_docs=docs, phased_ttt_num_phases=2, eval_seq_len=32,
        global_ttt_chunk_tokens=64, global_ttt_batch_seqs=2, ngram_min_tokens=0,
        val_batch_tokens=8 * int(3 * CHUNKS * cfg.ttt_chunk_size))


def remembers(cfg: t.Config, path: str) -> bool:
    """Whether scores may depend on earlier documents, whose n-grams are kept."""
    return path == "ttt" and bool(cfg.ngram_tilt_enabled or cfg.ngram_mixer)


def place(index: int, val: t.ValSet) -> str:
    """A target of the sample, for messages."""
    number = int((val.ids[:index + 1] == t.BOS).sum()) - 1
    begin = int(np.flatnonzero(val.ids[:index + 1] == t.BOS)[-1])
    return f"target {index} (document {number} of the sample, token {index - begin})"


SETTINGS_OF = {"plain": "VAL_BATCH_TOKENS, EVAL_SEQ_LEN, SMEAR_GATE_ENABLED",
               "ttt": "TTT_*, PHASED_TTT_*, GLOBAL_TTT_*"}


def changed_ids(val: t.ValSet, indices: np.ndarray) -> t.ValSet:
    """The sample with other tokens at `indices`; documents stay where they are."""
    ids, text = val.ids.copy(), np.unique(val.ids[val.ids != t.BOS])
    place_in = np.searchsorted(text, ids[indices])
    ids[indices] = text[(place_in + 1 + len(text) // 3) % len(text)]
    return val._replace(ids=ids)


def free_of(indices: list[int], val: t.ValSet) -> np.ndarray:
    """bool [len(ids)]: targets that no token of `indices` stands before in their own document (a
    target belongs to the document of the token before it) and that are none of them."""
    doc = np.cumsum(val.ids == t.BOS)
    first = np.full(doc[-1] + 1, len(doc))
    np.minimum.at(first, doc[indices], indices)
    free = np.arange(len(doc)) <= first[np.concatenate(([0], doc[:-1]))]
    free[indices] = False
    return free


def check_causality(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """Change later tokens: whatever was scored before one of them is read must not move a bit."""
    base, _ = bench.run(path, val)
    order = sorted(base.call_of, key=lambda i: (base.call_of[i], i))
    text = [i for i in order if val.ids[i] != t.BOS]
    if not text:
        return [Finding(f"causality ({path})", "nothing was scored", SETTINGS_OF[path],
                        "score every target through Meter.add")]
    doc = np.cumsum(val.ids == t.BOS)
    first_doc, last_doc = ([i for i in text if doc[i] == doc[text[end]]] for end in (0, -1))
    half = len(val.ids) // 2
    changes = {
        "a later token of the first document": [first_doc[int(0.6 * len(first_doc))]],
        "a target in the middle": [text[len(text) // 2]],
        "the last document in processing order": last_doc,
        "the suffix of the stream": [i for i in range(half, len(val.ids)) if val.ids[i] != t.BOS]}
    found = []
    for what, indices in changes.items():
        if not any(i in base.call_of for i in indices):  # none is scored: check_ledger says so
            continue
        other, _ = bench.run(path, changed_ids(val, np.array(indices)))
        first = min(base.call_of[i] for i in indices if i in base.call_of)
        free = free_of(indices, val)
        # tables of n-grams know the stream: to them only what stands before the change is earlier
        horizon = min(indices) if remembers(bench.cfg, path) else len(val.ids)
        moved = [i for i in order if i < horizon and base.losses[i] != other.losses.get(i) and (
            base.call_of[i] < first or base.call_of[i] == first and free[i])]
        if moved:
            found.append(Finding(
                f"causality ({path})", f"changing {what} changes the score of "
                f"{place(moved[0], val)}, given before ({len(moved)} scores in all)",
                SETTINGS_OF[path], "let a score depend on the artifact and earlier tokens only"))
    return found


def check_ledger(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """Every target once, learnt from only afterwards; bytes and targets are the data's."""
    ledger, _ = bench.run(path, val)
    _, score = bench.run(path, val, follow=False)
    check, found = f"ledger ({path})", []
    for index, problem in ledger.problems[:3]:
        found.append(Finding(check, f"{place(index, val)}: {problem}", SETTINGS_OF[path],
                             "score every target once, then learn from it"))
    left = [i for i in range(1, len(val.ids)) if i not in ledger.losses]
    if left:
        found.append(Finding(check, f"{place(left[0], val)} is not scored ({len(left)} in all)",
                             SETTINGS_OF[path], "score the whole set"))
    want = int(val.bytes[1:].sum()), len(val.ids) - 1
    if (score.bytes, score.tokens) != want:
        found.append(Finding(
            check, f"{score.tokens} targets and {score.bytes} bytes counted, the data has "
            f"{want[1]} and {want[0]}", SETTINGS_OF[path], "take bytes from the sidecar alone"))
    nats = sum(ledger.losses.values())
    bpb = nats / math.log(2) / max(want[0], 1)
    if not math.isclose(score.bpb, bpb, rel_tol=1e-6):
        found.append(Finding(check, f"BPB {score.bpb:.8f} reported, the ledger says {bpb:.8f}",
                             SETTINGS_OF[path], "let Meter alone compute the score"))
    return found


def check_normalisation(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """At some positions every token of the vocabulary stands as the target in turn: the scores
    given are a distribution only if their probabilities add up to one."""
    tolerance, found = TOLERANCE[bench.rt.dtype], []
    cfg = replace(bench.cfg, phased_ttt_prefix_docs=0, ttt_batch_size=64)
    starts = [begin for begin, end in val.documents() if end - begin > 12]
    for begin in starts[:2] if path == "ttt" else starts[:1]:
        prefix = val.ids[begin:begin + 9]
        total = math.fsum(math.exp(-x) for x in at_once(bench, path, cfg, prefix))
        if abs(total - 1) > tolerance:  # an evaluation that remembers documents sees them alone
            total = one_by_one(bench, path, cfg, prefix)
        if total is not None and abs(total - 1) > tolerance:
            found.append(Finding(
                f"normalisation ({path})", f"after {place(begin + 8, val)} the probabilities of "
                f"all {cfg.vocab_size} tokens, each as it would be scored, add up to {total:.6f}",
                SETTINGS_OF[path], "score with the entry of one normalised distribution that is "
                "fixed before the target is looked at"))
    return found


def at_once(bench: Bench, path: str, cfg: t.Config, prefix: np.ndarray) -> list[float]:
    """The score of every token after `prefix`: one document a token."""
    parts, at, length = [], [], 0
    for token in range(cfg.vocab_size):
        parts.append(prefix if token == t.BOS else np.append(prefix, token))
        at.append(length + len(prefix))
        length += len(parts[-1])
    ids = np.concatenate([*parts, [t.BOS]]).astype(np.int64)
    ledger, _ = bench.run(path, t.ValSet(ids, np.zeros(len(ids), np.int32)), cfg)
    return [ledger.losses.get(i, math.inf) for i in at]


def one_by_one(bench: Bench, path: str, cfg: t.Config, prefix: np.ndarray) -> float | None:
    """The same sum with a run a token; None if it would take too long and is not above 1 yet."""
    total, started = 0.0, time.perf_counter()
    for token in range(cfg.vocab_size):
        ids = np.append(prefix, [token, t.BOS] if token != t.BOS else [t.BOS]).astype(np.int64)
        ledger, _ = bench.run(path, t.ValSet(ids, np.zeros(len(ids), np.int32)), cfg)
        total += math.exp(-ledger.losses.get(len(prefix), math.inf))
        if time.perf_counter() - started > PATIENCE:
            return total if total > 1.001 else None
    return total


def check_target(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """Another target, the same text before it: no logit that the model puts out may differ."""
    begin, end = max(val.documents(), key=lambda doc: doc[1] - doc[0])
    ids = np.append(val.ids[begin:begin + min(20, end - 1 - begin)], t.BOS)
    seen = []
    for change in (0, 1):
        if change:
            ids = ids.copy()
            ids[-2] = next(i for i in val.ids if i not in (t.BOS, ids[-2]))
        # the last word is target only: what follows it is cut off
        seen.append(logits_of(bench, path, t.ValSet(ids[:-1], np.zeros(len(ids) - 1, np.int32))))
    unlike = len(seen[0]) != len(seen[1]) or any(
        not torch.equal(a, b) for a, b in zip(*seen, strict=True))
    if unlike:
        return [Finding(f"target independence ({path})", "the logits for the last token of a "
                        "document change when that token is another", SETTINGS_OF[path],
                        "compute the distribution before the target is looked at")]
    return []


def logits_of(bench: Bench, path: str, val: t.ValSet) -> list[torch.Tensor]:
    """What goes into the loss for every target that counts, call by call."""
    ledger = Ledger()

    def spy(original: Callable, z: torch.Tensor, *args: Any) -> torch.Tensor:
        ledger.latest = z.detach().clone()
        return original(z, *args)
    name = "softcap_cross_entropy" + "_ref" * (not bench.cfg.fused_ce_enabled)
    with patched({name: spy}):
        bench.run(path, val, replace(bench.cfg, phased_ttt_prefix_docs=0), ledger=ledger)
    return ledger.logits


def check_isolation(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """[A, BOS, B] against [A', BOS, B]: no score of B may differ, but through n-gram tables."""
    if remembers(bench.cfg, path):
        return []
    (a, middle), (b, end) = val.documents()[:2]
    pair = t.ValSet(val.ids[a:end - 1], val.bytes[a:end - 1])
    cfg = replace(bench.cfg, phased_ttt_prefix_docs=0)
    ledgers = [bench.run(path, v, cfg)[0]
               for v in (pair, changed_ids(pair, np.arange(1, b - a)))]
    moved = [i for i in range(b - a + 1, len(pair.ids))
             if ledgers[0].losses.get(i) != ledgers[1].losses.get(i)]
    if not moved:
        return []
    return [Finding(f"document isolation ({path})", f"{place(moved[0], pair)} depends on the "
                    f"document before it ({len(moved)} scores in all)", SETTINGS_OF[path],
                    "mask at every BOS, in attention and in SmearGate")]


def check_budgets(record: dict[str, Any], folder: Path) -> list[Finding]:
    """What the run's own clock and the files on the disk say."""
    found, limit = [], min(record.get("budget_seconds") or LIMIT_SECONDS, LIMIT_SECONDS)
    trained = record.get("training", {}).get("seconds")
    if trained is not None:
        total = trained + record.get("calibration_seconds", 0.0)
        if total > limit:
            found.append(Finding("budget", f"training {trained:.1f} s with calibration {total:.1f} "
                                 f"s, of {limit:.0f}", "MAX_WALLCLOCK_SECONDS, "
                                 "GPTQ_RESERVE_SECONDS", "raise GPTQ_RESERVE_SECONDS to at least "
                                 f"{math.ceil(record.get('calibration_seconds', 0) + 1)}"))
    if "evaluation_seconds" in record:
        total = record.get("start_seconds", 0.0) + record["evaluation_seconds"]
        if total > LIMIT_SECONDS:
            found.append(Finding("budget", f"evaluation {total:.1f} s from the process's start, of "
                                 f"{LIMIT_SECONDS:.0f}", "TTT_CHUNK_SIZE, TTT_STREAM, "
                                 "PHASED_TTT_PREFIX_DOCS", "make the evaluation cheaper"))
    files = [folder / name for name in (t.ARTIFACT_FILE, t.PROGRAM_FILE)]
    missing = [path for path in files if not path.is_file()]
    size = sum(path.stat().st_size for path in files if path not in missing)
    if missing or size > LIMIT_BYTES:
        what = f"{missing[0]} is missing" if missing else f"{size:,} bytes on the disk"
        found.append(Finding("budget", what, "ARTIFACT_BUDGET_BYTES, COMPRESSOR",
                             f"ship artifact and program in {LIMIT_BYTES:,} bytes"))
    told = record.get("bytes", {}).get("total")
    if not missing and told not in (None, size):
        found.append(Finding("budget", f"{size:,} bytes on the disk, {told:,} in the log",
                             "ARTIFACT_DIR", "ship the files of this very run"))
    return found


CHECKS = (check_causality, check_target, check_normalisation, check_ledger, check_isolation)


def make_bench(cfg: t.Config, rt: t.Runtime, folder: Path) -> Bench:
    """The artifact of `folder`, alone on this rank's device."""
    path = folder / t.ARTIFACT_FILE
    if not path.is_file():
        raise t.UserError(f"{path}: no artifact; train first, or set ARTIFACT_DIR to its folder")
    alone, cfg = Quiet(0, 1, rt.device), small(cfg)
    arrays, _ = t.decode_artifact(path.read_bytes(), str(path))
    attention = t.choose_attention(rt.device, rt.dtype, cfg.attention)
    model = t.GPT(cfg, attention.function, rt.dtype).to(rt.device)
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
    return Bench(cfg, alone, model, t.dequantise(tensors, model))


def findings(bench: Bench, val: t.ValSet, out: Callable[[str], None] = print) -> list[Finding]:
    """All violations on a sample of `val`; one line for every check that passes."""
    sample, found = sample_of(val, bench.cfg), []
    for path in ("plain", "ttt") if bench.cfg.ttt_enabled else ("plain",):
        for check in CHECKS:
            started, now = time.perf_counter(), check(bench, path, sample)
            found += now
            out(f"legality: {check.__name__[6:]} ({path}): "
                f"{'VIOLATED' if now else 'holds'} {time.perf_counter() - started:.1f}s")
    return found


def audit(cfg: t.Config, rt: t.Runtime, folder: Path) -> str:
    """Every check, by rank 0; the findings go to the log, and the first one is the result."""
    found = []
    if rt.rank == 0:
        started = time.perf_counter()
        torch.use_deterministic_algorithms(True, warn_only=True)
        found = findings(make_bench(cfg, rt, folder), t.load_val(cfg), rt.log)
        torch.use_deterministic_algorithms(False)
        found += check_budgets(rt.record, folder)
        rt.record["legality"] = [str(finding) for finding in found]
        rt.log(f"legality: {json.dumps(rt.record['legality'])} "
               f"{time.perf_counter() - started:.1f}s")
    rt.barrier()
    more = f" (and {len(found) - 1} more in the log)" if len(found) > 1 else ""
    return f"illegal: {found[0]}{more}" if found else ""
