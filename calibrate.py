"""What this machine will do, before a run is paid for: `python train_gpt.py calibrate`, or the same
under torchrun with as many processes as the run will have, and with its settings (PRESET=...).

Synthetic ids in documents as long as the training data's or, where there are none, of log-normal
length as in FineWeb; random weights. It prints the time of a step in every stage, of the optimiser,
of calibration and of test-time training, and from these the steps of the budget and the seconds of
evaluation. It takes about a minute, and compiling.

After training the program asks it for a report: how evenly steps went, and what held them up."""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

import train_gpt as t
from caseops.processors import processors

TARGETS = 47_853_343  # of the challenge's validation set
REFERENCE = 4931, 121.7, 786_432  # the record on 8 H100s: steps, ms a step, tokens a step
BPB_A_PERCENT = 0.0002  # rule of thumb: what one per cent more steps takes off
MEAN, SIGMA = 957, 1.0  # FineWeb's documents: tokens in the mean, deviation of their logarithm


def document_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Log-normal lengths [count], in tokens."""
    draws = np.random.default_rng(seed).lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return draws.astype(int) + 2


def lengths_of_data(cfg: t.Config, tokens: int = 8_000_000) -> np.ndarray | None:
    """Lengths of the documents in the first training tokens, None where there are no data."""
    try:
        ids = t.load_split(cfg, "train").shards[0][:tokens]
    except t.UserError:
        return None
    found = np.diff(np.flatnonzero(ids == t.BOS))
    return found if len(found) else None


def synthetic_row(cfg: t.Config, rt: t.Runtime, seed: int = 0, longest: int = 0,
                  lengths: np.ndarray | None = None) -> t.PackedBatch:
    """An eighth of a step's tokens: random ids in documents drawn from `lengths`, else of
    FineWeb's lengths."""
    rng, length = np.random.default_rng(seed), cfg.train_batch_tokens // 8 + 1
    ids = rng.integers(2, cfg.vocab_size, length)
    begins = np.cumsum(document_lengths(length, seed) if lengths is None else
                       rng.choice(lengths, length))
    ids[begins[begins < length]] = ids[0] = t.BOS
    return t.make_row(ids[:-1], ids[1:], longest or cfg.train_seq_len, rt.device)


def median_seconds(work: Callable[[], object], rt: t.Runtime, seconds: float, warm: int) -> float:
    """Median of the runs that fit into `seconds`, at least two of them, after `warm` others; the
    same number on every rank."""
    for _ in range(warm):
        work()
    times, began = [], rt.seconds()
    while len(times) < 2 or rt.sync_clock(rt.seconds() - began) < seconds:
        started = rt.seconds()
        work()
        times.append(rt.seconds() - started)
    return rt.sync_clock(statistics.median(times))


def shares(cfg: t.Config) -> dict[tuple[int, bool], float]:
    """(longest segment, looped) -> the fraction of training in that stage."""
    fractions = ((k + 0.5) / 10_000 for k in range(10_000))
    found = Counter((t.stage_length(f, cfg), t.is_looped(f, cfg)) for f in fractions)
    return {stage: count / 10_000 for stage, count in found.items()}


def forecast(stages: Mapping[tuple[int, bool], float], seconds: Mapping[tuple[int, bool], float],
             budget: float) -> float:
    """Steps in `budget` seconds, of which every stage has its share of the time."""
    return sum(share * budget / seconds[stage] for stage, share in stages.items())


def step_seconds(model: t.GPT, cfg: t.Config, rt: t.Runtime) -> dict[tuple[int, bool], float]:
    """Seconds of a step in every stage, the optimiser and the average included."""
    optimisers, ema, found = t.Optimisers(model, cfg, rt), t.Ema(model, 0.5), {}
    lengths = lengths_of_data(cfg)
    rt.log("documents: " + ("log-normal" if lengths is None else "as long as the training data's")
           + f", mean {MEAN if lengths is None else lengths.mean():.0f} tokens")
    cuda = rt.device.type == "cuda"
    for longest, looped in t.train_shapes(cfg):
        rows = [synthetic_row(cfg, rt, rt.rank * rt.accumulation + k, longest, lengths)
                for k in range(rt.accumulation)]

        def steps(rows=rows, looped=looped, count=4 if cuda else 1):
            for _ in range(count):  # several, so that the host can be ahead as in a run
                t.run_step(model, rows, looped, optimisers, 0.0, 0.95)
                ema.update()
            return count

        # warm for long enough that the clock rate is that of a run: a cold card is faster
        warm = 6 if cuda else 1
        found[longest, looped] = median_seconds(steps, rt, 2.0, warm) / (4 if cuda else 1)
        rt.log(f"step: length {longest} {'looped' if looped else 'plain'} "
               f"{1000 * found[longest, looped]:.1f} ms, "
               f"{cfg.train_batch_tokens / found[longest, looped]:,.0f} tokens/s")
    grads = [p.detach() * 1e-3 for p in optimisers.params]

    def update():
        for p, grad in zip(optimisers.params, grads, strict=True):
            p.grad = grad.clone()
        optimisers.step(0.0, 0.95)
        ema.update()

    rt.log(f"optimiser and average: {1000 * median_seconds(update, rt, 1.0, 2):.1f} ms of a step")
    return found


def scoring_rate(model: t.GPT, cfg: t.Config, rt: t.Runtime) -> float:
    """Targets a second of test-time training on all ranks: batches of equally long documents, as
    sorting makes them, at some quantiles of the lengths."""
    cuda, rng = rt.device.type == "cuda", np.random.default_rng(rt.rank)
    ordered = np.sort(document_lengths(1000))
    quantiles = ordered[[100, 300, 500, 700, 900]] if cuda else ordered[[300]]
    make = t.StreamingLoraTTT if cfg.ttt_stream else t.LoraTTT
    adapter = make(model, cfg, rt, cfg.ttt_batch_size, t.uniform_start(rt.generator(cfg.seed)))
    meter, targets, spent = t.Meter(rt), 0, 0.0
    for length in quantiles:
        ids = rng.integers(2, cfg.vocab_size, cfg.ttt_batch_size * int(length))
        ids[:: int(length)] = t.BOS
        val = t.ValSet(ids, np.where(ids == t.BOS, 0, 4).astype(np.int32))
        batch = [t.Document(*span) for span in val.documents()]
        for last in (False, False, True) if cuda else (True,):  # met, recorded, replayed
            adapter.reset()
            started = rt.seconds()
            with t.frozen(model):
                t.score_batch(adapter, batch, val, meter, lambda count: None)
            if last:
                spent += rt.seconds() - started
                targets += sum(doc.targets for doc in batch)
    return rt.world * targets / rt.sync_clock(spent)


def graphs(graph_cache: t.CudaGraphCache) -> int:
    """CUDA graphs recorded so far, and graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # nobody waits for it who does not compile
    compiled = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
    return compiled + sum(map(bool, graph_cache.graphs.values()))


def report(marks: list[float], changes: list[int], waited: float, recorded: int,
           graph_cache: t.CudaGraphCache, rt: t.Runtime) -> None:
    """Log the times of steps around each change of stage, and what held steps up. `marks`: seconds
    before each step from the first of `changes` on; `recorded`: graphs made meanwhile."""
    times = 1000 * np.diff(marks)
    for begin in (max(step - 1, changes[0]) - changes[0] for step in changes):
        told = " ".join(f"{x:.1f}" for x in times[begin:begin + 5])
        rt.log(f"step times from step {begin + changes[0]}: {told} ms")
    if len(times):
        slowest = int(times.argmax())
        rt.log(f"step times: median {np.median(times):.1f} ms, longest {times[slowest]:.1f} ms at "
               f"step {changes[0] + slowest}")
    rt.log(f"data wait: {waited:.1f}s")
    rt.log(f"graphs recorded in the clock: {recorded} (rows run without one: "
           f"{graph_cache.loose})")
    rt.record["training"] |= {"data_wait_seconds": round(waited, 3), "graphs": recorded,
                              "rows_without_graph": graph_cache.loose}


def compare(steps: float, cfg: t.Config, rt: t.Runtime) -> None:
    """Log the tokens of so many steps against the record's on 8 H100s."""
    record, pace, size = REFERENCE
    percent = 100 * (steps * cfg.train_batch_tokens / (record * size) - 1)
    rule = f", by a rule of thumb {-BPB_A_PERCENT * percent:+.4f} BPB" if percent > -50 else ""
    more = steps * cfg.train_batch_tokens / size - record
    rt.log(f"reference: 8 H100s ran {record} steps of {size:,} tokens, {pace} ms each; this is "
           f"{percent:+.1f}%, {more:+.0f} such steps{rule}")


def main(arguments: list[str], environ: Mapping[str, str] = os.environ) -> None:
    """`python train_gpt.py calibrate`: all figures, a line each."""
    t.require(not arguments, "usage: python train_gpt.py calibrate (settings: the environment)")
    began = time.perf_counter()
    cfg, rt = t.Config.from_env(environ, Path(t.__file__).parent), t.start_runtime(environ)
    attention = t.agree_on(t.choose_attention(rt.device, rt.dtype, cfg.attention), rt)
    name = t.torch.cuda.get_device_name() if rt.device.type == "cuda" else "CPU"
    rt.log(f"{rt.world} x {name}, {processors()} processors, torch {t.torch.__version__}, "
           f"attention {attention.reason}")
    model = t.make_model(cfg, rt, attention)
    budget = cfg.max_wallclock_seconds
    measured = t.reserve(model, replace(cfg, prequant_only=False, gptq_reserve_seconds=-1.0,
                                        max_wallclock_seconds=1e9), rt).gptq_reserve_seconds
    left = cfg.gptq_reserve_seconds if cfg.gptq_reserve_seconds >= 0 else measured
    with t.torch.no_grad():  # a product with the zeros of the start draws less power, and is faster
        for p in (p for p in model.parameters() if p.dim() == 3):
            p.normal_(0, p.shape[-1] ** -0.5, generator=rt.generator(0))
    with model.compiled(cfg.compile and rt.device.type == "cuda"):
        seconds = step_seconds(model, cfg, rt)
    steps, stages = cfg.force_stop_step or cfg.iterations, shares(cfg)
    if budget and not cfg.force_stop_step:
        steps = min(steps, int(forecast(stages, seconds, budget - left)))
        rt.log(f"expected: {steps} steps, {steps * cfg.train_batch_tokens:,} tokens in {budget:g} s"
               f" ({budget - left:.1f} s of steps)")
    else:
        total = sum(share * steps * seconds[stage] for stage, share in stages.items())
        rt.log(f"expected: {steps} steps, {steps * cfg.train_batch_tokens:,} tokens in {total:.0f} "
               "s, without a budget")
    if rt.device.type == "cuda" and cfg.model_dim == t.Config().model_dim:
        compare(steps, cfg, rt)
    slowest = seconds[t.train_shapes(cfg)[-1]] / cfg.train_batch_tokens  # a token
    plain = TARGETS * slowest / 3  # forward alone
    if cfg.ttt_enabled:
        rate = scoring_rate(model, cfg, rt)
        docs = t.phase_boundaries(cfg, TARGETS // MEAN)
        phases = sum(docs) * MEAN * slowest
        rt.log(f"test-time training: {rate:,.0f} targets/s; evaluation of {TARGETS:,} targets: "
               f"{plain + TARGETS / rate + phases:.0f} s (plain {plain:.0f}, adapters "
               f"{TARGETS / rate:.0f}, global phases {phases:.0f})")
    else:
        rt.log(f"evaluation of {TARGETS:,} targets: {plain:.0f} s")
    rt.log(f"calibrate took {time.perf_counter() - began:.0f} s")
    if rt.world > 1:
        t.dist.destroy_process_group()
