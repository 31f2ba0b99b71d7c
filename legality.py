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
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

import train_gpt as t
from submission import LIMIT_BYTES, LIMIT_SECONDS

DOCUMENTS, CHUNKS = 10, 2.5  # of the sample: how many documents, chunks of each
BUCKETS = 256  # of a hashed table: a sample fills it as the whole set fills millions


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
    """Inside, t.NAME(...) is function(the original, ...); a class's object.NAME(...) is
    function(object, the original, ...)."""
    originals = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, functools.partial(function, originals[name]) if owner is t else
                lambda self, *args, function=function, name=name, **more: function(
                    self, originals[name], *args, **more))
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
        self.latest, self.logits = None, {}  # of the last forward; of every target that counts

    def add(self, meter: t.Meter, original: Callable, losses: Any, sizes: Any, mask: Any) -> None:
        """In place of Meter.add; `sizes` holds the targets' indices."""
        self.calls += 1
        if self.latest is not None:
            rows = self.latest.flatten(0, 1)[mask.flatten()]
            self.logits.update(zip(sizes[mask].tolist(), rows, strict=True))
        for index, loss in zip(sizes[mask].tolist(), losses.detach()[mask].tolist(), strict=True):
            if index in self.losses:
                self.problems.append((index, f"scored again at version {self.version}"))
            self.losses[index], self.call_of[index] = loss, self.calls
        original(meter, losses, sizes, mask)

    def forward(self, model: t.GPT, original: Callable, ids: Any, targets: Any, segments: Any,
                looped: bool, lora: Any = None, at: Any = None, past: Any = None,
                read: Any = None) -> torch.Tensor:
        """In place of GPT.forward: the logits, by the plain product, of what it scores."""
        def keep(h: torch.Tensor) -> None:
            with torch.no_grad():
                self.latest = model.logits(h if at is None else t.pick(h, at), lora)
            if read:
                read(h)
        return original(model, ids, targets, segments, looped, lora, at, past, keep)

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


class Exact(Quiet):
    """The same, all numbers in float32."""

    dtype = torch.float32


@dataclass
class Bench:
    """The artifact and how it is scored, on samples."""

    cfg: t.Config
    rt: t.Runtime
    model: t.GPT
    weights: dict[str, torch.Tensor]

    def run(self, path: str, val: t.ValSet, cfg: t.Config | None = None, follow: bool = True,
            tables: t.ValSet | None = None, logits: bool = False) -> tuple[Ledger, t.Score]:
        """Score `val` by one path (plain or ttt) from the artifact's weights. With `follow` byte
        counts are replaced by indices; rules may look things up in another set's `tables`; with
        `logits` the ledger gets those, too."""
        cfg, ledger, model = cfg or self.cfg, Ledger(), self.model
        model.load_state_dict(self.weights)
        if follow:
            val = val._replace(bytes=np.arange(len(val.ids), dtype=np.int32))
        with contextlib.ExitStack() as stack:
            if follow:
                stack.enter_context(patched({"add": ledger.add}, t.Meter))
                stack.enter_context(patched({"learn": ledger.learn, "step": ledger.step},
                                            t.Adapter))
                stack.enter_context(patched({"train_globally": ledger.train_globally}))
            if logits:
                stack.enter_context(patched({"forward": ledger.forward}, t.GPT))
            if path == "plain":
                return ledger, t.evaluate(model, val, cfg, self.rt)
            rules = t.make_rules(cfg, self.rt, model, tables or val)
            if rules:
                rules.wait()
            return ledger, t.score_phased(model, val, cfg, self.rt, rules=rules)

    def exact(self) -> "Bench":
        """The same model in float32, by functions of PyTorch where others lack that type."""
        if self.rt.dtype == torch.float32:
            return self
        rt = Exact(0, 1, self.rt.device)
        model = t.GPT(self.cfg, t.attend_sdpa, rt.dtype).to(rt.device)
        return replace(self, rt=rt, model=model)


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
        ngram_buckets=min(cfg.ngram_buckets, BUCKETS),
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
        first = min(base.call_of[i] for i in indices if i in base.call_of)
        free, moved = free_of(indices, val), []
        # With n-gram tables as they were the rest must hold in the order of processing; those
        # themselves know the stream: to them only what stands before the change is earlier.
        runs = [(val, len(val.ids))] + [(None, min(indices))] * remembers(bench.cfg, path)
        for tables, horizon in runs:
            other, _ = bench.run(path, changed_ids(val, np.array(indices)), tables=tables)
            moved = moved or [
                i for i in order if i < horizon and base.losses[i] != other.losses.get(i) and (
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
    """After a history that was scored, every token of the vocabulary stands as the target in turn,
    in float32: the scores are a distribution only if their probabilities add up to one."""
    check, found, exact = f"normalisation ({path})", check_entries(bench, path, val), bench.exact()
    remedy = ("score with the entry of one normalised distribution that is fixed before the target "
              "is looked at")
    for stream in histories(val, bench.cfg):
        losses, ledger = (asked_plainly if path == "plain" else asked_in_ttt)(exact, stream)
        where, true = f"after {place(len(stream.ids) - 2, stream)}", int(stream.ids[-1])
        if not losses:
            found.append(Finding(check, f"{where} nothing is scored", SETTINGS_OF[path],
                                 "score every target through Adapter.score"))
            continue
        total = math.fsum(math.exp(-x) for x in losses)
        if not abs(total - 1) <= 1e-5:
            found.append(Finding(check, f"{where} the probabilities of all {len(losses)} tokens, "
                                 f"each as it would be scored, add up to {total:.6f}",
                                 SETTINGS_OF[path], remedy))
        # what was asked is what a run says: of the token that is there, and of the likeliest other
        likely = min(set(range(len(losses))) - {t.BOS, true}, key=losses.__getitem__)
        other, _ = exact.run(path, ended(stream, likely))
        for token, told in ((true, ledger), (likely, other)):
            told = told.losses.get(len(stream.ids) - 1, math.nan)
            if not abs(told - losses[token]) <= 1e-4:
                found.append(Finding(check, f"{where} token {token} scores {told:.6f} in a run and "
                                     f"{losses[token]:.6f} among all", SETTINGS_OF[path], remedy))
    return found


def check_entries(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """Without rules every loss must be -log softmax of the logits, which are computed once more,
    plainly. Two logits and a unit in the last place of each: what the run's number type leaves."""
    cfg = replace(bench.cfg, slot_enabled=False, ngram_tilt_enabled=False, ngram_mixer="")
    ledger, _ = bench.run(path, val, cfg, logits=True)
    unit = torch.finfo(bench.rt.dtype).eps
    for index, logits in ledger.logits.items():
        want = float(logits.logsumexp(0) - logits[val.ids[index]])
        if not abs(ledger.losses[index] - want) <= 1e-5 + 2 * unit * float(logits.abs().max()):
            return [Finding(f"normalisation ({path})", f"{place(index, val)} scores "
                            f"{ledger.losses[index]:.6f}, the logits say {want:.6f}",
                            SETTINGS_OF[path], "score with the softmax of the model's logits")]
    return []


def histories(val: t.ValSet, cfg: t.Config) -> Iterator[t.ValSet]:
    """Streams that end within a document, beyond a chunk, where adapters have learnt: the sample
    with its last document cut; and followed by its longest one again, which n-grams then know."""
    length, documents = max(cfg.ttt_chunk_size + 2, 20), val.documents()
    (begin, end), again = documents[-1], max(documents, key=lambda doc: doc[1] - doc[0])[0]
    for at in (np.r_[: min(end, begin + length)], np.r_[: len(val.ids), again : again + length]):
        yield t.ValSet(val.ids[at], val.bytes[at])


def ended(val: t.ValSet, token: int) -> t.ValSet:
    """The set with another last token."""
    return val._replace(ids=np.append(val.ids[:-1], token))


def asked_plainly(bench: Bench, val: t.ValSet) -> tuple[list[float], Ledger]:
    """The scores [V] of every token as the last target of `val`, and the run's ledger."""
    calls = []

    def forward(model: t.GPT, original: Callable, *args: Any) -> torch.Tensor:
        calls.append(args)
        return original(model, *args)
    with patched({"forward": forward}, t.GPT):
        ledger, _ = bench.run("plain", val)
    ids, _, *rest = calls[-1]
    place_in, losses = (len(val.ids) - 2) % (bench.cfg.val_batch_tokens // 8), []
    for tokens in torch.arange(bench.cfg.vocab_size, device=ids.device).split(64):
        with torch.no_grad():
            losses += bench.model(ids, tokens[None], *rest,
                                  at=torch.full_like(tokens, place_in)[None])[0].tolist()
    return losses, ledger


def asked_in_ttt(bench: Bench, val: t.ValSet) -> tuple[list[float], Ledger]:
    """The same of test-time training: asked when the last target is about to be scored, adapters
    and weights as they are then. A table of n-grams is made for each token as the last."""
    last, how, losses = len(val.ids) - 1, [], []

    def build(rules: t.ScoreRules, original: Callable, ids: np.ndarray, *args: Any) -> list:
        how[:] = args
        return original(rules, ids, *args)

    def score(adapter: t.Adapter, original: Callable, window: t.Window, meter: t.Meter) -> t.Scored:
        rules = adapter.rules
        for b, c in ((window.sizes == last) & window.mask).nonzero().tolist():
            kept = rules and (rules.tables, rules.count)
            for tokens in torch.arange(bench.cfg.vocab_size, device=bench.rt.device).split(64):
                rows = torch.full_like(tokens, b)
                many = {name: x[rows] for name, x in window._asdict().items()
                        if isinstance(x, torch.Tensor) and x.dim()}
                many["targets"][:, c] = tokens
                if how:  # their tables one after another
                    tables = [rules.build(ended(val, a).ids, *how) for a in tokens.tolist()]
                    rules.tables = [torch.cat(x).to(tokens.device) for x in zip(*tables)]
                    rules.count = len(tokens) * last
                    many["first"] += torch.arange(len(tokens), device=tokens.device) * last
                collect = SimpleNamespace(
                    add=lambda used, *_, c=c: losses.extend(used[:, c].tolist()))
                original(adapter, window._replace(
                    rows=rows + window.rows.start, updates=False, **many), collect)
            if rules:
                rules.tables, rules.count = kept
        return original(adapter, window, meter)
    with patched({"build": build}, t.ScoreRules), patched({"score": score}, t.Adapter):
        ledger, _ = bench.run("ttt", val)
    return losses, ledger


def check_target(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """Another target, the same text before it: no logit that the model puts out may differ."""
    begin, end = max(val.documents(), key=lambda doc: doc[1] - doc[0])
    ids = np.append(val.ids[begin:begin + min(20, end - 1 - begin)], t.BOS)
    other = next(i for i in val.ids if i not in (t.BOS, ids[-2]))
    # the last word is target only: what follows it is cut off
    seen = [bench.run(path, t.ValSet(x, np.zeros(len(x), np.int32)),
                      replace(bench.cfg, phased_ttt_prefix_docs=0), logits=True)[0].logits
            for x in (ids[:-1], np.append(ids[:-2], other))]
    if seen[0].keys() == seen[1].keys() and all(
            torch.equal(logits, seen[1][index]) for index, logits in seen[0].items()):
        return []
    return [Finding(f"target independence ({path})", "the logits for the last token of a "
                    "document change when that token is another", SETTINGS_OF[path],
                    "compute the distribution before the target is looked at")]


def check_isolation(bench: Bench, path: str, val: t.ValSet) -> list[Finding]:
    """[A, BOS, B] against [A', BOS, B]: no score of B may differ. Tables of n-grams, which may
    remember A, are those of [A, BOS, B] in both."""
    (a, middle), (b, end) = val.documents()[:2]
    pair = t.ValSet(val.ids[a:end - 1], val.bytes[a:end - 1])
    cfg = replace(bench.cfg, phased_ttt_prefix_docs=0)
    ledgers = [bench.run(path, v, cfg, tables=pair)[0]
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
    if remembers(bench.cfg, "ttt"):
        out("legality: n-gram tables may remember documents, in the stream's order: isolation, and "
            "causality in the order of processing, are those of all else, with the tables held")
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
