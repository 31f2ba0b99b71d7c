"""bench/presets_full.sh's table: rates of the plain and the looped model, and runs that failed."""

import os
import subprocess

import pytest

from bench import presets_table
from tests.tools import ROOT

LOG = """Hyperparameters:
  train_batch_tokens: 1000
1/20 train_loss: 5.0 train_time: 0.0m tok/s: 500
5/20 train_loss: 4.0 train_time: 0.0m tok/s: 500
layer_loop:on step:5 frac:0.352
6/20 train_loss: 4.0 train_time: 0.0m tok/s: 429 seconds: 14.0 left: 9s
10/20 train_loss: 4.0 train_time: 0.0m tok/s: 333 seconds: 30.0 left: 9s
"""


def test_rates_of_both_models():
    """5 steps in 10 s; then step 6 after 14 s and step 10 after 30 s: 4 steps in 16 s."""
    plain, looped = presets_table.rates(LOG)
    assert plain == 500 and looped == pytest.approx(250, rel=0.01)
    assert presets_table.rates(LOG[:LOG.index("layer_loop")]) == (500, None)
    assert presets_table.rates("no log") == (None, None)


@pytest.mark.parametrize(("status", "out", "words"), [
    ("1", "Traceback:\nValueError: a | b\n\n", "failed (1): ValueError: a / b"),
    ("124", "much", "failed: LIMIT_EACH is over"), ("skipped", "", "left out"),
    ("137", "", "failed (137): nothing was said")])
def test_a_run_that_failed_has_its_line(tmp_path, status, out, words):
    for name in ("best", "pr1787"):
        (tmp_path / name).mkdir()
    (tmp_path / "best/status").write_text(status)
    (tmp_path / "best/out.txt").write_text(out)
    (tmp_path / "best/log.txt").write_text(LOG + "slow path: COMPILE=0\n")
    assert "| 500 | 249 |" in presets_table.row(tmp_path / "best")
    assert "| COMPILE=0 | " + words in presets_table.row(tmp_path / "best")
    assert presets_table.row(tmp_path / "pr1787").endswith("| under way |")


def test_the_script_says_what_it_needs(tmp_path):
    def script(**given):
        env = {k: v for k, v in os.environ.items() if k != "DATA_PATH"} | given
        return subprocess.run([ROOT / "bench/presets_full.sh"], env=env, capture_output=True,
                              text=True, timeout=120, check=False)

    run = script()
    assert run.returncode and "DATA_PATH: the folder with the shards" in run.stderr
    run = script(DATA_PATH="none", ONLY="nosuch", OUT=str(tmp_path))
    assert run.returncode == 2 and run.stderr.startswith("error: ")
    run = script(DATA_PATH="none", ONLY="pr1430_causal", OUT=str(tmp_path))
    assert run.returncode == 0 and "set DATA_PATH_SP1024" in run.stderr
    assert "| pr1430_causal | - | - | - | - | - | - | - | left out" in run.stdout
    run = script(DATA_PATH="none", DATA_PATH_SP1024="none", TOKENIZER_PATH_SP1024="none",
                 ONLY="pr1787", OUT=str(tmp_path))  # its variables are no settings of a run's
    assert "failed (2): error: " in run.stdout and "no such setting" not in run.stdout
