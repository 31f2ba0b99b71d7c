"""Bits a weight against error: scalar and trellis quantisers on a Gaussian and on a trained model.

    PRESET=cpu_demo python bench/bench_quantiser.py FOLDER_WITH_final_model.pt

Bits are ideal: a discretised Gaussian for every weight, whose deviation is rank one (row times
column, fitted to the integers), plus half a logarithm a fitted number. A second table holds the
bits of the whole model at what GPTQ on the uniform grid takes, and shows what is lost: KL
divergence from the unquantised model's predictions on 24,576 validation tokens, and BPB on all.
"""

import math
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as t  # noqa: E402

DB = 20 * math.log10(2)  # decibels a bit


def entropy(*samples) -> float:
    """Bits in all, each sample under its own distribution."""
    counts = [torch.unique(x, return_counts=True)[1].double() for x in samples if x.numel()]
    return sum(-(c * (c / c.sum()).log2()).sum().item() for c in counts)


def gaussian(step=0.235, count=160 * 128):
    """One Gaussian, and walks that begin again every TRELLIS_RUN samples."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))

    def line(name, value, bits):
        error = 10 * math.log10((x - value).square().mean())
        print(f"| {name} | {bits / count:.3f} | {error:.2f} | {bits / count * DB + error:.2f} |")

    print("| quantiser | bits | error, dB | above Shannon's bound, dB |\n|---|--:|--:|--:|")
    k = (x / 0.415).round()
    line("uniform, step 0.415", k * 0.415, entropy(k))
    k = (x / (1 + 0.415**2 / 12) / 0.415).round()
    line("the same for least error + lambda bits", k * 0.415, entropy(k))
    for states in t.TRELLISES:
        for run in (t.TRELLIS_RUN, count):
            x_steps = x / (1 + t.TRELLIS_NOISE * step**2) / step
            k = nearest(x_steps.view(-1, run), states).flatten()
            name = f"trellis, {states} states, step {step}, {'runs' if run < count else 'one run'}"
            line(name, k * step, entropy(k[k % 2 == 0], k[k % 2 != 0]))


def ideal_bits(k, width):
    """Bits of integers k [rows, cols] that stand `width` apart where they stand."""
    k, power = k.double(), k.double().square() + 1e-3
    sigma = (power.mean(1, keepdim=True) * power.mean(0) / power.mean()).sqrt()
    normal, (rows, cols) = torch.distributions.Normal(0.0, 1.0), k.shape
    p = normal.cdf((k + width / 2) / sigma) - normal.cdf((k - width / 2) / sigma)
    side = (rows * math.log2(cols) + cols * math.log2(rows)) / 4
    return -p.clamp_min(1e-9).log2().sum().item() + side


def nearest(x, states):
    """The walks of a trellis nearest to x [runs, L]: k [runs, L]."""
    columns = torch.nn.functional.pad(x.T, (0, -len(x) % t.LANES)).numpy()
    k = torch.empty(columns.shape).numpy()
    for i in range(0, columns.shape[1], t.LANES):
        part = columns[:, i : i + t.LANES].copy()
        t._viterbi(columns[:, i : i + t.LANES].copy(), t.trellis_ways(states), part)
        k[:, i : i + t.LANES] = part
    return torch.from_numpy(k)[:, : len(x)].T


def scalar(W, factor, s, c, entropy_coded):
    """GPTQ on a uniform grid with a trellis' steps: k."""
    order = factor.order
    d = (s.float()[:, None] * (c.float() / 8).exp2())[:, order]
    power = W.square()
    sigma2 = power.mean(1, keepdim=True) * power.mean(0)[order] / power.mean()
    shrink = 1 / (1 + entropy_coded * d.square() / 12 / sigma2)
    K, left = torch.empty_like(d), W.masked_fill(factor.dead, 0)[:, order]
    for i in range(W.shape[1]):
        K[:, i] = (left[:, i] * shrink[:, i] / d[:, i]).round()
        error = (left[:, i] - K[:, i] * d[:, i]) / factor.U[i, i]
        left[:, i:] -= error[:, None] * factor.U[i, i:]
    return K[:, order.argsort()]


class Study:
    """A trained model with its Hessians and sensitivities."""

    def __init__(self, folder):
        self.cfg = cfg = t.Config.from_env({**os.environ, "SEED": "42"}, ROOT)
        self.rt = t.start_runtime({})
        self.model = t.make_model(cfg, self.rt, t.choose_attention(
            self.rt.device, self.rt.dtype, cfg.attention))
        t.load_state(self.model, Path(folder) / t.MODEL_FILE)
        rows, self.val = t.load_train(cfg, self.rt), t.load_val(cfg)
        self.hessians = t.calibrate(self.model, rows, cfg.iterations, self.rt)
        self.noise = t.sensitivities(self.model, rows, cfg.iterations, self.hessians, self.rt)
        self.state = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.factors = {name: t.factorise(H) for name, H in self.hessians.items()}
        self.found = t.matrices(cfg)
        self.weights = {m: t.matrix_of(self.state, m) for m in self.found}
        self.count = sum(W.numel() for W in self.weights.values())
        self.reference = self.predictions()
        self.bpb = t.evaluate(self.model, self.val, cfg, self.rt).bpb

    @torch.no_grad()
    def predictions(self, rows=12):
        length, cap, out = self.cfg.val_batch_tokens // 8, self.cfg.logit_softcap, []
        for i in range(0, rows * length, length):
            ids = self.val.ids[i : i + length + 1]
            row = t.make_row(ids[:-1], ids[1:], self.cfg.eval_seq_len, self.rt.device)
            z = self.model.hidden(row.ids, row.segments, True) @ self.model.tok_emb.weight.T
            out.append((cap * (z / cap).tanh()).log_softmax(-1))
        return torch.cat(out)

    def hand_unit(self, m):
        """One step for all rows: the geometric mean of the uniform grid's."""
        s = t.grid_for(m.role, self.cfg).steps(self.weights[m]).float()
        return torch.full_like(s, s.log().mean().exp().item())

    def own_unit(self, m):
        return t.trellis_unit(self.factors[m.source], self.noise[m.name])

    def quantise(self, kind, unit, level, columns=True):
        """(decoded matrices, ideal bits of each)"""
        out, bits = {}, {}
        for m, W in self.weights.items():
            factor = self.factors[m.source]
            s, c = t.trellis_steps(W, factor, 2**level * unit(m))
            if not columns:
                s, c = (2**level * unit(m)).to(s), torch.zeros_like(c)
            if isinstance(kind, str):
                k = scalar(W, factor, s, c, kind == "ECSQ")
                out[m] = k * s.float()[:, None] * (c.float() / 8).exp2()
                bits[m] = ideal_bits(k, 1)
                continue
            q = t.gptq_trellis(W, factor, s, c, kind)
            out[m] = t.decode_trellis(q, s, c, kind)
            k = torch.from_numpy(t.trellis_walk(q.numpy(), t.trellis_bits(kind)))
            bits[m] = ideal_bits(k, 2)
        return out, bits

    def uniform(self, feedback=True):
        out, bits = {}, {}
        for m, W in self.weights.items():
            grid = t.grid_for(m.role, self.cfg)
            s = grid.steps(W)
            q = grid.round(W, s.float()[:, None])
            if feedback:
                q, s = t.gptq(W, self.hessians[m.source], grid)
            out[m], bits[m] = t.decode_gptq(q, s), ideal_bits(q, 1)
        return out, bits

    def by_matrix(self):
        """Bits and H-weighted error, each quantiser near the uniform grid's error."""
        print("| quantiser | bits | error, dB | bits at the error of GPTQ |\n|---|--:|--:|--:|")
        zero = None
        for name, (out, bits) in self.cases():
            error = sum(0.5 * W.numel() * math.log2(self.lost(W - out[m], m) / self.lost(W, m))
                        for m, W in self.weights.items()) / self.count
            total = sum(bits.values()) / self.count
            zero = error if name == "GPTQ, uniform" else zero
            same = "" if zero is None else f"{total + error - zero:.3f}"
            print(f"| {name} | {total:.3f} | {error * DB:.2f} | {same} |", flush=True)

    def cases(self):
        yield "GPTQ, uniform", self.uniform()
        yield "round to nearest", self.uniform(feedback=False)
        for kind, name, level in (("uniform", "GPTQ, one step a matrix", 0), ("ECSQ", "", 0),
                                  (8, "", -0.82), (32, "", -0.82)):
            name = name or (f"GPTQ, trellis of {kind} states" if kind != "ECSQ" else
                            "GPTQ, least error + lambda bits")
            yield name, self.quantise(kind, self.hand_unit, level, columns=False)
        yield "the same, steps by column", self.quantise(32, self.hand_unit, -0.82)

    def lost(self, E, m):
        E = E.double()
        return ((E @ self.hessians[m.source].double()) * E).sum().item()

    def score(self, name, out, bits, lqer=False):
        new = {name: x.clone() for name, x in self.state.items()}
        errors = {m: W - out[m] for m, W in self.weights.items()}
        for m in sorted(errors, key=lambda m: -errors[m].norm())[: self.cfg.lqer_top_k * lqer]:
            out[m] = out[m] + t.decode_lqer(t.encode_lqer(errors[m], self.cfg))
        for m, W in out.items():
            (new[m.bank] if m.index is None else new[m.bank][m.index]).copy_(W)
        self.model.load_state_dict(new)
        kl = (self.reference.exp() * (self.reference - self.predictions())).sum(-1).mean().item()
        bpb = t.evaluate(self.model, self.val, self.cfg, self.rt).bpb - self.bpb
        self.model.load_state_dict(self.state)
        roles = {}
        for role in ("embedding", "query", "attn_out", "mlp_up", "mlp_down"):
            own = [m for m in self.found if m.role == role]
            roles[role] = sum(bits[m] for m in own) / sum(self.weights[m].numel() for m in own)
        by_role = " | ".join(f"{x:.2f}" for x in roles.values())
        print(f"| {name} | {sum(bits.values()) / self.count:.4f} | {kl:.6f} | {bpb:+.5f} | "
              f"{by_role} |", flush=True)

    def whole(self):
        """All at the bits of GPTQ on the uniform grid."""
        print("| quantiser, steps | bits | KL, nats | BPB lost | embedding | query | attn_out | "
              "mlp_up | mlp_down |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")
        out, bits = self.uniform()
        budget = sum(bits.values())
        self.score("GPTQ, uniform, by hand", dict(out), bits)
        self.score("the same with LQER (its bits not counted)", dict(out), bits, lqer=True)
        spreads = [W.square().mean().sqrt().item() for W in self.weights.values()]
        counts = [W.numel() for W in self.weights.values()]
        for kind, unit, name in (
                (32, self.hand_unit, "trellis of 32, by hand"),
                ("ECSQ", self.own_unit, "scalar, by sensitivity"),
                (8, self.own_unit, "trellis of 8, by sensitivity"),
                (32, self.own_unit, "trellis of 32, by sensitivity")):
            level = t.water_level(spreads, [unit(m).log2().mean().exp2().item()
                                            for m in self.weights], counts, budget)
            for _ in range(4):
                out, bits = self.quantise(kind, unit, level)
                level += (over := (sum(bits.values()) - budget) / self.count)
                if abs(over) < 0.003:
                    break
            self.score(name, dict(out), bits)
        self.score("the same with LQER (its bits not counted)", dict(out), bits, lqer=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gaussian()
    if len(sys.argv) > 1:
        study = Study(sys.argv[1])
        study.by_matrix()
        study.whole()
