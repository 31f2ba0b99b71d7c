"""submission.py: nothing that a log does not say, one configuration, statistics by hand."""

import json
import statistics
import sys

import pytest

import submission as s

LOG = """program: train_gpt.py sha256:abc
Hyperparameters:
  seed: {seed}
  model_dim: 512
not the default: {{"SEED": "{seed}", "MATRIX_LR": "{lr}", "RUN_ID": "r{seed}"}}
python 3.11.7, torch 2.13.0, numpy 2.4.6
devices: 8 x NVIDIA H100, torch.bfloat16; attention: using fa4
training stopped: train_time: 599512ms step: 4931/20000
diagnostic pre-quantization post-ema val_loss:2.3 val_bpb:1.0640 eval_time:9000ms
Code size: 27000 bytes
Serialized model quantized+pergroup: 15870000 bytes
Total submission size quantized+pergroup: 15897000 bytes
diagnostic quantized val_loss:2.34 val_bpb:1.0725 eval_time:9000ms
quantized_ttt_phased val_loss:2.32 val_bpb:{bpb} eval_time:450000ms
total_eval_time:480.5s
"""


def write_logs(folder, *runs, lr="0.03"):
    paths = []
    for seed, bpb in runs:
        paths.append(folder / f"{seed}.txt")
        paths[-1].write_text(LOG.format(seed=seed, bpb=bpb, lr=lr))
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
    got = s.build([path])
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
