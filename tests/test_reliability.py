"""A run may be killed at any moment: it goes on and ends in the same bits; a dead rank is named."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import reliability
import train_gpt as t
from tests.tools import NO_GPU, PROGRAM, ROOT, TINY, write_data, write_shard

KEPT = {"CHECKPOINT_EVERY_SECONDS": "0.001", "TRAIN_LOG_EVERY": "1", "RUN_ID": "log"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(folder, data, launcher=(), program=PROGRAM, **settings):
    """The program as a process of its own that goes on by itself."""
    env = {k: v for k, v in os.environ.items() if not t.is_ours(k) and k != "PRESET"}
    given = {**TINY, **KEPT, **NO_GPU, "DATA_PATH": data, "ARTIFACT_DIR": folder, **settings}
    return subprocess.Popen(
        [sys.executable, *launcher, str(program)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**env, "OMP_NUM_THREADS": "1",
                                     **{k: str(v) for k, v in given.items()}})


def wait_for(process, path, pattern, seconds=120):
    """Until the log has a line like `pattern`, or the process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and re.search(pattern, path.read_text(), re.MULTILINE):
            return
        time.sleep(0.01)
    raise AssertionError(f"{pattern}: not in the log in {seconds} s: {process.communicate()}")


def finished(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


def score(text):
    found = re.findall(r"^quantized_ttt_phased val_loss:(\S+) val_bpb:(\S+)", text, re.MULTILINE)
    (line,) = set(found)
    return line


def weights(folder):
    return torch.load(folder / "final_model.pt", weights_only=True)


@pytest.mark.slow
def test_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    """kill -9 twice in training and once while the artifact is scored, against a quiet run; the
    context grows in training, and n-grams are mixed in while it is scored."""
    data, rng = write_data(tmp_path / "data"), random.Random(7)
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    given = dict(ITERATIONS=20, TRAIN_SEQ_SCHEDULE="8@0.3,32@1", SEQ_CHANGE_WARMUP_STEPS=9,
                 NGRAM_MIXER="exact", NGRAM_MIN_TOKENS=0)
    want = score(finished(start(quiet, data, **given, CHECKPOINT_EVERY_SECONDS=0,
                                SCORES_PATH=tmp_path / "quiet.npz")))
    given["SCORES_PATH"] = tmp_path / "killed.npz"
    moments = [*(rf"^{rng.randrange(a, a + 5)}/20 train_loss" for a in (2, 10)), r"^ttt_phase"]
    log = killed / "log.txt"
    for moment in moments:
        process = start(killed, data, **given)
        wait_for(process, log, moment)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.wait()
        assert "total_eval_time" not in log.read_text()
    text = finished(start(killed, data, **given))
    assert re.search(r"^resumed: scoring round:\d+ batch:\d+", text, re.MULTILINE)
    assert len(re.findall(r"^resumed: step:\d+", log.read_text(), re.MULTILINE)) == 2
    assert score(text) == want
    with np.load(tmp_path / "quiet.npz") as one, np.load(tmp_path / "killed.npz") as other:
        assert all((one[name] == other[name]).all() for name in one if name != "meta")
    a, b = weights(quiet), weights(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (quiet / "final_model.int6.ptz").read_bytes() == (
        killed / "final_model.int6.ptz").read_bytes()
    assert not list(killed.glob("checkpoint*"))


def test_sigterm_saves_and_the_clock_goes_on(tmp_path):
    """A wallclock run that SIGTERM ends: exit code 143, and the budget is what was left of it."""
    data, folder = write_data(tmp_path / "data"), tmp_path / "out"
    given = dict(CHECKPOINT_EVERY_SECONDS=1000, ITERATIONS=100000, MAX_WALLCLOCK_SECONDS=12,
                 GPTQ_RESERVE_SECONDS=0, PREQUANT_ONLY=1)
    process = start(folder, data, **given)
    wait_for(process, folder / "log.txt", r"^5/100000 train_loss")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    step, spent = re.search(r"^checkpoint: step:(\d+) train_time:(\d+)ms$", out, re.M).groups()
    assert f"stopped by SIGTERM after step {step}" in out
    text = finished(start(folder, data, **given))
    assert f"resumed: step:{step} train_time:{spent}ms" in text
    assert re.search(rf"^{int(step) + 1}/100000 train_loss", text, re.M)
    spent = int(re.search(r"^training stopped: train_time: (\d+)ms", text, re.M)[1])
    assert 10000 <= spent < 20000


def test_a_checkpoint_of_another_run_is_refused(program, monkeypatch):
    class Killed(Exception):
        pass

    def kill(self, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(t.Ema, "swap_in", kill)
        with pytest.raises(Killed):
            program(CHECKPOINT_EVERY_SECONDS=0.001)
    path = program.out / "checkpoint.pt"
    assert path.exists()
    code, _, err = program(CHECKPOINT_EVERY_SECONDS=1, MATRIX_LR=0.5)
    assert code == 2 and "of a run with other MATRIX_LR" in err and err.count("\n") == 1
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    code, _, err = program(CHECKPOINT_EVERY_SECONDS=1)
    assert code == 2 and "unreadable checkpoint" in err and err.count("\n") == 1
    path.write_bytes(whole)
    code, out, _ = program(CHECKPOINT_EVERY_SECONDS=1, TTT_ENABLED=0)  # another evaluation
    assert code == 2
    code, out, _ = program(CHECKPOINT_EVERY_SECONDS=1)
    assert code == 0 and re.search(r"^resumed: step:[56] ", out, re.M) and not path.exists()


def rank_of(process, rank, folder):
    """The process id of a rank, as its environment tells it."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            env = (place / "environ").read_text().split("\0")
        except OSError:
            continue
        if f"RANK={rank}" in env and f"ARTIFACT_DIR={folder}" in env:
            return int(place.name)
    raise AssertionError("no such rank")


# The program, with less patience.
HASTY = """
import sys
sys.path.insert(0, {root!r})
import reliability
import train_gpt as t
reliability.BEAT, reliability.SILENT, reliability.UNREACHED = 0.5, 8.0, 5.0
sys.exit(t.main())
"""


@pytest.fixture
def hasty(tmp_path):
    path = tmp_path / "hasty.py"
    path.write_text(HASTY.format(root=str(ROOT)))
    return path


def test_patience():
    """Compiling may starve a rank's thread for tens of seconds; a lost store is found in 120."""
    import reliability

    assert reliability.SILENT == 120 and reliability.UNREACHED + 3 * reliability.BEAT < 120


class Store:
    """A store that answers, fails, or does not return."""

    def __init__(self):
        self.how = "answers"

    def clone(self):
        return self

    def set(self, key, value):
        pass

    def get(self, key):
        return '["elsewhere", 1]'

    def add(self, key, count):
        if self.how == "hangs":
            time.sleep(60)
        if self.how == "fails":
            raise RuntimeError("Broken pipe")
        return int(time.monotonic() * 1000) * (key != "over")  # the other rank always beats


@pytest.mark.parametrize("how", ["fails", "hangs", "answers"])
def test_a_store_that_is_gone_ends_every_rank(monkeypatch, capfd, how):
    import reliability

    store, ended = Store(), []
    monkeypatch.setattr(reliability, "BEAT", 0.05)
    monkeypatch.setattr(reliability, "UNREACHED", 0.5)
    monkeypatch.setattr(reliability.os, "_exit", ended.append)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    line = reliability.Heartbeat(t.Runtime(1, 2, torch.device("cpu")))
    line.start()
    time.sleep(0.8)
    assert not ended
    store.how, began = how, time.monotonic()
    while not ended and time.monotonic() - began < (2 if how == "answers" else 20):
        time.sleep(0.05)
    assert ended == ([] if how == "answers" else [1])
    line.done = True
    said = capfd.readouterr().err
    assert ("rank 1 has not reached torchrun's store" in said) == bool(ended)


@pytest.mark.dist
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_dead_rank_ends_the_run_by_name(tmp_path, hasty, how):
    """Within 60 s, killed or without a sign of life; then a restart goes on from the checkpoint."""
    data, folder = write_data(tmp_path / "data"), tmp_path / "out"
    process = start(folder, data, TORCHRUN, hasty, ITERATIONS=3000, PREQUANT_ONLY=1,
                    TRAIN_LOG_EVERY=5)
    wait_for(process, folder / "log.txt", r"^20/3000 train_loss")
    victim, began = rank_of(process, 1, folder), time.monotonic()
    os.kill(victim, how)
    try:
        _, err = process.communicate(timeout=90)
    finally:
        if how == signal.SIGSTOP and os.path.exists(f"/proc/{victim}"):
            os.kill(victim, signal.SIGKILL)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert f"rank 1 (process {victim} on " in err and "has died" in err


@pytest.mark.dist
def test_torchrun_restarts_from_the_checkpoint(tmp_path):
    data, folder = write_data(tmp_path / "data"), tmp_path / "out"
    process = start(folder, data, (*TORCHRUN, "--max-restarts=1"), ITERATIONS=60, PREQUANT_ONLY=1)
    wait_for(process, folder / "log.txt", r"^20/60 train_loss")
    os.kill(rank_of(process, 1, folder), signal.SIGKILL)
    text = finished(process)
    step = int(re.search(r"^resumed: step:(\d+) ", text, re.M)[1])
    assert 15 <= step < 60 and "60/60 val_loss" in text
    finished(start(tmp_path / "quiet", data, TORCHRUN, ITERATIONS=60, PREQUANT_ONLY=1))
    a, b = weights(folder), weights(tmp_path / "quiet")
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)


def test_a_run_does_not_go_on_with_other_shards(tmp_path):
    """Without a manifest too: another shard of the same size, in whatever place it differs."""
    data = write_data(tmp_path / "data")
    digest = reliability.shard_digest(data)
    assert digest == reliability.shard_digest(write_data(tmp_path / "copy"))
    for path in sorted(data.glob("*.bin")):
        whole = path.read_bytes()
        for at in (1024, 1024 + 2 * 300, len(whole) - 2):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
            assert reliability.shard_digest(data) != digest, (path, at)
        path.write_bytes(whole)
    assert reliability.shard_digest(data) == digest
    process = start(tmp_path / "out", data, ITERATIONS="2000")
    wait_for(process, tmp_path / "out/log.txt", r"^2/2000 ")
    process.kill()
    process.communicate()
    shard = data / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\5\0")
    out, err = start(tmp_path / "out", data, ITERATIONS="2000").communicate(timeout=120)
    assert "resumed" not in out
    assert re.fullmatch("error: .*checkpoint.pt: of a run with other shards; delete it.*\n", err)


def test_a_large_shard_is_sampled_from_end_to_end(tmp_path):
    values = np.arange(3_000_000) % 60
    path = write_shard(tmp_path / "fineweb_train_000000.bin", values)
    digest = reliability.shard_digest(tmp_path)
    for at in (0, 1_499_000, 2_999_999):
        changed = values.copy()
        changed[max(0, at - 50_000):at + 50_000] += 1
        write_shard(path, changed)
        assert reliability.shard_digest(tmp_path) != digest


@pytest.mark.dist
@pytest.mark.parametrize("first, second", [((), TORCHRUN), (TORCHRUN, ())], ids=["1-2", "2-1"])
def test_scoring_does_not_go_on_with_other_ranks(tmp_path, first, second):
    """Who scores what depends on the number of processes: the rest would be scored twice or not."""
    program = tmp_path / "dies.py"
    program.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as t
score, batches = t.score_batch, []
def score_batch(*args):
    batches.append(args)
    if "DIE" in os.environ and len(batches) > 2:
        time.sleep(2 * t.dist.is_initialized())
        os._exit(9)
    return score(*args)
t.score_batch = score_batch
sys.exit(t.main())
""")
    data, folder = write_data(tmp_path / "data"), tmp_path / "out"
    given = dict(ITERATIONS=3, TTT_BATCH_SIZE=2)
    assert start(folder, data, first, program, DIE=1, **given).wait(240) != 0
    process = start(folder, data, second, program, **given)
    out, err = process.communicate(timeout=240)
    assert process.returncode != 0 and "quantized_ttt_phased" not in out
    count = 2 if first else 1
    assert f"error: {folder}: {count} process(es) began to score; go on with as many" in err
    finished(start(folder, data, first, program, **given))
