"""run_3seed.sh: which seeds run, what is kept, where it says things lie. Python is a stand-in."""

import json
import os
import shutil
import subprocess

import pytest

from tests.tools import ROOT, hear_ctrl_c

# writes down its arguments and environment; a run of train_gpt.py leaves a log as FAKE_* say
FAKE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> calls
case "$*" in
  *requirements-gpu.txt*) exit "${FAKE_FA4:-0}" ;;
  *"train_gpt.py")
    env | grep -E '^(PRESET|SEED|OMP_NUM_THREADS|CHECKPOINT_EVERY_SECONDS)=' > "$ARTIFACT_DIR/env"
    echo "run $SEED" >> "$ARTIFACT_DIR/log.txt"
    if [ "${FAKE_KILLED:-}" = "$SEED" ]; then touch "$ARTIFACT_DIR/${FAKE_LEAVES:-x}"; exit 1; fi
    rm -f "$ARTIFACT_DIR/checkpoint.pt"
    echo '{"result": {"seed": '"$SEED"', "complete": true}}' >> "$ARTIFACT_DIR/log.txt" ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """start(arguments, NAME=value) -> the finished process; the folder is start.folder."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copy(ROOT / "run_3seed.sh", tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small.env").write_text("# nothing\n")

    def call(*words, gpus=0, new_session=False, **changes):
        if gpus:
            path = tmp_path / "bin" / "nvidia-smi"
            path.write_text(f"#!/usr/bin/env bash\nfor n in $(seq {gpus}); do echo GPU $n; done\n")
            path.chmod(0o755)
        path = f"{tmp_path / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        env = {"PATH": path, "HOME": str(tmp_path), "VIRTUAL_ENV": "x",
               **{name: str(value) for name, value in changes.items()}}
        (tmp_path / "calls").write_text("")
        return subprocess.run([tmp_path / "run_3seed.sh", *words], env=env, text=True,
                              capture_output=True, timeout=60, check=False,
                              start_new_session=new_session,
                              preexec_fn=hear_ctrl_c if new_session else None)
    call.folder = tmp_path
    return call


def trained(folder):
    """How often a run began, by the folder's calls."""
    return (folder / "calls").read_text().count("train_gpt.py\n")


def test_a_finished_seed_is_kept(start):
    first = start("small")
    assert first.returncode == 0, first.stderr
    assert trained(start.folder) == 3
    log = start.folder / "runs/small/seed42/log.txt"
    before = log.read_bytes()
    again = start("small")
    assert again.returncode == 0 and trained(start.folder) == 0 and log.read_bytes() == before
    assert "== small, seed 42: finished before, runs/small/seed42/log.txt is kept" in again.stdout
    one = start("--overwrite", "small", SEEDS="0")
    assert trained(start.folder) == 1 and "seed 0: runs again (--overwrite)" in one.stdout
    assert (start.folder / "runs/small/seed0/log.txt").read_text().count("run 0") == 1


def test_a_new_run_id_runs_beside(start):
    start("small", SEEDS="1")
    assert start("small", SEEDS="1", RUN_ID="second").returncode == 0
    assert trained(start.folder) == 1
    for path in ("runs/small/seed1/log.txt", "runs/small/second/seed1/log.txt"):
        assert (start.folder / path).read_text().count("run 1") == 1
    assert "--out runs/small/second/submission.json" in (start.folder / "calls").read_text()


def test_an_unfinished_seed_goes_on_or_begins_anew(start):
    assert start("small", FAKE_KILLED=0).returncode == 1
    again = start("small")
    assert "seed 42: finished before" in again.stdout
    assert "seed 0: unfinished and without a checkpoint, begins anew" in again.stdout
    assert trained(start.folder) == 2
    assert (start.folder / "runs/small/seed0/log.txt").read_text().count("run 0") == 1
    start("small", SEEDS="5", FAKE_KILLED=5, FAKE_LEAVES="checkpoint.pt")
    again = start("small", SEEDS="5")
    assert "seed 5: unfinished, goes on from runs/small/seed5/checkpoint.pt" in again.stdout
    assert (start.folder / "runs/small/seed5/log.txt").read_text().count("run 5") == 2
    env = (start.folder / "runs/small/seed5/env").read_text()
    assert "CHECKPOINT_EVERY_SECONDS=60" in env  # else nothing would be resumed
    start("small", SEEDS="6", FAKE_KILLED=6, FAKE_LEAVES="checkpoint.pt")
    start("small", "--overwrite", SEEDS="6")
    assert (start.folder / "runs/small/seed6/log.txt").read_text().count("run 6") == 1


def test_threads_on_a_cpu(start):
    start("small", SEEDS="1")
    assert "OMP_NUM_THREADS=1" in (start.folder / "runs/small/seed1/env").read_text()
    start("small", "--overwrite", SEEDS="1", OMP_NUM_THREADS=3)
    assert "OMP_NUM_THREADS=3" in (start.folder / "runs/small/seed1/env").read_text()
    start("small", "--overwrite", SEEDS="1", gpus=2)
    assert "OMP_NUM_THREADS" not in (start.folder / "runs/small/seed1/env").read_text()


def test_flash_attention_must_install(start):
    run = start("small", gpus=1, FAKE_FA4=1)
    assert run.returncode == 2 and trained(start.folder) == 0
    assert "ALLOW_NO_FA4=1" in run.stderr and run.stderr.count("\n") == 1
    assert start("small", gpus=1, FAKE_FA4=1, ALLOW_NO_FA4=1).returncode == 0
    assert start("small", "--overwrite", gpus=1).returncode == 0


def test_it_says_where_things_lie(start):
    run = start("small", SEEDS="1 2")
    calls = (start.folder / "calls").read_text()
    assert ("submission.py --draft --program train_gpt.py --out runs/small/submission.json "
            "--report runs/small/report.html runs/small/seed1/log.txt runs/small/seed2/log.txt"
            ) in calls
    for words in ("report:   runs/small/report.html", "figures:  runs/small/submission.json",
                  "logs:     runs/small/seed1/log.txt runs/small/seed2/log.txt",
                  "artifact: runs/small/seed1/final_model.int6.ptz",
                  "TTT_EVAL_ONLY=1 ARTIFACT_DIR=runs/small/seed1 python runs/small/seed1/final_",
                  "python train_gpt.py audit runs/small/seed1",
                  "python submission.py --audit runs/small/submission.json runs/small/seed1/log."):
        assert words in run.stdout


@pytest.mark.parametrize("script", ["run_3seed.sh", "bench/ablate.sh"])
def test_help(script, tmp_path):
    for word in ("--help", "-h"):
        run = subprocess.run([ROOT / script, word], cwd=tmp_path, text=True, capture_output=True,
                             env={"PATH": os.environ["PATH"]}, timeout=60, check=False)
        assert run.returncode == 0 and run.stderr == "" and f"{script} [PRESET]" in run.stdout
        assert "set -e" not in run.stdout
    wrong = subprocess.run([ROOT / script, "--hepl"], cwd=tmp_path, text=True, capture_output=True,
                           timeout=60, check=False)
    assert wrong.returncode == 2 and "--help" in wrong.stderr and list(tmp_path.iterdir()) == []


def test_an_unknown_preset_names_those_that_are_there(start):
    run = start("smal")
    assert run.returncode == 2 and "there are: small" in run.stderr
    assert "no preset presets/smal.env; did you mean small?; there are" in run.stderr
    assert run.stderr.count("\n") == 1
    assert "did you mean" not in start("xyz").stderr


def test_ctrl_c_says_what_is_kept(start):
    """The child ends with 130 as train_gpt.py does; no other seed begins."""
    fake = start.folder / "bin" / "python"
    fake.write_text(fake.read_text().replace('  *"train_gpt.py")', '  *"train_gpt.py")\n'
                                             '    kill -INT 0; sleep 9; exit 130'))
    run = start("small", new_session=True)
    assert run.returncode == 130
    assert run.stderr.count("interrupted; finished seeds are kept") == 1
    assert trained(start.folder) == 1


def test_the_log_it_looks_for_is_the_programs(program):
    """What marks a finished run stands in the last line of a real log."""
    code, _, err = program(ITERATIONS=1, PREQUANT_ONLY=1)
    assert code == 0, err
    last = (program.out / "log.txt").read_text().splitlines()[-1]
    assert last.startswith('{"result": ') and json.loads(last)["result"]["complete"] is True
    assert '"complete": true' in last
