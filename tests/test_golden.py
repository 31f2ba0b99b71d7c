"""The reference figures, group by group, where they are; and that the comparison can fail."""

import math
import subprocess
import sys

import numpy as np
import pytest

from tests import golden
from tests.tools import ROOT


@pytest.fixture(scope="module")
def figures():
    if not golden.DEFAULT.is_file():
        pytest.skip(f"{golden.DEFAULT}: reference figures are not on this machine")
    return golden.DEFAULT


@pytest.mark.parametrize("group", golden.GROUPS, ids=lambda key: golden.GROUPS[key].__name__)
def test_reference_figures(figures, group):
    found = list(golden.compare(figures, (group,)))
    assert found
    wrong = [f"{c.name}: {c.error:.3g} > {c.limit:.3g}" for c in found if not c.holds]
    assert not wrong, wrong


def test_wrong_figures_are_found(figures, tmp_path):
    """Each figure that a group compares, changed a little too much, fails."""
    with np.load(figures) as file:
        whole = {name: file[name] for name in file.files}
    for name, group, change in (
        ("packed/logits_loop0", "packed/ids", 2e-4), ("packed/loss_loop1", "packed/ids", 2e-5),
        ("packed/gradnorm_loop0/kv_bank", "packed/ids", 1.0), ("ns/out", "ns/in", 3e-2),
        ("ttt/loss", "ttt/ids", 1e-3), ("gptq/q", "gptq/W", 1), ("lqer/recon", "gptq/W", 0.05),
    ):
        changed = {**whole, name: (whole[name] + change).astype(whole[name].dtype)}
        np.savez(tmp_path / "changed.npz", **changed)
        assert not all(c.holds for c in golden.compare(tmp_path / "changed.npz", (group,))), name


def test_not_a_number_never_holds():
    assert golden.Comparison("x", 0.0, 0.0).holds
    assert not golden.Comparison("x", math.nan, 1.0).holds
    assert not golden.Comparison("x", math.inf, math.inf).holds


@pytest.fixture
def command(monkeypatch, capsys):
    """golden.main() -> (exit code, stdout, stderr)."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["golden", *map(str, args)])
        return golden.main(), *capsys.readouterr()
    return call


def test_command_line(figures, tmp_path, command):
    with np.load(figures) as file:
        keep = {n: file[n] for n in file.files if n.startswith(("w/", "config", "ns/", "gptq/"))}
    np.savez(tmp_path / "some.npz", **keep)
    code, out, _ = command(tmp_path / "some.npz")
    assert code == 0 and "ok   Newton-Schulz" in out and "all comparisons hold" in out
    np.savez(tmp_path / "wrong.npz", **{**keep, "ns/out": keep["ns/out"] + 1})
    code, out, _ = command(tmp_path / "wrong.npz")
    assert code == 1 and "FAIL Newton-Schulz" in out


def test_files_that_cannot_be_compared(tmp_path, command):
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "empty.npz", x=np.zeros(3))
    for name in ("none.npz", "text.npz", "empty.npz"):
        code, _, err = command(tmp_path / name)
        assert code == 2 and err.startswith("error: ") and name in err and err.count("\n") == 1
    assert command()[0] == 2


def test_it_is_a_command(tmp_path):
    run = subprocess.run([sys.executable, "-m", "tests.golden", str(tmp_path / "none.npz")],
                         cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2 and "none.npz" in run.stderr
