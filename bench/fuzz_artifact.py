"""Damage artifacts in every way the tests know and read them: `python bench/fuzz_artifact.py [N]`.

N (20,000) files for each of three ways of packing a small random model: bytes changed, cut out,
doubled or moved; directories rewritten with good hashes; noise in streams whose hashes are made
good; streams in another order; noise. Each must give the right tensors or one line; a crash,
another exception, wrong tensors or 30 s for one file end the run. Prints how many were right, the
time, and the growth of the peak of memory.
"""

import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.test_09_artifact import fuzz  # noqa: E402


def peak() -> int:
    """MiB of memory at the peak of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    count = int(sys.argv[1]) if sys.argv[1:] else 20_000
    for compressor, quantiser in (("ans", "tcq"), ("ans", "uniform"), ("brotli", "tcq")):
        fuzz(compressor, quantiser, 50, seed=1)  # compiles
        before, started = peak(), time.perf_counter()
        right = fuzz(compressor, quantiser, count, seed=2)
        print(f"{compressor} {quantiser}: {count} files, {right} right, {count - right} refused, "
              f"{time.perf_counter() - started:.0f} s, peak of memory +{peak() - before} MiB",
              flush=True)


if __name__ == "__main__":
    main()
