"""The table of bench/ablate.sh: `python bench/ablate_table.py FOLDER`, FOLDER/TECHNIQUE/seedN/.

Deltas are paired: a technique's figure less the base's of the same seed; their mean and standard
error over the seeds. "pays" is said of 3 seeds or more and a mean that is two standard errors below
zero. Seconds are of training and of the whole evaluation, bytes of artifact and program.
"""

import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import submission

HEADER = ("| technique | delta BPB | standard error | n | training s | evaluation s | bytes | |\n"
          "|---|--:|--:|--:|--:|--:|--:|---|")


def figures(folder: Path) -> dict[str, float] | None:
    """BPB, seconds and bytes of one run; None before it has a score."""
    path = folder / "log.txt"
    if not path.is_file():
        return None
    found, _ = submission.read_log(path)
    if found["total_eval_time_s"] is None:
        return None
    trained = folder / "train.txt"
    took = re.search(submission.FIGURES["train_time_ms"][0], trained.read_text() if
                     trained.is_file() else "", re.MULTILINE)
    return {"bpb": found["val_bpb"], "train": int(took[1]) / 1000 if took else None,
            "eval": found["total_eval_time_s"], "bytes": found["bytes_total"]}


def mean(values: list) -> float | None:
    """Of what is there; None where a run lacks the figure."""
    return statistics.mean(values) if values and None not in values else None


def row(name: str, runs: dict[str, dict], base: dict[str, dict]) -> tuple[float, str]:
    """(mean delta, one line of the table) of the seeds that both have."""
    seeds = sorted(runs.keys() & base.keys())
    deltas = [runs[seed]["bpb"] - base[seed]["bpb"] for seed in seeds]
    n, delta = len(seeds), statistics.mean(deltas)
    error = statistics.stdev(deltas) / math.sqrt(n) if n > 1 else None
    train, evaluation, size = (mean([runs[seed][key] for seed in seeds])
                               for key in ("train", "eval", "bytes"))
    before = mean([base[seed]["bytes"] for seed in seeds])
    more = "-" if size is None or before is None else f"{size - before:+,.0f}"
    verdict = "one seed says nothing" if error is None else "not shown"
    if error is not None and delta < -2 * error and n >= 3:
        verdict = "pays"
    elif error is not None and delta > 2 * error and n >= 3:
        verdict = "costs"
    spread = "-" if error is None else f"{error:.5f}"
    seconds = "-" if train is None else f"{train:.0f}"
    return delta, (f"| {name} | {delta:+.5f} | {spread} | {n} | {seconds} | {evaluation:.0f} | "
                   f"{more} | {verdict} |")


def table(out: Path) -> str:
    """The base, then the techniques, the one that gains most first."""
    found = {}
    for folder in sorted(out.glob("*/seed*")):
        run = figures(folder)
        if run:
            found.setdefault(folder.parent.name, {})[folder.name] = run
    if "base" not in found:
        raise submission.UserError(f"{out}: no base with a score; run bench/ablate.sh first")
    base = found.pop("base")
    size, level, train, evaluation = (mean([run[key] for run in base.values()])
                                      for key in ("bytes", "bpb", "train", "eval"))
    first = (f"| base: {level:.5f} BPB | | | {len(base)} | {train or 0:.0f} | {evaluation:.0f} | "
             f"{size or 0:,.0f} | |")
    rows = sorted(row(name, runs, base) for name, runs in found.items()
                  if runs.keys() & base.keys())
    return "\n".join([HEADER, first, *(text for _, text in rows)])


def main() -> int:
    try:
        if len(sys.argv) != 2:
            raise submission.UserError("one argument: the folder that bench/ablate.sh wrote")
        print(table(Path(sys.argv[1])))
    except submission.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
