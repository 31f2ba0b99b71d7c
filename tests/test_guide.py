"""guide.py: what a run says of its cost on a CPU, and where its files lie."""

import re

import pytest

import guide
import train_gpt as t
from tests.tools import ROOT, tiny


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
    assert command.startswith(f"next: QUANTIZE_ONLY=1 ARTIFACT_DIR={program.out}")
    *_, files, command, sample = program(ITERATIONS=1, TTT_ENABLED=0)[1].splitlines()
    for name in ("log.txt", t.MODEL_FILE, t.ARTIFACT_FILE, t.PROGRAM_FILE):
        assert f"{program.out}/{name}" in files
    assert command == (f"next: python submission.py --draft --report {program.out}/report.html "
                       f"{program.out}/log.txt")
    assert sample == f'or:   ARTIFACT_DIR={program.out} python train_gpt.py sample "Once upon"'
