"""Which validation documents also stand in training: whole, or as near-duplicates.

Whole: a signature of every training document (its length and 16 of its tokens) is looked up among
the validation documents'; what agrees is compared token for token, so none is missed and none is
made up. Near: a document's shingles are its stretches of SHINGLE consecutive tokens. One in
`rate` of them is kept, chosen by a hash of its own tokens, so that both sides choose alike
(idea: Broder, On the resemblance and containment of documents, 1997). The training tokens stream
past the validation shingles; a validation document is a near-duplicate where at least NEAR of
its distinct shingles stand in one training document. Which documents come near is estimated from
the kept shingles; for those the share is then counted over all of them.

Memory grows with the validation tokens (about 5 bytes each and 60 per kept shingle) and with the
longest document, not with the training tokens.
"""

import dataclasses

import numpy as np

from caseops import BOS
from caseops.splits import blocks

SHINGLE = 16  # tokens, about 50 bytes or 9 words of English
NEAR = 0.8  # a near-duplicate has at least this share of its shingles in one training document
_SCREEN = 0.6  # estimated share from which the true one is counted
FEWEST = 4  # kept shingles; a document with fewer is compared whole only
COMMON = 8  # a shingle in more validation documents than this is boilerplate, and not kept
_COUNTED = 1 << 20  # tokens; in a longer training document the estimate stands
_PROBES = 16  # tokens of a document that enter its signature
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHOOSERS = [np.uint16(x) for x in (40503, 30011, 51767)]


def choose_rate(val_tokens, train_tokens):
    """Keep one shingle in how many, a power of two: all of them up to 16 M tokens, one in 16 from
    128 M on, and never more than 4 M validation shingles."""
    rate = 1
    while (rate < 16 and rate << 24 < val_tokens + train_tokens) or rate << 22 < val_tokens:
        rate *= 2
    return rate


def _mix(words):
    """One uint64 [n] from a sequence of uint64 [n] arrays; depends on their order."""
    key = None
    for word in words:
        key = word * _GOLDEN if key is None else (key ^ (key >> np.uint64(29))) + word
        key *= _GOLDEN
    return key ^ (key >> np.uint64(31))


def signatures(tokens, begins, ends):
    """uint64 [documents]: equal for equal documents tokens[begin:end], none of them empty."""
    sizes = ends - begins
    at = begins + (sizes - 1) * np.arange(_PROBES)[:, None] // (_PROBES - 1)
    return _mix([sizes.astype(np.uint64), *tokens[at].astype(np.uint64)])


def shingle_keys(tokens, positions):
    """uint64 [n]: hash of the SHINGLE tokens that begin at each of `positions`."""
    size = 2 * SHINGLE
    at_every_token = np.ndarray(len(tokens) - SHINGLE + 1, f"V{size}", tokens, strides=(2,))
    return _mix(at_every_token[positions].view("<u8").reshape(-1, size // 8).T)


def kept_positions(tokens, rate):
    """int64 [n]: where the shingles begin that a `rate` keeps, in ascending order.

    The choice is a 16-bit polynomial hash of a shingle's first eight tokens, by doubling: three
    passes over cached blocks, which is why this keeps up with the disk.
    """
    n = len(tokens) - SHINGLE + 1
    if n <= 0 or rate == 1:
        return np.arange(max(n, 0))
    h = tokens
    for step, odd in zip((1, 2, 4), _CHOOSERS, strict=True):
        h = h[:-step] * odd + h[step:]
    return np.flatnonzero(h[:n] < 65536 // rate)


class KeyTable:
    """Finds many keys among others; `keys` uint64 [n], sorted. A binary search would miss the cache
    at each of its steps: the leading bits lead to within a key or two instead."""

    def __init__(self, keys):
        self.keys = keys
        # One bit for each leading part that leads to a key, 16 times as many bits as keys: small
        # enough for the cache, and 15 of 16 keys that are not there are done with.
        bits = max(8, (16 * len(keys)).bit_length())
        self._byte_shift, self._bit_shift = np.uint64(67 - bits), np.uint64(64 - bits)
        self._bits = np.zeros(1 << (bits - 3), np.uint8)
        np.bitwise_or.at(self._bits, (keys >> self._byte_shift).astype(np.int64), self._bit(keys))
        bits = max(8, len(keys).bit_length() - 1)
        self._bucket_shift = np.uint64(64 - bits)
        buckets = (keys >> self._bucket_shift).astype(np.int64)
        self._starts = np.searchsorted(buckets, np.arange((1 << bits) + 1)).astype(np.int32)

    def _bit(self, keys):
        return np.uint8(1) << ((keys >> self._bit_shift).astype(np.uint8) & np.uint8(7))

    def find(self, keys):
        """(i, j): all pairs with keys[i] == self.keys[j], int64 [n] each, in ascending order."""
        i = np.flatnonzero(self._bits[(keys >> self._byte_shift).astype(np.int64)]
                           & self._bit(keys))
        bucket = (keys[i] >> self._bucket_shift).astype(np.int64)
        j, end = self._starts[bucket], self._starts[bucket + 1]
        found = [(i[:0], j[:0])]
        while len(i):
            inside = np.flatnonzero(j < end)
            i, j, end = i[inside], j[inside], end[inside]
            same = self.keys[j] == keys[i]
            found.append((i[same], j[same]))
            j = j + 1
        i, j = (np.concatenate(x) for x in zip(*found, strict=True))
        order = np.argsort(i, kind="stable")
        return i[order], j[order].astype(np.int64)


class Validation:
    """The validation documents, ready to be looked up.

    tokens uint16; begins, ends int64 [documents], each document without its BOS; rate: keep one
    shingle in so many. `first[d]` is the first document equal to d (d itself, mostly). A kept
    shingle of a first document is a number k, `owners[k]` its document: d has `kept[d]` of them,
    `judged[d]` if they are enough to look for near-duplicates.
    """

    def __init__(self, tokens, begins, ends, rate):
        self.tokens, self.begins, self.ends, self.rate = tokens, begins, ends, rate
        self.sizes = ends - begins
        self.longest = int(self.sizes.max(initial=0))
        self._numbers = {}  # {the bytes of a document's tokens: the first one's number}
        self.first = np.array([self._numbers.setdefault(self.document(d).tobytes(), d)
                               for d in range(len(self))])
        full = np.flatnonzero(self.sizes)
        self._signatures = np.unique(signatures(tokens, begins[full], ends[full]))
        keys, self.owners = self._index_shingles()
        self._table = KeyTable(keys)
        self.kept = np.bincount(self.owners, minlength=len(self))
        self.judged = self.kept >= FEWEST

    def __len__(self):
        return len(self.begins)

    def document(self, d):
        """Its tokens without BOS, uint16 [n]."""
        return self.tokens[self.begins[d]:self.ends[d]]

    def _index_shingles(self):
        """(keys, owners) of the kept shingles of the first documents, each pair once."""
        keys, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        step = 1 << 22
        own = np.flatnonzero(self.first == np.arange(len(self)))
        begins, ends = self.begins[own], self.ends[own]
        for start in range(0, len(self.tokens), step):
            part = self.tokens[start:start + step + SHINGLE - 1]
            at = kept_positions(part, self.rate)
            i = np.searchsorted(begins, at + start, "right") - 1
            inside = (i >= 0) & (at + start + SHINGLE <= ends[i])
            keys.append(shingle_keys(part, at[inside]))
            owners.append(own[i[inside]])
        keys, owners = np.concatenate(keys), np.concatenate(owners)
        order = np.lexsort((owners, keys))
        keys, owners = keys[order], owners[order]
        once = np.append(True, (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1]))[:len(keys)]
        keys, owners = keys[once], owners[once]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[:len(keys)])
        counts = np.diff(np.append(starts, len(keys)))
        rare = np.repeat(counts <= COMMON, counts)
        return keys[rare], owners[rare]

    def equal(self, tokens, begins, ends):
        """Iterate over (i, d): the document tokens[begins[i]:ends[i]], not empty, equals d."""
        found = signatures(tokens, begins, ends)
        at = np.searchsorted(self._signatures, found)
        likely = self._signatures.take(at, mode="clip") == found
        for i in np.flatnonzero(likely).tolist():
            d = self._numbers.get(tokens[begins[i]:ends[i]].tobytes())
            if d is not None:
                yield i, d

    def shingles(self, tokens):
        """(positions, numbers) of the kept shingles in `tokens` that validation has."""
        at = kept_positions(tokens, self.rate)
        keys = shingle_keys(tokens, at) if len(at) else np.empty(0, np.uint64)
        i, numbers = self._table.find(keys)
        return at[i], numbers


@dataclasses.dataclass
class Match:
    """Where a validation document was found in training: document number there, its place, and
    the share of the validation document's shingles that stand in it (1 for the whole)."""

    number: int
    begin: int
    end: int
    share: float


class Search:
    """Feed it a training split's Blocks, then `finish`; see the module's docstring.

    `whole` and `near` are {validation document: Match}, the first match for each distinct
    document; `somewhere` bool [kept shingles], those found anywhere; `documents` counts.
    """

    def __init__(self, validation, split):
        self.validation, self.split = validation, split
        self.whole, self.near = {}, {}
        self.documents = 0
        n = len(validation)
        self.somewhere = np.zeros(len(validation.owners), bool)
        self._best = np.zeros(n, np.int64)  # kept shingles in the best training document so far
        self._where = np.zeros((n, 3), np.int64)  # its number, begin, end

    def feed(self, block):
        """Search one Block, all of whose documents are whole."""
        v = self.validation
        sizes = block.ends - block.begins
        few = np.flatnonzero((sizes > 0) & (sizes <= v.longest))
        for i, d in v.equal(block.tokens, block.begins[few], block.ends[few]):
            i = int(few[i])
            self.whole.setdefault(d, Match(
                self.documents + i, block.offset + int(block.begins[i]),
                block.offset + int(block.ends[i]), 1.0))
        at, numbers = v.shingles(block.tokens)
        self.somewhere[numbers] = True
        if len(numbers):
            self._tally(np.searchsorted(block.begins, at, "right") - 1, numbers, block)
        self.documents += len(sizes)

    def _tally(self, document, numbers, block):
        """Shingle numbers[k] was found in document number document[k] of the block."""
        v, n = self.validation, len(self.validation)
        pairs = np.unique(document * len(v.owners) + numbers)
        pairs, count = np.unique(pairs // len(v.owners) * n + v.owners[pairs % len(v.owners)],
                                 return_counts=True)
        document, d = pairs // n, pairs % n
        better = count > self._best[d]
        document, d, count = document[better], d[better], count[better]
        order = np.lexsort((-document, count))  # of several the last is kept: most, then first
        document, d, count = document[order], d[order], count[order]
        self._best[d] = count
        self._where[d] = np.stack([self.documents + document, block.offset + block.begins[document],
                                   block.offset + block.ends[document]], axis=1)

    def finish(self):
        """After the last block: count the shares of the documents that come near."""
        v = self.validation
        near = np.flatnonzero(v.judged & (self._best >= _SCREEN * v.kept))
        last, there = None, None  # the training document at hand, and its shingles
        for d in near[np.argsort(self._where[near, 0], kind="stable")].tolist():
            if d in self.whole:
                continue
            number, begin, end = (int(x) for x in self._where[d])
            share = self._best[d] / v.kept[d]
            if end - begin <= _COUNTED:
                if number != last:
                    last, there = number, distinct_shingles(self.split.read(begin, end))
                own = distinct_shingles(v.document(d))
                share = np.isin(own, there, assume_unique=True).mean()
            if share >= NEAR:
                self.near[d] = Match(number, begin, end, float(share))

    def scattered(self):
        """How many judged documents have NEAR of their kept shingles in training, but no single
        training document that has so many."""
        v = self.validation
        found = np.bincount(v.owners[self.somewhere], minlength=len(v))
        some = v.judged & (found >= NEAR * v.kept)
        some[[*self.whole, *self.near]] = False
        return int(some.sum())


def distinct_shingles(document):
    """uint64 [n]: the keys of all shingles of a document (uint16 [tokens]), each once."""
    if len(document) < SHINGLE:
        return np.empty(0, np.uint64)
    return np.unique(shingle_keys(document, kept_positions(document, 1)))


def load(pieces):
    """(tokens uint16, bos int64) of a whole split's pieces in memory."""
    tokens = np.concatenate([piece for _, piece in pieces])
    return tokens, np.flatnonzero(tokens == BOS)


def search(validation, split, pieces):
    """Search all of `split`, whose `pieces` are given; the Search, finished."""
    found = Search(validation, split)
    for block in blocks(pieces):
        found.feed(block)
    found.finish()
    return found
