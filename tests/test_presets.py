"""Every preset from end to end, at a tiny size, on text that Python brings along."""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import preset as presets
import submission
import train_gpt as t
from tests.tools import PRESETS, ROOT, TINY, TINY_LISTS, VAL_LENGTHS

VOCAB = 400
FAST = ("QUANTISER", "COMPRESSOR", "TTT_STREAM")  # of TINY; the defaults run with their own, too


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """(folder of shards, tokenizer) of docstrings of the standard library."""
    out = tmp_path_factory.mktemp("presets")
    tree = ast.parse(Path(argparse.__file__).read_text(encoding="utf-8"))
    texts = [text for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
             and (text := ast.get_docstring(node))]
    texts = [text[:300] for text in (texts * 4)[: 40 + len(VAL_LENGTHS)]]
    (out / "docs.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    subprocess.run([sys.executable, ROOT / "prepare_caseops_data.py", "--docs", out / "docs.jsonl",
                    "--out", out, "--train-tokenizer", "--vocab-size", str(VOCAB), "--val-docs",
                    str(len(VAL_LENGTHS))], check=True, capture_output=True, timeout=240)
    (folder,), (model,) = out.glob("datasets/*"), out.glob("tokenizers/*.model")
    return folder, model


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_runs_from_end_to_end(preset, program, demo, tmp_path, monkeypatch):
    folder, model = demo
    # packing takes seconds, and gives the same every time
    monkeypatch.setattr(t, "pack_program", lambda source, modules: source.encode())
    asked = {name: text for name, (text, _) in presets.read(preset, ROOT).items()}
    small = {name: text for name, text in TINY.items() if preset != "best" or name not in FAST}
    settings = {**small, "VOCAB_SIZE": VOCAB, "PRESET": preset, "DATA_PATH": folder,
                **{name: value for name, value in TINY_LISTS.items() if asked.get(name)}}
    if asked.get("CASEOPS_ENABLED") == "0" and "TOKENIZER_PATH" in asked:
        settings["DATA_PATH"] = tmp_path / "plain"  # as downloaded: no sidecar, no manifest
        shutil.copytree(folder, tmp_path / "plain",
                        ignore=shutil.ignore_patterns("*bytes*", "manifest*"))
    if "TOKENIZER_PATH" in asked or float(asked.get("WITHIN_BOOST", 0)):
        settings["TOKENIZER_PATH"] = model
    code, out, err = program(**settings)
    assert code == 0, err
    found = re.search(r"^quantized_ttt_phased val_loss:(\S+) val_bpb:(\S+)", out, re.MULTILINE)
    assert 0 < float(found[2]) < 20
    said = re.findall(r"^illegal: (.+)$", out, re.MULTILINE)
    assert len(said) == (1 if preset.endswith("_as_run") else 0)
    listed = asked.get("EVAL_INCLUDE_TAIL") == "0" or bool(said)  # refused without --draft
    (run,) = submission.build([program.out / "log.txt"], draft=listed)["seeds"]
    assert run["illegal"] == (said[0] if said else None)
    tilted = re.search(r"^ngram_tilt:hints total=\d+ gated=(\d+)", out, re.MULTILINE)
    assert bool(tilted) == (asked.get("NGRAM_TILT_ENABLED") == "1")
    assert not tilted or int(tilted[1]) > 0


def test_every_preset_that_is_tracked_is_checked():
    """A user's own preset stands beside ours without a test's notice; ours do not."""
    listed = subprocess.run(["git", "ls-files", "presets"], cwd=ROOT, text=True, check=False,
                            capture_output=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("no git repository here")
    assert {Path(name).stem for name in listed.stdout.split()} == set(PRESETS)


def test_a_preset_as_the_docs_say(tmp_path):
    """The example of docs/presets.md is a preset."""
    text = (ROOT / "docs" / "presets.md").read_text()
    (example,) = re.findall(r"```\n(# .*?)```", text, re.DOTALL)
    (tmp_path / "mine.env").write_text(example)
    cfg = t.Config.from_env({"PRESET": str(tmp_path / "mine.env")}, ROOT)
    assert t.changed(cfg, t.Config.from_env({"PRESET": "cpu_demo"}, ROOT)).keys() == {
        "ITERATIONS", "MATRIX_LR", "SEED"}


def test_readme_lists_every_preset():
    readme = (ROOT / "README.md").read_text()
    assert not [preset for preset in PRESETS if f"| `{preset}` |" not in readme]
