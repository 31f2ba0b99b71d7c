"""§11, TTT_STREAM=1: every token runs once, and the scores are those of whole windows where nothing
is learnt; what is learnt never comes before its score."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.test_11_ttt import LENGTHS, documents_of, nothing, one_batch, score, windowed_loss
from tests.tools import (
    NO_GPU,
    TINY,
    RecordingMeter,
    busy_model,
    cosine_start,
    launch,
    losses_of,
    runtime,
    tiny,
    val_set,
    write_data,
)

LONG = 96  # a context that holds every document of LENGTHS


def adapter_for(make, model, cfg, batch, scale=0.0):
    """An adapter for a batch; with a scale, its B are not zero."""
    adapter = make(model, cfg, runtime(), len(batch), cosine_start)
    generator = torch.Generator().manual_seed(7)
    for B in adapter.lora.B.values():
        B.data = scale * torch.randn(B.shape, generator=generator)
    return adapter


def recorded(adapter, batch, val):
    """[scored target, in order of chunk and document] losses of a batch, for each chunk."""
    meter = RecordingMeter()
    t.score_batch(adapter, batch, val, meter, nothing)
    return [losses[mask] for losses, _, mask in meter.calls]


# ---- equality

@pytest.mark.parametrize("changes", [
    {}, {"smear_gate_enabled": False}, {"num_loops": 0}, {"parallel_start_layer": 0},
    {"rope_dims": 0}, {"num_kv_heads": 4}, {"xsa_last_n": 0}, {"ttt_chunk_size": 1},
    {"ttt_chunk_size": 7}, {"ttt_chunk_size": 61}, {"ttt_chunk_size": LONG},
    {"ttt_k_lora": False, "ttt_mlp_lora": False, "ttt_o_lora": False},
    {"sparse_attn_gate_enabled": False},
], ids=str)
def test_every_loss_is_that_of_whole_windows_at_learning_rate_0(changes):
    cfg = tiny(ttt_lora_lr=0.0, ttt_eval_seq_len=LONG, **changes)
    model, val = busy_model(cfg), val_set(LENGTHS)
    batch = one_batch(val)
    whole, streamed = (recorded(adapter_for(make, model, cfg, batch, 0.3), batch, val)
                       for make in (t.LoraTTT, t.StreamingLoraTTT))
    plain = recorded(adapter_for(t.LoraTTT, model, cfg, batch), batch, val)
    assert len(whole) == len(streamed)
    for x, y in zip(whole, streamed, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert (torch.cat(whole) - torch.cat(plain)).abs().max() > 0.1  # the adapters do something


@pytest.mark.parametrize("size", [1, 4, 5, 64])
def test_learning_rate_0_is_plain_scoring(size):
    cfg = tiny(ttt_lora_lr=0.0, phased_ttt_prefix_docs=0, ttt_batch_size=size, ttt_stream=True,
               ttt_eval_seq_len=LONG)
    model, val = busy_model(cfg), val_set(LENGTHS)
    found = score(model, val, cfg)
    assert found.tokens == len(val.ids) - 1 and found.bytes == val.bytes.sum()
    assert math.isclose(found.loss, windowed_loss(model, val, cfg), rel_tol=1e-6)


@pytest.mark.parametrize(("chunk", "context"), [(8, 24), (8, 31), (5, 20), (12, 12), (7, 15)])
def test_documents_longer_than_the_context(chunk, context):
    """The twin: one forward over the document, in which a token sees its own chunk up to itself and
    the context // chunk - 1 chunks before."""
    cfg = tiny(ttt_lora_lr=0.0, ttt_chunk_size=chunk, ttt_eval_seq_len=context, ttt_stream=True,
               phased_ttt_prefix_docs=0)

    def attend(q, k, v, segments):
        at = torch.arange(len(q))
        kept = context // chunk - 1
        seen = (at[:, None] >= at) & (at[:, None] // chunk - at // chunk <= kept)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)

    val = val_set(LENGTHS)
    twin, model = busy_model(cfg, attend=attend), busy_model(cfg)
    with torch.no_grad():
        nats = sum(losses_of(twin, val.ids[d.begin:d.end]).double().sum().item()
                   for d in documents_of(val))
    assert math.isclose(score(model, val, cfg).loss, nats / (len(val.ids) - 1), rel_tol=1e-6)


def test_the_position_in_the_document_does_not_matter():
    """Far into a document, beyond any table: products see differences of positions only."""
    cfg = tiny()
    kv_cache = t.KVCache(cfg, 2, torch.device("cpu"), torch.float32)
    results = []
    for chunk in (3, 10**5):
        generator = torch.Generator().manual_seed(0)
        kv_cache.kv.zero_()
        for step in range(3):
            kv_cache.seek(torch.tensor(chunk + step), slice(None), kv_cache.ring)
            q = torch.randn(2, 8, 4, 8, generator=generator)
            k, v = torch.randn(2, 2, 8, 2, 8, generator=generator)
            y = kv_cache.attend(0, t.rotate(q, *kv_cache.rope), t.rotate(k, *kv_cache.rope), v)
        results.append(y)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_few_shapes_give_the_same_scores(monkeypatch):
    """What a GPU does: widths and rows rounded up. Padding reaches no score and no gradient."""
    cfg, losses = tiny(phased_ttt_prefix_docs=0, ttt_batch_size=8), {}
    val = val_set(LENGTHS)
    running = t.running_docs
    for rounded in (False, True):
        if rounded:
            monkeypatch.setattr(t, "width_unit", lambda cfg, device: 2 * cfg.ttt_chunk_size)
            monkeypatch.setattr(t, "running_docs", lambda *args: running(*args[:3],
                                                                         torch.device("cuda")))
        for stream in (False, True):
            settings = replace(cfg, ttt_stream=stream)
            losses[rounded, stream] = score(busy_model(cfg), val, settings)
    for stream in (False, True):
        exact, padded = losses[False, stream], losses[True, stream]
        assert exact[2:] == padded[2:] and abs(exact.loss - padded.loss) < 1e-3


def test_rows_that_run():
    counts, cfg, cuda = np.array([3, 9, 9, 20, 30, 31]), tiny(), torch.device("cuda")
    cpu = [t.running_docs(counts, chunk, cfg, torch.device("cpu")) for chunk in range(4)]
    assert cpu == [6, 5, 3, 2]
    assert [t.running_docs(counts, chunk, cfg, cuda) for chunk in range(4)] == [6, 6, 3, 3]
    assert t.width_unit(t.Config(ttt_eval_seq_len=2048, ttt_chunk_size=48), cuda) == 384


def test_a_long_document_brings_no_new_shapes(monkeypatch):
    cfg = tiny(ttt_eval_seq_len=80)  # a ring of 9 chunks
    monkeypatch.setattr(t, "width_unit", lambda cfg, device: 2 * cfg.ttt_chunk_size)
    val = val_set([500])
    adapter = t.StreamingLoraTTT(busy_model(cfg), cfg, runtime(), 1, cosine_start)
    kv_lens = [chunk_batch.kv_len for (chunk_batch,) in adapter.plan(documents_of(val), val)]
    assert kv_lens[:12] == [0, 16, 16, 32, 32, 48, 48, 64, 64, 72, 72, 72]
    assert set(kv_lens[9:]) == {72} and len(kv_lens) == 63


# ---- learning

def test_the_first_step_is_that_of_whole_windows():
    cfg = tiny(ttt_lora_lr=0.02)
    model, val = busy_model(cfg), val_set([30, 12, 7])
    batch, found = one_batch(val), []
    for make in (t.LoraTTT, t.StreamingLoraTTT):
        adapter = adapter_for(make, model, cfg, batch, 0.1)
        adapter.replay(next(iter(adapter.plan(batch, val))), RecordingMeter())
        found.append(torch.cat([p.detach().flatten() for p in adapter.lora.parameters()]))
    # beta1 = 0: where a gradient is a rounding error, its sign decides; else equal
    assert ((found[0] - found[1]).abs() < 1e-5).double().mean() > 0.999


def test_no_gradient_enters_what_is_kept_and_it_stays_as_it_was():
    cfg = tiny(ttt_eval_seq_len=LONG)
    model, val = busy_model(cfg), val_set([60, 50])
    adapter = adapter_for(t.StreamingLoraTTT, model, cfg, one_batch(val), 0.1)
    for chunk, chunk_batches in enumerate(adapter.plan(one_batch(val), val)):
        before = adapter.kv_cache.kv.clone()
        adapter.run(chunk_batches, RecordingMeter())
        assert not adapter.kv_cache.kv.requires_grad
        C = cfg.ttt_chunk_size
        assert torch.equal(before[..., :chunk * C, :], adapter.kv_cache.kv[..., :chunk * C, :])
        assert not torch.equal(before, adapter.kv_cache.kv)


def test_what_an_earlier_batch_kept_is_not_seen():
    """The ring is not emptied between batches: the mask alone hides what lies in it."""
    cfg = tiny(ttt_warm_start_a=False)
    model, val = busy_model(cfg), val_set(LENGTHS)
    batch = one_batch(val)
    adapter = adapter_for(t.StreamingLoraTTT, model, cfg, batch)
    first = recorded(adapter, batch, val)
    adapter.reset()
    adapter.kv_cache.kv.fill_(1e4)
    for x, y in zip(first, recorded(adapter, batch, val), strict=True):
        assert torch.equal(x, y)


def test_learn_takes_only_what_was_scored():
    cfg = tiny()
    model, val = busy_model(cfg), val_set([30, 30])
    adapter = t.StreamingLoraTTT(model, cfg, runtime(), 2, cosine_start)
    (chunk_batch,) = next(iter(adapter.plan(one_batch(val), val)))
    for wrong in (chunk_batch, torch.zeros(2, 8, requires_grad=True), None):
        with pytest.raises((AttributeError, TypeError)):
            adapter.learn(wrong)
    meter = RecordingMeter()
    scored = adapter.score(chunk_batch, meter)
    assert isinstance(scored, t.Scored) and meter.result().tokens == 16
    adapter.learn(scored)


def test_base_weights_get_no_gradient():
    cfg = tiny(phased_ttt_prefix_docs=0)
    for stream in (False, True):
        model = busy_model(cfg)
        score(model, val_set(LENGTHS), replace(cfg, ttt_stream=stream))
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_long_document_costs_less():
    cfg = tiny(ttt_eval_seq_len=512, ttt_chunk_size=16, phased_ttt_prefix_docs=0)
    model, val, seconds = busy_model(cfg), val_set([1500]), []
    for stream in (False, True):
        started = time.perf_counter()
        score(model, val, replace(cfg, ttt_stream=stream))
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < seconds[0]


# ---- shared out over ranks

@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("stream", [False, True])
def test_every_batch_is_scheduled_once(world, stream):
    rng = np.random.default_rng(0)
    cfg = tiny(ttt_stream=stream)
    docs = [t.Document(0, int(n) + 2) for n in rng.lognormal(4, 1, 150)]
    batches = t.document_batches(docs, 4)
    boundaries = [20, 40]
    rounds = t.schedule_batches(batches, boundaries, cfg, world)
    scheduled = [number for assignments in rounds for own in assignments for number in own]
    assert sorted(scheduled) == list(range(len(batches))) and len(rounds) == 3
    first, done = len(batches), 0
    for assignments, boundary in zip(rounds, [*boundaries, None], strict=True):
        assert all(own == sorted(own, reverse=True) for own in assignments)
        assert len(assignments) == world
        numbers = sorted(number for own in assignments for number in own)
        assert numbers == list(range(first - len(numbers), first))  # the longest that are left
        before, first = done, numbers[0]
        done += sum(len(batches[number]) for number in numbers)
        if boundary:  # when it is reached the other ranks' batches are begun
            assert boundary <= done <= max(boundary, before) + 4 * (world + 1)
    costs = [sum(t.planned_cost(batches[number], cfg) for number in own) for own in rounds[-1]]
    longest = max(t.planned_cost(batches[number], cfg) for own in rounds[-1] for number in own)
    assert max(costs) - min(costs) <= longest


def test_planned_costs_are_tokens_run():
    val = val_set(LENGTHS)
    cfg = tiny(ttt_eval_seq_len=24)
    batch = one_batch(val)
    run = sum(-(-min((c + 1) * 8, 24) // 8) for doc in batch for c in range(-(-doc.targets // 8)))
    assert t.planned_cost(batch, cfg) == run
    assert t.planned_cost(batch, replace(cfg, ttt_stream=True)) == -(-batch[-1].targets // 8)


@pytest.mark.dist
def test_two_processes_score_everything_once(tmp_path):
    data, found = write_data(tmp_path / "data", train_tokens=6000), []
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for launcher in ((), torchrun):
        settings = {**TINY, **NO_GPU, "DATA_PATH": data, "ARTIFACT_DIR": tmp_path,
                    "TTT_STREAM": 1, "RUN_ID": f"log{len(found)}",
                    **({"TTT_EVAL_ONLY": 1} if found else {})}
        run = launch(settings, tmp_path, launcher=launcher)
        assert run.returncode == 0, run.stderr[-3000:]
        line = next(x for x in run.stdout.splitlines() if x.startswith("quantized_ttt_phased"))
        counts = next(x for x in run.stdout.splitlines() if x.startswith("scored:"))
        found.append((float(line.split("val_loss:")[1].split()[0]), counts))
    assert found[0][1] == found[1][1] and abs(found[0][0] - found[1][0]) < 0.1


# ---- GPU

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("stream", [False, True])
def test_recorded_graphs_give_the_same_scores(stream):
    rt, val = t.start_runtime({}), val_set(LENGTHS * 3)
    cfg = tiny(model_dim=128, phased_ttt_prefix_docs=20, ttt_stream=stream)
    attend, scores = t.choose_attention(rt.device, rt.dtype).function, []
    for record in (False, True):
        model = busy_model(cfg, attend=attend).to(rt.device)
        model.dtype = rt.dtype
        scores.append(t.score_phased(model, val,
                                     replace(cfg, compile=record), rt, cosine_start))
    assert scores[0][2:] == scores[1][2:] and abs(scores[0].loss - scores[1].loss) < 1e-2
