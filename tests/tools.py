"""What several test files share: a tiny configuration, synthetic shards, a model with no zeros."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train_gpt as t

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PROGRAM = ROOT / "train_gpt.py"

# Every part of the system at the smallest size that still shows it: a looped pair of layers, skips,
# two lanes at the end, windows shorter than documents, two global phases. The plain order is
# [0, 1 | 2, 3, 4], the looped one [0, 1, 2 | 1, 2, 3, 4].
TINY = {
    "PRESET": str(ROOT / "presets/pr1855.env"), "GPTQ_RESERVE_SECONDS": "-1",
    "VOCAB_SIZE": "64", "NUM_LAYERS": "5", "MODEL_DIM": "32", "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2", "MLP_MULT": "2", "ROPE_DIMS": "4", "XSA_LAST_N": "4",
    "LOOP_START": "1", "LOOP_END": "2", "NUM_LOOPS": "1", "PARALLEL_START_LAYER": "4",
    "TRAIN_BATCH_TOKENS": "512", "TRAIN_SEQ_LEN": "32", "VAL_BATCH_TOKENS": "1024",
    "EVAL_SEQ_LEN": "32", "ITERATIONS": "6", "MAX_WALLCLOCK_SECONDS": "0", "WARMUP_STEPS": "0",
    "TRAIN_LOG_EVERY": "2", "GPTQ_CALIBRATION_BATCHES": "2", "EMA_DECAY": "0.5",
    "COMPRESSOR": "brotli", "QUANTISER": "uniform",
    "TTT_LORA_RANK": "4", "TTT_LORA_ALPHA": "8", "TTT_LORA_LR": "0.01",
    "TTT_CHUNK_SIZE": "8", "TTT_BATCH_SIZE": "4", "TTT_EVAL_SEQ_LEN": "24",
    "PHASED_TTT_PREFIX_DOCS": "6", "PHASED_TTT_NUM_PHASES": "2", "GLOBAL_TTT_CHUNK_TOKENS": "64",
    "GLOBAL_TTT_BATCH_SEQS": "2", "TTT_STREAM": "0",
}
# The presets that this repository has; those that a user puts beside them are his own affair.
PRESETS = ("best", "cpu_demo", "pr1430_as_run", "pr1430_causal", "pr1787", "pr1855", "pr1934",
           "pr2014", "pr2060", "pr2118", "pr2118_as_run", "pr2140")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # two processes need two GPUs, or none
# What else of a preset does not fit that size: lists of lengths, groups of too many columns.
TINY_LISTS = {"TRAIN_SEQ_SCHEDULE": "8@0.1,16@0.7,32@1.0", "AWQ_LITE_GROUP_SIZE": "8",
              "TTT_SHORT_SCORE_FIRST_STEPS": "20:4,40:8", "SEQ_CHANGE_WARMUP_STEPS": "2"}
# Tokens after BOS: with TINY three full batches of documents, a short one, and two global phases.
VAL_LENGTHS = [3, 30, 1, 17, 40, 8, 9, 55, 16, 24, 33, 45, 50, 28]


def tiny(**changes) -> t.Config:
    """The tiny configuration; changes are fields of Config."""
    return replace(t.Config.from_env(TINY), **changes).checked()


def runtime() -> t.Runtime:
    """One process on the CPU."""
    return t.Runtime(0, 1, torch.device("cpu"))


def write_shard(path: Path, values, magic=t.SHARD_MAGIC, version=1, count=None) -> Path:
    """A shard file; magic, version and count can be made wrong."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(values) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(values).astype("<u2").tobytes())
    return path


def documents(lengths, vocab=64, seed=0) -> np.ndarray:
    """Token ids of documents with `lengths` tokens after their BOS: noisy counting, so that there
    is something to learn."""
    rng, parts = np.random.default_rng(seed), []
    for n in lengths:
        steps = rng.integers(1, 4, n)
        parts += [[t.BOS], 2 + (rng.integers(vocab) + np.cumsum(steps)) % (vocab - 2)]
    return np.concatenate(parts).astype(np.int64)


def byte_counts(ids, seed=0) -> np.ndarray:
    """Original bytes of each token: 1 to 5, and 0 for BOS."""
    return np.where(ids == t.BOS, 0, np.random.default_rng(seed).integers(1, 6, len(ids)))


def write_data(folder: Path, val_lengths=None, train_tokens=6000, vocab=64) -> Path:
    """A folder of shards: two for training, one for validation with its byte sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    train = documents([60] * (train_tokens // 60), vocab, seed=1)
    write_shard(folder / "fineweb_train_000000.bin", train[:4000])
    write_shard(folder / "fineweb_train_000001.bin", train[4000:])
    val = documents(val_lengths or VAL_LENGTHS, vocab, seed=2)
    write_shard(folder / "fineweb_val_000000.bin", val)
    write_shard(folder / "fineweb_val_bytes_000000.bin", byte_counts(val))
    return folder


def val_set(lengths, vocab=64, seed=3) -> t.ValSet:
    ids = documents(lengths, vocab, seed)
    return t.ValSet(ids, byte_counts(ids).astype(np.int32))


@torch.no_grad()
def busy_model(cfg: t.Config, seed=0, dtype=torch.float32, attend: Callable = t.attend_ref):
    """A model in which nothing is zero or one by accident, so that every part shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = t.GPT(cfg, attend, dtype).to(dtype)
    for p in model.parameters():
        scale = 0.5 * p.shape[-1] ** -0.5 if p.dim() == 3 and p.shape[-1] > 2 else 0.3
        p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def row_of(ids, longest=10**6) -> t.PackedBatch:
    """ids [T+1] as one packed row."""
    ids = np.asarray(ids, np.int64)
    return t.make_row(ids[:-1], ids[1:], longest, torch.device("cpu"))


def losses_of(model, ids, looped=True, longest=10**6) -> torch.Tensor:
    """Losses [T] of the targets of one packed row."""
    row = row_of(ids, longest)
    return model(row.ids, row.targets, row.segments, looped)[0]


def cosine_start(a: torch.Tensor) -> None:
    """A start of the adapters' A that depends on neither the batch nor a random state."""
    values = torch.arange(a.shape[-2] * a.shape[-1], dtype=torch.float64).cos()
    a.copy_((values.view(a.shape[-2:]) / a.shape[-1] ** 0.5).float())


class RecordingMeter(t.Meter):
    """A meter that also keeps what it was given."""

    def __init__(self):
        super().__init__(runtime())
        self.calls = []

    def add(self, losses, sizes, mask, place=None):
        self.calls.append((losses.detach().clone(), sizes.clone(), mask.clone()))
        super().add(losses, sizes, mask, place)


def said(log: Path) -> str:
    """What a log says that the console says, too: all but the program's source, the list of all
    settings and the last line."""
    lines = log.read_text().splitlines(keepends=True)
    alone = "source: ", "Hyperparameters:", "  ", "not the default: ", '{"result": '
    return "".join(line for line in lines if not line.startswith(alone))


def hear_ctrl_c() -> None:
    """In a child: a suite in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(settings: dict, cwd: Path, program: Path = PROGRAM, launcher=(), timeout=240,
           interrupt=""):
    """The program in a process of its own, with `settings` as its environment; Ctrl-C as soon as it
    prints a line with the text `interrupt`."""
    keep = {k: v for k, v in os.environ.items() if not t.is_ours(k) and k != "PRESET"}
    env = {**keep, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in settings.items()}}
    command = [sys.executable, *launcher, str(program)]
    if interrupt:
        with subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c) as run:
            next(line for line in run.stdout if interrupt in line)
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, run.returncode, out, err)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=timeout, check=False)
