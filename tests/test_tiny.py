"""The smallest whole-stack test: shards, training, artifact, packed program, the same score."""

import re
import shutil

import numpy as np
import pytest

import train_gpt as t
from tests.tools import TINY, launch, said, write_data

NUMBER = r"([-+0-9.e]+)"
LINES = {  # what tools read from a log: (pattern, how often in this run)
    "training": (rf"^(\d+)/(\d+) train_loss: {NUMBER} train_time: {NUMBER}m tok/s: {NUMBER} "
                 rf"seconds: {NUMBER} left: \d+s$", 6),
    "validation": (rf"^(\d+)/(\d+) val_loss: {NUMBER} val_bpb: {NUMBER}$", 1),
    "pre-quantisation": (r"^diagnostic pre-quantization post-ema val_loss:(\S+) val_bpb:(\S+) "
                         rf"eval_time:{NUMBER}ms$", 1),
    "quantised": (rf"^diagnostic quantized val_loss:(\S+) val_bpb:(\S+) eval_time:{NUMBER}ms$", 1),
    "artifact": (r"^Serialized model quantized\+(\w+): (\d+) bytes$", 1),
    "total": (r"^Total submission size quantized\+(\w+): (\d+) bytes$", 1),
    "code": (r"^Code size: (\d+) bytes$", 1),
    "score": (rf"^quantized_ttt_phased val_loss:(\S+) val_bpb:(\S+) eval_time:{NUMBER}ms$", 1),
    "evaluation time": (rf"^total_eval_time:{NUMBER}s$", 1),
}


def found(text: str) -> dict[str, tuple]:
    """The groups of the last line of each kind."""
    lines = {}
    for name, (pattern, count) in LINES.items():
        hits = re.findall(pattern, text, re.MULTILINE)
        if hits:
            assert len(hits) == count, (name, hits)
            lines[name] = hits[-1]
    return lines


def scores(lines: dict[str, tuple]) -> dict[str, tuple]:
    """val_loss and val_bpb as printed."""
    return {name: lines[name][:2] for name in ("quantised", "score")}


@pytest.mark.parametrize("compressor", ["ans", "brotli", "pergroup"])
def test_train_pack_and_score_again(tmp_path, compressor):
    if compressor == "pergroup" and not shutil.which("lrzip"):
        pytest.skip("lrzip is not installed: apt-get install lrzip")
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    quantiser = "tcq" if compressor == "ans" else "uniform"
    settings = {**TINY, "COMPRESSOR": compressor, "QUANTISER": quantiser, "DATA_PATH": data,
                "ARTIFACT_DIR": out, "RUN_ID": "first"}
    run = launch(settings, tmp_path)
    assert run.returncode == 0, run.stderr

    log = (out / "first.txt").read_text()
    assert said(out / "first.txt") == run.stdout
    lines = found(log)
    assert lines.keys() == LINES.keys()
    cfg = t.Config.from_env(TINY | {"COMPRESSOR": compressor, "QUANTISER": quantiser})
    for name in map(str.lower, TINY.keys() & t.SETTINGS.keys()):  # two blanks, name, colon, value
        assert re.findall(rf"^  {name}: (\S+)", log, re.MULTILINE) == [str(getattr(cfg, name))]

    artifact, program = out / "final_model.int6.ptz", out / "final_program.py"
    assert lines["artifact"] == (compressor, str(artifact.stat().st_size))
    assert lines["code"] == str(program.stat().st_size)
    both = artifact.stat().st_size + program.stat().st_size
    assert lines["total"] == (compressor, str(both))
    assert all(float(x) > 0 for name in ("pre-quantisation", "quantised", "score")
               for x in lines[name][:2])
    assert log.count("ttt_phase: ") == 2
    assert not re.search(r"ttt_phase: .*global_steps:0 ", log)
    assert {p.name for p in out.iterdir()} == {
        "first.txt", "final_model.pt", artifact.name, program.name}

    # the packed program, from another folder, told only where the files are
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = launch({"TTT_EVAL_ONLY": 1, "ARTIFACT_DIR": out, "DATA_PATH": data,
                    "RUN_ID": "second"}, elsewhere, program)
    assert again.returncode == 0, again.stderr
    assert scores(found(again.stdout)) == scores(lines)
    assert not list(elsewhere.iterdir())


def test_artifact_decodes_to_exactly_what_was_quantised(tmp_path, monkeypatch, capsys):
    data, out, seen = write_data(tmp_path / "data"), tmp_path / "out", {}
    quantise = t.quantise

    def spy(*args):
        seen.update(quantise(*args))
        return seen

    monkeypatch.setattr(t, "quantise", spy)
    t.run({**TINY, "DATA_PATH": str(data), "ARTIFACT_DIR": str(out)})
    arrays, _ = t.decode_artifact((out / "final_model.int6.ptz").read_bytes(), "artifact")
    assert arrays.keys() == seen.keys()
    for name, tensor in seen.items():
        assert arrays[name].dtype == tensor.numpy().dtype, name
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), err_msg=name)


def test_packed_program_trains_and_packs_itself_again(tmp_path):
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    t.run({**TINY, "DATA_PATH": str(data), "ARTIFACT_DIR": str(out), "ITERATIONS": "2"})
    program = (out / "final_program.py").read_bytes()
    run = launch({"ARTIFACT_DIR": tmp_path / "again", "DATA_PATH": data, "TTT_ENABLED": 0},
                 tmp_path, out / "final_program.py")
    assert run.returncode == 0, run.stderr
    first, second = (folder / "final_model.int6.ptz" for folder in (out, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    assert len((tmp_path / "again" / "final_program.py").read_bytes()) < 1.01 * len(program)
