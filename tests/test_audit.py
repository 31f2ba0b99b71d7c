"""caseops/splits.py, overlap.py, audit.py, export.py: shards read again, leaks found, text back."""

import io
import json
import os
import random
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lossless_caps as caps  # noqa: E402
import prepare_caseops_data as prep  # noqa: E402
from caseops import UserError, encoder, overlap, sources, splits  # noqa: E402
from caseops import audit as auditing  # noqa: E402
from caseops import export as exporting  # noqa: E402

PUBLISHED = ROOT.parent / "shared" / "tokenizers" \
    / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"


# ---- shards made by hand -------------------------------------------------------------------------


def write_shard(path, values, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(values) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(values, "<u2").tobytes())


def stream(documents):
    return np.concatenate([np.append(1, d) for d in documents]).astype("<u2")


def write_split(folder, split, documents, shard_tokens=10**6, side=False):
    tokens = stream(documents)
    for i in range(0, len(tokens), shard_tokens):
        part = tokens[i:i + shard_tokens]
        write_shard(folder / f"fineweb_{split}_{i // shard_tokens:06d}.bin", part)
        if side:
            write_shard(folder / f"fineweb_{split}_bytes_{i // shard_tokens:06d}.bin",
                        3 * (part != 1))


def write_set(folder, val, train, shard_tokens=10**6, side=True):
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder, "val", val, shard_tokens, side)
    write_split(folder, "train", train, shard_tokens)
    return folder


def random_documents(rng, n, longest=80, vocabulary=5000):
    return [rng.integers(4, vocabulary, rng.integers(0, longest)) for _ in range(n)]


def run(folder, **options):
    """(Report, lines) of an audit."""
    lines = []
    return auditing.audit(folder, out=lines.append, **options), lines


# ---- slow twins ----------------------------------------------------------------------------------


def whole_twin(val, train):
    """{validation document: first training document equal to it}, by a dictionary of tuples."""
    first = {}
    for i, d in enumerate(train):
        first.setdefault(tuple(d), i)
    return {i: first[tuple(d)] for i, d in enumerate(val) if len(d) and tuple(d) in first}


def shingles(d):
    d = tuple(int(x) for x in d)
    return {d[i:i + overlap.SHINGLE] for i in range(len(d) - overlap.SHINGLE + 1)}


def near_twin(val, train):
    """{validation document: the largest share of its shingles that one training document has}."""
    train, found = [shingles(d) for d in train], {}
    for i, d in enumerate(val):
        own = shingles(d)
        if len(own) >= overlap.FEWEST:
            share = max(len(own & other) for other in train) / len(own)
            if share >= overlap.NEAR:
                found[i] = share
    return found


def searched(folder, rate=None):
    found = splits.find_shards(folder)
    val, train = splits.Split(found["val"]), splits.Split(found["train"])
    tokens, bos = overlap.load(val.pieces())
    v = overlap.Validation(tokens, *splits.document_spans(bos, len(tokens)),
                           rate or overlap.choose_rate(len(val), len(train)))
    return v, overlap.search(v, train, train.pieces())


def expand(v, matches):
    return {d: matches[int(v.first[d])] for d in range(len(v)) if int(v.first[d]) in matches}


def edited(rng, d, edits):
    d = d.copy()
    d[rng.integers(0, len(d), edits)] = rng.integers(5000, 6000, edits)
    return d


@pytest.mark.parametrize("seed", range(12))
def test_search_equals_twin(seed, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(splits, "BLOCK_TOKENS", int(rng.choice([16, 57, 300, 1 << 18])))
    val, train = random_documents(rng, 25), random_documents(rng, 40)
    few = [rng.integers(4, 6, n) for n in (0, 1, 2, 2, 3)]  # short: equal ones happen
    val += few + [val[3], val[3], val[7]]
    train += [rng.integers(4, 6, n) for n in (0, 0, 1, 2, 3)] + [val[3], val[11], val[11]]
    long = [d for d in val if len(d) > 40]
    train += [edited(rng, d, 1) for d in long[:6]]  # near, some of them
    train += [np.concatenate((train[0], d, train[1])) for d in long[6:8]]  # contained
    train += [d[:-1] for d in long[8:10]] + [np.concatenate(long)]
    order = rng.permutation(len(train))
    train = [train[i] for i in order]
    write_set(tmp_path, val, train, shard_tokens=int(rng.choice([13, 100, 10**6])))
    v, found = searched(tmp_path)
    assert v.rate == 1
    assert found.documents == len(train)
    whole = whole_twin(val, train)
    assert {d: m.number for d, m in expand(v, found.whole).items()} == whole
    near = {d: s for d, s in near_twin(val, train).items() if d not in whole}
    assert {d: m.share for d, m in expand(v, found.near).items()} == pytest.approx(near)
    for d, m in expand(v, found.near).items():
        other = shingles(train[m.number])
        assert len(shingles(val[d]) & other) / len(shingles(val[d])) == pytest.approx(near[d])
        assert found.split.read(m.begin, m.end).tolist() == train[m.number].tolist()
    assert whole
    assert near


@pytest.mark.parametrize("rate", [2, 16])
def test_sampled_search_finds_what_is_near(rate, tmp_path, monkeypatch):
    rng = np.random.default_rng(rate)
    monkeypatch.setattr(splits, "BLOCK_TOKENS", 1000)
    val = [rng.integers(4, 8000, n) for n in rng.integers(400, 900, 30)]
    train = [rng.integers(4, 8000, n) for n in rng.integers(400, 900, 60)]
    train[10] = val[0]
    train[20], train[21] = edited(rng, val[1], 2), edited(rng, val[2], 400)
    train[30] = np.concatenate((train[30], val[3], train[31]))
    write_set(tmp_path, val, train, shard_tokens=777)
    v, found = searched(tmp_path, rate)
    assert v.judged.all()
    assert abs(v.kept.sum() * rate / sum(len(d) for d in val) - 1) < 0.25
    assert {d: m.number for d, m in found.whole.items()} == {0: 10}
    assert {d: (m.number, m.share) for d, m in found.near.items()} == {
        1: (20, pytest.approx(near_twin(val[1:2], train[20:21])[0])), 3: (30, 1.0)}


def test_a_document_cut_in_two_is_scattered(tmp_path):
    rng = np.random.default_rng(5)
    val = [rng.integers(4, 8000, 300) for _ in range(5)]
    train = random_documents(rng, 9) + [val[2][:150], val[2][150:]]
    _, found = searched(write_set(tmp_path, val, train))
    assert (found.whole, found.near, found.scattered()) == ({}, {}, 1)


def test_boilerplate_is_no_near_duplicate(tmp_path):
    rng = np.random.default_rng(6)
    footer = rng.integers(4, 8000, 60)
    val = [np.concatenate((rng.integers(4, 8000, 40), footer)) for _ in range(overlap.COMMON + 1)]
    train = [np.concatenate((rng.integers(4, 8000, 40), footer)) for _ in range(20)]
    val.append(rng.integers(4, 8000, 90))
    train.append(edited(rng, val[-1], 1)[:88])
    v, found = searched(write_set(tmp_path, val, train))
    assert {d: m.number for d, m in found.near.items()} in ({}, {len(val) - 1: 20})
    assert list(found.near) == list(near_twin(val[-1:], train[-1:]) and [len(val) - 1])
    assert np.bincount(v.owners[found.somewhere])[:-1].sum() == 0
    assert v.kept.tolist() == [40] * (overlap.COMMON + 1) + [75]  # those that touch its own text
    assert v.judged.all()


def test_a_document_without_end_keeps_its_shingles(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "BLOCK_TOKENS", 64)
    rng = np.random.default_rng(7)
    val = [rng.integers(4, 8000, 900) for _ in range(100)]
    train = [np.concatenate(val)]  # all of validation in one document, many blocks
    _, found = searched(write_set(tmp_path, val, train))
    assert sorted(found.near) == list(range(100))
    monkeypatch.setattr(overlap, "_COUNTED", 10)  # the estimate stands
    assert {round(m.share, 6) for m in searched(tmp_path)[1].near.values()} == {1.0}


def test_choice_of_shingles_depends_on_their_tokens_alone():
    rng = np.random.default_rng(8)
    d = rng.integers(4, 8000, 3000).astype("<u2")
    around = np.concatenate((rng.integers(4, 8000, 123), d, rng.integers(4, 8000, 77)))
    own = overlap.kept_positions(d, 16)
    there = overlap.kept_positions(around.astype("<u2"), 16) - 123
    assert own.tolist() == [p for p in there if 0 <= p <= 3000 - overlap.SHINGLE]
    assert 3000 / 16 * 0.7 < len(own) < 3000 / 16 * 1.3
    keys = overlap.shingle_keys(d, own)
    assert keys.tolist() == overlap.shingle_keys(around.astype("<u2"), own + 123).tolist()
    for i in range(overlap.SHINGLE):  # every token counts
        other = d[:overlap.SHINGLE].copy()
        other[i] ^= 1
        assert overlap.shingle_keys(other, np.array([0])) \
            != overlap.shingle_keys(d[:overlap.SHINGLE].copy(), np.array([0]))


@pytest.mark.parametrize("n", [0, 1, 5, 3000])
def test_key_table_equals_dictionary(n):
    rng = np.random.default_rng(n)
    keys = np.unique(rng.integers(0, 1 << 63, n).astype(np.uint64) * np.uint64(2))
    keys = np.unique(np.append(keys, keys[:n // 3] + np.uint64(1)))  # neighbours in one bucket
    asked = np.concatenate((rng.permutation(keys), rng.integers(0, 1 << 62, 500).astype(np.uint64),
                            keys[:n // 4] + np.uint64(2), keys[:9]))
    where = {k: i for i, k in enumerate(keys.tolist())}
    i, j = overlap.KeyTable(keys).find(asked)
    assert dict(zip(i.tolist(), j.tolist(), strict=True)) \
        == {i: where[k] for i, k in enumerate(asked.tolist()) if k in where}


def test_documents_across_tiny_shards(tmp_path, monkeypatch):
    rng = np.random.default_rng(9)
    docs = [*random_documents(rng, 30, 12), [], [], [9]]
    for shard_tokens, block in ((1, 1), (3, 2), (50, 7), (10**6, 1 << 18)):
        monkeypatch.setattr(splits, "BLOCK_TOKENS", block)
        folder = write_set(tmp_path / str(shard_tokens), docs, docs, shard_tokens)
        split = splits.Split(splits.find_shards(folder)["train"])
        read = list(splits.documents(split))
        assert [d.tolist() for _, d in read] == [list(d) for d in docs]
        begins, ends = splits.document_spans(np.flatnonzero(stream(docs) == 1), len(split))
        assert [b for b, _ in read] == begins.tolist()
        assert [split.read(b, e).tolist() for b, e in zip(begins, ends)] == [list(d) for d in docs]
        joined, spans = [], []
        for block in splits.blocks(split.pieces()):
            assert block.offset == len(joined)
            assert block.tokens[0] == 1
            spans += zip(block.begins + block.offset, block.ends + block.offset)
            joined += block.tokens.tolist()
        assert joined == stream(docs).tolist()
        assert spans == list(zip(begins, ends))


def test_fragment_before_the_first_bos():
    begins, ends = splits.document_spans([3, 4], 9)
    assert list(zip(begins, ends)) == [(0, 3), (4, 4), (5, 9)]
    begins, ends = splits.document_spans([], 4)
    assert list(zip(begins, ends)) == [(0, 4)]
    begins, ends = splits.document_spans([], 0)
    assert len(begins) == len(ends) == 0


# ---- the report ----------------------------------------------------------------------------------


@pytest.fixture
def clean(tmp_path):
    """A sound set without overlap, in three shards a split."""
    rng = np.random.default_rng(10)
    docs = [rng.integers(4, 400, n) for n in rng.integers(60, 90, 120)]
    total = len(stream(docs[:40]))
    folder = tmp_path / "clean_sp420_set"
    folder.mkdir()
    write_split(folder, "val", docs[:40], -(-total // 3), side=True)
    write_split(folder, "train", docs[40:], 2000)
    return folder, docs


def test_clean_set(clean):
    report, lines = run(clean[0])
    assert (report.exit_code, report.leaks, report.problems) == (0, 0, [])
    assert lines[-1] == "verdict: clean"
    assert not [x for x in lines if x.startswith(("LEAK", "error"))]
    assert report.figures["val_documents"] == 40
    assert report.figures["train_documents"] == 80
    assert report.figures["val_bytes"] == 3 * (report.figures["val_tokens"] - 40)
    assert report.exit_code == 0
    text = "\n".join(lines)
    assert "at least 80% of their 16-token shingles" in text
    assert "no manifest" in text


def test_one_copied_document_is_a_leak(clean):
    folder, docs = clean
    write_split(folder, "train", docs[40:70] + [docs[17]] + docs[70:], 2000)
    report, lines = run(folder)
    assert (report.exit_code, report.leaks) == (1, 1)
    assert "; next: prepare with --drop-val-duplicates, which" in lines[-1]
    f, = report.whole
    assert (f.document, f.number, f.tokens, f.size) == (17, 30, len(docs[17]) + 1,
                                                        3 * len(docs[17]))
    begin = len(stream(docs[40:70])) + 1
    assert f.shard == f"fineweb_train_{begin // 2000:06d}.bin"
    assert "LEAK: 1 of 40 validation documents" in lines[-1]
    assert "1 are scattered" in report.patterns[0]


@pytest.mark.parametrize(("n", "leaks"), [(1, 0), (2, 2)])
def test_short_documents_leak_in_numbers_only(n, leaks, tmp_path):
    rng = np.random.default_rng(11)
    short = [rng.integers(4, 400, 5) for _ in range(3)]
    val = short[:n] + [[]] + [rng.integers(4, 400, 70) for _ in range(60)] + [[]]
    train = [[]] + [rng.integers(4, 400, 70) for _ in range(60)] + short[:n][::-1]
    report, lines = run(write_set(tmp_path, val, train))
    assert (report.leaks, len(report.short), report.whole) == (leaks, n, [])
    assert report.figures["val_empty"] == 2
    assert report.figures["val_bytes"] == 3 * (report.figures["val_tokens"] - len(val))
    assert any("fewer than 16 tokens" in x for x in lines)


def test_near_duplicates_leak_in_numbers_or_in_order(clean):
    folder, docs = clean
    rng = np.random.default_rng(12)
    near = [np.append(d, rng.integers(4, 400, 9)) for d in docs[:40]]
    write_split(folder, "val", docs[:40] + docs[40:40] + list(np.array_split(
        rng.integers(4, 400, 70 * 60), 60)), 10**6, side=True)
    for path in folder.glob("*val*_00000[12].bin"):
        path.unlink()
    for copies, leaks in ((near[:1], 0), (near[:2][::-1], 0), (near[:3], 3), (near[:3][::-1], 3)):
        for path in folder.glob("*train*"):
            path.unlink()
        write_split(folder, "train", docs[40:] + copies, 2000)
        report, lines = run(folder)
        assert [f.document for f in report.near] == list(range(len(copies)))
        assert report.leaks == leaks
        assert report.exit_code == bool(leaks)


def test_identical_shards_repetitions_and_odd_sizes(clean):
    folder, docs = clean
    shutil.copy(folder / "fineweb_train_000000.bin", folder / "fineweb_train_000001.bin")
    tokens = np.fromfile(folder / "fineweb_train_000002.bin", "<u2", offset=1024)
    write_shard(folder / "fineweb_train_000002.bin", tokens[:900])
    report, _ = run(folder)
    assert "fineweb_train_000001.bin: the same as fineweb_train_000000.bin" in report.problems
    assert any("not the last" in x for x in report.notes)


def shard(folder, name):
    return np.fromfile(folder / name, "<u2", offset=1024)


def truncate(folder):
    os.truncate(folder / "fineweb_train_000001.bin", 3000)


def change(name, at, value):
    def act(folder):
        values = shard(folder, name)
        values[at] = value
        write_shard(folder / name, values)
    return act


def big_endian(folder):
    path = folder / "fineweb_train_000001.bin"
    raw = np.fromfile(path, "<i4")
    raw.byteswap().tofile(path)


def relink(path):
    path.unlink()
    path.symlink_to("../../blobs/gone")


def refold(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("harm", "said"), [
    (truncate, "fineweb_train_000001.bin: 3,000 bytes, but 5,024 for the 2,000 tokens of its "
               "header: truncated"),
    (lambda f: os.truncate(f / "fineweb_train_000001.bin", 0), "000001.bin: empty file"),
    (lambda f: os.truncate(f / "fineweb_train_000001.bin", 100), "100 bytes, but the header"),
    (big_endian, "fineweb_train_000001.bin: big-endian header"),
    (lambda f: write_shard(f / "fineweb_train_000001.bin", [1, 2], magic=7), "not a shard: it"),
    (lambda f: write_shard(f / "fineweb_train_000001.bin", [1, 2], version=3), "shard version 3"),
    (lambda f: write_shard(f / "fineweb_train_000001.bin", []), "the header says 0 tokens"),
    (lambda f: write_shard(f / "fineweb_train_000001.bin", [9] * 50, count=40), "something follow"),
    (lambda f: (f / "fineweb_train_000001.bin").unlink(), "shard 1 missing of"),
    (lambda f: os.truncate(f / "fineweb_val_bytes_000001.bin", 1100), "bytes_000001.bin: 1,100"),
    (lambda f: (f / "fineweb_val_bytes_000001.bin").unlink(), "fineweb_val_000001.bin: no byte si"),
    (lambda f: write_shard(f / "fineweb_val_bytes_000001.bin", [0, 3]), "2 counts for the"),
    (lambda f: write_shard(f / "fineweb_val_bytes_000003.bin", [0, 3]), "no validation shard besi"),
    (lambda f: shutil.copy(f / "fineweb_train_000000.bin", f / "other_train_000000.bin"),
     "two shards have number 0"),
    (lambda f: relink(f / "fineweb_train_000001.bin"), "000001.bin: no such file (a dangling"),
    (lambda f: relink(f / "fineweb_val_bytes_000001.bin"), "000001.bin: no such file (a dangling"),
    (lambda f: refold(f / "fineweb_train_000001.bin"), "000001.bin: a folder, not a shard"),
    (lambda f: [change(f"fineweb_val_bytes_00000{i}.bin", slice(None), 0)(f) for i in range(3)],
     "no bytes to 4,096 tokens from token 0 on"),
    (change("fineweb_val_bytes_000000.bin", 0, 3), "gives bytes to 1 of the 40 BOS"),
    (change("fineweb_train_000001.bin", 5, 420), "fineweb_train_000001.bin: id 420, but the voca"),
    (change("fineweb_val_000001.bin", slice(3, 6), 0), "000001.bin: 3 tokens without text"),
    (change("fineweb_train_000000.bin", 0, 9), "training does not begin with BOS"),
    (change("fineweb_val_000000.bin", 0, 9), "validation does not begin with BOS"),
])
def test_format_problems(harm, said, clean):
    harm(clean[0])
    report, lines = run(clean[0])
    assert [x for x in report.problems if said in x], report.problems
    assert report.exit_code == 1
    assert "error" in lines[-1]


BLANKS = ["the cat and the dog, and a  bird: 1 2 3 . " * 4 + str(i) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{whether U+2581 is a piece of its own: path} of a tokenizer without CaseOps."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(BLANKS), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False)
    folder, alone = tmp_path_factory.mktemp("sp"), b"\x0a\x03\xe2\x96\x81"
    model = model.getvalue()
    assert model.count(alone) == 1
    for name, data in (("with", model), ("without", model.replace(alone, b"\x0a\x03\xee\x80\x80"))):
        (folder / name).mkdir()
        (folder / name / "own.model").write_bytes(data)
    return {name: folder / name / "own.model" for name in ("with", "without")}


@pytest.mark.parametrize("name", ["with", "without"])
def test_a_blank_counted_as_three_bytes(name, tokenizers, tmp_path):
    """A sidecar made from pieces: U+2581 and its byte pieces are three bytes, a blank is one."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizers[name]))
    ids = [sp.encode(text) for text in BLANKS]
    three = np.array([1 if sp.is_byte(i) else len(sp.id_to_piece(i).encode())
                      for i in range(len(sp))])
    parts = [np.append(0, three[d]) for d in ids[:20]]
    folder = tmp_path / "own_sp300_set"
    write_set(folder, ids[:20], ids[20:], side=False)
    tokenizers[name].parent.rename(folder / "tokenizers")
    try:
        report, lines = run(folder)
        silent = [x for x in lines if "U+2581" in x]
        assert bool(silent) == (name == "without"), lines
        assert not silent or "no sidecar says" in silent[0]
        write_shard(folder / "fineweb_val_bytes_000000.bin", np.concatenate(parts))
        report, lines = run(folder)
        assert [x for x in report.problems if "blanks as three bytes: a blank is one" in x], lines
        for part, d, text in zip(parts, ids, BLANKS, strict=False):
            part[1:] = exact_bytes(sp, d)
            assert part.sum() == len(text.encode())
        write_shard(folder / "fineweb_val_bytes_000000.bin", np.concatenate(parts))
        report, lines = run(folder)
        assert not [x for x in report.problems if "blank" in x], lines
    finally:
        (folder / "tokenizers").rename(tokenizers[name].parent)


def exact_bytes(sp, ids):
    """Of a text without U+2581: the last byte piece of a blank takes its byte."""
    names = [sp.id_to_piece(i) for i in ids]
    sizes = [1 if sp.is_byte(i) else len(n) for i, n in zip(ids, names, strict=True)]
    for k in range(len(ids) - 2):
        if names[k:k + 3] == ["<0xE2>", "<0x96>", "<0x81>"]:
            sizes[k:k + 3] = 0, 0, 1
    return sizes


def test_nothing_to_audit(tmp_path, clean):
    folder, _ = clean
    two = tmp_path / "two"
    shutil.copytree(folder, two / "a")
    shutil.copytree(folder, two / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    only = tmp_path / "only"
    shutil.copytree(folder, only, ignore=shutil.ignore_patterns("*_train_*"))
    (folder / "manifest.json").write_text("{oops")
    for place, said in (
            (tmp_path / "none", "no such directory"), (tmp_path / "empty", "no shards"),
            (tmp_path / "file", "not a directory"), (two, "several shard directories"),
            (only, "no train shards"), (folder, "manifest.json: not JSON")):
        with pytest.raises(UserError) as e:
            run(place)
        assert said in str(e.value)
        assert "\n" not in str(e.value)
    (only / "fineweb_train_000000.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"fineweb_train_000000\.bin: empty file"):
        run(only)
    for option in ({"tokenizer": tmp_path / "no.model"}, {"val": tmp_path / "file"},
                   {"val": only / "fineweb_train_000000.bin"}):
        with pytest.raises(UserError):
            run(two / "a", **option)


def test_known_sets(clean, monkeypatch):
    folder, _ = clean
    report, _ = run(folder)
    tokens, size = (report.figures[k] for k in ("val_tokens", "val_bytes"))
    for constants, said in (((40, tokens, size), "the challenge's full validation set"),
                            ((40, tokens + 9, size + 1), "in another tokenizer"),
                            ((40, tokens, 2 * size), "but not the challenge's"),
                            ((50, tokens, size), "no set that this program knows")):
        for name, value in zip(("FULL_DOCUMENTS", "FULL_TOKENS", "FULL_BYTES"), constants):
            monkeypatch.setattr(auditing, name, value)
        assert said in run(folder)[0].figures["identity"]


# ---- sets made by the program: the leaks that happened -------------------------------------------


@pytest.fixture(scope="module")
def texts():
    docs = [text for _, text in sorted(topics.items()) if len(text) < 6000]
    assert len(docs) > 45
    return docs[:45]


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    """Path of a small byte-exact tokenizer."""
    documents = [sources.Document(t, len(t), 0) for t in texts]
    path = tmp_path_factory.mktemp("tokenizer") / "own.model"
    path.write_bytes(encoder.train_tokenizer(documents, 420, 10**9))
    return path


@pytest.fixture(scope="module")
def prepared(texts, model, tmp_path_factory):
    """{--val-docs: folder} of one source split in two ways."""
    root = tmp_path_factory.mktemp("prepared")
    docs = root / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    folders = {}
    for n in (5, 20):
        prep.prepare(docs, root / str(n), sp=model, val_docs=n, shard_tokens=3000)
        folders[n], = (root / str(n) / "datasets").iterdir()
    return folders


def test_prepared_set_is_clean(prepared, texts):
    report, lines = run(prepared[20].parents[1])  # the output root
    assert (report.problems, report.whole, report.exit_code) == ([], [], 0)
    assert any("sha256 of" in x for x in lines)
    assert report.figures["loss"]["differing"] == 0
    assert report.figures["val_bytes"] == sum(len(t.encode()) for t in texts[:20])


def test_small_split_scored_with_the_large_validation_file(prepared, texts, tmp_path):
    """--val-docs 5 training shards, 20 validation documents: 5..19 are in training."""
    report, lines = run(prepared[5], val=prepared[20])
    assert [(f.document, f.number) for f in report.whole] == [(i, i - 5) for i in range(5, 20)]
    assert report.exit_code == 1
    assert "15 of them, between validation documents 5 and 19" in report.patterns[0]
    assert "the same order from document 0 on" in report.patterns[0]
    found = report.whole[0]
    assert found.text[:10] == " ".join(texts[5].split())[:10]
    assert found.size == len(texts[5].encode())
    assert not report.problems
    one = sorted(prepared[20].glob("fineweb_val_0*.bin"))[-1]  # a single file
    report, _ = run(prepared[5], val=one)
    assert 0 < report.leaks < 15
    assert report.whole[-1].number == 14
    assert not any("missing" in x for x in report.problems)


def test_validation_swapped_after_the_split(prepared, tmp_path):
    folder = tmp_path / "datasets" / "sp420"
    shutil.copytree(prepared[5], folder)
    for path in folder.glob("*_val_*"):
        path.unlink()
    for path in prepared[20].glob("*_val_*"):
        shutil.copy(path, folder)
    report, _ = run(folder)
    assert any("swapped after the split" in x for x in report.problems)
    assert any("not in the manifest" in x for x in report.problems)
    assert report.leaks == 15
    (folder / "manifest.json").unlink()
    report, _ = run(folder)
    assert (report.problems, report.leaks) == ([], 15)


def test_manifest_catches_every_changed_file(prepared, tmp_path):
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin",
                 "fineweb_val_bytes_000000.bin", "own.model"):
        root = tmp_path / name
        shutil.copytree(prepared[5].parents[1], root)
        path, = root.rglob(name)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        assert any(name in x and "sha256" in x for x in run(root)[0].problems), name
    path, = root.rglob("fineweb_train_000001.bin")
    path.unlink()
    assert any("in the manifest, but not here" in x for x in run(root)[0].problems)


def test_sidecar_that_does_not_fit_the_text(prepared, model, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(prepared[5], folder)
    (folder / "manifest.json").unlink()
    values = shard(folder, "fineweb_val_bytes_000000.bin")
    values[1:] += values[1:] > 0  # the leading space counted twice, as it happened
    write_shard(folder / "fineweb_val_bytes_000000.bin", values)
    assert run(folder)[0].problems == []  # nobody can tell without the tokenizer
    report, _ = run(folder, tokenizer=model)
    assert any("sidecar or tokens are wrong" in x for x in report.problems)


def test_sidecar_shifted_within_documents(prepared, model, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(prepared[5], folder)
    (folder / "manifest.json").unlink()
    for path in folder.glob("fineweb_val_bytes_*.bin"):
        inside = shard(folder, path.name.replace("_bytes", "")) != 1
        counts = shard(folder, path.name)
        counts[inside] = np.roll(counts[inside], 1)
        write_shard(path, counts)
    report, _ = run(folder, tokenizer=model)
    assert any("tokens of letters or operators" in x for x in report.problems)


# ---- export --------------------------------------------------------------------------------------


def read_lines(path):
    return [json.loads(x)["text"] for x in path.read_text(encoding="utf-8").split("\n") if x]


def test_export_gives_back_every_byte(prepared, texts, tmp_path):
    for n, folder in prepared.items():
        lines = []
        losses = exporting.export(folder, tmp_path / str(n), out=lines.append)
        assert read_lines(tmp_path / str(n) / "docs.jsonl") == texts
        assert losses["val"].documents == n
        assert losses["val"].original == losses["val"].decoded
        assert losses["train"].original == losses["train"].decoded  # by the manifest
        assert sum("as many as the original" in x for x in lines) == 2
        assert lines[-1] == f"written: {tmp_path / str(n) / 'docs.jsonl'}"


def test_export_of_strange_documents_in_tiny_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "BLOCK_TOKENS", 11)
    monkeypatch.setattr(exporting, "BATCH_TOKENS", 40)
    strange = ["", " ", "\n\n", "a\u2028b", "\ue001\ue004x", "NASA's iPhone", "\u2581 \u2581",
               "e\u0301 A\u0301", "😀\0", "", "\ufeff \t", "İıßẞ", "", "end\n"]
    docs = tmp_path / "d.jsonl"
    docs.write_text("".join(json.dumps({"text": t}) + "\n" for t in strange))
    prep.prepare(docs, tmp_path / "out", sp=model, val_docs=6, shard_tokens=5)
    exporting.export(tmp_path / "out", tmp_path / "again.jsonl")
    assert read_lines(tmp_path / "again.jsonl") == strange
    again = tmp_path / "again"
    prep.prepare(tmp_path / "again.jsonl", again, sp=model, val_docs=6, shard_tokens=5)
    for path in again.rglob("*.bin"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(again)).read_bytes()


def test_export_to_standard_output(prepared, texts, monkeypatch, capsys):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=True))
    exporting.export(prepared[5])
    assert [json.loads(x)["text"] for x in raw.getvalue().decode().splitlines()] == texts
    assert "written: standard output" in capsys.readouterr().err


def test_export_with_a_tokenizer_that_loses_text(tmp_path):
    if not PUBLISHED.exists():
        pytest.skip(f"no published tokenizer at {PUBLISHED}")
    val = ["The  NASA\n", "plain text", "A\u0301 x", "Ⅷ"]
    docs = tmp_path / "d.jsonl"
    docs.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*val, "two  spaces", "fine"]))
    prep.prepare(docs, tmp_path, sp=PUBLISHED, val_docs=4)
    lines = []
    losses = exporting.export(tmp_path, tmp_path / "o.jsonl", out=lines.append)
    assert read_lines(tmp_path / "o.jsonl") == ["The NASA", "plain text", "á x", "VIII",
                                                "two spaces", "fine"]
    # "The  NASA\n": 10 bytes, of which the sidecar counts 9, and 8 are left; A U+0301 3 -> 2;
    # U+2167 3 -> 4.
    v, t = losses["val"], losses["train"]
    assert (v.changed, v.differing, v.unmarked, v.original) == (3, 3, 1, 27)
    assert (t.original, t.decoded, t.unmarked) == (15, 14, 0)
    assert "a lower bound" in lines[0]
    report, said = run(tmp_path)
    assert report.figures["loss"]["differing"] == 3
    assert any("this tokenizer loses text" in x for x in said)
    next(tmp_path.rglob("manifest.json")).unlink()
    exporting.export(tmp_path, tmp_path / "o.jsonl", out=lines.append)
    assert any("how much was lost is not known" in x for x in lines)


def test_export_refuses_and_leaves_the_old_file(prepared, clean, model, tmp_path, monkeypatch):
    old = tmp_path / "old.jsonl"
    old.write_text("mine")
    folder, _ = clean
    with pytest.raises(UserError, match="no tokenizer"):
        exporting.export(folder, old)
    with pytest.raises(UserError, match="no such file"):
        exporting.export(folder, old, tokenizer=tmp_path / "no.model")
    change("fineweb_train_000001.bin", 5, 420)(folder)
    with pytest.raises(UserError, match="id 420 in the shards"):
        exporting.export(folder, old, tokenizer=model)
    truncate(folder)
    with pytest.raises(UserError, match="truncated; nothing was written"):
        exporting.export(folder, old, tokenizer=model)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as e:
        exporting.export(prepared[5], old)
    assert e.value.filename == str(old)
    assert old.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_restore_equals_decode_wherever_it_has_an_answer():
    random_ = random.Random(0)
    alphabet = [*"abXY .\n1é", *caps.OPERATORS, "The ", "USA", "iPhone"]
    strict = 0
    for i in range(6000):
        text = "".join(random_.choices(alphabet, k=random_.randrange(12)))
        assert exporting.restore(caps.encode(text)) == (text, True)
        encoded = caps.encode(text) if i % 2 else text
        try:
            assert exporting.restore(encoded) == (caps.decode(encoded), True)
            strict += 1
        except caps.LosslessCapsError:
            assert not exporting.restore(encoded)[1]
    assert 3000 < strict < 6000


@pytest.mark.parametrize(("encoded", "text"), [
    ("\ue001á", "á"), ("\ue002ab\ue0031", "AB1"), ("a\ue001b", "aB"), ("x\ue004", "x"),
    ("\ue001\ue001a", "A"), ("\ue004\ue001\ue002", "\ue001"), ("\ue002nasa é\ue001", "NASA é"),
])
def test_restore_where_decode_has_none(encoded, text):
    with pytest.raises(caps.LosslessCapsError):
        caps.decode(encoded)
    assert exporting.restore(encoded) == (text, False)
