"""§8 Quantisation: GPTQ against brute force, LQER, and formats that are closed under round trip."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.tools import busy_model, documents, row_of, runtime, tiny


def problem(rows, cols, seed=0, samples=300):
    """A matrix and the Hessian of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g) / math.sqrt(cols) + torch.eye(cols)
    X = torch.randn(samples, cols, generator=g) @ mix * torch.linspace(0.3, 2, cols)
    return torch.randn(rows, cols, generator=g), X.T @ X


def weighted(E, H) -> float:
    """|X E^T|^2 = trace(E H E^T)."""
    E, H = E.double(), H.double()
    return torch.einsum("rc,cd,rd->", E, H, E).item()


def brute_force(W, H, grid, s, fine=(), finer=None, damp=0.01):
    """Optimal brain quantisation without Cholesky: round a column, spread its error optimally over
    the columns left, take it out of the inverse Hessian; in the same order, in float64."""
    W, H, s = W.double().numpy().copy(), H.double().numpy().copy(), s.double().numpy()
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += damp * np.diag(H).mean() * np.eye(len(H))
    Q, inverse, steps = np.zeros_like(W), np.linalg.inv(H), s
    fine_steps = finer and finer.steps(torch.tensor(W).float()).double().numpy()
    for c in np.argsort(-np.diag(H), kind="stable"):
        s, top = (fine_steps, finer.top) if c in fine else (steps, grid.top)
        Q[:, c] = np.clip(np.round(W[:, c] / s), -top, top)
        error = (W[:, c] - Q[:, c] * s) / inverse[c, c]
        W -= error[:, None] * inverse[c]
        inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c, :] = inverse[:, c] = 0
    return Q


@pytest.mark.parametrize(("rows", "cols", "block"), [(5, 12, 128), (7, 40, 16), (3, 33, 8)])
def test_gptq_is_brute_force(rows, cols, block):
    W, H = problem(rows, cols, seed=cols)
    grid = t.Grid(4, 3.0)
    q, s = t.gptq(W, H, grid, block)
    torch.testing.assert_close(s.float(), 3 * W.std(dim=1) / 7, rtol=1e-3, atol=0)
    want = brute_force(W, H, grid, s)
    assert (q.numpy() != want).mean() < 1e-3 + 1 / W.numel()
    assert q.dtype == torch.int8 and s.dtype == torch.float16


def test_protected_columns_and_damping_are_brute_force():
    W, H = problem(7, 40, seed=3)
    grid, finer, columns = t.Grid(4, 3.0), t.Grid(6, 3.0), [8, 9, 10, 11, 24, 25, 26, 27]
    fine = t.spread(torch.tensor([8, 24], dtype=torch.int16), 4, 40)
    assert torch.nonzero(fine)[:, 0].tolist() == columns
    q, s = t.gptq(W, H, grid, damp=0.005, fine=fine, finer=finer)
    want = brute_force(W, H, grid, s, columns, finer, 0.005)
    assert (q.numpy() != want).mean() < 0.01
    assert q[:, fine].abs().max() > 7 >= q[:, ~fine].abs().max()


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_gptq_beats_rounding(bits):
    W, H = problem(48, 96)
    grid = t.Grid(bits, 3.0 if bits < 6 else 8.0)
    q, s = t.gptq(W, H, grid)
    nearest = grid.round(W, s.float()[:, None])
    ours, plain = (weighted(W - t.decode_gptq(x, s), H) for x in (q, nearest))
    assert ours < 0.75 * plain


def test_integers_and_steps_keep_to_the_grid():
    W, H = problem(20, 30)
    for bits, sigmas in ((6, 12.85), (7, 14.0), (2, 2.0), (8, 3.0)):
        q, s = t.gptq(W, H, t.Grid(bits, sigmas))
        top = 2 ** (bits - 1) - 1
        assert q.abs().max() <= top
        assert torch.equal(s, (sigmas * W.std(dim=1) / top).half())


def test_blocks_do_not_matter():
    W, H = problem(16, 70, seed=4)
    first, *others = (t.gptq(W, H, t.Grid(5, 6.0), block)[0] for block in (128, 1, 16, 70))
    assert all((first != q).float().mean() < 2e-3 for q in others)


def test_dead_inputs_are_stored_as_zero():
    W, H = problem(6, 20)
    dead = [0, 7, 19]
    H[dead] = 0
    H[:, dead] = 0
    q, s = t.gptq(W, H, t.Grid(6, 8.0))
    assert not q[:, dead].any()
    q, s = t.gptq(W, torch.zeros(20, 20), t.Grid(6, 8.0))
    assert not q.any() and torch.isfinite(t.decode_gptq(q, s)).all()


def test_constant_rows_stay_finite():
    W, H = problem(4, 20)
    W[1], W[2] = 0.0, 0.7
    q, s = t.gptq(W, H, t.Grid(6, 8.0))
    decoded = t.decode_gptq(q, s)
    assert torch.isfinite(decoded).all() and (s > 0).all()
    assert not decoded[1].any()


def test_a_hessian_that_is_not_finite_is_refused():
    W, H = problem(4, 20)
    H[3, 3] = float("nan")
    with pytest.raises(t.UserError, match="not finite"):
        t.gptq(W, H, t.Grid(6, 8.0))


def test_arguments_are_left_alone():
    W, H = problem(4, 20)
    before = W.clone(), H.clone()
    t.gptq(W, H, t.Grid(6, 8.0))
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_bits_and_clips_by_role():
    cfg = t.Config()
    found = {m.role: t.grid_for(m.role, cfg) for m in t.matrices(cfg)}
    assert found == {
        "embedding": (7, 14.0), "query": (6, 13.0), "key": (6, 13.0), "value": (6, 13.0),
        "attn_out": (6, 13.0), "mlp_up": (6, 11.5), "mlp_down": (6, 11.5)}


# ---- the small formats

def test_rows_round_trip():
    W = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    W *= torch.logspace(-3, 2, 8)[:, None]
    W[3] = 0
    q, s = t.encode_rows(W)
    decoded = t.decode_gptq(q, s)
    assert ((decoded - W).abs() <= 0.51 * s.float()[:, None] + 1e-3 * W.abs()).all()
    assert not decoded[3].any()
    again, steps = t.encode_rows(decoded)
    assert torch.equal(again, q) and torch.equal(steps, s)


GROUPS = [(4, 96, 64), (4, 32, 64), (4, 16, 64), (2, 64, 1)]
RAGGED = [(4, 40, 64), (3, 35, 64), (1, 130, 64), (5, 7, 11)]


@pytest.mark.parametrize(("rows", "cols", "group"), [
    *GROUPS, *RAGGED])
def test_groups_round_trip(rows, cols, group):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    x = (x.flatten() * torch.logspace(-2, 2, x.numel())).view(rows, cols)
    q, s = t.encode_group(x, -8, 7, group)
    assert q.shape == x.shape and q.dtype == torch.int8 and len(s) == -(-x.numel() // group)
    assert q.min() >= -8 and q.max() <= 7
    flat, decoded = x.flatten(), t.decode_group(q, s).flatten()
    for i, value in enumerate(flat):  # no worse than with the scale of the neighbours within reach
        near = flat[max(0, i - group):i + group].abs().max()
        assert (decoded[i] - value).abs() <= 0.51 * near / 7.5, i
    if x.numel() % group == 0:
        torch.testing.assert_close(s.float(), flat.view(-1, group).abs().amax(1) / 7.5, rtol=1e-3,
                                   atol=1e-7)


def lqer_config(**changes):
    return tiny(model_dim=128, num_heads=4, num_kv_heads=4, gate_window=12, rope_dims=4, **changes)


@pytest.mark.parametrize("changes", [{}, dict(lqer_asym_enabled=False, lqer_factor_bits=6)],
                         ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (200, 32)])
def test_lqer_reduces_the_error(shape, changes):
    g = torch.Generator().manual_seed(3)
    low = torch.randn(shape[0], 4, generator=g) @ torch.randn(4, shape[1], generator=g)
    E = low + 0.05 * torch.randn(shape, generator=g)
    piece = t.encode_lqer(E, lqer_config(**changes))
    left = (E - t.decode_lqer(piece)).norm() / E.norm()
    best = torch.linalg.svdvals(E)[4:].norm() / E.norm()
    assert best < left < (0.8 if not changes else 0.2)
    assert piece["lqer_a"].shape == (shape[0], 4) and piece["lqer_b"].shape == (4, shape[1])
    low, high = piece["lqer_a"].min(), piece["lqer_a"].max()
    limits = (-31, 31) if changes else (-2, 1)
    assert low >= limits[0] and high <= limits[1]


def test_asymmetric_scales_are_those_of_the_format():
    E = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    piece = t.encode_lqer(E, lqer_config())
    U, S, Vt = torch.linalg.svd(E)
    A, B = U[:, :4] * S[:4], Vt[:4].flatten().view(-1, 64)
    torch.testing.assert_close(piece["lqer_sa"].float(), A.abs().max()[None] / 1.5, rtol=1e-3,
                               atol=0)
    torch.testing.assert_close(piece["lqer_sb"].float(), B.abs().amax(1) / 7.5, rtol=1e-3, atol=0)
    assert piece["lqer_sa"].dtype == piece["lqer_sb"].dtype == torch.float16


# ---- Hessians

@torch.no_grad()
def test_hessians_are_sums_over_every_pass(tmp_path):
    cfg = tiny()
    model, seen = busy_model(cfg), {}
    hessians = {}
    rows = [row_of(documents([30, 33], seed=s)) for s in (1, 2)]

    def both(name, x):
        seen.setdefault(name, []).append(x.flatten(0, 1).double())
        t.add_hessian(hessians, name, x)

    for row in rows:
        model.hidden(row.ids, row.segments, True, calibration_hook=both)
    assert len(seen["attn.1"]) == 4 and len(seen["attn.0"]) == 2
    for name, inputs in seen.items():
        X = torch.cat(inputs)
        torch.testing.assert_close(hessians[name].double(), X.T @ X, rtol=1e-4, atol=1e-4)

    class Rows:
        def step(self, step):
            assert step in (5, 6)
            return rows

    mean = t.calibrate(model, Rows(), 5, runtime())  # two batches of the same two rows
    for name, H in hessians.items():
        torch.testing.assert_close(mean[name], H, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damp", [1e-9, 1e-7, 0.01])
def test_a_hessian_of_few_inputs_is_damped_until_it_factors(damp):
    """64 inputs of 256 columns: singular; AutoGPTQ and others end in a traceback."""
    X, lines = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), []
    H = X.mT @ X
    dead, order, U = t.factorise(H, damp, lines.append)
    assert torch.isfinite(U).all() and not dead.any()
    raised = re.findall(r"GPTQ_DAMP_FACTOR=\S+ raised to (\S+)", "".join(lines))
    assert len(raised) == (damp < 0.01) and all(1e-9 < float(x) < 1e-3 for x in raised)
    if not raised:  # as it always was
        damped = H + torch.diag((damp * H.diagonal().mean()).expand(256))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
        assert torch.equal(U, torch.linalg.cholesky(inverse, upper=True))


@pytest.mark.parametrize("H", [torch.ones(300, 300), torch.zeros(5, 5), torch.ones(3, 3) * 1e30,
                               torch.ones(3, 3) * 1e-30], ids=["ones", "zeros", "huge", "small"])
def test_any_finite_hessian_factors(H):
    assert torch.isfinite(t.factorise(H, 1e-9).U).all()


@pytest.mark.parametrize("quantiser", ["uniform", "tcq"])
def test_a_run_with_too_little_damping_ends_well(program, quantiser):
    code, out, err = program(
        GPTQ_DAMP_FACTOR=1e-9, GPTQ_CALIBRATION_BATCHES=1, TRAIN_BATCH_TOKENS=64, TRAIN_SEQ_LEN=8,
        ITERATIONS=1, TTT_ENABLED=0, QUANTISER=quantiser, ARTIFACT_BUDGET_BYTES=100_000)
    assert code == 0, err
    assert re.search(r"^warning: GPTQ_DAMP_FACTOR=1e-09 raised to \S+ for", out, re.MULTILINE)


# ---- whole state dicts

def quantised(cfg, seed=0):
    model = busy_model(cfg, seed)
    hessians = {}
    row = row_of(documents([60, 60], seed=4))
    with torch.no_grad():
        model.hidden(row.ids, row.segments, True, calibration_hook=partial(t.add_hessian, hessians))
    return model, t.quantise(model.state_dict(), hessians, cfg)


@pytest.mark.parametrize("changes", [
    {}, dict(lqer_enabled=False), dict(gated_attn_quant_gate=False), dict(lqer_top_k=100),
    dict(lqer_top_k=0), dict(lqer_asym_enabled=False), dict(smear_gate_enabled=False),
    dict(matrix_bits=8, embed_bits=8), dict(asym_logit_rescale=True, gated_xsa=True),
    dict(awq_lite_enabled=True, awq_lite_group_size=8, awq_lite_group_top_k=3)], ids=str)
def test_state_dict_round_trip(changes):
    cfg = tiny(attn_clip_sigmas=4.0, mlp_clip_sigmas=4.0,
               embed_clip_sigmas=4.0, **changes)
    model, tensors = quantised(cfg)
    state = t.dequantise(tensors, model)
    assert state.keys() == model.state_dict().keys()
    corrected = {name.rsplit(".", 1)[0] for name in tensors if ".lqer_" in name}
    assert len(corrected) == (min(cfg.lqer_top_k, 31) if cfg.lqer_enabled else 0)
    for name, W in model.state_dict().items():
        assert state[name].shape == W.shape and state[name].dtype == torch.float32
        kind = t.route([name])[name].store
        gate = kind == "int8_rows" and cfg.gated_attn_quant_gate
        if kind == "gptq":
            assert (state[name] - W).norm() < 0.1 * W.norm(), name
        elif gate:
            assert tensors[f"{name}.q"].dtype == torch.int8
            torch.testing.assert_close(state[name], W, rtol=0, atol=W.abs().max().item() / 250)
        else:
            assert torch.equal(state[name], W.half().float()), name


def test_the_worst_errors_are_corrected():
    cfg = tiny(lqer_top_k=3)
    model, plain = quantised(tiny(lqer_enabled=False))
    _, tensors = quantised(cfg)
    state, errors = t.dequantise(plain, model), {}
    for m in t.matrices(cfg):
        pair = (x[m.bank] if m.index is None else x[m.bank][m.index]
                for x in (model.state_dict(), state))
        first, second = pair
        errors[m.name] = (first - second).norm().item()
    worst = sorted(errors, key=errors.get)[-3:]
    assert {name.rsplit(".", 1)[0] for name in tensors if ".lqer_" in name} == set(worst)


def test_the_columns_that_matter_most_are_protected():
    """The groups by a loop over all matrices' own inputs, in the units of one token."""
    cfg = tiny(awq_lite_enabled=True, awq_lite_group_size=8, awq_lite_group_top_k=5,
               train_batch_tokens=120, lqer_enabled=False)
    model, inputs, hessians = busy_model(cfg), {}, {}

    def calibration_hook(name, x):
        inputs.setdefault(name, []).append(x.flatten(0, -2))
        t.add_hessian(hessians, name, x)

    row = row_of(documents([58, 60], seed=4))  # 120 ids: a batch
    with torch.no_grad():
        model.hidden(row.ids, row.segments, True, calibration_hook=calibration_hook)
    scores = {}
    for m in t.matrices(cfg):
        W = model.state_dict()[m.bank] if m.index is None else model.state_dict()[m.bank][m.index]
        x = torch.cat(inputs[m.source])
        for start in range(0, W.shape[1] - 7, 8):
            scores[m.name, start] = sum(
                x[:, c].square().mean().sqrt().item() * W[:, c].abs().mean().item()
                for c in range(start, start + 8))
    best = sorted(scores, key=scores.get)[-5:]
    tensors = t.quantise(model.state_dict(), hessians, cfg)
    got = [(name.removesuffix(".awq_start"), start) for name in tensors
           if name.endswith(".awq_start") for start in tensors[name].tolist()]
    assert sorted(got) == sorted(best)
    plain = t.dequantise(t.quantise(model.state_dict(), hessians,
                                    tiny(lqer_enabled=False)), model)
    state = t.dequantise(tensors, model)
    for m in t.matrices(cfg):
        for start in (start for name, start in best if name == m.name):
            W, ours, others = (x[m.bank] if m.index is None else x[m.bank][m.index]
                               for x in (model.state_dict(), state, plain))
            part = slice(start, start + 8)
            assert (W - ours)[:, part].norm() < 0.6 * (W - others)[:, part].norm(), m.name


def test_corrections_by_measured_gain():
    """Those that take most off the error, as stored."""
    cfg = tiny(lqer_top_k=2, lqer_gain_select=True)
    model, plain = quantised(tiny(lqer_enabled=False))
    _, every = quantised(tiny(lqer_top_k=100))
    _, tensors = quantised(cfg)
    before, after = (t.dequantise(x, model) for x in (plain, every))
    gain = {}
    for m in t.matrices(cfg):
        W, a, b = (x[m.bank] if m.index is None else x[m.bank][m.index]
                   for x in (model.state_dict(), before, after))
        gain[m.name] = ((W - a).norm() - (W - b).norm()).item()
    inside = [name for name in gain if gain[name] > 0]
    assert {name.rsplit(".", 1)[0] for name in tensors if ".lqer_" in name} == set(
        sorted(inside, key=gain.get)[-2:])


def test_every_matrix_decodes_to_its_own_place():
    """Quantising finely, no matrix may end up in another's row of a bank."""
    cfg = tiny(matrix_bits=8, embed_bits=8, attn_clip_sigmas=4,
               mlp_clip_sigmas=4, embed_clip_sigmas=4)
    model, tensors = quantised(cfg)
    state = t.dequantise(tensors, model)
    for bank in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"):
        for i, W in enumerate(model.state_dict()[bank]):
            assert (state[bank][i] - W).norm() < 0.1 * W.norm(), (bank, i)


def missing(tensors):
    del tensors["blocks.2.attn.c_k.weight.q"]


def missing_scales(tensors):
    del tensors["tok_emb.weight.s"]


def missing_small(tensors):
    del tensors["skip_weights"]


def misshapen(tensors):
    tensors["blocks.2.mlp.fc.weight.q"] = tensors["blocks.2.mlp.fc.weight.q"][:, :-1]


def misshapen_small(tensors):
    tensors["smear_lambda"] = torch.zeros(2)


def half_a_correction(tensors):
    name = next(name for name in tensors if name.endswith(".lqer_b"))
    del tensors[name]


def misshapen_scales(tensors):
    tensors["tok_emb.weight.s"] = tensors["tok_emb.weight.s"][:-1]


def of_another_model(tensors):
    tensors["bigram.weight"] = torch.zeros(3)


@pytest.mark.parametrize(("damage", "piece"), [
    (missing, "blocks.2.attn.c_k.weight"), (missing_scales, "tok_emb.weight"),
    (missing_small, "skip_weights"), (misshapen, "blocks.2.mlp.fc.weight"),
    (misshapen_small, "smear_lambda"),
    (half_a_correction, "lqer"), (misshapen_scales, "tok_emb.weight"),
    (of_another_model, "bigram.weight"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_missing_misshapen_and_foreign_pieces_are_refused(damage, piece):
    model, tensors = quantised(tiny())
    damage(tensors)
    with pytest.raises(t.UserError) as caught:
        t.dequantise(tensors, model)
    assert piece in str(caught.value) and "\n" not in str(caught.value)


# ---- trellis-coded quantisation

def nearest(x, states):
    """The walks nearest to x [runs, L]: k [runs, L]."""
    x = x.T.float()
    padded = F.pad(x, (0, -x.shape[1] % t.LANES)).numpy()
    k = np.empty_like(padded)
    for i in range(0, padded.shape[1], t.LANES):
        part = np.empty((len(x), t.LANES), np.float32)
        t._viterbi(padded[:, i:i + t.LANES].copy(), t.trellis_ways(states), part)
        k[:, i:i + t.LANES] = part
    return torch.from_numpy(k)[:, :x.shape[1]].T


def walk(m, states):
    """k of symbols m."""
    return torch.from_numpy(t.trellis_walk(m.numpy(), t.trellis_bits(states))).int()


def entropy(*samples) -> float:
    """Bits in all, each sample under its own ideal distribution."""
    counts = [torch.unique(x, return_counts=True)[1].double() for x in samples if x.numel()]
    return sum(-(c * (c / c.sum()).log2()).sum().item() for c in counts)


def test_the_trellis_of_8_states_is_the_published_one():
    pairs = ((0, 2), (1, 3), (2, 0), (3, 1), (2, 0), (3, 1), (0, 2), (1, 3))
    for new, cosets in enumerate(t.trellis_ways(8).tolist()):
        for old, coset in zip((new // 2, 4 + new // 2), cosets, strict=True):
            assert new in (2 * old % 8, 2 * old % 8 + 1) and coset == pairs[old][new & 1]


@pytest.mark.parametrize("states", t.TRELLISES)
def test_viterbi_is_exhaustive_search(states):
    """Every walk of 9 steps from state 0, each step with the nearest value that it allows."""
    x = 5 * torch.randn(6, 9, generator=torch.Generator().manual_seed(states))
    low, high = t.TRELLISES[states]
    best = torch.full((6,), math.inf)
    for bits in range(2**9):
        state, cost = 0, torch.zeros(6)
        for step in range(9):
            b = bits >> step & 1
            digit = ((state & low).bit_count() & 1) + 2 * (b ^ (state & high).bit_count() & 1)
            k = 4 * ((x[:, step] - digit) / 4).round() + digit
            cost += (x[:, step] - k).square()
            state = (2 * state + b) % states
        best = torch.minimum(best, cost)
    k = nearest(x, states)
    torch.testing.assert_close((x - k).square().sum(1), best)
    m = (k.T / 2).floor().to(torch.int8)
    assert torch.equal(walk(m, states), k.T)  # it can be followed


@pytest.mark.parametrize("states", t.TRELLISES)
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_any_symbols_decode_and_contexts_follow(states, rows):
    g = torch.Generator().manual_seed(rows)
    m = torch.randint(-128, 128, (rows, 5), generator=g).to(torch.int8)
    parity, (low, high) = walk(m, states) % 2, t.TRELLISES[states]
    for column in range(5):
        state = 0
        for r in range(rows):
            state = state if r % t.TRELLIS_RUN else 0
            assert parity[r, column] == (state & low).bit_count() % 2
            b = m[r, column].item() % 2 ^ (state & high).bit_count() % 2
            state = (2 * state + b) % states


@pytest.mark.parametrize(("states", "bits", "decibel"), [(8, 3.14, -18.3), (32, 3.14, -18.38)])
def test_rate_and_error_on_a_gaussian(states, bits, decibel):
    """Measured elsewhere: step 0.235 gives 3.133 bits at -18.43 dB (8 states, 20,000 samples)."""
    x = torch.randn(t.TRELLIS_RUN * 160, generator=torch.Generator().manual_seed(0))
    shrunk = x / (1 + t.TRELLIS_NOISE * 0.235**2)
    k = nearest(shrunk.view(-1, t.TRELLIS_RUN) / 0.235, states).flatten()
    assert entropy(k[k % 2 == 0], k[k % 2 != 0]) / len(x) < bits
    assert 10 * (x - 0.235 * k).square().mean().log10() < decibel


def trellis_part(W, H, unit):
    """The arguments of gptq_trellis but the last."""
    factor = t.factorise(H)
    return W, factor, *t.trellis_steps(W, factor, torch.full((len(W),), unit))


def decoded(part, m, states=8):
    return t.decode_trellis(m, *part[2:], states)


def test_trellis_with_feedback_is_brute_force():
    """Optimal brain quantisation in float64 whose columns are the trellis' walks."""
    W, H = problem(140, 24, seed=2)
    part = trellis_part(W, H, 0.01)
    m = t.gptq_trellis(*part, 8, block=8)
    w, d = W.double(), part[2].double()[:, None] * (part[3].double() / 8).exp2()
    sigma2 = w.square().mean(1, keepdim=True) * w.square().mean(0) / w.square().mean()
    shrink, K = 1 / (1 + t.TRELLIS_NOISE * d.square() / sigma2), torch.zeros_like(w)
    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(24)
    inverse = torch.linalg.inv(damped)
    for c in part[1].order:
        x = F.pad(w[:, c] * shrink[:, c] / d[:, c], (0, 116)).view(2, 128)
        K[:, c] = nearest(x, 8).flatten()[:140]
        w = w - ((w[:, c] - K[:, c] * d[:, c]) / inverse[c, c])[:, None] * inverse[c]
        inverse = inverse - inverse[:, c, None] * inverse[c] / inverse[c, c]
        inverse[c, :] = inverse[:, c] = 0
    want = weighted(K * d - W, H)
    assert (walk(m, 8) != K).double().mean() < 0.01
    assert weighted(decoded(part, m) - W, H) == pytest.approx(want, rel=0.01)


def test_trellis_beats_the_uniform_grid_at_its_rate():
    W, H = problem(256, 96)
    grid = t.Grid(6, 13.0)
    q, s = t.gptq(W, H, grid)
    step = W.square().mean().sqrt().item() * 0.235
    part = W, t.factorise(H), torch.full((256,), step).half(), torch.zeros(96, dtype=torch.int8)
    m = t.gptq_trellis(*part, 32)
    even = walk(m, 32) % 2 == 0
    bits = entropy(m[even], m[~even]) / m.numel(), entropy(q) / q.numel()
    errors = [weighted(V - W, H) for V in (decoded(part, m, 32), t.decode_gptq(q, s))]
    gain = bits[1] - bits[0] + 0.5 * math.log2(errors[1] / errors[0])
    assert gain > 0.14


@pytest.mark.parametrize("rows", [60, 128, 700])
def test_runs_of_rows_do_not_touch_each_other_and_blocks_do_not_matter(rows):
    W, factor, s, c = trellis_part(*problem(rows, 150, seed=rows), 0.02)
    m = t.gptq_trellis(W, factor, s, c, 8)
    assert torch.equal(m, t.gptq_trellis(W, factor, s, c, 8)) and m.dtype == torch.int8
    assert (m != t.gptq_trellis(W, factor, s, c, 8, block=150)).float().mean() < 2e-2
    assert decoded((W, factor, s, c), m).shape == W.shape


def test_steps_are_finer_where_errors_are_dear_and_hold_every_weight():
    W, H = problem(30, 40)
    part = trellis_part(W, H, 1e-9)
    m = t.gptq_trellis(*part, 8)
    assert (decoded(part, m) - W).abs().max() < 0.2 * W.std()  # the finest steps that int8 allows
    U = part[1].U.diagonal()[part[1].order.argsort()]
    steps = (part[3].float() / 8).exp2()
    ratio = steps / U
    assert ratio.max() / ratio.min() < 1.2


def test_constant_and_dead_weights_stay_finite_with_a_trellis():
    W, H = problem(6, 20)
    W[1], W[2] = 0.0, 0.7
    H[:, 5] = H[5] = 0
    for unit in (1e-12, 0.05, 1e3):
        part = trellis_part(W, H, unit)
        V = decoded(part, t.gptq_trellis(*part, 8))
        assert torch.isfinite(V).all() and not V[:, 5].any()
        assert (V[1].abs() <= 4 * part[2][1].float() * (part[3].float() / 8).exp2()).all()


# ---- sizes that are asked for

def test_water_is_filled_in_reverse():
    spreads, units, counts = [1.0, 0.1, 1e-6], [1.0, 1.0, 1.0], [100, 300, 50]
    level = t.water_level(spreads, units, counts, 1200)
    noise = t.TRELLIS_NOISE * 4**level
    rates = [0.5 * math.log2(1 + x * x / noise) for x in spreads]
    assert sum(n * r for n, r in zip(counts, rates, strict=True)) == pytest.approx(1200, rel=0.03)
    assert rates[0] - rates[1] == pytest.approx(math.log2(10), rel=0.02) and rates[2] < 1e-3
    assert t.water_level(spreads, units, counts, 1210) < level
    dearer = t.water_level(spreads, [1.0, 0.5, 1.0], counts, 1200)
    assert dearer == pytest.approx(level + 0.75, abs=0.03)


@pytest.mark.parametrize("start", [-9.0, -3.0, 4.0])
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3])
def test_the_budget_is_filled_and_never_passed(start, scale):
    """Sizes as of 36 M Gaussian weights, with noise from level to level."""
    tried = []

    def encode(level):
        tried.append(level)
        rate = 0.5 * math.log2(1 + 4**-level / 0.26)
        return bytes(int(36e6 / 8 * rate * scale + 250 * math.sin(1e6 * level)) + 40_000)

    blob = t.fill_budget(encode, 15_960_000, 36_000_000, start)
    assert 15_960_000 - 2048 < len(blob) <= 15_960_000 and len(tried) <= 8


def test_budgets_out_of_reach():
    """Finer than the finest ends at once; shorter than the shortest is that one, without error."""
    calls = []

    def finest(level):
        calls.append(level)
        return bytes(max(1000 - int(100 * max(level, 0)), 500))

    assert len(t.fill_budget(finest, 10**6, 1000, 0.0)) == 1000 and len(calls) == 3
    assert len(t.fill_budget(finest, 400, 1000, 0.0)) == 500 and len(calls) < 30
    assert len(t.fill_budget(finest, -5, 1000, 3.0)) == 500


def smooth(level):
    return 36e6 / 8 * 0.5 * math.log2(1 + 4**-min(max(level, -20.0), 200.0) / 0.26) + 40_000


SIZES = {  # bytes at a level
    "steps of an octave": lambda x: smooth(math.floor(x)),
    "steps of a third, at odd places": lambda x: smooth(math.floor(3 * x + 0.7) / 3),
    "noise of 20 kB": lambda x: smooth(x) + 20_000 * math.sin(1e6 * x),
    "one cliff": lambda x: 30e6 if x < 0.123456 else 1e6,
    "a plateau over the budget": lambda x: max(smooth(x), 16e6 if x < 5 else 15e6),
    "not monotone": lambda x: smooth(x) + 3e5 * math.sin(40 * x),
    "nearly flat": lambda x: 16.2e6 - 1e5 * x,
    "steep": lambda x: 16e6 * 2.0 ** (-30 * (x + 2)),
}


@pytest.mark.parametrize("start", [-6.0, -2.0, 0.0, 3.0])
@pytest.mark.parametrize("kind", SIZES)
def test_a_level_that_fits_is_always_found(kind, start):
    """Whatever the sizes do: never an error, and near the budget where a level is."""
    budget, tried = 15_960_000, {}

    def encode(level):
        tried[level] = 1 + min(int(SIZES[kind](level)), 200_000_000)
        return bytes(tried[level])

    size = len(t.fill_budget(encode, budget, 36_000_000, start))
    assert size == max(x for x in tried.values() if x <= budget)
    assert len(tried) <= 24
    best = max(x for x in (int(SIZES[kind](k / 512)) for k in range(-4096, 4096)) if x <= budget)
    if kind in ("noise of 20 kB", "steep"):
        assert size > 0.99 * budget
    elif kind != "not monotone":
        assert size >= 0.99 * best


class Rows:
    """Four steps of two rows of the same few documents."""

    def __init__(self):
        self.rows = [row_of(documents([60, 64], seed=s)) for s in range(8)]

    def step(self, step):
        return self.rows[2 * step : 2 * step + 2]


def test_sensitivity_tells_what_noise_costs():
    """KL divergence of noise in one matrix at a time, measured, against sensitivity * E H E^T."""
    cfg = tiny()
    model, rows = busy_model(cfg), Rows()
    hessians = t.calibrate(model, rows, 0, runtime())
    found = t.sensitivities(model, rows, 0, hessians, runtime())
    assert found.keys() == {m.name for m in t.matrices(cfg)}
    state = {name: x.clone() for name, x in model.state_dict().items()}

    @torch.no_grad()
    def log_probabilities():
        row = rows.rows[0]
        logits = model.hidden(row.ids, row.segments, True) @ model.tok_emb.weight.T
        return (cfg.logit_softcap * (logits / cfg.logit_softcap).tanh()).log_softmax(-1)

    ref, ratios = log_probabilities(), []
    for m in t.matrices(cfg):
        W = t.matrix_of(state, m)
        E = torch.randn(W.shape, generator=torch.Generator().manual_seed(1)) * 0.02 * W.std()
        new = {name: x.clone() for name, x in state.items()}
        (new[m.bank] if m.index is None else new[m.bank][m.index]).add_(E)
        model.load_state_dict(new)
        lost = (ref.exp() * (ref - log_probabilities())).sum(-1).mean().item()
        told = found[m.name].sqrt()[:, None] * E
        ratios.append(lost / weighted(told, hessians[m.source]))
    spread = torch.tensor(ratios).clamp_min(1e-30).log2()
    assert spread.std() < 0.7


def test_rows_that_matter_less_get_coarser_steps():
    """In the embedding those of tokens that no row holds; in quarters of octaves everywhere."""
    model, rows = busy_model(tiny()), Rows()
    hessians = t.calibrate(model, rows, 0, runtime())
    embedding, = [m for m in t.matrices(model.cfg) if m.role == "embedding"]
    found = t.sensitivities(model, rows, 0, hessians, runtime())[embedding.name]
    seen = torch.zeros(len(found), dtype=bool)
    seen[torch.cat([row.ids.flatten() for row in rows.rows[:4]])] = True
    assert found[seen].mean() > 3 * found[~seen].mean() > 0
    unit = t.trellis_unit(t.factorise(hessians[embedding.source]), found)
    assert torch.equal(4 * unit.log2(), (4 * unit.log2()).round())
    cost = unit.square() * found
    assert cost.max() / cost.min() < 2**0.51


@pytest.mark.parametrize("changes", [{}, dict(trellis_states=8)], ids=str)
def test_trellis_state_dict_round_trip(changes):
    cfg = tiny(quantiser="tcq", **changes)
    model, state, fitted = busy_model(cfg), None, []
    hessians = t.calibrate(model, Rows(), 0, runtime())
    noise = t.sensitivities(model, Rows(), 0, hessians, runtime())
    state = model.state_dict()

    def encode(by_trellis):
        fitted.append(t.quantise(state, hessians, cfg, by_trellis))
        return bytes(sum(int(entropy(x) / 8) for n, x in fitted[-1].items() if n[-2:] == ".q"))

    weights = sum(t.matrix_of(state, m).numel() for m in t.matrices(cfg))
    blob = t.fit_trellis(state, hessians, noise, cfg, 5 * weights // 8, encode, lambda line: None)
    assert 0.9 * 5 * weights / 8 < len(blob) <= 5 * weights / 8
    restored = t.dequantise(fitted[-1], model)
    for m in t.matrices(cfg):  # as the loss sees a row's error
        W, rows = t.matrix_of(state, m), noise[m.name].sqrt()[:, None]
        E = t.matrix_of(restored, m) - W
        assert weighted(rows * E, hessians[m.source]) < 0.2**2 * weighted(
            rows * W, hessians[m.source]), m.name
    for states in ([7], [8, 8], []):
        with pytest.raises(t.UserError, match="trellis"):
            t.dequantise({**fitted[-1], "trellis": torch.tensor(states, dtype=torch.int16)}, model)
    with pytest.raises(t.UserError, match="trellis"):
        t.dequantise({n: x for n, x in fitted[-1].items() if n != "trellis"}, model)

# ---- the same weights on every machine

def test_octaves_are_correctly_rounded():
    """Bit for bit what exact arithmetic gives, for every int8."""
    bits = [0x3F800000, 0x3F8B95C2, 0x3F9837F0, 0x3FA5FED7, 0x3FB504F3, 0x3FC5672A, 0x3FD744FD,
            0x3FEAC0C7]  # of 2^(i/8)
    c = torch.arange(-128, 128).to(torch.int8)
    want = [bits[i & 7] + ((i >> 3) << 23) for i in range(-128, 128)]
    assert t.octaves(c).view(torch.int32).tolist() == want


def test_trellis_and_low_rank_weights_are_elementwise_products(monkeypatch):
    """Decoding asks no library for a sum, an exponential or a product of matrices."""
    m, c = torch.randint(-9, 9, (40, 24), dtype=torch.int8), torch.arange(-12, 12).to(torch.int8)
    s = torch.rand(40).half()
    k = torch.from_numpy(t.trellis_walk(m.numpy(), t.trellis_bits(8)))
    want = k.numpy() * s.float().numpy()[:, None] * np.exp2(c.numpy() / 8).astype(np.float32)
    assert np.array_equal(t.decode_trellis(m, s, c, 8).numpy(), want)
    piece = t.encode_lqer(torch.randn(40, 24), tiny(lqer_rank=3))
    A, B = (t.decode_group(piece[f"lqer_{x}"], piece[f"lqer_s{x}"]).numpy() for x in "ab")
    want = A[:, :1] * B[0] + A[:, 1:2] * B[1] + A[:, 2:] * B[2]
    for name in ("matmul", "mm", "addmm", "einsum", "exp2"):
        monkeypatch.setattr(torch, name, None)
    for name in ("__matmul__", "exp2", "exp"):
        monkeypatch.setattr(torch.Tensor, name, None)
    assert np.array_equal(t.decode_lqer(piece).numpy(), want)
    assert t.decode_trellis(m, s, c, 8).isfinite().all()


class Share:
    """Rows of two steps as rank `rank` of `world` gets them: 8 a step, in order."""

    def __init__(self, rank, world):
        self.rows = [row_of(documents([9, 14], seed=s)) for s in range(16)]
        self.rank, self.each = rank, 8 // world

    def step(self, step):
        first = 8 * step + self.rank * self.each
        return self.rows[first : first + self.each]


def test_sensitivities_are_the_same_in_any_world(monkeypatch):
    """1, 2, 4 and 8 ranks, whose sums are added here by hand."""
    model = busy_model(tiny(num_layers=3, xsa_last_n=3, parallel_start_layer=0, loop_end=1))
    hessians, found = t.calibrate(model, Share(0, 1), 0, runtime(), batches=1), {}
    for world in (1, 2, 4, 8):
        parts = []
        rt = runtime()
        monkeypatch.setattr(rt, "sum_", lambda x, parts=parts: parts.append(x.clone()) or x)
        for rank in range(world):
            t.sensitivities(model, Share(rank, world), 0, hessians, rt)
        monkeypatch.setattr(rt, "sum_", lambda x, parts=parts: sum(parts))
        found[world] = t.sensitivities(model, Share(0, world), 0, hessians, rt)
    for world in (2, 4, 8):
        for name, x in found[1].items():
            torch.testing.assert_close(found[world][name], x, rtol=1e-4, atol=0)
