"""The fast way from text to ids and byte counts: segments are looked up, new ones encoded once.

It rests on one fact. A BPE merge makes a piece of the vocabulary, so where no piece holds two
classes of characters side by side nothing is ever merged across, and text may be cut there. A
segment is the white space before it and then a run of ASCII letters, a digit (or a run of them), or
a run of anything else; where the normaliser turns one character into others (odd), the whole word.
A compiled loop cuts, hashes and copies; what it meets for the first time goes to the exact encoder,
many segments at a time. A document with a character that acts across segments is not taken.
"""

import unicodedata

import numba
import numpy as np

import lossless_caps as caps
from caseops import SPACE_MARK

# Normalisers that map character by character, but for combining marks and Hangul Jamo: the name as
# it stands in the serialized model.
_NORMALISERS = (b"\x0a\x08nmt_nfkc", b"\x0a\x08identity")
# Parts segments that are encoded together: the transform never writes CAPNEXT twice, and nothing
# merges with an operator.
_BORDER = caps.CAPNEXT * 2
_UNKNOWN, _LETTER, _DIGIT, _OTHER, _SPACE, _ODD, _MARK, _ALONE = range(8)
_TAKEN, _REFUSED, _UNCLASSIFIED = range(3)  # the fate of a document


# ---- the compiled loop ---------------------------------------------------------------------------


def _compiled(**options):
    """numba.njit, kept on the disk if a directory for it can be written."""
    def compiled(function):
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # a read-only checkout, and no home directory
            return numba.njit(**options)(function)
    return compiled


@_compiled(inline="always")
def _character(data, i):
    """(code point, bytes) of the UTF-8 character at i."""
    a = np.int64(data[i])
    if a < 0x80:
        return a, 1
    if a < 0xE0:
        return (a & 0x1F) << 6 | data[i + 1] & 0x3F, 2
    if a < 0xF0:
        return (a & 0xF) << 12 | (data[i + 1] & 0x3F) << 6 | data[i + 2] & 0x3F, 3
    return ((a & 7) << 18 | (data[i + 1] & 0x3F) << 12 | (data[i + 2] & 0x3F) << 6
            | data[i + 3] & 0x3F), 4


@_compiled()
def _word(data, i, end, kinds):
    """(end of the word that begins at i, its worst kind; _LETTER where all of it can be cut)."""
    worst, begin = _LETTER, i
    while i < end:
        c, size = _character(data, i)
        kind = kinds[c]
        if kind == _SPACE:
            break
        if kind == _MARK:  # it acts on what stands before it, which must not be a space
            kind = _ALONE if i == begin else _ODD
        if kind == _UNKNOWN or kind >= _ODD and worst != _UNKNOWN and kind > worst:
            worst = kind
        i += size
    return i, worst


@_compiled()
def _run(data, i, end, kinds, many_digits):
    """The end of the run of one kind that begins at i."""
    c, size = _character(data, i)
    kind = kinds[c]
    i += size
    while i < end and (kind != _DIGIT or many_digits):
        c, size = _character(data, i)
        if kinds[c] != kind:
            break
        i += size
    return i


# The table: a row of 64 bytes a segment, found by open addressing, so that most lookups touch one
# cache line. As uint64: 0..2 the key (up to 24 bytes, else its hash and its place among the long
# keys), 3 its bytes; as uint32: 7 the number of pairs, 8..15 the pairs (up to 8, else 8 is their
# place among the long ones). A row whose key has 0 bytes is free.
_KEY_BYTES, _ROW_PAIRS, _PENDING = 24, 8, np.uint32(0xFFFFFFFF)


@_compiled()
def _key(data, a, b):
    """The segment data[a:b] as three words: itself, or its hash where it is long."""
    words = (np.uint64(0), np.uint64(0), np.uint64(0))
    first, second, third = words
    if b - a <= _KEY_BYTES:
        for i in range(min(b - a, 8)):
            first |= np.uint64(data[a + i]) << np.uint64(8 * i)
        for i in range(8, min(b - a, 16)):
            second |= np.uint64(data[a + i]) << np.uint64(8 * i - 64)
        for i in range(16, b - a):
            third |= np.uint64(data[a + i]) << np.uint64(8 * i - 128)
    else:
        for i in range(a, b):
            first = (first ^ data[i]) * np.uint64(0x9E3779B97F4A7C15)
            first ^= first >> np.uint64(29)
    return first, second, third


@_compiled()
def _same(data, a, b, keys, begin):
    i = 0
    while i < b - a and keys[begin + np.uint64(i)] == data[a + i]:
        i += 1
    return i == b - a


@_compiled()
def _row(data, a, b, rows, keys):
    """(row of the segment data[a:b], or the free one where it belongs; its key)."""
    key = _key(data, a, b)
    size, mask = np.uint64(b - a), np.uint64(len(rows) - 1)
    h = (key[0] * np.uint64(0x9E3779B97F4A7C15) ^ key[1] * np.uint64(0xC2B2AE3D27D4EB4F)
         ^ key[2] * np.uint64(0x165667B19E3779F9) ^ size)
    at = (h ^ h >> np.uint64(32) ^ h >> np.uint64(47)) & mask
    while True:
        row = rows[at]
        length = row[3] & np.uint64(0xFFFFFFFF)
        if length == 0:
            break
        if length == size and row[0] == key[0] and (
                (size <= _KEY_BYTES and row[1] == key[1] and row[2] == key[2])
                or (size > _KEY_BYTES and _same(data, a, b, keys, row[1]))):
            break
        at = (at + np.uint64(1)) & mask
    return at, key


@_compiled()
def _enter(data, a, b, rows, keys, fresh, used):
    """The row of the segment data[a:b], made where it is new; -1 where there is no room.

    fresh: begin and end in `data` of the segments that were new, in order; used: (segments, of
    them fresh, bytes of long keys).
    """
    at, key = _row(data, a, b, rows, keys)
    if rows[at, 3] == 0:
        if 2 * used[0] >= len(rows) or used[1] == len(fresh) or used[2] + b - a > len(keys):
            return np.int64(-1)
        rows[at, 0], rows[at, 1], rows[at, 2] = key
        rows[at, 3] = np.uint64(b - a) | np.uint64(_PENDING) << np.uint64(32)
        if b - a > _KEY_BYTES:
            rows[at, 1] = used[2]
            keys[used[2]:used[2] + b - a] = data[a:b]
            used[2] += b - a
        fresh[used[1], 0], fresh[used[1], 1], fresh[used[1], 2] = a, b, at
        used[0] += 1
        used[1] += 1
    return np.int64(at)


@_compiled()
def _scan(data, begins, kinds, shape, store, used, found):
    """Look every segment of the documents up, in order.

    data uint8, its document d is data[begins[d]:begins[d + 1]]; shape: (white space collapses,
    words may be cut, digits form runs); store: (rows, keys, fresh), see `_enter`; found: receives
    the row of every segment. Returns (whether there was room, fate and end in `found` of each
    document).
    """
    collapses, cuts, many_digits = shape
    rows, keys, fresh = store
    fates, ends = np.zeros(len(begins) - 1, np.uint8), np.zeros(len(begins) - 1, np.int64)
    n = 0
    for d in range(len(begins) - 1):
        i, end, n_before = begins[d], begins[d + 1], n
        while i < end:
            begin = i
            while i < end:
                c, size = _character(data, i)
                if kinds[c] != _SPACE:
                    break
                i += size
            if collapses and (begin == begins[d] or i == end):
                begin = i  # white space at either end of a document is in no token
            word_end, worst = _word(data, i, end, kinds)
            if worst in (_UNKNOWN, _ALONE):
                fates[d] = _UNCLASSIFIED if worst == _UNKNOWN else _REFUSED
                n = n_before
                break
            while begin < word_end:
                if cuts and worst == _LETTER and i < word_end:
                    i = _run(data, i, word_end, kinds, many_digits)
                else:
                    i = word_end
                found[n] = _enter(data, begin, i, rows, keys, fresh, used)
                if found[n] < 0:
                    return False, fates, ends
                n += 1
                begin = i
        ends[d] = n
    return True, fates, ends


@_compiled()
def _count_pairs(found, ends, small):
    """Ends of the documents in pairs, from their ends in segments (in place)."""
    n = k = 0
    for d in range(len(ends)):
        while k < ends[d]:
            n += small[found[k], 7]
            k += 1
        ends[d] = n


@_compiled()
def _gather(found, small, pairs, ids, counts):
    """Write the (id, count) pairs of the rows `found`, in order."""
    n = 0
    for row in found:
        size = small[row, 7]
        if size <= _ROW_PAIRS:
            for k in range(size):
                pair = small[row, 8 + k]
                ids[n], counts[n] = pair & 0xFFFF, pair >> 16
                n += 1
        else:
            first = small[row, 8]
            for k in range(size):
                pair = pairs[first + k]
                ids[n], counts[n] = pair & 0xFFFF, pair >> 16
                n += 1


@_compiled()
def _store(at, cuts, new, small, pairs, used):
    """Give row at[i] the pairs new[cuts[i]:cuts[i + 1] - 2]; `pairs` has room. Pairs used then."""
    for i in range(len(at)):
        first, size = cuts[i], cuts[i + 1] - 2 - cuts[i]
        small[at[i], 7] = size
        if size <= _ROW_PAIRS:
            small[at[i], 8:8 + size] = new[first:first + size]
        else:
            small[at[i], 8] = used
            pairs[used:used + size] = new[first:first + size]
            used += size
    return used


@_compiled()
def _rehash(old, keys, rows):
    """Enter the rows of `old` into the larger, empty table `rows`."""
    buffer = np.empty(_KEY_BYTES, np.uint8)
    for row in old:
        size = np.int64(row[3] & np.uint64(0xFFFFFFFF))
        if size > _KEY_BYTES:
            begin = np.int64(row[1])
            at, _ = _row(keys, begin, begin + size, rows, keys)
        else:
            for i in range(size):
                buffer[i] = row[i // 8] >> np.uint64(8 * (i % 8))
            at, _ = _row(buffer, 0, size, rows, keys)
        if size:
            rows[at] = row


# ---- the cache -----------------------------------------------------------------------------------


def _pieces(sp):
    """The ids of the pieces that merging makes, in the order of the vocabulary."""
    return [i for i in range(len(sp)) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)
                                              or sp.id_to_piece(i)[-1:] in caps.OPERATORS)]


def _neighbours(pieces):
    """The pairs of classes that stand side by side in a piece: s space, a letter, 0 digit, x."""
    found = set()
    for piece in pieces:
        named = "".join("s" if c == SPACE_MARK else "x" if not (c.isascii() and c.isalnum()) else
                        "a" if c.isalpha() else "0" for c in piece)
        found.update(named[i:i + 2] for i in range(len(named) - 1))
    return found


class SegmentCache:
    """Token ids and byte counts of whole documents, equal to the exact encoder's.

    `sp` is the SentencePieceProcessor of `model` (bytes); `exact(data)` -> (ids, counts), two int
    arrays, encodes one transformed text (UTF-8); `keeps_marks`: U+2581 is not mere white space to
    this tokenizer, so text that holds it is not taken. After a batch the cache is emptied if it
    holds more than `limit` segments, or as much of long ones as would take their memory: a script
    without spaces has segments of a whole line. Raises ValueError for a tokenizer that the cuts are
    not exact for.
    """

    def __init__(self, sp, model, exact, keeps_marks=False, limit=1 << 20):
        self._sp, self._exact, self._limit = sp, exact, limit
        pieces = _pieces(sp)
        beside = _neighbours(map(sp.id_to_piece, pieces))
        if not any(name in model for name in _NORMALISERS):
            raise ValueError("its normaliser is neither nmt_nfkc nor identity")
        if any(sp.get_score(i) != -rank for rank, i in enumerate(pieces)):
            raise ValueError("its pieces are not ranked as BPE ranks them")
        if sp.normalize("x") != "x" or {"as", "0s", "xs"} & beside:
            raise ValueError("it does not put a space in front of the word only")
        mixed = bool({"a0", "0a", "ax", "xa", "0x", "x0"} & beside)
        self._shape = sp.normalize("x  x") == f"x{SPACE_MARK}x", not mixed, "00" in beside
        self._kinds = np.zeros(0x110000, np.uint8)
        self._kinds[[ord(c) for c in (*caps.OPERATORS, *SPACE_MARK * keeps_marks)]] = _ALONE
        self._classify(c for c in map(chr, range(0x10000)) if unicodedata.category(c) != "Cs")
        self._empty()

    def _empty(self):
        self._rows, self._keys = np.zeros((1 << 16, 8), np.uint64), np.empty(1 << 20, np.uint8)
        self._pairs, self._n_pairs = np.empty(1 << 16, np.uint32), 0
        self._used = np.zeros(3, np.int64)

    def _grow(self):
        """Twice the room; nothing may be pending."""
        rows = np.zeros((2 * len(self._rows), 8), np.uint64)
        _rehash(self._rows, self._keys, rows)
        self._rows = rows
        self._keys = np.concatenate((self._keys, np.empty_like(self._keys)))

    def _classify(self, characters):
        """Enter the kind of each character: what it may do to others decides how text is cut."""
        new = sorted({c for c in characters if self._kinds[ord(c)] == _UNKNOWN})
        images = self._sp.normalize([f"x{c}x" for c in new])
        for c, image in zip(new, images, strict=True):
            self._kinds[ord(c)] = self._kind(c, image[1:-1])

    @staticmethod
    def _kind(c, image):
        category = unicodedata.category(c)
        if image == SPACE_MARK:
            return _SPACE
        if not image or SPACE_MARK in image or category == "Cn":
            return _ALONE
        if category == "Cc" and c not in "\t\n\f\r":
            return _ALONE
        if category[0] == "M":
            return _MARK
        if image != c:
            return _ODD
        if c.isascii() and c.isalnum():
            return _LETTER if c.isalpha() else _DIGIT
        return _OTHER

    def encode(self, texts):
        """[(ids uint16 [n], counts uint16 [n]), or None for a document that is not taken]."""
        parts = [text.encode() for text in texts]
        joined = b"".join(parts)
        data, begins = np.frombuffer(joined, np.uint8), np.cumsum([0, *map(len, parts)])
        found = np.empty(len(data), np.int32)
        fresh = np.empty((min(len(data), 1 << 18), 3), np.int64)
        while True:
            self._used[1] = 0
            room, fates, ends = _scan(data, begins, self._kinds, self._shape,
                                      (self._rows, self._keys, fresh), self._used, found)
            self._learn(joined, fresh[:self._used[1]])
            unclassified = np.flatnonzero(fates == _UNCLASSIFIED)
            self._classify({c for d in unclassified for c in texts[d]})
            if not room:
                self._grow()
            elif not len(unclassified):
                break
        found, small = found[:ends[-1]], self._rows.view(np.uint32)
        _count_pairs(found, ends, small)
        ids, counts = np.empty((2, ends[-1]), np.uint16)
        _gather(found, small, self._pairs, ids, counts)
        if max(self._used[0], self._used[2] // 32, self._n_pairs // 16) > self._limit:
            self._empty()
        return [(ids[a:b], counts[a:b]) if fate == _TAKEN else None
                for fate, a, b in zip(fates, [0, *ends], ends, strict=False)]

    def _learn(self, data, fresh):
        """Encode the segments data[a:b] of `fresh` (a, b, row) and store what they become."""
        if not len(fresh):
            return
        parts = [data[a:b] for a, b in fresh[:, :2].tolist()]
        text = caps.encode(b"\0".join([b"", *parts, b""]).decode()).replace("\0", _BORDER)
        ids, counts = self._exact(text.encode())
        capnext = ids == self._sp.piece_to_id(caps.CAPNEXT)
        cuts = np.flatnonzero(capnext[:-1] & capnext[1:]) + 2
        assert len(cuts) == len(parts) + 1, "a border was lost"
        if self._n_pairs + len(ids) > len(self._pairs):
            self._pairs = np.concatenate((self._pairs, np.empty(len(self._pairs) + len(ids),
                                                                np.uint32)))
        self._n_pairs = _store(fresh[:, 2].copy(), cuts, (ids | counts << 16).astype(np.uint32),
                               self._rows.view(np.uint32), self._pairs, self._n_pairs)
