"""Time test-time training: `python bench/bench_ttt.py [--docs N] [--modes A,B] [--compare ...]`.

Settings are the program's environment variables. The weights are those of the artifact in
ARTIFACT_DIR and the documents the first N of DATA_PATH where there is an artifact; else weights are
random and documents synthetic, of log-normal length, about 950 tokens in the mean as in FineWeb.

Modes: `before` (every window whole, gradients of the base weights computed and thrown away),
`whole` (the same without those), `streamed` (TTT_STREAM=1); with `+graphs` recorded and replayed as
CUDA graphs (COMPILE=1, what the program does), else kernels are launched one by one. A mode
warms up on the shortest batch (with graphs twice on all, recording included) and then runs over all
REPEATS times (default 3); figures are the median and the range. The split into forward, backward
and optimiser is between marks in the device's queue; host is the rest of the wall clock (plans,
copies). Graphs are not split.

`--compare` scores the documents with global phases, whole and streamed, and prints BPB, seconds and
this process's CPU seconds (which other work on the machine does not stretch), one line for each of
`--chunks 24,48`, `--lrs 1e-4,2e-4` and `--modes whole,streamed`.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t
from calibrate import document_lengths

REPEATS = int(os.environ.pop("REPEATS", 3))


def synthetic_val(cfg: t.Config, documents: int, seed: int = 0) -> t.ValSet:
    """Random ids in documents of log-normal length."""
    rng = np.random.default_rng(seed)
    lengths = document_lengths(documents, seed)
    ids = rng.integers(2, cfg.vocab_size, lengths.sum())
    ids[np.cumsum(lengths) - lengths] = t.BOS
    return t.ValSet(ids, np.where(ids == t.BOS, 0, 4).astype(np.int32))


def first_documents(val: t.ValSet, documents: int) -> t.ValSet:
    """The front of a validation set, the BOS that follows included."""
    spans = val.documents()[:documents]
    return t.ValSet(val.ids[: spans[-1][1]], val.bytes[: spans[-1][1]])


@torch.no_grad()
def load(cfg: t.Config, rt: t.Runtime, documents: int) -> tuple[t.GPT, t.ValSet, str]:
    """Model, validation set, and in words where both come from."""
    model = t.make_model(cfg, rt, t.choose_attention(rt.device, rt.dtype, cfg.attention))
    path = Path(cfg.artifact_dir or ".") / t.ARTIFACT_FILE
    if path.is_file():
        arrays, _ = t.decode_artifact(path.read_bytes(), str(path))
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
        model.load_state_dict(t.dequantise(tensors, model))
        return model, first_documents(t.load_val(cfg), documents), str(path)
    for p in model.parameters():  # nothing zero: zeros compute faster
        p.add_(0.02 * torch.randn(p.shape, generator=rt.generator(1), device=rt.device))
    return model, synthetic_val(cfg, documents), "random weights, synthetic documents"


class Marks:
    """Seconds between marks set around the adapter's three parts, read after the device is done."""

    def __init__(self, rt: t.Runtime):
        self.rt, self.pairs = rt, {"forward": [], "backward": [], "optimiser": []}

    def mark(self):
        if self.rt.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, name: str, work):
        def marked(*args):
            begin = self.mark()
            result = work(*args)
            self.pairs[name].append((begin, self.mark()))
            return result
        return marked

    def seconds(self) -> dict[str, float]:
        """By part, and forgets."""
        self.rt.seconds()
        timed = self.rt.device.type == "cuda"
        sums = {name: sum(a.elapsed_time(b) / 1000 if timed else b - a for a, b in pairs)
                for name, pairs in self.pairs.items()}
        self.pairs = {name: [] for name in self.pairs}
        return sums


def mode_settings(cfg: t.Config, mode: str) -> t.Config:
    return replace(cfg, ttt_stream=mode.startswith("streamed"), compile=mode.endswith("+graphs"))


def bench(mode: str, model: t.GPT, val: t.ValSet, cfg: t.Config, rt: t.Runtime) -> None:
    """One mode over all batches, without global phases; prints a line."""
    cfg = mode_settings(cfg, mode)
    batches = t.document_batches([t.Document(*d) for d in val.documents()], cfg.ttt_batch_size)
    batches = [b for b in batches if len(b) == len(batches[0])]  # one set of adapters for all
    make = t.StreamingLoraTTT if cfg.ttt_stream else t.LoraTTT
    adapter = make(model, cfg, rt, len(batches[0]), t.uniform_start(rt.generator(cfg.seed)))
    start = {k: v.detach().clone() for k, v in adapter.lora.A.items()}
    marks, meter = Marks(rt), t.Meter(rt)
    if not cfg.compile:
        adapter.losses = marks.around("forward", adapter.losses)
        adapter.learn = marks.around("backward", adapter.learn)
        adapter.step = marks.around("optimiser", adapter.step)

    def once(chosen) -> tuple[float, t.Score]:
        began = rt.seconds()
        for x in (meter.nats, meter.tokens, meter.bytes):
            x.zero_()
        with torch.no_grad():
            for name, a in adapter.lora.A.items():
                a.copy_(start[name])
        for batch in reversed(chosen):
            adapter.reset()
            with contextlib.nullcontext() if mode == "before" else t.frozen(model):
                t.score_batch(adapter, batch, val, meter, lambda count: None)
            for p in model.parameters():
                p.grad = None
        return rt.seconds() - began, meter.result()

    chosen = [batches, batches] if cfg.compile else [batches[:1]]
    first = ", ".join(f"{once(some)[0]:.2f}" for some in chosen)
    print(f"{mode:15} warm-up {first} s")
    marks.seconds()
    runs, parts = [], []
    for _ in range(REPEATS):
        runs.append(once(batches))
        parts.append(marks.seconds())
    walls, score = [wall for wall, _ in runs], runs[0][1]
    middle = statistics.median(walls)
    split = ", ".join(f"{name} {statistics.median(p[name] for p in parts):.2f}"
                      for name in parts[0] if parts[0][name])
    rest = statistics.median(w - sum(p.values()) for w, p in zip(walls, parts, strict=True))
    print(f"{mode:15} {score.tokens} targets in {middle:.2f} s ({min(walls):.2f} to "
          f"{max(walls):.2f}, n = {len(walls)}): {score.tokens / middle:,.0f} targets/s"
          f"{f'; {split}, host {rest:.2f} s' if split else ''}; loss {score.loss:.6f}", flush=True)
    if rt.device.type == "cuda":
        print(f"{mode:15} peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        torch.cuda.reset_peak_memory_stats()


def compare(modes: list[str], model: t.GPT, val: t.ValSet, cfg: t.Config, rt: t.Runtime,
            chunks: list[int], rates: list[float]) -> None:
    """BPB against seconds, whole and streamed, over chunk sizes and learning rates."""
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    print("| mode | chunk | learning rate | BPB | seconds | CPU seconds |\n" + "|---|" + "--:|" * 5)
    for chunk in chunks:
        for rate in rates:
            for mode in modes:
                settings = replace(cfg, ttt_chunk_size=chunk, ttt_lora_lr=rate,
                                   ttt_stream=mode == "streamed")
                model.load_state_dict(weights)
                began, busy = rt.seconds(), time.process_time()
                adjustment = t.make_adjustment(settings.checked(), rt, model, val)
                if adjustment:
                    adjustment.wait()
                score = t.score_phased(model, val, settings, rt, adjustment=adjustment)
                print(f"| {mode} | {chunk} | {rate:g} | "
                      f"{score.bpb:.5f} | {rt.seconds() - began:.1f} | "
                      f"{time.process_time() - busy:.1f} |", flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--docs", type=int, default=128 if cuda else 16)
    modes = "before,whole,streamed" + ",whole+graphs,streamed+graphs" * cuda
    options.add_argument("--modes", default=modes)
    options.add_argument("--compare", action="store_true")
    options.add_argument("--chunks", default="")
    options.add_argument("--lrs", default="")
    given = options.parse_args()
    cfg = t.Config.from_env(os.environ, Path(__file__).resolve().parents[1])
    rt = t.start_runtime({})
    rt.log = lambda text: None  # the program's own lines
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}, python {sys.version.split()[0]}, torch {torch.__version__}, {rt.dtype}")
    model, val, source = load(cfg, rt, given.docs)
    print(f"{source}; {len(val.documents())} documents, {len(val.ids) - 1} targets, batches of "
          f"{cfg.ttt_batch_size}, chunks of {cfg.ttt_chunk_size}, context {cfg.ttt_eval_seq_len}")
    if given.compare:
        chunks = [int(x) for x in given.chunks.split(",") if x] or [cfg.ttt_chunk_size]
        rates = [float(x) for x in given.lrs.split(",") if x] or [cfg.ttt_lora_lr]
        modes = [mode for mode in ("whole", "streamed") if mode in given.modes.split(",")]
        compare(modes, model, val, cfg, rt, chunks, rates)
    else:
        for mode in given.modes.split(","):
            bench(mode, model, val, cfg, rt)


if __name__ == "__main__":
    main()
