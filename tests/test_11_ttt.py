"""§11 Test-time training: the plan by brute force, and that no score knows what comes later."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.tools import RecordingMeter, busy_model, cosine_start, losses_of, runtime, tiny, val_set

CPU = torch.device("cpu")
LENGTHS = [12, 40, 5, 1, 29, 8, 33, 16, 60, 23, 9, 41]  # targets: one more, the last one less


def documents_of(val):
    return [t.Document(a, b) for a, b in val.documents()]


def one_batch(val):
    """All documents, the shortest first, as a batch has them."""
    return t.document_batches(documents_of(val), 1000)[0]


def nothing(count):
    """A progress report that goes nowhere."""


def score(model, val, cfg, **options):
    return t.score_phased(model, val, cfg, runtime(),
                          options.pop("init", cosine_start))


# ---- the plan

def test_batches_are_cut_from_the_shortest_up():
    docs = [t.Document(0, n) for n in (5, 3, 9, 3, 7, 4, 8)]
    docs[3] = t.Document(100, 103)
    lengths = [[d.end - d.begin for d in batch] for batch in t.document_batches(docs, 3)]
    assert lengths == [[3, 3, 4], [5, 7, 8], [9]]
    assert [d.begin for d in t.document_batches(docs, 3)[0]] == [0, 100, 0]  # stable
    assert t.document_batches([], 3) == []


@pytest.mark.parametrize(("prefix", "phases", "documents", "want"), [
    (2500, 3, 50000, [833, 1666, 2500]), (2000, 3, 50000, [666, 1333, 2000]),
    (0, 3, 100, []), (2500, 3, 100, [33, 66, 100]), (2, 3, 100, [1, 2]), (6, 2, 14, [3, 6]),
    (7, 1, 9, [7]),
])
def test_phase_boundaries(prefix, phases, documents, want):
    cfg = tiny(phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=phases)
    assert t.phase_boundaries(cfg, documents) == want


@pytest.mark.parametrize(("chunk", "context"), [(8, 24), (7, 20), (1, 5), (8, 8), (16, 2048)])
def test_chunk_batches_against_a_loop_over_documents(chunk, context):
    cfg = tiny(ttt_chunk_size=chunk, ttt_eval_seq_len=context)
    val = val_set(LENGTHS)
    docs = documents_of(val)
    scored = np.zeros(len(val.ids), int)
    for batch in t.document_batches(docs, 5):
        plan = list(t.plan_chunk_batches(batch, val, cfg, CPU))
        assert len(plan) == max(-(-d.targets // chunk) for d in batch)
        for c in range(len(plan)):
            (w,) = plan[c]
            reach = [doc for doc in batch if doc.targets > c * chunk]
            assert batch[w.docs] == reach
            assert w.ids.shape[1] <= context and w.positions.shape == (len(reach), chunk)
            assert w.count == w.mask.sum()
            for b, doc in enumerate(reach):
                text = val.ids[doc.begin:doc.end]
                first, last = c * chunk, min((c + 1) * chunk, len(text) - 1)
                count = last - first
                assert w.mask[b].sum() == count and w.mask[b, :count].all()
                assert w.trains[b] == (len(text) - 1 > (c + 1) * chunk)
                start = max(0, last - context)
                assert w.ids[b, :last - start].tolist() == text[start:last].tolist()
                assert not w.ids[b, last - start:].any()
                for k in range(count):
                    target = first + k + 1
                    scored[doc.begin + target] += 1
                    assert w.targets[b, k] == text[target]
                    assert w.sizes[b, k] == val.bytes[doc.begin + target]
                    position = int(w.positions[b, k])
                    assert start + position == target - 1
                    assert w.ids[b, position] == text[target - 1]
            assert w.updates == bool(w.trains.any())
    assert scored[0] == 0 and (scored[1:] == 1).all()


def test_global_rows_schedule():
    cfg = tiny(global_ttt_chunk_tokens=64, eval_seq_len=16, global_ttt_batch_seqs=3,
               global_ttt_lr=0.8)
    # 4 sequences a chunk, 3 at a time; 257 tokens are 4 chunks, the last is not trained on
    factors = [1.0, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2]
    want = [(0.8 * f, 64 * c + s * 16, n) for c, f in enumerate(factors) for s, n in
            ((0, 3), (3, 1))]
    for tokens in (257, 194):
        found = list(t.global_rows(np.zeros(tokens), cfg))
        np.testing.assert_allclose(found, want)
    assert len(list(t.global_rows(np.zeros(258), cfg))) == 8
    assert list(t.global_rows(np.zeros(65), cfg)) == []  # one chunk: nothing to train on
    assert [row[0] for row in t.global_rows(np.zeros(66), cfg)] == [0.8, 0.8]
    cfg = tiny(global_ttt_chunk_tokens=70, eval_seq_len=32, global_ttt_batch_seqs=9)
    assert [row[1:] for row in t.global_rows(np.zeros(200), cfg)] == [(0, 2), (70, 2)]


# ---- scores

@torch.no_grad()
def windowed_loss(model, val, cfg) -> float:
    """Mean loss of every target, each chunk in its own window, by the base model alone."""
    nats = 0.0
    for doc in documents_of(val):
        text = val.ids[doc.begin:doc.end]
        for first in range(0, len(text) - 1, cfg.ttt_chunk_size):
            last = min(first + cfg.ttt_chunk_size, len(text) - 1)
            start = max(0, last - cfg.ttt_eval_seq_len)
            losses = losses_of(model, text[start:last + 1])
            nats += losses[first - start:].double().sum().item()
    return nats / (len(val.ids) - 1)


@pytest.mark.parametrize("batch", [1, 4, 5, 64])
def test_learning_rate_0_is_plain_scoring(batch):
    cfg = tiny(ttt_lora_lr=0.0, phased_ttt_prefix_docs=0, ttt_batch_size=batch)
    model, val = busy_model(cfg), val_set(LENGTHS)
    found = score(model, val, cfg, init=t.uniform_start(torch.Generator().manual_seed(1)))
    assert found.tokens == len(val.ids) - 1 and found.bytes == val.bytes.sum()
    assert math.isclose(found.loss, windowed_loss(model, val, cfg), rel_tol=1e-6)
    assert math.isclose(found.bpb, found.loss * found.tokens / math.log(2) / found.bytes)


def test_a_document_does_not_know_its_batch():
    """Adapters are per document: alone or among others, the score is the same."""
    cfg = tiny(phased_ttt_prefix_docs=0, ttt_warm_start_a=False)
    model, val = busy_model(cfg), val_set(LENGTHS)
    base = windowed_loss(model, val, cfg)
    alone, together = (score(model, val, replace(cfg, ttt_batch_size=n)) for n in (1, 5))
    assert abs(alone.loss - base) > 1e-2
    assert math.isclose(alone.loss, together.loss, abs_tol=2e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_training_helps_on_text_that_repeats(stream):
    cfg = tiny(ttt_lora_lr=0.02, phased_ttt_prefix_docs=0, ttt_weight_decay=0.0, ttt_stream=stream)
    model = busy_model(cfg)
    ids = np.concatenate([[1], np.tile([7, 9, 23, 40, 8, 11], 25)])
    val = t.ValSet(ids, np.where(ids == 1, 0, 2).astype(np.int32))
    assert score(model, val, cfg).loss < 0.7 * windowed_loss(model, val, cfg)


@pytest.mark.parametrize("make", [t.LoraTTT, t.StreamingLoraTTT])
def test_a_score_does_not_know_later_tokens_nor_other_documents(make):
    cfg = tiny()
    model, val = busy_model(cfg), val_set([50, 44, 61, 40])
    batch = one_batch(val)
    cut, doc = 3, batch[-1]  # change everything of the longest document after its chunks 0, 1, 2
    ids = val.ids.copy()
    begin = doc.begin + 1 + cut * cfg.ttt_chunk_size
    ids[begin:doc.end - 1] = 2 + (ids[begin:doc.end - 1] + 9) % 62
    runs = []
    for tokens in (val.ids, ids):
        meter = RecordingMeter()
        adapter = make(model, cfg, runtime(), 4, cosine_start)
        t.score_batch(adapter, batch, t.ValSet(tokens, val.bytes), meter, nothing)
        runs.append([torch.where(mask, losses, 0) for losses, _, mask in meter.calls])
    first, second = runs
    assert len(first) == len(second) == -(-62 // 8)
    for chunk, (x, y) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(x[-1], y[-1]) == (chunk < cut), chunk
        assert torch.equal(x[:-1], y[:-1])  # the others' losses stay as they are


@pytest.mark.parametrize("position", [0, 3, 7])
def test_no_score_knows_a_document_that_is_scored_later(position, monkeypatch):
    """Whole evaluation with global phases: change one document, and every batch before its own
    gives the same bits; of those after a phase some do not."""
    cfg = tiny(ttt_batch_size=2, phased_ttt_prefix_docs=8, global_ttt_lr=0.05)
    val = val_set([60 - 4 * i for i in range(12)])  # scored in this order, two at a time
    begin, end = val.documents()[position]
    ids = val.ids.copy()
    ids[begin + 1:end - 1] = 2 + (ids[begin + 1:end - 1] + 9) % 62
    runs = []
    for tokens in (val.ids, ids):
        meter = RecordingMeter()
        monkeypatch.setattr(t, "Meter", lambda rt, meter=meter: meter)
        score(busy_model(cfg), t.ValSet(tokens, val.bytes), cfg)
        runs.append([torch.where(mask, losses, 0) for losses, _, mask in meter.calls])
    same = [torch.equal(x, y) for x, y in zip(*runs, strict=True)]
    docs = documents_of(val)
    chunks = [-(-max(d.targets for d in docs[i:i + 2]) // 8) for i in range(0, 12, 2)]
    before = sum(chunks[:position // 2])
    assert all(same[:before]) and not same[before]
    if position == 0:  # trained on in the first phase, so that later batches know it
        assert not any(same[sum(chunks[:4]):])


def test_learn_takes_only_what_was_scored():
    cfg = tiny()
    model, val = busy_model(cfg), val_set([30, 30])
    adapter = t.LoraTTT(model, cfg, runtime(), 2, cosine_start)
    (chunk_batch,) = next(t.plan_chunk_batches(one_batch(val), val, cfg, CPU))
    for wrong in (chunk_batch, torch.zeros(2, 8, requires_grad=True), None):
        with pytest.raises((AttributeError, TypeError)):
            adapter.learn(wrong)
    meter = RecordingMeter()
    scored = adapter.score(chunk_batch, meter)
    assert isinstance(scored, t.Scored) and meter.result().tokens == 16
    adapter.learn(scored)
    with pytest.raises(RuntimeError):  # nor twice on the same chunk
        adapter.learn(scored)
    assert meter.result().tokens == 16


def test_a_step_is_adamw_on_the_sum_of_mean_losses():
    cfg = tiny(ttt_lora_lr=0.02, ttt_weight_decay=0.3)
    model, val = busy_model(cfg), val_set([30, 12, 7])  # the last has one chunk: it never trains
    adapter = t.LoraTTT(model, cfg, runtime(), 3, cosine_start)
    generator = torch.Generator().manual_seed(5)
    for B in adapter.lora.B.values():
        B.data = 0.1 * torch.randn(B.shape, generator=generator)
    want = {n: p.detach().double().clone() for n, p in adapter.lora.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in want.items()}
    batch = one_batch(val)
    for chunk in range(2):
        (chunk_batch,) = list(t.plan_chunk_batches(batch, val, cfg, CPU))[chunk]
        trains = [[0, 1, 1], [0, 1]][chunk]
        assert chunk_batch.trains.tolist() == trains
        segments = t.Segments.batch(*chunk_batch.ids.shape, CPU)
        adapter.lora.docs = chunk_batch.docs
        losses = model(chunk_batch.ids, chunk_batch.targets, segments, True, adapter.lora,
                       chunk_batch.positions)
        loss = sum(losses[b].mean() for b in range(len(trains)) if trains[b])
        grads = torch.autograd.grad(loss, list(adapter.lora.parameters()))
        for (n, p), g in zip(want.items(), grads, strict=True):
            second[n] = 0.99 * second[n] + 0.01 * g.double() ** 2
            root = (second[n] / (1 - 0.99 ** (chunk + 1))).sqrt() + 1e-10
            p.mul_(1 - 0.02 * 0.3).sub_(0.02 * g.double() / root)
        adapter.learn(adapter.score(chunk_batch, RecordingMeter()))
        adapter.step()
        for n, p in adapter.lora.named_parameters():
            # beta1 = 0: where a gradient is a rounding error, its sign decides; else equal
            close = (p.detach().double() - want[n]).abs() < 1e-5
            assert close.double().mean() > 0.999, n
            want[n] = p.detach().double().clone()


def test_nobody_left_to_train_keeps_no_graph():
    cfg = tiny()
    model, val = busy_model(cfg), val_set([7, 5])
    adapter = t.LoraTTT(model, cfg, runtime(), 2, cosine_start)
    (chunk_batch,) = next(t.plan_chunk_batches(one_batch(val), val, cfg, CPU))
    assert not chunk_batch.updates
    assert not adapter.score(chunk_batch, RecordingMeter()).losses.requires_grad


def test_reset_between_batches():
    cfg = tiny()
    model, val = busy_model(cfg), val_set([40, 40])
    adapter = t.LoraTTT(model, cfg, runtime(), 2, cosine_start)
    counts = []
    t.score_batch(adapter, one_batch(val), val, RecordingMeter(), counts.append)
    assert sum(counts) == len(val.ids) - 1
    trained = adapter.lora.A["q2"].detach().clone()
    assert adapter.lora.B["q2"].any() and adapter.optimiser.state
    adapter.reset()
    assert torch.equal(adapter.lora.A["q2"], trained)
    moments = [x for state in adapter.optimiser.state.values() for x in state.values()]
    assert not any(x.any() for x in (*adapter.lora.B.values(), *moments)) and moments
    adapter.cfg = replace(cfg, ttt_warm_start_a=False)
    adapter.reset()
    fresh = torch.empty_like(trained)
    cosine_start(fresh)
    assert torch.equal(adapter.lora.A["q2"], fresh)


def test_chunks_of_short_documents():
    """The first limit that the longest document keeps, for the plan and for what it costs."""
    cfg = tiny(ttt_short_score_first_enabled=True, ttt_short_score_first_steps="9:2,33:4")
    for targets, want in ((1, 2), (9, 2), (10, 4), (33, 4), (34, 8)):
        batch = [t.Document(0, 2), t.Document(5, 5 + targets + 1)]
        assert t.for_batch(batch, cfg).ttt_chunk_size == want
        fixed = tiny(ttt_chunk_size=want)
        assert t.planned_cost(batch, cfg) == t.planned_cost(batch, fixed)
    cfg = replace(cfg, ttt_short_score_first_steps="", ttt_short_doc_len=20, ttt_short_chunk_size=5)
    assert [t.for_batch([t.Document(0, n + 1)], cfg).ttt_chunk_size for n in (20, 21)] == [5, 8]
    assert t.for_batch([t.Document(0, 2)], tiny()).ttt_chunk_size == 8


def test_short_chunks_score_what_their_chunk_size_scores():
    """A batch under the limit is scored exactly as with that chunk size for all."""
    val = val_set(LENGTHS)
    short = tiny(ttt_short_score_first_enabled=True, ttt_short_score_first_steps="1000:5",
                 phased_ttt_prefix_docs=0)
    both = [score(busy_model(cfg), val, cfg)
            for cfg in (short, tiny(ttt_chunk_size=5, phased_ttt_prefix_docs=0))]
    assert both[0] == both[1]
    with pytest.raises(t.UserError, match="TTT_STREAM"):
        tiny(ttt_short_score_first_enabled=True, ttt_short_chunk_size=4, ttt_stream=True)


def test_local_rate_multiplies():
    val = val_set(LENGTHS)
    runs = [score(busy_model(cfg), val, cfg) for cfg in (
        tiny(ttt_lora_lr=0.02, ttt_local_lr_mult=0.25), tiny(ttt_lora_lr=0.005))]
    assert runs[0] == runs[1]


# ---- global phases

def sgd(model, val, docs, cfg):
    """The phase, with nothing shared: chunks of the joined text, packed rows, plain momentum."""
    tokens = np.concatenate([val.ids[d.begin:d.end] for d in docs])
    size, length, steps = cfg.global_ttt_chunk_tokens, cfg.eval_seq_len, 0
    chunks = math.ceil((len(tokens) - 1) / size)
    velocity = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for c in range(chunks - 1):
        lr = cfg.global_ttt_lr * (1 + math.cos(math.pi * c / (chunks - 1))) / 2
        sequences = size // length
        for s in range(0, sequences, cfg.global_ttt_batch_seqs):
            n = min(cfg.global_ttt_batch_seqs, sequences - s)
            begin = c * size + s * length
            model.zero_grad()
            losses_of(model, tokens[begin:begin + n * length + 1], longest=length).mean().backward()
            grads = {n: p.grad for n, p in model.named_parameters()}
            norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
            for n_, p in model.named_parameters():
                g = grads[n_] * min(1.0, cfg.global_ttt_grad_clip / norm)
                velocity[n_] = cfg.global_ttt_momentum * velocity[n_] + g
                p.data -= lr * velocity[n_]
            steps += 1
    return steps


def test_a_phase_is_one_pass_of_sgd_over_all_weights():
    cfg = tiny(global_ttt_lr=0.1, global_ttt_grad_clip=0.5, global_ttt_batch_seqs=1)
    val = val_set(LENGTHS)
    docs = documents_of(val)[2:]
    ours, twin = busy_model(cfg), busy_model(cfg)
    steps = t.global_sgd_phase(ours, docs, val, cfg, runtime())
    assert steps == sgd(twin, val, docs, cfg) == 6
    start = busy_model(cfg)
    for (n, p), q, r in zip(ours.named_parameters(), twin.parameters(), start.parameters(),
                            strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, r), n
        assert p.grad is None


def test_a_phase_with_adamw_and_frozen_blocks():
    """torch's AdamW on the same gradients; the first blocks' matrices stay too."""
    cfg = tiny(global_ttt_lr=0.01, global_ttt_grad_clip=0.0, global_ttt_batch_seqs=1,
               global_ttt_optimizer="adamw", ttt_lr_floor_frac=0.3, ttt_freeze_blocks=2)
    val = val_set(LENGTHS)
    docs = documents_of(val)[2:]
    ours, twin = busy_model(cfg), busy_model(cfg)
    t.global_sgd_phase(ours, docs, val, cfg, runtime())
    tokens = np.concatenate([val.ids[d.begin:d.end] for d in docs])
    adamw = torch.optim.AdamW(twin.parameters(), weight_decay=0)
    chunks = math.ceil((len(tokens) - 1) / 64)
    for c in range(chunks - 1):
        for begin in (c * 64, c * 64 + 32):
            adamw.zero_grad()
            losses_of(twin, tokens[begin:begin + 33], longest=32).mean().backward()
            for name, p in twin.named_parameters():
                if name.endswith("_bank"):
                    for layer in (0, 1):
                        p.grad[layer::5] = 0
                elif name.startswith(("blocks.0", "blocks.1")):
                    p.grad = torch.zeros_like(p)
            cosine = (1 + math.cos(math.pi * c / (chunks - 1))) / 2
            adamw.param_groups[0]["lr"] = 0.01 * max(0.3, cosine)
            adamw.step()
    for (n, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        assert ((p - q).abs() < 1e-4).double().mean() > 0.99, n  # rounding decides tiny gradients


def test_a_phase_moves_the_caps():
    cfg = tiny(asym_logit_rescale=True, global_ttt_lr=0.1, logit_softcap=3.0)
    model, val = busy_model(cfg), val_set(LENGTHS)
    before = model.cap().tolist()
    t.global_sgd_phase(model, documents_of(val), val, cfg, runtime())
    assert all(a != b for a, b in zip(before, model.cap().tolist(), strict=True))


def test_phases_train_on_the_right_documents(monkeypatch):
    cfg = tiny(ttt_batch_size=4, phased_ttt_prefix_docs=6, phased_ttt_num_phases=2)
    val = val_set(LENGTHS)  # 12 documents: three batches
    batches = t.make_schedule(val, cfg, 1).batches
    seen = []
    monkeypatch.setattr(t, "global_sgd_phase",
                        lambda model, docs, *rest: seen.append(docs) or 0)
    score(busy_model(cfg), val, cfg)
    # after the longest batch 3 of 4; after two batches the first 6, shorter batch first
    assert seen == [batches[2][:3], (batches[1] + batches[2])[:6]]


def test_no_phase_without_prefix_and_none_after_the_end(monkeypatch):
    seen = []
    monkeypatch.setattr(t, "global_sgd_phase", lambda *rest: seen.append(rest) or 0)
    val = val_set(LENGTHS)
    score(busy_model(tiny()), val, tiny(phased_ttt_prefix_docs=0))
    score(busy_model(tiny()), val, tiny(ttt_batch_size=64))
    assert not seen


def test_document_borders_in_a_phase_can_be_ignored(monkeypatch):
    cfg, seen = tiny(), []
    make_row = t.make_row
    monkeypatch.setattr(t, "make_row", lambda *args, **options: seen.append(
        make_row(*args, **options)) or seen[-1])
    val = val_set(LENGTHS)
    for respect in (True, False):
        model = busy_model(cfg)
        t.global_sgd_phase(model, documents_of(val),
                           val, replace(cfg, global_ttt_respect_doc_boundaries=respect), runtime())
    half = len(seen) // 2
    apart = [len(set(row.segments.cu_seqlens.tolist())) for row in seen]
    assert sum(apart[:half]) > sum(apart[half:]) == 3 * half


def test_splitting_a_chunk_batch_changes_nothing(monkeypatch):
    """Documents do not touch each other: the memory bound may cut a batch anywhere."""
    cfg, scores = tiny(ttt_lora_lr=0.01), []
    for tokens in (10**6, 40):
        monkeypatch.setattr(t, "CHUNK_BATCH_TOKENS", tokens)
        model, val = busy_model(cfg), val_set([30, 12, 25, 7])
        adapter, meter = t.LoraTTT(model, cfg, runtime(), 4, cosine_start), RecordingMeter()
        t.score_batch(adapter, one_batch(val), val, meter, lambda count: None)
        scores.append(meter.result())
    assert scores[0].tokens == scores[1].tokens
    assert abs(scores[0].loss - scores[1].loss) < 1e-4
