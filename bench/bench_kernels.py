"""Time the fused operators of §3 against their compiled twins: `python bench/bench_kernels.py`.

Forward and backward apart, at one training micro-batch's sizes, medians of event timings in us.
GB/s counts every tensor read or written once. ROWS (default 98304) is the number of tokens.
"""

import os
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t
from bench.bench_step import synthetic_row

N, d, HIDDEN, V = int(os.environ.get("ROWS", 98304)), 512, 2048, 8192


def tensor(*shape: int, dtype=torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(dtype).requires_grad_()


def spent(work) -> float:
    return 1000 * triton.testing.do_bench(work, warmup=20, rep=60, return_mode="median")


def measure(name: str, function, twin, inputs: list, units: tuple[float, float]) -> None:
    """One line: us and GB/s of both directions; `units` are [N, d] bfloat16 tensors moved."""
    line = f"{name:22}"
    for f in (function, torch.compile(twin, dynamic=False)) if twin else (function,):
        results = list({id(y): y for y in f(*inputs)
                        if y is not None and y.requires_grad and y.numel()}.values())
        grads = [torch.randn_like(y) for y in results]
        leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

        def back(results=results, leaves=leaves, grads=grads):
            torch.autograd.grad(results, leaves, grads, retain_graph=True)

        for moved, work in zip(units, (lambda f=f: f(*inputs), back), strict=True):
            us = spent(work)
            line += f" {us:8.1f} us {moved * N * d * 2 / us / 1000:6.0f} GB/s |"
    print(line, flush=True)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {N} rows")
    print(" " * 24 + "kernel: forward | backward | compiled twin: forward | backward")
    f32 = dict(dtype=torch.float32)
    a, m, skip, x0 = (tensor(N, d) for _ in range(4))
    mix, lerp = tensor(2, d, **f32), tensor(2, d, **f32)
    for name, inputs, units in (
        ("mix + skip + norm", (a, m, skip, lerp, x0, mix, 0.5, 12), (7, 10)),
        ("mix + norm", (a, m, None, None, x0, mix, 0.5, 12), (6, 8)),
        ("add + norm", (a, m, None, None, None, None, 0.5, 0), (4, 4)),
    ):
        measure(name, t.residual_mix_rmsnorm, t.residual_mix_rmsnorm_ref, inputs, units)
    row = synthetic_row(t.Config(train_batch_tokens=8 * N), t.Runtime(0, 1, torch.device("cuda")))
    rope = t.rotation(torch.arange(N, device="cuda"), t.Config())
    if t.choose_attention(rope.device, torch.bfloat16).name == "fa4":
        inputs = (tensor(1, N, 16, 64), tensor(1, N, 12), tensor(8, **f32), tensor(8, 12, **f32))
        measure("heads with attention", lambda *x: [t.attention_core(
            *x, rope, t.attend_fa4, row.segments, True, 0.5)], None, inputs, (10.5, 26))
    n = tensor(N, d)
    up, down = tensor(HIDDEN, d, scale=d**-0.5), tensor(d, HIDDEN, scale=HIDDEN**-0.5)
    measure("MLP", lambda *x: [t.leaky_mlp(*x)], None, (n, up, down, 0.5), (14, 30))
    z, targets = tensor(N, V, scale=5), torch.randint(V, (N,), device="cuda")
    measure("softcap + CE", lambda *x: [t.softcap_cross_entropy(*x)], None, (z, targets, 30.0),
            (16, 32))


if __name__ == "__main__":
    main()
