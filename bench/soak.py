"""Soak: whole demo pipelines with random legal settings, without a failure, in steady memory.

    OMP_NUM_THREADS=1 python bench/soak.py --runs 200 --seed 0

Every pipeline trains, quantises, packs, reads back and scores a tiny model in this process. The
settings are drawn by hypothesis from a seed, so a failure is repeated by its number: --first N
--runs 1.
Prints one JSON line at the end: runs, failures, resident memory after 10 runs and at the end."""

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import train_gpt as t  # noqa: E402
from tests.tools import TINY, write_data  # noqa: E402

BITS = st.integers(2, 8)
SWITCH = st.sampled_from(["0", "1"])
# What may vary at random; TINY gives the rest. Combinations that contradict are drawn again.
DRAWN = {
    "NUM_LAYERS": st.integers(2, 6), "NUM_HEADS": st.sampled_from([2, 4]),
    "NUM_KV_HEADS": st.sampled_from([1, 2]), "MLP_MULT": st.sampled_from([1, 2, 3.5]),
    "ROPE_DIMS": st.sampled_from([0, 2, 4, 8]), "XSA_LAST_N": st.integers(0, 6),
    "NUM_LOOPS": st.integers(0, 2), "LOOP_START": st.integers(0, 2), "LOOP_END": st.integers(1, 3),
    "PARALLEL_START_LAYER": st.integers(0, 5),
    "PARALLEL_FINAL_LANE": st.sampled_from(["mean", "attn", "mlp"]),
    "ENABLE_LOOPING_AT": st.sampled_from([0, 0.35, 1]), "GATE_WINDOW": st.integers(1, 32),
    "SPARSE_ATTN_GATE_ENABLED": SWITCH, "SMEAR_GATE_ENABLED": SWITCH, "SKIP_GATES_ENABLED": SWITCH,
    "LN_SCALE": SWITCH, "LOGIT_SOFTCAP": st.sampled_from([5, 30]), "FUSED_CE_ENABLED": SWITCH,
    "ITERATIONS": st.integers(1, 4), "TRAIN_SEQ_LEN": st.sampled_from([8, 32, 64]),
    "WARMDOWN_FRAC": st.sampled_from([0, 0.5, 1]), "GRAD_CLIP_NORM": st.sampled_from([0, 0.3]),
    "EMA_DECAY": st.sampled_from([0, 0.5, 0.99]), "VAL_LOSS_EVERY": st.integers(0, 2),
    "MUON_ROW_NORMALIZE": SWITCH, "MUON_BACKEND_STEPS": st.integers(1, 5),
    "QUANTISER": st.sampled_from(["uniform", "tcq"]), "LEAKY_RELU_SLOPE": st.floats(0.1, 0.9),
    "NGRAM_TILT_ENABLED": SWITCH, "NGRAM_MIXER": st.sampled_from(["", "exact"]),
    "NGRAM_MIN_TOKENS": st.sampled_from([0, 100]), "GATED_XSA": SWITCH, "AWQ_LITE_ENABLED": SWITCH,
    "AWQ_LITE_GROUP_SIZE": st.just(8),
    "GPTQ_CALIBRATION_BATCHES": st.integers(1, 3), "MATRIX_BITS": BITS, "EMBED_BITS": BITS,
    "GATED_ATTN_QUANT_GATE": SWITCH, "LQER_ENABLED": SWITCH, "LQER_RANK": st.integers(1, 8),
    "LQER_TOP_K": st.integers(0, 4), "LQER_ASYM_ENABLED": SWITCH,
    "COMPRESSOR": st.sampled_from(["ans", "brotli", "lzma"]), "TTT_ENABLED": SWITCH,
    "TTT_LORA_RANK": st.integers(1, 6), "TTT_K_LORA": SWITCH, "TTT_MLP_LORA": SWITCH,
    "TTT_O_LORA": SWITCH, "TTT_WARM_START_A": SWITCH, "TTT_CHUNK_SIZE": st.integers(3, 24),
    "TTT_BATCH_SIZE": st.integers(1, 8), "TTT_STREAM": SWITCH,
    "PHASED_TTT_PREFIX_DOCS": st.integers(0, 14), "PHASED_TTT_NUM_PHASES": st.integers(1, 4),
    "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": SWITCH,
    "CHECKPOINT_EVERY_SECONDS": st.sampled_from([0, 0.01]), "SEED": st.integers(0, 2**32 - 1),
}


def draw(number: int, start: int) -> dict[str, str]:
    """Legal settings of run `number`: the same for the same start."""
    found = []

    @seed(1_000_003 * start + number)
    @settings(max_examples=40, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries(DRAWN))
    def one(values):
        given_ = {**TINY, **{name: str(value) for name, value in values.items()}}
        with contextlib.suppress(t.UserError):
            t.Config.from_env(given_)
            found.append(given_)

    one()
    if not found:
        return dict(TINY)
    return random.Random(number).choice(found[len(found) // 2:])  # late draws are less plain


def resident() -> int:
    """MiB of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after")
    told = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    failures, memory, started, done = [], [], time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        data = write_data(Path(place) / "data")
        for number in range(told.first, told.first + told.runs):
            if time.monotonic() - started > told.seconds:
                break
            given_ = draw(number, told.seed)
            with tempfile.TemporaryDirectory() as folder, \
                    contextlib.redirect_stdout(io.StringIO()):
                try:
                    t.run({**given_, "DATA_PATH": str(data), "ARTIFACT_DIR": folder,
                           "RUN_ID": "log"})
                    if '"complete": true' not in Path(folder, "log.txt").read_text():
                        raise RuntimeError("the log has no last line")
                except Exception:
                    failures.append(number)
                    traceback.print_exc()
                    print(f"run {number}: {json.dumps(given_)}", file=sys.stderr, flush=True)
            done += 1
            memory.append(resident())
    print(json.dumps({
        "runs": done, "failures": failures, "seconds": round(time.monotonic() - started, 1),
        "resident_mib_after_10": memory[min(9, len(memory) - 1)] if memory else None,
        "resident_mib_at_end": memory[-1] if memory else None, "resident_mib_most": max(memory)}))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
