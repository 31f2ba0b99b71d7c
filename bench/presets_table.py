"""The table of bench/presets_full.sh: `python bench/presets_table.py FOLDER`, FOLDER/PRESET/.

Tokens/s: the mean up to the last line before the loop begins, and between the first and the last
line after it. Targets/s: of the evaluation that counts, on one GPU. The seconds on 8 GPUs are the
challenge's 47,853,343 targets at eight times that rate: what does not grow with the set, such as
the global phases and compiling, is counted as if it did.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import submission

TARGETS = 47_853_343
HEADER = ("| preset | tokens/s plain | looped | bytes | evaluation targets/s | s for all, 8 GPUs | "
          "peak MiB | off the fast path | status |\n|---|--:|--:|--:|--:|--:|--:|---|---|")
LINE = re.compile(r"^(\d+)/\d+ train_loss: .* tok/s: (\d+)\b.*$|^layer_loop:on ", re.MULTILINE)


def rates(text: str) -> tuple[float | None, float | None]:
    """Tokens a second of a log: plain, looped; None where too few lines tell."""
    found = re.search(r"^ *train_batch_tokens: (\d+)", text, re.MULTILINE)
    batch = int(found[1]) if found else 0
    phases: list[list[tuple[int, float]]] = [[], []]
    looped = False
    for line in LINE.finditer(text):
        if line[1] is None:
            looped = True
        elif int(line[2]):
            step = int(line[1])
            phases[looped].append((step, step * batch / int(line[2])))  # and its seconds
    plain, later = phases
    mean = plain[-1][0] * batch / plain[-1][1] if plain else None
    marks = later if len(later) > 1 else [*plain[-1:], *later]
    (first, begun), (last, ended) = (marks[0], marks[-1]) if marks else ((0, 0.0), (0, 0.0))
    return mean, (last - first) * batch / (ended - begun) if later and ended > begun else None


def last_words(folder: Path) -> str:
    """What a run that failed said last."""
    path = folder / "out.txt"
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1][:160].replace("|", "/") if lines else "nothing was said"


def number(value: Any, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def row(folder: Path) -> str:
    """One line of the table; a run that failed still shows what its log has."""
    status, log = (folder / "status"), folder / "log.txt"
    code = status.read_text().strip() if status.is_file() else "running"
    text = log.read_text(errors="replace") if log.is_file() else ""
    try:
        figures = submission.read_log(log)[0]
    except submission.UserError:
        figures = {}
    tokens, took = figures.get("val_tokens"), figures.get("eval_time_ms")
    rate = tokens * 1000 / took if tokens and took else None
    whole = TARGETS / (8 * rate) if rate else None
    slow = "; ".join(re.findall(r"^slow path: (.*)$", text, re.MULTILINE)) or "no"
    size = figures.get("bytes_total")
    notes = {"0": "ok", "124": "failed: LIMIT_EACH is over", "running": "under way",
             "skipped": "left out: no DATA_PATH_SP1024"}.get(
        code, f"failed ({code}): {last_words(folder)}")
    if size and size > submission.LIMIT_BYTES:
        notes += f"; over {submission.LIMIT_BYTES:,} bytes"
    if whole and whole > submission.LIMIT_SECONDS:
        notes += f"; over {submission.LIMIT_SECONDS:.0f} s"
    cells = [folder.name, *map(number, rates(text)), *map(number, (
        size, rate, whole, figures.get("peak_memory_mib"))), slow if text else "-", notes]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("error: one argument: the folder that bench/presets_full.sh wrote", file=sys.stderr)
        return 2
    folders = sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir())
    print("\n".join([HEADER, *map(row, folders)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
