"""What no default of train_gpt.py takes: SLOT, n-gram mixers, the tilt's word experts, a second
pass; AWQ-lite. Presets of published entries do; some of it the challenge refuses (ALLOW_ILLEGAL=1).

train_gpt.py loads this file where a setting asks for it. Where the score takes it, it is packed and
counted with the program."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t

# ---- the tilt's word experts


def token_classes(pieces: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [V] which pieces start a word and which end one without (control, white space), and
    bool [3, V]: any token, one that continues a word, one that starts it."""
    start = np.array([piece.startswith("\u2581") for piece in pieces])
    closed = np.array([bool(re.fullmatch(r"<(?!0x)\w+>|</s>|<0x(09|0A|0B|0C|0D|20)>", piece))
                       for piece in pieces])
    return start, closed, np.stack((start | ~start, ~start & ~closed, start & ~closed))


def word_contexts(ids: np.ndarray, start: np.ndarray, closed: np.ndarray, cfg: t.Config,
                  pieces: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ends, run) of the open word's tokens so far, then of its text and the WORD_ORDER - 2 words
    before it, without case and punctuation. start, closed [V]: pieces that begin or end words."""
    at, edge = np.arange(len(ids)), start | closed
    first = np.maximum.accumulate(np.where(edge[ids], at, 0))
    ends = np.flatnonzero(~closed[ids[first]] & edge[ids[first]])  # inside a word
    again, run = t.contexts(ids, first, ends)
    yield again, run
    names, word = {}, np.full(len(ids), -1)
    rest = np.setdiff1d(ends, again, assume_unique=True)
    heads = np.r_[again[t.run_starts(run)], rest]
    at_once, back = np.unique(heads, return_inverse=True)
    texts = ("".join(pieces[i] for i in ids[first[end] : end + 1]) for end in at_once)
    known = (text.replace("\u2581", " ").strip(" .,:;!?()[]{}<>\"'`").lower() for text in texts)
    numbers = np.array([names.setdefault(text, len(names)) for text in known], np.int64)
    word[np.r_[again, rest]] = numbers[back]
    last = np.maximum.accumulate(np.where(word >= 0, at, -1))
    key, end = word[ends], ends
    for _ in range(cfg.word_order - 2):  # to the end of the word before
        end = np.where((end >= 0) & (first[end] > 0), last[first[end] - 1], -1)
        key = np.unique(key * (len(names) + 1) + np.where(end >= 0, word[end], len(names)),
                        return_inverse=True)[1]
    order = np.argsort(key, kind="stable")
    yield ends[order], key[order]


def tilt_table(ids: np.ndarray, cfg: t.Config, pieces: list[str] | None,
               log: Callable[[str], None]) -> tuple[np.ndarray, ...]:
    """(hint [n-1], boost, kind): the token that the experts expect, or -1; idea: #1967.

    Of the experts whose gate is open the one that promises most. A hint about a class moves
    probability inside that class only. NGRAM_TARGET_GATE=1, as published: a hint about a class is
    given where the token to be scored is of that class, and moves probability anywhere."""
    ids, y = ids[:-1], ids[1:]
    at = np.arange(len(ids))
    found = t.contexts(ids, np.maximum(at - (cfg.token_order - 2), 0), at[cfg.token_order - 2 :])
    # what each learns from and hints at: targets of its class, a row of `token_classes`
    experts = [(*found, at >= 0, cfg.token_threshold, cfg.token_boost, 0)]
    if pieces:
        start, closed, classes = token_classes(pieces)
        both = word_contexts(ids, start, closed, cfg, pieces)
        for kind, least, boost in ((1, cfg.within_tau, cfg.within_boost),
                                   (2, cfg.word_tau, cfg.word_boost)):
            experts.append((*next(both), classes[kind][y], least, boost, kind))
    hints, gains = np.full((len(experts), len(ids)), -1, np.int32), np.full(len(ids), -np.inf)
    hint, boost = np.full(len(ids), -1, np.int32), np.zeros(len(ids), np.float32)
    kind = np.zeros(len(ids), np.uint8)
    for row, (ends, run, learn, least, beta, number) in zip(hints, experts, strict=True):
        top, count, total = t.best_before(run, y[ends], learn[ends])
        p = count / np.maximum(total, 1)
        opened = (total > 0) & (p >= least) & (beta > 0)
        if cfg.ngram_target_gate:
            opened &= learn[ends]
        near, top, p = ends[opened], top[opened], p[opened]
        row[near] = top
        gain = p * beta - np.log1p(p * math.expm1(beta))
        better = gain > gains[near]
        near = near[better]
        gains[near], hint[near], boost[near] = gain[better], top[better], beta
        kind[near] = 0 if cfg.ngram_target_gate else number
    agree = ((hints == hint) & (hint >= 0)).sum(0) >= 2
    boost[agree] += cfg.agree_add_boost
    gates = [*(hints >= 0).sum(1).tolist(), 0, 0]
    log(f"ngram_tilt:hints total={len(ids)} gated={int((hint >= 0).sum())} token_gate={gates[0]} "
        f"within_gate={gates[1]} word_gate={gates[2]} agree2plus={int(agree.sum())}")
    return hint, boost, kind


def tilt(losses: Tensor, logp: Tensor, targets: Tensor, hint: Tensor, boost: Tensor,
         kind: Tensor, classes: Tensor) -> Tensor:
    """-log p' of the targets, p'(a) = p(a) exp(boost [a = hint]) / Z inside the hint's class S, Z
    such that p'(S) = p(S), and p' = p outside it. All [b, C], but logp [b, C, V], classes [k, V].

    With q = p(hint) / p(S), Z = 1 + q (exp(boost) - 1): p' sums to one like p."""
    given, inside = hint >= 0, classes[kind.long()]
    hint = hint.clamp(min=0).long()
    mass = logp.masked_fill(~inside, -math.inf).logsumexp(-1)
    q = (logp.gather(2, hint[:, :, None])[:, :, 0] - mass).clamp(max=0).exp()
    moved = torch.log1p(q * torch.expm1(boost)) - boost * (targets == hint)
    return losses + moved * (given & inside.gather(2, targets[:, :, None])[:, :, 0])


# ---- mixers


def exact_mixer(ids: np.ndarray, cfg: t.Config) -> np.ndarray:
    """log p(ids[t + 1]) [n-1] by n-grams: exact counts of the prefix, each token entered once.

    From the unigrams (c + 1/2) / (t + 1 + V/2) up to order NGRAM_ORDER, Witten-Bell: with c, C and
    D the counts of the token, of all and of different ones after the context,
    p <- (c + D p) / (C + D), which sums to one over the vocabulary if p does."""
    y, at = ids[1:], np.arange(len(ids) - 1)
    p, ends = unigrams(ids, cfg.vocab_size), at
    for length in range(1, cfg.ngram_order):
        ends = np.sort(ends[ends >= length - 1])
        ends, run = t.contexts(ids[:-1], np.maximum(at - length + 1, 0), ends)
        c, first = t.counts_before(run, y[ends], ends >= 0), t.run_starts(run)
        total, new = np.arange(len(ends)) - first, np.cumsum(c == 0) - (c == 0)
        kinds = new - new[first]
        p[ends] = np.where(total > 0, (c + kinds * p[ends]) / np.maximum(total + kinds, 1), p[ends])
    return np.log(p)


def unigrams(ids: np.ndarray, vocab: int) -> np.ndarray:
    """p(ids[t + 1]) [n-1] from the counts of ids[: t + 1], half a count added to each token."""
    count = t.counts_before(np.zeros_like(ids), ids, ids >= 0)
    return (count[1:] + 0.5) / (np.arange(1, len(ids)) + 0.5 * vocab)


HASH_PRIMES = (36313, 27191, 51647, 81929, 131071, 174763, 233017, 282527, 357347, 451439)


def hashed_mixer(ids: np.ndarray, cfg: t.Config) -> np.ndarray:
    """#1430's score of ids[t + 1], no distribution: buckets without keys, so that what shares one
    counts for all, and only the realised token's is looked at. The longest context that has a
    count decides. Here a token enters once, at once; there 32 times, after a batch of windows."""
    p = unigrams(ids, cfg.vocab_size)
    for order in range(2, min(cfg.ngram_order, len(ids)) + 1):
        nothing = np.zeros_like(ids[order - 1 :])
        parts = (ids[k : k + len(nothing)] * HASH_PRIMES[k % 10] for k in range(order))
        *_, before, key = itertools.accumulate(parts, np.bitwise_xor)  # oldest first, target last
        context, whole = (t.counts_before(nothing, x & (cfg.ngram_buckets - 1), nothing == 0)
                          for x in (before, key))
        share = np.minimum(context, whole) / np.maximum(context, 1)
        p[order - 2 :] = np.where(context > 0, share, p[order - 2 :])
    return np.log(np.maximum(p, 1e-12))


def mix(losses: Tensor, logp: Tensor, ngram: Tensor, place: Tensor, cfg: t.Config) -> Tensor:
    """-log((1 - alpha) p + alpha exp(ngram)) with alpha from the entropy of p: from the prefix."""
    entropy = -(logp.exp() * logp).sum(-1)
    alpha = torch.sigmoid(2 * (entropy - cfg.ngram_alpha_center))
    alpha = cfg.ngram_alpha_base + cfg.ngram_alpha_range * alpha
    alpha = alpha * (place >= cfg.ngram_min_tokens)
    return -torch.logaddexp(torch.log1p(-alpha) - losses, alpha.log() + ngram)


# ---- SLOT


def fit_slot(model: t.GPT, lora: t.Lora, h: Tensor, targets: Tensor,
             mask: Tensor) -> tuple[Tensor, ...]:
    """Per document one shift of the state [b, 1, d] and one of the logits [b, 1, V], fitted to
    `targets` [b, F] where `mask`, by SLOT_STEPS of AdamW from zero. h [b, F, d]. idea: #1430.

    SLOT_BATCH_SEQS is a factor of the gradient only, as there; AdamW's epsilon sees it."""
    cfg = model.cfg
    shifts = [torch.zeros(len(h), 1, n, device=h.device, requires_grad=True)
              for n in (cfg.model_dim, cfg.vocab_size)]
    adamw = torch.optim.AdamW(shifts, betas=(cfg.slot_beta1, cfg.slot_beta2_ps), eps=1e-5,
                              weight_decay=1e-8, capturable=h.is_cuda)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / cfg.slot_batch_seqs
    for k in range(cfg.slot_steps):
        cosine = 0.5 * (1 + math.cos(math.pi * k / max(1, cfg.slot_steps - 1)))
        adamw.param_groups[0]["lr"] = cfg.slot_lr_min + (cfg.slot_lr - cfg.slot_lr_min) * cosine
        with torch.enable_grad():
            logits = model.logits(h + shifts[0].to(h.dtype), lora) + shifts[1]
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            grads = torch.autograd.grad((losses.view_as(weight) * weight).sum(), shifts)
        shifts[0].grad, shifts[1].grad = grads
        adamw.step()
    return tuple(shift.detach() for shift in shifts)


class Adjustment(t.ScoreAdjustment):
    """SLOT, then the tilt with word experts, or a mixer."""

    def __init__(self, cfg: t.Config, rt: t.Runtime, model: t.GPT, val: t.ValSet):
        self.pieces = t.read_pieces(cfg) if cfg.word_experts else None
        classes = token_classes(self.pieces)[2] if self.pieces else np.ones((1, cfg.vocab_size),
                                                                            bool)
        self.classes = torch.from_numpy(classes).to(rt.device)
        self.kinds = (torch.float32,) if cfg.ngram_mixer else ()
        if cfg.ngram_tilt_enabled:
            self.kinds = torch.int32, torch.float32, torch.uint8
        super().__init__(cfg, rt, model, val)

    def tables_over(self, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Logarithms of probabilities for a mixer; hint, boost and class of it for the tilt."""
        if self.cfg.ngram_tilt_enabled:
            return tilt_table(ids, self.cfg, self.pieces, self.rt.log)
        return (exact_mixer if self.cfg.ngram_mixer == "exact" else hashed_mixer)(ids, self.cfg),

    @torch.no_grad()
    def __call__(self, losses: Tensor, chunk_batch: t.ChunkBatch, lora: t.Lora) -> Tensor:
        """The losses [b, C] that enter the score, from the model's."""
        cfg, positions, shift = self.cfg, chunk_batch.positions, 0.0
        h = self.h if cfg.ttt_stream else t.gather_positions(self.h, positions)
        if cfg.slot_enabled:
            targets, mask = chunk_batch.targets, chunk_batch.mask
            if cfg.slot_fit == "context":
                positions = positions[:, :1] + torch.arange(-cfg.slot_context, 0, device=h.device)
                mask, positions = (positions >= 0) & mask[:, :1], positions.clamp(min=0)
                targets = chunk_batch.ids.gather(1, positions + 1)
            context = t.gather_positions(self.h, positions)
            delta, shift = fit_slot(self.model, lora, context, targets, mask)
            h = h + delta.to(h.dtype)
        logp = (self.model.logits(h, lora) + shift).log_softmax(-1)
        if cfg.slot_enabled:
            losses = -logp.gather(2, chunk_batch.targets[:, :, None])[:, :, 0]
        found = self.entries(chunk_batch)
        if cfg.ngram_tilt_enabled:
            return tilt(losses, logp, chunk_batch.targets, *found, self.classes)
        place = chunk_batch.place[:, None] + torch.arange(losses.shape[1], device=h.device)
        return mix(losses, logp, *found, place, cfg) if cfg.ngram_mixer else losses


def freeze(model: t.GPT, blocks: int) -> None:
    """TTT_FREEZE_BLOCKS: no gradient for the first blocks, nor for their matrices in the banks."""
    for name, p in model.named_parameters():
        if name.endswith("_bank"):
            p.grad.unflatten(0, (-1, model.cfg.num_layers))[:, :blocks].zero_()
        elif name.startswith("blocks.") and int(name.split(".")[1]) < blocks:
            p.grad.zero_()


def first_pass(model: t.GPT, val: t.ValSet, cfg: t.Config, rt: t.Runtime) -> None:
    """Illegal: learn from all documents, and from TTT_SECOND_PASS_FRAC of them once more at a tenth
    of the rate, before anything counts. idea: #1430; there a first pass scores, to no effect."""
    documents = [t.Document(*d) for d in val.documents()]
    for part, rate in ((1.0, 1.0), (cfg.ttt_second_pass_frac, 0.1)):
        t.global_sgd_phase(model, documents[: math.ceil(part * len(documents))], val,
                           replace(cfg, global_ttt_lr=rate * cfg.global_ttt_lr), rt)


# ---- quantisation


def protected_columns(weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor],
                      cfg: t.Config) -> dict[str, Tensor]:
    """AWQ-lite (#1908): first columns of the groups that get AWQ_LITE_BITS, by matrix.

    A column's importance is the RMS of its input, from diag(H), times its mean |w|; a group's is
    the sum, and the AWQ_LITE_GROUP_TOP_K best of all matrices of fewer bits are taken."""
    size, found = cfg.awq_lite_group_size, []
    calls = [f".{call.layer}" for call in t.layer_plan(cfg, looped=True)]
    for m in t.matrices(cfg):
        W, H = weights[m.name], hessians[m.source]
        if t.grid_for(m.role, cfg).bits < cfg.awq_lite_bits:
            seen = max(1, sum(m.source.endswith(layer) for layer in calls))  # inputs: x tokens
            rms_in = (H.diagonal() / (seen * cfg.train_batch_tokens)).sqrt()
            groups = (rms_in * W.abs().mean(0))[: W.shape[1] // size * size].view(-1, size).sum(1)
            found += [(-g, m.name, i * size) for i, g in enumerate(groups.tolist())]
    best = sorted(found)[: cfg.awq_lite_group_top_k]
    return {name: torch.tensor(sorted(at for _, n, at in best if n == name), dtype=torch.int16)
            for name in {name for _, name, _ in best}}
