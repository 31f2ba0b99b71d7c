"""caseops/encoder.py and segments.py: the fast path equals the slow, on text meant to break it."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

import lossless_caps as caps
from caseops import encoder as encoding
from caseops.sources import Document
from tests.plain_caseops import plain_encoded

MODEL = (Path(__file__).parents[2] / "shared" / "tokenizers"
         / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
CURIOUS = [
    *caps.OPERATORS, "\ue000", "\ue005", "\uf8ff", "\u2581", "\u2585", "\0", "\x01", "\x02", "\x03",
    "\x0b", "\x1f", "\x7f", "\x85", "\x9f", "\ufeff", "\ufffd", "\ufffe", "\u00a0", "\u00ad",
    "\u200b", "\u200c", "\u200d", "\u200e", "\u202e", "\u2066", "\u2028", "\u3000", "\u1680",
    "\u0301", "\u0345", "\ufe0f", "\u20e3", "\u0e33", "\u0e31", "\u09be", "\u093c", "\u3099",
    "\u1100", "\u1161", "\u11a8", "\uac00", "\uff76", "\uff9e", "\u00a8", "\u00b4", "\u037a",
    "\u1fc1", "\u00aa", "\u00ba", "\u2122", "\u24d8", "\u2167", "\u2026", "\u00bd", "\u2047",
    "\ufb01", "\ufb03", "\ufb05", "\u0132", "\u01c5", "\u0149", "\u017f", "\u212a", "\u00df",
    "\u1e9e", "\u0130", "\u0131", "\u00e9", "\u0410", "\u4e2d", "\u6587", "\u0627", "\u0644",
    "\uff21", "\uff0c", "\uff11", "\ufdfa", "\u0660", "\u2460", "\u00b2", "\u2019", "\u201c",
    "\u201d", "\u2013", "\u2014", "\U0001f600", "\U0001f468", "\U0001f3fd", "\U00020000",
    "\U0002f800", "\U0001d400", "\U000e0001", "\U0010fffd", "\u0378", "<s>", "<pad>", "<0x41>",
    "  ", "\n\n", "\r\n", "\t", " \n", "\n ", "\u00a0 ", " \u200b "]
PROSE = [
    "The", "the", "THE", "NASA", "Launch", "iPhone", "McDonald", "don't", "U.S.A.", "2024", "3.14",
    "e-mail", "(see", "page", "12),", "it's", "\u201cquoted\u201d", "\u2014", "well-known", "x2",
    "R2D2", "a", "I", "OK", "oK", "ABc", "a.b,c;d:e", "http://x.org/a_b?c=1", "naive", "na\u00efve",
    "caf\u00e9", "\u00c9COLE"]


def fuzz(n, seed):
    """`n` documents: words, curious characters, any code points, all kinds of white space."""
    rng, texts = random.Random(seed), []
    for _ in range(n):
        curious = rng.choice((0.0, 0.02, 0.2, 0.6))
        parts = []
        for _ in range(rng.randrange(14)):
            if rng.random() < curious:
                anything = chr(rng.choice((rng.randrange(0xD800),
                                           rng.randrange(0xE000, 0x110000))))
                parts.append(rng.choice(CURIOUS) if rng.random() < 0.9 else anything)
            else:
                parts.append(rng.choice(PROSE))
            if rng.random() < 0.7:
                parts.append(" ")
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def published():
    if not MODEL.exists():
        pytest.skip(f"no published tokenizer at {MODEL}")
    return encoding.Encoder(MODEL.read_bytes())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    texts = [*topics.values(), *fuzz(200, 99), "    def f(x):\n\treturn x\n" * 20]
    return encoding.Encoder(encoding.train_tokenizer(documents(texts), 900, 10**9))


def documents(texts):
    return [Document(text, len(text.encode()), 0) for text in texts]


def differing(encoder, texts, size=700):
    """The texts whose ids or byte counts differ from the slow path's; batches keep the cache."""
    wrong = []
    for start in range(0, len(texts), size):
        batch = texts[start:start + size]
        for text, (ids, counts), slow in zip(batch, encoder.encode_documents(batch),
                                             plain_encoded(encoder.sp, batch), strict=True):
            if (ids.tolist(), counts.tolist()) != slow:
                wrong.append(text)
    return wrong


@pytest.mark.slow
def test_fuzzed_documents_equal_the_slow_path(published):
    texts = fuzz(100_000, 7)
    assert differing(published, texts) == []
    taken = published.cache.encode(texts)
    assert 0.5 < np.mean([found is not None for found in taken]) < 0.95


def test_own_tokenizer_equals_the_slow_path(own):
    texts = [t.replace("\u2581", "") for t in fuzz(6000, 8)]
    assert own.cache is not None
    assert differing(own, texts) == []
    for text in texts:
        (ids, counts), = own.encode_documents([text])
        assert own.decode(ids) == text
        assert counts.sum() == len(text.encode())


def test_every_character_beside_letters_digits_and_spaces(published):
    characters = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(f" a{c}1{c} {c}b{c}{c}" for c in characters[i:i + 3])
             for i in range(0, len(characters), 3)]
    assert differing(published, texts) == []


def test_the_cache_grows_and_is_emptied(published, own):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh XYZ.,", k=200)) + "q" * rng.randrange(60)
             for _ in range(3000)]
    for encoder in (published, own):
        before = encoder.cache._limit, len(encoder.cache._rows)
        assert differing(encoder, texts, 3000) == []  # one batch: it must grow on the way
        assert len(encoder.cache._rows) > before[1]
        encoder.cache._limit = 500
        for start in range(0, 3000, 100):
            assert differing(encoder, texts[start:start + 100]) == []
            assert encoder.cache._used[0] < 500
        encoder.cache._limit = before[0]


def test_a_whole_batch_at_once_equals_single_documents(published):
    texts = fuzz(500, 11)
    together = published.encode_documents(texts)
    fresh = encoding.Encoder(MODEL.read_bytes())
    for text, (ids, counts) in zip(texts, together, strict=True):
        (alone, spans), = fresh.encode_documents([text])
        assert ids.tolist() == alone.tolist()
        assert counts.tolist() == spans.tolist()


@pytest.mark.parametrize("text", ["", " ", "\n", "a", "\0", "\ufe0f", "x\ufe0f", " \ufe0f",
                                  "word" * 30_000, "a " * 40_000, "a" + " " * 65_534 + "b",
                                  "\u4e2d\u6587" * 20_000, "a\n\n \n b", "\ufdfa" * 50])
def test_single_documents(published, text):
    assert differing(published, [text]) == []


def test_lone_surrogates_are_refused_by_both_paths(published):
    for text in ("a\ud800b", "x \udfff"):
        with pytest.raises(UnicodeEncodeError):
            published.encode_documents([text])


@pytest.mark.parametrize("changed", [
    {"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc_cf"},
    {"add_dummy_prefix": True}, {"treat_whitespace_as_suffix": True},
    {"split_by_whitespace": False}, {"split_digits": False, "split_by_number": False},
    {"split_by_unicode_script": False}, {"remove_extra_whitespaces": True},
    {"normalization_rule_name": "nmt_nfkc"},
    {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}])
def test_other_tokenizers_are_exact_too(monkeypatch, changed):
    """Those that the cuts are not exact for have no cache; the others equal the slow path."""
    monkeypatch.setattr(encoding, "TOKENIZER_SPEC", encoding.TOKENIZER_SPEC | changed)
    prose = [" ".join(random.Random(i).choices(PROSE, k=40)) for i in range(300)]
    model = encoding.train_tokenizer(documents(prose), 320, 10**9)
    encoder = encoding.Encoder(model)
    texts = [t.replace("\u2581", "") for t in fuzz(1500, 12)]
    assert differing(encoder, texts) == []
    refused = {"model_type", "add_dummy_prefix", "treat_whitespace_as_suffix"} & set(changed)
    refused = refused or "cf" in str(changed)
    assert (encoder.cache is None) == bool(refused)


def test_a_piece_of_letters_and_others_keeps_words_whole():
    words = ["\u212aelvin", "x\u00e9x", "na\u00efve", "\u00c9cole", "plain", "x2y"]
    prose = [" ".join(random.Random(i).choices(words, k=60)) for i in range(200)]
    encoder = encoding.Encoder(encoding.train_tokenizer(documents(prose), 300, 10**9))
    assert any("\u212ae" in encoder.sp.id_to_piece(i) for i in range(encoder.size))
    curious = [text.replace("\u2581", "") for text in fuzz(300, 14)]
    assert differing(encoder, [*prose, "\u212aelvin \u212ael vin2\u212ae", *curious]) == []


def test_memory_is_bounded_where_segments_are_long(published):
    """Text without spaces: a line is a segment, and no two are the same."""
    rng = random.Random(15)
    cache = encoding.SegmentCache(published.sp, MODEL.read_bytes(), published.encode_transformed,
                                  limit=4000)
    for _ in range(12):
        texts = ["".join(map(chr, rng.choices(range(0x4e00, 0x5e00), k=60))) for _ in range(500)]
        cache.encode(texts)
        assert cache._used[2] <= 32 * 4000
        assert cache._n_pairs <= 16 * 4000


def test_compiled_where_no_directory_takes_it(tmp_path):
    """A read-only checkout and no home directory, such as in a container."""
    root = Path(__file__).parents[1]
    shutil.copytree(root / "caseops", tmp_path / "caseops",
                    ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "caseops" / "__pycache__").write_text("in the way")
    shutil.copy(root / "lossless_caps.py", tmp_path)
    nowhere = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")} \
        | {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    subprocess.run([sys.executable, "-c", "import caseops.segments"], cwd=tmp_path, env=nowhere,
                   check=True)


def test_without_the_compiler_the_slow_path_serves(monkeypatch, published):
    monkeypatch.setattr(published, "cache", None)
    assert differing(published, fuzz(200, 13)) == []


# ---- fused markers

def unfused(ids, counts, space):
    """The ids and byte counts without fusion; a fused pair's bytes are its space's."""
    pairs = []
    for i, count in zip(ids.tolist(), counts.tolist(), strict=True):
        piece = encoding.FUSED.get(i)
        pairs += [(i, count)] if piece is None else [
            (space, count), (encoding.OPERATOR_IDS[piece[1]], 0)]
    return pairs


def test_fused_markers_change_nothing_but_pairs(published):
    """The published tokenizer: every [space, TITLE or ALLCAPS] is one id, all else is as it was."""
    fused = encoding.Encoder(encoding.fuse_markers(MODEL.read_bytes()))
    assert fused.cache is not None and fused.size == published.size
    texts = [*topics.values(), *fuzz(4000, 21), "NASA said: The USA, an Island  In A Sea. I AM",
             "\u2581I", "\u2581A\u00c0B ", "x \u2581Cap"]
    space = fused.sp.piece_to_id("\u2581")
    for text, plain, own in zip(texts, published.encode_documents(texts),
                                fused.encode_documents(texts), strict=True):
        if "\u2581" in text:  # SentencePiece's own mark for a space: may stand beside one
            continue
        assert unfused(*own, space) == list(zip(*map(np.ndarray.tolist, plain), strict=True))
        assert fused.sp.decode(own[0].tolist()) == published.sp.decode(plain[0].tolist())
    assert differing(fused, texts) == []
    ids = np.concatenate([ids for ids, _ in fused.encode_documents(texts)])
    operator = np.isin(ids[1:], [4, 5])
    assert operator.any() and not (ids[:-1][operator] == space).any()
    assert fused.textless.tolist() == [1, 3]


def test_an_own_tokenizer_with_fused_markers_keeps_every_byte():
    model = encoding.train_tokenizer(documents([*topics.values()]), 900, 10**9)
    plain, fused = encoding.Encoder(model), encoding.Encoder(encoding.fuse_markers(model))
    assert fused.exact and fused.cache is not None
    texts = [*topics.values(), *(t.replace("\u2581", "") for t in fuzz(1500, 22))]
    assert differing(fused, texts) == []
    lengths = []
    for text, (ids, counts) in zip(texts, fused.encode_documents(texts), strict=True):
        assert fused.decode(ids) == text and counts.sum() == len(text.encode())
        lengths.append(len(ids))
    assert sum(lengths) < sum(len(ids) for ids, _ in plain.encode_documents(texts))


def test_fusing_twice_is_refused(published):
    model = encoding.fuse_markers(MODEL.read_bytes())
    with pytest.raises(encoding.UserError, match="pieces 0 and 2 are not padding .* leave out"):
        encoding.fuse_markers(model)
