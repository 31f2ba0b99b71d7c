"""§8 Quantisation: GPTQ against brute force, LQER, and formats that are closed under round trip."""

import math

import numpy as np
import pytest
import torch

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
    assert t.grid_for("another", cfg) == (6, 12.85)


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
    hessians = t.Hessians()
    rows = [row_of(documents([30, 33], seed=s)) for s in (1, 2)]

    def both(name, x):
        seen.setdefault(name, []).append(x.flatten(0, 1).double())
        hessians.observe(name, x)

    for row in rows:
        model.hidden(row.ids, row.segments, True, observe=both)
    assert len(seen["attn.1"]) == 4 and len(seen["attn.0"]) == 2
    for name, inputs in seen.items():
        X = torch.cat(inputs)
        torch.testing.assert_close(hessians.sums[name].double(), X.T @ X, rtol=1e-4, atol=1e-4)

    class Rows:
        def step(self, step):
            assert step in (5, 6)
            return rows

    mean = t.calibrate(model, Rows(), 5, runtime())  # two batches of the same two rows
    for name, H in hessians.sums.items():
        torch.testing.assert_close(mean[name], H, rtol=1e-4, atol=1e-4)


# ---- whole state dicts

def quantised(cfg, seed=0):
    model = busy_model(cfg, seed)
    hessians = t.Hessians()
    row = row_of(documents([60, 60], seed=4))
    with torch.no_grad():
        model.hidden(row.ids, row.segments, True, observe=hessians.observe)
    return model, t.quantise(model.state_dict(), hessians.sums, cfg)


@pytest.mark.parametrize("changes", [
    {}, dict(lqer_enabled=False), dict(gated_attn_quant_gate=False), dict(lqer_top_k=100),
    dict(lqer_top_k=0), dict(lqer_asym_enabled=False), dict(smear_gate_enabled=False),
    dict(matrix_bits=8, embed_bits=8), dict(asym_logit_rescale=True, gated_xsa=True),
    dict(awq_lite_enabled=True, awq_lite_group_size=8, awq_lite_group_top_k=3)], ids=str)
def test_state_dict_round_trip(changes):
    cfg = tiny(matrix_clip_sigmas=4.0, attn_clip_sigmas=4.0, mlp_clip_sigmas=4.0,
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
    model, inputs, hessians = busy_model(cfg), {}, t.Hessians()

    def observe(name, x):
        inputs.setdefault(name, []).append(x.flatten(0, -2))
        hessians.observe(name, x)

    row = row_of(documents([58, 60], seed=4))  # 120 ids: a batch
    with torch.no_grad():
        model.hidden(row.ids, row.segments, True, observe=observe)
    scores = {}
    for m in t.matrices(cfg):
        W = model.state_dict()[m.bank] if m.index is None else model.state_dict()[m.bank][m.index]
        x = torch.cat(inputs[m.source])
        for start in range(0, W.shape[1] - 7, 8):
            scores[m.name, start] = sum(
                x[:, c].square().mean().sqrt().item() * W[:, c].abs().mean().item()
                for c in range(start, start + 8))
    best = sorted(scores, key=scores.get)[-5:]
    tensors = t.quantise(model.state_dict(), hessians.sums, cfg)
    got = [(name.removesuffix(".awq_start"), start) for name in tensors
           if name.endswith(".awq_start") for start in tensors[name].tolist()]
    assert sorted(got) == sorted(best)
    plain = t.dequantise(t.quantise(model.state_dict(), hessians.sums,
                                    tiny(lqer_enabled=False)), model)
    state = t.dequantise(tensors, model)
    for m in t.matrices(cfg):
        for start in (start for name, start in best if name == m.name):
            W, ours, others = (x[m.bank] if m.index is None else x[m.bank][m.index]
                               for x in (model.state_dict(), state, plain))
            part = slice(start, start + 8)
            assert (W - ours)[:, part].norm() < 0.6 * (W - others)[:, part].norm(), m.name


@pytest.mark.parametrize(("scope", "inside"), [
    ("all", ""), ("mlp", ".mlp."), ("attn", ".attn."), ("embed", "tok_emb")])
def test_corrections_by_measured_gain(scope, inside):
    """Those that take most off the error, as stored, of the matrices in scope."""
    cfg = tiny(lqer_top_k=2, lqer_gain_select=True, lqer_scope=scope)
    model, plain = quantised(tiny(lqer_enabled=False))
    _, every = quantised(tiny(lqer_top_k=100))
    _, tensors = quantised(cfg)
    before, after = (t.dequantise(x, model) for x in (plain, every))
    gain = {}
    for m in t.matrices(cfg):
        W, a, b = (x[m.bank] if m.index is None else x[m.bank][m.index]
                   for x in (model.state_dict(), before, after))
        gain[m.name] = ((W - a).norm() - (W - b).norm()).item()
    inside = [name for name in gain if inside in name and gain[name] > 0]
    assert {name.rsplit(".", 1)[0] for name in tensors if ".lqer_" in name} == set(
        sorted(inside, key=gain.get)[-2:])


def test_every_matrix_decodes_to_its_own_place():
    """Quantising finely, no matrix may end up in another's row of a bank."""
    cfg = tiny(matrix_bits=8, embed_bits=8, matrix_clip_sigmas=4, attn_clip_sigmas=4,
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
