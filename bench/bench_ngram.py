"""Time the n-gram tables: `python bench/bench_ngram.py [--tokens N] [--shard FILE] [--mixer]`, or
count the tilt's hints in several orders: `DATA_PATH=FOLDER python bench/bench_ngram.py --orders`.

Ids are the first N of a shard, or synthetic: Zipf-distributed over 8,192 with a few per cent copied
from earlier. Prints CPU seconds (other work on the machine does not stretch them), the wall clock
and the process's peak of memory, ids and imports included.

`--orders` builds the table over the validation set in the coding order, over the stream, and over
every document alone, and prints how many targets get a hint and how many hints come true.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t
import variants


def synthetic(n: int) -> np.ndarray:
    """n ids; every 4,000 or so a stretch of 20 to 200 of them comes again."""
    rng, share = np.random.default_rng(0), 1 / np.arange(1, 8191)
    ids = rng.choice(np.arange(2, 8192), n, p=share / share.sum())
    for _ in range(n // 4000):
        (a, b), length = rng.integers(0, n - 200, 2), rng.integers(20, 200)
        ids[b : b + length] = ids[a : a + length]
    return ids


def compare_orders() -> None:
    """Hints of the settings' validation set in the coding order, in the stream's, and without other
    documents."""
    cfg = t.Config.from_env(os.environ)
    val = t.load_val(cfg)
    schedule = t.make_schedule(val, cfg, 1)
    coded, documents = t.tilt_hints(schedule.stream(val.ids), cfg), sorted(schedule.documents())
    orders = {
        "coding order": np.concatenate([coded[doc.place:][:doc.targets] for doc in documents]),
        "stream": t.tilt_hints(val.ids, cfg),
        "own document": np.concatenate([t.tilt_hints(val.ids[doc.begin : doc.end], cfg)
                                        for doc in documents])}
    for name, hint in orders.items():
        given = hint >= 0
        print(f"{name}: {given.sum()} of {len(hint)} targets have a hint ({given.mean():.2%}), "
              f"{(hint == val.ids[1:])[given].mean():.2%} of them come true; "
              f"{(hint != orders['stream']).sum()} are not as over the stream")


def main() -> None:
    parser = argparse.ArgumentParser(description="time the n-gram tables of train_gpt.py")
    parser.add_argument("--tokens", type=int, default=47_853_344)
    parser.add_argument("--shard", type=Path)
    parser.add_argument("--mixer", action="store_true", help="the exact mixer, not the tilt")
    parser.add_argument("--orders", action="store_true", help="count hints of DATA_PATH")
    told = parser.parse_args()
    if told.orders:
        compare_orders()
        return
    if told.shard:
        ids = t.open_shard(told.shard)[: told.tokens].astype(np.int64)
    else:
        ids = synthetic(told.tokens)
    cfg = t.Config(ngram_tilt_enabled=not told.mixer, ngram_mixer="exact" if told.mixer else "")
    cpu, wall = time.process_time(), time.perf_counter()
    if told.mixer:
        print(f"mean {-variants.exact_mixer(ids, cfg).mean():.4f} nats a token from n-grams alone")
    else:
        hint = t.tilt_hints(ids, cfg)
        print(f"of the hints {(hint == ids[1:])[hint >= 0].mean():.4f} come true")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{len(ids)} ids: CPU {time.process_time() - cpu:.1f} s, wall "
          f"{time.perf_counter() - wall:.1f} s, peak {peak} MiB")


if __name__ == "__main__":
    main()
