"""§3 Kernels: every kernel against its twin, values and gradients.

No tolerance is chosen: the error against float64 may be twice the twin's own error in the same
number type. The same tests run on a GPU and, with TRITON_INTERPRET=1, on a CPU;
`test_kernels_under_the_interpreter` starts them that way in a process of its own.
"""
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
from tests.tools import busy_model, documents, row_of, tiny

ON_GPU = torch.cuda.is_available()
INTERPRETED = train_gpt.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU and not INTERPRETED else "cpu")
# Triton's interpreter cuts bfloat16 off instead of rounding it, and multiplies its raw bits
HALF = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
BACKEND = "aot_eager" if DEVICE.type == "cpu" else "inductor"
CAP, SLOPE = 30.0, 0.5

kernels = pytest.mark.skipif(not train_gpt.fused(torch.empty(0, device=DEVICE)),
                             reason="needs CUDA and Triton, or "
                             "TRITON_INTERPRET=1 (test_kernels_under_the_interpreter does that)")

if INTERPRETED:  # since NumPy 2.4 an array of one element is no loop bound, as Triton 3.6 expects
    from triton.runtime import interpreter
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index


def seeded(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def outcome(function, inputs, grad, dtype) -> list[torch.Tensor]:
    """Values and gradients of function(*inputs) at inputs and upstream gradient (or gradients, if
    there are several results) rounded to dtype."""
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    results, grads = function(*inputs), grad
    if isinstance(results, torch.Tensor):
        results, grads = (results,), (grad,)
    grads = [g.to(DEVICE, y.dtype) for y, g in zip(results, grads, strict=True)]
    return [*(y.detach() for y in results), *torch.autograd.grad(results, inputs, grads)]


def rounding_error(dtype, size, roundings=1) -> float:
    """What that many independent roundings to dtype make of values with this root-sum-square: each
    is off by at most eps / 2 of its value, evenly spread, so by 1 / sqrt(3) of that on average."""
    return torch.finfo(dtype).eps / 2 * math.sqrt(roundings / 3) * float(size)


def assert_native(function, twin, inputs, grad, dtype, exact=None, sums=None) -> None:
    """Error (its norm) of `function` <= twice that of `twin` in dtype, against float64; one float32
    rounding of the largest value is left. Where the twin happens to be right, as a result of few
    elements may be, its error counts as what is expected: one rounding of the result, and, for the
    results in `sums` (index: root-sum-square, roundings), those of the terms that are added up."""
    inputs = [x.to(dtype) for x in inputs]
    grad = [g.to(dtype) for g in grad] if isinstance(grad, list) else grad.to(dtype)
    ours, native = (outcome(f, inputs, grad, dtype) for f in (function, twin))
    truth = outcome(exact or twin, inputs, grad, torch.float64)
    for i, (y, n, t) in enumerate(zip(ours, native, truth, strict=True)):
        assert y.dtype == n.dtype and y.shape == t.shape
        expected = math.hypot(rounding_error(y.dtype, t.norm()),
                              rounding_error(dtype, *(sums or {}).get(i, (0.0,))))
        error, allowed = (y.double() - t).norm(), 2 * max((n.double() - t).norm(), expected)
        largest = max(float(x.abs().max()) for x in (t, *(x.detach() for x in inputs)))
        rounding = torch.finfo(torch.float32).eps * largest * math.sqrt(t.numel())
        assert error <= allowed + rounding, f"result {i}: {error:.3g} > {allowed:.3g}"


def exact_cross_entropy(z, targets):
    logits = CAP * torch.tanh(z / CAP)
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


def exact_leaky_mlp(x, up, down):
    pre = x @ up.T
    return torch.maximum(pre, SLOPE * pre) ** 2 @ down.T


# ---- twins, wrappers, import: any machine

def test_twins_are_their_formulas():
    z, x, up, down = seeded(0, (7, 33), (5, 6), (8, 6), (6, 8))
    targets = torch.arange(7)
    torch.testing.assert_close(train_gpt.softcap_cross_entropy_ref(9 * z, targets, CAP),
                               exact_cross_entropy(9 * z, targets))
    torch.testing.assert_close(train_gpt.leaky_mlp_ref(x, up, down, SLOPE),
                               exact_leaky_mlp(x, up, down))


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(train_gpt.__file__).parent), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": path, **changes}


def test_without_triton_the_twins_are_used():
    program = """if 1:
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch, train_gpt as g
        assert not g.fused(torch.empty(0))
        z, x, w = torch.randn(3, 5), torch.randn(3, 8), torch.randn(8, 8)
        t = torch.tensor([0, 1, 2])
        assert torch.equal(g.softcap_cross_entropy(z, t, 30.0),
                           g.softcap_cross_entropy_ref(z, t, 30.0))
        assert torch.equal(g.leaky_mlp(x, w, w, 0.5), g.leaky_mlp_ref(x, w, w, 0.5))
    """
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="the kernel tests run in this very process")
@pytest.mark.skipif(train_gpt.triton is None, reason="Triton is not installed")
def test_kernels_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment(TRITON_INTERPRET="1"), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout, done.stdout  # this test alone, no kernel's


# ---- softcap + cross-entropy

@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, scale", [(1, 1, 1), (64, 37, 8), (33, 1024, 8), (12, 8192, 8),
                                         (7, 9001, 8), (40, 512, 0.01), (40, 512, 300)])
def test_softcap_cross_entropy(N, V, scale, dtype):
    z, grad = seeded(V, (N, V), (N,), scale=scale)
    targets = torch.arange(N, device=DEVICE) * 7919 % V
    assert_native(lambda z: train_gpt.softcap_cross_entropy(z, targets, CAP),
                  lambda z: train_gpt.softcap_cross_entropy_ref(z, targets, CAP),
                  [z], grad, dtype, exact=lambda z: exact_cross_entropy(z, targets))


def exact_two_caps(z, targets, caps):
    u = torch.where(z > 0, z / caps[0], z / caps[1])
    logits = torch.where(z > 0, caps[0] * u.tanh(), caps[1] * u.tanh())
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


def terms_of_caps(z, targets, caps, grad):
    """[2, N, V]: what each logit adds to the caps' gradient, times 1 + |z|: a term's own roundings
    are relative, and exp turns that of a logit, up to eps / 2 |z|, into a relative one."""
    z, grad = (x.detach().to(DEVICE, torch.float64) for x in (z, grad))
    own = caps.to(z)[:, None, None].expand(2, *z.shape).clone().requires_grad_()
    return torch.autograd.grad(exact_two_caps(z, targets, own), own, grad)[0] * (1 + z.abs())


@kernels
def test_the_gradient_of_caps_far_above_the_logits():
    """Where u = z / cap is small, its terms are 2/3 u^3, less than the rounding of tanh u: as
    accurate as the sum of rounded terms all the same, for each size of logit."""
    targets, caps = torch.arange(40, device=DEVICE) * 7919 % 512, torch.tensor([30.0, 11.0])
    for scale in (0.01, 0.3, 3.0):
        z, grad = seeded(9, (40, 512), (40,), scale=scale)
        ours, truth = (outcome(lambda z, c, f=f: f(z, targets, c), [z, caps], grad, kind)[2]
                       for f, kind in ((train_gpt.softcap_cross_entropy, torch.float32),
                                       (exact_two_caps, torch.float64)))
        # u^3 triples the two roundings of u, which count 9 each; about 12 more come from tanh u
        # squared, from what is taken off it and from the softmax
        size = terms_of_caps(z, targets, caps, grad).norm()
        expected = rounding_error(torch.float32, size, 2 * 9 + 12)
        assert (ours - truth).norm() <= 2 * expected, f"logits of {scale}"


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, scale", [(1, 1, 1), (64, 37, 8), (33, 1024, 8), (12, 8192, 40),
                                         (40, 512, 0.01), (40, 512, 300)])
def test_two_learnt_caps(N, V, scale, dtype):
    """One of positive and one of other logits, with their gradients; logits or their factors."""
    z, grad = seeded(V, (N, V), (N,), scale=scale)
    targets, caps = torch.arange(N, device=DEVICE) * 7919 % V, torch.tensor([30.0, 11.0])
    assert_native(lambda z, c: train_gpt.softcap_cross_entropy(z, targets, c),
                  lambda z, c: train_gpt.softcap_cross_entropy_ref(z, targets, c),
                  [z, caps], grad, dtype, exact=lambda z, c: exact_two_caps(z, targets, c))
    h, w = seeded(N, (N, 16), (V, 16))
    sums = {3: (terms_of_caps(h @ w.T, targets, caps, grad).norm(), 1)}  # of the logit at least
    assert_native(lambda h, w, c: train_gpt.softcap_cross_entropy(h, targets, c, w),
                  lambda h, w, c: train_gpt.softcap_cross_entropy_ref(h @ w.T, targets, c),
                  [h, w, caps], grad, dtype, sums=sums,
                  exact=lambda h, w, c: exact_two_caps(h @ w.T, targets, c))


@kernels
def test_learnt_caps_take_the_kernel(monkeypatch):
    monkeypatch.setattr(train_gpt, "softcap_cross_entropy_ref", None)  # calling it would fail
    z, caps = torch.zeros(3, 8, device=DEVICE), torch.ones(2, device=DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert train_gpt.softcap_cross_entropy(z, targets, caps).shape == (3,)


@kernels
def test_softcap_cross_entropy_takes_views_and_no_rows():
    z, targets = seeded(1, (6, 40))[0].to(DEVICE), torch.arange(6, device=DEVICE)
    view = z.T.contiguous().T[::2, 1:].detach().requires_grad_()  # rows and columns strided
    loss = train_gpt.softcap_cross_entropy(view, targets[::2], CAP)
    grad, = torch.autograd.grad(loss.sum(), view)  # an expanded upstream gradient
    twin = view.detach().clone().requires_grad_()
    twin_loss = train_gpt.softcap_cross_entropy_ref(twin, targets[::2], CAP)
    torch.testing.assert_close(loss, twin_loss)
    torch.testing.assert_close(grad, torch.autograd.grad(twin_loss.sum(), twin)[0])
    assert train_gpt.softcap_cross_entropy(z[:0], targets[:0], CAP).shape == (0,)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, d, V", [(5, 16, 40), (33, 24, 1000), (12, 64, 8192)])
def test_linear_cross_entropy(N, d, V, dtype):
    h, w, grad = seeded(V, (N, d), (V, d), (N,))
    targets = torch.arange(N, device=DEVICE) * 7919 % V
    assert_native(lambda h, w: train_gpt.softcap_cross_entropy(h, targets, CAP, w),
                  lambda h, w: train_gpt.softcap_cross_entropy_ref(h @ w.T, targets, CAP),
                  [h, w], grad, dtype, exact=lambda h, w: exact_cross_entropy(h @ w.T, targets))


@kernels
def test_softcap_cross_entropy_shows_nan():
    z = torch.zeros(2, 50, device=DEVICE)
    z[1, 3] = torch.nan
    loss = train_gpt.softcap_cross_entropy(z, torch.zeros(2, dtype=torch.int64, device=DEVICE), CAP)
    assert loss.isnan().tolist() == [False, True]


# ---- MLP with squared LeakyReLU

@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, d, h", [(1, 8, 8), (150, 80, 264), (300, 64, 512), (257, 128, 520)])
def test_leaky_mlp(N, d, h, dtype):
    x, up, down, grad = seeded(N, (N, d), (h, d), (d, h), (N, d))
    assert_native(lambda *a: train_gpt.leaky_mlp(*a, SLOPE),
                  lambda *a: train_gpt.leaky_mlp_ref(*a, SLOPE),
                  [x, up / d**0.5, down / h**0.5], grad, dtype, exact=exact_leaky_mlp)


@kernels
def test_leaky_mlp_runs_its_kernel_where_rows_are_aligned(monkeypatch):
    def launched(*shape):
        calls.clear()
        train_gpt.leaky_mlp(*(torch.ones(s, device=DEVICE, dtype=HALF[0]) for s in shape), SLOPE)
        return bool(calls)

    calls, launch = [], train_gpt._launch_leaky_mlp
    monkeypatch.setattr(train_gpt, "_launch_leaky_mlp",
                        lambda *a, **named: calls.append(1) or launch(*a, **named))
    assert launched((3, 16), (24, 16), (16, 24))
    assert not launched((3, 12), (24, 12), (12, 24))
    assert launched((0, 16), (24, 16), (16, 24))


@kernels
def test_leaky_mlp_with_frozen_weights():
    x, up, down, grad = (t.to(DEVICE) for t in seeded(5, (20, 16), (32, 16), (16, 32), (20, 16)))
    grads = []
    for mlp in (train_gpt.leaky_mlp, train_gpt.leaky_mlp_ref):
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(mlp(leaf, up, down, SLOPE), leaf, grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)  # only: is it the right gradient?


# ---- residual mix + RMSNorm

@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, d", [(1, 8), (37, 48), (70, 512)])
@pytest.mark.parametrize("gates", [None, 0, 1, 2])  # None: no mix; else parameters of a skip
@pytest.mark.parametrize("add", [False, True])
def test_residual_mix_rmsnorm(N, d, gates, add, dtype):
    a, m, skip, x0, *grads = seeded(N, *[(N, d)] * 4, *[(N, d)] * 4, (N, 5))
    lerp, mix = seeded(d, (gates or 1, d), (2, d))
    inputs = [a, *[m] * add, *[skip, lerp] * bool(gates), *[x0, mix] * (gates is not None)]

    def call(function):
        def on(a, *rest):
            rest = list(rest)
            m = rest.pop(0) if add else None
            skip, lerp = (rest.pop(0), rest.pop(0)) if gates else (None, None)
            x0, mix = rest or (None, None)
            whole, u, n, gate_input, x0 = function(a, m, skip, lerp, x0, mix, 0.7, 5)
            return [*[whole] * add, *[u, x0] * (gates is not None), n, gate_input]
        return on

    grads = [*grads[:1] * add, *grads[1:3] * (gates is not None), *grads[3:]]
    assert_native(call(train_gpt.residual_mix_rmsnorm), call(train_gpt.residual_mix_rmsnorm_ref),
                  inputs, grads, dtype)


@kernels
def test_residual_mix_rmsnorm_without_some_gradients():
    """Only n is used; the tensors may be views; no rows at all."""
    a, m, x0, mix, grad = (x.to(DEVICE) for x in seeded(2, *[(20, 24)] * 3, (2, 24), (10, 24)))
    found = []
    for f in (train_gpt.residual_mix_rmsnorm, train_gpt.residual_mix_rmsnorm_ref):
        leaves = [x.clone().requires_grad_() for x in (a, m, x0, mix)]
        n = f(*(x[::2] for x in leaves[:2]), None, None, leaves[2][::2], leaves[3], 0.5, 0)[2]
        found.append([n.detach(), *torch.autograd.grad(n, leaves, grad)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)  # only: are they the right ones?
    assert train_gpt.residual_mix_rmsnorm(a[:0], m[:0], x0=x0[:0], mix=mix)[2].shape == (0, 24)


# ---- around attention

def plain_attention(q, k, v, cu_seqlens, max_len):
    """Stands in for FlashAttention where that cannot run; lse is not used."""
    y = train_gpt.attend_ref(q, k, v, train_gpt.Segments(cu_seqlens, max_len))
    return y.contiguous(), q.new_zeros(1)


def plain_attention_back(dy, q, k, v, y, lse, cu_seqlens, max_len):
    def attend(*x):
        return plain_attention(*x, cu_seqlens, max_len)[0]

    return [g.contiguous() for g in torch.autograd.functional.vjp(attend, (q, k, v), dy)[1]]


def has_fa4():
    return DEVICE.type == "cuda" and importlib.util.find_spec("flash_attn") is not None


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, K, D, rows", [(4, 2, 8, (1, 61)), (4, 4, 16, (3, 9)),
                                           (8, 4, 64, (1, 130 if ON_GPU else 21))])
@pytest.mark.parametrize("xsa, window", [(True, 12), (True, 0), (False, 5), (False, 0),
                                         ("gated", 12), ("gated", 0)])
def test_attention_core(monkeypatch, H, K, D, rows, xsa, window, dtype):
    if not (has_fa4() and D == 64 and dtype != torch.float32):
        monkeypatch.setattr(train_gpt, "fa4_forward", plain_attention)
        monkeypatch.setattr(train_gpt, "fa4_backward", plain_attention_back)
    tokens = math.prod(rows)
    x, gate_input, gain, gate, grad, angle, alpha = seeded(
        D, (*rows, H + 2 * K, D), (*rows, window), (H,), (H, window), (*rows, H * D),
        (rows[-1], D // (8 if window else 2)), (H,))  # pairs that turn: some or all
    rope = torch.stack((angle.cos(), angle.sin())).to(DEVICE)
    bounds = torch.tensor([0, 5, 5, tokens], dtype=torch.int32, device=DEVICE)
    segments = train_gpt.Segments(bounds, tokens)

    def call(attend):
        def on(x, gain, *rest):
            *rest, own = rest if xsa == "gated" else (*rest, xsa)
            gate_input, gate = rest or (x.new_zeros(*rows, 0), None)
            turn = rope.to(torch.promote_types(x.dtype, torch.float32))
            return train_gpt.attention_core(x, gate_input, gain, gate, turn, attend, segments, own,
                                            0.7)
        return on

    inputs = [x, gain, *[gate_input, gate] * bool(window), *[alpha] * (xsa == "gated")]
    terms = []

    def attend(q, k, v, segments):
        q.register_hook(lambda dq: terms.append(q.detach() * dq / gain.to(dq)[:, None]))
        return train_gpt.attend_ref(q, k, v, segments)

    outcome(call(attend), inputs, grad, torch.float64)
    # A gain's gradient sums q dq / gain over tokens and channels: a handful of numbers, at times
    # right by accident. 8 roundings lead to a term: norm, turn and gain of q, scores, softmax and
    # the gradients of these two and of q.
    sums = {2: (terms[0].norm(), 8)}
    assert_native(call(train_gpt.attend_fa4), call(train_gpt.attend_ref), inputs, grad, dtype,
                  sums=sums)


@kernels
def test_head_counts_that_do_not_fit_take_the_twin(monkeypatch):
    monkeypatch.setattr(train_gpt.FusedAttentionCore, "apply", None)  # calling it would fail
    monkeypatch.setattr(train_gpt, "attend_fa4", train_gpt.attend_ref)
    x, gain = torch.ones(1, 4, 4, 12, device=DEVICE), torch.ones(2, device=DEVICE)
    segments = train_gpt.Segments(torch.tensor([0, 4], dtype=torch.int32, device=DEVICE), 4)
    rope = torch.ones(2, 4, 6, device=DEVICE)
    attend = train_gpt.attend_fa4
    y = train_gpt.attention_core(x, x[..., 0, :0], gain, None, rope, attend, segments, True, 1.0)
    assert y.shape == (1, 4, 24)


@kernels
def test_a_model_with_gated_xsa_and_two_caps_runs_fused(monkeypatch):
    """No twin is called, and the gradient of every parameter errs like that of plain PyTorch."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    size = {} if INTERPRETED else dict(model_dim=256, rope_dims=16)
    cfg = tiny(**size, num_layers=3, xsa_last_n=2, parallel_start_layer=2, loop_end=1,
               gated_xsa=True, asym_logit_rescale=True, logit_softcap=3.0)
    rows = [row_of(documents(lengths)) for lengths in ([7, 12], [19], [5, 5, 9], [16, 3])]

    def gradients(kind, attend, row):
        model = busy_model(cfg, attend=attend).to(DEVICE)
        model.dtype = kind
        model = model.double() if kind == torch.float64 else model
        segments = train_gpt.Segments(row.segments.cu_seqlens.to(DEVICE), row.segments.max_len)
        loss = model(row.ids.to(DEVICE), row.targets.to(DEVICE), segments, True)
        grads = torch.autograd.grad(loss.mean(), [*model.parameters()])
        names = [name for name, _ in model.named_parameters()]
        return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}

    def run(kind, attend):
        return [gradients(kind, attend, row) for row in rows]

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "fused", lambda x: False)
        truth, native = run(torch.float64, train_gpt.attend_ref), run(dtype, train_gpt.attend_ref)
    if not has_fa4():
        monkeypatch.setattr(train_gpt, "fa4_forward", plain_attention)
        monkeypatch.setattr(train_gpt, "fa4_backward", plain_attention_back)
    for twin in ("attention_core_ref", "softcap_cross_entropy_ref", "leaky_mlp_ref",
                 "residual_mix_rmsnorm_ref"):
        monkeypatch.setattr(train_gpt, twin, None)
    ours = run(dtype, train_gpt.attend_fa4)
    assert all(x["softcap_pos"].any() and x["blocks.2.attn.xsa_alpha"].any() for x in ours)

    def error(found):
        """Of each parameter, root mean square over the rows: one row alone may err by luck."""
        part = [[(x[name].double() - want).norm() / (want.norm() + 1e-12)
                 for name, want in exact.items()] for x, exact in zip(found, truth, strict=True)]
        return torch.tensor(part).square().mean(0).sqrt()

    errors = error(ours), error(native)
    # A cap is one number, whose native error may be near 0: as above, no less is expected than that
    # of one rounding
    allowed = 3 * errors[1].clamp(min=rounding_error(dtype, 1)) + 1e-6
    assert (errors[0] <= allowed).all(), dict(zip(truth[0], zip(*errors, strict=True)))
    assert errors[0].norm() <= 2 * errors[1].norm() + 1e-6
