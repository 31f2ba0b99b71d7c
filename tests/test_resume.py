"""Killed, interrupted and competing runs: what is kept, continued, refused and put into place."""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import prepare_caseops_data as prep  # noqa: E402
from caseops import sources  # noqa: E402
from tests.test_prepare import (  # noqa: E402, F401 - fixtures
    SET,
    VOCAB,
    english,
    fails,
    model,
    read_shard,
    tree,
    without_staging,
    write_docs,
)

# Ends itself with code 9 at the N-th file operation on a path that holds what the environment says,
# or, for "swap", at the N-th one from the first renaming of a directory on.
KILLER = """
import os, shutil, sys
import prepare_caseops_data as prep
left, where, swapping = [int(os.environ["KILL_AT"])], os.environ["KILL_IN"], []
def mortal(function):
    def call(*arguments, **options):
        swapping.extend([1] * (function is rename))
        if swapping if where == "swap" else where in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
        return function(*arguments, **options)
    return call
if __name__ == "__main__":
    rename = os.rename
    for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
        setattr(os, name, mortal(getattr(os, name)))
    sys.exit(prep.main(sys.argv[1:]))
"""


def run_killed(folder, at, where, argv):
    """Run the tool until its `at`-th file operation on a path with `where` in it; its code."""
    script = folder / "killer.py"
    script.write_text(KILLER)
    return subprocess.run(
        [sys.executable, str(script), *map(str, argv)], capture_output=True, timeout=60,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "KILL_AT": str(at),
                          "KILL_IN": where}).returncode


def tool(*argv):
    return prep.main([str(a) for a in argv])


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Hundreds of shards of a few tokens: the machine itself does not crash here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def corpus(english, tmp_path_factory):  # noqa: F811
    """Documents, one of many shards and one that is twice there among them."""
    texts = [t[:900] for t in english[:50]] + [english[3]] + [t[:900] for t in english[:25]]
    return write_docs(tmp_path_factory.mktemp("corpus") / "docs.jsonl", texts)


def arguments(docs, out, model, *more):  # noqa: F811
    return ["--docs", docs, "--sp", model, "--val-docs", "13", "--shard-tokens", "700", "--out",
            out, *more]


@pytest.fixture(scope="module")
def whole(corpus, model, tmp_path_factory):  # noqa: F811
    """The tree that a run without trouble makes."""
    out = tmp_path_factory.mktemp("whole")
    assert tool(*arguments(corpus, out, model)) == 0
    return tree(out)


# ---- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_killed_again_and_again_it_ends_in_the_same_bytes(seed, corpus, model,  # noqa: F811
                                                          whole, tmp_path):
    random_, out, kills = random.Random(seed), tmp_path / "o", 0
    argv = arguments(corpus, out, model, "-j", "1")
    while run_killed(tmp_path, random_.randrange(10, 90), ".partial", argv) == 9:
        kills += 1
        assert kills < 30
        for path in out.rglob("*.bin"):
            read_shard(path)
    assert kills
    assert tree(out) == whole


def test_kill_from_outside_with_workers(corpus, model, tmp_path, whole, monkeypatch):  # noqa: F811
    argv = arguments(corpus, tmp_path / "o", model, "-j", "2")
    staged = tmp_path / "o" / "datasets" / (SET + ".partial")
    for shards in (1, 12):
        run = subprocess.Popen([sys.executable, str(ROOT / "prepare_caseops_data.py"),
                                *map(str, argv)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while run.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):  # it comes and goes
                if len(list(staged.glob("*.bin"))) >= shards:
                    break
        assert run.poll() is None, "the run ended before it could be killed"
        run.kill()
        run.wait()
    assert tool(*argv) == 0
    assert tree(tmp_path / "o") == whole


@pytest.mark.parametrize("kind", ["gz", "parquet", "two files"])
def test_other_inputs_resume(kind, corpus, model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sources, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    docs, lines = [tmp_path / "in"], corpus.read_bytes().splitlines(keepends=True)
    if kind == "gz":
        docs[0].write_bytes(gzip.compress(corpus.read_bytes()))
    elif kind == "parquet":
        from tests.test_sources import parquet
        docs[0].write_bytes(parquet(corpus.read_bytes()))
    else:
        docs.append(tmp_path / "more")
        docs[0].write_bytes(b"".join(lines[:30]))
        docs[1].write_bytes(b"".join(lines[30:]))
    one, two = (["--docs", *docs, "--sp", model, "--val-docs", 13, "--shard-tokens", 700,
                 "--drop-val-duplicates", "-j", 1, "--out", tmp_path / k] for k in "ab")
    assert tool(*one) == 0
    with interrupted_after(35, monkeypatch):
        assert tool(*two) == 130
    assert tool(*two) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    manifest = json.loads(tree(tmp_path / "b")[f"datasets/{SET}/manifest.json"])
    assert manifest["split"]["train_documents_dropped"] == 13
    assert manifest["split"]["train_end_document"] == len(lines)


class interrupted_after:
    """Ctrl-C at the n-th document."""

    def __init__(self, n, monkeypatch):
        self.left, self.context = n, monkeypatch.context()

    def __enter__(self):
        add = prep.ShardWriter.add

        def impatient(*args):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            add(*args)
        self.context.__enter__().setattr(prep.ShardWriter, "add", impatient)

    def __exit__(self, *exc):
        return self.context.__exit__(*exc)


@pytest.fixture
def unfinished(corpus, model, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A run that Ctrl-C ended after some shards: its arguments and its staging directory."""
    docs = tmp_path / "docs.jsonl"
    shutil.copy(corpus, docs)
    argv = arguments(docs, tmp_path / "o", model, "-j", "1")
    with interrupted_after(40, monkeypatch):
        assert tool(*argv) == 130
    assert "whole shards are kept, the same command goes on" in capsys.readouterr().err
    return argv, tmp_path / "o" / "datasets" / (SET + ".partial")


def test_other_arguments_are_refused(unfinished, whole, capsys):
    argv, staged = unfinished
    before = tree(staged)
    for more, said in [(["--val-docs", 12], "--val-docs 13, not 12"),
                       (["--shard-tokens", 701], "--shard-tokens 700, not 701"),
                       (["--drop-val-duplicates"], "--drop-val-duplicates False, not True")]:
        fails([*argv, *more], f"unfinished work with {said}; use what it was begun with", capsys)
        assert tree(staged) == before
    assert tool(*argv, "--restart", "--val-docs", 12) == 0
    assert not staged.exists()


def test_another_input_is_refused_and_a_mended_end_is_not(unfinished, tmp_path, whole, capsys):
    argv, staged = unfinished
    docs = tmp_path / "docs.jsonl"
    good = docs.read_bytes()
    docs.write_bytes(good.replace(b"statement", b"Statement", 1))
    fails(argv, f"{docs}: not what {staged} was begun with", capsys)
    docs.write_bytes(good)
    assert tool(*argv) == 0
    assert tree(tmp_path / "o") == whole


@pytest.mark.parametrize("damage", ["journal", "shard gone", "shard short", "empty"])
def test_a_journal_that_cannot_be_used_is_told_and_begun_anew(damage, unfinished, whole, tmp_path,
                                                              capsys):
    argv, staged = unfinished
    if damage == "journal":
        (staged / "journal.json").write_text('{"identity": ')
    elif damage == "empty":
        (staged / "journal.json").write_text("[]")
    elif damage == "shard gone":
        (staged / "fineweb_val_000001.bin").unlink()
    else:
        with open(staged / "fineweb_train_000000.bin", "r+b") as f:
            f.truncate(1500)
    assert tool(*argv) == 0
    assert "journal.json: cannot be used" in capsys.readouterr().out
    assert tree(tmp_path / "o") == whole


def test_the_trained_tokenizer_is_kept(corpus, tmp_path, monkeypatch, capsys):
    argv = ["--docs", corpus, "--train-tokenizer", "--vocab-size", VOCAB, "--val-docs", 13,
            "--out", tmp_path / "o", "-j", 1]
    with interrupted_after(2, monkeypatch):
        assert tool(*argv) == 130
    assert not (tmp_path / "o" / "tokenizers").exists()
    with monkeypatch.context() as patch:
        patch.setattr(prep, "train_tokenizer", None)
        assert tool(*argv) == 0
    again = [*argv[:-3], tmp_path / "p", "-j", 1]
    assert tool(*again) == 0
    assert tree(tmp_path / "o") == tree(tmp_path / "p")


# ---- putting into place --------------------------------------------------------------------------


def test_every_kill_while_files_are_put_into_place(corpus, model, tmp_path, english):  # noqa: F811
    """After a kill there is the old set or the new one, or neither yet; the next run mends it."""
    start = tmp_path / "start"
    tool("--docs", corpus, "--sp", model, "--val-docs", 5, "--out", start)
    (start / "datasets" / SET / "notes.txt").write_text("mine")
    old = tree(start)
    argv = ["--docs", corpus, "--sp", model, "--val-docs", 13, "--out", tmp_path / "o", "-j", 1]
    shutil.copytree(start, tmp_path / "o")
    tool(*argv)
    new = tree(tmp_path / "o")
    assert new != old
    states = set()
    for at in itertools.count(1):
        shutil.rmtree(tmp_path / "o")
        shutil.copytree(start, tmp_path / "o")
        code = run_killed(tmp_path, at, "swap", argv)
        if code == 0:
            break
        assert code == 9
        found = tree(tmp_path / "o" / "datasets" / SET)
        manifest = found.get("manifest.json")
        states.add({old[f"datasets/{SET}/manifest.json"]: "old",
                    new[f"datasets/{SET}/manifest.json"]: "new", None: "none"}[manifest])
        for name, entry in json.loads(manifest or '{"files": {}}')["files"].items():
            assert hashlib.sha256(found[name]).hexdigest() == entry["sha256"]
        assert tool(*argv) == 0
        assert tree(tmp_path / "o") == new, at
    assert states == {"old", "new", "none"}
    assert at > 6


def test_a_set_of_another_tokenizer_is_not_replaced(corpus, model, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "o"
    argv = arguments(corpus, out, model)
    assert tool(*argv) == 0
    before = tree(out)
    train = ["--docs", corpus, "--train-tokenizer", "--vocab-size", VOCAB, "--val-docs", 13,
             "--out", out]
    fails(train, "a data set of another tokenizer", capsys)
    assert without_staging(tree(out)) == before
    assert tool(*train, "--overwrite") == 0
    assert tree(out) != before
    fails(argv, "a data set of another tokenizer", capsys)
    folder = out / "datasets" / SET
    (folder / "manifest.json").unlink()
    fails(argv, "shards without a manifest.json", capsys)
    shutil.rmtree(folder)
    name, = (p.name for p in (out / "tokenizers").iterdir() if p.name != Path(model).name)
    shutil.copy(out / "tokenizers" / name, tmp_path / name)
    (out / "tokenizers" / name).write_bytes(b"another")
    fails(["--docs", corpus, "--sp", tmp_path / name, "--out", out],
          f"{name}: another tokenizer of this name is there", capsys)


def test_one_run_at_a_time(corpus, model, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "o"
    with prep.locked(out):
        fails(arguments(corpus, out, model), f"{out}: another run is writing there", capsys)
        done = subprocess.run([sys.executable, str(ROOT / "prepare_caseops_data.py"),
                               *map(str, arguments(corpus, out, model))], capture_output=True,
                              timeout=60, check=False)
        assert done.returncode == 2
        assert b"another run is writing there" in done.stderr
    assert not out.exists()
    assert tool(*arguments(corpus, out, model)) == 0


# ---- duplicates ----------------------------------------------------------------------------------


def test_duplicates_are_counted_and_can_be_left_out(model, tmp_path, capsys):  # noqa: F811
    texts = ["one", "two", "three", "two", "four", "one ", "one", ""]
    docs = write_docs(tmp_path / "d.jsonl", texts)
    base = ["--docs", docs, "--sp", model, "--val-docs", 2, "--out"]
    assert tool(*base, tmp_path / "a") == 0
    assert "2 training documents have the text of a validation document" in capsys.readouterr().out
    assert tool(*base, tmp_path / "b", "--drop-val-duplicates") == 0
    kept, dropped = (json.loads((tmp_path / k / "datasets" / SET / "manifest.json").read_text())
                     for k in "ab")
    assert kept["split"]["train_documents_equal_to_validation"] == 2
    assert kept["split"]["overlap"] is dropped["split"]["overlap"] is False
    assert kept["split"]["train_documents"] == 6
    assert dropped["split"]["train_documents_equal_to_validation"] == 0
    assert dropped["split"]["train_documents_dropped"] == 2
    assert dropped["split"]["train_documents"] == 4
    assert dropped["totals"]["train"]["documents"] == 4
    assert dropped["source"]["documents"] == 8
    assert kept["split"]["content"]["val"] == dropped["split"]["content"]["val"]
    assert kept["split"]["content"]["train"] != dropped["split"]["content"]["train"]
    write_docs(docs, [texts[i] for i in (0, 1, 2, 4, 5, 7)])
    assert tool(*base, tmp_path / "c", "--shard-tokens", 3) == 0
    clean = json.loads((tmp_path / "c" / "datasets" / SET / "manifest.json").read_text())
    assert clean["split"]["content"] == dropped["split"]["content"]
    write_docs(docs, ["one", "one"])
    fails([*base[:-1], "--val-docs", 1, "--drop-val-duplicates", "--out", tmp_path / "d"],
          "none of them left to train on", capsys)
