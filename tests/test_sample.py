"""sample.py: text from an artifact, by the definition."""

import pytest
import torch

import sample
import train_gpt as t
from tests.test_finished import main  # noqa: F401
from tests.test_presets import VOCAB, demo  # noqa: F401
from tests.tools import ROOT, TINY, busy_model, row_of, runtime, tiny


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):  # noqa: F811
    """An artifact of a tiny model with a real tokenizer."""
    place = tmp_path_factory.mktemp("sample")
    t.run({**TINY, "VOCAB_SIZE": str(VOCAB), "DATA_PATH": str(demo[0]), "ITERATIONS": "30",
           "TTT_ENABLED": "0", "ARTIFACT_DIR": str(place), "RUN_ID": "log", "EMA_DECAY": "0"})
    return place


@pytest.mark.parametrize("changes", [{}, dict(smear_gate_enabled=False), dict(num_loops=0)],
                         ids=str)
def test_logits_one_by_one_are_those_of_the_whole(changes):
    """Against one forward over all of it, from BOS on."""
    cfg = tiny(**changes)
    model, ids = busy_model(cfg), [t.BOS, 5, 17, 3, 60, 2, 2, 41, 9]
    ask = sample.forwards(model, cfg, runtime())
    next(ask)
    found = torch.stack([ask.send(token) for token in ids])
    row = row_of([*ids, 0])
    want = model.logits(model.hidden(row.ids, row.segments, True))[0]
    torch.testing.assert_close(found, want.detach(), rtol=1e-4, atol=1e-4)


def test_far_beyond_the_context_it_goes_on():
    cfg = tiny(ttt_eval_seq_len=8, ttt_chunk_size=8)
    ask = sample.forwards(busy_model(cfg), cfg, runtime())
    next(ask)
    for token in range(2, 40):
        assert torch.isfinite(ask.send(token)).all()


def test_drawing():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]
    g = torch.Generator().manual_seed(0)

    def counts(temperature, top_p, n=4000):
        drawn = [sample.draw(logits, temperature, top_p, g) for _ in range(n)]
        return [drawn.count(i) / n for i in (1, 3, 0, 2)]
    assert counts(0, 1, 10) == [1, 0, 0, 0]
    assert counts(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert counts(1.0, 0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert counts(1.0, 0.5) == [1, 0, 0, 0]
    hot = torch.tensor([0.5, 0.3, 0.15, 0.05]).pow(0.5)
    assert counts(2.0, 1.0) == pytest.approx((hot / hot.sum()).tolist(), abs=0.03)


def test_a_text_is_drawn_and_repeats(folder, main):  # noqa: F811
    ask = "Return a New Parser", "--folder", folder, "--tokens", 30
    code, out, err = main("sample", *ask)
    assert code == 0, err
    assert out.startswith("Return a New Parser") and len(out) > len("Return a New Parser") + 5
    assert main("sample", *ask)[1] == out
    assert main("sample", *ask, "--seed", 1)[1] != out
    cold = [main("sample", *ask, "--temperature", 0, "--seed", seed)[1] for seed in (0, 1)]
    assert cold[0] == cold[1] != out
    code, out, err = main("sample", "--tokens", 5, ARTIFACT_DIR=folder)  # from the very beginning
    assert code == 0, err


@pytest.mark.parametrize(("words", "message"), [
    (["--temperature", "-1"], "--temperature must be at least 0"),
    (["--temperature", "inf"], "--temperature must be at least 0"),
    (["--top-p", "0"], "--top-p must be above 0"), (["--top-p", "1.5"], "--top-p must be above 0"),
    (["--tokens", "0"], "--tokens must be at least 1"), (["--seed", "-1"], "--seed must be"),
    (["--folder", "nowhere"], "nowhere/final_model.int6.ptz: no artifact; train first")])
def test_wrong_words_are_one_line(main, words, message):  # noqa: F811
    code, out, err = main("sample", "x", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_without_a_tokenizer_it_says_what_to_set(folder, main, tmp_path):  # noqa: F811
    code, _, err = main("sample", "x", "--folder", folder, DATA_PATH=tmp_path)
    assert code == 2 and err.endswith("; set TOKENIZER_PATH to the data's\n")
    wrong = next((ROOT / "tokenizers").glob("*.model"))
    code, _, err = main("sample", "x", "--folder", folder, TOKENIZER_PATH=wrong)
    assert code == 2 and "8192 pieces, but VOCAB_SIZE=400" in err and err.count("\n") == 1


def test_control_pieces_are_never_drawn(demo):  # noqa: F811
    tokenizer = sample.Tokenizer(demo[1], True)
    assert t.BOS not in tokenizer.textless() and 0 in tokenizer.textless()
    assert tokenizer.decode(tokenizer.encode("Some TEXT, once\n more")) == "Some TEXT, once\n more"
    assert tokenizer.decode([4, 4, 5]) == ""  # operators without a word
