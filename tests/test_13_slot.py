"""§13 Score adjustment in the evaluation; SLOT of variants.py: a loop over samples, what a fit may
look at."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
import variants as v
from tests.tools import RecordingMeter, busy_model, cosine_start, runtime, tiny, val_set

LENGTHS = [7, 40, 23, 55, 31, 12]


def parts(cfg, adjustment=True, lengths=LENGTHS):
    """(model, adapter, batch, val) with adapters that are not zero."""
    val, rt, model = val_set(lengths, cfg.vocab_size), runtime(), busy_model(cfg)
    found = t.make_adjustment(t.replace(cfg, ttt_batch_size=len(lengths)), rt, model,
                              val) if adjustment else None
    if found:
        found.wait()
    batch = t.make_schedule(val, t.replace(cfg, ttt_batch_size=len(lengths)), 1).batches[0]
    adapter = t.LoraTTT(model, cfg, rt, len(batch), cosine_start, found)
    with torch.no_grad():
        for b in adapter.lora.B.values():
            b.add_(0.02 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
    return model, adapter, batch, val


def slot_of_one(model, h, targets, cfg):
    """SLOT for one sample, with its own optimiser: h [F, d], targets [F] -> delta [d], bias [V]."""
    delta = torch.zeros(cfg.model_dim, requires_grad=True)
    bias = torch.zeros(cfg.vocab_size, requires_grad=True)
    moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in (delta, bias)]
    for k in range(cfg.slot_steps):
        lr = cfg.slot_lr_min + (cfg.slot_lr - cfg.slot_lr_min) * 0.5 * (
            1 + math.cos(math.pi * k / (cfg.slot_steps - 1)))
        z = (h + delta) @ model.tok_emb.weight.T
        logits = cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap) + bias
        loss = F.cross_entropy(logits, targets) / cfg.slot_batch_seqs
        grads = torch.autograd.grad(loss, (delta, bias))
        with torch.no_grad():
            for x, g, (m, v) in zip((delta, bias), grads, moments, strict=True):
                x.mul_(1 - lr * 1e-8)
                m.mul_(0.6).add_(g, alpha=0.4)
                v.mul_(0.5).add_(g * g, alpha=0.5)
                up = (m / (1 - 0.6 ** (k + 1))) / ((v / (1 - 0.5 ** (k + 1))).sqrt() + 1e-5)
                x.sub_(lr * up)
    return delta.detach(), bias.detach()


def test_a_fit_is_a_loop_over_samples():
    cfg = tiny(slot_enabled=True, slot_steps=6, slot_batch_seqs=1)
    model, gen = busy_model(cfg).requires_grad_(False), torch.Generator().manual_seed(0)
    h, targets = torch.randn(4, 9, cfg.model_dim, generator=gen), torch.arange(36).view(4, 9)
    count = torch.tensor([9, 4, 0, 1])
    mask = torch.arange(9) < count[:, None]
    delta, bias = v.fit_slot(model, None, h, targets, mask)
    for b, n in enumerate(count.tolist()):
        one = slot_of_one(model, h[b, :n], targets[b, :n], cfg) if n else (0 * delta[b, 0],
                                                                          0 * bias[b, 0])
        torch.testing.assert_close(delta[b, 0], one[0], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(bias[b, 0], one[1], atol=2e-4, rtol=1e-3)


def scored_losses(adapter, batch, val, change=None):
    """Losses that enter the score, per (document, target), without any learning."""
    meter, found = RecordingMeter(), {}
    with t.frozen(adapter.adjustment.model):
        for chunk, chunk_batches in enumerate(adapter.plan(batch, val)):
            for chunk_batch in chunk_batches:
                adapter.score(chunk_batch, meter)
                losses, _, mask = meter.calls[-1]
                for b, row in enumerate(range(chunk_batch.docs.start, chunk_batch.docs.stop)):
                    for c in torch.nonzero(mask[b])[:, 0].tolist():
                        found[row, chunk * adapter.cfg.ttt_chunk_size + c] = losses[b, c].item()
    return found


@pytest.mark.parametrize("fit", ["context", "scored"])
def test_a_legal_fit_never_sees_what_it_scores(fit):
    """Another token at one place: losses of all earlier targets stay, to the bit. Fitted to what
    it scores they do not."""
    cfg = tiny(slot_enabled=True, slot_steps=3, slot_fit=fit, slot_context=10, allow_illegal=True)
    _, adapter, batch, val = parts(cfg)
    before = scored_losses(adapter, batch, val)
    doc, place = len(batch) - 1, 21  # inside the third chunk of 8
    ids = val.ids.copy()
    ids[batch[doc].begin + place + 1] = 5 if ids[batch[doc].begin + place + 1] != 5 else 6
    after = scored_losses(adapter, batch, t.ValSet(ids, val.bytes))
    earlier = [key for key in before if key[0] != doc or key[1] < place]
    assert (all(before[key] == after[key] for key in earlier)) == (fit == "context")
    assert any(before[key] != after[key] for key in before if key not in earlier)


def test_slot_scores_are_those_of_one_window_at_a_time():
    cfg = tiny(slot_enabled=True, slot_steps=4, slot_context=6, slot_batch_seqs=1)
    model, adapter, batch, val = parts(cfg)
    found, C = scored_losses(adapter, batch, val), cfg.ttt_chunk_size
    for b in adapter.lora.B.values():
        b.data.zero_()  # the twin has no adapters
    found = scored_losses(adapter, batch, val)
    doc, row = batch[-1], len(batch) - 1
    for chunk in range(-(-doc.targets // C)):
        end = min((chunk + 1) * C, doc.targets)
        start = max(0, end - cfg.ttt_eval_seq_len)
        ids = torch.from_numpy(val.ids[doc.begin + start : doc.begin + end])[None]
        with torch.no_grad():
            h = model.hidden(ids, t.Segments.batch(*ids.shape, ids.device), True)[0]
        first, fit = chunk * C - start, slice(max(0, chunk * C - start - 6), chunk * C - start)
        if first:
            model.requires_grad_(False)
            delta, bias = slot_of_one(model, h[fit], ids[0, fit.start + 1 : fit.stop + 1], cfg)
        else:
            delta, bias = torch.zeros(cfg.model_dim), torch.zeros(cfg.vocab_size)
        logits = model.logits((h[first:] + delta)[None])[0] + bias
        targets = torch.from_numpy(val.ids[doc.begin + chunk * C + 1 : doc.begin + end + 1])
        want = F.cross_entropy(logits, targets, reduction="none")
        got = torch.tensor([found[row, k] for k in range(chunk * C, end)])
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("changes", [
    {"ngram_tilt_enabled": True, "token_order": 3, "token_threshold": 0.3},
    {"ngram_mixer": "exact", "ngram_order": 4, "ngram_min_tokens": 20}],
    ids=["tilt", "mixer"])
def test_rules_look_at_their_own_place_of_the_stream(stream, changes):
    """Every scored loss, recomputed from the table entry of its own position in the stream."""
    cfg = tiny(ttt_stream=stream, **changes)
    model, _, batch, val = parts(cfg)
    rt, texts = runtime(), [val.ids[doc.begin + 1 : doc.end] for doc in batch]
    coded = np.concatenate([np.r_[t.BOS, text[text != t.BOS]] for text in texts] + [[t.BOS]])
    adjustment = t.make_adjustment(t.replace(cfg, ttt_batch_size=len(LENGTHS)), rt, model, val)
    adjustment.wait()
    make = t.StreamingLoraTTT if stream else t.LoraTTT
    plain, ruled = (make(model, cfg, rt, len(batch), cosine_start, r) for r in (None, adjustment))
    meters, moved = (RecordingMeter(), RecordingMeter()), 0
    with t.frozen(model):
        for chunk_batches, _ in zip(plain.plan(batch, val), ruled.plan(batch, val), strict=True):
            for chunk_batch in chunk_batches:
                plain.score(chunk_batch, meters[0])
                ruled.score(chunk_batch, meters[1])
                (raw, _, mask), (used, _, _) = meters[0].calls[-1], meters[1].calls[-1]
                h = adjustment.h if stream else t.gather_positions(
                    adjustment.h, chunk_batch.positions)
                logp = model.logits(h, ruled.lora).log_softmax(-1).detach()
                for b, c in torch.nonzero(mask).tolist():
                    at, y = int(chunk_batch.place[b]) + c, int(chunk_batch.targets[b, c])
                    assert coded[at + 1] == y
                    entry = [table[at] for table in adjustment.tables]
                    if cfg.ngram_tilt_enabled:
                        want = raw[b, c].item()
                        if entry[0] >= 0:
                            q = logp[b, c, entry[0]].exp().item()
                            beta = cfg.token_boost
                            want += math.log1p(q * math.expm1(beta)) - beta * (y == entry[0])
                            moved += 1
                    else:
                        p = logp[b, c].exp()
                        alpha = 0.2 + 0.55 / (1 + math.exp(-2 * (-(p * logp[b, c]).sum() - 2.5)))
                        alpha *= at >= 20
                        want = -math.log((1 - alpha) * math.exp(-raw[b, c])
                                         + alpha * math.exp(entry[0]))
                        moved += alpha > 0
                    assert used[b, c].item() == pytest.approx(float(want), abs=1e-4)
    assert moved > 10


@pytest.mark.parametrize("changes", [{}, {"ngram_tilt_enabled": True, "token_order": 3},
                                     {"ngram_mixer": "exact"}, {"slot_enabled": True}], ids=str)
def test_rules_do_not_reach_what_is_learnt(changes):
    """Adapters after a document are the same, to the bit, with and without rules."""
    cfg, found = tiny(**changes), []
    for adjustment in (False, True):
        model, adapter, batch, val = parts(cfg, adjustment)
        with t.frozen(model):
            t.score_batch(adapter, batch, val, t.Meter(runtime()), lambda _: None)
        found.append([p.detach().clone() for p in adapter.lora.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_second_pass_scores_what_was_learnt():
    val, rt = val_set(LENGTHS, 64), runtime()
    base = {"phased_ttt_prefix_docs": 10**6, "phased_ttt_num_phases": 1, "allow_illegal": True,
            "global_ttt_optimizer": "adamw", "global_ttt_lr": 0.01, "ttt_freeze_blocks": 2}
    scores = {}
    for frac in (0.0, 0.5):
        cfg = tiny(ttt_second_pass_frac=frac, **base)
        model = busy_model(cfg)
        start = {n: p.clone() for n, p in model.state_dict().items()}
        scores[frac] = t.score_phased(model, val, cfg, rt, cosine_start)
        assert scores[frac].tokens == len(val.ids) - 1
        for name, p in model.state_dict().items():
            moved = p != start[name]
            if name.endswith("_bank") and frac:
                moved = moved.unflatten(0, (-1, cfg.num_layers))
                assert not moved[:, :2].any() and moved[:, 2:].any((2, 3)).all(), name
            elif name.startswith(("blocks.0.", "blocks.1.")) or not frac:
                assert not moved.any(), name
        assert bool((model.tok_emb.weight != start["tok_emb.weight"]).any()) == bool(frac)
    assert scores[0.5].loss < scores[0.0].loss
