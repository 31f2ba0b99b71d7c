"""Is the score legal? `python train_gpt.py audit`, or LEGALITY_CHECK=1 for a whole run.

Two parts. `guard` stands around a run and refuses data where it may not be read. `audit` scores a
sample of the real validation set with the artifact that was written, many times over, through the
program's own functions, changes what may not matter and compares the bits. It knows nothing of how
a score comes about: a target's index travels in place of its byte count through the evaluation to
`Meter.add`, so any path to the score can be followed. docs/legality.md lists what is caught."""

import contextlib
import functools
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import finished
import train_gpt as t
from submission import LIMIT_BYTES, LIMIT_SECONDS

DOCUMENTS, CHUNKS = 10, 2.5  # of the sample: how many documents, chunks of each
CUTS = 8  # of the coding order, behind which all is changed
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

        def guarded(g: int) -> t.PackedBatch:
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
        self.places: dict[int, int] = {}  # in the coding order, as the score was given
        self.call_of: dict[int, int] = {}
        self.calls, self.version, self.problems = 0, 0, []
        self.latest, self.logits = None, {}  # of the last forward; of every target that counts

    def add(self, meter: t.Meter, original: Callable, losses: Any, sizes: Any, mask: Any,
            place: Any = None) -> None:
        """In place of Meter.add; `sizes` holds the targets' indices."""
        self.calls += 1
        if self.latest is not None:
            rows = self.latest.flatten(0, 1)[mask.flatten()]
            self.logits.update(zip(sizes[mask].tolist(), rows, strict=True))
        for index, loss in zip(sizes[mask].tolist(), losses.detach()[mask].tolist(), strict=True):
            if index in self.losses:
                self.problems.append((index, f"scored again at version {self.version}"))
            self.losses[index], self.call_of[index] = loss, self.calls
        if place is not None:
            at = place[..., None] + torch.arange(sizes.shape[-1], device=place.device)
            self.places.update(zip(sizes[mask].tolist(), at[mask].tolist(), strict=True))
        original(meter, losses, sizes, mask, place)

    def forward(self, model: t.GPT, original: Callable, ids: Any, targets: Any, segments: Any,
                looped: bool, lora: Any = None, positions: Any = None, kv_cache: Any = None,
                on_hidden: Any = None) -> torch.Tensor:
        """In place of GPT.forward: the logits, by the plain product, of what it scores."""
        def keep(h: torch.Tensor) -> None:
            scored = h if positions is None else t.gather_positions(h, positions)
            with torch.no_grad():
                self.latest = model.logits(scored, lora)
            if on_hidden:
                on_hidden(h)
        return original(model, ids, targets, segments, looped, lora, positions, kv_cache, keep)

    def learn(self, adapter: t.LoraTTT, original: Callable, scored: t.Scored) -> None:
        """In place of LoraTTT.learn: the gradient of targets that must be in the ledger."""
        chunk_batch = scored.chunk_batch
        self.need(chunk_batch.sizes[chunk_batch.mask].tolist(), "an adapter")
        original(adapter, scored)

    def step(self, adapter: t.LoraTTT, original: Callable) -> None:
        self.version += 1
        original(adapter)

    def global_sgd_phase(self, original: Callable, model: Any, documents: Any, val: t.ValSet,
                         *args: Any) -> int:
        """In place of global_sgd_phase: documents whose targets must be in the ledger."""
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
        counts are replaced by indices; an adjustment may use another set's `tables`; with
        `logits` the ledger gets those, too."""
        cfg, ledger, model = cfg or self.cfg, Ledger(), self.model
        model.load_state_dict(self.weights)
        if follow:
            val = val._replace(bytes=np.arange(len(val.ids), dtype=np.int32))
        spies = [(t.Meter, "add"), (t.LoraTTT, "learn"), (t.LoraTTT, "step"),
                 (t, "global_sgd_phase")] * follow + [(t.GPT, "forward")] * logits
        with contextlib.ExitStack() as stack:
            for owner, name in spies:
                stack.enter_context(patched({name: getattr(ledger, name)}, owner))
            if path == "plain":
                return ledger, t.evaluate(model, val, cfg, self.rt)
            adjustment = t.make_adjustment(cfg, self.rt, model, tables or val)
            if adjustment:
                adjustment.wait()
            return ledger, t.score_phased(model, val, cfg, self.rt, adjustment=adjustment)

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
    stride = max(1, len(documents) // DOCUMENTS)
    for n, (begin, end) in enumerate(documents[::stride][:DOCUMENTS]):
        parts.append(np.arange(begin, min(end - 1, begin + length - n)))
    if len(parts) < 2:
        raise t.UserError("audit: the validation set has fewer than 2 documents; add documents")
    at = np.concatenate(parts)
    return t.ValSet(val.ids[at], val.bytes[at])


def small(cfg: t.Config) -> t.Config:
    """The evaluation that the settings choose, at the sample's size: fewer documents a batch and
    in the phases, shorter rows, a context that documents outgrow. What else decides about a
    token's score stays as it is."""
    docs = 6 if cfg.phased_ttt_prefix_docs else 0
    longest = 2 * max(cfg.ttt_chunk_size, *(int(chunk) for _, chunk in cfg.short_chunks), 1)
    return replace(
        cfg, compile=False, checkpoint_every_seconds=0.0, ttt_batch_size=2,
        phased_ttt_prefix_docs=docs, phased_ttt_num_phases=2, eval_seq_len=32,
        global_ttt_chunk_tokens=64, global_ttt_batch_seqs=2, ngram_min_tokens=0,
        ttt_eval_seq_len=min(cfg.ttt_eval_seq_len, longest),
        ngram_buckets=min(cfg.ngram_buckets, BUCKETS), slot_context=min(cfg.slot_context, 16),
        val_batch_tokens=8 * int(3 * CHUNKS * cfg.ttt_chunk_size))


def remembers(cfg: t.Config, path: str) -> bool:
    """Whether scores may depend on earlier documents, whose n-grams are kept."""
    return path == "ttt" and bool(cfg.ngram_tilt_enabled or cfg.ngram_mixer)


def place(index: int, val: t.ValSet) -> str:
    """A target of the sample, for messages."""
    number = int((val.ids[:index + 1] == t.BOS).sum()) - 1
    begin = int(np.flatnonzero(val.ids[:index + 1] == t.BOS)[-1])
    return f"target {index} (document {number} of the sample, token {index - begin})"


Said = Iterator[tuple[str, str]]  # what a check yields: (where and what, the remedy)
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


def check_causality(bench: Bench, path: str, val: t.ValSet) -> Said:
    """Change later tokens: whatever was scored before one of them is read must not move a bit."""
    base, _ = bench.run(path, val)
    order = sorted(base.call_of, key=lambda i: (base.call_of[i], i))
    text = [i for i in order if val.ids[i] != t.BOS]
    if not text:
        yield "nothing was scored", "score every target through Meter.add"
        return
    doc = np.cumsum(val.ids == t.BOS)
    first_doc, last_doc = ([i for i in text if doc[i] == doc[text[end]]] for end in (0, -1))
    half = len(val.ids) // 2
    changes = {
        "a later token of the first document": [first_doc[int(0.6 * len(first_doc))]],
        "a target in the middle": [text[len(text) // 2]],
        "the last document in processing order": last_doc,
        "the suffix of the stream": [i for i in range(half, len(val.ids)) if val.ids[i] != t.BOS]}
    for what, indices in changes.items():
        first = min((base.call_of[i] for i in indices if i in base.call_of), default=0)
        free = free_of(indices, val)
        # n-gram tables as they were: those go by the coding order, see check_order
        other, _ = bench.run(path, changed_ids(val, np.array(indices)), tables=val)
        moved = [i for i in order if base.losses[i] != other.losses.get(i) and (
            base.call_of[i] < first or base.call_of[i] == first and free[i])]
        if moved:
            yield (f"changing {what} changes the score of {place(moved[0], val)}, given before "
                   f"({len(moved)} scores in all)",
                   "let a score depend on the artifact and earlier tokens only")


def with_copies(val: t.ValSet) -> t.ValSet:
    """The first documents of the sample twice, to a quarter cut off once: those at even places
    short before long, the others long before short. N-grams of one copy speak about the other."""
    parts, documents = [], val.documents()[: DOCUMENTS // 2]
    for copy in (0, 1):
        for n, (begin, end) in enumerate(documents):
            text = np.arange(begin, end - (val.ids[end - 1] == t.BOS))
            parts.append(text[: max(2, len(text) * (3 + (n + copy) % 2) // 4)])
    at = np.concatenate(parts)
    return t.ValSet(val.ids[at], val.bytes[at])


def check_order(bench: Bench, path: str, val: t.ValSet) -> Said:
    """Change one token and make everything anew, n-gram tables too: the coding order is the same,
    and every score placed before that token is, too, bit for bit (a call of all ranks)."""
    val = with_copies(val)
    losses, places = in_order(bench, path, val)
    if len(set(places.values())) != len(val.ids) - 1:
        yield (f"{len(set(places.values()))} places in the coding order for {len(val.ids) - 1} "
               "targets", "give Meter.add every target's place")
        return
    documents = [doc for begin, end in val.documents()
                 if (doc := range(begin + 1, end - (val.ids[end - 1] == t.BOS)))]
    ranked = sorted(documents, key=lambda doc: places[doc[0]])
    sized = sorted(ranked, key=len)
    changes = {ranked[0][0]: "the document that comes first", ranked[0][-1]: "the same",
               ranked[-1][-1]: "the document that comes last", sized[0][-1]: "the shortest",
               sized[-1][-1]: "the longest", documents[0][-1]: "the first of the stream",
               documents[-1][0]: "the last of the stream", documents[-1][-1]: "the same"}
    for index, what in changes.items():
        other, moved = in_order(bench, path, changed_ids(val, np.array([index])))
        if moved != places:
            yield (f"changing {place(index, val)} of {what} changes the coding order",
                   "let it depend on document lengths, settings and world size only")
        early = [i for i in losses if places[i] < places[index] and losses[i] != other.get(i)]
        if early:
            yield (f"changing {place(index, val)} of {what} changes the score of "
                   f"{place(early[0], val)}, placed before it ({len(early)} scores in all)",
                   "build tables over the coding order, and carry state along it only")
    rng, text = np.random.default_rng(0), np.unique(val.ids[val.ids != t.BOS])
    by_place = np.array(sorted(places, key=places.get))
    for cut in np.linspace(0, len(by_place), CUTS, endpoint=False, dtype=int):
        later, ids = by_place[cut:][val.ids[by_place[cut:]] != t.BOS], val.ids.copy()
        ids[later] = rng.choice(text, len(later))
        other, moved = in_order(bench, path, val._replace(ids=ids))
        where = f"changing all from {place(int(by_place[cut]), val)} on, in the coding order,"
        if moved != places:
            yield (f"{where} changes that order",
                   "let it depend on document lengths, settings and world size only")
        early = [int(i) for i in by_place[:cut] if losses[i] != other.get(i)]
        if early:
            yield (f"{where} changes the score of {place(early[0], val)}, placed before it "
                   f"({len(early)} scores in all)",
                   "let a score depend on the artifact and what is placed before it only")


def in_order(bench: Bench, path: str, val: t.ValSet) -> tuple[dict[int, float], dict[int, int]]:
    """Losses and places by target of all ranks (a call of all ranks)."""
    ledger, _ = bench.run(path, val)
    parts = [(ledger.losses, ledger.places)]
    if bench.rt.world > 1:
        parts = [None] * bench.rt.world
        dist.all_gather_object(parts, (ledger.losses, ledger.places))
    return tuple({i: x for part in parts for i, x in part[k].items()} for k in (0, 1))


def check_ledger(bench: Bench, path: str, val: t.ValSet) -> Said:
    """Every target once, learnt from only afterwards; bytes and targets are the data's."""
    ledger, _ = bench.run(path, val)
    _, score = bench.run(path, val, follow=False)
    for index, problem in ledger.problems[:3]:
        yield f"{place(index, val)}: {problem}", "score every target once, then learn from it"
    left = [i for i in range(1, len(val.ids)) if i not in ledger.losses]
    if left:
        yield f"{place(left[0], val)} is not scored ({len(left)} in all)", "score the whole set"
    size, count = int(val.bytes[1:].sum()), len(val.ids) - 1
    if (score.bytes, score.tokens) != (size, count):
        yield (f"{score.tokens} targets and {score.bytes} bytes counted, the data has {count} and "
               f"{size}", "take bytes from the sidecar alone")
    bpb = sum(ledger.losses.values()) / math.log(2) / max(size, 1)
    if not math.isclose(score.bpb, bpb, rel_tol=1e-6):
        yield (f"BPB {score.bpb:.8f} reported, the ledger says {bpb:.8f}",
               "let Meter alone compute the score")


def check_normalisation(bench: Bench, path: str, val: t.ValSet) -> Said:
    """After a history that was scored, every token of the vocabulary stands as the target in turn,
    in float32: the scores are a distribution only if their probabilities add up to one."""
    yield from check_entries(bench, path, val)
    exact, ask = bench.exact(), asked_plainly if path == "plain" else asked_in_ttt
    remedy = ("score with the entry of one normalised distribution that is fixed before the target "
              "is looked at")
    for stream in histories(val, bench.cfg, path):
        losses, ledger = ask(exact, stream)
        last, true = len(stream.ids) - 1, int(stream.ids[-1])
        where = f"after {place(last - 1, stream)}"
        if not losses:
            yield f"{where} nothing is scored", "score all, by evaluate or through LoraTTT.score"
            continue
        total = math.fsum(math.exp(-x) for x in losses)
        if not abs(total - 1) <= 1e-5:
            yield (f"{where} the probabilities of all {len(losses)} tokens, each as it would be "
                   f"scored, add up to {total:.6f}", remedy)
        # what was asked is what a run says: of the token that is there, and of the likeliest other
        likely = min(set(range(len(losses))) - {t.BOS, true}, key=losses.__getitem__)
        other, _ = exact.run(path, ended(stream, likely))
        for token, run in ((true, ledger), (likely, other)):
            told = run.losses.get(last, math.nan)
            if not abs(told - losses[token]) <= 1e-3:
                yield (f"{where} token {token} scores {told:.6f} in a run and "
                       f"{losses[token]:.6f} among all", remedy)


def check_entries(bench: Bench, path: str, val: t.ValSet) -> Said:
    """Unadjusted, every loss must be -log softmax of the logits, which are computed once more,
    plainly: up to a unit in the last place of two logits, in the evaluation's own number type."""
    cfg = replace(bench.cfg, slot_enabled=False, ngram_tilt_enabled=False, ngram_mixer="")
    ledger, _ = bench.run(path, val, cfg, logits=True)
    unit = torch.finfo(bench.rt.dtype).eps
    for index, logits in ledger.logits.items():
        told, want = ledger.losses[index], float(logits.logsumexp(0) - logits[val.ids[index]])
        if not abs(told - want) <= 1e-5 + 2 * unit * float(logits.abs().max()):
            yield (f"{place(index, val)} scores {told:.6f}, the logits say {want:.6f}",
                   "score with the softmax of the model's logits")
            return


def histories(val: t.ValSet, cfg: t.Config, path: str) -> Iterator[t.ValSet]:
    """Streams that end within a document, beyond a chunk, where adapters have learnt: the sample
    with its last document cut; for n-grams also followed by its longest, which they then know."""
    length, documents = max(cfg.ttt_chunk_size + 2, 20), val.documents()
    (begin, end), again = documents[-1], max(documents, key=lambda doc: doc[1] - doc[0])[0]
    ends = [np.r_[: min(end, begin + length)], np.r_[: len(val.ids), again : again + length]]
    for at in ends[: 1 + remembers(cfg, path)]:
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
    if len(val.ids) - 1 not in ledger.losses:
        return [], ledger
    ids, _, *rest = calls[-1]
    place_in, losses = (len(val.ids) - 2) % (bench.cfg.val_batch_tokens // 8), []
    for tokens in torch.arange(bench.cfg.vocab_size, device=ids.device).split(64):
        with torch.no_grad():
            losses += bench.model(ids, tokens[None], *rest,
                                  positions=torch.full_like(tokens, place_in)[None])[0].tolist()
    return losses, ledger


def asked_in_ttt(bench: Bench, val: t.ValSet) -> tuple[list[float], Ledger]:
    """The same of test-time training: asked when the last target is about to be scored, adapters
    and weights as they are then. A table of n-grams is made for each token as the last."""
    last, losses = len(val.ids) - 1, []

    def score(adapter: t.LoraTTT, original: Callable, chunk_batch: t.ChunkBatch,
              meter: t.Meter) -> t.Scored:
        adjustment = adapter.adjustment
        for b, c in ((chunk_batch.sizes == last) & chunk_batch.mask).nonzero().tolist():
            kept = adjustment and (adjustment.tables, adjustment.count)
            losses.clear()
            for tokens in torch.arange(bench.cfg.vocab_size, device=bench.rt.device).split(64):
                rows = torch.full_like(tokens, b)
                many = {name: x[rows] for name, x in chunk_batch._asdict().items()
                        if isinstance(x, torch.Tensor) and x.dim()}
                many["targets"][:, c] = tokens
                if adjustment and adjustment.kinds:  # their tables one after another
                    tables = [[x[:last] for x in adjustment.build(ended(val, a))]
                              for a in tokens.tolist()]
                    adjustment.tables = [torch.cat(x).to(tokens.device) for x in zip(*tables)]
                    adjustment.count = len(tokens) * last
                    many["place"] += torch.arange(len(tokens), device=tokens.device) * last
                collect = SimpleNamespace(
                    add=lambda used, *_, c=c: losses.extend(used[:, c].tolist()))
                original(adapter, chunk_batch._replace(
                    docs=rows + chunk_batch.docs.start, updates=False, **many), collect)
            if adjustment:
                adjustment.tables, adjustment.count = kept
        return original(adapter, chunk_batch, meter)
    with patched({"score": score}, t.LoraTTT):
        ledger, _ = bench.run("ttt", val)
    return losses, ledger


def check_target(bench: Bench, path: str, val: t.ValSet) -> Said:
    """Another target, the same text before it: no logit that the model puts out may differ."""
    begin, end = max(val.documents(), key=lambda doc: doc[1] - doc[0])
    ids = np.append(val.ids[begin:begin + min(20, end - 1 - begin)], t.BOS)
    other = next(i for i in val.ids if i not in (t.BOS, ids[-2]))
    # the last word is target only: what follows it is cut off
    seen = [bench.run(path, t.ValSet(x, np.zeros(len(x), np.int32)),
                      replace(bench.cfg, phased_ttt_prefix_docs=0), logits=True)[0].logits
            for x in (ids[:-1], np.append(ids[:-2], other))]
    if seen[0].keys() != seen[1].keys() or not all(
            torch.equal(logits, seen[1][index]) for index, logits in seen[0].items()):
        yield ("the logits for the last token of a document change when that token is another",
               "compute the distribution before the target is looked at")


def check_isolation(bench: Bench, path: str, val: t.ValSet) -> Said:
    """[A, BOS, B] against [A', BOS, B]: no score of B may differ. Tables of n-grams, which may
    remember A, are those of [A, BOS, B] in both."""
    (a, middle), (b, end) = val.documents()[:2]
    pair = t.ValSet(val.ids[a:end - 1], val.bytes[a:end - 1])
    cfg = replace(bench.cfg, phased_ttt_prefix_docs=0)
    ledgers = [bench.run(path, v, cfg, tables=pair)[0]
               for v in (pair, changed_ids(pair, np.arange(1, b - a)))]
    moved = [i for i in range(b - a + 1, len(pair.ids))
             if ledgers[0].losses.get(i) != ledgers[1].losses.get(i)]
    if moved:
        yield (f"{place(moved[0], pair)} depends on the document before it ({len(moved)} scores in "
               "all)", "mask at every BOS, in attention and in SmearGate")


def check_budgets(record: dict[str, Any], folder: Path) -> Iterator[Finding]:
    """What the run's own clock and the files on the disk say."""
    limit = min(record.get("budget_seconds") or LIMIT_SECONDS, LIMIT_SECONDS)
    trained = record.get("training", {}).get("seconds", 0.0)
    calibrated = record.get("calibration_seconds", 0.0)
    if trained + calibrated > limit:
        yield Finding("budget", f"training {trained:.1f} s with calibration "
                      f"{trained + calibrated:.1f} s, of {limit:.0f}",
                      "MAX_WALLCLOCK_SECONDS, GPTQ_RESERVE_SECONDS",
                      f"raise GPTQ_RESERVE_SECONDS to at least {math.ceil(calibrated + 1)}")
    total = record.get("start_seconds", 0.0) + record.get("evaluation_seconds", 0.0)
    if total > LIMIT_SECONDS:
        yield Finding("budget", f"evaluation {total:.1f} s from the process's start, of "
                      f"{LIMIT_SECONDS:.0f}", "TTT_CHUNK_SIZE, TTT_STREAM, PHASED_TTT_PREFIX_DOCS",
                      "make the evaluation cheaper")
    files = [folder / name for name in (t.ARTIFACT_FILE, t.PROGRAM_FILE)]
    missing = [f"{path} is missing" for path in files if not path.is_file()]
    size = 0 if missing else sum(path.stat().st_size for path in files)
    if missing or size > LIMIT_BYTES:
        yield Finding("budget", missing[0] if missing else f"{size:,} bytes on the disk",
                      "ARTIFACT_BUDGET_BYTES, COMPRESSOR",
                      f"ship artifact and program in {LIMIT_BYTES:,} bytes")
    told = record.get("bytes", {}).get("total", size)
    if not missing and told != size:
        yield Finding("budget", f"{size:,} bytes on the disk, {told:,} in the log",
                      "ARTIFACT_DIR", "ship the files of this very run")


CHECKS = {"causality": check_causality, "target independence": check_target,
          "normalisation": check_normalisation, "ledger": check_ledger,
          "document isolation": check_isolation, "one order": check_order}


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


def findings(bench: Bench, val: t.ValSet, out: Callable[[str], None] = print,
             rt: t.Runtime | None = None) -> list[Finding]:
    """All violations on a sample of `val`; one line for every check. With a runtime its ranks score
    the sample together where the order is checked; the rest is rank 0's."""
    sample, found = sample_of(val, bench.cfg), []
    together = replace(bench, rt=Quiet(rt.rank, rt.world, rt.device)) if rt else bench
    if remembers(bench.cfg, "ttt"):
        out("legality: n-gram tables may remember documents, in the coding order: isolation, and "
            "causality in the order of processing, are those of all else, with the tables held")
    for path in ("plain", "ttt") if bench.cfg.ttt_enabled else ("plain",):
        for name, check in CHECKS.items():
            if together.rt.rank and check is not check_order:
                continue
            started, label = time.perf_counter(), f"{name} ({path})"
            now = [Finding(label, where, SETTINGS_OF[path], remedy) for where, remedy in
                   check(together if check is check_order else bench, path, sample)]
            found += now
            out(f"legality: {label}: {'VIOLATED' if now else 'holds'} "
                f"{time.perf_counter() - started:.1f}s")
    return found


def audit(cfg: t.Config, rt: t.Runtime, folder: Path, alone: bool) -> str:
    """Every check (a call of all ranks). The findings go to the log; the first is the result.
    alone: this process only audits; times and sizes are those that the artifact's own log tells."""
    started, checks = time.perf_counter(), []

    def out(line: str) -> None:
        checks.extend(re.findall(r": (holds|VIOLATED)\b", line))
        rt.log(line)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is meant where it is asked for
    found = findings(make_bench(cfg, rt, folder), t.load_val(cfg), out, rt)
    torch.use_deterministic_algorithms(False)
    if rt.rank == 0:
        record = finished.record(folder) if alone else rt.record
        spent = list(check_budgets(record, folder))
        out(f"legality: budget: {'VIOLATED' if spent else 'holds'}"
            + ("" if record else " for the sizes; no log of this artifact tells the times"))
        found += spent
        rt.record["legality"] = [str(finding) for finding in found]
        for line in rt.record["legality"]:
            rt.log(f"legality: found: {line}")
        rt.log(f"legality: {checks.count('holds')} of {len(checks)} checks hold "
               f"{time.perf_counter() - started:.1f}s")
    rt.barrier()
    if not found or rt.rank:
        return ""
    more = f" (and {len(found) - 1} more in the log)" if len(found) > 1 else ""
    return f"illegal: {found[0]}{more}"
