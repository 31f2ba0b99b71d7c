"""§7 Data: shards, packed rows, prefetching, and one clear line for every file that is wrong."""

import hashlib
import itertools
import json
import re
import threading
import time

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.tools import byte_counts, documents, runtime, tiny, write_data, write_shard

CPU = torch.device("cpu")


def refused(function, *args) -> str:
    with pytest.raises(t.UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- shards

def test_shard_is_read_as_written(tmp_path):
    values = [1, 2, 65535, 0, 300]
    shard = t.open_shard(write_shard(tmp_path / "a.bin", values))
    assert shard.tolist() == values and shard.dtype == np.uint16


@pytest.mark.parametrize(("damage", "words"), [
    (dict(magic=20240521), "magic 20240521"), (dict(version=2), "shard version 2"),
    (dict(count=4), "header says 4 values = 1032 bytes, the file has 1034"),
    (dict(count=6), "header says 6 values"), (dict(count=-5), "header says -5 values"),
])
def test_a_wrong_header_is_refused(tmp_path, damage, words):
    path = write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2, 3, 4, 5], **damage)
    text = refused(t.open_shard, path)
    assert text.startswith(f"{path}: ") and words in text and "again" in text


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_a_file_shorter_than_the_header_is_refused(tmp_path, size):
    (tmp_path / "a.bin").write_bytes(b"\0" * size)
    assert f"a.bin: {size} bytes" in refused(t.open_shard, tmp_path / "a.bin")


def test_an_odd_or_cut_shard_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.bin", range(9))
    path.write_bytes(path.read_bytes()[:-1])
    assert "the file has 1041" in refused(t.open_shard, path)


def test_an_empty_shard_is_refused(tmp_path):
    assert "no tokens" in refused(t.open_shard, write_shard(tmp_path / "a.bin", []))


def test_ids_that_no_sample_meets_are_found_when_their_row_is_cut(tmp_path):
    ids = np.full(64 * 2000 + 1, 5)
    ids[0], ids[64 * 3 + 9] = 1, 64
    write_shard(tmp_path / "fineweb_train_000000.bin", ids)
    rows = t.load_train(tiny(data_path=str(tmp_path)), runtime())
    rows.row(2)
    assert f"token {64 * 3 + 9}: id 64 is outside" in refused(rows.row, 3)


def test_one_hole_in_a_sidecar_is_found(tmp_path):
    shard, sizes = np.full(40_000, 5, np.uint16), np.ones(40_000, np.uint16)
    shard[0] = sizes[0] = 1
    sizes[0] = 0
    write_shard(tmp_path / "a.bin", sizes)
    assert t.read_sidecar(tmp_path / "a.bin", shard).sum() == 39_999
    sizes[15_000:24_000] = 0
    write_shard(tmp_path / "a.bin", sizes)
    assert "position 16384 counts" in refused(t.read_sidecar, tmp_path / "a.bin", shard)
    shard[15_000:24_000] = 1  # empty documents are none
    assert t.read_sidecar(tmp_path / "a.bin", shard).sum() == 30_999


def test_stream_crosses_shard_borders(tmp_path):
    sizes, whole = (5, 1, 7, 2), np.arange(15) + 100
    bounds = np.cumsum((0, *sizes))
    stream = t.TokenStream([write_shard(tmp_path / f"{i}.bin", whole[a:b])
                            for i, (a, b) in enumerate(itertools.pairwise(bounds))])
    assert len(stream) == 15
    for a in range(16):
        for b in range(a, 16):
            assert stream.read(a, b).tolist() == whole[a:b].tolist()
    assert [stream.place(i) for i in (0, 4, 5, 6, 14)] == [
        f"{tmp_path}/{shard}.bin: token {at}" for shard, at in
        ((0, 0), (0, 4), (1, 0), (2, 0), (3, 1))]


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    stream = t.TokenStream([write_shard(tmp_path / "0.bin", [1, 2, 3]),
                            write_shard(tmp_path / "1.bin", [1, 63, 64, 65])])
    assert stream.checked_ids(0, 5, 64).tolist() == [1, 2, 3, 1, 63]
    text = refused(stream.checked_ids, 2, 7, 64)
    assert text.startswith(f"{tmp_path}/1.bin: token 2: id 64 ") and "VOCAB_SIZE" in text


# ---- rows

@pytest.mark.parametrize(("ids", "longest", "want"), [
    ([1, 5, 5, 1, 5], 9, [0, 3, 5]), ([5, 5, 1, 5], 9, [0, 2, 4]), ([5, 5, 5], 9, [0, 3]),
    ([1, 5, 5, 5, 5, 5], 2, [0, 2, 4, 6]), ([5, 5, 5, 1, 5, 5, 5], 2, [0, 2, 3, 5, 7]),
    ([1, 1, 1], 4, [0, 1, 2, 3]), ([1], 1, [0, 1]), ([5, 1], 1, [0, 1, 2]),
    ([1, 5, 5, 5, 1, 5, 5, 5, 5], 4, [0, 4, 8, 9]),
])
def test_segment_bounds(ids, longest, want):
    bounds = t.segment_bounds(np.array(ids), longest)
    assert bounds.tolist() == want and bounds.dtype == np.int32


def test_segment_bounds_against_a_walk():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(1, 6, rng.integers(1, 40))
        longest = int(rng.integers(1, 9))
        want, length = [0], 0
        for i, x in enumerate(ids):
            if i and (x == 1 or length == longest):
                want.append(i)
                length = 0
            length += 1
        assert t.segment_bounds(ids, longest).tolist() == [*want, len(ids)]


def test_make_row_pads_its_bounds_and_can_ignore_documents():
    ids = documents([20, 30])
    row = t.make_row(ids[:-1], ids[1:], 8, CPU)
    assert row.ids.shape == row.targets.shape == (1, len(ids) - 1)
    assert (row.targets[0, :-1] == row.ids[0, 1:]).all()
    assert len(row.segments.cu_seqlens) == 50 // 8 + 64 and row.segments.max_len == 8
    assert sorted(set(row.segments.cu_seqlens.tolist())) == t.segment_bounds(ids[:-1], 8).tolist()
    row = t.make_row(ids[:-1], ids[1:], 16, CPU, documents=False)
    assert sorted(set(row.segments.cu_seqlens.tolist())) == [0, 16, 32, 48, len(ids) - 1]


def test_rows_come_in_order_and_start_over(tmp_path):
    folder = write_data(tmp_path, train_tokens=6000)  # 100 documents of 61 tokens
    whole = documents([60] * 100, seed=1)
    rows = t.load_train(tiny(data_path=str(folder)), runtime())
    assert rows.length == 64 and rows.count == (6100 - 1) // 64 == 95
    for g in (0, 1, 62, 94):  # row 62 crosses the border of the shards at 4000
        row = rows.row(g)
        assert row.ids[0].tolist() == whole[64 * g:64 * g + 64].tolist()
        assert row.targets[0].tolist() == whole[64 * g + 1:64 * g + 65].tolist()
        bounds = t.segment_bounds(whole[64 * g:64 * g + 64], 32).tolist()
        assert sorted(set(row.segments.cu_seqlens.tolist())) == bounds
    assert torch.equal(rows.row(95).ids, rows.row(0).ids)
    first = torch.cat([row.ids for row in rows.step(3)])
    assert torch.equal(first, torch.cat([rows.row(g).ids for g in range(24, 32)]))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_eight_rows_of_a_step(tmp_path, world):
    cfg = tiny(data_path=str(write_data(tmp_path)))
    alone = [row.ids for row in t.load_train(cfg, runtime()).step(2)]
    shared = [row.ids for rank in range(world)
              for row in t.load_train(cfg, t.Runtime(rank, world, CPU)).step(2)]
    assert torch.equal(torch.cat(alone), torch.cat(shared))


# ---- prefetching

def test_prefetch_keeps_the_order_and_stays_ahead():
    made = []
    items = t.prefetch(lambda i: made.append(i) or i * i, 5, depth=2)
    assert list(itertools.islice(items, 10)) == [i * i for i in range(5, 15)]
    time.sleep(0.1)
    assert len(made) <= 14
    items.close()
    until = time.monotonic() + 5
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.05)
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count


def test_prefetch_hands_over_errors_in_their_place():
    def make(i):
        if i == 2:
            raise t.UserError("shard: broken")
        return i

    items = t.prefetch(make, 0)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(t.UserError, match="shard: broken"):
        next(items)


# ---- validation

def test_validation_set_and_its_documents(data):
    val = t.load_val(tiny(data_path=str(data)))
    assert val.ids.dtype == np.int64 and val.bytes.dtype == np.int32
    assert len(val.ids) == len(val.bytes) and (val.bytes[val.ids == 1] == 0).all()
    found = val.documents()
    assert found[0][0] == 0 and found[-1][1] == len(val.ids)
    for (a, b), (c, _) in itertools.pairwise(found):
        assert b == c + 1 and val.ids[a] == val.ids[c] == 1  # the BOS that follows is included
    assert sum(b - a - 1 for a, b in found) == len(val.ids) - 1


def test_a_last_document_that_is_only_bos_has_no_target():
    ids = np.array([1, 5, 6, 1, 1, 7, 1])
    assert t.ValSet(ids, ids).documents() == [(0, 4), (3, 5), (4, 7)]


def test_several_validation_shards_are_one_stream(tmp_path):
    ids = documents([30, 40, 50])
    for i, part in enumerate((slice(0, 50), slice(50, None))):
        write_shard(tmp_path / f"fineweb_val_{i:06}.bin", ids[part])
        write_shard(tmp_path / f"fineweb_val_bytes_{i:06}.bin", byte_counts(ids)[part])
    val = t.load_val(tiny(data_path=str(tmp_path)))
    assert val.ids.tolist() == ids.tolist()
    assert val.bytes.tolist() == byte_counts(ids).tolist()


def sidecar_missing(folder):
    (folder / "fineweb_val_bytes_000000.bin").unlink()


def sidecar_shorter(folder):
    path = folder / "fineweb_val_bytes_000000.bin"
    write_shard(path, np.array(t.open_shard(path))[:100])


def sidecar_of_another(folder):
    size = len(t.open_shard(folder / "fineweb_val_000000.bin"))
    other = documents([size - 2, 0], seed=9)
    write_shard(folder / "fineweb_val_bytes_000000.bin", byte_counts(other))


def sidecar_is_no_shard(folder):
    (folder / "fineweb_val_bytes_000000.bin").write_bytes(b"bytes")


def val_without_bos(folder):
    ids = np.array(t.open_shard(folder / "fineweb_val_000000.bin"))
    write_shard(folder / "fineweb_val_000000.bin", ids[1:])
    sizes = np.array(t.open_shard(folder / "fineweb_val_bytes_000000.bin"))
    write_shard(folder / "fineweb_val_bytes_000000.bin", sizes[1:])


def val_id_out_of_range(folder):
    ids = np.array(t.open_shard(folder / "fineweb_val_000000.bin"))
    ids[77] = 64
    write_shard(folder / "fineweb_val_000000.bin", ids)


def val_short(folder):
    write_data(folder, val_lengths=[20])


def val_empty(folder):
    write_shard(folder / "fineweb_val_000000.bin", [])


def sidecar_zero(folder):
    size = len(t.open_shard(folder / "fineweb_val_000000.bin"))
    write_shard(folder / "fineweb_val_bytes_000000.bin", [0] * size)


def sidecar_dangling(folder):
    sidecar_missing(folder)
    (folder / "fineweb_val_bytes_000000.bin").symlink_to("gone")


def val_gap(folder):
    (folder / "fineweb_val_000000.bin").rename(folder / "fineweb_val_000001.bin")


def val_folder(folder):
    val_missing(folder)
    (folder / "fineweb_val_000000.bin").mkdir()


def val_missing(folder):
    (folder / "fineweb_val_000000.bin").unlink()


@pytest.mark.parametrize(("damage", "words"), [
    (sidecar_missing, r"fineweb_val_bytes_000000\.bin: the byte sidecar .* is missing.*prepare"),
    (sidecar_shorter, r"fineweb_val_bytes_000000\.bin: 100 byte counts for the 373 tokens"),
    (sidecar_of_another, r"fineweb_val_bytes_000000\.bin: position \d+ counts bytes for a BOS"),
    (sidecar_is_no_shard, r"fineweb_val_bytes_000000\.bin: 5 bytes"),
    (val_without_bos, r"fineweb_val_000000\.bin: token 0: id \d+, but a document begins with BOS"),
    (val_id_out_of_range, r"fineweb_val_000000\.bin: token 77: id 64 is outside .*VOCAB_SIZE"),
    (val_short, r"21 validation tokens, less than one sequence of EVAL_SEQ_LEN=32"),
    (val_empty, r"fineweb_val_000000\.bin: no tokens"),
    (sidecar_zero, r"fineweb_val_bytes_000000\.bin: position 0 counts .* none for 4,096 tokens"),
    (sidecar_dangling, r"fineweb_val_bytes_000000\.bin: the byte sidecar .* is missing"),
    (val_gap, r"fineweb_val_000001\.bin: shard 0 before it is missing; fetch it"),
    (val_folder, r"fineweb_val_000000\.bin: a folder; prepare"),
    (val_missing, r"fineweb_val_\*\.bin: no such file; set DATA_PATH to .*prepare_caseops"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_bad_validation_sets_are_refused(data, damage, words):
    damage(data)
    text = refused(t.load_val, tiny(data_path=str(data)))
    assert re.search(words, text), text
    assert text.startswith(str(data))


def test_a_stray_sidecar_does_not_shift_the_byte_counts(tmp_path):
    ids = documents([30, 40, 50])
    for i, part in ((0, slice(0, 50)), (1, slice(50, None))):
        write_shard(tmp_path / f"fineweb_val_{i:06}.bin", ids[part])
        write_shard(tmp_path / f"fineweb_val_bytes_{i:06}.bin", byte_counts(ids)[part])
    write_shard(tmp_path / "fineweb_val_bytes_000002.bin", [7] * 30)
    val = t.load_val(tiny(data_path=str(tmp_path)))
    assert val.bytes.tolist() == byte_counts(ids).tolist()


def train_missing(folder):
    for path in folder.glob("fineweb_train_*"):
        path.unlink()


def train_without_bos(folder):
    write_shard(folder / "fineweb_train_000000.bin", [5, 6, 7] * 100)


def train_short(folder):
    (folder / "fineweb_train_000001.bin").unlink()
    write_shard(folder / "fineweb_train_000000.bin", [1] + [5] * 63)


def train_gap(folder):
    (folder / "fineweb_train_000001.bin").rename(folder / "fineweb_train_000002.bin")


def train_dangling(folder):
    (folder / "fineweb_train_000001.bin").unlink()
    (folder / "fineweb_train_000001.bin").symlink_to("../../blobs/x")


def train_id_out_of_range(folder):
    ids = np.array(t.open_shard(folder / "fineweb_train_000001.bin"))
    ids[2000] = 64
    write_shard(folder / "fineweb_train_000001.bin", ids)


def train_magic(folder):
    write_shard(folder / "fineweb_train_000001.bin", [5, 6], magic=3)


@pytest.mark.parametrize(("damage", "words"), [
    (train_missing, r"fineweb_train_\*\.bin: no such file"),
    (train_without_bos, r"fineweb_train_000000\.bin: token 0: id 5, but a document begins"),
    (train_short, r"64 training tokens, less than a row of 64 \+ 1; lower TRAIN_BATCH_TOKENS"),
    (train_magic, r"fineweb_train_000001\.bin: magic 3"),
    (train_gap, r"fineweb_train_000002\.bin: shard 1 before it is missing"),
    (train_dangling, r"fineweb_train_000001\.bin: no such file \(a dangling link\)"),
    (train_id_out_of_range, r"fineweb_train_000001\.bin: token 2000: id 64 is outside"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_bad_training_sets_are_refused(data, damage, words):
    damage(data)
    text = refused(t.load_train, tiny(data_path=str(data)), runtime())
    assert re.search(words, text), text
    assert text.startswith(str(data))


def test_a_missing_folder_is_refused(tmp_path):
    text = refused(t.load_val, tiny(data_path=str(tmp_path / "nowhere")))
    assert text.startswith(f"{tmp_path}/nowhere/fineweb_val_*.bin: no such file")


def test_the_published_layout_is_found(tmp_path):
    name = "fineweb10B_sp64_lossless_caps_caseops_v1_reserved"
    cfg = tiny(data_dir=str(tmp_path))
    assert t.data_folder(cfg) == tmp_path / "datasets" / name
    nested = tmp_path / f"datasets/fineweb10B_sp64_caseops/datasets/datasets/{name}"
    nested.mkdir(parents=True)
    assert t.data_folder(cfg) == nested
    (tmp_path / "datasets" / name).mkdir()
    assert t.data_folder(cfg) == tmp_path / "datasets" / name
    own = tmp_path / "datasets" / name.replace("fineweb10B", "own")
    own.with_name(own.name + ".partial").mkdir()
    own.mkdir()
    assert "several sets end in _sp64_" in refused(t.data_folder, cfg)
    (tmp_path / "datasets" / name).rmdir()
    assert t.data_folder(cfg) == own
    cfg = tiny(data_dir=str(tmp_path), caseops_enabled=False)
    assert t.data_folder(cfg) == tmp_path / "datasets/fineweb10B_sp64"
    assert t.data_folder(tiny(data_path="elsewhere")).name == "elsewhere"


# ---- tokenizer

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A SentencePiece model of 64 pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    text = [" ".join(f"w{i % 7}x{i % 5}" for i in range(n, n + 30)) for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tok"), vocab_size=64,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok.model")).vocab_size()
    return folder / "tok.model", size


def manifest(folder, split=(), files=(), **told):
    (folder / "manifest.json").write_text(json.dumps(
        {"tokenizer": told, "split": dict(split), "files": dict(files)}))


def test_the_right_tokenizer_is_taken(tmp_path, tokenizer):
    path, size = tokenizer
    cfg = tiny(data_path=str(tmp_path), tokenizer_path=str(path), vocab_size=size)
    t.check_data(cfg)
    manifest(tmp_path, vocab_size=size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    t.check_data(cfg)


def test_wrong_tokenizers_are_refused(tmp_path, tokenizer):
    path, size = tokenizer
    right = tiny(data_path=str(tmp_path), tokenizer_path=str(path), vocab_size=size)
    other = tiny(data_path=str(tmp_path), tokenizer_path=str(path), vocab_size=size + 1)
    assert f"{path}: {size} pieces, but VOCAB_SIZE={size + 1}" in refused(t.check_data, other)
    manifest(tmp_path, vocab_size=size, sha256="0" * 64)
    assert "the manifest says 0000" in refused(t.check_data, right)
    manifest(tmp_path, vocab_size=size + 1)
    text = refused(t.check_data, tiny(data_path=str(tmp_path), vocab_size=size))
    assert "manifest.json" in text and f"set VOCAB_SIZE={size + 1}" in text
    nowhere = tiny(data_path=str(tmp_path / "x"), tokenizer_path=str(tmp_path / "no.model"))
    assert "no.model: no such file" in refused(t.check_data, nowhere)


@pytest.mark.parametrize("name", ["manifest.json", "tok.model"])
def test_unreadable_tokenizer_files_are_refused(tmp_path, name):
    (tmp_path / name).write_text("not what it should be")
    path = str(tmp_path / "tok.model") if name == "tok.model" else ""
    text = refused(t.check_data, tiny(data_path=str(tmp_path), tokenizer_path=path))
    assert name in text


def test_the_identity_of_the_data_is_told(tmp_path):
    cfg = tiny(data_path=str(tmp_path))
    assert "no manifest" in t.check_data(cfg)
    manifest(tmp_path, split={"overlap": False, "val_end_document": 5, "train_first_document": 5,
                              "train_documents_equal_to_validation": 2})
    said = t.check_data(cfg)
    assert hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest() in said
    assert said.endswith("equal to a validation document: 2")


@pytest.mark.parametrize("split", [
    {"overlap": True}, {"val_end_document": 50_000, "train_first_document": 10_000}])
def test_a_split_that_overlaps_is_not_trained_on(tmp_path, split):
    manifest(tmp_path, split=split)
    assert "also training documents" in refused(t.check_data, tiny(data_path=str(tmp_path)))
    t.check_data(tiny(data_path=str(tmp_path), ttt_eval_only=True))


def test_a_validation_file_swapped_after_the_split_is_refused(tmp_path):
    file = tmp_path / "fineweb_val_000000.bin"
    file.write_bytes(b"first")
    entry = {"sha256": hashlib.sha256(b"first").hexdigest()}
    manifest(tmp_path, files={file.name: entry})
    t.check_data(tiny(data_path=str(tmp_path)))
    file.write_bytes(b"other")
    assert "not the file that manifest.json" in refused(t.check_data, tiny(data_path=str(tmp_path)))
    file.write_bytes(b"first")
    (tmp_path / "fineweb_val_000001.bin").write_bytes(b"of another set")
    assert "val_000001.bin: not the file" in refused(t.check_data, tiny(data_path=str(tmp_path)))


def test_a_validation_file_that_is_listed_must_be_there(tmp_path):
    manifest(tmp_path, files={"fineweb_val_000003.bin": {"sha256": "0" * 64}})
    assert "val_000003.bin: no such file" in refused(t.check_data, tiny(data_path=str(tmp_path)))
