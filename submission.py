"""Logs -> submission.json and a table: `python submission.py [--readme FILE] LOG [LOG ...]`.

Nothing enters submission.json that a log does not say; a figure that a log lacks is null.
Statistics are the mean and the sample standard deviation over the logs, one log a seed.
With --readme the table also goes between `<!-- results -->` and `<!-- /results -->` of FILE.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

# figure: (pattern of its line in a log, type)
FIGURES = {
    "seed": (r"^  seed: (\d+)", int),
    "program_sha256": (r"^program: \S+ sha256:(\w+)", str),
    "versions": (r"^(python \S+, torch \S+, numpy \S+)", str),
    "hardware": (r"^devices: (.+?), torch\.", str),
    "steps": (r"^training stopped: train_time: \d+ms step: (\d+)/", int),
    "train_time_ms": (r"^training stopped: train_time: (\d+)ms", int),
    "prequant_val_bpb": (r"^diagnostic pre-quantization .*val_bpb:(\S+)", float),
    "quantized_val_bpb": (r"^diagnostic quantized val_loss:\S+ val_bpb:(\S+)", float),
    "val_loss": (r"^quantized_ttt_phased val_loss:(\S+)", float),
    "val_bpb": (r"^quantized_ttt_phased val_loss:\S+ val_bpb:(\S+)", float),
    "compressor": (r"^Serialized model quantized\+(\w+):", str),
    "bytes_model": (r"^Serialized model quantized\+\w+: (\d+) bytes", int),
    "bytes_code": (r"^Code size: (\d+) bytes", int),
    "bytes_total": (r"^Total submission size quantized\+\w+: (\d+) bytes", int),
    "eval_time_ms": (r"^quantized_ttt_phased .*eval_time:(\d+)ms", int),
    "total_eval_time_s": (r"^total_eval_time:(\S+)s", float),
    "illegal": (r"^illegal: (.+)$", str),  # why the challenge would refuse this score; null: legal
}
STATISTICS = ("prequant_val_bpb", "quantized_val_bpb", "val_loss", "val_bpb", "bytes_total")
FREE = {"SEED", "RUN_ID", "ARTIFACT_DIR"}  # settings in which the logs of one submission may differ


class UserError(Exception):
    """A mistake that the user can mend: one line, exit code 2."""


def settings_of(text: str) -> dict[str, str] | None:
    """The settings that are not the default, less those in which logs may differ."""
    found = re.search(r"^not the default: (\{.*\})$", text, re.MULTILINE)
    if not found:
        return None
    return {name: value for name, value in json.loads(found[1]).items() if name not in FREE}


def read_log(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(figures, settings) of one log; UserError if it has neither."""
    if not path.is_file():
        raise UserError(f"{path}: no such log; run ./run_3seed.sh first")
    figures: dict[str, Any] = {"log": str(path)}
    try:
        text = path.read_text(encoding="utf-8")
        for name, (pattern, kind) in FIGURES.items():
            found = re.search(pattern, text, re.MULTILINE)
            figures[name] = kind(found.group(1)) if found else None
        settings = settings_of(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); run ./run_3seed.sh again") from None
    if figures["seed"] is None or settings is None:
        raise UserError(f"{path}: not a log of this train_gpt.py (no settings in it)")
    if len(re.findall(r"^program: ", text, re.MULTILINE)) != 1:
        raise UserError(f"{path}: two runs in one log; give every run a RUN_ID of its own")
    odd = [n for n, v in figures.items() if isinstance(v, float) and not math.isfinite(v)]
    if odd:
        raise UserError(f"{path}: {odd[0]} is {figures[odd[0]]}; leave this run out")
    return figures, settings


def build(paths: list[Path]) -> dict[str, Any]:
    """What goes into submission.json; UserError where the logs are not of one configuration."""
    read = [read_log(path) for path in paths]
    runs, first = [figures for figures, _ in read], read[0][1]
    for figures, settings in read[1:]:
        unlike = sorted(n for n in first.keys() | settings if first.get(n) != settings.get(n))
        same = ("program_sha256", "hardware", "versions")
        unlike += [name for name in same if figures[name] != runs[0][name]]
        if unlike:
            raise UserError(f"{figures['log']}: other {', '.join(unlike)} than "
                            f"{runs[0]['log']}; a submission is one configuration")
    if len({run["seed"] for run in runs}) < len(runs):
        raise UserError("two logs have the same seed; a submission counts every seed once")
    summary: dict[str, Any] = {"runs": len(runs)}
    for name in STATISTICS:
        values = [run[name] for run in runs if run[name] is not None]
        if len(values) == len(runs):
            summary[f"{name}_mean"] = statistics.mean(values)
            summary[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return {"summary": summary, "settings_not_default": first, "seeds": runs}


def table(submission: dict[str, Any]) -> str:
    """The runs as a small Markdown table, one row a seed and the mean."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = ["| seed | pre-quantisation BPB | quantised BPB | test-time-trained BPB | bytes "
            "| training s | evaluation s |", "|--:|--:|--:|--:|--:|--:|--:|"]
    for run in submission["seeds"]:
        seconds = None if run["train_time_ms"] is None else run["train_time_ms"] / 1000
        rows.append(f"| {run['seed']} | {cell(run['prequant_val_bpb'], '.5f')} | "
                    f"{cell(run['quantized_val_bpb'], '.5f')} | {cell(run['val_bpb'], '.5f')} | "
                    f"{cell(run['bytes_total'], ',')} | {cell(seconds, '.1f')} | "
                    f"{cell(run['total_eval_time_s'], '.1f')} |")
    s = submission["summary"]
    if s["runs"] > 1:
        means = (cell(s.get(f"{n}_mean"), ".5f") for n in STATISTICS[:2] + STATISTICS[3:4])
        spread = cell(s.get("val_bpb_std"), ".5f")
        rows.append(f"| mean | {' | '.join(means)} (std {spread}, n = {s['runs']}) | | | |")
    reasons = dict.fromkeys(run["illegal"] for run in submission["seeds"] if run.get("illegal"))
    rows += [f"\nIllegal: {reason}." for reason in reasons]
    return "\n".join(rows)


def write(path: Path, text: str) -> None:
    """Write aside, then rename: an old file stays whole."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def fill_readme(path: Path, rows: str) -> None:
    """Put the table between the two marks of a README; UserError where they are not there."""
    text = path.read_text()
    marks = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
    if not marks.search(text):
        raise UserError(f"{path}: the lines <!-- results --> and <!-- /results --> are missing")
    write(path, marks.sub(lambda found: f"{found[1]}{rows}\n{found[2]}", text))


def main() -> int:
    parser = argparse.ArgumentParser(description="logs of train_gpt.py -> submission.json, table")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--readme", type=Path, help="also put the table into this file")
    told = parser.parse_args()
    try:
        submission = build(told.logs)
        if told.readme:
            fill_readme(told.readme, table(submission))
        write(Path("submission.json"), json.dumps(submission, indent=1) + "\n")
        print(table(submission), flush=True)
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
