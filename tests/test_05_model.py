"""§5 Model: against a slow reference written from the definition; isolation, causality, adapters.

The reference runs in float64 on NumPy, token by token where that is clearer; the model runs in
float64 too, so what is left between them is the rounding of the rotary table to float32."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.tools import (
    ROOT,
    busy_model,
    cosine_start,
    documents,
    losses_of,
    row_of,
    runtime,
    tiny,
)

EPS = float(torch.finfo(torch.float32).eps)
IDS = documents([9, 14, 1, 22], seed=5)  # four documents in one row
BOUNDS = [0, 10, 25, 27]


# ---- the reference

def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotate(x, position, cfg):
    """x [D]: channels j and j + half turn by position * base^(-2j/dims)."""
    dims, x = cfg.rope_dims or cfg.head_dim, x.copy()
    half = dims // 2
    for j in range(half):
        angle = position * cfg.rope_base ** (-2 * j / dims)
        a, b = x[j], x[j + half]
        x[j] = a * math.cos(angle) + b * math.sin(angle)
        x[j + half] = -a * math.sin(angle) + b * math.cos(angle)
    return x


def attention(w, cfg, i, x, bounds, delta):
    n, D, H, K = cfg.num_layers, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads
    T = len(x)
    q, k, v = (x @ W.T + delta(role, x) for role, W in (
        ("q", w["qo_bank"][i]), ("k", w["kv_bank"][i]), ("v", w["kv_bank"][n + i])))
    q, k, v = q.reshape(T, H, D), k.reshape(T, K, D), v.reshape(T, K, D)
    y = np.zeros((T, H, D))
    for begin, end in zip(bounds, [*bounds[1:], T], strict=True):
        for h in range(H):
            g = h // (H // K)
            keys = [rotate(rms(k[s, g]), s, cfg) for s in range(begin, end)]
            for pos in range(begin, end):
                query = rotate(rms(q[pos, h]), pos, cfg) * w[f"blocks.{i}.attn.q_gain"][h]
                scores = np.array([query @ keys[s - begin] / math.sqrt(D)
                                   for s in range(begin, pos + 1)])
                p = np.exp(scores - scores.max())
                y[pos, h] = (p / p.sum()) @ v[begin:pos + 1, g]
    for pos in range(T):
        for h in range(H):
            g = h // (H // K)
            if i >= n - cfg.xsa_last_n:
                axis = v[pos, g] / np.linalg.norm(v[pos, g])
                gate = np.tanh(w[f"blocks.{i}.attn.xsa_alpha"][h]) if cfg.gated_xsa else 1.0
                y[pos, h] -= gate * (y[pos, h] @ axis) * axis
            if cfg.sparse_attn_gate_enabled:
                logit = w[f"blocks.{i}.attn.attn_gate_w"][h] @ x[pos, :cfg.gate_window]
                y[pos, h] *= sigmoid(cfg.sparse_attn_gate_scale * logit)
    return y.reshape(T, H * D) @ w["qo_bank"][n + i].T + delta("o", x)


def mlp(w, cfg, i, x, delta):
    z = x @ w["mlp_up_bank"][i].T
    act = np.where(z > 0, z, cfg.leaky_relu_slope * z) ** 2
    return act @ w["mlp_down_bank"][i].T + delta("mlp", x)


def layer_order(cfg, looped):
    layers = list(range(cfg.num_layers))
    if looped and cfg.num_loops:
        middle = layers[cfg.loop_start:cfg.loop_end + 1]
        layers = layers[:cfg.loop_start] + middle * (1 + cfg.num_loops) + layers[cfg.loop_end + 1:]
    half = len(layers) // 2
    return layers[:half], layers[half:]


def reference(w, cfg, ids, bounds, looped, lora=lambda role, slot, x: 0.0):
    """Softcapped logits [T, V] from the state dict w, as arrays of float64."""
    x = w["tok_emb.weight"][ids]
    if cfg.smear_gate_enabled:
        before, x = x, x.copy()
        for pos in range(1, len(ids)):
            if ids[pos] != 1:
                gate = sigmoid(w["smear_gate.weight"][0] @ before[pos, :cfg.gate_window])
                x[pos] += w["smear_lambda"][0] * gate * before[pos - 1]
    x = x0 = rms(x)
    encoder, decoder = layer_order(cfg, looped)
    S = min(map(len, layer_order(cfg, True)))
    stack, lanes = [], None
    for slot, i in enumerate(encoder + decoder):
        j = slot - len(encoder)
        c = 1 / math.sqrt(i + 1) if cfg.ln_scale else 1.0
        mix, block = w[f"blocks.{i}.resid_mix"], f"blocks.{i}."

        def delta(role, n, slot=slot):
            return lora(role, slot, n)

        if j >= 0 and cfg.parallel_start_layer and i >= cfg.parallel_start_layer and not lanes:
            lanes = [x, x]
        if 0 <= j < S and stack:
            skip, main = w["skip_weights"][j] * stack.pop(), lanes[0] if lanes else x
            if cfg.skip_gates_enabled:
                main = skip + sigmoid(w["skip_gates"][j]) * (main - skip)
            else:
                main = main + skip
            x, lanes = (x, [main, lanes[1]]) if lanes else (main, None)
        if lanes:
            u = mix[0] * lanes[0] + mix[1] * x0
            a = w[block + "attn_scale"] * attention(w, cfg, i, c * rms(u), bounds, delta)
            m = w[block + "mlp_scale"] * mlp(w, cfg, i, c * rms(lanes[1]), delta)
            keep, post = w["parallel_resid_lambdas"][i], w["parallel_post_lambdas"][i]
            lanes = [keep[k] * lanes[k] + post[0, k] * a + post[1, k] * m for k in (0, 1)]
        else:
            u = mix[0] * x + mix[1] * x0
            u = u + w[block + "attn_scale"] * attention(w, cfg, i, c * rms(u), bounds, delta)
            x = u + w[block + "mlp_scale"] * mlp(w, cfg, i, c * rms(u), delta)
        if j < 0:
            stack.append(x)
    if lanes:
        x = {"mean": (lanes[0] + lanes[1]) / 2, "attn": lanes[0], "mlp": lanes[1]}[
            cfg.parallel_final_lane]
    h = rms(x)
    z = h @ w["tok_emb.weight"].T + lora("head", 0, h)
    cap = cfg.logit_softcap
    if cfg.asym_logit_rescale:
        cap = np.where(z > 0, w["softcap_pos"], w["softcap_neg"])
    return cap * np.tanh(z / cap)


def arrays(model):
    return {name: p.double().numpy() for name, p in model.state_dict().items()}


def cross_entropy(logits, targets):
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -log_p[np.arange(len(targets)), targets]


VARIATIONS = {
    "all": {}, "never looped": dict(num_loops=0), "three passes": dict(num_loops=2),
    "one lane": dict(parallel_start_layer=0), "last lane": dict(parallel_final_lane="attn"),
    "MLP lane": dict(parallel_final_lane="mlp"), "early lanes": dict(parallel_start_layer=3),
    "no smear": dict(smear_gate_enabled=False), "no gate": dict(sparse_attn_gate_enabled=False),
    "no skip gates": dict(skip_gates_enabled=False), "no scale": dict(ln_scale=False),
    "all channels rotate": dict(rope_dims=0), "no XSA": dict(xsa_last_n=0),
    "gated XSA": dict(gated_xsa=True), "slope": dict(leaky_relu_slope=0.3),
    "learnt caps": dict(asym_logit_rescale=True, logit_softcap=3.0),
    "XSA of one layer": dict(xsa_last_n=1), "other numbers": dict(
        sparse_attn_gate_scale=1.5, logit_softcap=7.0, rope_base=100.0, gate_window=5,
        num_kv_heads=4, mlp_mult=1.5, num_layers=6, loop_end=3, parallel_start_layer=4),
}


@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS.keys())
@torch.no_grad()
def test_forward_is_the_definition(changes, looped):
    cfg = tiny(**changes)
    model = busy_model(cfg, dtype=torch.float64)
    row = row_of(IDS)
    assert [0, *dict.fromkeys(row.segments.cu_seqlens.tolist())][1:][:-1] == BOUNDS
    logits = model.logits(model.hidden(row.ids, row.segments, looped))[0].numpy()
    want = reference(arrays(model), cfg, IDS[:-1], BOUNDS, looped)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-6)
    losses = model(row.ids, row.targets, row.segments, looped)[0]
    np.testing.assert_allclose(losses, cross_entropy(want, IDS[1:]), rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_every_part_shows_in_the_reference():
    """The comparison above means something: each variation gives other logits."""
    base = tiny()
    w = arrays(busy_model(base, dtype=torch.float64))
    first = reference(w, base, IDS[:-1], BOUNDS, True)
    for name in ("last lane", "MLP lane", "no smear", "no gate", "no skip gates", "no scale",
                 "all channels rotate", "no XSA", "XSA of one layer", "one lane"):
        other = reference(w, replace(base, **VARIATIONS[name]), IDS[:-1], BOUNDS, True)
        assert np.abs(other - first).max() > 1e-3, name


# ---- the plan

def test_layer_plan_of_the_record():
    plan = t.layer_plan(t.Config(), looped=True)
    assert [p.layer for p in plan if p.push] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert [p.layer for p in plan if not p.push] == [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [p.skip for p in plan] == [None] * 8 + [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [p.layer for p in plan if p.lanes] == [8, 9, 10]
    assert [p.slot for p in plan] == list(range(17)) and t.num_block_calls(t.Config()) == 17
    assert t.num_skips(t.Config()) == 8
    plan = t.layer_plan(t.Config(), looped=False)
    assert [p.layer for p in plan] == list(range(11))
    assert [p.layer for p in plan if p.push] == [0, 1, 2, 3, 4]
    assert [p.skip for p in plan] == [None] * 5 + [0, 1, 2, 3, 4, None]
    assert [p.layer for p in plan if p.lanes] == [8, 9, 10]


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize(("n", "loops"), [(2, 0), (3, 0), (5, 1), (6, 2), (11, 2), (12, 3)])
def test_plans_pop_only_what_was_pushed(n, loops, looped):
    cfg = tiny(num_layers=n, num_loops=loops, parallel_start_layer=0)
    depth = 0
    for call in t.layer_plan(cfg, looped):
        depth -= call.skip is not None
        assert depth >= 0
        assert call.skip is None or call.skip < t.num_skips(cfg)
        depth += call.push
        assert 0 <= call.slot < t.num_block_calls(cfg)


def test_names_shapes_and_count_of_the_record():
    with torch.device("meta"):
        model = t.GPT(t.Config(), t.attend_ref)
    assert sum(p.numel() for p in model.parameters()) == 35_945_671
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    n, d, H, V = 11, 512, 8, 8192
    want = {"tok_emb.weight": (V, d), "qo_bank": (2 * n, d, d), "kv_bank": (2 * n, 256, d),
            "mlp_up_bank": (n, 2048, d), "mlp_down_bank": (n, d, 2048), "skip_weights": (8, d),
            "skip_gates": (8, d), "parallel_post_lambdas": (n, 2, 2),
            "parallel_resid_lambdas": (n, 2), "smear_gate.weight": (1, 12), "smear_lambda": (1,)}
    for i in range(n):
        want |= {f"blocks.{i}.attn.q_gain": (H,), f"blocks.{i}.attn.attn_gate_w": (H, 12),
                 f"blocks.{i}.attn_scale": (d,), f"blocks.{i}.mlp_scale": (d,),
                 f"blocks.{i}.resid_mix": (2, d)}
    assert shapes == want


def test_start_values():
    torch.manual_seed(0)
    model = t.GPT(tiny(), t.attend_ref)
    n = model.cfg.num_layers
    for W in (*model.qo_bank[:n], *model.kv_bank, *model.mlp_up_bank):
        gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    for zero in (model.qo_bank[n:], model.mlp_down_bank, model.skip_gates, model.smear_lambda,
                 model.smear_gate.weight, *(b.attn.attn_gate_w for b in model.blocks)):
        assert not zero.any()
    assert 0.004 < model.tok_emb.weight.std() < 0.006
    block = model.blocks[0]
    assert (block.attn.q_gain == 5).all() and (block.attn_scale == 1).all()
    assert (block.resid_mix[0] == 1).all() and (block.resid_mix[1] == 0).all()
    assert (model.parallel_resid_lambdas == 1.1).all() and (model.parallel_post_lambdas == 1).all()
    assert (model.skip_weights == 1).all()


# ---- behaviour

@torch.no_grad()
def test_documents_in_a_row_do_not_see_each_other():
    model = busy_model(tiny())
    a, a2, b = (documents([n], seed=s) for n, s in ((11, 1), (11, 2), (20, 3)))
    assert (a[1:] != a2[1:]).all()
    first, second = (losses_of(model, np.concatenate((x, b)))[len(a):] for x in (a, a2))
    assert torch.equal(first, second)
    alone = losses_of(model, b)
    torch.testing.assert_close(first, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_smear_gate_stops_at_bos_but_works_inside():
    model = busy_model(tiny())
    ids = torch.tensor([[5, 1, 6, 7]])
    x = torch.randn(1, 4, 32)
    y = model.smear(x, ids)
    assert torch.equal(y[0, :2], x[0, :2])
    assert not torch.equal(y[0, 2], x[0, 2])
    x2 = x.clone()
    x2[0, 0] += 1
    assert torch.equal(model.smear(x2, ids)[0, 1:], y[0, 1:])


@pytest.mark.parametrize("looped", [False, True])
@torch.no_grad()
def test_no_token_sees_a_later_one(looped):
    model, ids = busy_model(tiny()), documents([30])
    for cut in (1, 7, 29):
        other = ids.copy()
        other[cut + 1:] = 2 + (other[cut + 1:] + 11) % 62
        first, second = (losses_of(model, x, looped) for x in (ids, other))
        assert torch.equal(first[:cut], second[:cut])
        assert not torch.equal(first[cut:], second[cut:])


@torch.no_grad()
def test_segments_cut_attention_but_not_smearing():
    model, ids = busy_model(tiny()), documents([40])
    row = row_of(ids, longest=16)
    assert list(dict.fromkeys(row.segments.cu_seqlens.tolist())) == [0, 16, 32, 40]
    first = losses_of(model, ids, longest=16)
    other = ids.copy()
    other[3] = 2 + (ids[3] + 5) % 62
    assert torch.equal(losses_of(model, other, longest=16)[16:], first[16:])
    other = ids.copy()
    other[15] = 2 + (ids[15] + 5) % 62  # its neighbour 16 is smeared with it, and sees no more
    changed = losses_of(model, other, longest=16)[16:] != first[16:]
    assert changed[0]


@torch.no_grad()
def test_only_the_chosen_positions_are_scored():
    model = busy_model(tiny())
    ids = torch.from_numpy(documents([20, 20])).view(2, 21)
    segments = t.Segments.batch(2, 20, ids.device)
    full = model(ids[:, :-1], ids[:, 1:], segments, True)
    positions = torch.tensor([[3, 0, 19, 7], [19, 18, 2, 2]])
    some = model(ids[:, :-1], ids[:, 1:].gather(1, positions), segments, True, positions=positions)
    torch.testing.assert_close(some, full.gather(1, positions), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"gated_xsa": True, "asym_logit_rescale": True}], ids=str)
@pytest.mark.parametrize("looped", [False, True])
def test_gradients_reach_every_parameter(looped, changes):
    model = busy_model(tiny(**changes))
    losses_of(model, IDS, looped).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name


def test_gated_xsa_starts_off_and_caps_start_alike():
    """A fresh model is the one without XSA; equal caps are the constant."""
    plain, gated = (t.GPT(tiny(xsa_last_n=n, gated_xsa=on, asym_logit_rescale=on), t.attend_ref)
                    for n, on in ((0, False), (4, True)))
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for model in (plain, gated):
            model.qo_bank[5:].copy_(plain.qo_bank[:5])
        torch.testing.assert_close(losses_of(gated, IDS), losses_of(plain, IDS))


def test_a_fresh_model_has_finite_gradients():
    model = t.GPT(tiny(), t.attend_sdpa)
    losses_of(model, IDS).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiled_parts_are_five_graphs_for_both_orders(monkeypatch):
    """Compiled or not the losses are the same, and nothing compiles anew for another layer, order
    or number of segments; outside the context nothing is compiled."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(
        f, backend="aot_eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, rows = busy_model(tiny()), [row_of(documents(x)) for x in ([20, 11], [7, 9, 14])]
    runs = [(row, looped) for looped in (False, True) for row in rows]
    with model.compiled(True):
        found = [model(row.ids, row.targets, row.segments, looped) for row, looped in runs]
        sum(losses.mean() for losses in found).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    assert "attention_core" not in vars(model)
    for losses, (row, looped) in zip(found, runs, strict=True):
        torch.testing.assert_close(losses, model(row.ids, row.targets, row.segments, looped))


# ---- adapters

def filled_lora(cfg, batch, seed=1):
    lora = t.Lora(cfg, batch, torch.device("cpu"), cosine_start)
    generator = torch.Generator().manual_seed(seed)
    for B in lora.B.values():
        B.data = 0.3 * torch.randn(B.shape, generator=generator)
    return lora


@torch.no_grad()
def test_adapters_are_the_definition():
    cfg = tiny()
    model = busy_model(cfg, dtype=torch.float64)
    ids = documents([15, 15], seed=8).reshape(2, 16)
    lora = filled_lora(cfg, 2).double()
    given = {key: B.clone() for key, B in lora.B.items()}
    for key, B in lora.B.items():  # the model takes the channels of q and k in another order
        B.copy_(t.paired(B, cfg) if key[0] in "qk" else B)
    segments = t.Segments.batch(2, 15, torch.device("cpu"))
    x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
    losses = model(x, y, segments, True, lora)
    for b in range(2):
        def delta(role, slot, n, b=b):
            A, B = (side[f"{role}{slot}"][b].numpy() for side in (lora.A, given))
            return cfg.ttt_lora_alpha / cfg.ttt_lora_rank * n @ A.T @ B.T
        want = reference(arrays(model), cfg, ids[b, :-1], [0], True, delta)
        np.testing.assert_allclose(losses[b], cross_entropy(want, ids[b, 1:]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_every_one_counts():
    cfg = tiny()
    model, ids = busy_model(cfg), torch.from_numpy(IDS)[None, :20]
    segments = t.Segments.batch(1, 19, ids.device)
    plain = model(ids[:, :-1], ids[:, 1:], segments, True)
    lora = t.Lora(cfg, 1, ids.device, t.uniform_start(torch.Generator().manual_seed(0)))
    assert torch.equal(model(ids[:, :-1], ids[:, 1:], segments, True, lora), plain)
    assert len(lora.A) == 5 * 7 + 1  # q, k, v, o, mlp in seven passes, and the head
    for key, B in lora.B.items():
        B.fill_(0.2)
        changed = model(ids[:, :-1], ids[:, 1:], segments, True, lora)
        assert not torch.equal(changed, plain), key
        B.zero_()


@torch.no_grad()
def test_adapters_of_a_batch_are_apart():
    cfg = tiny()
    model, ids = busy_model(cfg), torch.from_numpy(documents([12, 12])).view(2, 13)
    lora, segments = filled_lora(cfg, 2), t.Segments.batch(2, 12, ids.device)
    first = model(ids[:, :-1], ids[:, 1:], segments, True, lora)
    for side in (*lora.A.values(), *lora.B.values()):
        side.data[1] += 0.5
    second = model(ids[:, :-1], ids[:, 1:], segments, True, lora)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_left_out_roles_have_no_adapter():
    lora = t.Lora(tiny(ttt_k_lora=False, ttt_mlp_lora=False), 2, torch.device("cpu"), cosine_start)
    assert {key.rstrip("0123456789") for key in lora.A} == {"q", "v", "o", "head"}
    assert lora("k", 0, torch.ones(2, 3, 32)) == 0
    shapes = {key: (tuple(lora.A[key].shape), tuple(lora.B[key].shape)) for key in ("v0", "head0")}
    assert shapes == {"v0": ((2, 4, 32), (2, 16, 4)), "head0": ((2, 4, 32), (2, 64, 4))}


@pytest.mark.parametrize(("changes", "left"), [
    ({}, "qkv"), ({"ttt_mask": "all"}, "qkv"), ({"ttt_mask": "no_q"}, "kv"),
    ({"ttt_mask": "no_v"}, "qk"), ({"ttt_mask": "no_qv"}, "k"), ({"ttt_q_lora": False}, "kv"),
    ({"ttt_v_lora": False, "ttt_mask": "no_q", "ttt_k_lora": False}, "")], ids=str)
def test_masks_leave_adapters_out(changes, left):
    lora = t.Lora(tiny(**changes), 2, torch.device("cpu"), cosine_start)
    roles = {key.rstrip("0123456789") for key in lora.A}
    assert roles == {*left, "o", "mlp", "head"}


def test_start_of_a_and_reset():
    cfg = tiny()
    lora = t.Lora(cfg, 64, torch.device("cpu"), t.uniform_start(torch.Generator().manual_seed(0)))
    a = lora.A["q3"].detach()
    assert a.abs().max() <= 32 ** -0.5 < 1.01 * a.abs().max()
    assert abs(a.mean()) < 0.01
    before = a.clone()
    lora.B["q3"].data.fill_(1)
    lora.reset(warm=True)
    assert torch.equal(lora.A["q3"], before) and not lora.B["q3"].any()
    lora.reset(warm=False)
    assert not torch.equal(lora.A["q3"], before)


def test_matrices_list_every_matrix_once():
    cfg = tiny()
    found = t.matrices(cfg)
    assert len(t.matrices(t.Config())) == 67
    assert len({m.name for m in found}) == len(found) == 6 * 5 + 1
    places = {(m.bank, m.index) for m in found}
    model = t.GPT(cfg, t.attend_ref)
    sizes = {name: len(p) for name, p in model.named_parameters() if name.endswith("_bank")}
    assert places == {("tok_emb.weight", None)} | {(b, i) for b, n in sizes.items()
                                                    for i in range(n)}
    seen = {}
    row = row_of(IDS)
    model.hidden(row.ids, row.segments, True,
                 calibration_hook=lambda name, x: seen.setdefault(name, []).append(x.shape[-1]))
    assert {m.source for m in found} == seen.keys()
    assert len(seen["mlp.1"]) == 2 and len(seen["mlp.0"]) == 1  # each pass of a looped layer
    for m in found:
        bank = dict(model.named_parameters())[m.bank]
        assert bank.shape[-1] == seen[m.source][0], m


def test_gradients_of_a_low_rank_product():
    """Against autograd through the definition, and by differences in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    x, A, B = draw(2, 5, 6), draw(2, 3, 6), draw(2, 4, 3)
    assert torch.autograd.gradcheck(lambda *p: t.LowRank.apply(*p, 1.7), (x, A, B))
    torch.testing.assert_close(t.LowRank.apply(x, A, B, 1.7), 1.7 * x @ A.mT @ B.mT)
    with torch.no_grad():
        masters = [p.float().requires_grad_() for p in (A, B)]
    low = x.detach().bfloat16().requires_grad_()
    t.LowRank.apply(low, *masters, 1.7).sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.is_contiguous() for p in masters)


# ---- the rotary pairs, and what leaves the fast path

def test_cosines_are_float32_of_the_pairs_that_turn():
    """Rounded once from float64, whatever number type the model computes in."""
    cfg = tiny(rope_dims=4)
    angle = np.arange(50)[:, None] * cfg.rope_base ** (-np.array([0.0, 2.0]) / 4)
    want = np.stack((np.cos(angle), np.sin(angle))).astype(np.float32)
    assert np.array_equal(t.rotation(torch.arange(50), cfg).numpy(), want)
    model = t.GPT(cfg, t.attend_ref, torch.bfloat16)
    seen = []
    model.attention_core = lambda x, gate_input, gain, gate, rope, *rest: (
        seen.append(rope) or t.attention_core(x, gate_input, gain, gate, rope, *rest))
    losses_of(model, IDS)
    assert all(rope.dtype == torch.float32 and rope.shape[2] == 2 for rope in seen)


SLOW = [
    ({}, "fa4", "bfloat16", []), ({}, "varlen", "bfloat16", ["FlashAttention-4", "3.7", "4.8"]),
    (dict(num_heads=6, num_kv_heads=3, model_dim=24), "fa4", "bfloat16", ["(6, 3, 4)"]),
    (dict(mlp_mult=1.125), "fa4", "bfloat16", ["MLP"]),
    (dict(vocab_size=20000), "fa4", "bfloat16", ["VOCAB_SIZE"]),
    (dict(fused_ce_enabled=False), "fa4", "bfloat16", ["FUSED_CE_ENABLED=0"]),
    (dict(compile=False), "fa4", "bfloat16", ["COMPILE=0"]),
    (dict(gated_xsa=True, asym_logit_rescale=True), "fa4", "bfloat16", [])]


@pytest.mark.parametrize(("changes", "attention", "dtype", "words"), SLOW, ids=str)
def test_what_leaves_the_fast_path_says_so_in_one_line(changes, attention, dtype, words,
                                                       monkeypatch, capsys):
    monkeypatch.setattr(t, "fused", lambda x: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    rt = t.Runtime(0, 1, torch.device("cuda"))
    t.log_slow_paths(tiny(**changes), t.Attention(attention, "", None), rt)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(words)
    assert all(line.startswith("slow path: ") for line in lines)
    assert all(word in lines[0] for word in words)
    t.log_slow_paths(tiny(**changes), t.Attention("sdpa", "", None), runtime())
    assert capsys.readouterr().out == ""  # a CPU has no fast path to fall off


@pytest.mark.parametrize("preset", sorted(p.stem for p in (ROOT / "presets").glob("*.env")))
def test_no_preset_leaves_the_fast_path(preset, monkeypatch, capsys):
    monkeypatch.setattr(t, "fused", lambda x: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    cfg = t.Config.from_env({"PRESET": preset}, ROOT)
    t.log_slow_paths(cfg, t.Attention("fa4", "", None), t.Runtime(0, 1, torch.device("cuda")))
    assert capsys.readouterr().out == ""
