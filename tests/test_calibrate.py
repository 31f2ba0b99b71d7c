"""calibrate.py: what a machine will do, from times of a few steps on synthetic ids."""

import re

import pytest

import calibrate
import train_gpt as t
from tests.tools import ROOT, TINY, runtime


def test_forecast_is_the_sum_over_the_stages():
    cfg = t.Config()
    shares = calibrate.shares(cfg)
    assert shares.keys() == set(t.train_shapes(cfg)) and sum(shares.values()) == pytest.approx(1)
    assert shares[1024, False] == pytest.approx(0.1) and shares[3072, True] == pytest.approx(0.3)
    assert calibrate.forecast(shares, dict.fromkeys(shares, 0.1217), 600) == pytest.approx(
        600 / 0.1217)
    slow = {stage: 0.2 if stage[1] else 0.1 for stage in shares}
    assert calibrate.forecast(shares, slow, 100) == pytest.approx(350 + 325)


def test_lengths_are_those_of_fineweb():
    lengths = calibrate.document_lengths(200_000)
    assert lengths.mean() == pytest.approx(calibrate.MEAN, rel=0.02) and lengths.min() >= 2


@pytest.mark.parametrize("changes", [{}, {"MAX_WALLCLOCK_SECONDS": "60", "TTT_STREAM": "1"},
                                     {"TTT_ENABLED": "0", "COMPRESSOR": "ans"}], ids=str)
def test_all_figures_are_told(changes, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(calibrate, "MEAN", 30)
    monkeypatch.chdir(tmp_path)
    for name, value in {**TINY, "PRESET": str(ROOT / "presets/cpu_demo.env"), "ITERATIONS": "5000",
                        "TRAIN_SEQ_SCHEDULE": "16@0.5,32@1", **changes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train_gpt.py", "calibrate"])
    assert t.main() == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^step: length \d+ (?:plain|looped) \S+ ms, ", out, re.M)) == 3
    for line in (r"optimiser and average: \S+ ms", r"calibration: \S+s of training reserved",
                 r"expected: \d+ steps, ",
                 r"(test-time training: \S+ targets/s; )?evaluation of 47,853,343 targets: \d+ s"):
        assert re.search(f"^{line}", out, re.M), line
    assert "reference:" not in out  # of the full model on GPUs alone
    assert not list(tmp_path.iterdir())


def test_the_distance_to_the_record_is_in_its_tokens():
    rt, lines = runtime(), []
    rt.log = lines.append
    calibrate.compare(4931, t.Config(), rt)
    assert lines == ["reference: 8 H100s ran 4931 steps of 786,432 tokens, 121.7 ms each; this is "
                     "+0.0%, +0 such steps, by a rule of thumb -0.0000 BPB"]
