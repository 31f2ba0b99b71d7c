"""prepare_caseops_data.py: shards, sidecar, manifest, tokenizer training, bad input, safety."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lossless_caps as caps  # noqa: E402
import prepare_caseops_data as prep  # noqa: E402
from caseops import demo, shards, sources  # noqa: E402
from caseops import encoder as encoding  # noqa: E402
from tests.plain_caseops import plain_encoded  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden" / "caseops.jsonl"
PUBLISHED = SHARED / "tokenizers" / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
VOCAB = 420
SET = f"own_sp{VOCAB}_lossless_caps_caseops_v1_reserved"

NASTY = ["", " ", "\n", " \t\n lead", "trail  \n\n", "\0", "a\0B\0", "\u2581", "a\u2581\u2581 b",
         "\u2581\ue004\u2581", " \u2581 x", "\u2585", "<s>", "<0x41><pad>", "\ufb01x \uff21 Ⅷ ½",
         "e\u0301 A\u0301", "\ufeffHello", "\x01ab\x7f\x9f",
         "\u200b\u200d\u00a0\u3000", "😀\u200d🚀",
         "\ue000\ue001\ue002\ue003\ue004\ue005", "x\r\n\r\ny\r", "İıßẞſKǅ", "\U0010ffff\ufffe",
         "    def f(X):\n\treturn  X\n", "a" + " " * 70_000 + "b", "word" * 6000, "NASA's iPhone"]


def write_docs(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def read_shard(path):
    """(count, values) of a shard file, its header and size checked."""
    header = np.fromfile(path, "<i4", 256)
    assert header[:2].tolist() == [20240520, 1]
    assert not header[3:].any()
    assert path.stat().st_size == 1024 + 2 * header[2]
    return np.fromfile(path, "<u2", offset=1024)


def read_split(folder, split):
    files = sorted(folder.glob(f"fineweb_{split}_0*.bin"))
    return np.concatenate([read_shard(f) for f in files])


def documents_of(tokens):
    return np.split(tokens, np.flatnonzero(tokens == 1))[1:]


def tree(folder):
    """{relative path: bytes} of every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*")
            if p.is_file()}


@pytest.fixture(scope="session")
def english():
    """Documents of plain English, with newlines and indentation."""
    return [text for _, text in sorted(topics.items())]


@pytest.fixture(scope="session")
def model(english, tmp_path_factory):
    """Path of a small byte-exact tokenizer."""
    documents = [sources.Document(t, len(t), 0) for t in english[:40] + NASTY]
    path = tmp_path_factory.mktemp("tokenizer") / "own.model"
    path.write_bytes(encoding.train_tokenizer(documents, VOCAB, 10**9))
    return path


@pytest.fixture(scope="session")
def encoder(model):
    return encoding.Encoder(model.read_bytes())


@pytest.fixture(scope="session")
def published():
    if not PUBLISHED.exists():
        pytest.skip(f"no published tokenizer at {PUBLISHED}")
    return encoding.Encoder(PUBLISHED.read_bytes())


# ---- encoding ------------------------------------------------------------------------------------


def fuzz(n, seed):
    random_ = random.Random(seed)
    alphabet = [*"abXYZ  \n\t.09_", *caps.OPERATORS, "é", "e\u0301", "\ufb01", "\u200b", "\u200d",
                "\0", "\x01", "\ufeff", "\u2581", "😀", "ß", "\u1100\u1161", "Ⅷ", "The ", "USA"]
    return ["".join(random_.choices(alphabet, k=random_.randrange(40))) for _ in range(n)]


needs_offsets = pytest.mark.skipif(
    not hasattr(sentencepiece.SentencePieceProcessor, "encode_as_offset_mapping"),
    reason="the twin needs sentencepiece 0.2.2 or later")


@needs_offsets
def test_published_tokenizer_equals_twin(published, english):
    texts = fuzz(3000, 1) + english[:8] + [t for t in NASTY if len(t) < 30_000]
    for text, (ids, counts), twin in zip(texts, published.encode_documents(texts),
                                         plain_encoded(published.sp, texts), strict=True):
        assert (ids.tolist(), counts.tolist()) == twin, repr(text)
    assert not published.exact


@needs_offsets
def test_own_tokenizer_equals_twin(encoder, english):
    texts = [t.replace("\u2581", "") for t in fuzz(2000, 2) + english[:8] + NASTY]
    for text, (ids, counts), twin in zip(texts, encoder.encode_documents(texts),
                                         plain_encoded(encoder.sp, texts), strict=True):
        assert (ids.tolist(), counts.tolist()) == twin, repr(text)


def test_golden_ids_and_byte_counts(published):
    if not GOLDEN.exists():
        pytest.skip(f"no golden file at {GOLDEN}")
    vectors = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    vectors = [v for v in vectors if v["error"] is None]
    assert len(vectors) > 150
    encoded = published.encode_documents([v["input"] for v in vectors])
    for v, (ids, counts) in zip(vectors, encoded, strict=True):
        assert ids.tolist() == v["token_ids"], v["id"]
        assert counts.tolist() == v["byte_counts"], v["id"]
        assert (ids.dtype, counts.dtype) == (np.uint16, np.uint16)


def test_own_tokenizer_keeps_every_byte(encoder, english):
    assert encoder.exact
    texts = NASTY + fuzz(3000, 3) + english
    plain = encoder.encode_documents(texts, counts=False)
    for text, (ids, counts), (only, none) in zip(texts, encoder.encode_documents(texts), plain,
                                                 strict=True):
        assert encoder.decode(ids) == text
        assert int(counts.sum()) == len(text.encode())
        assert ids.tolist() == only.tolist()
        assert none is None


def test_every_code_point_survives_the_own_tokenizer(encoder):
    step = 199
    for start in range(step):
        text = "".join(chr(c) for c in range(start, 0x110000, step) if not 0xD800 <= c < 0xE000)
        (ids, counts), = encoder.encode_documents([text])
        assert encoder.decode(ids) == text
        assert int(counts.sum()) == len(text.encode())
        if start >= 8:
            break
    for c in [*range(0x300), *range(0x2000, 0x2100), *range(0x2570, 0x25A0), 0xE000, 0xE001]:
        text = f" {chr(c)}{chr(c)}x{chr(c)}\n"
        assert encoder.decode(encoder.encode_documents([text])[0][0]) == text


def test_blanks_without_a_piece_count_one_byte_each(model, english):
    """And U+2581 in the text three, also where the tokenizer spells it in byte pieces."""
    data, alone = model.read_bytes(), b"\x0a\x03\xe2\x96\x81"
    assert data.count(alone) == 1
    without = encoding.Encoder(data.replace(alone, b"\x0a\x03\xee\x80\x80"))
    for encoder in (encoding.Encoder(data), without):
        texts = [*english[:3], "a \u2581 b\u2581\u2581  c", " \u2581", "THE Cat"]
        for text, (ids, counts) in zip(texts, encoder.encode_documents(texts), strict=True):
            assert counts.sum() == len(text.encode())
            assert len(ids) == len(counts)


def test_piece_too_long_is_found_with_and_without_counts(published):
    long = "a" + " " * 65_535 + "b"
    hidden = "xa" + "\x01" * 30_000 + "b" + "\x01" * 40_000 + "c "
    for text in (long, hidden):
        for counts in (True, False):
            with pytest.raises(encoding.DocumentError) as e:
                published.encode_documents(["fine", text], counts)
            assert e.value.index == 1
    (_, counts), = published.encode_documents(["a" + " " * 65_534 + "b"])
    assert counts.tolist() == [1, 65_535]


def test_batches_keep_order_and_lose_nothing():
    documents = [sources.Document("x" * n, n, i) for i, n in enumerate([5, 0, 900, 3, 3000, 1])]
    cut = list(sources.batches(documents, 1000, lambda d: d.size))
    assert [d for b in cut for d in b] == documents
    assert len(cut) > 1
    assert list(sources.batches([], 1000, len)) == []


# ---- tokenizer training --------------------------------------------------------------------------


def test_training_pieces_see_all_of_a_long_document():
    for text in ("word " * 5000, "x" * 10_001, "line\n" * 3000, "a\0b\u2581c\u2585d", "",
                 " " * 9000):
        pieces = list(encoding.training_pieces(text))
        assert "".join(pieces) == re.sub("[\0\u2581\u2585]", "", text)
        assert all(0 < len(p) <= 4000 for p in pieces)
    assert all(p.startswith(" ") for p in list(encoding.training_pieces("word " * 5000))[1:])


def test_one_long_document_is_enough_to_train_on(english):
    text = "\n".join(english[:30])
    assert len(text) > 100_000
    data = encoding.train_tokenizer([sources.Document(text, len(text), 1)], 600, 10**9)
    encoder = encoding.Encoder(data)
    assert encoder.size == 600
    assert data == encoding.train_tokenizer([sources.Document(text, len(text), 1)], 600, 10**9)
    pieces = [encoder.sp.id_to_piece(i) for i in range(600)]
    assert pieces[:8] == ["<pad>", "<s>", "</s>", "<unk>", *caps.OPERATORS]
    assert not any(re.search("[A-Z]", p) for p in pieces[264:])


@pytest.mark.parametrize(("vocab", "advice"), [(10, "at least"), (30_000, "at most")])
def test_vocab_size_that_does_not_fit(vocab, advice, english):
    documents = [sources.Document(english[0], 1, 1)]
    with pytest.raises(prep.UserError, match=f"--vocab-size {vocab} .*{advice} \\d+"):
        encoding.train_tokenizer(documents, vocab, 10**9)


def test_tokenizer_sees_training_documents_only(tmp_path, english):
    secret = "qzqzqz " * 4000
    docs = write_docs(tmp_path / "d.jsonl", [secret] + english[:20])
    prep.prepare(docs, tmp_path, vocab_size=VOCAB, val_docs=1)
    model, = (tmp_path / "tokenizers").iterdir()
    assert model.name == f"fineweb_{VOCAB}_bpe_lossless_caps_caseops_v1_reserved.model"
    encoder = encoding.Encoder(model.read_bytes())
    assert not any("qz" in encoder.sp.id_to_piece(i) for i in range(VOCAB))


# ---- shards and manifest -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, model, english):
    """A small data set: (folder, manifest, texts), 9 documents to validate on."""
    out = tmp_path_factory.mktemp("made")
    texts = NASTY[:25] + ["The END\n"] + english[:5]
    docs = write_docs(out / "docs.jsonl", texts)
    manifest = prep.prepare(docs, out / "data", sp=model, val_docs=9, shard_tokens=500)
    return out / "data" / "datasets" / SET, manifest, texts


def test_shards_hold_the_documents_in_order(made, encoder):
    folder, _, texts = made
    for split, part in (("val", texts[:9]), ("train", texts[9:])):
        tokens = read_split(folder, split)
        assert [encoder.decode(d[1:]) for d in documents_of(tokens)] == part
        sizes = [len(read_shard(f)) for f in sorted(folder.glob(f"fineweb_{split}_0*.bin"))]
        assert set(sizes[:-1]) <= {500}
        assert 0 < sizes[-1] <= 500


def test_sidecar_stands_beside_its_shard(made):
    folder, _, texts = made
    assert len(list(folder.glob("fineweb_val_bytes_*.bin"))) \
        == len(list(folder.glob("fineweb_val_0*.bin")))
    tokens, counts = read_split(folder, "val"), read_split(folder, "val_bytes")
    assert tokens.shape == counts.shape
    assert not counts[tokens == 1].any()
    sums = np.add.reduceat(counts.astype(int), np.flatnonzero(tokens == 1))
    assert sums.tolist() == [len(t.encode()) for t in texts[:9]]


def test_manifest_tells_the_truth(made, model):
    folder, manifest, texts = made
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert set(manifest["files"]) == {p.name for p in folder.glob("*.bin")}
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
        values = read_shard(folder / name)
        assert entry["tokens"] == len(values)
        if name.startswith("fineweb_val_bytes"):
            assert entry["counted_bytes"] == values.sum()
        else:
            assert entry["documents"] == (values == 1).sum()
    for split, part in (("val", texts[:9]), ("train", texts[9:])):
        total = manifest["totals"][split]
        assert total["documents"] == len(part)
        assert total["original_bytes"] == sum(len(t.encode()) for t in part)
        assert total["tokens"] == len(read_split(folder, split))
    assert manifest["counted_bytes_equal_original_bytes"] is True
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == VOCAB
    assert "first 9 documents" in manifest["split"]["rule"]
    assert manifest["split"]["train_documents"] == len(texts) - 9
    assert manifest["transform"] == "lossless_caps_caseops_v1"
    assert set(manifest["versions"]) == {"program", "python", "sentencepiece", "numpy"}
    copied = folder.parents[1] / "tokenizers" / manifest["tokenizer"]["file"]
    assert copied.read_bytes() == model.read_bytes()
    assert str(folder) not in json.dumps(manifest)


def test_runs_are_identical(made, model, tmp_path):
    folder, manifest, texts = made
    docs = write_docs(tmp_path / "docs.jsonl", texts)
    prep.prepare(docs, tmp_path / "data", sp=model, val_docs=9, shard_tokens=500)
    assert tree(tmp_path / "data" / "datasets" / SET) == tree(folder)


def test_fused_markers_from_the_command_line(made, model, tmp_path, capsys):
    """Fewer tokens, the same documents and bytes; audited, and exported to the same texts."""
    folder, plain, texts = made
    docs = write_docs(tmp_path / "docs.jsonl", texts)
    call = ["--docs", str(docs), "--out", str(tmp_path), "--sp", str(model), "--val-docs", "9"]
    assert prep.main([*call, "--fuse-markers"]) == 0
    fused = json.loads((tmp_path / "datasets" / SET / "manifest.json").read_text())
    assert fused["tokenizer"]["file"] == f"{model.stem}_fused.model"
    assert fused["totals"]["train"]["tokens"] < plain["totals"]["train"]["tokens"]
    assert fused["totals"]["val"]["counted_bytes"] == plain["totals"]["val"]["counted_bytes"]
    assert fused["split"] == plain["split"]
    assert prep.main(["--audit", str(tmp_path / "datasets" / SET)]) == 0, capsys.readouterr().out
    alone = tmp_path / "alone" / SET  # without its tokenizer the manifest says what 0 and 2 are
    shutil.copytree(tmp_path / "datasets" / SET, alone)
    assert prep.main(["--audit", str(alone)]) == 0, capsys.readouterr().out
    out = tmp_path / "again.jsonl"
    assert prep.main(["--export", str(alone), "--out", str(out), "--sp", str(model)]) == 2
    assert "not the tokenizer of the manifest" in capsys.readouterr().err
    assert prep.main(["--export", str(tmp_path / "datasets" / SET), "--out", str(out)]) == 0
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == texts
    capsys.readouterr()
    assert prep.main(call) == 2  # not over a set of another tokenizer
    assert "--overwrite" in capsys.readouterr().err


def test_smaller_set_replaces_a_larger_one(model, english, tmp_path):
    docs = write_docs(tmp_path / "d.jsonl", english[:6])
    folder = tmp_path / "datasets" / SET
    prep.prepare(docs, tmp_path, sp=model, val_docs=2, shard_tokens=1000)
    (folder / "notes.txt").write_text("mine")
    manifest = prep.prepare(docs, tmp_path, sp=model, val_docs=2)
    assert {p.name for p in folder.iterdir()} == {*manifest["files"], "manifest.json", "notes.txt"}
    assert len(manifest["files"]) == 3
    assert not folder.with_name(SET + ".partial").exists()


def test_record_sample(tmp_path, published):
    lines = ['{"text":"The NASA Launch","id":3}', "", '"raw String"', '""', '" \\n "',
             '{"text":"Train Doc"}']
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    manifest = prep.prepare(tmp_path / "d.jsonl", tmp_path, sp=PUBLISHED, val_docs=4)
    folder = tmp_path / "datasets" / "own_sp8192_lossless_caps_caseops_v1_reserved"
    val, counts = read_split(folder, "val"), read_split(folder, "val_bytes")
    assert len(val) == 19
    assert val[:12].tolist() == [1, 4, 320, 8133, 5, 5566, 8136, 8133, 4, 1632, 1709, 1]
    assert counts[:12].tolist() == [0, 0, 3, 1, 0, 3, 1, 1, 0, 2, 4, 0]
    assert read_split(folder, "train").tolist() == [1, 4, 1184, 266, 8133, 4, 8144, 416]
    assert manifest["counted_bytes_equal_original_bytes"] is False  # " \n " is in no token
    assert manifest["totals"]["val"]["counted_bytes"] == 25


def test_line_ends_byte_order_mark_and_separators(tmp_path, model):
    raw = "\ufeff" + '{"text": "One\u2028two"}\r\n\r\n  "three\\u0085"  \r\n"four"'
    (tmp_path / "d.jsonl").write_bytes(raw.encode())
    source = sources.Source(tmp_path / "d.jsonl")
    found = [(d.text, d.line) for d in source]
    assert found == [("One\u2028two", 1), ("three\x85", 3), ("four", 4)]
    assert source.position == source.size
    assert source.digests == [hashlib.sha256(raw.encode()).hexdigest()]


@pytest.mark.parametrize(("n", "asked", "val"), [(40, 50_000, 4), (40, 40, 4), (40, 39, 39),
                                                 (5, 5, 1), (2, 9, 1)])
def test_val_docs_are_capped_with_a_message(n, asked, val, tmp_path, model, capsys):
    docs = write_docs(tmp_path / "d.jsonl", [f"Document {i}" for i in range(n)])
    manifest = prep.prepare(docs, tmp_path, sp=model, val_docs=asked)
    assert manifest["split"]["val_documents"] == val
    assert manifest["split"]["train_documents"] == n - val
    assert ("is capped at" in capsys.readouterr().out) == (asked >= n)


def test_a_set_of_ones_own_has_a_name(model, tmp_path):
    docs = write_docs(tmp_path / "d.jsonl", [f"Document {i}" for i in range(20)])
    for name in ("own", "cooking"):
        argv = ["--docs", docs, "--sp", model, "--out", tmp_path / "o", "--val-docs", 2]
        assert prep.main([*map(str, argv), *["--name", name][:2 * (name != "own")]]) == 0
        assert (tmp_path / "o" / "datasets" / SET.replace("own", name) / "manifest.json").exists()
    with pytest.raises(prep.UserError, match="--name must be letters"):
        prep.parse_arguments(["--docs", "d", "--sp", "m", "--out", "x", "--name", "../y"])


def test_the_demo_of_the_help_is_that_of_the_preset():
    wanted = "--val-docs 32 --out"
    for name in ("presets/cpu_demo.env", "run_3seed.sh"):
        assert wanted in (ROOT / name).read_text()
    assert wanted in prep.__doc__


# ---- bad input -----------------------------------------------------------------------------------

GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(("line", "said"), [
    ("{oops}", "not JSON ("), ("[" * 100_000, "not JSON that can be read"),
    ('{"text": "a"} {"text": "b"}', "not JSON (Extra data at column 15)"),
    ("9" * 5000, "int, where an object"), (b'"\xff"', "not UTF-8 ("),
    ('{"body": "x"}', 'the object has no "text"'),
    ('{"text": null}', '"text" must be a string, not NoneType'),
    ('{"text": 3}', '"text" must be a string, not int'), ("[1]", "list, where an object"),
    ('{"text": "a\\ud800b"}', "a lone surrogate (U+D800, character 1"),
    ('"\\udc00"', "a lone surrogate (U+DC00, character 0"),
])
@pytest.mark.parametrize("val_docs", [1, 4])
def test_bad_lines(line, said, val_docs, tmp_path, model, capsys):
    line = line if isinstance(line, bytes) else line.encode()
    docs = tmp_path / "bad.jsonl"
    docs.write_bytes(GOOD.encode() * 2 + b"\n" + line + b"\n" + GOOD.encode() * 2)
    for tokenizer in (["--sp", model], ["--train-tokenizer", "--vocab-size", "300"]):
        fails(["--docs", docs, *tokenizer, "--val-docs", val_docs, "--out", tmp_path / "out"],
              f"{docs}:4: {said}", capsys)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("val_docs", [1, 3])
def test_too_long_a_piece(val_docs, tmp_path, published, capsys):
    docs = write_docs(tmp_path / "d.jsonl", ["a", "b", "c" + " " * 65_535 + "d", "e"])
    fails(["--docs", docs, "--sp", PUBLISHED, "--val-docs", val_docs, "--out", tmp_path / "out"],
          f"{docs}:3: a piece of 65,536 bytes", capsys)
    assert not (tmp_path / "out").exists()


def fails(argv, said, capsys):
    """Assert that the command ends with code 2 and one line on standard error."""
    assert prep.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert said in error, error


def test_bad_arguments(tmp_path, model, capsys):
    docs = write_docs(tmp_path / "d.jsonl", ["a", "b"])
    base = ["--docs", docs, "--out", tmp_path / "out"]
    sp = ["--sp", model]
    (tmp_path / "empty").mkdir()
    for argv, said in [
        ([], "no input"), (base, "no tokenizer"), (["--docs", docs, *sp], "no output"),
        ([*base, *sp, "--val-docs", "0"], "--val-docs must be at least 1"),
        ([*base, *sp, "--val-docs", "-3"], "--val-docs must be at least 1"),
        ([*base, *sp, "--val-docs", "many"], "--val-docs: invalid int"),
        ([*base, *sp, "--val-doc", "3"], "unrecognized arguments: --val-doc"),
        ([*base, *sp, "--val", "3"], "--val is for --audit"),
        ([*base, *sp, "--shard-tokens", "0"], "--shard-tokens must be"),
        ([*base, *sp, "--train-tokenizer", "--vocab-size", "300"], "give one of them"),
        ([*base, "--train-tokenizer"], "needs --vocab-size"),
        ([*base, "--train-tokenizer", "--vocab-size", "70000"], "must be 1 to 65536"),
        ([*base, *sp, "--vocab-size", "300"], "is for --train-tokenizer"),
        (["--demo", tmp_path / "demo", *sp], "no output"),
        (["--docs", tmp_path / "none.jsonl", "--out", tmp_path / "out", *sp], "no such file"),
        (["--docs", tmp_path / "empty", "--out", tmp_path / "out", *sp], "a directory without"),
        (["--docs", "/dev/null", "--out", tmp_path / "out", *sp], "not a regular file; pipe it"),
        (["--docs", "", "--out", tmp_path / "out", *sp], "an empty name"),
        (["--docs", "-", docs, "--out", tmp_path / "out", *sp], "cannot be mixed"),
        ([*base, "--sp", tmp_path], "a directory; give --sp the SentencePiece model"),
        ([*base, *sp, "--workers", "0"], "--workers must be at least 1"),
        ([*base, "--train-tokenizer", "--vocab-size", "0"], "must be 1 to 65536"),
        ([*base, *sp, "--train-shards", "3"], "is for --download caseops"),
        (["--download", "caseops"], "no output"),
        (["--download", "docs", "--audit", "x", "--out", "o"], "give one of them"),
        ([*base, "--download", "docs"], "--download goes without --docs"),
        ([*base, "--sp", tmp_path / "none.model"], "none.model: no such file"),
        ([*base, "--sp", docs], "d.jsonl: not a SentencePiece model"),
        (["--docs", docs, "--out", docs, *sp], "Not a directory"),
    ]:
        fails(argv, said, capsys)
    assert {p.name for p in tmp_path.iterdir()} == {"d.jsonl", "empty"}


@pytest.mark.parametrize(("texts", "found"), [([], 0), (["only one"], 1)])
def test_too_few_documents(texts, found, tmp_path, model, capsys):
    docs = write_docs(tmp_path / "d.jsonl", texts)
    fails(["--docs", docs, "--sp", model, "--out", tmp_path / "o"], f"{found} documents", capsys)


def test_empty_training_text(tmp_path, capsys):
    docs = write_docs(tmp_path / "d.jsonl", ["Something", "", ""])
    fails(["--docs", docs, "--train-tokenizer", "--vocab-size", "300", "--val-docs", "1",
           "--out", tmp_path / "o"], "empty", capsys)


@pytest.mark.parametrize(("change", "said"), [
    ({"user_defined_symbols": ["\ue002", "\ue001", "\ue003", "\ue004"]}, "not the pieces 4..7"),
    ({"user_defined_symbols": []}, "not the pieces 4..7"),
    ({"byte_fallback": False}, "no byte fallback"),
    ({"bos_id": 2, "eos_id": 1}, "BOS has id 2"),
])
def test_foreign_tokenizers(change, said, monkeypatch, english, tmp_path, capsys):
    monkeypatch.setattr(encoding, "TOKENIZER_SPEC", encoding.TOKENIZER_SPEC | change)
    model = tmp_path / "foreign.model"
    model.write_bytes(encoding.train_tokenizer([sources.Document(english[1], 1, 1)], 400, 10**9))
    docs = write_docs(tmp_path / "d.jsonl", ["a", "b"])
    fails(["--docs", docs, "--sp", model, "--out", tmp_path / "out"],
          f"{model}: ", capsys)
    with pytest.raises(prep.UserError, match=re.escape(said)):
        encoding.Encoder(model.read_bytes())


def test_too_large_a_vocabulary(encoder, monkeypatch, model):
    monkeypatch.setattr(encoding, "COUNT_LIMIT", VOCAB - 1)
    with pytest.raises(prep.UserError, match="ids are 16 bits"):
        encoding.Encoder(model.read_bytes())


# ---- kills and full disks ------------------------------------------------------------------------


@pytest.fixture
def old_set(tmp_path, model, english):
    """An older data set, and the arguments of a run that would replace it."""
    prep.prepare(write_docs(tmp_path / "old.jsonl", english[:4]), tmp_path / "data", sp=model,
                 val_docs=1, shard_tokens=2000)
    docs = write_docs(tmp_path / "new.jsonl", english)
    return tmp_path / "data", ["--docs", docs, "--sp", model, "--val-docs", "30",
                               "--shard-tokens", "3000", "--out", tmp_path / "data", "-j", "1"]


def without_staging(files):
    """Entries of tree() that are not in the directory where a set grows."""
    return {name: data for name, data in files.items() if ".partial/" not in name}


@pytest.mark.parametrize("at", [1, 3, 40])
def test_full_disk_leaves_the_old_set(at, old_set, monkeypatch, capsys):
    data, argv = old_set
    before, calls = tree(data), []

    def full(_):
        calls.append(1)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fails(argv, "No space left on device; free some space", capsys)
    assert without_staging(tree(data)) == before
    assert bool(list(data.rglob("*.partial"))) == (at == 40)
    assert prep.main([str(a) for a in argv]) == 0
    after = tree(data)
    prep.main([str(a) for a in argv] + ["--restart"])
    assert tree(data) == after


def test_write_error_in_the_kernel_leaves_the_old_set(old_set):
    data, argv = old_set
    before = tree(data)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    done = subprocess.run([sys.executable, str(ROOT / "prepare_caseops_data.py"), *map(str, argv)],
                          capture_output=True, preexec_fn=limit, timeout=60, check=False)
    assert done.returncode == 2
    assert b"File too large" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert tree(data) == before


def test_interrupt(old_set, monkeypatch, capsys):
    data, argv = old_set
    before = tree(data)

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(shards.ShardWriter, "add", interrupt)
    assert prep.main([str(a) for a in argv]) == 130
    assert "old files are as they were" in capsys.readouterr().err
    assert tree(data) == before


def test_write_whole_removes_what_it_could_not_finish(tmp_path):
    (tmp_path / "f").write_bytes(b"old")

    with contextlib.suppress(TypeError):
        shards.write_whole(tmp_path / "f", b"new", "not bytes")
    assert tree(tmp_path) == {"f": b"old"}
    digest = shards.write_whole(tmp_path / "f", b"new", np.array([1], "<u2"))
    assert tree(tmp_path) == {"f": b"new\1\0"}
    assert digest == hashlib.sha256(b"new\1\0").hexdigest()


# ---- the demo corpus and the command line --------------------------------------------------------


def test_demo_in_one_command(tmp_path):
    argv = ["--demo", "demo", "--train-tokenizer", "--vocab-size", "1024", "--val-docs", "32",
            "--out", "demo"]
    done = subprocess.run([sys.executable, str(ROOT / "prepare_caseops_data.py"), *argv],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = re.match(r"demo/docs\.jsonl: ([\d,]+) documents, ([\d,]+) bytes", done.stdout)
    documents, size = (int(x.replace(",", "")) for x in found.groups())
    assert documents > 300
    assert size > 2_000_000
    texts = [d.text for d in sources.Source(tmp_path / "demo" / "docs.jsonl")]
    assert len(texts) == len(set(texts)) == documents
    assert sum(len(t.encode()) for t in texts) == size
    folder = tmp_path / "demo" / "datasets" / SET.replace(str(VOCAB), "1024")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counted_bytes_equal_original_bytes"] is True
    model, = (tmp_path / "demo" / "tokenizers").iterdir()
    encoder = encoding.Encoder(model.read_bytes())
    tokens = documents_of(read_split(folder, "val"))
    assert [encoder.decode(d[1:]) for d in tokens] == texts[:32]
    assert read_split(folder, "val_bytes").sum() == sum(len(t.encode()) for t in texts[:32])


def test_module_prose_takes_docstrings_and_comment_blocks_once():
    source = '"""Top."""\n\n# one\n# two\n# three\n\nclass A(B):\n    """Of A."""\n' \
             '    def f(self, x=1):\n        """Of f."""\n        # single\n        return 1\n' \
             '    async def g(self):\n        """Of f."""\n'
    assert demo.module_prose("m", source, set()) \
        == "m\n\nTop.\n\none\ntwo\nthree\n\nclass A(B)\nOf A.\n\nf(self, x=1)\nOf f.\n"


def test_progress_speaks_in_plain_lines(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = prep.Progress("encoding", 100e6)
    progress.at(10e6)
    progress.at(50e6)
    progress.close()
    assert capsys.readouterr().err == "encoding: 50 of 100 MB, 2.50 MB/s, 20 s left\n"


def test_a_terminal_without_a_size_has_a_bar():
    leader, terminal = os.openpty()  # 0 columns, as in a container
    code = "from caseops.console import Progress; p = Progress('job', 10); p.at(5); p.close()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=terminal, stderr=terminal,
                   check=True)
    assert b"job:" in os.read(leader, 4096)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        prep.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--docs", "--out", "--sp", "--val-docs", "--train-tokenizer", "--vocab-size",
                 "--shard-tokens", "--demo"):
        assert flag in text


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError('none', name='tqdm')")
    done = subprocess.run([sys.executable, ROOT / "prepare_caseops_data.py", "--help"], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: tqdm is not installed; source .venv/bin/activate, or "
                           "pip install -r requirements.txt\n")
