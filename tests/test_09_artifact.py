"""§9 Artifact: round trips, refusals, fuzzing, the packed program; and §2's atomic write."""
import errno
import hashlib
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch

import train_gpt as tg
from tests.tools import busy_model, tiny

needs_lrzip = pytest.mark.skipif(shutil.which("lrzip") is None, reason="lrzip is not installed")
COMPRESSORS = ["ans", "brotli", "lzma", pytest.param("pergroup", marks=needs_lrzip)]


def small_model(seed=0, vocab=300, width=48, layers=2):
    """(tensors, roles) that have every role, dtype and odd shape."""
    rng = np.random.default_rng(seed)
    shapes = {"key": (24, width), "query": (width, width), "value": (24, width),
              "attn_out": (width, width), "mlp_up": (96, width), "mlp_down": (width, 96)}
    tensors = {"tok_emb": rng.normal(0, 4.5, (vocab, width)).round().astype(np.int8)}
    roles = {"tok_emb": "embedding"}
    for i in range(layers):
        for role, shape in shapes.items():
            tensors[f"blocks.{i}.{role}"] = rng.normal(0, 2.5, shape).round().astype(np.int8)
            roles[f"blocks.{i}.{role}"] = role
    for dtype in tg.PIECE_DTYPES:
        tensors[f"small.{dtype}"] = (rng.normal(0, 9, (3, 5, 2)) ** 2).astype(dtype)
    tensors["nan"] = np.array([np.nan, -0.0, np.inf], np.float16)
    tensors["scalar"], tensors["empty"] = np.array(3.5, np.float32), np.zeros((0, 7), np.float16)
    return tensors, roles


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].flags.writeable and found[name].flags.c_contiguous


def refusal(blob):
    """The one line with which `blob` is refused."""
    with pytest.raises(tg.UserError) as caught:
        tg.decode_artifact(blob, "model.ptz")
    line = str(caught.value)
    assert line.startswith("model.ptz: ") and "\n" not in line and len(line) < 400
    return line


def reseal(blob, change):
    """The file with its directory changed by change(meta, rows) and every outer check made good."""
    _, _, packed, _, _, _ = tg.HEADER.unpack_from(blob)
    base = tg.HEADER.size + packed
    tree = json.loads(brotli.decompress(blob[tg.HEADER.size:base]))
    change(*tree)
    raw = json.dumps(tree).encode()
    stored = brotli.compress(raw, quality=1)
    header = tg.HEADER.pack(tg.MAGIC, tg.FORMAT_VERSION, len(stored), len(raw),
                            tg.HEADER.size + len(stored) + len(blob) - base,
                            hashlib.sha256(stored).digest()[:16])
    return header + stored + blob[base:]


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_round_trip_is_exact_and_bytes_are_deterministic(compressor):
    tensors, roles = small_model()
    meta = {"num_layers": 2, "names": ["a", "ü"], "rate": 0.1}
    blob = tg.encode_artifact(tensors, roles, meta, compressor)
    assert blob == tg.encode_artifact(dict(tensors), roles, meta, compressor)
    assert b"\x80\x04" not in blob[:2] and b"numpy" not in blob[:64]
    found, found_meta = tg.decode_artifact(blob, "model.ptz")
    assert_same(found, tensors)
    assert found_meta == meta
    report = tg.artifact_report(blob)
    assert sum(report.values()) == len(blob)
    expected = {"rest", "directory"} | (
        set(tg.ROLES) if compressor in ("ans", "pergroup") else set())
    assert set(report) == expected


def test_torch_tensors_and_views_are_stored_as_their_values():
    tensor = torch.arange(12, dtype=torch.int8).reshape(3, 4)
    blob = tg.encode_artifact({"t": tensor, "v": tensor.T}, {}, {}, "brotli")
    found, _ = tg.decode_artifact(blob, "x")
    assert_same(found, {"t": tensor.numpy(), "v": np.ascontiguousarray(tensor.numpy().T)})


@pytest.mark.parametrize("tensor, role", [
    (np.zeros(3, np.float64), None), (np.zeros(3, np.int64), None),
    (np.zeros((2, 3, 4), np.int8), "query"), (np.zeros((2, 3), np.int8), "qeury")])
@needs_lrzip
def test_what_cannot_be_stored_raises(tensor, role):
    with pytest.raises(tg.UserError, match="cannot store t"):
        tg.encode_artifact({"t": tensor}, {"t": role} if role else {}, {}, "pergroup")


def test_walk_equals_the_obvious_one():
    matrix = np.random.default_rng(1).integers(-5, 6, (300, 17)).astype(np.int8)
    matrix[200] = matrix[7]  # a tie
    left, order = list(range(1, 300)), [0]
    while left:
        gaps = [np.abs(matrix[i].astype(int) - matrix[order[-1]]).sum() for i in left]
        order.append(left.pop(int(np.argmin(gaps))))
    walk = tg._nearest_walk(matrix)
    assert walk.dtype == np.uint16 and walk.tolist() == order


@needs_lrzip
def test_rows_are_walked_only_where_it_pays():
    rng = np.random.default_rng(2)
    centres = rng.integers(-60, 60, (20, 64))
    similar = (np.repeat(centres, 30, 0) + rng.integers(-1, 2, (600, 64))).astype(np.int8)
    tensors = {"alike": similar[rng.permutation(600)],
               "noise": rng.normal(0, 2.5, (64, 64)).round().astype(np.int8)}
    blob = tg.encode_artifact(tensors, {"alike": "embedding", "noise": "query"}, {}, "pergroup")
    kinds = {piece[0]: piece[1] for row, _ in tg._read_directory(blob)[1] for piece in row[6]}
    assert kinds == {"alike/order": "order", "alike": "walked", "noise": "transposed"}
    assert_same(tg.decode_artifact(blob, "x")[0], tensors)


# ---- ans -----------------------------------------------------------------------------------------

GOLDEN = Path(__file__).with_name("golden_ans.bin")


def golden_integers():
    """(tensors, roles) by integer arithmetic alone: a correlated tall matrix of two lanes, and a
    pair whose columns are of different scale."""
    state, noise = 12345, []
    for _ in range(640 * 64 + 2 * 24 * 48):
        total = 0
        for _ in range(4):
            state = (state * 1103515245 + 12345) % 2**31
            total += state >> 16
        noise.append(total - 4 * 16384)
    noise = np.array(noise) // 4096  # a deviation of 4.6
    tall, pair = noise[:640 * 64].reshape(640, 64) // 3, noise[640 * 64:].reshape(2, 24, 48)
    for column in range(1, 64):
        tall[:, column] += tall[:, column - 1] // 2
    pair = pair * (1 + np.arange(48) % 3) // 4
    tensors = {"tall": tall, "a": pair[0], "b": pair[1]}
    return ({name: array.astype(np.int8) for name, array in tensors.items()},
            {"tall": "embedding", "a": "query", "b": "query"})


def codec_pieces(blob):
    """[(stored bytes, raw size, shapes)] of the streams that ans wrote."""
    return [(stored, row[4], [piece[3] for piece in row[6]])
            for row, stored in tg._read_directory(blob)[1] if row[1] == "ans"]


def test_a_file_of_another_day_decodes_to_the_same_integers():
    """`python -m tests.test_09_artifact` writes the file; do so only where the format changes."""
    blob, (tensors, roles) = GOLDEN.read_bytes(), golden_integers()
    assert_same(tg.decode_artifact(blob, "golden")[0], tensors)
    assert codec_pieces(blob) == codec_pieces(tg.encode_artifact(tensors, roles, {}, "ans"))
    used = {tg.ANS_SETTINGS[stored[0]][2] > 0 for stored, *_ in codec_pieces(blob)}
    assert len(blob) < 20_000 and used == {True, False}  # with prediction and without


def test_integers_do_not_depend_on_the_processor():
    """Other loops of numpy and another kernel of BLAS: results are the same."""
    code = ("import sys, train_gpt as t, hashlib; from tests.test_09_artifact import GOLDEN; "
            "found = t.decode_artifact(GOLDEN.read_bytes(), 'x')[0]; "
            "print(*(hashlib.sha256(found[k]).hexdigest() for k in sorted(found)))")
    plain = {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX X86_V3 X86_V4",
             "OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "2"}
    tensors = golden_integers()[0]
    right = [hashlib.sha256(tensors[k]).hexdigest() for k in sorted(tensors)]
    for extra in ({}, plain):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], text=True,
                              capture_output=True, env={**os.environ, **extra},
                              cwd=Path(__file__).parents[1])
        assert done.stdout.split() == right, done.stderr


def odd_cubes():
    rng = np.random.default_rng(5)
    yield np.zeros((3, 40, 50), np.int8)
    yield rng.integers(-128, 128, (1, 300, 70)).astype(np.int8)
    yield np.where(rng.random((2, 30, 33)) < 0.5, -128, 127).astype(np.int8)
    yield rng.normal(0, 3, (2, 1, 300)).round().astype(np.int8)
    yield rng.normal(0, 3, (1, 300, 1)).round().astype(np.int8)
    yield np.array([[[-7]]], np.int8)
    yield (rng.normal(0, 2, (1, 900, 64)) @ (np.eye(64) + 9 * np.eye(64, k=1))).round().clip(
        -127, 127).astype(np.int8)  # long steps: predictions that would leave int8
    yield rng.normal(0, 3, (70, 5, 9)).round().astype(np.int8)


@pytest.mark.parametrize("states", [1, 32])
@pytest.mark.parametrize("index", range(len(tg.ANS_SETTINGS)))
def test_every_setting_takes_odd_matrices_there_and_back(index, states, monkeypatch):
    own = tg._ans_settings
    for cube in odd_cubes():
        usual = own(*cube.shape)
        tried = [index] if index in usual else usual
        with monkeypatch.context() as patch:
            patch.setattr(tg, "_ans_settings", lambda *_, tried=tried: tried)
            stored = tg._ans_encode(cube.tobytes(), [cube.shape[1:]] * len(cube), states)
        assert tg._ans_decode(stored, cube.size, [list(cube.shape[1:])] * len(cube)) == (
            cube.tobytes())


def test_a_trellis_symbol_is_coded_under_the_parity_of_its_state():
    """Of unit Gaussians: the size is that of two distributions, not of one for both."""
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    s, c = torch.full((4096,), 0.6).half(), torch.zeros(16, dtype=torch.int8)
    m = tg.gptq_trellis(x, tg.factorise(torch.eye(16)), s, c, 8)
    even = torch.from_numpy(tg.trellis_walk(m.numpy(), tg.trellis_bits(8)) % 2 == 0)

    def entropy(*parts):
        counts = [torch.unique(part, return_counts=True)[1].double() for part in parts]
        return sum(-(n * (n / n.sum()).log2()).sum().item() for n in counts) / 8

    raw, shapes = m.numpy().tobytes(), [(4096, 16)]
    right, plain = (len(tg._ans_encode(raw, shapes, states)) for states in (8, 1))
    assert right < 1.01 * entropy(m[even], m[~even]) < 0.97 * plain


def test_ans_learns_scales_and_correlations():
    rng = np.random.default_rng(6)
    scales = np.exp(rng.normal(0, 0.5, (2, 1, 128)))
    cube = (rng.normal(0, 2.5, (2, 256, 128)) * scales).round().clip(-31, 31).astype(np.int8)
    tall = rng.normal(0, 4, (4000, 64)) @ np.linalg.qr(rng.normal(size=(64, 64)))[0] * 0.1
    tall = (tall @ np.diag(np.linspace(0.1, 40, 64)) @ rng.normal(size=(64, 64)) / 8).round()
    for x, gain in ((cube, 0.97), (tall.clip(-127, 127).astype(np.int8)[None], 0.9)):
        counts = np.bincount(x.ravel().astype(int) + 128)
        bound = -(counts[counts > 0] * np.log2(counts[counts > 0] / x.size)).sum() / 8
        assert len(tg._ans_encode(x.tobytes(), [x.shape[1:]] * len(x), 1)) < gain * bound


def test_what_ans_has_no_form_for_goes_to_the_rest():
    rng = np.random.default_rng(7)
    tensors = {"a": rng.integers(-9, 9, (8, 6)).astype(np.int8),
               "other": rng.integers(-9, 9, (6, 8)).astype(np.int8),
               "int16": rng.integers(-999, 999, (8, 6)).astype(np.int16)}
    roles = {"a": "key", "other": "key", "int16": "query"}
    blob = tg.encode_artifact(tensors, roles, {}, "ans")
    assert set(tg.artifact_report(blob)) == {"rest", "directory", "key"}
    assert_same(tg.decode_artifact(blob, "x")[0], tensors)


def test_damaged_ans_streams_raise_and_never_crash():
    rng = random.Random(8)
    tensors, roles = small_model(vocab=120, layers=1)
    right = 0
    for stored, size, shapes in codec_pieces(tg.encode_artifact(tensors, roles, {}, "ans")):
        whole = tg._ans_decode(stored, size, shapes)
        for _ in range(25):
            try:
                found = tg._ans_decode(mutate(rng, stored), size, shapes)
            except Exception:
                continue
            assert len(found) == size
            right += found == whole
        for wrong in (stored[:-2], stored[:7], b"", stored + b"ab"):
            with pytest.raises(Exception, match="."):
                tg._ans_decode(wrong, size, shapes)
        for lie in ([[10**9, 10**9]], [[-2, -3]], [[size, 1], [1, 1]], [[8192 * 2, 8192]], [], [3]):
            with pytest.raises(Exception, match="."):
                tg._ans_decode(stored, size, lie)
    assert right < 60


# ---- refusals ------------------------------------------------------------------------------------

def test_foreign_truncated_and_newer_files_are_named():
    tensors, roles = small_model()
    blob = tg.encode_artifact(tensors, roles, {}, "brotli")
    for foreign in (b"", b"PK\3\4" + blob[4:], bytes(100), b"\x80\x02}q\x00.", os.urandom(500)):
        assert "not an artifact" in refusal(foreign)
    assert "truncated" in refusal(blob[:20])
    line = refusal(blob[:-1])
    assert str(len(blob)) in line and str(len(blob) - 1) in line
    assert "truncated" in refusal(blob + b"x")
    newer = bytearray(blob)
    newer[8] = 7
    assert "format 7; this program reads 1" in refusal(bytes(newer))


def test_every_flipped_bit_of_a_payload_or_directory_is_found():
    tensors, roles = small_model(vocab=20)
    blob = tg.encode_artifact(tensors, roles, {}, "lzma")
    base = tg.artifact_report(blob)["directory"]
    for place, text in ((tg.HEADER.size + 5, "directory: hash differs"),
                        (base + 30, "stream 'rest': hash differs"),
                        (len(blob) - 1, "stream 'rest': hash differs")):
        damaged = bytearray(blob)
        damaged[place] ^= 16
        assert text in refusal(bytes(damaged))


def edit_piece(field, value):
    return lambda meta, rows: rows[0][6][1].__setitem__(field, value)


def edit_stream(field, value):
    return lambda meta, rows: rows[0].__setitem__(field, value)


@pytest.mark.parametrize("change, text", [
    (edit_piece(1, "pickle"), "unknown kind='pickle'"),
    (edit_piece(2, "object"), "dtype='object'"),
    (edit_piece(2, "int16"), "shape and size do not agree"),
    (edit_piece(3, [10 ** 12, 48]), "shape and size do not agree"),
    (edit_piece(3, [-24, -48]), "shape and size do not agree"),
    (edit_piece(3, [2.5, 1]), "shape and size do not agree"),
    (edit_piece(4, 10 ** 9), "range outside its stream"),
    (edit_piece(4, -5), "range outside its stream"),
    (edit_piece(5, 10 ** 12), "shape and size do not agree"),
    (edit_piece(6, "0" * 32), "hash differs"),
    (edit_piece(0, "tok_emb"), "two pieces have the same name"),
    (edit_piece(0, 3), "of a wrong type"),
    (lambda meta, rows: rows[0][6][1].__setitem__(slice(0, 2), ["a\nb", "x"]), r"piece 'a\nb'"),
    (edit_piece(1, "walked"), "unreadable"),
    (edit_stream(1, "rot13"), "unknown compressor 'rot13'"),
    (edit_stream(1, "lzma"), "unreadable: LZMAError"),
    (edit_stream(2, 1), "range outside the file"),
    (edit_stream(3, 10 ** 9), "range outside the file"),
    (edit_stream(3, -1), "range outside the file"),
    (edit_stream(3, 5), "belong to no stream"),
    (edit_stream(4, 10 ** 15), "more bytes than are allowed"),
    (edit_stream(4, -1), "more bytes than are allowed"),
    (edit_stream(4, 10 ** 8), "pieces of other size"),
    (edit_stream(5, None), "hash differs"),
    (lambda meta, rows: rows[0].pop(), "unreadable"),
    (lambda meta, rows: rows.clear(), "belong to no stream"),
    (lambda meta, rows: rows[0][6].pop(0), "pieces of other size")])
def test_a_directory_that_lies_is_refused(change, text):
    tensors, roles = small_model()
    blob = tg.encode_artifact(tensors, roles, {}, "brotli")
    line = refusal(reseal(blob, change))
    assert text in line


@pytest.mark.parametrize("codec", COMPRESSORS[1:])  # ans: sizes must agree with the shapes
def test_a_decompression_bomb_stops_at_the_declared_size(codec):
    codec = tg.COMPRESSORS[codec]
    bomb = tg.CODECS[codec][0](bytes(1 << 19))
    if codec == "lrzip":
        with pytest.raises(subprocess.CalledProcessError):
            tg.CODECS[codec][1](bomb, 1000)
    else:
        assert 1000 < len(tg.CODECS[codec][1](bomb, 1000)) <= 1 << 15


def mutate(rng, blob):
    """One random damage: bytes changed, cut out, doubled, moved, or noise."""
    data, place = bytearray(blob), rng.randrange(len(blob))
    span = min(len(blob) - place, 1 << rng.randrange(10))
    how = rng.randrange(6)
    if how == 0:
        for _ in range(1 + rng.randrange(4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        data[place:place + span] = rng.randbytes(span)
    elif how == 2:
        del data[place:place + span]
    elif how == 3:
        data[place:place] = data[place:place + span]
    elif how == 4:
        del data[place:]
    else:
        data = bytearray(tg.MAGIC + rng.randbytes(rng.randrange(200)))
    return bytes(data)


def scramble(rng):
    """A change of the directory that puts any JSON value anywhere."""
    values = [None, True, -1, 0, 1, 2.5, 1e308, float("nan"), 10 ** 30, "", "order", "walked",
              "transposed", "uint16", "lrzip", "ans", [], [[]], {}, [1, 2], "brotli", "lzma"]

    def change(meta, rows):
        node, steps = rows, rng.randrange(1, 5)
        for _ in range(steps):
            if not isinstance(node, list) or not node:
                return
            place = rng.randrange(len(node))
            parent, node = node, node[place]
        how = rng.randrange(4)
        if how == 0:
            parent[place] = rng.choice(values)
        elif how == 1:
            del parent[place]
        elif how == 2:
            parent.insert(place, json.loads(json.dumps(rng.choice(parent))))
        else:
            rng.shuffle(parent)
    return change


def redigest(rng, blob):
    """Noise inside one stream, whose hash is made good: the decompressor meets it."""
    _, _, packed, _, _, _ = tg.HEADER.unpack_from(blob)
    streams, base = tg._read_directory(blob)[1], tg.HEADER.size + packed
    place = rng.randrange(len(streams))
    row, stored = streams[place]
    new = mutate(rng, stored)[:len(stored)].ljust(len(stored), b"\0")

    def change(meta, rows):
        rows[place][5] = tg._digest(new)

    at = base + row[2]
    return reseal(blob[:at] + new + blob[at + len(stored):], change)


def reorder(rng, blob):
    """Streams in another order, their directory rows left or moved with them."""
    _, _, packed, _, _, _ = tg.HEADER.unpack_from(blob)
    order = tg._read_directory(blob)[1]
    rng.shuffle(order)
    moved = blob[:tg.HEADER.size + packed] + b"".join(stored for _, stored in order)
    if rng.random() < 0.5:
        return moved

    def change(meta, rows):
        by_name, end = {row[0]: row for row in rows}, 0
        rows[:] = [by_name[row[0]] for row, _ in order]
        for row in rows:
            row[2], end = end, end + row[3]

    return reseal(moved, change)


def fuzz_model(quantiser):
    """(model, its artifact's tensors, roles): a small random model, quantised."""
    cfg = tiny(quantiser=quantiser, vocab_size=40)
    model = busy_model(cfg)
    factors = {m.source: tg.matrix_of(model.state_dict(), m).shape[1] for m in tg.matrices(cfg)}
    hessians = {name: torch.eye(n) + 0.1 for name, n in factors.items()}
    by_trellis = quantiser == "tcq" and tg.quantise_trellis(
        model.state_dict(), {name: tg.factorise(H) for name, H in hessians.items()},
        {m.name: torch.ones(tg.matrix_of(model.state_dict(), m).shape[0])
         for m in tg.matrices(cfg)}, -6.0, cfg)
    tensors = tg.quantise(model.state_dict(), hessians, cfg, by_trellis or None)
    return model, {n: x.numpy() for n, x in tensors.items()}, {
        f"{m.name}.q": m.role for m in tg.matrices(cfg)}


def fuzz(compressor, quantiser, count, seed):
    """How many of `count` damaged artifacts gave the right tensors; all others gave one line."""
    rng, (model, tensors, roles) = random.Random(seed), fuzz_model(quantiser)
    blob = tg.encode_artifact(tensors, roles, model.cfg.architecture(), compressor)
    kinds = (lambda: mutate(rng, blob), lambda: reseal(blob, scramble(rng)),
             lambda: redigest(rng, blob), lambda: reorder(rng, blob),
             lambda: rng.randbytes(rng.randrange(2 * len(blob))))
    right = 0
    for number in range(count):
        bad = kinds[number % len(kinds)]()
        started = time.perf_counter()
        try:
            found, _ = tg.decode_artifact(
                bad, "model.ptz", lambda meta, pieces: tg.check_pieces(pieces, model))
            tg.dequantise({name: torch.from_numpy(x) for name, x in found.items()}, model)
        except tg.UserError as error:
            line = str(error)
            assert "\n" not in line and line.startswith("model.ptz: ") and len(line) < 1000, line
        else:
            assert_same(found, tensors)
            right += 1
        assert time.perf_counter() - started < 30
    return right


@pytest.mark.parametrize(("compressor", "quantiser"), [
    ("ans", "tcq"), ("ans", "uniform"), ("brotli", "tcq"), ("lzma", "uniform")])
def test_fuzz_gives_the_right_tensors_or_one_line(compressor, quantiser):
    """`bench/fuzz_artifact.py` does the same at length."""
    assert fuzz(compressor, quantiser, 400, seed=3) < 200


def test_nothing_is_unpacked_before_the_models_own_shapes_are_checked(monkeypatch):
    model, tensors, roles = fuzz_model("tcq")
    tensors["tok_emb.weight.q"] = np.zeros((50, 32), np.int8)
    blob = tg.encode_artifact(tensors, roles, {}, "ans")
    monkeypatch.setattr(tg, "_decode_stream", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(tg.UserError, match=r"tok_emb.weight.q is int8 \[50, 32\], not int8 \[40"):
        tg.decode_artifact(blob, "x", lambda meta, pieces: tg.check_pieces(pieces, model))


def test_nothing_in_a_file_is_run():
    for function in (tg.encode_artifact, tg.decode_artifact, tg._read_directory, tg._decode_stream):
        source = inspect.getsource(function)
        assert not any(word in source for word in ("pickle", "eval(", "exec(", ".load("))
    assert "loads(" in inspect.getsource(tg._read_directory)  # JSON's, and the only one


# ---- what must be installed ----------------------------------------------------------------------

def test_check_compressor(monkeypatch):
    tg.check_compressor("brotli")
    with pytest.raises(tg.UserError, match="COMPRESSOR=zip is unknown: choose from ans, pergroup"):
        tg.check_compressor("zip")
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    with pytest.raises(tg.UserError, match="pip install python-minifier"):
        tg.check_compressor("lzma")
    tg.check_compressor("lzma", packing=False)


def test_missing_lrzip_says_how_to_install_it(monkeypatch, tmp_path):
    blob = tg.encode_artifact({"t": np.zeros(5, np.int8)}, {}, {}, "brotli")
    foreign = reseal(blob, edit_stream(1, "lrzip"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tg.UserError, match="apt-get install lrzip.*COMPRESSOR=ans"):
        tg.check_compressor("pergroup")
    with pytest.raises(tg.UserError, match="apt-get install lrzip"):
        tg.decode_artifact(foreign, "x")
    for compressor in ("ans", "brotli"):
        tg.check_compressor(compressor)
    tg.decode_artifact(blob, "x")


# ---- the packed program --------------------------------------------------------------------------

PROGRAM = '''
"""A program whose docstring does not count."""
from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import os
import sys

import torch


@dataclasses.dataclass(frozen=True)
class Config:
    """Its docstring does not count either."""
    width: int = dataclasses.field(default=3, metadata={"help": "in columns"})
    name: str = "two  spaces"


@torch.library.custom_op("packed_test::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    # a comment
    return x * factor


@scaled.register_fake
def _(x, factor):
    return torch.empty_like(x)


def child(queue):
    queue.put(Config(9).width)


def fails(depth: int) -> None:
    if depth:
        return fails(depth - 1)
    raise RuntimeError("the end")


TRITON


def main():
    x = torch.arange(4.0)
    print(Config(), [(field.name, field.type) for field in dataclasses.fields(Config)])
    compiled = torch.compile(lambda a: scaled(a, 2.0) + 1, fullgraph=True, backend="eager")
    print(scaled(x, 1.5).tolist(), compiled(x).tolist(), kernel_result())
    print(__name__, __spec__, __package__, os.path.basename(__file__), os.path.isabs(__file__))
    print(os.path.samefile(__file__, sys.argv[0]), sys.argv[1:], os.environ.get("WORLD_SIZE"))
    print("raise RuntimeError" in inspect.getsource(fails), "width" in inspect.getsource(Config))
    print(os.path.samefile(sys.path[0], os.path.dirname(__file__)))
    if "SPAWN" in sys.argv:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(queue.get(timeout=120))
        process.join()
    if "FAIL" in sys.argv:
        fails(2)


if __name__ == "__main__":
    main()
'''
KERNEL = '''
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Doubles x [n]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)  # a comment
    tl.store(out_ptr + at, x + x, mask=at < n)


def kernel_result():
    x, out = torch.arange(10.0), torch.empty(10)
    add_kernel[(1,)](x, out, 10, BLOCK=16)
    return out.tolist()
'''


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """(plain, packed): two files of one program in two folders."""
    pytest.importorskip("python_minifier")
    try:
        import triton  # noqa: F401
        kernel = KERNEL
    except ImportError:
        kernel = "def kernel_result():\n    return None\n"
    source = PROGRAM.replace("TRITON", kernel)
    folder = tmp_path_factory.mktemp("programs")
    paths = []
    for name, data in (("plain", source.encode()), ("packed", tg.pack_program(source))):
        (folder / name).mkdir()
        paths.append(folder / name / "program.py")
        paths[-1].write_bytes(data)
    return paths


def launch(path, *arguments, torchrun=0):
    command = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"]
                                 if torchrun else []), path.name, *arguments]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


def test_packed_program_behaves_as_its_source(programs):
    plain, packed = (launch(path, "a b", "--c=1", "SPAWN") for path in programs)
    assert plain.returncode == 0, plain.stderr
    assert packed.stdout == plain.stdout and packed.returncode == 0, packed.stderr


def test_packed_program_fails_as_its_source(programs):
    plain, packed = (launch(path, "FAIL") for path in programs)
    assert packed.stdout == plain.stdout and packed.returncode == plain.returncode == 1
    for text in ("RuntimeError: the end", "in fails\n", "in main\n", "return fails(depth"):
        assert text in plain.stderr and text in packed.stderr, packed.stderr
    assert plain.stderr.count("in fails") == packed.stderr.count("in fails") == 3


@pytest.mark.dist
def test_packed_program_under_torchrun(programs):
    plain, packed = (launch(path, torchrun=2) for path in programs)
    assert packed.returncode == plain.returncode == 0, packed.stderr
    # two processes write at once, so that only the multiset of characters is fixed
    assert sorted(packed.stdout) == sorted(plain.stdout) and "'--" not in packed.stdout


def test_packing_is_deterministic_and_smaller():
    pytest.importorskip("python_minifier")
    source = Path(tg.__file__).read_text(encoding="utf-8")
    packed = tg.pack_program(source)
    assert packed == tg.pack_program(source)
    assert len(packed) < 0.5 * len(source.encode())


def test_packed_source_is_visible_to_linecache(tmp_path):
    pytest.importorskip("python_minifier")
    source = textwrap.dedent('''
        import linecache
        if __name__ == "__main__":
            print("".join(linecache.getlines(__file__)), end="")
    ''')
    (tmp_path / "p.py").write_bytes(tg.pack_program(source))
    done = subprocess.run([sys.executable, "p.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("import linecache\n") and done.returncode == 0, done.stderr


# ---- §2 write_atomic -----------------------------------------------------------------------------

def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "model.ptz"
    tg.write_atomic(path, b"old")
    tg.write_atomic(str(path), b"newer")
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["model.ptz"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "model.ptz"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(tg.UserError, match="model.ptz.*No space left on device.*free") as caught:
        tg.write_atomic(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.ptz"]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.ptz"
    path.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tg.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.ptz"]


def test_a_real_limit_on_file_size_is_one_clear_line(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.ptz"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(tg.UserError, match="cannot write 1,000,000 bytes"):
            tg.write_atomic(path, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.ptz"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(tg.UserError, match="nowhere"):
        tg.write_atomic(tmp_path / "nowhere" / "model.ptz", b"x")


if __name__ == "__main__":
    GOLDEN.write_bytes(tg.encode_artifact(*golden_integers(), {}, "ans"))
