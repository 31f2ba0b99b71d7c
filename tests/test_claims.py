"""submission.py --audit: what public files claim, in their many forms, against their logs."""

import codecs
import json
import statistics
import sys

import pytest

import claims
import submission as s
from tests.test_submission import RECORD, claim, foreign, write_logs

MEAN_BPB = statistics.mean(values[1] for values in RECORD.values())
MEAN_LOSS = statistics.mean(values[0] for values in RECORD.values())
BPB = {seed: values[1] for seed, values in RECORD.items()}


@pytest.fixture
def logs(tmp_path):
    """Three logs in #1855's form, in which nothing is wrong."""
    return foreign(tmp_path, RECORD, hessians="0.3")


@pytest.fixture
def audit(tmp_path, logs, monkeypatch, capsys):
    """audit(what the claim says, logs=...) -> (exit code, output, errors) of the command line."""
    def call(told, given=None, raw=None):
        path = tmp_path / "their.json"
        path.write_bytes(json.dumps(told).encode() if raw is None else raw)
        monkeypatch.setattr(sys, "argv", ["submission.py", "--audit", str(path),
                                          *map(str, logs if given is None else given)])
        code = s.main()
        return code, *capsys.readouterr()
    return call


def told(**more):
    return {"val_bpb": round(MEAN_BPB, 8), "val_loss": round(MEAN_LOSS, 8), **more}


# ---- what is read

@pytest.mark.parametrize("given", [
    told(), {k: str(v) for k, v in told().items()}, told(summary="one sentence about the entry"),
    {"mean_val_bpb": MEAN_BPB}, {"ttt_val_bpb": MEAN_BPB}, {"val_bpb_mean": MEAN_BPB},
    {"final_bpb": MEAN_BPB}, {"bits_per_byte": MEAN_BPB}, {"quantized_ttt_val_bpb": MEAN_BPB},
    {"val_bpb": {"mean": MEAN_BPB, "std": 0.00111}}, {"metrics": {"val_bpb": MEAN_BPB}},
    {"val_bpb": f"{MEAN_BPB:.5f} (3-seed mean)"}, {"mean": {"val_bpb": MEAN_BPB},
                                                  "std": {"val_bpb": 0.00111}},
    told(seed_results=[{"seed": k, "val_bpb": v} for k, v in BPB.items()]),
    told(seed_results={str(k): v for k, v in BPB.items()}),
    told(seed_results={f"seed_{k}": {"val_bpb": v} for k, v in BPB.items()}),
    told(seed_results=list(BPB.values())), told(seeds=list(BPB), val_bpbs=list(BPB.values())),
    told(seed_42=BPB[42], seed_0={"val_bpb": BPB[0]}, seed_1234=BPB[1234]),
    told(seeds="42, 0, 1234"), told(seeds=3), told(n_seeds=3, hardware="8xH100"), told(
        logs={str(k): f"train_seed{k}.log" for k in BPB}, seed_runs={"42": 4945}),
    told(val_bpb_seed42=BPB[42], val_bpb_s0=BPB[0], steps_seed_1234=4917),
    told(pre_quant={"val_bpb": 1.064}, quantized={"val_bpb": 1.0725}),
    told(seeds=[{"seed": k, "val_bpb": v} for k, v in BPB.items()]),
    told(baseline={"val_bpb": 1.07}, comparison={"bpb": -0.01}, delta_bpb=-0.009, p_value=0.01),
    told(artifact_bytes_mean=15901919, artifact_bytes_max=15907550, bytes_total=15907550,
         train_steps_mean=4931.33, step_avg_ms_mean=121.7, artifact_bytes_std=5214,
         comparison_baseline_bpb=1.081, pre_quant_val_bpb=1.064, eval_time_s_max=508.8),
], ids=lambda given: json.dumps(given)[:60])
def test_forms_of_public_claims(given, audit):
    code, out, err = audit(given)
    assert (code, err) == (0, ""), out
    assert "\ncompared: " in out and "0 finding(s)" in out


@pytest.mark.parametrize("digits", [4, 5, 6, 8])
def test_figures_are_compared_at_the_digits_that_they_give(digits, audit):
    """#1736, #1787, #1626, #1851 round to 4 or 5 digits; one unit more is another figure."""
    seeds = {str(k): {"val_bpb": round(v, digits)} for k, v in BPB.items()}
    assert audit({"val_bpb": round(MEAN_BPB, digits), "seed_results": seeds})[0] == 0
    of_rounded = statistics.mean(round(v, digits) for v in BPB.values())
    assert audit({"val_bpb": round(of_rounded, digits)})[0] == 0
    wrong = {"42": {"val_bpb": round(BPB[42] + max(2 * 10 ** -digits, 2e-5), digits)}}
    code, out, _ = audit({"val_bpb": round(MEAN_BPB, digits), "seed_results": wrong | {
        str(k): {} for k in BPB if k != 42}})
    assert code == 1 and "finding: seed 42: val_bpb 1.0" in out and "1 finding(s)" in out
    code, out, _ = audit({"val_bpb": round(MEAN_BPB - max(2 * 10 ** -digits, 2e-5), digits)})
    assert code == 1 and "is not in the logs: their mean is 1.06108" in out


def test_too_few_digits_say_nothing(audit):
    code, out, _ = audit({"val_bpb": 1.1, "val_loss": "2.3"})
    assert code == 1 and "val_loss 2.30000 is not in the logs: their mean is 2.32203" in out


def test_what_is_not_compared_is_said(audit, logs):
    code, out, _ = audit({"val_bpb": 1.06108, "gain_nats": 0.0071, "baseline_bpb": 1.07,
                          "sliding_val_bpb": 1.065, "prior_record": {"val_bpb": 1.07},
                          "others": {"val_bpb": 1.08}, "compliance": {"three_seeds": True}})
    assert code == 0 and "compliance" not in out
    for key in ("val_loss (the claim does not give it)", "gain_nats (no figure",
                "baseline_bpb (no figure", "prior_record (no", "others (no figure",
                "sliding_val_bpb (every log lacks it)"):
        assert f"\nnot compared: {key}" in out
    logs[0].write_text(logs[0].read_text().replace("bytes\ndiagnostic quantized", "bytes\nx"))
    code, out, _ = audit({"val_bpb": 1.06108, "quantized_val_bpb": 1.0725})
    assert "not compared: quantized_val_bpb (some log lacks it)" in out
    assert "missing: quantized_val_bpb" in out and code == 1


@pytest.mark.parametrize(("raw", "words"), [
    (b"[]", "no JSON object, but a list"), (b"3", "no JSON object"), (b"", "no JSON"),
    (b'{"val_bpb": ', "no JSON"), (b"[" * 100_000, "no JSON"), (b"{}", "looked for val_bpb, mean_"),
    (b'{"name": "x"}', "no figure that is known"), (b"\xff\xfe\x00", "no JSON"),
    (b'{"val_bpb": ' + b"9" * 5000 + b"}", "no JSON")])
def test_what_cannot_be_read_is_one_line(raw, words, audit):
    code, out, err = audit(None, raw=raw)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("encode", [
    lambda text: codecs.BOM_UTF8 + text.encode(), lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-16-le"), lambda text: text.encode("utf-16-be"),
    lambda text: text.replace("\n", "\r\n").encode()],
    ids=["bom", "utf-16", "utf-16-le", "utf-16-be", "crlf"])
def test_encodings_of_other_systems(encode, audit, logs):
    """#1964 and #1993 begin with a byte-order mark, #1281 and #1065 were written by PowerShell."""
    for path in logs:
        path.write_bytes(encode(path.read_text()))
    code, out, _ = audit(None, raw=encode(json.dumps(told(), indent=1)))
    assert code == 0 and "0 finding(s)" in out


def test_older_names_of_the_lines(audit, logs):
    """#1394, #1493, #1530, #1667; without test-time training the sliding window is the score."""
    for path in logs:
        text = path.read_text().replace("quantized_ttt_phased", "quantized_ttt")
        code = "Code size (uncompressed): 131887 bytes\nCode size (compressed): 31000 bytes\n"
        path.write_text(text.replace("diagnostic ", "").replace("Serialized", f"{code}Serialized"))
    assert "0 finding(s)" not in audit(told())[1]  # 31,000 bytes of code are not the difference
    for path, (_, _, size, *_) in zip(logs, RECORD.values(), strict=True):
        path.write_text(path.read_text().replace("31000 bytes", f"{size - 15868000} bytes"))
    code, out, _ = audit(told(bytes_code=131887))
    assert (code, "0 finding(s)" in out) == (0, True), out
    for path in logs:
        text = path.read_text().replace("quantized_ttt", "quantized_sliding_window")
        path.write_text("\n".join(x for x in text.split("\n") if "total_eval" not in x))
    assert audit(told())[0] == 0


def test_a_log_of_an_unknown_kind_is_one_line(audit, logs):
    for path in logs:
        path.write_text(path.read_text().replace("diagnostic ", "final_").replace("quantized_ttt",
                                                                                  "roundtrip"))
    code, out, err = audit(told())
    assert code == 2 and out == "" and "not a log of a kind that is known" in err
    assert "quantized_ttt_phased" in err and "run_3seed" not in err


# ---- what is found

def test_one_log_three_times(audit, logs):
    code, out, _ = audit({"val_bpb": BPB[42]}, [logs[0]] * 3)
    assert code == 1 and "finding: two logs have the same seed (42)" in out


def test_a_log_with_other_settings(audit, logs):
    logs[1].write_text(logs[1].read_text().replace("ttt_lora_rank: 80", "ttt_lora_rank: 96"))
    code, out, _ = audit(told())
    assert code == 1 and "other TTT_LORA_RANK than" in out and "1 finding(s)" in out


def test_a_seed_without_a_log_and_a_log_without_a_claim(audit):
    code, out, _ = audit(told(seed_results={"42": {}, "0": {}, "7": {"val_bpb": 1.06}}))
    assert code == 1 and "finding: seed 7 is claimed, and none of the logs is of it" in out
    assert "finding: seed 1234 has a log and is not among the claimed" in out
    assert audit(told(seeds=[42, 0, 314]))[0] == 1
    assert audit(told(seeds=[42, 0, 1234]))[0] == 0


@pytest.mark.parametrize("name", ["val_bpb", "mean_val_bpb", "ttt_val_bpb", "val_bpb_std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "NaN"])
def test_a_claim_that_is_no_figure(name, value, audit):
    code, out, _ = audit({"val_bpb_mean": MEAN_BPB, name: value})
    assert code == 1 and f"finding: {name} is " in out and ": no figure" in out


def test_a_log_that_says_nan(audit, logs):
    logs[2].write_text(logs[2].read_text().replace("1.06208695", "nan"))
    code, out, _ = audit(told())
    assert code == 1 and "val_bpb is nan: no figure" in out


def test_a_log_that_holds_two_runs(audit, logs):
    for text in (logs[0].read_text() * 2, logs[0].read_text() + logs[0].read_text()[-300:]):
        first, *rest = logs
        both = first.with_name("both.log")
        both.write_text(text)
        code, out, _ = audit(told(), [both, *rest])
        assert code == 1 and "in one log; give every run a RUN_ID" in out and "1 finding(s)" in out


@pytest.mark.parametrize("name", ["ttt_val_bpb", "mean_val_bpb", "final_val_bpb", "score_bpb"])
def test_another_name_for_the_figure(name, audit):
    code, out, _ = audit({name: 1.0435})
    assert code == 1 and f"finding: {name} 1.04350 is not in the logs: their mean is 1.06108" in out


@pytest.mark.parametrize("figures", [
    {"artifact_bytes": 15_000_000}, {"bytes_total": 15_000_000}, {"eval_time_s": 400.0},
    {"train_time_ms": 500_000}, {"steps": 5000}, {"prequant_val_bpb": 1.05}])
def test_figures_of_a_seed(figures, audit):
    seeds = {str(k): {"val_bpb": v} for k, v in BPB.items()}
    seeds["42"].update(figures)
    code, out, _ = audit(told(seed_results=seeds))
    (name,) = figures
    assert code == 1 and f"finding: seed 42: {name} " in out and "1 finding(s)" in out
    code, out, _ = audit(told(**figures))
    assert code == 1 and f"finding: {name} " in out and "is not in the logs" in out


def test_a_bare_number_that_is_no_seeds(audit):
    code, out, _ = audit(told(seed_results=[BPB[42], BPB[0], 1.0500]))
    assert code == 1 and "1.05 of a seed is in none of the logs" in out and "1 finding" in out


# ---- n-gram hints: where their line stands and what the setting says, not its words

HINTS = "ngram_tilt:precompute_outside_timer_done elapsed=130.1s total_targets=47851520\n"
TIMER = "beginning TTT eval timer\n"


@pytest.mark.parametrize(("more", "setting", "guilty"), [
    (TIMER + HINTS, "False", False), (TIMER + HINTS, None, False), (HINTS + TIMER, "True", True),
    (HINTS + TIMER, None, True), (HINTS.replace("outside_timer_", "") + TIMER, None, True),
    (HINTS, "False", False), (HINTS, "True", True), (HINTS, None, True),
    (HINTS.replace("outside_timer_", ""), None, False), ("", "True", False)])
def test_hints_within_the_timer_are_legal(more, setting, guilty, tmp_path):
    rank = "80" + (f"\n  ngram_hint_precompute_outside: {setting}" if setting else "")
    logs = foreign(tmp_path, RECORD, more=more, hessians="0.3", rank=rank)
    found = s.audit(claim(tmp_path, RECORD), logs)
    assert len(found) == (3 if guilty else 0)
    assert all("evaluation work outside the timer" in line for line in found)


# ---- folders

def test_a_folder_is_audited_with_the_logs_in_it(tmp_path, logs, monkeypatch, capsys):
    claim(tmp_path, RECORD)
    (tmp_path / "requirements.txt").write_text("torch\n")
    monkeypatch.setattr(sys, "argv", ["submission.py", "--audit", str(tmp_path)])
    assert s.main() == 0
    assert f"logs: {', '.join(sorted(map(str, logs)))}\n" in capsys.readouterr().out
    for path in logs:
        path.unlink()
    assert s.main() == 2 and "no log in this folder" in capsys.readouterr().err


def test_our_own_file_is_borne_out(tmp_path):
    logs = write_logs(tmp_path, (1, 1.06), (2, 1.07), (3, 1.05))
    path = tmp_path / "submission.json"
    path.write_text(json.dumps(s.build(logs)))
    assert s.audit(path, logs) == []
    path.write_text(path.read_text().replace('"steps": 4931', '"steps": 4930', 1))
    assert s.audit(path, logs) == ["seed 1: steps 4930, the log says 4931"]


@pytest.mark.parametrize(("key", "want"), [
    ("val_bpb", ("val_bpb", "mean")), ("std.val_bpb", ("val_bpb", "std")), ("ms_per_step", None),
    ("post_ttt_bpb", ("val_bpb", "mean")), ("pre_ttt_bpb", ("quantized_val_bpb", "mean")),
    ("max_artifact_bytes", ("artifact", "max")), ("total_eval_time_s", ("eval_s", "mean")),
    ("previous_sota_val_bpb", None), ("train_loss", None), ("code_bytes", ("bytes_code", "mean"))])
def test_names_of_figures(key, want):
    name, how = claims.named(key)
    assert (name, how) == want if want else name is None
