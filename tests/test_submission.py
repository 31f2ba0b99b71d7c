"""submission.py: nothing that a log does not say, one configuration, statistics by hand."""

import base64
import json
import lzma
import math
import re
import statistics
import sys

import pytest

import submission as s
from tests.tools import ROOT
from train_gpt import NOT_OF_A_RUN, SETTINGS, Config

LOG = """program: train_gpt.py sha256:abc
Hyperparameters:
  seed: {seed}
  model_dim: 512
not the default: {{"SEED": "{seed}", "MATRIX_LR": "{lr}", "RUN_ID": "r{seed}"}}
python 3.11.7, torch 2.13.0, numpy 2.4.6
devices: 8 x NVIDIA H100, torch.bfloat16; attention: using fa4
training stopped: train_time: 599512ms step: 4931/20000
diagnostic pre-quantization post-ema val_loss:2.32863 val_bpb:1.0640 eval_time:9000ms
Code size: 27000 bytes
Serialized model quantized+pergroup: 15870000 bytes
Total submission size quantized+pergroup: 15897000 bytes
diagnostic quantized val_loss:2.34723 val_bpb:1.0725 eval_time:9000ms
quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb} eval_time:450000ms
total_eval_time:480.5s
"""


RATIO = math.log(2) * 151_074_309 / 47_853_343  # nats a token of one bit a byte


def write_logs(folder, *runs, lr="0.03"):
    paths = []
    for seed, bpb in runs:
        paths.append(folder / f"{seed}.txt")
        paths[-1].write_text(LOG.format(seed=seed, bpb=bpb, lr=lr, loss=bpb * RATIO))
    return paths


def test_figures_and_statistics(tmp_path):
    got = s.build(write_logs(tmp_path, (42, 1.0611), (0, 1.0620), (1234, 1.0602)))
    values = [1.0611, 1.0620, 1.0602]
    assert got["summary"]["val_bpb_mean"] == statistics.mean(values)
    assert got["summary"]["val_bpb_std"] == statistics.stdev(values)
    assert got["settings_not_default"] == {"MATRIX_LR": "0.03"}
    run = got["seeds"][0]
    assert run["hardware"] == "8 x NVIDIA H100" and run["steps"] == 4931
    assert run["bytes_total"] == run["bytes_model"] + run["bytes_code"] == 15897000
    assert "| 42 | 1.06400 | 1.07250 | 1.06110 | 15,897,000 | 599.5 | 480.5 |" in s.table(got)


def test_what_a_log_lacks_is_null(tmp_path):
    (path,) = write_logs(tmp_path, (1, 1.06))
    path.write_text("\n".join(path.read_text().splitlines()[:8]) + "\n")
    with pytest.raises(s.UserError, match="missing: .*val_bpb, bytes_total, total_eval_time_s"):
        s.build([path])
    got = s.build([path], draft=True)
    assert got["seeds"][0]["val_bpb"] is None and "val_bpb_mean" not in got["summary"]
    assert "| 1 | - | - | - | - | 599.5 | - |" in s.table(got)


def test_mixed_configurations_and_seeds_twice_are_refused(tmp_path):
    one = write_logs(tmp_path, (1, 1.06))
    (tmp_path / "b").mkdir()
    with pytest.raises(s.UserError, match="other MATRIX_LR than"):
        s.build(one + write_logs(tmp_path / "b", (2, 1.06), lr="0.04"))
    with pytest.raises(s.UserError, match="same seed"):
        s.build(one + write_logs(tmp_path / "b", (1, 1.07)))


@pytest.mark.parametrize("content", [None, "no log", "\0\xff"])
def test_other_files_are_one_line(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "x.txt"
    if content:
        path.write_bytes(content.encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["submission.py", str(path)])
    assert s.main() == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "submission.json").exists()


def test_files_are_written_and_the_readme_filled(tmp_path, monkeypatch, capsys):
    logs = write_logs(tmp_path, (1, 1.06), (2, 1.07))
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- results -->\nold\n<!-- /results -->\nend\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["submission.py", "--readme", "README.md", *map(str, logs)])
    assert s.main() == 0
    assert json.loads((tmp_path / "submission.json").read_text())["summary"]["runs"] == 2
    text = readme.read_text()
    assert "old" not in text and "| 2 | 1.06400" in text and text.endswith("end\n")
    assert "(std 0.00707, n = 2)" in text
    assert "written: submission.json\nwritten: README.md\n" in capsys.readouterr().out


# ---- where it is written

def command(monkeypatch, capsys, *words):
    """(exit code, output, errors) of the command line."""
    monkeypatch.setattr(sys, "argv", ["submission.py", *map(str, words)])
    code = s.main()
    return code, *capsys.readouterr()


def test_the_default_is_the_folder_of_the_logs(tmp_path, monkeypatch, capsys):
    """What runs/PRESET/ holds; whatever the current folder, nothing else is touched."""
    logs = []
    for seed, bpb in ((1, 1.06), (2, 1.07)):
        (tmp_path / "runs" / f"seed{seed}").mkdir(parents=True)
        logs += write_logs(tmp_path / "runs" / f"seed{seed}", (seed, bpb))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "submission.json").write_text("{}")
    code, out, _ = command(monkeypatch, capsys, *logs)
    assert code == 0 and "written: runs/submission.json\n" in out
    assert command(monkeypatch, capsys, "--draft", *logs)[0] == 0  # ours may be written again
    place = tmp_path / "a" / "b.json"
    assert f"written: {place}\n" in command(monkeypatch, capsys, "--out", place, *logs)[1]
    assert json.loads(place.read_text())["summary"]["runs"] == 2
    assert (tmp_path / "submission.json").read_text() == "{}"


@pytest.mark.parametrize("there", ["{}", "[]", "no JSON", '{"val_bpb": 1.06}'])
@pytest.mark.parametrize("draft", [(), ("--draft",)])
def test_a_file_that_is_not_ours_is_replaced_only_by_name(there, draft, tmp_path, monkeypatch,
                                                          capsys):
    logs, place = write_logs(tmp_path, (1, 1.06)), tmp_path / "submission.json"
    place.write_text(there)
    code, out, err = command(monkeypatch, capsys, *draft, *logs)
    assert code == 2 and out == "" and "name a file with --out" in err
    assert place.read_text() == there
    assert command(monkeypatch, capsys, "--out", place, *logs)[0] == 0
    assert place.read_text() != there


def test_the_repositorys_own_file_is_replaced_only_by_name(tmp_path, monkeypatch, capsys):
    logs, place = write_logs(tmp_path, (1, 1.06)), tmp_path / "submission.json"
    place.write_text(json.dumps(s.build(logs)))
    monkeypatch.setattr(s, "__file__", str(tmp_path / "submission.py"))
    code, _, err = command(monkeypatch, capsys, "--draft", *logs)
    assert code == 2 and "is not replaced unasked" in err


# ---- the JSON line, comparisons, other people's records

def with_result(path, **changes):
    """The log at `path` with a last line that says what its text says, and `changes`."""
    run, _ = s.read_log(path)
    told = {"seed": run["seed"], "training": {"steps": 4931, "seconds": 590.0},
            "calibration_seconds": 5.0, "start_seconds": 12.0, "evaluation_seconds": 480.5,
            "quantized_ttt_phased": {"loss": run["val_loss"], "bpb": run["val_bpb"],
                                     "tokens": 47_853_343, "bytes": 151_074_309},
            "bytes": {"model": 15870000, "code": 27000, "total": 15897000}, **changes}
    text = path.read_text().replace("599512ms", "590000ms")
    path.write_text(text + json.dumps({"result": told}) + "\n")
    return path


def test_the_last_line_is_trusted_over_text(tmp_path):
    (path,) = write_logs(tmp_path, (1, 1.06))
    got = s.build([with_result(path)])["seeds"][0]
    assert got["calibration_s"] == 5.0 and got["val_bytes"] == 151_074_309
    assert got["findings"] == []


@pytest.mark.parametrize(("changes", "words"), [
    ({"calibration_seconds": 15.0}, "training 590.0 s and calibration 15.0 s are over 600 s"),
    ({"evaluation_seconds": 595.0}, "total_eval_time_s: the text says 480.5"),
    ({"resumed": 1}, "resumed 1 time"), ({"legality": ["causality: x"]}, "legality: causality: x"),
    ({"bytes": {"model": 1, "code": 27000, "total": 15897000}}, "bytes_model: the text says"),
])
def test_what_the_last_line_rules_out(tmp_path, changes, words):
    (path,) = write_logs(tmp_path, (1, 1.06))
    with_result(path, **changes)
    with pytest.raises(s.UserError, match=re.escape(words)):
        s.build([path])
    assert any(words in line for line in s.build([path], draft=True)["findings"])


@pytest.mark.parametrize(("line", "words"), [
    ("graphs recorded in the clock: 3", "graphs recorded in the clock: 3"),
    ("graphs recorded in the clock: 0", None),
    ("warning: training and calibration took 1.2s more than MAX_WALLCLOCK_SECONDS=600",
     "the program warns: warning: training and calibration took 1.2s more"),
    ("calibration took longer than reserved: 7.1s of 6.2s", "took longer than reserved: 7.1s")])
def test_what_went_on_in_the_clock(tmp_path, line, words):
    (path,) = write_logs(tmp_path, (1, 1.06))
    path.write_text(f"{path.read_text()}{line}\n")
    found = s.build([path], draft=True)["findings"]
    assert len(found) == bool(words) and all(words in x for x in found)


def test_two_runs_in_one_log_are_refused(tmp_path):
    (path,) = write_logs(tmp_path, (1, 1.06))
    path.write_text(path.read_text() * 2)
    with pytest.raises(s.UserError, match="two runs in one log"):
        s.build([path])
    assert "two runs in one log" in s.build([path], draft=True)["findings"][0]


def test_a_cut_last_line_is_found(tmp_path):
    (path,) = write_logs(tmp_path, (1, 1.06))
    with_result(path)
    path.write_text(path.read_text()[:-20])
    assert "the last line, which holds the figures, is cut" in s.build([path], True)["findings"][0]


def test_a_cut_source_is_a_line(tmp_path, monkeypatch, capsys):
    """A viewer that cuts long lines, or a full disk."""
    (path,) = write_logs(tmp_path, (1, 1.06))
    whole = base64.b85encode(lzma.compress(b"print(1)\n" * 99)).decode()
    for source, words in (("{Wp48S^xk9=GL@E0stWa8~^|S5YJf", "cut"), (whole[:-8], "cut"),
                          ("Ab" * 30, "damaged")):
        path.write_text(f"source: {source}\n" + LOG.format(seed=1, bpb=1.06, lr=1,
                                                           loss=1.06 * RATIO))
        code, out, err = command(monkeypatch, capsys, "--source", path)
        assert (code, out) == (2, "") and f"the source in the log is {words}" in err
        assert any(words in line for line in s.build([path], draft=True)["findings"])
        with pytest.raises(s.UserError, match=words):
            s.build([path])


def test_the_preset_is_shown(tmp_path):
    (path,) = write_logs(tmp_path, (1, 1.06))
    assert "Preset" not in s.table(s.build([path]))
    path.write_text("preset: pr1855\n" + path.read_text())
    assert s.table(s.build([path])).endswith("\nPreset: pr1855.")
    (tmp_path / "b").mkdir()
    (other,) = write_logs(tmp_path / "b", (2, 1.06))
    assert s.build([with_result(other, preset="best")])["seeds"][0]["preset"] == "best"


def test_another_program_is_refused(tmp_path):
    (path,), program = write_logs(tmp_path, (1, 1.06)), tmp_path / "train_gpt.py"
    program.write_text("pass\n")
    with pytest.raises(s.UserError, match="written by another program"):
        s.build([path], program=program)


def test_what_is_not_of_a_run_is_not_of_a_submission():
    assert NOT_OF_A_RUN <= s.FREE  # submission.py needs no torch, so it says them again


def test_every_default_is_read_off_the_source():
    found = s.defaults_of((ROOT / "train_gpt.py").read_text())
    assert found.keys() == {name.lower() for name in SETTINGS}
    assert all(s.alike(found[name], str(value)) for name, value in vars(Config()).items())


def test_comparison_by_hand(tmp_path):
    (tmp_path / "b").mkdir()
    ours = write_logs(tmp_path, (1, 1.0600), (2, 1.0610), (3, 1.0605))
    theirs = write_logs(tmp_path / "b", (1, 1.0700), (2, 1.0690), (3, 1.0710))
    got = s.compare(ours, theirs)
    a, b = ([x * RATIO for x in v] for v in ((1.06, 1.061, 1.0605), (1.07, 1.069, 1.071)))
    spread = [statistics.variance(v) / 3 for v in (a, b)]
    t_value = (statistics.mean(a) - statistics.mean(b)) / math.sqrt(sum(spread))
    freedom = sum(spread) ** 2 / sum(x * x / 2 for x in spread)
    from scipy.stats import t as student

    assert math.isclose(got["welch_p"], student.cdf(t_value, freedom), rel_tol=1e-4)
    assert math.isclose(got["nats"], 0.0095 * RATIO, rel_tol=1e-5)
    assert got["meets_0.005_nats"] and got["meets_p_0.01"]
    assert "0.005 nats: met" in s.verdict(got)
    assert s.compare(ours[:1], theirs)["welch_p"] is None
    path = theirs[0]
    path.write_text(path.read_text().replace("val_bpb:1.07 ", "val_bpb:1.08 "))
    with pytest.raises(s.UserError, match="another validation set or tokenizer"):
        s.compare(ours, theirs)


# ---- baselines

@pytest.fixture
def pair(tmp_path):
    """(our logs, a baseline's logs, its submission.json)."""
    (tmp_path / "b").mkdir()
    ours = write_logs(tmp_path, (1, 1.0600), (2, 1.0610))
    theirs = write_logs(tmp_path / "b", (1, 1.0700), (2, 1.0690), lr="0.02")
    path = tmp_path / "base.json"
    path.write_text(json.dumps(s.build(theirs)))
    return ours, theirs, path


def test_the_order_of_arguments(pair, tmp_path, monkeypatch, capsys):
    """--baseline takes no log that is ours, wherever it stands."""
    (a, b), theirs, base = pair
    out = ("--out", tmp_path / "out.json")
    for words in (("--baseline", base, a, b), (a, b, "--baseline", base),
                  (a, "--baseline", base, b), ("--baseline", base, "--draft", a, b)):
        code, text, err = command(monkeypatch, capsys, *out, *words)
        assert code == 0 and "(n = 2, 2)" in text, err
    assert "(n = 1, 1)" in command(monkeypatch, capsys, *out, "--baseline", theirs[0], b)[1]
    assert "(n = 1, 2)" in command(monkeypatch, capsys, *out, b, "--baseline", *theirs)[1]


@pytest.mark.parametrize("told", [
    "", "[]", "3", "{}", '{"seed_results": {}}', '{"seed_results": {"42": {"val_loss": NaN}}}',
    '{"seed_results": {"42": {"val_loss": 0, "val_bpb": 0}}}', '{"seed_results": {"42": 1.06}}',
    '{"seeds": [{"seed": 1, "val_loss": "x", "val_bpb": []}]}', '{"val_bpb": 1.06}'])
def test_a_baseline_without_figures_is_one_line(told, tmp_path, pair, monkeypatch, capsys):
    path = tmp_path / "empty.json"
    path.write_text(told)
    for words in ((*pair[0], "--baseline", path), ("--baseline", path, *pair[0])):
        code, out, err = command(monkeypatch, capsys, "--draft", *words)
        assert (code, out) == (2, "") and err.startswith(f"error: {path}: ")
        assert err.count("\n") == 1


def test_a_baseline_of_the_same_runs_is_refused(pair, tmp_path, monkeypatch, capsys):
    ours, theirs, base = pair
    for words in (("--baseline", base, *theirs), ("--baseline", theirs[1], *theirs)):
        code, _, err = command(monkeypatch, capsys, *words)
        assert code == 2 and "is also among the logs; a baseline is of other runs" in err


def test_the_stages_that_both_have_are_compared(pair):
    """PREQUANT_ONLY=1 ends after the first stage."""
    ours, theirs, _ = pair
    for path in theirs:
        text = path.read_text().replace("val_loss:2.32863 val_bpb:1.0640",
                                        "val_loss:2.33300 val_bpb:1.0660")
        path.write_text(text[:text.index("Code size")])
    got = s.compare(ours, theirs)
    assert got["stage"] == "prequant_val" and list(got["stages"]) == ["prequant_val"]
    assert math.isclose(got["bpb"], 0.002, abs_tol=1e-9) and got["welch_p"] is None
    assert "gain over the baseline (before quantisation): +0.00437 nats" in s.verdict(got)


def test_the_settings_that_differ_are_named(pair):
    ours, theirs, base = pair
    for path in theirs:
        path.write_text(path.read_text().replace("model_dim: 512", "model_dim: 384"))
    got = s.compare(ours, theirs)
    assert got["settings_differ"] == {"MODEL_DIM": ["512", "384"]}
    assert "settings that differ: MODEL_DIM 512 (baseline 384)" in s.verdict(got)
    assert s.compare(ours, [base])["settings_differ"] == {"MATRIX_LR": ["0.03", "0.02"]}
    base.write_text(json.dumps({"seed_results": json.loads(base.read_text())["seeds"]}))
    assert "not compared: settings" in s.verdict(s.compare(ours, [base]))


# Figures of #1855's submission.json; its logs' lines, in their form.
RECORD = {42: (2.31944212, 1.05989454, 15897259, 4945, 508.8),
          0: (2.32239991, 1.06124613, 15900947, 4932, 455.1),
          1234: (2.32423994, 1.06208695, 15907550, 4917, 470.0)}
FOREIGN = """Hyperparameters:
  adam_eps: 1e-08
  artifact_dir: runs/{seed}
  run_id: seed{seed}
  seed: {seed}
  ttt_lora_rank: {rank}
train_shards: 80
val_tokens: 47851520
stopping_early: wallclock_cap train_time: {train_ms}ms step: {steps}/20000
diagnostic pre-quantization post-ema val_loss:2.32863000 val_bpb:1.06400000 eval_time:7476ms
GPTQ:collected 67 Hessians in {hessians}s
Serialized model quantized+pergroup: 15868000 bytes
Total submission size quantized+pergroup: {size} bytes
diagnostic quantized val_loss:2.34723000 val_bpb:1.07250000 eval_time:8000ms
{more}quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{eval_ms:.0f}ms
total_eval_time:{seconds:.1f}s
"""


def foreign(folder, record, more="", **changes):
    """Logs in #1855's form."""
    paths = []
    for seed, (loss, bpb, size, steps, seconds) in record.items():
        paths.append(folder / f"train_seed{seed}.log")
        given = dict(seed=seed, loss=loss, bpb=bpb, size=size, steps=steps, seconds=seconds,
                     eval_ms=1000 * seconds, train_ms=599_512, hessians="4.9", rank=80, more=more)
        paths[-1].write_text(FOREIGN.format(**{**given, **changes}))
    return paths


def claim(folder, record, **changes):
    path = folder / "submission.json"
    seeds = {str(seed): {"val_loss": loss, "val_bpb": bpb, "artifact_bytes": size, "steps": steps,
                         "eval_time_s": seconds}
             for seed, (loss, bpb, size, steps, seconds) in record.items()}
    path.write_text(json.dumps({"track": "10min_16mb", "val_loss": 2.32202732,
                                "val_bpb": 1.06107587, "val_loss_std": 0.00198,
                                "val_bpb_std": 0.00090, "seed_results": seeds, **changes}))
    return path


def test_the_record_1855_is_reproduced(tmp_path, monkeypatch, capsys):
    """1.06108 and 0.00090, which is the deviation divided by n; and its calibration is over."""
    logs = foreign(tmp_path, RECORD)
    monkeypatch.setattr(sys, "argv", ["submission.py", "--audit", str(claim(tmp_path, RECORD)),
                                      *map(str, logs)])
    assert s.main() == 1
    out = capsys.readouterr().out
    assert "mean 1.06108, sample std 0.00111 (divided by n: 0.00090), n = 3" in out
    findings = [line for line in out.splitlines() if line.startswith("finding: ")]
    assert len(findings) == 3
    assert all("training 599.5 s and calibration 4.9 s are over 600 s" in x for x in findings)


def test_the_record_2118_is_found_out(tmp_path):
    """1.04350 is claimed, the logs say 1.05770; an evaluation of 605.5 s; illegal gates."""
    ratio = 2.32202732 / 1.06107587
    record = {seed: (bpb * ratio, bpb, 15_950_000, 4900, seconds) for seed, bpb, seconds in
              ((42, 1.05700, 605.5), (1234, 1.05790, 577.7), (314, 1.05820, 570.0))}
    gates = ("ngram_tilt:hints total=47851520 gated=10494977 token_gate=628130 "
             "within_gate=9866847 word_gate=2891588 agree2plus=290291\n")
    logs = foreign(tmp_path, record, more=gates, train_ms=595_000)
    found = s.audit(claim(tmp_path, {}, val_bpb=1.04350, val_loss=2.2836), logs)
    assert "val_bpb 1.04350 is not in the logs: their mean is 1.05770" in found
    assert any("evaluation 605.5 s from the process's start is over 600 s" in x for x in found)
    assert sum("illegal gates: within_gate=9866847" in x for x in found) == 3


def test_weights_of_another_run_are_no_start_from_scratch(tmp_path):
    """INIT_FROM: that run's training is in no clock of this log."""
    (path,) = write_logs(tmp_path, (42, 1.06))
    assert not any("INIT_FROM" in line for line in s.read_log(path)[0]["findings"])
    for given, found in (("", False), ("runs/a/final_model.pt", True)):
        changed = path.with_name(f"log{found}.txt")
        changed.write_text(path.read_text().replace(
            "  model_dim: 512\n", f"  model_dim: 512\n  init_from: {given}\n"))
        told = [line for line in s.read_log(changed)[0]["findings"] if "INIT_FROM" in line]
        assert bool(told) == found
        if found:
            assert told[0].startswith("INIT_FROM=runs/a/final_model.pt: training began with")
            with pytest.raises(s.UserError, match="INIT_FROM"):
                s.build([changed])


def test_a_preset_gets_the_means_of_the_logs(tmp_path, monkeypatch, capsys):
    """--preset writes what report.py reads; cpu_demo's figures are those of its logs."""
    report = pytest.importorskip("report")
    preset = tmp_path / "cpu_demo.env"
    text = (ROOT / "presets/cpu_demo.env").read_text()
    preset.write_text(re.sub(r"^# Expected: .*\n(?:#  +.*\n)*", "# Expected: -\n#   more\n", text,
                             flags=re.MULTILINE))
    logs = [str(path) for path in sorted((ROOT / "logs").glob("cpu_demo_seed*.txt"))]
    monkeypatch.setattr(s.sys, "argv", ["submission.py", "--draft", "--out",
                                        str(tmp_path / "o.json"), "--preset", str(preset), *logs])
    assert s.main() == 0, capsys.readouterr().err
    assert preset.read_text() == text
    told = report.expected_of("cpu_demo")
    means = json.loads((tmp_path / "o.json").read_text())["summary"]
    for name in ("prequant_val_bpb", "quantized_val_bpb", "val_bpb"):
        assert re.search(report.EXPECTED[name][0], told)[1] == f"{means[f'{name}_mean']:.5f}"
    preset.write_text("SEED=1\n")
    assert s.main() == 2 and "# Expected: is missing" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    """Of every program with a command line of its own."""
    import lossless_caps
    import prepare_caseops_data

    def interrupt(*_):
        raise KeyboardInterrupt
    for module, name in ((s, "run"), (lossless_caps, "_run"), (prepare_caseops_data, "run")):
        monkeypatch.setattr(module, name, interrupt)
    monkeypatch.setattr(s.sys, "argv", ["submission.py", "x"])
    for main in (s.main, lambda: lossless_caps.main(["check"]),
                 lambda: prepare_caseops_data.main(["--audit", "x"])):
        code, (out, err) = main(), capsys.readouterr()
        assert (code, out) == (130, "") and err.startswith("interrupted") and err.count("\n") == 1
