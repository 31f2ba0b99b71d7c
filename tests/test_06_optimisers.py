"""§6 Optimisers: one route a parameter, Polar Express, Muon, AdamW, clipping, the average."""

import math

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.tools import busy_model, runtime, tiny


def test_every_parameter_has_one_route():
    for cfg in (tiny(), t.Config(num_layers=12)):
        with torch.device("meta"):
            names = [name for name, _ in t.GPT(cfg, t.attend_ref).named_parameters()]
        routes = t.route(names)
        assert routes.keys() == set(names)
        assert {n for n, r in routes.items() if r.optimiser == "muon"} == {
            "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
        assert {n for n, r in routes.items() if r.store == "gptq"} == {
            "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "tok_emb.weight"}
        assert {r.lr for n, r in routes.items() if n == "tok_emb.weight"} == {"tied_embed_lr"}
        assert all(r.store == "int8_rows" for n, r in routes.items() if "attn_gate_w" in n)


@pytest.mark.parametrize("name", ["bigram.weight", "qo_bank2", "blocks.x.attn_scale", "",
                                  "blocks.0.attn.q_gain.bias", "tok_embXweight"])
def test_an_unknown_parameter_has_no_route(name):
    with pytest.raises(ValueError, match="matches 0 lines"):
        t.route(["qo_bank", name])


def test_two_routes_are_an_error(monkeypatch):
    monkeypatch.setattr(t, "ROUTES", (*t.ROUTES, t.ROUTES[0]))
    with pytest.raises(ValueError, match="qo_bank matches 2 lines"):
        t.route(["qo_bank"])


def test_optimisers_hold_every_parameter_once():
    model = t.GPT(tiny(), t.attend_ref)
    optimisers = t.Optimisers(model, model.cfg, runtime())
    held = [id(p) for p in (*optimisers.banks, *optimisers.small)]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    adamw = [id(p) for g in optimisers.adamw.param_groups for p in g["params"]]
    assert sorted(adamw) == sorted(id(p) for p in optimisers.small)


# ---- Polar Express

@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (3, 16, 64), (2, 5, 1, 8)])
def test_singular_values_come_near_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = t.orthogonalise(g)
    assert out.dtype == torch.bfloat16 and out.shape == g.shape
    singular = torch.linalg.svdvals(out.float())
    assert singular.min() > 0.7 and singular.max() < 1.25, singular
    # nearly the polar factor: the same singular vectors
    U, _, Vt = torch.linalg.svd(g, full_matrices=False)
    cosine = (out.float() * (U @ Vt)).sum() / (out.float().norm() * (U @ Vt).norm())
    assert cosine > 0.98


def test_each_matrix_of_a_stack_is_orthogonalised_by_itself():
    g = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(1))
    g[2] *= 1000
    one_by_one = torch.stack([t.orthogonalise(x) for x in g])
    assert (t.orthogonalise(g).float() - one_by_one.float()).abs().max() < 2e-2


def test_scale_does_not_matter_and_zero_stays_zero():
    g = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(t.orthogonalise(g), t.orthogonalise(g * 4))
    assert not t.orthogonalise(torch.zeros(6, 8)).any()


def polar_express(X):
    """Five iterations in float64, without any trick."""
    X = X / (np.linalg.norm(X) + 1e-7)
    flip = X.shape[0] > X.shape[1]
    X = X.T if flip else X
    for a, b, c in t.POLAR_EXPRESS:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if flip else X


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_iterations_are_those_of_the_paper(shape, monkeypatch):
    """The same arithmetic in float64, by taking the one cast to bfloat16 away."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rounded = t.orthogonalise(g).double().numpy()
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    want = polar_express(g.numpy())
    np.testing.assert_allclose(t.orthogonalise(g).numpy(), want, rtol=0, atol=1e-12)
    assert np.linalg.norm(rounded - want) < 0.1 * np.linalg.norm(want)


# ---- steps

def with_gradients(cfg, seed):
    """A model and gradients for it, on the model and as a dictionary of float64 copies."""
    model = busy_model(cfg)
    generator = torch.Generator().manual_seed(seed)
    grads = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    return model, grads


def assign(model, grads, factor=1.0):
    for name, p in model.named_parameters():
        p.grad = grads[name] * factor


def test_adamw_equals_torch():
    cfg = tiny(grad_clip_norm=0.0)
    model, grads = with_gradients(cfg, 1)
    small = {n: p for n, p in model.named_parameters() if not n.endswith("_bank")}
    clones = {n: torch.nn.Parameter(p.detach().clone()) for n, p in small.items()}
    lr = {n: cfg.tied_embed_lr if n == "tok_emb.weight" else cfg.scalar_lr for n in small}
    decay = {n: cfg.embed_wd if n == "tok_emb.weight" else cfg.adam_wd for n in small}
    twin = torch.optim.AdamW([{"params": [p], "lr": lr[n], "weight_decay": decay[n], "name": n}
                              for n, p in clones.items()], betas=(0.9, 0.99), eps=1e-8)
    ours = t.Optimisers(model, cfg, runtime())
    for step, factor in enumerate((1.0, 0.7, 0.4)):
        assign(model, grads, 1.0 + step)
        for n, p in clones.items():
            p.grad = grads[n] * (1.0 + step)
        for group in twin.param_groups:
            group["lr"] = lr[group["name"]] * factor
        ours.step(factor, 0.9)
        twin.step()
    for n, p in small.items():
        torch.testing.assert_close(p, clones[n], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalise", [True, False])
def test_muon_is_the_definition(normalise, monkeypatch):
    """With exact iterations in place of bfloat16, whose own error is checked above."""
    def exact(g, steps):
        assert steps == 5
        return torch.from_numpy(np.stack([polar_express(x) for x in g.double().numpy()])).float()

    monkeypatch.setattr(t, "orthogonalise", exact)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    cfg = tiny(grad_clip_norm=0.0, muon_row_normalize=normalise)
    model = busy_model(cfg)
    banks = {n: p for n, p in model.named_parameters() if n.endswith("_bank")}
    want = {n: p.detach().double().numpy().copy() for n, p in banks.items()}
    momenta = {n: np.zeros(p.shape) for n, p in banks.items()}
    ours = t.Optimisers(model, cfg, runtime())
    for seed, factor, momentum in ((2, 1.0, 0.92), (3, 0.5, 0.95), (4, 0.3, 0.97)):
        _, grads = with_gradients(cfg, seed)
        assign(model, grads)
        ours.step(factor, momentum)
        lr = cfg.matrix_lr * factor
        for n, W in want.items():
            for i in range(len(W)):
                g = grads[n][i].double().numpy()
                momenta[n][i] = momentum * momenta[n][i] + g
                u = g + momentum * momenta[n][i]
                if normalise:
                    u = u / np.linalg.norm(u, axis=1, keepdims=True)
                scale = math.sqrt(max(1.0, W.shape[1] / W.shape[2]))
                W[i] -= lr * cfg.muon_wd * W[i] + lr * scale * polar_express(u)
    for n, p in banks.items():
        np.testing.assert_allclose(p.detach().numpy(), want[n], rtol=0, atol=2e-6, err_msg=n)


def test_clipping_uses_the_global_norm_over_all_parameters():
    cfg = tiny(grad_clip_norm=0.5)
    model, grads = with_gradients(cfg, 3)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    ours = t.Optimisers(model, cfg, runtime())
    seen = {}
    step_muon = ours.step_muon
    ours.step_muon = lambda g, clip, *rest: (seen.update(banks=[x * clip for x in g]),
                                             step_muon(g, clip, *rest))
    ours.adamw.step = lambda: seen.update(small=[p.grad.clone() for p in ours.small])
    assign(model, grads)
    assert math.isclose(ours.step(1.0, 0.9).item(), norm, rel_tol=1e-5)
    clipped = math.sqrt(sum(g.double().square().sum().item()
                            for g in seen["banks"] + seen["small"]))
    assert math.isclose(clipped, 0.5, rel_tol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assign(model, grads, 0.1 / norm)  # below the limit: untouched
    assert math.isclose(ours.step(1.0, 0.9).item(), 0.1, rel_tol=1e-5)
    clipped = math.sqrt(sum(g.double().square().sum().item()
                            for g in seen["banks"] + seen["small"]))
    assert math.isclose(clipped, 0.1, rel_tol=1e-4)


def test_reset_forgets_every_moment():
    cfg = tiny()
    model, grads = with_gradients(cfg, 4)
    start = {n: v.clone() for n, v in model.state_dict().items()}
    ours, ends = t.Optimisers(model, cfg, runtime()), []
    for _ in range(2):
        model.load_state_dict(start)
        for _ in range(2):
            assign(model, grads)
            ours.step(1.0, 0.9)
        ends.append({n: v.clone() for n, v in model.state_dict().items()})
        ours.reset()
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)


def test_average():
    model = torch.nn.Linear(3, 2)
    ema = t.Ema(model, 0.75)
    want = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for step in range(4):
        for p in model.parameters():
            p.data.add_(step)
        ema.update()
        for n, p in model.named_parameters():
            want[n] = 0.75 * want[n] + 0.25 * p.detach().double()
    ema.swap_in()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.double(), want[n], rtol=1e-6, atol=1e-6)
