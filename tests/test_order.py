"""SCORES_PATH: what was scored when; and that a score reads only what stands before it, on one and
on two processes."""

import json
import math
import re

import numpy as np
import pytest

import legality
import train_gpt as t
from tests.tools import NO_GPU, TINY, byte_counts, launch, val_set, write_data, write_shard

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SETTINGS = {**TINY, **NO_GPU, "NGRAM_TILT_ENABLED": 1, "TOKEN_ORDER": 5, "TTT_BATCH_SIZE": 2,
            "TTT_STREAM": 1, "ITERATIONS": 30}


def with_val(folder, ids):
    """A data folder with these validation ids."""
    write_data(folder)
    write_shard(folder / "fineweb_val_000000.bin", ids)
    write_shard(folder / "fineweb_val_bytes_000000.bin", byte_counts(ids))
    return folder


def scores(path):
    """(arrays by name, meta) of a file of scores."""
    with np.load(path, allow_pickle=False) as found:
        arrays = dict(found)
    return arrays, json.loads(str(arrays.pop("meta")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(settings, validation ids, log, scores) of a whole run whose documents stand twice in the
    stream, once short and once long."""
    folder = tmp_path_factory.mktemp("scores")
    ids = legality.with_copies(val_set([26, 9, 30, 41, 22])).ids
    settings = {**SETTINGS, "DATA_PATH": with_val(folder / "data", ids), "RUN_ID": "log",
                "ARTIFACT_DIR": folder / "out", "SCORES_PATH": folder / "scores.npz"}
    run = launch(settings, folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return settings, ids, run.stdout, scores(folder / "scores.npz")


def test_the_file_is_the_score(trained):
    settings, ids, log, (arrays, meta) = trained
    kinds = {name: str(x.dtype) for name, x in arrays.items()}
    assert kinds == {"nats": "float32", "bytes": "int32", "document": "int32", "order": "int64"}
    n = len(ids) - 1
    assert {len(x) for x in arrays.values()} == {n} and meta["tokens"] == n
    nats, size = arrays["nats"].sum(dtype=np.float64), int(arrays["bytes"].sum())
    assert size == meta["bytes"] == byte_counts(ids)[1:].sum()
    told = re.search(r"^quantized_ttt_phased val_loss:(\S+) val_bpb:(\S+)", log, re.MULTILINE)
    assert math.isclose(nats / n, float(told[1]), rel_tol=1e-6) and nats > 0
    assert math.isclose(nats / math.log(2) / size, float(told[2]), rel_tol=1e-6)
    assert math.isclose(meta["val_bpb"], float(told[2]), rel_tol=1e-7)
    saved = (settings["ARTIFACT_DIR"] / "log.txt").read_text()
    result = json.loads(saved.splitlines()[-1])["result"]
    assert meta["artifact_sha256"] == result["bytes"]["sha256"][t.ARTIFACT_FILE]
    assert meta["program_sha256"] == result["program_sha256"] and meta["world"] == 1
    assert meta["data"] in log and meta["settings"]["TOKEN_ORDER"] == "5"
    assert "SCORES_PATH" not in (settings["ARTIFACT_DIR"] / t.PROGRAM_FILE).read_text("latin-1")


def test_the_order_goes_by_round_batch_document_and_position(trained):
    settings, ids, _, (arrays, _) = trained
    starts = np.flatnonzero(ids == t.BOS)
    np.testing.assert_array_equal(arrays["document"], np.cumsum(ids == t.BOS)[:-1] - 1)
    assert sorted(arrays["order"]) == list(range(len(ids) - 1))
    lengths = np.diff(np.r_[starts, len(ids) - 1])
    ranked = sorted(range(len(starts)), key=lambda d: (lengths[d], d))  # 10 documents, in twos
    batches = [ranked[i:i + 2] for i in range(0, 10, 2)]
    want = np.concatenate([np.flatnonzero(arrays["document"] == d)
                           for batch in reversed(batches) for d in batch])
    np.testing.assert_array_equal(np.argsort(arrays["order"]), want)


@pytest.mark.dist
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one", "two"])
def test_scores_before_a_changed_token_are_the_same_bits(trained, tmp_path, launcher):
    """The last token of a short document early in the stream, and of a long one late in it."""
    settings, ids, _, _ = trained
    texts = [i for i in range(1, len(ids)) if ids[i] != t.BOS and (
        i + 1 == len(ids) or ids[i + 1] == t.BOS)]  # the last token of each document
    found = []
    for n, index in enumerate((None, texts[0], texts[-2])):
        new = ids.copy()
        if index:
            new[index] = 2 + (new[index] + 5) % 60
        run = launch({**settings, "TTT_EVAL_ONLY": 1, "RUN_ID": f"again{n}-{len(launcher)}",
                      "DATA_PATH": with_val(tmp_path / f"data{n}", new),
                      "SCORES_PATH": tmp_path / f"{n}.npz"}, tmp_path, launcher=launcher)
        assert run.returncode == 0, run.stderr[-3000:]
        arrays, meta = scores(tmp_path / f"{n}.npz")
        found.append(arrays)
        assert meta["world"] == (2 if launcher else 1)
        np.testing.assert_array_equal(arrays["order"], found[0]["order"])
        if index:
            early = arrays["order"] < arrays["order"][index - 1]
            assert 0 < early.sum() < len(early)
            np.testing.assert_array_equal(arrays["nats"][early], found[0]["nats"][early])
            assert (arrays["nats"] != found[0]["nats"]).any()


@pytest.mark.dist
def test_the_audit_asks_for_one_order_of_all_ranks(trained, tmp_path):
    settings, _, _, _ = trained
    driver = tmp_path / "audit.py"
    driver.write_text(f"import sys; sys.path.insert(0, {str(legality.__file__)[:-11]!r})\n"
                      "import train_gpt as t\nsys.argv = ['train_gpt.py', 'audit']\n"
                      "make = t.make_schedule\n"
                      "if 'planted' in t.os.environ:\n"
                      "    t.Schedule.stream = lambda self, ids: t.np.append(ids, t.BOS)\n"
                      "sys.exit(t.main())\n")
    settings = {**settings, "SCORES_PATH": "", "TOKEN_ORDER": 5}
    run = launch({**settings, "RUN_ID": "audit"}, tmp_path, driver, TORCHRUN)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "legality: one order (ttt): holds" in run.stdout
    run = launch({**settings, "RUN_ID": "audit2", "planted": 1}, tmp_path, driver, TORCHRUN)
    assert run.returncode != 0 and "error: illegal: one order (ttt): changing target" in run.stderr


def test_plain_scores_stand_in_the_streams_order(program, tmp_path):
    path = tmp_path / "plain.npz"
    code, out, err = program(TTT_ENABLED=0, SCORES_PATH=path)
    assert code == 0, err
    arrays, meta = scores(path)
    np.testing.assert_array_equal(arrays["order"], np.arange(len(arrays["nats"])))
    told = re.search(r"^diagnostic quantized val_loss:\S+ val_bpb:(\S+)", out, re.MULTILINE)
    bpb = arrays["nats"].sum(dtype=np.float64) / math.log(2) / arrays["bytes"].sum()
    assert math.isclose(bpb, float(told[1]), rel_tol=1e-6)
    assert math.isclose(bpb, meta["val_bpb"], rel_tol=1e-6)


@pytest.mark.parametrize("settings, words", [
    ({"SCORES_PATH": "scores.txt"}, "must be a FILE.npz"),
    ({"SCORES_PATH": "none/such/scores.npz"}, "in a folder that exists"),
    ({"SCORES_FILE": "scores.npz"}, "SCORES_FILE: no such setting")])
def test_mistakes_are_said_before_anything_runs(program, settings, words):
    code, _, err = program(**settings)
    assert code == 2 and words in err and err.count("\n") == 1
