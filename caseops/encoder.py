"""Text -> token ids and the original bytes of each; training a tokenizer that loses nothing."""

import io
import re

import numpy as np
import sentencepiece

import lossless_caps as caps
from caseops import BOS, COUNT_LIMIT, SPACE_MARK, UserError
from caseops.processors import processors

try:
    from caseops.segments import SegmentCache
except ImportError:  # numba: the same ids without it, several times slower
    SegmentCache = None

OPERATOR_IDS = {op: 4 + i for i, op in enumerate(caps.OPERATORS)}
# What `fuse_markers` puts in the place of padding and end of sequence, which shards never hold.
FUSED = {0: SPACE_MARK + caps.TITLE, 2: SPACE_MARK + caps.ALLCAPS}
_USER_DEFINED = 4  # ModelProto.SentencePiece.Type


class DocumentError(ValueError):
    """Document number `index` of a batch cannot be prepared; the message says why."""

    def __init__(self, message, index):
        super().__init__(message)
        self.index = index


class Encoder:
    """Texts -> (token ids, original bytes of each token), through the case transform.

    `model` is a serialized SentencePiece model with the four operators at ids 4..7, BOS at 1,
    byte fallback and at most 65,536 pieces; else UserError, which begins with `name`.
    `exact`: this tokenizer keeps every byte, so decode(ids) is the text.
    """

    _PROBE = " \t\n  a\u00a0 \r\n\x00\x01\ufb01 e\u0301\ufeff \ufffd  \n "
    # A piece of 65,536 bytes can only be one whose source is mostly normalised away: it holds at
    # least one long run of something other than visible ASCII.
    _LONG_RUN = re.compile(r"[^!-~]{900}")

    def __init__(self, model, name="tokenizer", threads=None):
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except RuntimeError as e:
            raise UserError(f"{name}: not a SentencePiece model ({e}); give --sp another file, or "
                            "use --train-tokenizer") from None
        self.size = len(self.sp)
        self.threads = threads or processors()
        pieces = [self.sp.id_to_piece(i) for i in range(self.size)]
        self._require(name, pieces)
        self.textless = np.array([i for i in range(self.size)  # control pieces and the unknown one
                                  if self.sp.is_control(i) or self.sp.is_unknown(i)])
        is_byte = [self.sp.is_byte(i) for i in range(self.size)]
        # Length of each piece in normalised text, where a space is SPACE_MARK (3 bytes).
        self._lengths = np.array([1 if b else len(p.encode())
                                  for p, b in zip(pieces, is_byte, strict=True)])
        self.exact = self.sp.decode(self.sp.encode(self._PROBE)) == self._PROBE
        mark = [self.sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        self._mark = np.array(mark, np.uint16), np.array([0, 0, 3], np.uint16)
        self.cache, self.cache_reason = None, "numba is not installed"
        if SegmentCache is not None:
            try:
                fused = any(piece in FUSED.values() for piece in pieces)
                self.cache = SegmentCache(self.sp, model, self.encode_transformed,
                                          self.exact or fused)
            except ValueError as e:
                self.cache_reason = str(e)

    def _require(self, name, pieces):
        problem = None
        if self.size > COUNT_LIMIT:
            problem = f"{self.size:,} pieces, but ids are 16 bits: at most {COUNT_LIMIT:,}"
        elif any(i >= self.size or pieces[i] != op for op, i in OPERATOR_IDS.items()):
            problem = "the case operators U+E001..U+E004 are not the pieces 4..7"
        elif self.sp.bos_id() != BOS:
            problem = f"BOS has id {self.sp.bos_id()}, not {BOS}"
        elif self.sp.piece_to_id("<0xE2>") == self.sp.unk_id():
            problem = "no byte fallback"
        if problem:
            raise UserError(f"{name}: {problem}; use a CaseOps tokenizer, or --train-tokenizer")

    def encode_documents(self, texts, counts=True):
        """[(ids uint16 [n], counts uint16 [n] or None)] for a list of str, without BOS.

        counts[i] is the number of original UTF-8 bytes that token i stands for. A tokenizer that
        is not `exact` may drop white space at either end of a text; those bytes are not counted.
        Raises DocumentError for a piece of 65,536 bytes or more.
        """
        done = [None] * len(texts)
        fast = [i for i, text in enumerate(texts) if self.cache and not self._may_overflow(text)]
        if fast:
            for i, found in zip(fast, self.cache.encode([texts[i] for i in fast]), strict=True):
                done[i] = found
        for i, text in enumerate(texts):
            if done[i] is None:
                done[i] = self._encode_exactly(text, i)
        return done if counts else [(ids, None) for ids, _ in done]

    def _may_overflow(self, text):
        return (len(text) >= COUNT_LIMIT // 4 and len(text.encode()) >= COUNT_LIMIT
                and self._LONG_RUN.search(text))

    def _encode_exactly(self, text, index):
        """One document without the cache; `index` is its number in the batch, for the error."""
        if self.exact and SPACE_MARK in text:
            return self._with_space_marks(text, index)
        ids, spans = self.encode_transformed(caps.encode(text).encode())
        if len(spans) and spans.max() >= COUNT_LIMIT:
            raise DocumentError(f"a piece of {spans.max():,} bytes (limit {COUNT_LIMIT - 1:,})",
                                index)
        return ids.astype(np.uint16), spans.astype(np.uint16)

    def decode(self, ids):
        """The text of `ids` (without BOS): the original one where the tokenizer is `exact`."""
        return caps.decode(self.sp.decode([int(i) for i in ids]))

    def count_textless(self, ids):
        """How many of the ids (an integer array) have no text."""
        return int(np.isin(ids, self.textless).sum())

    def encode_transformed(self, data):
        """(ids, counts), two integer arrays, of one transformed text as UTF-8."""
        ids = np.array(self.sp.encode(data), np.int64)
        normal, origin = self.sp.normalize(data, with_offsets=True)
        ends = np.cumsum(self._lengths[ids], dtype=np.int64)
        assert len(normal) == (ends[-1] if len(ends) else 0), "pieces do not tile the text"
        if not len(ends):
            return ids, ends
        original = caps.cumulative_bytes(data)[np.array(origin)]
        return ids, np.diff(original[ends], prepend=original[0])

    def _with_space_marks(self, text, index):
        """SentencePiece reads a literal U+2581 as a space: spell it in byte tokens instead."""
        first, *rest = (self._encode_exactly(part, index) for part in text.split(SPACE_MARK))
        joined = [first, *(pair for part in rest for pair in (self._mark, part))]
        ids, spans = zip(*joined, strict=True)
        return np.concatenate(ids), np.concatenate(spans)


# ---- fused markers -------------------------------------------------------------------------------


def fuse_markers(model, name="tokenizer"):
    """A serialized model that gives the space before a capital word and its operator one id.

    The pieces 0 and 2 become FUSED, taken before any merge, as the operators themselves are; the
    text of ids is what it was, but for blanks beside a literal U+2581. After parameter-golf #2109.
    UserError where they are not free.
    """
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(model)
    if not all(sp.is_control(i) for i in FUSED) \
            or any(len(sp.id_to_piece(i).encode()) > 99 for i in range(3)):
        raise UserError(f"{name}: pieces 0 and 2 are not padding and end of sequence, so they are "
                        "not free; leave out --fuse-markers")
    parts, at = [], 0
    for i in range(3):  # the message begins with the pieces; one so short gives its size in a byte
        end = at + 2 + model[at + 1]
        part = model[at:end]
        if i in FUSED:
            piece = FUSED[i].encode()
            body = b"\x0a%c%b\x15%b\x18%c" % (len(piece), piece, bytes(4), _USER_DEFINED)
            part = b"\x0a%c%b" % (len(body), body)
        parts.append(part)
        at = end
    return b"".join([*parts, model[at:]])


# ---- training a tokenizer ------------------------------------------------------------------------

# The trainer skips a sentence that holds NUL or its own U+2585, and reads U+2581 as a space.
_UNTRAINABLE = re.compile("[\0\u2581\u2585]")
# Keeps every byte. Whitespace may form pieces of its own, or indentation costs a token a space.
TOKENIZER_SPEC = {
    "model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "add_dummy_prefix": False, "byte_fallback": True, "split_digits": True,
    "character_coverage": 0.9995, "allow_whitespace_only_pieces": True,
    "user_defined_symbols": list(caps.OPERATORS), "pad_id": 0, "bos_id": 1, "eos_id": 2,
    "unk_id": 3, "max_sentence_length": 1 << 16, "num_threads": 4}


def training_pieces(text, limit=4000):
    """Cut encoded `text` before white space into pieces of at most `limit` characters, so that
    the trainer, which skips long sentences, sees all of a long document."""
    for part in _UNTRAINABLE.split(text):
        start = 0
        while len(part) - start > limit:
            cut = max(part.rfind(c, start + 1, start + limit) for c in " \n")
            cut = cut if cut > 0 else start + limit
            yield part[start:cut]
            start = cut
        if start < len(part):
            yield part[start:]


def train_tokenizer(documents, vocab_size, max_bytes, progress=None):
    """Train a byte-exact BPE on the first `max_bytes` of `documents`; the serialized model.

    Raises UserError where the text is too little or too varied for `vocab_size`.
    """
    pieces, total = [], 0
    for document in documents:
        pieces.extend(training_pieces(caps.encode(document.text)))
        total += document.size
        if progress:
            progress()
        if total >= max_bytes:
            break
    model = io.BytesIO()
    if not pieces:
        raise UserError("--train-tokenizer: the training documents are empty; give more text")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces), model_writer=model, vocab_size=vocab_size,
            minloglevel=2, **TOKENIZER_SPEC)
    except RuntimeError as e:
        low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(e))
        high = re.search(r"value <= (\d+)", str(e))
        advice = f"at least {int(low[1]) + 1}" if low else f"at most {high[1]}" if high else ""
        raise UserError(f"--vocab-size {vocab_size} does not suit {total:,} bytes of training "
                        f"text; use {advice or 'another size or more text'}"
                        + ("" if advice else f" ({' '.join(str(e).split())})")) from None
    return model.getvalue()
