"""§12 N-gram: tables against a dictionary read in order, rules against whole distributions."""

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

import train_gpt as t
import variants as v
from tests.tools import TINY, tiny

PIECES = ["<0>", "<1>", "</s>", "<0x0A>", "\u2581the", "\u2581a", "\u2581The", "\u2581cat", "s",
          "ing", ".", "\u2581", "\u2581A", "\u2581dog", "b", "c"]
V = len(PIECES)


def stream(n: int, seed: int, vocab: int = V, repeat: float = 0.6) -> np.ndarray:
    """Random ids with copies of earlier stretches, so that long contexts come again."""
    rng, ids = random.Random(seed), [t.BOS]
    while len(ids) < n:
        if len(ids) > 8 and rng.random() < repeat:
            at, length = rng.randrange(len(ids) - 4), rng.randrange(2, 30)
            ids += ids[at : at + length]
        else:
            ids += [rng.randrange(vocab)]
    return np.array(ids[:n])


class Twin:
    """One context table, a dictionary of dictionaries, in the words of the published helper."""

    def __init__(self):
        self.total, self.top, self.pair = Counter(), {}, Counter()

    def look(self, context):
        """(token, count, total), or None before the context was entered."""
        return (*self.top[context], self.total[context]) if context in self.top else None

    def enter(self, context, y):
        self.total[context] += 1
        self.pair[context, y] += 1
        if context not in self.top or self.pair[context, y] > self.top[context][1]:
            self.top[context] = (y, self.pair[context, y])


def token_twin(ids, order):
    """What the token expert finds before ids[t + 1], for every t."""
    table, found = Twin(), []
    for at in range(len(ids) - 1):
        context = tuple(ids[at - order + 2 : at + 1]) if at >= order - 2 else None
        found.append(table.look(context) if context else None)
        if context:
            table.enter(context, ids[at + 1])
    return found


@pytest.mark.parametrize("order", [2, 3, 6, 16])
@pytest.mark.parametrize("seed", range(4))
def test_state_is_the_dictionarys_at_every_position(order, seed):
    ids = stream(3000, seed, vocab=(3, 16, 700, 65536)[seed])
    at = np.arange(len(ids) - 1)
    ends, run = t.contexts(ids[:-1], np.maximum(at - order + 2, 0), at[order - 2 :])
    state = t.best_before(run, ids[ends + 1], np.ones(len(ends), bool))
    found = [None] * len(at)
    for end, top, count, total in zip(ends, *state, strict=True):
        if total:
            found[end] = (top, count, total)
    assert found == token_twin(ids, order)


def test_a_collision_of_hashes_changes_nothing():
    ids = stream(400, 1)
    at = np.arange(len(ids) - 1)
    first = np.maximum(at - 1, 0)
    want = {tuple(ids[e - 1 : e + 1]) for e in t.contexts(ids[:-1], first, at[1:])[0]}
    ends, run = t.contexts(ids[:-1], first, at[1:], odd=1)  # base 1: the sum of the ids
    assert {tuple(ids[e - 1 : e + 1]) for e in ends} == want
    runs = defaultdict(set)
    for end, number in zip(ends, run, strict=True):
        runs[number].add(tuple(ids[end - 1 : end + 1]))
    assert all(len(slices) == 1 for slices in runs.values()) and len(runs) == len(want)


@pytest.mark.parametrize("ids", [[1], [1, 2], [1] * 40, list(range(30))])
def test_streams_without_anything_to_find(ids):
    ids = np.array(ids)
    hint, boost, kind = v.tilt_table(ids, tiny(token_order=3), None, print)
    assert len(hint) == len(boost) == len(kind) == len(ids) - 1
    want = [hit[0] if hit else -1 for hit in token_twin(ids, 3)]
    np.testing.assert_array_equal(hint, want)


def word_twin(ids, cfg):
    """Hints of the word experts, read token by token: {kind: [(token, p) or None]}."""
    start, closed, _ = v.token_classes(PIECES)
    within, words = Twin(), Twin()
    found, word, before = {1: [], 2: []}, [], []

    def name(tokens):
        text = "".join(PIECES[i] for i in tokens).replace("\u2581", " ")
        return text.strip(" .,:;!?()[]{}<>\"'`").lower()

    for at, i in enumerate(ids[:-1]):
        if start[i] or closed[i]:
            before += [name(word)] if word else []
            word = [] if closed[i] else [i]
        elif word:
            word.append(i)
        y = ids[at + 1]
        keys = {1: tuple(word), 2: (name(word), *reversed(before[-(cfg.word_order - 2):]))}
        for kind, table in ((1, within), (2, words)):
            hit = table.look(keys[kind]) if word else None
            found[kind].append((int(hit[0]), hit[1] / hit[2]) if hit else None)
        if word and not closed[y]:
            (words if start[y] else within).enter(keys[2 if start[y] else 1], y)
    return found


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_experts_are_the_twins(seed, published):
    ids = stream(2500, seed)
    cfg = tiny(token_order=4, token_threshold=0.5, within_boost=0.75, within_tau=0.3, word_tau=0.2,
               word_boost=1.0, agree_add_boost=0.5, word_order=3 + seed % 2,
               ngram_target_gate=published)
    classes, lines = v.token_classes(PIECES)[2], []
    got = v.tilt_table(ids, cfg, PIECES, lines.append)
    found = {0: [(int(h[0]), h[1] / h[2]) if h else None for h in token_twin(ids, 4)],
             **word_twin(ids, cfg)}
    rules = {0: (0.5, 2.625), 1: (0.3, 0.75), 2: (0.2, 1.0)}
    for at in range(len(ids) - 1):
        best, tokens = None, []
        for kind, (least, boost) in rules.items():
            hit = found[kind][at]
            if not hit or hit[1] < least or published and not classes[kind][ids[at + 1]]:
                continue
            gain = hit[1] * boost - math.log1p(hit[1] * math.expm1(boost))
            tokens.append(hit[0])
            if best is None or gain > best[0]:
                best = (gain, hit[0], boost, kind)
        want = (-1, 0.0, 0)
        if best:
            agreed = tokens.count(best[1]) >= 2
            want = (best[1], best[2] + 0.5 * agreed, 0 if published else best[3])
        assert tuple(x[at] for x in got) == want, at
    assert (got[0] >= 0).sum() > 300
    if not published:
        assert (np.bincount(got[2][got[0] >= 0], minlength=3) > 20).all()
    assert lines[0].startswith(f"ngram_tilt:hints total={len(ids) - 1} gated={(got[0] >= 0).sum()}")


def test_a_legal_hint_does_not_depend_on_what_follows():
    """Tables of the prefix alone are the tables of the stream; as published they are not."""
    ids = stream(600, 7)
    cfg = tiny(token_order=4, token_threshold=0.4, within_boost=0.75, word_boost=0.75, word_tau=0.1)
    other = ids.copy()
    other[401:] = stream(199, 8)[:199]
    for gate in (False, True):
        cfg = t.replace(cfg, ngram_target_gate=gate)
        one, two = (v.tilt_table(x, cfg, PIECES, print)[0][:401] for x in (ids, other))
        np.testing.assert_array_equal(one[:400], two[:400])
        entries = [v.tilt_table(np.r_[ids[:k], y], cfg, PIECES, print)[0][-1]
                   for k in range(200, 260) for y in range(2, V)]
        alike = [len(set(entries[i : i + V - 2])) == 1 for i in range(0, len(entries), V - 2)]
        assert all(alike) == (not gate)


def of_hint(logp, hint):
    """p(hint) [b, C] from a whole distribution [b, C, V]."""
    return logp.gather(2, hint.clamp(min=0).long()[:, :, None])[:, :, 0].exp()


@pytest.mark.parametrize("seed", range(3))
def test_the_programs_tilt_is_that_of_its_token_expert_alone(seed):
    """Hints and losses of train_gpt.py against those of variants.py without word experts."""
    ids, cfg = stream(900, seed), tiny(token_order=4, token_threshold=0.5, ngram_tilt_enabled=True)
    want, boost, kind = v.tilt_table(ids, cfg, None, print)
    hint = t.tilt_hints(ids, cfg)
    np.testing.assert_array_equal(hint, want)
    logp = torch.randn(1, len(hint), V, generator=torch.Generator().manual_seed(seed))
    logp, y = logp.log_softmax(-1), torch.from_numpy(ids[1:])[None]
    losses = -logp.gather(2, y[:, :, None])[:, :, 0]
    hint, boost, kind = (torch.from_numpy(x)[None] for x in (hint, boost, kind))
    torch.testing.assert_close(
        t.tilt(losses, of_hint(logp, hint), y, hint, cfg.token_boost),
        v.tilt(losses, logp, y, hint, boost, kind, torch.ones(1, V, dtype=torch.bool)))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_tilted_distribution_sums_to_one(kind):
    torch.manual_seed(kind)
    classes = torch.from_numpy(v.token_classes(PIECES)[2])
    logp = (3 * torch.randn(5, 7, V)).log_softmax(-1)
    inside = torch.nonzero(classes[kind])[:, 0]
    hint = inside[torch.randint(len(inside), (5, 7))].int()
    hint[0] = -1
    boost = torch.rand(5, 7) * 4
    kinds = torch.full((5, 7), kind, dtype=torch.uint8)
    p = torch.stack([(-v.tilt(-logp[:, :, a], logp, torch.full((5, 7), a), hint, boost, kinds,
                              classes)).exp() for a in range(V)], -1)
    assert (p.double().sum(-1) - 1).abs().max() < 1e-6
    if kind == 0:  # the program's own, with one boost for all
        q = torch.stack([(-t.tilt(-logp[:, :, a], of_hint(logp, hint), torch.full((5, 7), a), hint,
                                  2.625)).exp() for a in range(V)], -1)
        assert (q.double().sum(-1) - 1).abs().max() < 1e-6
    want = logp.exp()  # the definition, with the normaliser summed up
    raised = want.clone()
    for b, c in np.ndindex(5, 7):
        if hint[b, c] >= 0:
            raised[b, c, hint[b, c]] *= boost[b, c].exp()
            raised[b, c, inside] *= want[b, c, inside].sum() / raised[b, c, inside].sum()
    torch.testing.assert_close(p, raised, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(p[0], want[0])


def test_published_gates_give_no_distribution():
    """Every token scored with the hint that its own class calls for: the sum is not one."""
    logp = torch.full((1, 1, V), 1 / V).log()
    _, _, classes = v.token_classes(PIECES)
    total = 0.0
    for a in range(V):
        hint = torch.tensor([[8 if classes[1][a] else -1]], dtype=torch.int32)
        zero, beta = torch.zeros(1, 1, dtype=torch.uint8), torch.full((1, 1), 0.75)
        everything = torch.ones(1, V, dtype=torch.bool)
        total += math.exp(-v.tilt(-logp[:, :, a], logp, torch.tensor([[a]]), hint, beta, zero,
                                  everything).item())
    assert abs(total - 1) > 0.01


def mixer_twin(ids, at, order, vocab):
    """The whole distribution of ids[at + 1]: [vocab], from dictionaries of the prefix."""
    prefix = tuple(ids[: at + 1])
    p = np.array([(prefix.count(a) + 0.5) / (len(prefix) + 0.5 * vocab) for a in range(vocab)])
    for length in range(1, order):
        follow = Counter(prefix[i + length] for i in range(len(prefix) - length)
                         if prefix[i : i + length] == prefix[len(prefix) - length :])
        if follow and len(prefix) > length:
            count = np.array([follow[a] for a in range(vocab)])
            p = (count + len(follow) * p) / (count.sum() + len(follow))
    return p


def test_exact_mixer_is_a_distribution_and_the_twins():
    ids, cfg = stream(260, 3, vocab=6), tiny(vocab_size=8, ngram_order=9)
    got = v.exact_mixer(ids, cfg)
    for at in range(len(ids) - 1):
        p = mixer_twin(ids, at, 9, 8)
        assert abs(p.sum() - 1) < 1e-12
        assert abs(got[at] - math.log(p[ids[at + 1]])) < 1e-9
    for at in (50, 120, 258):  # the program itself, over the whole vocabulary
        each = [v.exact_mixer(np.r_[ids[: at + 1], a], cfg)[-1] for a in range(8)]
        assert abs(np.exp(each).sum() - 1) < 1e-9


def hashed_twin(ids, order, buckets, vocab):
    """#1430's tables, token by token."""
    context, full, seen, found = Counter(), Counter(), Counter(), []
    for at in range(len(ids)):
        y, keys = int(ids[at]), []
        p = (seen[y] + 0.5) / (at + 0.5 * vocab) if at else None
        for n in range(2, order + 1):
            if at < n - 1:
                break
            key = 0
            for k in range(n - 1):
                key ^= int(ids[at - (n - 1) + k]) * v.HASH_PRIMES[k % 10]
            whole = (key ^ y * v.HASH_PRIMES[(n - 1) % 10]) & (buckets - 1)
            keys.append(((n, key & (buckets - 1)), (n, whole)))
            c, f = context[keys[-1][0]], full[keys[-1][1]]
            p = min(c, f) / c if c else p
        if at:
            found.append(p)
        seen[y] += 1
        for a, b in keys:
            context[a] += 1
            full[b] += 1
    return np.log(np.maximum(found, 1e-12))


def test_hashed_mixer_is_the_published_one_and_no_distribution():
    ids = stream(500, 5, vocab=12, repeat=0.2)
    cfg = tiny(vocab_size=16, ngram_order=5, ngram_buckets=32, ngram_mixer="hashed",
               allow_illegal=True)
    np.testing.assert_array_equal(v.hashed_mixer(ids, cfg), hashed_twin(ids, 5, 32, 16))
    sums = [np.exp([v.hashed_mixer(np.r_[ids[:at], a], cfg)[-1] for a in range(16)]).sum()
            for at in range(300, 500, 20)]
    assert max(abs(x - 1) for x in sums) > 0.5


def test_mixture_sums_to_one_and_its_weight_is_the_published_one():
    cfg = tiny(ngram_mixer="exact", ngram_min_tokens=3)
    torch.manual_seed(0)
    logp = (2 * torch.randn(2, 4, V)).log_softmax(-1)
    ngram = torch.randn(2, 4, V).log_softmax(-1)
    at = torch.arange(4).expand(2, -1)
    p = torch.stack([(-v.mix(-logp[..., a], logp, ngram[..., a], at, cfg)).exp()
                     for a in range(V)], -1)
    assert (p.double().sum(-1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(p[:, :3], logp[:, :3].exp())
    entropy = -(logp.exp() * logp).sum(-1)[:, 3]
    alpha = (0.2 + 0.55 / (1 + (-2 * (entropy - 2.5)).exp()))[:, None]
    torch.testing.assert_close(p[:, 3], (1 - alpha) * logp[:, 3].exp() + alpha * ngram[:, 3].exp())


@pytest.mark.parametrize("environ", [
    {"NGRAM_TILT_ENABLED": "1", "WITHIN_BOOST": "0.75", "NGRAM_TARGET_GATE": "1",
     "TOKENIZER_PATH": "a"},
    {"NGRAM_MIXER": "hashed"}, {"SLOT_ENABLED": "1", "SLOT_FIT": "scored"},
    {"TTT_SECOND_PASS_FRAC": "0.1"},
], ids=lambda e: next(iter(e)) + "=" + next(iter(e.values())))
def test_illegal_settings_need_a_word_and_have_a_reason(environ):
    with pytest.raises(t.UserError, match="ALLOW_ILLEGAL=1") as caught:
        t.Config.from_env(TINY | environ)
    cfg = t.Config.from_env(TINY | environ | {"ALLOW_ILLEGAL": "1"})
    (reason,) = cfg.illegal()
    assert reason in str(caught.value)
    words = {"ngram_tilt_enabled": True, "within_boost": 0.75, "word_boost": 0.75}
    assert not tiny(**words, tokenizer_path="a").illegal()
    with pytest.raises(t.UserError, match="TOKENIZER_PATH"):
        tiny(**words)
    assert not tiny(ngram_mixer="exact", slot_enabled=True).illegal()


@pytest.mark.parametrize("name", ["TOKEN_BOOST", "WITHIN_BOOST", "WORD_BOOST", "AGREE_ADD_BOOST"])
def test_a_boost_stays_where_its_exponential_is_a_float32(name):
    """From 89 on exp(boost) is infinite, and the score of every hinted target with it."""
    with pytest.raises(t.UserError, match=f"{name}=90"):
        t.Config.from_env({name: "90"})
    p = torch.rand(5, 64).softmax(1)
    for hint in ([0, 5, 9, -1, 63], p.argmax(1).tolist()):
        hint = torch.tensor(hint)[:, None]
        at = p.gather(1, hint.clamp(min=0))
        for boost in (0.0, 2.625, 40.0):
            new = t.tilt(-p.log(), at, torch.arange(64).expand(5, -1), hint, boost)
            torch.testing.assert_close(new.neg().exp().sum(1), torch.ones(5), atol=1e-5, rtol=0)
