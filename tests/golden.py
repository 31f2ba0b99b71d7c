"""Compare this program with reference figures: `python -m tests.golden FILE.npz`.

A file holds a small model (`w/NAME`), its settings (`config`, JSON of environment variables) and
what another program computed with it. Every group of figures that the file holds is compared; the
exit code is 1 if one differs by more than it may, 2 if the file cannot be read.
"""

import json
import math
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt as t

DEFAULT = Path(__file__).resolve().parents[2] / "shared/golden/model_tiny.npz"


class Comparison(NamedTuple):
    """One figure: how far off it is, how far it may be, in words what is compared."""

    name: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit


def runtime() -> t.Runtime:
    return t.Runtime(0, 1, torch.device("cpu"))


def load_golden(path: Path | str) -> tuple[t.Config, t.GPT]:
    """The configuration and the float32 model of a reference file."""
    with np.load(path) as file:
        settings = {k: str(v) for k, v in json.loads(str(file["config"])).items()}
        cfg = t.Config.from_env({"PRESET": "pr1855", **settings}, Path(t.__file__).parent)
        attention = t.choose_attention(torch.device("cpu"), torch.float32)
        model = t.GPT(cfg, attention.function)
        weights = {k[2:]: torch.from_numpy(file[k]) for k in file.files if k.startswith("w/")}
    model.load_state_dict(weights)
    return cfg, model


def cosine_start(a: torch.Tensor) -> None:
    """A[b, r, i] = cos(r * in + i) / sqrt(in): the start of every adapter in the reference."""
    rank, width = a.shape[-2:]
    values = torch.arange(rank * width, dtype=torch.float64).cos() / math.sqrt(width)
    a.copy_(values.view(rank, width).float())


def compare_packed(file: dict, cfg: t.Config, model: t.GPT) -> Iterator[Comparison]:
    """Logits, loss and gradient norms on one packed row, plain and looped."""
    ids, cu_seqlens = torch.from_numpy(file["packed/ids"]), torch.from_numpy(file["packed/cu"])
    segments = t.Segments(cu_seqlens.int(), int(cu_seqlens.diff().max()))
    for loop in (0, 1):
        x, y = ids[None, :-1], ids[None, 1:]
        logits = model.head(model.hidden(x, segments, bool(loop)))[0]
        logits = cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap)
        want = torch.from_numpy(file[f"packed/logits_loop{loop}"])
        yield Comparison(f"logits, loop {loop}", (logits - want).abs().max().item(), 1e-4)
        model.zero_grad()
        loss = model(x, y, segments, bool(loop)).mean()
        loss.backward()
        error = abs(loss.item() - float(file[f"packed/loss_loop{loop}"]))
        yield Comparison(f"loss, loop {loop}", error, 1e-5)
        for name, p in model.named_parameters():
            want = float(file[f"packed/gradnorm_loop{loop}/{name}"])
            got = 0.0 if p.grad is None else p.grad.double().norm().item()
            error = abs(got - want) / max(abs(want), 1e-30) if want or got else 0.0
            yield Comparison(f"gradient norm of {name}, loop {loop}", error, 1e-3)
    model.zero_grad()


def compare_lora(file: dict, cfg: t.Config, model: t.GPT) -> Iterator[Comparison]:
    """Losses of every token under given adapters."""
    ids = torch.from_numpy(file["ttt/ids"])
    batch, width = ids.shape
    lora = t.Lora(cfg, batch, ids.device, lambda a: None)
    with torch.no_grad():
        for side, tensors in (("A", lora.A), ("B", lora.B)):
            for key, p in tensors.items():
                role, slot = key.rstrip("0123456789"), key[len(key.rstrip("0123456789")) :]
                name = "lm_head_lora" if role == "head" else f"{role}_loras.{slot}"
                given = torch.from_numpy(file[f"lora/{name}.{side}"])
                p.copy_(t.paired(given, cfg) if side == "B" and role in "qk" else given)
        segments = t.Segments.batch(batch, width - 1, ids.device)
        losses = model(ids[:, :-1], ids[:, 1:], segments, True, lora)
    want = torch.from_numpy(file["ttt/loss"])
    error = ((losses - want).abs() / want.clamp_min(1.0)).max().item()
    yield Comparison("losses with adapters, relative", error, 1e-5)


def compare_newton_schulz(file: dict, cfg: t.Config, model: t.GPT) -> Iterator[Comparison]:
    got = t.orthogonalise(torch.from_numpy(file["ns/in"])).float()
    error = (got - torch.from_numpy(file["ns/out"])).abs().max().item()
    yield Comparison("Newton-Schulz", error, 2e-2)


def compare_quantisation(file: dict, cfg: t.Config, model: t.GPT) -> Iterator[Comparison]:
    """GPTQ's integers and steps, and the error that LQER leaves, against the reference's."""
    W, H = torch.from_numpy(file["gptq/W"]), torch.from_numpy(file["gptq/H"])
    q, s = t.gptq(W, H, t.Grid(6, 11.5))
    unequal = (q != torch.from_numpy(file["gptq/q"])).double().mean().item()
    yield Comparison("GPTQ integers that differ", unequal, 1e-3)
    error = (s.float() - torch.from_numpy(file["gptq/s"]).float()).abs().max().item()
    yield Comparison("GPTQ row steps", error, 1e-3 * float(file["gptq/s"].max()))
    if "lqer/recon" in file:
        settings = t.Config(lqer_rank=4, lqer_asym_group=64)
        base = t.decode_gptq(q, s)
        ours = W - base - t.decode_lqer(t.encode_lqer(W - base, settings))
        theirs = (W - torch.from_numpy(file["lqer/recon"])).norm().item()
        yield Comparison("LQER error, relative", abs(ours.norm().item() / theirs - 1), 2e-2)


def compare_evaluation(file: dict, cfg: t.Config, model: t.GPT) -> Iterator[Comparison]:
    """Whole phased evaluations: learning rate 0, no global phase, everything."""
    val = t.ValSet(file["eval/tokens"].astype(np.int64), file["eval/bytes"].astype(np.int32))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    runs = {
        "ttt_lr0": ({"ttt_lora_lr": 0.0, "phased_ttt_prefix_docs": 0}, 1e-6),
        "ttt_noglobal": ({"phased_ttt_prefix_docs": 0}, 1e-2),
        "ttt_phased": ({}, 3e-2),
    }
    for name, (changes, limit) in runs.items():
        if f"eval/{name}" in file:
            settings = replace(cfg, **changes)
            model.load_state_dict(weights)
            score = t.score_phased(model, val, settings, runtime(), cosine_start)
            loss, bpb = file[f"eval/{name}"]
            yield Comparison(f"{name} val_loss", abs(score.loss - loss), limit)
            yield Comparison(f"{name} val_bpb, relative", abs(score.bpb / bpb - 1), limit)
    model.load_state_dict(weights)


GROUPS = {
    "packed/ids": compare_packed,
    "ttt/ids": compare_lora,
    "ns/in": compare_newton_schulz,
    "gptq/W": compare_quantisation,
    "eval/tokens": compare_evaluation,
}


def compare(path: Path | str, groups: tuple[str, ...] = tuple(GROUPS)) -> Iterator[Comparison]:
    """All comparisons for the groups that the file holds."""
    cfg, model = load_golden(path)
    with np.load(path) as npz:
        file = {k: npz[k] for k in npz.files}
    for key in groups:
        if key in file:
            yield from GROUPS[key](file, cfg, model)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m tests.golden FILE.npz", file=sys.stderr)
        return 2
    failed = done = 0
    try:
        for c in compare(sys.argv[1]):
            done, failed = done + 1, failed + (not c.holds)
            verdict = "ok  " if c.holds else "FAIL"
            print(f"{verdict} {c.name}: {c.error:.3g} (at most {c.limit:.3g})")
        if not done:
            raise ValueError("no group of figures that is known here")
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile,
            pickle.UnpicklingError, t.UserError) as error:
        print(f"error: {sys.argv[1]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{failed} comparisons failed" if failed else "all comparisons hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
