"""§15 Main: every mistake ends in exit code 2 and one line; the modes do what they say."""

import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import submission
import train_gpt as t
from tests.tools import (
    PROGRAM,
    ROOT,
    TINY,
    busy_model,
    launch,
    runtime,
    said,
    write_data,
    write_shard,
)


def one_line(result) -> str:
    """The message of a refused run; result = (code, stdout, stderr)."""
    code, out, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


@pytest.mark.parametrize(("settings", "words"), [
    ({"TTT_RNAK": 80}, "TTT_RNAK: no such setting"), ({"MODEL_DIM": "wide"}, "whole number"),
    ({"MATRIX_BITS": 12}, "at most 8"), ({"NUM_HEADS": 5}, "contradictory settings"),
    ({"PRESET": "nosuch"}, "presets here: "), ({"WORLD_SIZE": 3}, "must divide 8"),
    ({"DATA_PATH": "/nowhere"}, "/nowhere/fineweb_train_*.bin: no such file"),
    ({"VOCAB_SIZE": 40}, "is outside the vocabulary of 40"),
    ({"ATTENTION": "fa4"}, "ATTENTION=fa4"), ({"TTT_EVAL_ONLY": 1}, "no artifact; train first"),
    ({"QUANTIZE_ONLY": 1}, "final_model.pt: no such file"),
    ({"TOKENIZER_PATH": "/nowhere"}, "TOKENIZER_PATH=/nowhere: no such file"),
    ({"EVAL_SEQ_LEN": 512, "GLOBAL_TTT_CHUNK_TOKENS": 512}, "less than one sequence"),
    ({"TRAIN_BATCH_TOKENS": 80000}, "less than a row of 10000 + 1"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_mistakes_are_one_line(program, settings, words):
    assert words in one_line(program(**settings))
    names = {p.name for p in program.out.iterdir()} if program.out.exists() else set()
    assert names <= {"log.txt"}


@pytest.mark.parametrize("place", ["file", "full"])
def test_a_log_that_cannot_be_written_is_one_line(program, tmp_path, place):
    out = tmp_path / "place"
    if place == "file":
        out.write_text("here stands a file, not a folder")
    else:
        out.mkdir()
        (out / "log.txt").symlink_to("/dev/full")
    assert str(out) in one_line(program(ARTIFACT_DIR=out, PREQUANT_ONLY=1, ITERATIONS=1))


def test_a_bad_train_token_in_the_middle_is_one_line(program):
    path = program.data / "fineweb_train_000001.bin"
    ids = np.array(t.open_shard(path))
    ids[1000] = 64
    write_shard(path, ids)  # at 5000 of the stream: row 78, step 9
    err = one_line(program(ITERATIONS=12))
    assert f"{path}: token 1000: id 64 is outside" in err


def test_arguments_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--iterations", "5"])
    assert t.main() == 2
    assert capsys.readouterr().err == (
        "error: --iterations: settings are environment variables; see --help\n")


MEND = "is not installed; source .venv/bin/activate, or pip install -r requirements.txt"


def without(folder, *names) -> dict[str, str]:
    """The environment of a process in which these modules cannot be imported."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(
            f"raise ModuleNotFoundError({f'No module named {name!r}'!r}, name={name!r})\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed program, alone in a folder."""
    path = tmp_path_factory.mktemp("packed") / t.PROGRAM_FILE
    path.write_bytes(t.pack_program(PROGRAM.read_text()))
    return path


@pytest.mark.parametrize("name", ["brotli", "numba", "numpy", "torch"])
def test_a_missing_module_is_one_line(tmp_path, packed, name):
    """Of the program and of the packed one, which needs brotli before anything else."""
    for path in (PROGRAM, packed):
        run = launch(without(tmp_path / "lacks", name), tmp_path, path)
        assert (run.returncode, run.stdout) == (2, ""), run.stderr
        assert run.stderr == f"error: {name} {MEND}\n"


@pytest.mark.parametrize(("name", "settings"), [
    ("sentencepiece", {"TOKENIZER_PATH": str(PROGRAM)}), ("tqdm", {})])
def test_a_module_that_is_missed_later_is_one_line(program, monkeypatch, name, settings):
    monkeypatch.setitem(sys.modules, name, None)
    err = one_line(program(PREQUANT_ONLY=1, ITERATIONS=1, **settings))
    assert err == f"error: {name} {MEND}\n"


def test_a_missing_minifier_stops_before_training(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    result = program(ITERATIONS=1)
    assert "pip install python-minifier" in one_line(result) and "train_loss" not in result[1]


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_an_edit_while_it_starts_changes_nothing_that_the_log_says(tmp_path, packed, kind):
    """The file is edited when the first slow import begins; the log has what runs."""
    path = tmp_path / (PROGRAM.name if kind == "plain" else packed.name)
    before = (PROGRAM if kind == "plain" else packed).read_bytes()
    path.write_bytes(before)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(f"""
import sys
class Edit:
    def find_spec(self, name, path=None, target=None):
        if name == "numba" and sys.meta_path.pop(0):
            open({str(path)!r}, "ab").write(b"\\nraise SystemExit('edited')\\n")
sys.meta_path.insert(0, Edit())
""")
    run = launch({**TINY, "PYTHONPATH": tmp_path / "hook", "PREQUANT_ONLY": 1, "ITERATIONS": 1,
                  "DATA_PATH": write_data(tmp_path / "data"), "ARTIFACT_DIR": tmp_path / "out",
                  "PRESET": "", "RUN_ID": "log"}, tmp_path, path)
    assert run.returncode == 0, run.stderr
    assert path.read_bytes().endswith(b"SystemExit('edited')\n")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"program: {path.name} sha256:{hashlib.sha256(before).hexdigest()}\n" in log
    source = submission.source_of(log)
    assert "edited')" not in source
    assert kind == "packed" or source.encode() == before


def test_ctrl_c_is_one_line(tmp_path):
    settings = {**TINY, "ITERATIONS": 100000, "DATA_PATH": write_data(tmp_path / "data"),
                "ARTIFACT_DIR": tmp_path / "out", "RUN_ID": "log"}
    run = launch(settings, tmp_path, interrupt="train_loss: ")
    assert run.returncode == 130
    assert run.stderr == (
        "interrupted; CHECKPOINT_EVERY_SECONDS lets it go on\n")


@pytest.mark.parametrize("late", ["while an error is told", "at the end", "while it imports"])
def test_ctrl_c_at_any_time_is_one_line(tmp_path, late):
    """Planted: the first time one of these is called, Ctrl-C comes."""
    where = {"while an error is told": "torch.distributed.is_initialized",
             "at the end": "torch.distributed.is_initialized", "while it imports": ""}[late]
    words = ["--help"] if late == "at the end" else ["smaple"]
    (tmp_path / "driver.py").write_text(f"""
import os, runpy, signal, sys
sys.argv = ["train_gpt.py", *{words!r}]
sys.path.insert(0, {str(ROOT)!r})
def interrupt(*given):
    if not given or "numba" in given:
        raise KeyboardInterrupt
if {where!r}:
    import torch.distributed
    {where or "x"} = interrupt
else:
    class Finder:
        find_spec = staticmethod(interrupt)
    sys.meta_path.insert(0, Finder())
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
""")
    run = launch({}, tmp_path, tmp_path / "driver.py")
    assert (run.returncode, run.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(("settings", "name", "differs"), [
    ({}, "pr1855", "VOCAB_SIZE"), ({"PRESET": ""}, "none", "VOCAB_SIZE"),
    ({"PRESET": "cpu_demo", "VOCAB_SIZE": 1024}, "cpu_demo", "ITERATIONS")])
def test_a_log_names_its_preset(program, settings, name, differs):
    """Among its first lines and in its last; the console gets what differs, the file everything."""
    if settings.get("PRESET") == "":
        settings = {**settings, "TRAIN_SEQ_SCHEDULE": ""}
    code, out, err = program(PREQUANT_ONLY=1, ITERATIONS=1, **settings)
    assert code == 0, err
    log = (program.out / "log.txt").read_text()
    program_line, preset, differences, *_ = out.splitlines()
    assert program_line.startswith("program: ")
    assert preset == f"preset: {name}{' (defaults = best)' * (name == 'none')}"
    told = json.loads(re.fullmatch(r"not the preset: (\{.*\})", differences)[1])
    assert differs in told and "ITERATIONS" in told and len(told) < 60
    assert len(out.splitlines()) < 30 and "Hyperparameters" not in out and '"result"' not in out
    assert [line for line in log.splitlines()[:6] if line == preset]
    assert len(re.findall(r"^  \w+: ", log, re.MULTILINE)) == len(t.SETTINGS)
    assert re.search(r"^not the default: \{", log, re.MULTILINE)
    assert json.loads(log.splitlines()[-1])["result"]["preset"] == name


def test_missing_lrzip_stops_before_training(program, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "lrzip" else which(name))
    result = program(COMPRESSOR="pergroup")
    err = one_line(result)
    assert "apt-get install lrzip" in err and "COMPRESSOR=ans" in err
    assert "train_loss" not in result[1]
    assert program(COMPRESSOR="pergroup", PREQUANT_ONLY=1, ITERATIONS=1)[0] == 0


def test_artifacts_that_do_not_fit_are_refused(program):
    assert program(ITERATIONS=1, TTT_ENABLED=0)[0] == 0
    path = program.out / "final_model.int6.ptz"
    whole = path.read_bytes()
    again = {"TTT_EVAL_ONLY": 1, "TTT_ENABLED": 0}
    assert program(**again)[0] == 0
    err = one_line(program(**again, NUM_LOOPS=2))
    assert f"{path}: made with NUM_LOOPS=1, the settings say 2" in err
    for damaged in (whole[:-7], whole[:20], b"", b"PK" + whole[2:],
                    whole[:len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1:]):
        path.write_bytes(damaged)
        assert str(path) in one_line(program(**again))
    assert {p.name for p in program.out.iterdir()} == {
        "log.txt", "final_model.pt", path.name, "final_program.py"}


def test_ttt_eval_only_scores_the_same_again(program):
    first, again = program(ITERATIONS=2)[1], program(TTT_EVAL_ONLY=1)[1]
    line = r"(?:diagnostic quantized|quantized_ttt_phased) val_loss:\S+ val_bpb:\S+"
    assert len(re.findall(line, first)) == 2
    assert re.findall(line, first) == re.findall(line, again)
    assert "train_loss" not in again and "Total submission" not in again


def test_eval_only_needs_no_training_data(program):
    assert program(ITERATIONS=1, TTT_ENABLED=0)[0] == 0
    for path in program.data.glob("fineweb_train_*"):
        path.unlink()
    assert program(TTT_EVAL_ONLY=1, TTT_ENABLED=0)[0] == 0


def test_baked_settings_are_those_that_differ():
    cfg = t.Config.from_env({**TINY, "SMEAR_GATE_ENABLED": "0", "RUN_ID": "x",
                             "ARTIFACT_DIR": "out", "DATA_PATH": "it's here"})
    source = t.baked("a = 1\nBAKED: dict[str, str] = {}  # why\nb = 2\n", cfg)
    names = {}
    exec(source, names)  # noqa: S102
    assert names["a"] == 1 and names["b"] == 2
    again = t.Config.from_env(names["BAKED"])
    assert {**vars(again), "run_id": "x", "artifact_dir": "out"} == vars(cfg)


@pytest.mark.parametrize("budget", [300_000, 560_000])
def test_weights_and_program_fill_the_budget(tmp_path, budget):
    """The CPU demo's shapes, random weights."""
    cfg = t.Config.from_env({"PRESET": "cpu_demo", "ARTIFACT_BUDGET_BYTES": str(budget)}, ROOT)
    model, rt, lines = busy_model(cfg), runtime(), []
    rt.log = lines.append
    rows = t.SyntheticRows(cfg, rt)
    hessians = t.calibrate(model, rows, 0, rt, batches=2)
    noise = t.sensitivities(model, rows, 0, hessians, rt)
    t.pack(cfg, rt, model, hessians, noise, tmp_path)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert budget - 2048 <= total <= budget, lines
    assert f"Total submission size quantized+ans: {total} bytes" in lines
    arrays, _ = t.decode_artifact((tmp_path / t.ARTIFACT_FILE).read_bytes(), "x",
                                  lambda meta, pieces: t.check_pieces(pieces, model))
    assert t.dequantise({n: torch.from_numpy(x) for n, x in arrays.items()}, model)


def test_a_budget_beyond_the_finest_grid_is_logged(program):
    code, out, _ = program(ITERATIONS=1, TTT_ENABLED=0, QUANTISER="tcq", COMPRESSOR="ans")
    assert code == 0
    assert re.search(r"^trellis: \d+ bytes stay free", out, re.MULTILINE)


def test_help_lists_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--help"])
    assert t.main() == 0
    out = capsys.readouterr().out
    assert all(f"  {name} [" in out for name in t.SETTINGS)


def test_default_places(tmp_path):
    """Without ARTIFACT_DIR the log goes to logs/; model, artifact and program lie
    here; and one wrong setting, in a process of its own, is one line."""
    settings = {**TINY, "DATA_PATH": write_data(tmp_path / "data"), "ITERATIONS": 1,
                "TTT_ENABLED": 0, "RUN_ID": "mine"}
    run = launch(settings, tmp_path)
    assert run.returncode == 0, run.stderr
    assert said(tmp_path / "logs" / "mine.txt") == run.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"data", "logs", "final_model.pt", "final_model.int6.ptz", "final_program.py"}
    run = launch({**settings, "MODEL_DIMM": 3}, tmp_path)
    one_line((run.returncode, run.stdout, run.stderr))
