"""§10 Evaluation: every target once, bits per original byte, whatever the row length."""

import math

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.tools import busy_model, losses_of, runtime, tiny, val_set

LENGTHS = [5, 28, 1, 14, 30, 9, 22, 3, 17, 12, 26, 8]


def test_bits_per_byte_by_hand():
    meter = t.Meter(runtime())
    meter.add(torch.tensor([[1.0, 2.0], [4.0, 100.0]]), torch.tensor([[3, 0], [5, 77]]),
              torch.tensor([[True, True], [True, False]]))
    meter.add(torch.tensor([0.5]), torch.tensor([2]), torch.tensor([True]))
    score = meter.result()
    assert score == (7.5 / 4, 7.5 / math.log(2) / 10, 4, 10)
    assert (score.loss, score.bpb, score.tokens, score.bytes) == tuple(score)


def test_a_masked_loss_may_be_anything():
    meter = t.Meter(runtime())
    meter.add(torch.tensor([1.0, math.nan, math.inf]), torch.tensor([1, 1, 1]),
              torch.tensor([True, False, False]))
    assert meter.result().loss == 1.0


def test_sums_are_double():
    meter = t.Meter(runtime())
    for _ in range(50):
        meter.add(torch.full((1000,), 1.0 + 1e-4), torch.ones(1000, dtype=torch.int32),
                  torch.ones(1000, dtype=torch.bool))
    assert abs(meter.result().loss - float(torch.tensor(1.0 + 1e-4))) < 1e-12


@pytest.mark.parametrize("batch", [64, 72, 264, 520, 1024, 1400])
def test_every_target_is_scored_exactly_once(batch, rt):
    cfg, val, seen = tiny(val_batch_tokens=batch), val_set(LENGTHS), []

    def forward(ids, targets, segments, looped):
        assert looped
        assert segments.cu_seqlens[-1] == ids.shape[1]
        seen.append((ids, targets))
        return targets.double()  # the loss of a target is its id

    score = t.evaluate(forward, val, cfg, rt)
    assert torch.equal(torch.cat([x for x, _ in seen], 1)[0], torch.from_numpy(val.ids[:-1]))
    assert torch.equal(torch.cat([y for _, y in seen], 1)[0], torch.from_numpy(val.ids[1:]))
    assert score.tokens == len(val.ids) - 1 and score.bytes == val.bytes[1:].sum()
    assert score.loss == val.ids[1:].mean()


def test_ranks_share_the_rows():
    cfg, val, seen = tiny(val_batch_tokens=128), val_set(LENGTHS), {}

    for rank in range(4):
        rt = t.Runtime(rank, 4, torch.device("cpu"))
        rt.sum_ = lambda x: x
        begins = seen.setdefault(rank, [])

        def forward(ids, targets, segments, looped, begins=begins):
            begins.append(ids)
            return torch.ones(targets.shape)

        t.evaluate(forward, val, cfg, rt)
    rows = -(-(len(val.ids) - 1) // 16)
    in_turn = [seen[k % 4][k // 4] for k in range(rows)]
    assert torch.equal(torch.cat(in_turn, 1)[0], torch.from_numpy(val.ids[:-1]))


def test_score_is_that_of_documents_alone_where_rows_do_not_cut_them(rt):
    cfg = tiny(val_batch_tokens=8 * 400)
    model, val = busy_model(cfg), val_set(LENGTHS)
    score = t.evaluate(model, val, cfg, rt)
    nats = 0.0
    with torch.no_grad():
        for a, b in val.documents():
            nats += losses_of(model, val.ids[a:b]).double().sum().item()
    assert math.isclose(score.loss, nats / (len(val.ids) - 1), rel_tol=1e-6)
    assert math.isclose(score.bpb, nats / math.log(2) / val.bytes.sum(), rel_tol=1e-6)


def test_row_length_does_not_matter_where_documents_fit_rows(rt):
    """Documents of 16 tokens: rows of 16, 32 and 128 cut at their borders only."""
    val = val_set([15] * 24)
    model = busy_model(tiny())
    scores = [t.evaluate(model, val, tiny(val_batch_tokens=8 * n), rt) for n in (16, 32, 128)]
    for score in scores[1:]:
        assert score[2:] == scores[0][2:]
        assert math.isclose(score.loss, scores[0].loss, rel_tol=1e-6)


def test_long_documents_are_cut_at_eval_seq_len(rt):
    model, val = busy_model(tiny()), val_set([90])
    cut = t.evaluate(model, val, tiny(eval_seq_len=32), rt)
    whole = t.evaluate(model, val, tiny(eval_seq_len=64, global_ttt_chunk_tokens=64), rt)
    assert cut.loss != whole.loss
    with torch.no_grad():
        want = losses_of(model, val.ids, longest=32).double().mean().item()
    assert math.isclose(cut.loss, want, rel_tol=1e-6)


def test_evaluation_leaves_no_graph_and_no_change(rt):
    model, val = busy_model(tiny()), val_set(LENGTHS)
    before = [p.clone() for p in model.parameters()]
    t.evaluate(model, val, tiny(), rt)
    assert all(torch.equal(p, q) and p.grad is None
               for p, q in zip(model.parameters(), before, strict=True))


def test_bos_costs_bits_but_no_bytes(rt):
    val = t.ValSet(np.array([1, 5, 1, 6, 7]), np.array([0, 3, 0, 2, 2], np.int32))
    score = t.evaluate(lambda ids, targets, *_: torch.ones(targets.shape), val, tiny(), rt)
    assert (score.tokens, score.bytes) == (4, 7)
    assert math.isclose(score.bpb, 4 / math.log(2) / 7)


@pytest.mark.parametrize("length", [32, 24, 31, 372])
def test_the_tail_can_be_left_out(data, length):
    """Targets in a multiple of the context, as the lineage had it; all of them by default."""
    cfg = tiny(data_path=str(data), eval_seq_len=length, global_ttt_chunk_tokens=512)
    whole = t.load_val(cfg)
    cut = t.load_val(t.replace(cfg, eval_include_tail=False))
    targets = (len(whole.ids) - 1) // length * length
    assert len(cut.ids) == len(cut.bytes) == targets + 1
    np.testing.assert_array_equal(cut.ids, whole.ids[: targets + 1])


def test_bytes_of_a_set_without_sidecar(data, monkeypatch):
    """From the pieces, as the challenge counts them; and only where CaseOps changed nothing."""
    pieces = ["<0>", "<1>", "<0x41>", "\u2581the", "s", "\u2581", "\u00e9", "\u2581a"]
    text = [1, 3, 4, 5, 2, 1, 3, 6, 0, 7]
    # BOS, the (no blank after BOS), s, blank, A, BOS, the, e acute, unknown, a (no blank)
    assert t.piece_bytes(np.array(text), pieces).tolist() == [0, 3, 1, 1, 1, 0, 3, 2, 0, 1]
    assert t.piece_bytes(np.array([4, 3, 7]), pieces).tolist() == [1, 4, 2]
    (data / "fineweb_val_bytes_000000.bin").unlink()
    monkeypatch.setattr(t, "read_pieces", lambda cfg: ["<0>", "<1>", *("ab" for _ in range(62))])
    cfg = tiny(data_path=str(data), tokenizer_path="some.model")
    with pytest.raises(t.UserError, match="sidecar"):
        t.load_val(cfg)
    val = t.load_val(t.replace(cfg, caseops_enabled=False))
    assert val.bytes.sum() == 2 * (val.ids > 1).sum()


def test_blanks_inside_pieces_are_one_byte_each():
    """Pieces of several blanks or words; U+2581 is three bytes only where no blank is meant."""
    pieces = ["<0>", "<1>", "\u2581", "\u2581\u2581\u2581", "\u2581of\u2581the", "a\u2581b",
              "\u2581\u00e9"]
    assert t.piece_bytes(np.array([1, 2, 3, 4, 5, 6, 1, 4, 1, 3]), pieces).tolist() == [
        0, 0, 3, 7, 3, 3, 0, 6, 0, 2]


def test_a_tokenizer_without_a_piece_for_a_blank_needs_a_sidecar():
    """SentencePiece writes E2 96 81 for a blank then, and for U+2581 in the text: one byte or
    three. Where the blank has a piece those bytes are the text's own."""
    pieces = ["<0>", "<1>", "<0xE2>", "<0x96>", "<0x81>", "\u2581a", "a"]
    ids = np.array([1, 5, 2, 3, 4, 6])
    with pytest.raises(t.UserError, match="no piece of U.2581 alone.*make a byte sidecar"):
        t.piece_bytes(ids, pieces)
    assert t.piece_bytes(ids, [*pieces, "\u2581"]).tolist() == [0, 1, 1, 1, 1, 1]
    assert t.piece_bytes(np.array([1, 3, 4]), ["<0>", "<1>", "<2>", "\u2581a", "a"]).sum() == 2
