"""§4 Attention: every backend that can run here against attend_ref, values and gradients.

No tolerance is chosen: the error against float64 may be twice the plain twin's own error in the
same number type. On a CUDA machine the same tests cover varlen and fa4.
"""
import math
import sys
import types

import pytest
import torch

import train_gpt
from train_gpt import FA4, Segments, attend_packed, attend_ref, attend_sdpa, choose_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"
BACKENDS = ["fa4", "varlen", "sdpa"]

LENGTHS = {  # of the segments, and how often cu_seqlens repeats N at its end
    "ragged": ([5, 37, 1, 64, 12, 12, 12, 130], 0),
    "padded": ([9, 33, 70], 13),
    "single tokens": ([1] * 17 + [3] + [1] * 5, 2),
    "uniform batch": ([48] * 5, 0),
    "one segment": ([200], 0),
    "one token": ([1], 0),
}


def make(lengths, padding=0, slack=0) -> Segments:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = torch.cat([bounds, bounds[-1:].expand(padding)]).to(DEVICE, torch.int32)
    return Segments(cu_seqlens, max(lengths) + slack)


def tensors(N, H, K, D, dtype, seed=0) -> list[torch.Tensor]:
    """q, k, v and the upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, heads, D, generator=generator).to(DEVICE, dtype)
            for heads in (H, K, K, H)]


def outcome(attend, q, k, v, dy, segments) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attend(*leaves, segments)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_native(attend, segments, H=4, K=2, D=16, dtype=DTYPE) -> None:
    """Norm of the error <= twice the twin's, against float64, but for one float32 rounding: of the
    result or, for dq and dk, of dy . v, which flash attention subtracts from dy . y."""
    q, k, v, dy = inputs = tensors(int(segments.cu_seqlens[-1]), H, K, D, dtype)
    ours, native = (outcome(f, *inputs, segments) for f in (attend, attend_ref))
    y, dq, dk, dv = truth = outcome(attend_ref, *(x.double() for x in inputs), segments)
    reach = dy.double().norm(dim=-1).max() * v.double().norm(dim=-1).max() / math.sqrt(D)
    sizes = y.abs().max(), reach * k.abs().max(), reach * q.abs().max(), dv.abs().max()
    names = "y", "dq", "dk", "dv"
    for name, x, n, t, size in zip(names, ours, native, truth, sizes, strict=True):
        assert x.shape == t.shape and x.dtype == dtype
        error, allowed = (x.double() - t).norm(), 2 * (n.double() - t).norm()
        rounding = torch.finfo(torch.float32).eps * size * math.sqrt(t.numel())
        assert error <= allowed + rounding, f"{name}: {error:.3g} > {allowed:.3g} + {rounding:.3g}"


def backend(name: str):
    try:
        return choose_attention(DEVICE, DTYPE, name).function
    except train_gpt.UserError as error:
        pytest.skip(str(error))


# ---- the definition

def test_reference_is_causal_softmax_within_segments():
    segments = make([3, 1, 4], padding=2)
    q, k, v, _ = tensors(8, 4, 2, 8, torch.float64)
    y = attend_ref(q, k, v, segments)
    start = {i: begin for begin, end in ((0, 3), (3, 4), (4, 8)) for i in range(begin, end)}
    for i, begin in start.items():
        for h in range(4):
            seen = slice(begin, i + 1)
            p = (k[seen, h // 2] @ q[i, h] / math.sqrt(8)).softmax(0)
            torch.testing.assert_close(y[i, h], p @ v[seen, h // 2])


# ---- every backend

@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LENGTHS)
def test_layouts(name, layout):
    assert_native(backend(name), make(*LENGTHS[layout]), D=64)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_grouped_heads(name, ratio):
    assert_native(backend(name), make([20, 7, 33]), H=4, K=4 // ratio, D=64)


@pytest.mark.parametrize("name", BACKENDS)
def test_max_len_is_a_bound(name):
    assert_native(backend(name), make([20, 7, 33], slack=11), D=64)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_views_of_one_product(name):
    """q, k and v as slices of a fused projection [N, (H + 2K) D]."""
    segments, attend = make([20, 44]), backend(name)
    q, k, v, dy = tensors(64, 4, 2, 64, DTYPE)
    fused = torch.cat([q, k, v], dim=1).flatten(1).requires_grad_()
    slices = fused.unflatten(1, (8, 64)).split([4, 2, 2], dim=1)
    grad, = torch.autograd.grad(attend(*slices, segments), fused, dy)
    wanted = outcome(attend, q, k, v, dy, segments)[1:]
    # one backend against itself: only whether it reads views right
    torch.testing.assert_close(grad.unflatten(1, (8, 64)), torch.cat(wanted, dim=1))


IN_GRAPHS = [name for name in BACKENDS if name != "fa4"]  # which is called between graphs


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_one_graph_for_every_number_of_segments(name):
    attend, seen = backend(name), []

    def count(graph, inputs):
        seen.append(graph)
        return graph.forward

    def step(q, k, v, cu_seqlens, max_len):
        return 2 * attend(q, k, v, Segments(cu_seqlens, max_len))

    layouts = [make([30, 50, 10, 1, 5]), make([1] * 10 + [36, 50], 3), make([49, 47], 4)]
    compiled, counted = (torch.compile(step, fullgraph=True, dynamic=True, backend=b)
                         for b in (BACKEND, count))
    for lengths in layouts:
        segments = Segments(lengths.cu_seqlens, 50)
        assert_native(lambda q, k, v, s: compiled(q, k, v, s.cu_seqlens, s.max_len) / 2, segments,
                      D=64)
        q, k, v, _ = tensors(96, 4, 2, 64, DTYPE)
        counted(q, k, v, segments.cu_seqlens, 50)
    assert len(seen) == 1


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_segments_may_enter_a_graph_as_they_are(name):
    attend = backend(name)
    compiled = torch.compile(lambda *a: attend(*a), fullgraph=True, backend=BACKEND)
    for segments in (make([30, 50, 16]), Segments.batch(2, 48, DEVICE)):
        assert_native(compiled, segments, D=64)


# ---- the dense backend's shapes

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_in_either_number_type(dtype):
    assert_native(attend_sdpa, make(*LENGTHS["ragged"]), dtype=dtype)


def test_runs_join_neighbours_of_equal_length():
    assert make([4, 4, 7, 4, 1, 1, 1], padding=3).runs == [(2, 4), (1, 7), (1, 4), (3, 1)]
    assert Segments.batch(3, 5, DEVICE).runs == [(3, 5)]


def test_a_batch_is_one_dense_call_that_reads_no_lengths(monkeypatch):
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(train_gpt.F, "scaled_dot_product_attention",
                        lambda *a, **k: calls.append(a[0].shape) or sdpa(*a, **k))
    segments = Segments.batch(3, 5, DEVICE)
    attend_sdpa(*tensors(15, 4, 2, 8, DTYPE)[:3], segments)
    assert calls == [(3, 4, 5, 8)] and "runs" not in vars(segments)


# ---- adapters, with stand-ins for what is not installed

def flash_varlen(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                 max_seqlen_k=None, causal=False):
    """What flash_attn.cute.interface.flash_attn_varlen_func returns: (out, lse)."""
    assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return attend_ref(q, k, v, Segments(cu_seqlens_q, max_seqlen_q)), None


@pytest.fixture
def fake_fa4(monkeypatch):
    module = types.ModuleType(FA4)
    module.flash_attn_varlen_func = flash_varlen
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, FA4, module)


def test_fa4_passes_values_and_gradients(fake_fa4):
    segments = make([5, 37, 1], padding=2)
    assert_native(train_gpt.attend_fa4, segments)


def test_packed_adapter_speaks_each_release():
    def torch_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return "2.10" if is_causal and max_k == 2 else "wrong"

    def torch_2_12(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1), enable_gqa=False, num_splits=None):
        return {"window": window_size, "grouped": enable_gqa}

    segments = make([2])
    assert attend_packed(lambda *a, is_causal=False: [*a, is_causal])(1, 2, 3, segments) == [
        1, 2, 3, segments.cu_seqlens, segments.cu_seqlens, 2, 2, True]
    assert attend_packed(torch_2_10)(1, 2, 3, segments) == "2.10"
    assert attend_packed(torch_2_12)(1, 2, 3, segments) == {"window": (-1, 0), "grouped": True}


# ---- the choice

def test_cpu_takes_sdpa_and_says_why():
    chosen = choose_attention(torch.device("cpu"), torch.float32)
    assert chosen.name == "sdpa" and chosen.function is attend_sdpa
    for part in ("fa4: needs CUDA", "varlen: needs CUDA", "using sdpa"):
        assert part in chosen.reason
    assert "\n" not in chosen.reason
    assert choose_attention(torch.device("cpu"), torch.float32, "ref").function is attend_ref


def test_an_impossible_wish_is_an_error_with_a_remedy():
    with pytest.raises(train_gpt.UserError, match="fa4.*needs CUDA.*flash-attn-4.*ATTENTION=auto"):
        choose_attention(torch.device("cpu"), torch.bfloat16, "fa4")


@pytest.mark.parametrize("capability, name", [((9, 0), "fa4"), ((10, 0), "fa4"), ((8, 0), "varlen"),
                                              ((7, 5), "sdpa")])
def test_choice_by_capability(capability, name, fake_fa4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = choose_attention(torch.device("cuda"), torch.bfloat16)
    assert chosen.name == name and chosen.reason.endswith(f"using {name}")
    assert choose_attention(torch.device("cuda"), torch.float32).name == "sdpa"


def test_broken_packages_are_passed_over_with_their_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, FA4, None)  # importing it now raises ImportError
    empty = types.ModuleType("torch.nn.attention.varlen")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", empty)
    chosen = choose_attention(torch.device("cuda"), torch.bfloat16)
    assert chosen.name == "sdpa"
    assert "fa4: " in chosen.reason and "has no attribute 'varlen_attn'" in chosen.reason
    with pytest.raises(train_gpt.UserError, match="pip install flash-attn-4"):
        choose_attention(torch.device("cuda"), torch.bfloat16, "fa4")


# ---- one choice for all ranks

def ranks(monkeypatch, *chosen):
    """A runtime whose collective answers with these (name, reason)."""
    def gather(found, own):
        assert own == chosen[0]
        found[:] = chosen

    monkeypatch.setattr(train_gpt.dist, "all_gather_object", gather)
    return train_gpt.Runtime(0, len(chosen), DEVICE)


def test_ranks_agree_or_all_refuse(monkeypatch):
    mine = train_gpt.Attention("fa4", "using fa4", attend_ref)
    rt = ranks(monkeypatch, ("fa4", "using fa4"), ("fa4", "using fa4"))
    assert train_gpt.agree_on(mine, rt).reason == "using fa4 on every rank"
    assert train_gpt.agree_on(mine, train_gpt.Runtime(0, 1, DEVICE)).function is attend_ref
    why = "fa4: No module named 'flash_attn'; using varlen"
    rt = ranks(monkeypatch, ("fa4", "using fa4"), ("fa4", "using fa4"), ("varlen", why))
    with pytest.raises(train_gpt.UserError) as caught:
        train_gpt.agree_on(mine, rt)
    text = str(caught.value)
    assert "rank 0 takes fa4, rank 2 varlen" in text and why in text and "ATTENTION=sdpa" in text
    assert "\n" not in text
