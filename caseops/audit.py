"""Is a directory of shards sound, and does training hold what is scored?

Works on any set of shards of this format, with or without a manifest. Checked are headers, sizes,
numbering, ids, the byte sidecar, the manifest's hashes, identical files, and the overlap of the
splits (`caseops.overlap`). A line of the report begins with `ok:`, `note:` (worth knowing, not
wrong), `error:` or `LEAK:`; the last line is the verdict.

What counts as a leak:

- every validation document of SHORT tokens or more that stands in training token for token. One is
  enough: whether it came by the source's own repetitions or by a wrong split, its score is not that
  of unseen text. The report says which of the two it looks like: the documents of a wrong split
  stand in training in the same order, repetitions are scattered.
- shorter whole documents ("Page not found") and near-duplicates (`overlap.NEAR`) where they are
  more than TOLERATED of the validation documents, or stand in training in the same order; text of
  one source always has some (pages made from one template). All are reported.
- an empty document never.
"""

import contextlib
import dataclasses
import filecmp
import re
from pathlib import Path

import numpy as np
import sentencepiece

import lossless_caps as caps
from caseops import BOS, COUNT_LIMIT, SPACE_MARK, UserError, overlap
from caseops.export import Loss, decode_documents, open_tokenizer, sidecar
from caseops.shards import file_sha256
from caseops.splits import (
    Split,
    document_spans,
    find_shards,
    find_tokenizer,
    read_manifest,
    sequence_problems,
    shard_directory,
)

SHORT = 16  # tokens with BOS, about 40 bytes
TOLERATED = 0.02  # of the validation documents
LISTED = 20
MISCOUNTED = 0.1  # of the tokens of known bytes: fullwidth letters and ligatures may have others
ZEROS = 4096  # tokens in a row that cannot all be without bytes
SAMPLED = 2000  # validation documents decoded to see what the tokenizer loses
# The challenge's validation set in the published tokenizer (system.md §1), and what a split of
# 10,000 shows in the logs (9,662,464 targets, whole sequences of 2,048; the rules, §1.7 row 7).
FULL_DOCUMENTS, FULL_TOKENS, FULL_BYTES = 50_000, 47_853_344, 151_074_309
TEN_THOUSAND_TARGETS = 9_662_464


@dataclasses.dataclass
class Finding:
    """A validation document that stands in training. `document` and `number` count from 0 in
    their split; `tokens` with BOS; `size` in original bytes (0 without a sidecar); `share` of
    its shingles found in the training document, which begins in the file `shard`."""

    document: int
    tokens: int
    size: int
    number: int
    shard: str
    share: float
    text: str = ""


def ordered_runs(findings):
    """[(documents, first, last, shift)] where validation documents stand in training in the same
    order: their numbers there less their own are all `shift`. Most documents first, at most three.

    That is how documents of a wrong split stand; repetitions in a source do not.
    """
    documents = np.array([f.document for f in findings])
    shift = np.array([f.number for f in findings]) - documents
    shifts, counts = np.unique(shift, return_counts=True)
    runs = []
    for i in np.argsort(-counts, kind="stable")[:3]:
        if counts[i] >= max(3, len(findings) // 20):
            there = documents[shift == shifts[i]]
            runs.append((int(counts[i]), int(there.min()), int(there.max()), int(shifts[i])))
    return runs


def audit(folder, *, tokenizer=None, val=None, out=print, progress=None):
    """Check the shards in `folder` (or somewhere below it); the Report, also told to `out`.

    `val`: take the validation shards from this directory, or this one file, instead. `tokenizer`
    overrules the one found beside the shards; without one the vocabulary is unknown and no words
    are shown. `progress(bytes done, bytes in all)` is called now and then. Raises UserError where
    there is nothing to compare, and OSError.
    """
    folder = shard_directory(folder)
    shards, homes = find_shards(folder), {folder}
    if val is not None:
        home, own = _validation_of(val)
        homes.add(home)
        shards |= own
    for name in ("train", "val"):
        if not any(s.tokens for s in shards[name]):
            wrong = next((f"; {s.path.name}: {s.problem}" for s in shards[name]), "")
            raise UserError(f"{folder}: no {name} shards that can be read{wrong}; give the "
                            "directory that holds both splits, or the other one with --val")
    report = Report(folder, shards, {h: read_manifest(h) for h in homes}, out, progress)
    report.open_tokenizer(tokenizer)
    report.check_files()
    report.read_validation()
    report.check_blanks()
    report.search_training()
    report.check_hashes()
    report.tell_overlap()
    report.tell_loss()
    report.verdict()
    return report


def _validation_of(path):
    """(directory, {"val": [Shard], "val_bytes": [Shard]}) of the place given as --val."""
    path = Path(path)
    home = path.parent if path.is_file() else shard_directory(path)
    shards = find_shards(home)
    if path.is_file():
        one = [s for s in shards["val"] if s.path.name == path.name]
        if not one:
            raise UserError(f"{path}: not named like a validation shard (fineweb_val_000000.bin); "
                            "rename it, or give its directory")
        counts = [s for s in shards["val_bytes"] if s.index == one[0].index]
        # As shard 0, so that the others are not missed.
        shards["val"], shards["val_bytes"] = (
            [dataclasses.replace(s, index=0) for s in group] for group in (one, counts))
    return home, {k: shards[k] for k in ("val", "val_bytes")}


class _Tokens:
    """Looks at every token of one split for ids that have no business there."""

    def __init__(self, vocabulary, textless, progress):
        self.vocabulary, self.textless, self.progress = vocabulary, textless, progress
        self.highest = 0
        self.special = {}  # shard: how many ids without text but BOS
        self.too_high = {}  # shard: its highest id, where that is no piece

    def watch(self, pieces):
        """The pieces of a Split, each looked at as it passes."""
        for shard, tokens in pieces:
            name = shard.path.name
            low = tokens[tokens < 4]
            if n := int(np.isin(low[low != BOS], self.textless).sum()):
                self.special[name] = self.special.get(name, 0) + n
            highest = int(tokens.max())
            self.highest = max(self.highest, highest)
            if self.vocabulary and highest >= self.vocabulary:
                self.too_high[name] = max(highest, self.too_high.get(name, 0))
            self.progress(2 * len(tokens))
            yield shard, tokens


class Report:
    """One audit: what it found, told to `out` as it goes. `exit_code` is 1 on a leak or a problem,
    else 0. The methods after those are its steps, in the order in which `audit` takes them."""

    def __init__(self, folder, shards, manifests, out, progress):
        self.folder, self.shards, self.manifests, self.out = folder, shards, manifests, out
        self.figures = {}
        self.problems, self.notes, self.patterns = [], [], []
        self.whole, self.short, self.near = [], [], []  # Findings
        self.counts = None
        self.digests = {}  # file name: sha256
        self.splits = {name: Split(shards[name]) for name in ("train", "val")}
        self.done, self.total = 0, 2 * sum(map(len, self.splits.values()))
        self.progress = progress

    def leaking(self, findings):
        """Whether one of the lists `whole`, `short`, `near` is a leak: the module's docstring."""
        few = TOLERATED * self.figures["val_documents"]
        return bool(findings) and (findings is self.whole or len(findings) > few
                                   or bool(ordered_runs(findings)))

    @property
    def leaks(self):
        """How many validation documents leak."""
        return sum(len(x) for x in (self.whole, self.short, self.near) if self.leaking(x))

    @property
    def exit_code(self):
        """For the command line."""
        return int(bool(self.leaks or self.problems))

    def error(self, line):
        """Something is wrong."""
        self.problems.append(line)
        self.out(f"error: {line}")

    def note(self, line):
        """Worth knowing, not wrong."""
        self.notes.append(line)
        self.out(f"note: {line}")

    def ok(self, line):
        """Looked at and found right."""
        self.out(f"ok: {line}")

    def _advance(self, size):
        self.done += size
        if self.progress:
            self.progress(self.done, self.total)

    # ---- the files -------------------------------------------------------------------------------

    def open_tokenizer(self, given):
        """The tokenizer, if there is one, and the size of the vocabulary, if anything tells it."""
        manifest = self.manifests[self.folder]
        entry = manifest["tokenizer"]
        self.encoder = self.sp = None
        self.path = path = given or find_tokenizer(self.folder, manifest)
        try:
            self.encoder = open_tokenizer(path) if path else None
        except UserError as e:
            if given:
                raise
            self.note(f"tokenizer not used: {e}")
            with contextlib.suppress(RuntimeError, OSError):  # another scheme, not CaseOps
                self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        named = re.search(r"sp(\d+)(?!\d)", self.folder.name)
        self.vocabulary = int(named[1]) if named else None
        if isinstance(entry.get("vocab_size"), int):
            self.vocabulary = entry["vocab_size"]
        fused = str(entry.get("file")).endswith("_fused.model")  # 0 and 2 are words' beginnings
        self.textless = [BOS, 3] if fused else [0, BOS, 2, 3]
        if self.encoder:
            self.sp, self.vocabulary = self.encoder.sp, self.encoder.size
            self.textless = self.encoder.textless
        if path and "sha256" in entry and file_sha256(path) != entry["sha256"]:
            self.error(f"{path}: not the tokenizer of the manifest (other sha256)")

    def check_files(self):
        """Headers, numbering, sidecar files, the manifest's list, files that are the same."""
        before = len(self.problems)
        for name in ("train", "val", "val_bytes", "train_bytes"):
            shards = self.shards[name]
            for problem in sequence_problems(shards):
                self.error(problem)
            sizes = [s.tokens for s in shards]
            odd = [s.path.name for s in shards[:-1] if s.tokens != max(sizes)]
            if odd:
                self.note(f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}: fewer tokens "
                          "than other shards, and not the last: joined from several preparations?")
        self._check_sidecar_files()
        self._check_manifest_list()
        self._check_identical()
        if len(self.problems) == before:
            self.ok(f"{self.folder}: {sum(map(len, self.shards.values()))} files with sound headers"
                    ", sizes and numbers")

    def _check_sidecar_files(self):
        tokens = {s.index: s for s in self.shards["val"]}
        counts = {s.index: s for s in self.shards["val_bytes"]}
        if not counts:
            self.note("no byte sidecar (*_val_bytes_*.bin): original bytes are not known")
            return
        for i, shard in tokens.items():
            if i not in counts:
                self.error(f"{shard.path.name}: no byte sidecar beside it")
            elif counts[i].tokens != shard.tokens:
                self.error(f"{counts[i].path.name}: {counts[i].tokens:,} counts for the "
                           f"{shard.tokens:,} tokens of {shard.path.name}")
        for i in sorted(counts.keys() - tokens.keys()):
            self.error(f"{counts[i].path.name}: no validation shard beside it")

    def _check_manifest_list(self):
        for home, manifest in self.manifests.items():
            here = {s.path.name: s for group in self.shards.values() for s in group
                    if s.path.parent == home}
            listed = manifest["files"]
            for name in sorted(here.keys() - listed.keys()) if listed else ():
                self.error(f"{name}: not in the manifest; it belongs to another set")
            for name, entry in listed.items():
                if name not in here:
                    if home == self.folder and (len(self.manifests) == 1 or "_val_" not in name):
                        self.error(f"{name}: in the manifest, but not here")
                elif entry.get("tokens") not in (None, here[name].tokens):
                    self.error(f"{name}: {here[name].tokens:,} tokens, but {entry['tokens']:,} in "
                               "the manifest")

    def _check_identical(self):
        """Two shards of tokens with the same content."""
        seen = {}
        for shard in self.shards["train"] + self.shards["val"]:
            if not shard.tokens:
                continue
            with open(shard.path, "rb") as f:
                key = shard.tokens, f.read(1 << 14)
            twin = next((s for s in seen.get(key, ())
                         if filecmp.cmp(s.path, shard.path, shallow=False)), None)
            if twin:
                self.error(f"{shard.path.name}: the same as {twin.path.name}")
            seen.setdefault(key, []).append(shard)

    # ---- the tokens ------------------------------------------------------------------------------

    def read_validation(self):
        """Load validation and its byte counts."""
        tokens = _Tokens(self.vocabulary, self.textless, self._advance)
        loaded, bos = overlap.load(tokens.watch(self.splits["val"].pieces(self.digests)))
        begins, ends = document_spans(bos, len(loaded))
        rate = overlap.choose_rate(len(loaded), len(self.splits["train"]))
        self.validation = overlap.Validation(loaded, begins, ends, rate)
        self.sizes = np.zeros(len(begins), np.int64)
        self.figures |= {"val_tokens": len(loaded), "val_documents": len(begins)}
        if side := sidecar(self.shards):
            self._read_sidecar(side, bos)
        self._tell_tokens("validation", "val", tokens)
        repeated = int((self.validation.first != np.arange(len(begins))).sum())
        empty = int((begins == ends).sum())
        self.figures |= {"val_repeated": repeated, "val_empty": empty}
        if repeated:
            self.note(f"{repeated:,} validation documents repeat an earlier one, {empty:,} are "
                      "empty (BOS alone)")
        self._identify()

    def _read_sidecar(self, side, bos):
        self.counts = counts = overlap.load(side.pieces(self.digests))[0]
        if wrong := int(np.count_nonzero(counts[bos])):
            self.error(f"the byte sidecar gives bytes to {wrong:,} of the {len(bos):,} BOS: it "
                       "belongs to other tokens")
        blocks = np.arange(0, max(1, len(counts) - ZEROS + 1), ZEROS)
        empty = blocks[(np.maximum.reduceat(counts, blocks) == 0)
                       & (np.maximum.reduceat(self.validation.tokens, blocks) != BOS)]
        if len(empty):
            self.error(f"the byte sidecar gives no bytes to {ZEROS:,} tokens from token "
                       f"{empty[0]:,} on, in {len(empty):,} places: it was not written to its end")
        self._compare_counts(counts)
        begins = self.validation.begins
        starts = np.maximum(begins - 1, 0)  # with the BOS, so that no stretch is empty
        self.sizes = np.add.reduceat(counts, starts, dtype=np.int64)
        self.figures["val_bytes"] = int(self.sizes.sum())

    def _compare_counts(self, counts):
        """What letters and operators weigh is known, whatever the text was (but ligatures)."""
        if not self.encoder:
            return
        known = np.full(COUNT_LIMIT, -1)
        for i in range(self.encoder.size):
            piece = self.sp.id_to_piece(i)
            if piece in caps.OPERATORS:
                known[i] = 0
            elif piece.isascii() and piece.isalpha():
                known[i] = len(piece)
        expected = known[self.validation.tokens]
        judged = max(int(np.count_nonzero(expected >= 0)), 1)
        wrong = int(np.count_nonzero((expected >= 0) & (expected != counts)))
        if wrong > MISCOUNTED * judged:
            self.error(f"the byte sidecar gives {wrong:,} of {judged:,} tokens of letters or "
                       "operators other bytes than they have: it belongs to other tokens")

    def check_blanks(self):
        """A blank is one byte, though SentencePiece's sign for it, U+2581, has three."""
        tokens, counts, sp = self.validation.tokens, self.counts, self.sp
        pieces = [sp.id_to_piece(i) for i in range(len(sp))] if sp else []
        if int(tokens.max()) >= len(pieces):
            return
        if alone := SPACE_MARK in pieces:
            if counts is None:
                return
            words = np.array([p[:1] == SPACE_MARK and p[1:].isascii() and p[1:].isalpha()
                              for p in pieces])
            at = np.flatnonzero(words[tokens])
            sizes = np.array([len(p) for p in pieces])  # with the blank as one byte
            three = counts[at] == sizes[tokens[at]] + 2
            told = f"{len(at):,} words begin with a blank"
        else:  # then a blank is its three byte pieces
            mark = [sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
            at = np.flatnonzero((tokens[:-2] == mark[0]) & (tokens[1:-1] == mark[1])
                                & (tokens[2:] == mark[2]))
            told = f"{self.path}: no piece of U+2581 alone, so {len(at):,} blanks are three byte " \
                   "pieces each (or U+2581 in the text, which looks alike)"
            if counts is None:
                self.error(f"{told}, and no sidecar says how many bytes they are: adding up pieces "
                           f"gives up to {2 * len(at):,} bytes too many")
                return
            three = sum(counts[at + k].astype(int) for k in range(3)) == 3
        wrong = np.count_nonzero(three)
        if wrong > MISCOUNTED * len(at):
            self.error(f"{told}; the byte sidecar counts {wrong:,} of these blanks as three bytes: "
                       "a blank is one")
        elif not alone:
            self.note(told)

    def _tell_tokens(self, title, name, tokens):
        for shard, count in tokens.special.items():
            self.error(f"{shard}: {count:,} tokens without text (padding, end, unknown), "
                       "unless they are fused markers: then give the tokenizer")
        for shard, highest in tokens.too_high.items():
            self.error(f"{shard}: id {highest:,}, but the vocabulary has {self.vocabulary:,}")
        split = self.splits[name]
        if split.read(0, 1)[0] != BOS:
            self.error(f"{split.place(0)}: {title} does not begin with BOS (id 1): its first "
                       "document is a fragment")
        size = self.figures.get(f"{name}_bytes")
        counted = f", {size:,} bytes in the sidecar ({size / len(split):.4f} a token)" \
            if size is not None else ""
        self.ok(f"{title}: {len(split.shards)} shards, {len(split):,} tokens, "
                f"{self.figures[f'{name}_documents']:,} documents{counted}, "
                f"ids up to {tokens.highest:,}")

    def _identify(self):
        """Say whether this is a validation set that is known, by documents, tokens and bytes."""
        documents, tokens = self.figures["val_documents"], self.figures["val_tokens"]
        size, full = self.figures.get("val_bytes"), documents == FULL_DOCUMENTS
        if full and tokens == FULL_TOKENS and size in (FULL_BYTES, None):
            tell, identity = self.ok, "the challenge's full validation set"
            detail = ", by its numbers of documents, tokens and bytes"
        elif full and size and abs(size / FULL_BYTES - 1) < 0.004:
            tell, identity = self.ok, "50,000 documents, with the challenge's bytes, in another " \
                "tokenizer"
            detail = f" ({size:,}; the published sidecar has {FULL_BYTES:,})"
        elif documents == 10_000 and 0 < tokens - TEN_THOUSAND_TARGETS <= 2048:
            tell, identity = self.note, "the challenge's first 10,000 documents only"
            detail = ": it is scored on 50,000, and the other 40,000 may stand in training " \
                "shards of the same preparation"
        elif full:
            tell, identity = self.note, "50,000 documents, but not the challenge's"
            detail = f": {tokens:,} tokens" + (f", {size:,} bytes" if size else "") \
                + f"; the published set has {FULL_TOKENS:,} and {FULL_BYTES:,}"
        else:
            tell, identity = self.note, "no set that this program knows"
            detail = f": the challenge's has {FULL_DOCUMENTS:,} documents, {FULL_BYTES:,} bytes"
        tell(f"this is {identity}{detail}")
        self.figures["identity"] = identity

    def search_training(self):
        """Stream the training shards past the validation documents."""
        tokens, split = _Tokens(self.vocabulary, self.textless, self._advance), self.splits["train"]
        digests = self.digests if self.manifests[self.folder]["files"] else None
        self.found = overlap.search(self.validation, split, tokens.watch(split.pieces(digests)))
        self.figures |= {"train_tokens": len(split), "train_documents": self.found.documents}
        self._tell_tokens("training", "train", tokens)

    def check_hashes(self):
        """Compare the files' sha256 with their manifest's."""
        checked = 0
        for shard in sum(self.shards.values(), []):
            entry = self.manifests[shard.path.parent]["files"].get(shard.path.name, {})
            expected, found = entry.get("sha256"), self.digests.get(shard.path.name)
            if expected and found:
                checked += 1
                if found != expected:
                    self.error(f"{shard.path.name}: not the file of the manifest (other "
                               "sha256): changed or swapped after the split was made")
        if checked:
            self.ok(f"manifest: sha256 of {checked} files compared")
        else:
            self.note("no manifest with hashes: a file swapped after the split shows only by its "
                      "documents")

    # ---- the overlap -----------------------------------------------------------------------------

    def tell_overlap(self):
        """Report the documents found, those of a wrong split first of all by their pattern."""
        v = self.validation
        for matches, findings in ((self.found.whole, self.whole), (self.found.near, self.near)):
            findings += [self._finding(d, matches[first])
                         for d, first in enumerate(v.first.tolist()) if first in matches]
        self.short = [f for f in self.whole if f.tokens < SHORT]
        self.whole = [f for f in self.whole if f.tokens >= SHORT]
        judged = int(v.judged[v.first].sum())
        stand = "stand in training token for token"
        self._tell_list(self.whole, f"validation documents {stand}")
        self._tell_list(self.short, f"validation documents of fewer than {SHORT} tokens {stand}")
        self._tell_list(self.near, "validation documents are near-duplicates: at least "
                        f"{overlap.NEAR:.0%} of their {overlap.SHINGLE}-token shingles stand in "
                        "one training document")
        self.figures |= {"near_threshold": overlap.NEAR, "shingle_tokens": overlap.SHINGLE,
                         "shingles_kept_one_in": v.rate, "judged_documents": judged,
                         "scattered_documents": self.found.scattered()}
        self.out(f"note: near-duplicates were looked for in {judged:,} of {len(v):,} documents "
                 f"(one shingle in {v.rate} kept, documents with fewer than {overlap.FEWEST} "
                 "compared whole only); "
                 f"{self.figures['scattered_documents']:,} more have as large a share "
                 "scattered over several training documents")

    def _finding(self, d, match):
        v = self.validation
        text = ""
        if self.encoder and v.sizes[d]:
            ids = v.document(d)[:16]
            if int(ids.max()) < self.encoder.size:
                text = " ".join(decode_documents(self.encoder, [ids])[0][0].split())[:60]
        return Finding(d, int(v.sizes[d]) + 1, int(self.sizes[d]), match.number,
                       self.splits["train"].place(match.begin), round(match.share, 4), text)

    def _tell_list(self, findings, what):
        total = self.figures["val_documents"]
        if not findings:
            self.ok(f"no {what}")
            return
        tokens = sum(f.tokens for f in findings) / self.figures["val_tokens"]
        scored = sum(f.size for f in findings) / max(self.figures.get("val_bytes", 0), 1)
        share = f"{scored:.2%} of the bytes scored" if scored else f"{tokens:.2%} of the tokens"
        line = f"{len(findings):,} of {total:,} {what} ({share})"
        if self.leaking(findings):
            self.out(f"LEAK: {line}")
        else:
            self.note(f"{line}; up to {TOLERATED:.0%} of the documents, in no order, are taken for "
                      "the source's own repetitions")
        for f in findings[:LISTED]:
            near = "" if f.share == 1 else f", {f.share:.0%}"
            self.out(f"    validation {f.document:,} ({f.tokens:,} tokens{near}) = training "
                     f"{f.number:,} ({f.shard})" + (f": {f.text}" if f.text else ""))
        if len(findings) > LISTED:
            self.out(f"    and {len(findings) - LISTED:,} more")
        if self.leaking(findings):
            self._tell_patterns(findings)

    def _tell_patterns(self, findings):
        ordered = 0
        for count, a, b, shift in ordered_runs(findings):
            ordered += count
            self._pattern(f"{count:,} of them, between validation documents {a:,} and {b:,}, stand "
                          f"in training in the same order from document {a + shift:,} on: the "
                          "splits overlap (another --val-docs, or files of two splits)")
        if len(findings) == self.figures["val_documents"]:
            self._pattern("that is the whole validation set")
        if left := len(findings) - ordered:
            self._pattern(f"{left:,} are scattered, as the source's own repetitions are")

    def _pattern(self, line):
        self.patterns.append(line)
        self.out(f"    pattern: {line}")

    # ---- what the tokenizer loses ----------------------------------------------------------------

    def tell_loss(self):
        """Decode validation, or a sample of it, and compare with the sidecar."""
        if not self.encoder or "val_bytes" not in self.figures:
            return
        v, loss = self.validation, Loss()
        if int(v.tokens.max()) >= self.encoder.size:
            self.note("the tokenizer does not know all ids: text not decoded")
            return
        chosen = np.unique(np.linspace(0, len(v) - 1, min(len(v), SAMPLED)).astype(int))
        for part in np.array_split(chosen, max(1, len(chosen) // 100)):
            ids = [v.document(d) for d in part]
            for d, x, (text, whole) in zip(part, ids, decode_documents(self.encoder, ids),
                                           strict=True):
                loss.add(self.encoder.count_textless(x), text, whole, int(self.sizes[d]))
        sample = "" if len(chosen) == len(v) else f" (every {len(v) / len(chosen):.0f}th document)"
        line = loss.line(f"validation decoded{sample}", self.encoder.exact)
        self.figures["loss"] = dataclasses.asdict(loss)
        if self.encoder.exact and (loss.changed or loss.unmarked):
            self.error(f"{line}; this tokenizer keeps every byte, so sidecar or tokens are wrong")
        elif self.encoder.exact:
            self.ok(line)
        else:
            self.note(f"{line}; this tokenizer loses text; a lower bound: what keeps the length "
                      "(a newline read as a space) does not show")

    def verdict(self):
        """The last line."""
        parts = []
        if self.leaks:
            parts.append(f"LEAK: {self.leaks:,} of {self.figures['val_documents']:,} validation "
                         "documents stand in training")
        if self.problems:
            parts.append(f"{len(self.problems):,} errors")
        self.out(f"verdict: {'; '.join(parts) or 'clean'}{self._remedy()}")

    def _remedy(self):
        """What to do about leaks."""
        steps = []
        leaking = [x for x in (self.whole, self.short, self.near) if self.leaking(x)]
        if any(ordered_runs(x) for x in leaking):
            steps.append("prepare both splits again, in one run with one --val-docs")
        if any(x is not self.near for x in leaking):
            steps.append("prepare with --drop-val-duplicates, which leaves equal documents out of "
                         "training")
        if any(x is self.near for x in leaking):
            steps.append("take the near-duplicates listed above out of the source")
        return f"; next: {'; or '.join(steps)}; then train again" if steps else ""
