"""§2 Runtime: one process is the identity, the world divides 8, rank 0 alone writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import calibrate
import reliability
import train_gpt as t
from tests.tools import ROOT, TINY, launch

CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [0, 3, 5, 6, 7, 9, 16, -1])
def test_a_world_that_does_not_divide_8_is_refused(world):
    with pytest.raises(t.UserError, match=rf"WORLD_SIZE={world}: must divide 8.*1, 2, 4 or 8"):
        t.start_runtime({"WORLD_SIZE": str(world), "RANK": "0"})


ALL = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
       "MASTER_PORT": "29999"}


@pytest.mark.parametrize(("environ", "words"), [
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without LOCAL_RANK"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: not a whole number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=: not a whole number"),
    ({"RANK": "x"}, "RANK=x: not a whole number"), ({"RANK": "1.0"}, "RANK=1.0: not a whole"),
    ({"RANK": "1"}, "RANK=1: must be below WORLD_SIZE=1"),
    ({**ALL, "RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
    ({**ALL, "RANK": "-1"}, "RANK=-1: must be below"),
    ({**ALL, "LOCAL_RANK": "y"}, "LOCAL_RANK=y: not a whole number"),
    ({**ALL, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ({**ALL, "MASTER_PORT": "abc"}, "MASTER_PORT=abc: not a whole number"),
    ({**ALL, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: out of range"),
    ({n: x for n, x in ALL.items() if n != "MASTER_PORT"}, "without MASTER_PORT"),
    ({n: x for n, x in ALL.items() if n != "MASTER_ADDR"}, "without MASTER_ADDR"),
    ({**ALL, "MASTER_ADDR": ""}, "without MASTER_ADDR"),
    ({**ALL, "MASTER_ADDR": "no such host"}, "no other rank at MASTER_ADDR"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_a_launcher_left_behind_is_one_line(environ, words):
    with pytest.raises(t.UserError) as caught:
        t.start_runtime(environ)
    text = str(caught.value)
    assert words in text and "\n" not in text
    assert text.endswith("; start with torchrun, or unset WORLD_SIZE and RANK")


def test_ranks_that_never_come_are_one_line(monkeypatch):
    waits = []

    def rendezvous(*_, timeout):
        waits.append(timeout.total_seconds())
        raise RuntimeError("Timed out waiting for clients. 1/2 clients joined.\nframe #0")
    monkeypatch.setattr(t.dist, "rendezvous", rendezvous)
    with pytest.raises(t.UserError, match="rank 0: no other rank at MASTER_ADDR; start with"):
        t.start_runtime(ALL)
    assert waits == [100]
    wait = reliability.await_store  # rank 1, and torchrun's ranks, do not host the store
    monkeypatch.setattr(reliability, "await_store", lambda *given: wait(*given[:3], 0.3))
    for other in ({"RANK": "1"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}):
        with pytest.raises(t.UserError, match="no other rank at MASTER_ADDR; start with"):
            t.start_runtime({**ALL, **other})
    assert waits == [100]  # refused before PyTorch's own client is asked


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_speaks_where_no_launcher_is(tmp_path, rank):
    """With torchrun the first is enough; a rank that is alone must say what is wrong itself."""
    run = launch({**TINY, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}, tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == ("error: WORLD_SIZE=2 without MASTER_ADDR; start with torchrun, or unset "
                          "WORLD_SIZE and RANK\n")


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_eight_rows_are_shared_out(world):
    assert t.Runtime(0, world, CPU).accumulation * world == 8


def test_alone_is_rank_0_of_1_and_collectives_are_the_identity(rt):
    if not torch.cuda.is_available():
        started = t.start_runtime({})
        assert (started.rank, started.world, started.device) == (0, 1, CPU)
    x = torch.arange(3.0)
    assert rt.sum_(x) is x
    assert x.tolist() == [0, 1, 2]
    assert rt.sync_clock(1.25) == 1.25
    rt.barrier()
    assert rt.dtype == torch.float32


def test_the_log_is_console_and_file_by_rank_0_alone(tmp_path, capsys):
    for rank in (0, 1):
        rt = t.Runtime(rank, 8, CPU)
        rt.open_log(tmp_path / str(rank) / "run.txt")
        rt.log("one: ü")
        rt.log("two")
    assert capsys.readouterr().out == "one: ü\ntwo\n"
    assert (tmp_path / "0" / "run.txt").read_text() == "one: ü\ntwo\n"
    assert not (tmp_path / "1").exists()


def test_generators_repeat(rt):
    a, b = (torch.rand(5, generator=rt.generator(7)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.rand(5, generator=rt.generator(8)))


def test_the_bar_draws_on_terminals_only():
    code = ("import torch, train_gpt as t\n"
            "bar = t.progress_bar(3, t.Runtime(0, 1, torch.device('cpu')), 'train', 'step')\n"
            "bar.update(); bar.update(2); bar.close()\n")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120,
                         check=True)
    assert run.stdout == run.stderr == b""


def test_a_graph_cache_that_does_not_record_just_calls():
    graph_cache = t.CudaGraphCache(False)
    assert [graph_cache("key", lambda x: x + 1, [torch.tensor(n)]).item() for n in (1, 2)] == [2, 3]
    assert not graph_cache.graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
def test_a_recorded_function_is_replayed_on_new_inputs():
    graph_cache, calls = t.CudaGraphCache(True), []
    for n in range(4):
        x = torch.full((3,), float(n), device="cuda")
        result = graph_cache("key", lambda x: calls.append(1) or x * 2, [x])
        assert result.tolist() == [2.0 * n] * 3
    assert len(calls) == 2  # at once, and while recording


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
def test_a_sealed_graph_cache_records_nothing_more():
    graph_cache, x = t.CudaGraphCache(True), torch.ones(3, device="cuda")
    for _ in range(3):
        graph_cache("known", lambda x: x * 2, [x])
    graph_cache("met once", lambda x: x * 3, [x])
    graph_cache.sealed, graphs = True, calibrate.graphs(graph_cache)
    for key, factor in (("known", 2), ("met once", 3), ("new", 4)) * 3:
        assert graph_cache(key, lambda x, n=factor: x * n, [x]).tolist() == [factor] * 3
    assert calibrate.graphs(graph_cache) == graphs and graph_cache.loose == 6


def test_processors_are_those_that_this_process_may_use(monkeypatch, tmp_path):
    """The affinity's, and no more than the quota of its cgroup."""
    from caseops import processors as tools

    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
        patch.setattr(sys, "platform", "linux")
        read = Path.read_text
        for text, want in (("max 100000", 6), ("200000 100000", 2), ("250000 100000", 2),
                           ("50000 100000", 1), ("6400000 100000", 6), ("", 6)):
            patch.setattr(Path, "read_text", lambda path, *a, text=text, **k: (
                text if path.name == "cpu.max" else read(path, *a, **k)))
            assert tools.processors() == want
    assert 1 <= tools.processors() <= os.cpu_count()


def test_nobody_counts_the_machines_processors():
    paths = [path for part in ("", "caseops/", "bench/", "tests/") for path in ROOT.glob(
        f"{part}*.py")]
    users = [path.name for path in paths if "cpu_count()" in path.read_text()]
    assert sorted(users) == ["processors.py", "test_02_runtime.py"]
