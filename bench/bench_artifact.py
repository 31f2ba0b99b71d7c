"""Compare entropy coders: `python bench/bench_artifact.py [FILE] [--compressors ans,brotli,...]`.

FILE is an artifact (final_model.int6.ptz) or a final_model.pt; the latter is rounded to its grids
(no calibration), with the shapes of the program's environment variables. Without a FILE: a model of
the full size made up of Gaussian weights, whose columns have log-normal scales (deviation 0.08,
half of its square common to all layers), rows of log-normal scale 0.3, an embedding with a spectrum
of power -1/2, all put through §8's GPTQ with made-up Hessians (half a minute; --save FILE.npz),
on the uniform grid or, with QUANTISER=tcq, as walks of a trellis with steps of about a quarter of a
deviation (then the order-0 bound is that of the symbols without their contexts).

Each compressor runs in a process of its own: total bytes, bytes of the matrices alone, their share
above or below the order-0 bound (entropy of the integers' histogram, by role), seconds to write and
to read, CPU seconds (which other work on the machine does not stretch), and the greatest memory
above what the loaded program and model take; children (lrzip) are counted apart. Results are
checked to be equal to what went in.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t
from caseops.processors import processors


def hessian(n: int, rng: np.random.Generator) -> torch.Tensor:
    """Second moments [n, n] of correlated inputs whose channels differ in scale."""
    x = rng.normal(size=(2 * n, n)) * np.arange(1, n + 1) ** -0.4
    x = x @ np.linalg.qr(rng.normal(size=(n, n)))[0].T * np.exp(rng.normal(0, 0.4, n))
    return torch.from_numpy(x.T @ x).float()


def synthetic(cfg: t.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Quantised matrices and their steps, of the model that cfg describes."""
    rng, shared, out, factors, seconds = np.random.default_rng(seed), {}, {}, {}, 0.0
    state = t.GPT(cfg, None).state_dict()
    hessians = {}
    for m in t.matrices(cfg):
        R, C = state[m.bank].shape[-2:]
        W = rng.normal(size=(R, C)) * np.exp(rng.normal(0, 0.3, (R, 1)))
        if m.role == "embedding":
            turn = np.linalg.qr(rng.normal(size=(C, C)))[0]
            W = W * np.arange(1, C + 1) ** -0.25 @ turn.T
        else:
            common = shared.setdefault(m.role, rng.normal(0, 0.056, C))
            W = W * np.exp(common + rng.normal(0, 0.056, C))
        if C not in hessians:
            hessians[C] = hessian(C, rng)
        W = torch.from_numpy(W).float()
        if cfg.quantiser == "uniform":
            q, s = t.gptq(W, hessians[C], t.grid_for(m.role, cfg))
            out[f"{m.name}.q"], out[f"{m.name}.s"] = q.numpy(), s.numpy()
            continue
        factor, fine = factors.setdefault(C, t.factorise(hessians[C])), m.role == "embedding"
        s, c = t.trellis_steps(W, factor,
                                torch.full((len(W),), W.std().item() * (0.12 if fine else 0.235)))
        started = time.process_time()
        q = t.gptq_trellis(W, factor, s, c, cfg.trellis_states)
        seconds += time.process_time() - started
        out |= {f"{m.name}.q": q.numpy(), f"{m.name}.s": s.numpy(), f"{m.name}.c": c.numpy()}
    if cfg.quantiser == "tcq":
        out["trellis"] = np.array([cfg.trellis_states], np.int16)
        print(f"trellis: {seconds:.1f} CPU seconds for all matrices")
    return out


def rounded(path: Path, cfg: t.Config) -> dict[str, np.ndarray]:
    """The matrices of a final_model.pt on their grids, everything else in float16."""
    state, out = torch.load(path, map_location="cpu", weights_only=True), {}
    for m in t.matrices(cfg):
        W = (state[m.bank] if m.index is None else state[m.bank][m.index]).float()
        grid = t.grid_for(m.role, cfg)
        s = grid.steps(W)
        out[f"{m.name}.q"] = grid.round(W, s.float()[:, None]).to(torch.int8).numpy()
        out[f"{m.name}.s"] = s.numpy()
    banks = {m.bank for m in t.matrices(cfg)}
    return out | {k: v.half().numpy() for k, v in state.items() if k not in banks}


def load(path: Path | None, cfg: t.Config) -> tuple[dict[str, np.ndarray], dict[str, str], str]:
    """(tensors, roles, in words where they come from)."""
    if path is None:
        tensors, source = synthetic(cfg), "synthetic, full size"
    elif path.suffix == ".npz":
        tensors, source = dict(np.load(path)), str(path)
    elif path.suffix == ".pt":
        tensors, source = rounded(path, cfg), f"{path}, rounded"
    else:
        tensors, meta = t.decode_artifact(path.read_bytes(), str(path))
        known = {name: str(meta[name]) for name in cfg.architecture() if name in meta}
        cfg = t.Config.from_env({name.upper(): "01"[int(v == "True")] if v in ("True", "False")
                                 else v for name, v in known.items()})
        source = str(path)
    roles = {f"{m.name}.q": m.role for m in t.matrices(cfg) if f"{m.name}.q" in tensors}
    return tensors, roles, source


def order0(tensors: dict[str, np.ndarray], roles: dict[str, str]) -> float:
    """Bytes that an ideal coder with one histogram a role would need for the integers."""
    counts = defaultdict(lambda: np.zeros(256))
    for name, role in roles.items():
        counts[role] += np.bincount(tensors[name].ravel().astype(int) + 128, minlength=256)
    return sum(-(c[c > 0] * np.log2(c[c > 0] / c.sum())).sum() / 8 for c in counts.values())


def peak_memory(reset: bool = False) -> int:
    """MiB at the peak since the last reset; ru_maxrss would begin with the parent's."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def measure(name: str, path: str, roles: dict[str, str], queue) -> None:
    """One compressor in this process: its figures into the queue."""
    tensors = dict(np.load(path))
    before = peak_memory(reset=True)
    wall, cpu = [time.perf_counter()], [sum(os.times()[:4])]
    blob = t.encode_artifact(tensors, roles, {}, name)
    wall.append(time.perf_counter())
    cpu.append(sum(os.times()[:4]))
    found, _ = t.decode_artifact(blob, name)
    wall.append(time.perf_counter())
    cpu.append(sum(os.times()[:4]))
    assert all(found[k].tobytes() == v.tobytes() for k, v in tensors.items()), name
    report = t.artifact_report(blob)
    queue.put({"bytes": len(blob), "report": report,
               "write": wall[1] - wall[0], "read": wall[2] - wall[1],
               "write_cpu": cpu[1] - cpu[0], "read_cpu": cpu[2] - cpu[1],
               "memory": peak_memory() - before,
               "children": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--compressors", default=",".join(t.COMPRESSORS))
    parser.add_argument("--save", type=Path, help="keep the tensors in this .npz")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", processors())))
    tensors, roles, source = load(args.file, t.Config.from_env(os.environ))
    bound, integers = order0(tensors, roles), sum(tensors[k].size for k in roles)
    print(f"{source}: {integers:,} integers in {len(roles)} matrices; order-0 bound of the "
          f"integers {bound:,.0f} bytes; {processors()} cores, load {os.getloadavg()[0]:.1f}")
    print("| compressor | bytes | matrices | to the bound | write s (CPU) | read s (CPU) | MiB "
          "(children) |\n|---|--:|--:|--:|--:|--:|--:|")
    context, reports = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        path = args.save or Path(folder, "tensors.npz")
        np.savez(path, **tensors)
        for name in args.compressors.split(","):
            queue = context.Queue()
            process = context.Process(target=measure, args=(name, str(path), roles, queue))
            process.start()
            r = queue.get(timeout=3600)
            process.join()
            reports[name] = r["report"]
            own = sum(size for group, size in r["report"].items() if group in t.ROLES)
            share = f"{own:,} | {100 * (own / bound - 1):+.3f}%" if own else "- | -"
            print(f"| {name} | {r['bytes']:,} | {share} | "
                  f"{r['write']:.1f} ({r['write_cpu']:.1f}) | "
                  f"{r['read']:.1f} ({r['read_cpu']:.1f}) | {r['memory']} ({r['children']}) |",
                  flush=True)
    for name, report in reports.items():
        print(f"{name}: {json.dumps(report)}")


if __name__ == "__main__":
    main()
