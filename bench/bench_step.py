"""Time one training micro-batch, the optimiser and the average: `python bench/bench_step.py`.

`torchrun --standalone --nproc_per_node=4 bench/bench_step.py` times whole steps on several GPUs.
Settings are the program's environment variables (PRESET, ATTENTION, TRAIN_BATCH_TOKENS, ...).
Every figure is the median of REPEATS timed runs (default 20) after 5 untimed ones, with its spread.
TFLOP/s counts the operations of the matrix products and of causal attention; the share is of the
989 TFLOP/s (bfloat16, dense) and 4.8 TB/s of an H200. PROFILE=1 adds tables of kernels.
"""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t
from calibrate import synthetic_row
from caseops.processors import processors

REPEATS = int(os.environ.get("REPEATS", 20))
PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12


def timed(rt: t.Runtime, work, repeats: int = REPEATS, behind=None) -> tuple[float, float]:
    """(median, spread between the 10th and 90th percentile) of one run, in ms.

    `behind` fills a GPU's queue first: then work's time is the device's own, as in a training run,
    where the host is always ahead."""
    cuda = rt.device.type == "cuda"
    for _ in range(5 if cuda else 1):
        work()
    samples = []
    for _ in range(repeats):
        if cuda and behind:
            behind()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            rt.seconds()
            samples.append(begin.elapsed_time(end))
            continue
        started = rt.seconds()
        work()
        samples.append(1000 * (rt.seconds() - started))
    tenths = statistics.quantiles(samples, n=10) if len(samples) > 1 else samples * 9
    return statistics.median(samples), tenths[8] - tenths[0]


def flops(cfg: t.Config, row: t.PackedBatch, looped: bool) -> float:
    """Operations of forward and backward: 6 a weight and token, and attention's causal products."""
    tokens, d = row.ids.numel(), cfg.model_dim
    passes = len(t.layer_plan(cfg, looped))
    weights = passes * 2 * d * (d + cfg.kv_dim + cfg.hidden_dim) + d * cfg.vocab_size
    squares = row.segments.cu_seqlens.diff().double().square().sum().item() / 2
    return 6 * weights * tokens + 3 * passes * 4 * squares * d


def profile(work) -> None:
    """The kernels that take most of the time."""
    with torch.profiler.profile() as found:
        work()
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40,
                                       max_name_column_width=70)
    print("\n".join(line[:72] + line[-90:] for line in table.splitlines()))


def main() -> None:
    """Everything, with the model compiled as training does."""
    cfg = t.Config.from_env(os.environ, Path(__file__).resolve().parents[1])
    rt = t.start_runtime(os.environ)
    attention = t.choose_attention(rt.device, rt.dtype, cfg.attention)
    name = torch.cuda.get_device_name() if rt.device.type == "cuda" else "CPU"
    rt.log(f"{rt.world} x {name}, {processors()} cores, Python {platform.python_version()}, "
           f"torch {torch.__version__}, attention {attention.reason}")
    started = time.perf_counter()
    model = t.make_model(cfg, rt, attention)
    with model.compiled(cfg.compile and rt.device.type == "cuda"):
        optimisers = t.Optimisers(model, cfg, rt)
        if rt.world == 1:
            parts(cfg, rt, model, optimisers, started)
        steps(cfg, rt, model, optimisers)
    if rt.world > 1:
        torch.distributed.destroy_process_group()


def steps(cfg: t.Config, rt: t.Runtime, model: t.GPT, optimisers: t.Optimisers) -> None:
    """Whole steps of the same 8 rows in any world size."""
    rows = [synthetic_row(cfg, rt, rt.rank * rt.accumulation + k) for k in range(rt.accumulation)]
    for looped in (False, True):
        def step(looped=looped):
            return t.run_step(model, rows, looped, optimisers, 0.0, 0.95)

        middle, spread = timed(rt, step, max(3, REPEATS // 4))
        rt.log(f"whole step of 8 rows {'looped' if looped else 'plain '} {middle:8.2f} ms "
               f"(+-{spread:.2f}) {cfg.train_batch_tokens / middle / 1e3:.2f} Mtok/s; gradient "
               f"norm {step()[1].item():.6f}")
    if rt.device.type == "cuda":
        rt.log(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def parts(cfg: t.Config, rt: t.Runtime, model: t.GPT, optimisers: t.Optimisers,
          started: float) -> None:
    """One row, the optimiser and the average, a line a figure."""
    ema, row = t.Ema(model, cfg.ema_decay), synthetic_row(cfg, rt)
    for looped in (False, True):

        def step(looped=looped):
            return t.row_gradients(model, row, looped, optimisers)

        step()
        rt.seconds()
        print(f"first {'looped' if looped else 'plain'} step after "
              f"{time.perf_counter() - started:.1f} s")
        middle, spread = timed(rt, step)
        rate = flops(cfg, row, looped) / middle / 1e9
        print(f"forward+backward {'looped' if looped else 'plain '} {middle:8.2f} ms "
              f"(+-{spread:.2f}) {rate:6.0f} TFLOP/s ({1e14 * rate / PEAK_FLOPS:.0f}%) "
              f"{row.ids.numel() / middle / 1e3:.2f} Mtok/s")
        if os.environ.get("PROFILE"):
            profile(step)
    _loss, *grads = step()

    def copies():
        for p, g in zip(optimisers.params, torch._foreach_mul(grads, 1.0), strict=True):
            p.grad = g

    def update():
        copies()
        optimisers.step(0.0, 0.95)

    copying = timed(rt, copies, behind=step)[0]
    middle, spread = timed(rt, update, behind=step)
    if os.environ.get("PROFILE"):
        profile(update)
    weights = sum(4 * p.numel() for p in optimisers.params)
    # at least: gradient and moment read, moment written, weight read and written
    least = 5 * weights / PEAK_BYTES * 1e3
    print(f"optimiser with clipping {middle - copying:8.2f} ms (+-{spread:.2f}), at least "
          f"{least:.2f} ms of memory traffic")
    middle, spread = timed(rt, ema.update, behind=step)
    print(f"average (EMA)           {middle:8.2f} ms (+-{spread:.2f}), at least "
          f"{3 * weights / PEAK_BYTES * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
