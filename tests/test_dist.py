"""Several processes: the same global batch gives the same run. gloo on the CPU, under torchrun."""

import json
import math

import pytest
import torch

from tests.tools import NO_GPU, TINY, launch, said, write_data

pytestmark = pytest.mark.dist

def torchrun(world):
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"


TORCHRUN = torchrun(2)

# Two ranks add as one does. Eight ranks' sums are rounded in another order, and the bfloat16 of
# Muon makes more of that from step to step.
WORLDS, ROUNDING = (2, 8), {2: 1e-5, 8: 2e-3}

# The program itself, and what it computes inside, in full precision.
DRIVER = """
import json, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import train_gpt as t

losses, norms, seen = [], [], {{}}
run_step, calibrate, evaluate, scored = t.run_step, t.calibrate, t.evaluate, t.score_phased

def step(*args):
    result = run_step(*args)
    mean = result[:1].double()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    losses.append(mean.item())
    norms.append(result[1].item())
    return result

def hessians(*args):
    seen["hessians"] = calibrate(*args)
    return seen["hessians"]

def score(name, function):
    def call(*args, **named):
        seen[name] = function(*args, **named)
        return seen[name]
    return call

t.run_step, t.calibrate = step, hessians
t.evaluate, t.score_phased = score("val", evaluate), score("ttt", scored)
code = t.main()
if os.environ.get("RANK", "0") == "0" and code == 0:
    torch.save(dict(losses=losses, norms=norms, hessians=seen["hessians"], val=tuple(seen["val"]),
                    ttt=tuple(seen["ttt"])), "seen.pt")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What 1, 2 and 8 processes saw in 20 steps, and their folders."""
    from tests.tools import ROOT

    folder, found = tmp_path_factory.mktemp("dist"), {}
    data = write_data(folder / "data", train_tokens=12000)
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    settings = {**TINY, **NO_GPU, "DATA_PATH": data, "ITERATIONS": 20, "RUN_ID": "log"}
    for world, launcher in ((1, ()), (2, TORCHRUN), (8, torchrun(8))):
        place = folder / str(world)
        place.mkdir()
        run = launch({**settings, "ARTIFACT_DIR": place}, place, folder / "driver.py", launcher)
        assert run.returncode == 0, run.stderr[-3000:]
        found[world] = torch.load(place / "seen.pt", weights_only=True), place, run.stdout
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_losses_of_20_steps(runs, world):
    one, two = runs[1][0], runs[world][0]
    assert len(one["losses"]) == len(two["losses"]) == 20
    worst = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    assert abs(one["losses"][1] - two["losses"][1]) < 1e-5
    assert worst < ROUNDING[world], json.dumps([one["losses"], two["losses"]])
    assert one["losses"][-1] < one["losses"][0] - 1
    for a, b in zip(one["norms"], two["norms"], strict=True):
        assert math.isclose(a, b, rel_tol=10 * ROUNDING[world])


@pytest.mark.parametrize("world", WORLDS)
def test_validation(runs, world):
    (loss, bpb, tokens, size), (loss2, bpb2, tokens2, size2) = (
        runs[n][0]["val"] for n in (1, world))
    assert (tokens, size) == (tokens2, size2)
    assert loss == pytest.approx(loss2, abs=ROUNDING[world])
    assert bpb == pytest.approx(bpb2, abs=ROUNDING[world])


@pytest.mark.parametrize("world", WORLDS)
def test_hessians_are_summed_over_ranks(runs, world):
    one, two = runs[1][0]["hessians"], runs[world][0]["hessians"]
    assert one.keys() == two.keys()
    for name, H in one.items():
        # of weights that went apart for 20 steps: a rank left out would be an eighth
        assert (H - two[name]).norm() < (1e-5 if world == 2 else 0.1) * H.norm(), name


@pytest.mark.parametrize("world", WORLDS)
def test_test_time_training_scores_everything_once(runs, world):
    one, two = (runs[n][0]["ttt"] for n in (1, world))
    assert one[2:] == two[2:] and one[2] == runs[1][0]["val"][2]
    assert abs(one[0] - two[0]) < 0.1


def test_files_and_log_are_written_once(runs):
    for _, place, out in runs.values():
        log = said(place / "log.txt")
        assert log in out and log.count("Total submission size") == 1
        assert {p.name for p in place.iterdir()} == {
            "log.txt", "seen.pt", "final_model.pt", "final_model.int6.ptz", "final_program.py"}


def test_a_world_of_three_is_refused(tmp_path):
    run = launch({**TINY, "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "localhost",
                  "MASTER_PORT": 29999}, tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("error: WORLD_SIZE=3: must divide 8")
    assert run.stderr.count("\n") == 1


def test_what_another_rank_finds_wrong_is_said(tmp_path):
    import numpy as np

    import train_gpt as t
    from tests.tools import write_shard

    data = write_data(tmp_path / "data")
    path = data / "fineweb_train_000000.bin"
    ids = np.array(t.open_shard(path))
    ids[64 * 6 + 5] = 64  # row 6 of step 0: rank 1
    write_shard(path, ids)
    run = launch({**TINY, **NO_GPU, "DATA_PATH": data, "ARTIFACT_DIR": tmp_path / "out"}, tmp_path,
                 launcher=TORCHRUN)
    assert run.returncode != 0
    assert "id 64 is outside the vocabulary" in run.stderr
