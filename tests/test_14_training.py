"""§14 Training: schedules as tables, repeatable runs, and what is left after a run that fails."""

import errno
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import calibrate
import train_gpt as t
from tests.tools import ROOT, busy_model, runtime, tiny

# ---- schedules

@pytest.mark.parametrize(("f", "want"), [
    (0.0, 1.0), (0.149, 1.0), (0.15, 1.0), (0.575, 0.5), (0.9, 0.1 / 0.85), (0.95, 0.1),
    (1.0, 0.1),
])
def test_learning_rate(f, want):
    assert math.isclose(t.lr_factor(f, t.Config()), want, rel_tol=1e-12)


def test_learning_rate_without_warm_down_and_without_floor():
    assert t.lr_factor(1.0, t.Config(warmdown_frac=0.0)) == 1.0
    assert t.lr_factor(1.0, t.Config(min_lr=0.0)) == 0.0
    assert t.lr_factor(0.25, t.Config(warmdown_frac=1.0)) == 0.75


@pytest.mark.parametrize(("step", "want"), [
    (0, 0.92), (750, 0.945), (1500, 0.97), (10**6, 0.97)])
def test_momentum(step, want):
    cfg = t.Config(muon_momentum_warmup_frac=0.0)
    assert math.isclose(t.rates(step, 0.0, 0, cfg)[1], want, rel_tol=1e-12)
    assert t.rates(step, 0.0, 0, replace(cfg, muon_momentum_warmup_steps=0))[1] == (
        0.92 if step == 0 else 0.97)


RECORD = 4931  # steps of #1855


@pytest.mark.parametrize("step", [0, 1, 100, 750, 1499, 1500, 3000, 4930])
def test_fractions_are_the_records_constants_at_its_steps(step):
    """And at any other number of steps they keep their share of the run."""
    by_part, by_count = t.Config(), t.Config.from_env({"PRESET": "pr1855"}, ROOT)
    assert not (by_count.ema_horizon_frac or by_count.muon_momentum_warmup_frac)
    by_count = replace(by_count, seq_change_warmup_steps=32)
    f, factor = step / RECORD, t.lr_factor(step / RECORD, by_part)
    for times in (1, 10):
        at = step * times
        ours, record = (t.rates(k, f, k - 7 * n, cfg) for k, n, cfg in (
            (at, times, by_part), (step, 1, by_count)))
        assert ours[1] == pytest.approx(record[1], abs=1e-5)
        horizon = 1 / (1 - ours[2])
        assert horizon == pytest.approx(max(2, step and times / 0.0035), rel=1e-3)
        assert record[0] == pytest.approx(factor * 8 / 32) and record[2] == 0.9965
        if step > 0:  # before the first nobody knows how many there will be
            assert ours[0] == pytest.approx(factor * (7 * times + 1) / (32 * times), rel=1e-3)


def test_a_count_of_steps_makes_the_fraction_give_way(tmp_path):
    """Wherever it is given: else it would be read and not used."""
    assert t.Config.from_env({"EMA_DECAY": "0.98"}).ema_horizon_frac == 0
    assert t.Config.from_env({"EMA_DECAY": "0.98"}).muon_momentum_warmup_frac > 0
    both = t.Config.from_env({"EMA_DECAY": "0.98", "EMA_HORIZON_FRAC": "0.1"})
    assert both.ema_horizon_frac == 0.1
    preset = tmp_path / "mine.env"
    preset.write_text(f"PRESET={ROOT / 'presets/best.env'}\nMUON_MOMENTUM_WARMUP_STEPS=60\n")
    cfg = t.Config.from_env({"PRESET": str(preset)})
    assert cfg.muon_momentum_warmup_frac == 0 and cfg.ema_horizon_frac > 0
    again = t.Config.from_env(t.changed(cfg))
    assert again == cfg


@pytest.mark.parametrize(("step", "seconds", "changes", "want"), [
    (5, 299.75, {}, 0.5), (5, 599.5, {}, 1.0), (5, 700.0, {}, 1.0), (0, 0.0, {}, 0.0),
    (5, 50.0, dict(max_wallclock_seconds=0.0, iterations=20), 0.25),
    (5, 50.0, dict(gptq_reserve_seconds=500.0), 0.5),
])
def test_fraction(step, seconds, changes, want):
    assert t.progress(step, seconds, t.Config(**{"gptq_reserve_seconds": 0.5, **changes})) == want


@pytest.mark.parametrize(("f", "changes", "want"), [
    (0.349, {}, False), (0.35, {}, True), (1.0, {}, True), (1.0, dict(num_loops=0), False),
    (0.0, dict(enable_looping_at=0.0), True)])
def test_loop(f, changes, want):
    assert t.is_looped(f, t.Config(**changes)) is want


SCHEDULE = "1024@0.100,2048@0.700,3072@1.000"


@pytest.mark.parametrize(("f", "schedule", "want"), [
    (0.0, SCHEDULE, 1024), (0.1, SCHEDULE, 1024), (0.1001, SCHEDULE, 2048), (0.7, SCHEDULE, 2048),
    (0.71, SCHEDULE, 3072), (1.0, SCHEDULE, 3072), (0.0, "", 3072), (1.0, "", 3072)])
def test_stage(f, schedule, want):
    cfg = t.Config(train_seq_len=3072, train_seq_schedule=schedule).checked()
    assert t.stage_length(f, cfg) == want


@pytest.mark.parametrize(("schedule", "changes", "want"), [
    (SCHEDULE, {}, [(1024, False), (2048, False), (2048, True), (3072, True)]),
    ("", {}, [(3072, False), (3072, True)]), ("", dict(num_loops=0), [(3072, False)]),
    ("1024@0.5,3072@1", dict(enable_looping_at=0.5), [(1024, False), (3072, True)]),
    ("3072@0.5,1024@1", dict(enable_looping_at=0.0), [(3072, True), (1024, True)])])
def test_every_shape_of_a_run_is_warmed_up(schedule, changes, want):
    """The shapes by walking through the fractions."""
    cfg = t.Config(train_seq_len=3072, train_seq_schedule=schedule, **changes).checked()
    met = dict.fromkeys((t.stage_length(k / 997, cfg), t.is_looped(k / 997, cfg))
                        for k in range(1, 997))
    assert t.train_shapes(cfg) == list(met) == want


@pytest.mark.parametrize("text", ["1024", "1024@x", "1024@0.5", "2048@1,1024@0.5", "4096@1",
                                  "1@0.5,3072@1", "3072@0.5,3072@0.5,3072@1"])
def test_bad_schedules_are_refused(text):
    with pytest.raises(t.UserError, match="TRAIN_SEQ"):
        t.Config.from_env({"TRAIN_SEQ_LEN": "3072", "TRAIN_SEQ_SCHEDULE": text})


# ---- runs

def losses(out):
    return re.findall(r"^\d+/\d+ train_loss: (\S+) ", out, re.MULTILINE)


def test_same_seed_same_run_other_seed_another(program):
    runs = [program(PREQUANT_ONLY=1, TRAIN_LOG_EVERY=1, SEED=seed) for seed in (7, 7, 8)]
    assert [code for code, _, _ in runs] == [0, 0, 0]
    timed = (r"^(step times|data wait).*$|^{.*}$|"
             r"(train_time:|tok/s:|seconds:|left:|eval_time:|allocated:|sha256:|seed:) ?\S+")
    first, again, other = (re.sub(timed, "", out, flags=re.MULTILINE) for _, out, _ in runs)
    assert first == again != other
    assert len(losses(first)) == 6
    weights = [torch.load(program.out / "final_model.pt", weights_only=True)]
    program(PREQUANT_ONLY=1, SEED=8)
    weights.append(torch.load(program.out / "final_model.pt", weights_only=True))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_training_learns_and_saves_the_average(program, monkeypatch):
    raw, steps = {}, []
    swap_in, run_step = t.Ema.swap_in, t.run_step

    def step(forward, rows, looped, optimisers, *rest):
        if not steps:
            steps.append([w.detach().clone() for w in forward.parameters()])
        result = run_step(forward, rows, looped, optimisers, *rest)
        steps.append([w.detach().clone() for w in forward.parameters()])
        return result

    def spy(self):
        raw.update(weights=[w.detach().clone() for w in self.weights])
        swap_in(self)

    monkeypatch.setattr(t.Ema, "swap_in", spy)
    monkeypatch.setattr(t, "run_step", step)
    code, out, _ = program(PREQUANT_ONLY=1, ITERATIONS=12, TRAIN_LOG_EVERY=12)
    assert code == 0
    found = [float(x) for x in losses(out)]
    assert len(found) == 6 and found[-1] < found[0] - 0.8  # steps 1 to 5, and 12
    saved = torch.load(program.out / "final_model.pt", weights_only=True)
    names = [name for name, _ in t.GPT(tiny(), t.attend_ref).named_parameters()]
    assert list(saved) == names
    for i, (name, weight) in enumerate(zip(names, raw["weights"], strict=True)):
        want = steps[0][i]
        for step_ in steps[1:]:
            want = 0.5 * want + 0.5 * step_[i]
        torch.testing.assert_close(saved[name], want, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, steps[-1][i]) and not torch.equal(saved[name], weight)
    assert re.search(r"^layer_loop:on step:5 frac:0\.417$", out, re.MULTILINE)
    assert not (program.out / "final_model.int6.ptz").exists()
    assert "diagnostic quantized" not in out


def test_the_wallclock_ends_training(program):
    code, out, _ = program(PREQUANT_ONLY=1, ITERATIONS=100000, MAX_WALLCLOCK_SECONDS=2,
                           GPTQ_RESERVE_SECONDS=1, TRAIN_LOG_EVERY=100)
    assert code == 0
    spent, step = re.search(r"training stopped: train_time: (\d+)ms step: (\d+)/100000",
                            out).groups()
    assert 400 < int(spent) < 2000 and int(step) > 1  # a busy machine's steps are long
    assert re.search(rf"^{step}/100000 val_loss: ", out, re.MULTILINE)
    assert "layer_loop:on" in out


@pytest.mark.parametrize("quantiser", ["uniform", "tcq"])
def test_calibration_is_part_of_the_budget(program, quantiser):
    code, out, _ = program(ITERATIONS=100000, MAX_WALLCLOCK_SECONDS=6, TTT_ENABLED=0,
                           GPTQ_RESERVE_SECONDS=-1, QUANTISER=quantiser, TRAIN_LOG_EVERY=1000)
    assert code == 0
    kept = float(re.search(r"calibration: (\S+)s of training reserved", out)[1])
    spent = int(re.search(r"training stopped: train_time: (\d+)ms", out)[1]) / 1000
    assert 0.5 < kept < 4 and 4.8 - kept < spent < 7 - kept


def test_calibration_that_took_longer_than_reserved_is_said_before_quantisation(
        program, monkeypatch):
    """Of a resumed run, too: the seconds that training took are in its checkpoint."""
    class Killed(Exception):
        pass

    def kill(*args):
        raise Killed

    kept = dict(ITERATIONS=3, MAX_WALLCLOCK_SECONDS=600, GPTQ_RESERVE_SECONDS=0, TTT_ENABLED=0,
                CHECKPOINT_EVERY_SECONDS=100)
    assert "longer than reserved" not in program(**kept)[1]
    late = t.run_steps

    def spend(*args):
        found = late(*args)
        args[-1]["seconds"] = 600.0
        return found

    with monkeypatch.context() as patch:
        patch.setattr(t, "run_steps", spend)
        code, out, _ = program(**kept)
        assert code == 0
        patch.setattr(t, "calibrate", kill)
        with pytest.raises(Killed):
            program(**kept)
    line = "warning: calibration took longer than reserved: "
    assert 0 < out.index(line) < out.index("quantisation ")
    code, out, _ = program(**kept)
    assert code == 0 and "resumed: training had ended step:3" in out and line in out


def test_what_held_the_steps_up_is_logged(program):
    import gc
    import json

    code, out, err = program(PREQUANT_ONLY=1, ITERATIONS=12, TRAIN_SEQ_SCHEDULE="8@0.5,32@1",
                             ENABLE_LOOPING_AT=0.75)
    assert code == 0, err
    found = re.findall(r"^step times from step (\d+): (.+) ms$", out, re.MULTILINE)
    assert [(int(step), len(times.split())) for step, times in found] == [(0, 5), (6, 5), (8, 4)]
    assert all(float(x) > 0 for _, times in found for x in times.split())
    waited = float(re.search(r"^data wait: (\S+)s$", out, re.MULTILINE)[1])
    assert re.search(r"^graphs recorded in the clock: 0\b", out, re.MULTILINE)
    last = (program.out / "log.txt").read_text().splitlines()[-1]
    record = json.loads(last)["result"]["training"]
    assert record["steps"] == 12 and record["graphs"] == 0
    assert record["data_wait_seconds"] == pytest.approx(waited, abs=0.05)
    assert gc.isenabled()


def test_rows_of_any_documents_have_one_shape():
    """Lengths as in FineWeb, and far from it: what was recorded serves them all."""
    rng, shapes = np.random.default_rng(0), set()
    for mean in (400, 957, 5000, 10**6):
        for longest in (1024, 3072):
            ids = rng.integers(2, 64, 98305)
            lengths = rng.lognormal(math.log(mean) - 0.5, 1.0, 1000).astype(int) + 2
            begins = lengths.cumsum()
            ids[begins[begins < len(ids)]] = t.BOS
            row = t.make_row(ids[:-1], ids[1:], longest, torch.device("cpu"))
            shapes.add((longest, tuple(row.segments.cu_seqlens.shape)))
            cu_seqlens = row.segments.cu_seqlens
            assert cu_seqlens[-1] == 98304 and (cu_seqlens.diff() >= 0).all()
    assert shapes == {(1024, (352,)), (3072, (288,))}
    dense = t.make_row(ids[:-1] * 0 + t.BOS, ids[1:], 3072, torch.device("cpu"))
    assert len(dense.segments.cu_seqlens) > 98304 and len(dense.segments.cu_seqlens) % 288 == 0


def test_a_budget_that_calibration_would_eat_is_refused(program):
    code, _, err = program(MAX_WALLCLOCK_SECONDS=0.001, ITERATIONS=3)
    assert code == 2 and "lower GPTQ_CALIBRATION_BATCHES" in err


def test_a_schedule_cuts_rows_and_raises_the_rate_anew(program, monkeypatch):
    seen, run_step = [], t.run_step

    def spy(forward, rows, looped, optimisers, lr, momentum):
        seen.append((rows[0].segments.max_len, int(rows[0].ids[0, 5]), lr))
        return run_step(forward, rows, looped, optimisers, lr, momentum)

    monkeypatch.setattr(t, "run_step", spy)
    plain = {"PREQUANT_ONLY": 1, "ITERATIONS": 10, "WARMDOWN_FRAC": 0}
    assert program(**plain)[0] == 0
    before, seen[:] = list(seen), []
    code, out, err = program(**plain, TRAIN_SEQ_SCHEDULE="8@0.25,16@0.6,32@1",
                             SEQ_CHANGE_WARMUP_STEPS=4)
    assert code == 0, err
    # f = step / 10: stages end with the last step whose f is not past them
    assert [longest for longest, _, _ in seen] == [8] * 3 + [16] * 4 + [32] * 3
    assert [token for _, token, _ in seen] == [token for _, token, _ in before]  # the same text
    assert [lr for _, _, lr in seen] == [1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25, 0.5, 0.75]
    assert re.findall(r"^growth_stage:seq_len:(\d+) progress:(\S+) step:(\d+)", out,
                      re.MULTILINE) == [("16", "0.300", "3"), ("32", "0.700", "7")]


def test_a_forced_stop_disables_the_clock(program):
    code, out, _ = program(PREQUANT_ONLY=1, FORCE_STOP_STEP=3, ITERATIONS=50,
                           MAX_WALLCLOCK_SECONDS=0.001, GPTQ_RESERVE_SECONDS=0)
    assert code == 0
    assert "step: 3/50" in out


def test_evaluations_in_between(program):
    code, out, _ = program(PREQUANT_ONLY=1, VAL_LOSS_EVERY=2)
    assert code == 0
    assert re.findall(r"^(\d+)/6 val_loss: \S+ val_bpb: \S+$", out, re.MULTILINE) == [
        "2", "4", "6"]
    alone = program(PREQUANT_ONLY=1)[1]
    assert losses(out) == losses(alone)  # looking changes nothing


def test_quantize_only_starts_from_the_saved_model(program):
    code, out, _ = program(TTT_ENABLED=0)
    assert code == 0
    saved = (program.out / "final_model.pt").read_bytes()
    artifact = (program.out / "final_model.int6.ptz").read_bytes()
    code, again, err = program(QUANTIZE_ONLY=1, TTT_ENABLED=0, LQER_ENABLED=0)
    assert (code, err) == (0, "")
    line = r"diagnostic pre-quantization post-ema val_loss:\S+ val_bpb:\S+"
    assert re.findall(line, again) == re.findall(line, out) != []
    assert not losses(again)
    assert (program.out / "final_model.pt").read_bytes() == saved
    assert (program.out / "final_model.int6.ptz").read_bytes() != artifact
    assert "diagnostic quantized" in again and "quantized_ttt_phased" not in again


# ---- what fails

@pytest.mark.parametrize("bad", [4, 9])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(program, monkeypatch, bad):
    run_step, calls = t.run_step, []

    def broken(*args):
        calls.append(run_step(*args))
        return calls[-1] * (math.nan if len(calls) == bad else 1)

    averages, update = [], t.Ema.update

    def spy(self):
        update(self)
        averages.append([w.clone() for w in self.average])

    monkeypatch.setattr(t, "run_step", broken)
    monkeypatch.setattr(t.Ema, "update", spy)
    code, out, err = program(ITERATIONS=12)
    assert code == 2
    assert err.count("\n") == 1 and f"step {bad}: loss nan" in err
    kept = int(re.search(r"last_good\.pt holds the average of step (\d+)", err)[1])
    assert kept == bad - 1 and str(program.out / "last_good.pt") in err
    state = torch.load(program.out / "last_good.pt", weights_only=True)
    assert all(map(torch.equal, state.values(), averages[kept - 1]))
    model = busy_model(tiny())
    t.load_state(model, program.out / "last_good.pt")
    assert not (program.out / "final_model.pt").exists()
    assert f"\n{bad}/12 train_loss" not in out


def test_a_run_that_really_diverges_stops(program):
    code, out, err = program(SCALAR_LR=1e30, GRAD_CLIP_NORM=0)
    assert code == 2
    assert re.fullmatch(r"error: step [23]: loss \S+, gradient norm \S+: not finite; .*lower "
                        r"MATRIX_LR.*\n", err)
    assert "quantized" not in out.partition("devices:")[2]


def test_a_full_disk_leaves_old_files_whole(program, monkeypatch):
    assert program(ITERATIONS=2, TTT_ENABLED=0)[0] == 0
    old = {p.name: p.read_bytes() for p in program.out.iterdir() if p.name != "log.txt"}
    assert old.keys() == {"final_model.pt", "final_model.int6.ptz", "final_program.py"}

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for settings in ({"SEED": 5}, {"QUANTIZE_ONLY": 1, "MATRIX_BITS": 5}):
        code, _, err = program(ITERATIONS=2, TTT_ENABLED=0, **settings)
        assert code == 2
        assert err.count("\n") == 1 and "No space left on device" in err and str(program.out) in err
        assert {p.name: p.read_bytes() for p in program.out.iterdir()
                if p.name != "log.txt"} == old


def save(path, state):
    torch.save(state, path)
    return path


def refused(path):
    with pytest.raises(t.UserError) as caught:
        t.load_state(t.GPT(tiny(), t.attend_ref), path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_states_that_do_not_fit_are_refused(tmp_path):
    state, path = t.GPT(tiny(), t.attend_ref).state_dict(), tmp_path / "final_model.pt"
    assert "no such file" in refused(path)
    for size in (10, 1000, 100000):
        whole = save(path, state).read_bytes()
        path.write_bytes(whole[:size])
        assert "not a readable state dict" in refused(path)
    assert "skip_gates: file has None" in refused(
        save(path, {n: w for n, w in state.items() if n != "skip_gates"}))
    assert "qo_bank: file has [10, 32, 31]" in refused(
        save(path, {**state, "qo_bank": torch.zeros(10, 32, 31)}))
    t.load_state(t.GPT(tiny(), t.attend_ref), save(path, state))


@pytest.mark.parametrize(("off", "unused"), [
    (dict(parallel_start_layer=0), "parallel_post_lambdas, parallel_resid_lambdas"),
    (dict(smear_gate_enabled=False), "smear_gate.weight, smear_lambda"),
    (dict(skip_gates_enabled=False), "skip_gates"),
    (dict(sparse_attn_gate_enabled=False), "blocks.0.attn.attn_gate_w, blocks.1."),
    ({}, "nothing")], ids=str)
def test_what_the_settings_do_not_use_is_left_out(tmp_path, off, unused):
    """A file with all of #1855's parts, for a model with one of them off."""
    whole, lines = busy_model(tiny()).state_dict(), []
    model = t.GPT(tiny(**off), t.attend_ref)
    t.load_state(model, save(tmp_path / "final_model.pt", whole), lines.append)
    assert f"loaded; not used with these settings: {unused}" in lines[0]
    for name, p in model.state_dict().items():
        assert torch.equal(p, whole[name]), name


def test_training_starts_from_the_weights_of_a_file(program):
    """INIT_FROM: the first loss of the second run is the last of the first, not a new model's."""
    first = program(PREQUANT_ONLY=1, ITERATIONS=12, EMA_DECAY=0, TRAIN_LOG_EVERY=1)[1]
    path = program.out / "final_model.pt"
    code, out, err = program(PREQUANT_ONLY=1, ITERATIONS=1, INIT_FROM=path,
                             ARTIFACT_DIR=program.out / "more")
    assert code == 0, err
    assert f"{path}: loaded; not used with these settings: nothing" in out
    losses = [float(x) for x in re.findall(r"train_loss: (\S+)", first + out)]
    assert losses[-1] < losses[0] - 0.5
    assert "no such file" in program(INIT_FROM="/nowhere/final_model.pt")[2]


@pytest.mark.parametrize("content", ["empty", "cut", "list", "tensor", "number"])
def test_other_torch_files_are_refused(tmp_path, content):
    state, path = t.GPT(tiny(), t.attend_ref).state_dict(), tmp_path / "final_model.pt"
    if content in ("empty", "cut"):
        path.write_bytes(b"" if content == "empty" else save(path, state).read_bytes()[:20000])
    else:
        save(path, {"list": [1, 2], "tensor": torch.zeros(3),
                    "number": {**state, "qo_bank": 5}}[content])
    refused(path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    refused(save(tmp_path / "final_model.pt", {"qo_bank": Evil()}))
    assert not (tmp_path / "ran").exists()


def test_micro_batches_add_up_to_the_mean():
    """A step's gradient is that of the mean over its rows, however they are split."""
    from tests.tools import documents, row_of

    cfg = tiny(grad_clip_norm=0.0)
    rows = [row_of(documents([40, 22], seed=s)) for s in range(4)]
    model, seen = busy_model(cfg), []
    optimisers = t.Optimisers(model, cfg, runtime())
    optimisers.step = lambda lr, momentum: seen.extend(
        p.grad.clone() for p in model.parameters()) or torch.tensor(3.0)
    loss, norm = t.run_step(model, rows, True, optimisers, 1.0, 0.9).tolist()
    model.zero_grad()
    want = torch.stack([model(r.ids, r.targets, r.segments, True).mean() for r in rows]).mean()
    want.backward()
    assert math.isclose(loss, want.item(), rel_tol=1e-6) and norm == 3.0
    for g, p in zip(seen, model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-7)


def test_rows_side_by_side_are_the_same_rows():
    from tests.tools import documents, row_of

    rows = [row_of(documents([40, 22], seed=s)) for s in range(4)]
    model, tokens = busy_model(tiny()), rows[0].ids.shape[1]
    for most, count in ((0, 4), (3 * tokens, 2), (4 * tokens, 1), (99 * tokens, 1)):
        together = t.batched(rows, most)
        assert len(together) == count
        losses = torch.cat([model(r.ids, r.targets, r.segments, True) for r in together])
        alone = torch.cat([model(r.ids, r.targets, r.segments, True) for r in rows])
        torch.testing.assert_close(losses, alone)
        grads = (torch.autograd.grad(x.mean(), [*model.parameters()]) for x in (losses, alone))
        for ours, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_a_recorded_step_is_the_eager_step_over_several_keys_in_turn():
    """Stages and loop change to and fro, so that graphs that share memory follow each other; after
    the warm-up nothing is recorded, and a row of more documents than there is room for runs."""
    rt = t.Runtime(0, 1, torch.device("cuda"))
    cfg = tiny(model_dim=128, train_batch_tokens=8 * 512, train_seq_len=256, warmup_steps=3,
               train_seq_schedule="64@0.5,256@1", seq_change_warmup_steps=0)
    rng, ends, losses = np.random.default_rng(0), [], []
    ids = [rng.integers(2, 64, 513) for _ in range(8)]
    for x in ids:
        x[rng.random(513) < 0.02] = t.BOS
    turns = [(64, False), (64, True), (256, True), (64, False), (256, True), (256, True)] * 2
    for compiled in (False, True):
        attention = t.choose_attention(rt.device, rt.dtype)
        model = t.make_model(replace(cfg, seed=5), rt, attention)
        with model.compiled(compiled):
            optimisers = t.Optimisers(model, replace(cfg, compile=compiled), rt)
            if compiled:
                t.warm_up(model, optimisers, cfg, rt)
                graphs = calibrate.graphs(optimisers.graph_cache)
            found = []
            for k, (longest, looped) in enumerate(turns):
                step = ids[k % 8:] + ids[:k % 8]  # as many rows as the warm-up ran at once
                rows = [t.make_row(x[:-1], x[1:], longest, rt.device) for x in step]
                found.append(t.run_step(model, rows, looped, optimisers, 0.5, 0.95).tolist())
            if compiled:
                assert calibrate.graphs(optimisers.graph_cache) == graphs
                assert optimisers.graph_cache.loose == 0  # every step was a replay
            dense = [t.make_row(x[:-1] * 0 + t.BOS, x[1:], 64, rt.device) for x in ids]
            found.append(t.run_step(model, dense, True, optimisers, 0.5, 0.95).tolist())
            assert optimisers.graph_cache.loose == compiled
            losses.append(torch.tensor(found))
            ends.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)
    for eager, recorded in zip(*ends, strict=True):
        assert (eager - recorded).norm() <= 0.05 * eager.norm() + 1e-3
