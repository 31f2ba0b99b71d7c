"""submission.py --scores: what an evaluation with SCORES_PATH wrote, computed and checked again."""

import io
import json
import math
import sys

import numpy as np
import pytest

import submission as s
from tests.test_submission import with_result, write_logs

LENGTHS = (3, 1, 5, 2)  # targets of each document


def arrays():
    """Four documents, coded from the longest to the shortest."""
    places = np.cumsum([0, *LENGTHS])[:-1]
    order = np.empty(sum(LENGTHS), np.int64)
    at = 0
    for k in sorted(range(len(LENGTHS)), key=lambda k: -LENGTHS[k]):
        order[places[k]:places[k] + LENGTHS[k]] = at + np.arange(LENGTHS[k])
        at += LENGTHS[k]
    rng = np.random.default_rng(0)
    return {"nats": rng.random(at).astype(np.float32) * 5, "order": order,
            "bytes": rng.integers(1, 9, at).astype(np.int32),
            "document": np.repeat(np.arange(4, dtype=np.int32), LENGTHS)}


def meta(given, **changes):
    nats, size = float(given["nats"].sum(dtype=np.float64)), int(given["bytes"].sum())
    return {"artifact_sha256": "a" * 64, "program_sha256": "abc", "data": "data: folder",
            "settings": {"TTT_BATCH_SIZE": "1"}, "world": 1, "val_loss": nats / len(given["nats"]),
            "val_bpb": nats / math.log(2) / size, "tokens": len(given["nats"]), "bytes": size,
            **changes}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(arrays, logs=..., meta's changes) -> (exit code, output, errors)."""
    def call(given, *logs, **changes):
        path = tmp_path / "scores.npz"
        if isinstance(given, bytes):
            path.write_bytes(given)
        else:
            text = given.pop("meta", None)
            np.savez_compressed(path, **given, meta=np.array(
                json.dumps(meta(given, **changes))) if text is None else text)
        monkeypatch.setattr(sys, "argv", ["submission.py", "--scores", str(path),
                                          *map(str, logs)])
        return s.main(), *capsys.readouterr()
    return call


def test_figures_are_computed_again(check):
    given = arrays()
    code, out, err = check(given)
    want = meta(given)
    assert (code, err) == (0, "") and "0 finding(s)" in out
    assert f"val_loss {want['val_loss']:.8f}, val_bpb {want['val_bpb']:.8f}, 11 targets" in out
    assert "11 targets of 4 documents; document 2 is coded first, document 1 last" in out
    assert "one document after another" in out
    given["order"] = np.arange(11)
    assert "order: that of the stream" in check(given)[1]
    given["order"] = np.array([0, 2, 4, 1, 3, 5, 6, 7, 8, 9, 10])
    assert "documents in turns" in check(given)[1]


@pytest.mark.parametrize(("name", "change", "words"), [
    ("val_loss", 1.00001, "val_loss: the entries give"), ("val_bpb", 0.99, "val_bpb: the entries"),
    ("bytes", 1.1, "bytes: the entries give"), ("tokens", 2, "tokens: the entries give 11, meta")])
def test_what_meta_says_is_compared(name, change, words, check):
    given = arrays()
    value = meta(given)[name] * change
    code, out, _ = check(given, **{name: value if name.startswith("val") else int(value) + 1})
    assert code == 1 and f"finding: {words}" in out and "1 finding(s)" in out
    assert check(arrays(), val_loss=meta(given)["val_loss"] * (1 + 5e-7))[0] == 0


def swap(array, a, b):
    array[[a, b]] = array[[b, a]]


@pytest.mark.parametrize(("name", "change", "words"), [
    ("order", lambda x: x.__setitem__(3, x[0]), "order is no permutation of 0 to 10: "),
    ("order", lambda x: x.__setitem__(0, 11), "order is no permutation of 0 to 10: 11 at target 0"),
    ("order", lambda x: x.__setitem__(5, -1), "order is no permutation of 0 to 10: -1 at target 5"),
    ("order", lambda x: swap(x, 5, 6), "the order falls at 1 target(s), first at target 6, "),
    ("document", lambda x: swap(x, 2, 3), "documents are not numbered 0, 1, ... in the order"),
    ("document", lambda x: x.__iadd__(1), "documents are not numbered 0, 1, ... in the order"),
    ("document", lambda x: x.__setitem__(slice(9, 11), 5), "first at target 9"),
    ("nats", lambda x: x.__setitem__(2, -0.5), "nats below 0 at 1 target(s), first at target 2"),
    ("nats", lambda x: x.__setitem__(2, np.nan), "nats is not finite at 1 target(s), first at "),
    ("bytes", lambda x: x.__setitem__(7, -1), "bytes below 0 at 1 target(s), first at target 7")])
def test_entries_and_order_are_checked(name, change, words, check):
    given = arrays()
    figures = meta(given)
    change(given[name])
    figures |= {k: v for k, v in meta(given).items() if name != "nats" or "val" not in k}
    code, out, err = check(given, **figures)
    assert code == 1 and any(words in line for line in out.splitlines()
                             if line.startswith("finding: ")), out + err


@pytest.mark.parametrize(("order", "changes", "words"), [
    (np.arange(11), {}, "settings and 1 process(es) give: they differ at place 0"),
    (None, {"world": 2}, "settings and 2 process(es) give: they differ at place 5"),
    (None, {"world": 0}, "world in meta is no number of processes: 0"),
    (None, {"settings": {}}, "differ at place 0"),
    (None, {"settings": {"TTT_BATCH_SIZE": "1", "TTT_ENABLED": "0"}}, "differ at place 0")])
def test_the_order_is_that_of_the_schedule(order, changes, words, check):
    """Which lengths, settings and number of processes give: nobody may choose it afterwards."""
    given = arrays()
    given["order"] = given["order"] if order is None else order
    code, out, _ = check(given, **changes)
    assert code == 1 and words in out and "1 finding(s)" in out
    code, out, _ = check(arrays(), settings={"NO_SUCH": "1"})
    assert code == 0 and "not compared: order against the schedule (settings in meta: " in out


def test_a_log_is_compared(check, tmp_path):
    given = arrays()
    (path,) = write_logs(tmp_path, (1, 1.06))
    score = {"loss": meta(given)["val_loss"], "bpb": meta(given)["val_bpb"], "tokens": 11,
             "bytes": int(given["bytes"].sum())}
    sizes = {"model": 1, "code": 1, "total": 2, "sha256": {"final_model.int6.ptz": "a" * 64}}
    with_result(path, quantized_ttt_phased=score, bytes=sizes)
    code, out, _ = check(given, path)
    assert code == 0 and f"compared with {path}" in out and "not compared" not in out
    for changes, words in (({"artifact_sha256": "b"}, "artifact_sha256: the scores are of b,"),
                           ({"program_sha256": "b"}, "program_sha256: the scores are of b,")):
        code, out, _ = check(given, path, **changes)
        assert code == 1 and words in out
    with_result(path, quantized_ttt_phased={**score, "bpb": 1.0})
    code, out, _ = check(given, path)
    assert code == 1 and "finding: val_bpb: the scores say" in out
    assert "not compared: artifact_sha256 (not in" in out


def npz(**given):
    np.savez(file := io.BytesIO(), **given)
    return file.getvalue()


@pytest.mark.parametrize(("change", "words"), [
    (lambda x: x.pop("order"), "missing: order"),
    (lambda x: x.update(order=x["order"][:5]), "arrays of one length above 0 are wanted"),
    (lambda x: x.update({k: v[:0] for k, v in x.items()}), "arrays of one length above 0"),
    (lambda x: x.update(nats=x["nats"].reshape(1, -1)), "nats is float32 of shape (1, 11)"),
    (lambda x: x.update(order=x["order"].astype(float)), "order is float64 of shape (11,)"),
    (lambda x: x.update(nats=np.array([None] * 11)), "damaged file of scores (Object arrays"),
    (lambda x: x.update(meta=np.array({"a": 1}, dtype=object)), "damaged file of scores (Object"),
    (lambda x: x.update(meta=np.array(["{}"])), "meta is <U2 of shape (1,)"),
    (lambda x: x.update(meta=np.array("{")), "meta is no JSON"),
    (lambda x: x.update(meta=np.array("[]")), "meta lacks artifact_sha256"),
    (lambda x: x.update(meta=np.array('{"world": 1}')), "meta lacks artifact_sha256, program_sha"),
    (lambda x: x.update(meta=np.array(json.dumps(meta(arrays(), val_bpb=math.nan)))),
     "val_bpb in meta is no figure: nan"),
    (lambda x: x.update(meta=np.array(json.dumps(meta(arrays(), settings=[])))), "settings in ")])
def test_damaged_contents_are_one_line(change, words, check):
    given = arrays()
    change(given)
    code, out, err = check(given if "nats" in given and len(given["nats"]) and "order" in given
                           and given["nats"].dtype != object else npz(meta=np.array("{}"), **given))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"no npz", b"\x93NUMPY", b"\x80\x04N.",
                                  npz(**arrays())[:200]])
def test_damaged_files_are_one_line(data, check, tmp_path):
    code, out, err = check(data)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "scores.npz: " in err


def test_other_files_are_one_line(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", np.arange(3))
    for path, words in ((tmp_path / "a.npy", "one array"), (tmp_path, "no such file"),
                        (tmp_path / "none.npz", "no such file; run the evaluation with SCORES_")):
        monkeypatch.setattr(sys, "argv", ["submission.py", "--scores", str(path)])
        assert s.main() == 2 and words in capsys.readouterr().err
