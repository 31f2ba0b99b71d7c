"""guide.py: what a run says of its cost on a CPU, and where its files lie."""

import re
import shlex

import pytest

import guide
import prepare_caseops_data
import train_gpt as t
from tests.tools import ROOT, TINY, tiny


def said(preset, **changes) -> str:
    cfg = t.Config.from_env({"PRESET": preset, **changes}, ROOT)
    return guide.estimate(cfg, 40e9, 47_853_343 if preset != "cpu_demo" else 31_609)


def test_the_full_size_model_on_a_cpu_says_what_it_costs_and_what_to_do():
    text = said("")
    assert re.search(r"a step about \d+ hours; .*calibration about \d+ hours, scoring about \d+ "
                     "days", text), text
    assert "PRESET=cpu_demo" in text


def test_the_demo_takes_minutes():
    """Measured: 232 s of training and 43 s of scoring on a core; the estimate is rough."""
    cfg = t.Config.from_env({"PRESET": "cpu_demo"}, ROOT)
    cost = guide.costs(cfg, 40e9, 31_609)
    assert 232 / 3 < cost["training"] < 232 * 3 and 43 / 3 < cost["scoring"] < 43 * 3
    assert "PRESET=cpu_demo" not in said("cpu_demo") and "minutes" in said("cpu_demo")


@pytest.mark.parametrize(("changes", "parts"), [
    ({"TTT_EVAL_ONLY": "1"}, ["scoring"]), ({"QUANTIZE_ONLY": "1"}, ["calibration", "scoring"]),
    ({"PREQUANT_ONLY": "1"}, ["training", "scoring"]),
    ({}, ["training", "calibration", "scoring"])])
def test_modes_cost_what_they_do(changes, parts):
    assert re.findall(r"(\w+) about", said("", **changes).partition(";")[2]) == parts


def test_little_is_not_worth_a_word():
    assert guide.estimate(tiny(), 40e9, 372) == ""


def test_costs_grow_with_the_model():
    small, large = (guide.forward_flops(tiny(**c), True, 32) for c in ({}, dict(num_layers=6)))
    assert small < large
    assert guide.forward_flops(tiny(), False, 32) < small
    weights = sum(t.matrix_of(t.GPT(tiny(), t.attend_ref).state_dict(), m).numel()
                  for m in t.matrices(tiny()))
    assert guide.forward_flops(tiny(num_loops=0), True, 0) == 2 * weights


@pytest.mark.parametrize(("seconds", "text"), [
    (5, "5 seconds"), (119, "119 seconds"), (125, "2 minutes"), (7200, "2 hours"),
    (40 * 86400, "40 days")])
def test_durations(seconds, text):
    assert guide.duration(seconds) == text


def test_a_run_ends_with_its_files_and_the_next_command(program):
    code, out, err = program(PREQUANT_ONLY=1, ITERATIONS=1)
    assert code == 0, err
    *_, files, command = out.splitlines()
    assert files == f"files: log {program.out}/log.txt; model {program.out}/final_model.pt"
    named, _, given = command.removeprefix("next: ").partition(" QUANTIZE_ONLY=1 ")
    assert given == f"ARTIFACT_DIR={program.out} python train_gpt.py"
    words = dict(word.split("=", 1) for word in shlex.split(named))
    assert words["DATA_PATH"] == str(program.data) and "PREQUANT_ONLY" not in words
    code, _, err = program(**{**dict.fromkeys(TINY), **words}, QUANTIZE_ONLY=1)
    assert code == 0, err
    *_, files, command, sample = program(ITERATIONS=1, TTT_ENABLED=0)[1].splitlines()
    for name in ("log.txt", t.MODEL_FILE, t.ARTIFACT_FILE, t.PROGRAM_FILE):
        assert f"{program.out}/{name}" in files
    assert command == (f"next: python submission.py --draft --report {program.out}/report.html "
                       f"{program.out}/log.txt")
    assert sample == f'or:   ARTIFACT_DIR={program.out} python train_gpt.py sample "Once upon"'


def refused(monkeypatch, capsys, *words, **environ) -> str:
    """The one line on standard error of `python train_gpt.py WORDS`."""
    monkeypatch.setattr("sys.argv", ["train_gpt.py", *words])
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))
    assert t.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(("word", "near"), [
    ("smaple", "sample"), ("Audit", "audit"), ("calibrat", "calibrate"), ("train", "")])
def test_a_misspelt_mode_gets_the_nearest(monkeypatch, capsys, word, near):
    err = refused(monkeypatch, capsys, word, "Once upon")
    assert f"error: {word}: no such mode" in err
    assert (f"; did you mean {near}?" in err) if near else ("did you mean" not in err)
    assert "; there are: audit, sample, calibrate; see --help" in err


def test_a_setting_behind_the_command_is_said_to_belong_before(monkeypatch, capsys):
    err = refused(monkeypatch, capsys, "PRESET=cpu_demo")
    assert "a setting stands before the command: PRESET=cpu_demo python train_gpt.py" in err


@pytest.mark.parametrize(("settings", "command"), [
    ({}, "--download caseops --train-shards 80 --out ./data"),
    ({"PRESET": "cpu_demo"}, "--demo data/demo --train-tokenizer --vocab-size 1024 --val-docs 32 "
                             "--out data/demo"),
    ({"VOCAB_SIZE": "1024", "DATA_DIR": "data/mine"},
     "--docs FILE.jsonl --train-tokenizer --vocab-size 1024 --out data/mine")])
def test_missing_data_is_said_before_anything_else(monkeypatch, capsys, tmp_path, settings,
                                                   command):
    """What is missing, DATA_PATH, the command that makes it and, on a CPU, the demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.torch.cuda, "is_available", lambda: False)
    err = refused(monkeypatch, capsys, **settings)
    assert "fineweb_train_*.bin: no such file; set DATA_PATH" in err
    assert f"python prepare_caseops_data.py {command}" in err
    assert ("./run_3seed.sh cpu_demo" in err) == ("--demo" not in command)
    assert not list(tmp_path.iterdir())  # no log either
    prepare_caseops_data.parse_arguments(command.split())  # these options exist


def test_missing_validation_data_is_said_before_the_model(program):
    for path in program.data.glob("fineweb_val_0*"):
        path.unlink()
    code, out, err = program()
    assert (code, out) == (2, "") and "fineweb_val_*.bin: no such file" in err


@pytest.mark.parametrize("mode", guide.MODES)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_every_mode_has_help(monkeypatch, capsys, mode, word):
    monkeypatch.setattr("sys.argv", ["train_gpt.py", mode, word])
    try:
        code = t.main()
    except SystemExit as end:  # argparse's own
        code = end.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "") and f"python train_gpt.py {mode}" in out
