"""Whatever a public file holds, submission.py ends in a code and says it in lines: no traceback."""

import contextlib
import io
import json
import random
import sys

import numpy as np
import pytest

import submission as s
from tests.test_submission import RECORD, claim, foreign, with_result, write_logs

ODD = [None, True, [], {}, "", "NaN", "1e999", float("nan"), float("inf"), -1, 0, 10 ** 400, 1e-320,
       "1.06 (mean)", "\ud800", {"42": {"val_bpb": "x"}}, [[1.06]], [{"seed": [1]}], {"mean": {}},
       "9" * 5000, {"": None}, [1.0611, 1.062, "1.0602"], {"42": [1, 2]}, "1,061.5", -0.0]
LINES = ['{"result": []}', '{"result": {"bytes": "x"}}', '{"result": {"training": [1]}}', "seed: 7",
         '{"result": {"quantized_ttt_phased": {"loss": null, "bpb": NaN}}}', "source: {Wp48",
         '{"result": {"bytes": {"model": 1, "code": 2, "total": 3, "sha256": {"../x": 3}}}}',
         "not the default: [1]", "not the default: {", "quantized_ttt_phased val_loss:x val_bpb:y",
         "quantized_ttt_phased val_loss:0 val_bpb:0 eval_time:1ms", "val_tokens: 0",
         "val_tokens: " + "9" * 5000, "total_eval_time:nans", "graphs recorded in the clock: 2",
         "diagnostic quantized val_loss:-1 val_bpb:inf", "within_gate=1 word_gate=" + "9" * 4999,
         'data: x "val": {"original_bytes": 0}', "program: x sha256:abc", "\x1b[2J\0", "[" * 99_999,
         '{"result": ' + "[" * 99_999 + "}", "Hyperparameters:", "preset: \ud83d"]


def mutated(rng, value):
    """A JSON value with one thing in it replaced, lost or renamed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    keys = list(value if isinstance(value, dict) else range(len(value)))
    key = rng.choice(keys)
    value = value.copy()
    if rng.random() < 0.2:
        del value[key]
    elif isinstance(value, dict) and rng.random() < 0.3:
        name = rng.choice(["seeds", "seed_results", "val_bpb", "mean_val_bpb", "summary", "results",
                           "eval_time_ms", "seed_7", "std", "artifact_bytes", "42", "\n\x1b[31m"])
        value[name] = value.pop(key)
    else:
        value[key] = mutated(rng, value[key])
    return value


def damaged(rng, data: bytes) -> bytes:
    """A file with lines swapped for odd ones, bytes changed, cut, or in another encoding."""
    lines = data.decode(errors="replace").split("\n")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines) + 1)
        lines[at:at + rng.randrange(3)] = rng.choices(LINES, k=rng.randrange(3))
    data = "\n".join(lines).encode("utf-8", errors="surrogatepass")
    kind = rng.randrange(6)
    if kind == 0:
        data = data[:rng.randrange(len(data) + 1)]
    elif kind == 1:
        data = data.decode(errors="replace").encode("utf-16")[:rng.randrange(2 * len(data) + 2)]
    elif kind == 2:
        spoilt = bytearray(data)
        for _ in range(20 if spoilt else 0):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        data = bytes(spoilt)
    return data


def call(monkeypatch, *words):
    """(exit code, output) of the command line; anything raised fails the test."""
    monkeypatch.setattr(sys, "argv", ["submission.py", *map(str, words)])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = s.main()
    assert code in (0, 1, 2) and err.getvalue().count("\n") == (code == 2), err.getvalue()
    assert "Traceback" not in err.getvalue() and "\x1b" not in out.getvalue() + err.getvalue()
    return code, out.getvalue()


@pytest.mark.parametrize("seed", range(4))
def test_no_claim_and_no_log_ends_in_a_traceback(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    (tmp_path / "b").mkdir()
    ours = [with_result(path) for path in write_logs(tmp_path / "b", (42, 1.0611), (0, 1.062))]
    theirs = foreign(tmp_path, RECORD)
    said = json.loads(claim(tmp_path, RECORD).read_text())
    built = s.build(ours, draft=True)
    out, wrong = tmp_path / "out.json", tmp_path / "wrong.log"
    for number in range(60):
        given = said if number % 2 else built
        for _ in range(rng.randrange(3)):
            given = mutated(rng, given)
        target = tmp_path / "claim.json"
        target.write_bytes(json.dumps(given).encode())
        if rng.random() < 0.2:
            target.write_bytes(damaged(rng, target.read_bytes()))
        logs = list(rng.choice([ours, theirs]))
        if rng.random() < 0.7:
            wrong.write_bytes(damaged(rng, rng.choice(logs).read_bytes()))
            logs[0] = wrong
        call(monkeypatch, "--audit", target, *logs)
        call(monkeypatch, "--draft", "--out", out, "--baseline", target, *logs)
        call(monkeypatch, "--draft", "--out", out, *logs, "--baseline", rng.choice(ours + theirs))
        call(monkeypatch, "--source", logs[0])


def test_no_file_of_scores_ends_in_a_traceback(tmp_path, monkeypatch):
    rng = random.Random(1)
    whole, path = tmp_path / "whole.npz", tmp_path / "scores.npz"
    np.savez_compressed(whole, nats=np.ones(9, np.float32), bytes=np.ones(9, np.int32),
                        document=np.zeros(9, np.int32), order=np.arange(9),
                        meta=np.array(json.dumps({"artifact_sha256": "a", "world": 1})))
    data = whole.read_bytes()
    for _ in range(150):
        spoilt = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        path.write_bytes(spoilt[:rng.randrange(len(spoilt))] if rng.random() < 0.3 else spoilt)
        assert call(monkeypatch, "--scores", path)[0] == 2  # meta lacks most of what it must say
