"""Which validation documents also stand in training: whole, or as near-duplicates.

Whole: a signature of every training document (its length and 16 of its tokens) is looked up among
the validation documents'; what agrees is compared token for token, so none is missed and none is
made up. Near: a document's shingles are its stretches of SHINGLE consecutive tokens. One in
`rate` of them is kept, chosen by a hash of its own tokens, so that both sides choose alike
(idea: Broder, On the resemblance and containment of documents, 1997). The training tokens stream
past the validation shingles; a validation document is a near-duplicate where at least NEAR of
its distinct shingles stand in one training document. Which documents come near is estimated from
the kept shingles; for those the share is then counted over all of them.

Memory grows with the validation tokens (about 3 bytes each and 60 per kept shingle), not with the
training tokens.
"""

import dataclasses

import numpy as np

from caseops import BOS
from caseops.splits import Split

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
    """Finds many keys among others; `keys` uint64 [n], sorted and distinct. A binary search would
    miss the cache at each of its steps: the leading bits lead to within a key or two instead."""

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
        """(i, j) with keys[i] == self.keys[j], for each i that has such a j, ascending in i."""
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
            i, j, end = i[~same], j[~same] + 1, end[~same]
        i, j = (np.concatenate(x) for x in zip(*found, strict=True))
        order = np.argsort(i, kind="stable")
        return i[order], j[order].astype(np.int64)


class Validation:
    """The validation documents, ready to be looked up.

    tokens uint16; begins, ends int64 [documents], each document without its BOS; rate: keep one
    shingle in so many. `first[d]` is the first document equal to d (d itself, mostly). Document
    d has `kept[d]` kept shingles, `judged[d]` if they are enough to look for near-duplicates.
    """

    def __init__(self, tokens, begins, ends, rate):
        self.tokens, self.begins, self.ends, self.rate = tokens, begins, ends, rate
        self.sizes = ends - begins
        self.longest = int(self.sizes.max(initial=0))
        self._index_documents()
        self._index_shingles()

    def __len__(self):
        return len(self.begins)

    def document(self, d):
        """Its tokens without BOS, uint16 [n]."""
        return self.tokens[self.begins[d]:self.ends[d]]

    def _index_documents(self):
        self.first = np.arange(len(self))
        full = np.flatnonzero(self.sizes)
        keys = signatures(self.tokens, self.begins[full], self.ends[full])
        order = np.argsort(keys, kind="stable")
        keys, full = keys[order], full[order]
        distinct = []  # contents so far under one signature; more than one is next to impossible
        for i in np.flatnonzero(keys[1:] == keys[:-1]) + 1:
            if not distinct or keys[i] != keys[distinct[0]]:
                distinct = [i - 1]
            same = (j for j in distinct
                    if np.array_equal(self.document(full[j]), self.document(full[i])))
            if (j := next(same, None)) is not None:
                self.first[full[i]] = full[j]
            else:
                distinct.append(i)
        empty = np.flatnonzero(self.sizes == 0)
        self.first[empty] = empty[:1].repeat(len(empty))
        alone = self.first[full] == full
        self._signatures, self._documents = keys[alone], full[alone]

    def _index_shingles(self):
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
        new_key = np.append(True, keys[1:] != keys[:-1])[:len(keys)]
        once = new_key | np.append(True, owners[1:] != owners[:-1])[:len(keys)]
        keys, owners, new_key = keys[once], owners[once], new_key[once]
        starts = np.flatnonzero(new_key)
        counts = np.diff(np.append(starts, len(keys)))
        rare = np.repeat(counts <= COMMON, counts)
        self._owners = owners[rare]
        self._keys = keys[starts][counts <= COMMON]
        self._starts = np.append(0, np.cumsum(counts[counts <= COMMON]))
        self.kept = np.bincount(self._owners, minlength=len(self))
        self.judged = self.kept >= FEWEST
        self._table = KeyTable(self._keys)

    def candidates(self, keys):
        """(i, d): documents d that have the signature keys[i]; distinct contents only."""
        left = np.searchsorted(self._signatures, keys, "left")
        count = np.searchsorted(self._signatures, keys, "right") - left
        i = np.repeat(np.arange(len(keys)), count)
        within = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
        return i, self._documents[left[i] + within]

    def shingles(self, tokens):
        """(positions, shingle numbers) of the kept shingles in `tokens` that validation has."""
        at = kept_positions(tokens, self.rate)
        keys = shingle_keys(tokens, at) if len(at) else np.empty(0, np.uint64)
        i, numbers = self._table.find(keys)
        return at[i], numbers

    @property
    def distinct_shingles(self):
        """How many shingles can be found."""
        return len(self._keys)

    def owners(self, numbers):
        """(i, d): shingle numbers[i] stands in document d."""
        count = self._starts[numbers + 1] - self._starts[numbers]
        i = np.repeat(np.arange(len(numbers)), count)
        within = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
        return i, self._owners[self._starts[numbers][i] + within]


@dataclasses.dataclass
class Match:
    """Where a validation document was found in training: document number there, its place, and
    the share of the validation document's shingles that stand in it (1 for the whole)."""

    number: int
    begin: int
    end: int
    share: float


class Search:
    """Feed it a training split's blocks, then `finish`; see the module's docstring.

    `whole` and `near` are {validation document: Match}, the first match for each distinct
    document; `somewhere` bool [shingles], the kept ones found anywhere; `documents` counts.
    """

    def __init__(self, validation, split):
        self.validation, self.split = validation, split
        self.whole, self.near = {}, {}
        self.documents = 0
        self.somewhere = np.zeros(validation.distinct_shingles, bool)
        n = len(validation)
        self._best = np.zeros(n, np.int64)  # kept shingles in the best training document so far
        self._where = np.zeros((n, 3), np.int64)  # its number, begin, end
        self._open = 0  # where the document begins that the block before left open
        self._begun = False  # a BOS, or a token, came before
        self._waiting, self._many = [], 1 << 16  # shingle numbers found in it so far

    def feed(self, block, bos):
        """One Block that overlaps the one before by SHINGLE - 1; `bos`: positions in the split of
        the BOS among its new tokens."""
        at, numbers = self.validation.shingles(block.tokens)
        self.somewhere[numbers] = True
        if not self._begun:
            self._begun = True
            if len(bos) and bos[0] == 0:
                self._open, bos = 1, bos[1:]
        begins = np.append(self._open, bos + 1)
        document = np.searchsorted(bos, at + block.offset, "right")
        self._close(begins[:-1], bos, block, document, numbers)
        self._open = int(begins[-1])
        rest = numbers[document == len(bos)]
        if len(rest):
            self._waiting.append(rest)
            if sum(map(len, self._waiting)) > self._many:  # a document without end
                self._waiting = [np.unique(np.concatenate(self._waiting))]
                self._many = 2 * len(self._waiting[0]) + (1 << 16)

    def _close(self, begins, ends, block, document, numbers):
        """Documents begins..ends are complete, the first may have begun in an earlier block."""
        if not len(ends):
            return
        inside = begins >= block.offset if block is not None else np.zeros(1, bool)
        for i in np.flatnonzero(~inside):
            if 0 < ends[i] - begins[i] <= self.validation.longest:
                tokens = self.split.read(int(begins[i]), int(ends[i]))
                self._compare(tokens, np.array([0]), np.array([len(tokens)]),
                              self.documents + i, begins[i])
        inside &= (ends > begins) & (ends - begins <= self.validation.longest)
        if inside.any():
            i = np.flatnonzero(inside)
            self._compare(block.tokens, begins[i] - block.offset, ends[i] - block.offset,
                          self.documents + i, block.offset)
        complete = document < len(ends)
        waiting = np.concatenate([*self._waiting, numbers[:0]])
        document = np.append(np.zeros(len(waiting), np.int64), document[complete])
        numbers = np.append(waiting, numbers[complete])
        if len(numbers):
            self._tally(document, numbers, begins, ends)
        self._waiting, self._many = [], 1 << 16
        self.documents += len(ends)

    def _compare(self, tokens, begins, ends, numbers, offset):
        numbers = np.broadcast_to(numbers, begins.shape)
        for i, d in zip(*self.validation.candidates(signatures(tokens, begins, ends)),
                        strict=True):
            a, b = int(begins[i]), int(ends[i])
            if int(d) not in self.whole \
                    and np.array_equal(tokens[a:b], self.validation.document(d)):
                self.whole[int(d)] = Match(int(numbers[i]), a + int(offset), b + int(offset), 1.0)

    def _tally(self, document, numbers, begins, ends):
        """Shingle numbers[k] was found in training document number document[k] of those given."""
        shingles = self.validation.distinct_shingles
        pairs = np.unique(document * shingles + numbers)
        i, d = self.validation.owners(pairs % shingles)
        n = len(self.validation)
        pairs, count = np.unique((pairs // shingles)[i] * n + d, return_counts=True)
        document, d = pairs // n, pairs % n
        better = count > self._best[d]
        document, d, count = document[better], d[better], count[better]
        order = np.lexsort((-document, count))  # of several the last is kept: most, then first
        document, d, count = document[order], d[order], count[order]
        self._best[d] = count
        self._where[d] = np.stack(
            [self.documents + document, begins[document], ends[document]], axis=1)

    def finish(self):
        """After the last block: close the last document, then count the shares of those near."""
        if self._begun:
            none = np.empty(0, np.int64)
            self._close(np.array([self._open]), np.array([len(self.split)]), None, none, none)
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
        numbers = np.flatnonzero(self.somewhere)
        found = np.bincount(v.owners(numbers)[1], minlength=len(v)) if len(numbers) else 0
        some = v.judged & (found >= NEAR * v.kept)
        some[[*self.whole, *self.near]] = False
        return int(some.sum())


def distinct_shingles(document):
    """uint64 [n]: the keys of all shingles of a document (uint16 [tokens]), each once."""
    if len(document) < SHINGLE:
        return np.empty(0, np.uint64)
    return np.unique(shingle_keys(document, kept_positions(document, 1)))


def load(split, digests=None, watch=None):
    """(tokens uint16, bos int64) of a whole split in memory. `watch(block)` sees every block."""
    tokens = np.empty(len(split), "<u2")
    for block in split.blocks(digests=digests):
        tokens[block.offset:block.offset + len(block.tokens)] = block.tokens
        if watch:
            watch(block)
    return tokens, np.flatnonzero(tokens == BOS)


def search(validation, split, watch, digests=None):
    """Search all of `split`; the Search, finished. `watch(block)` returns the BOS positions."""
    assert isinstance(split, Split)
    found = Search(validation, split)
    for block in split.blocks(overlap=SHINGLE - 1, digests=digests):
        found.feed(block, watch(block))
    found.finish()
    return found
