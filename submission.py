"""Logs -> submission.json and a table: `python submission.py [options] LOG [LOG ...]`.

    --out FILE        where to write; default: submission.json in the folder that holds the logs
    --readme FILE     the table also goes between `<!-- results -->` and `<!-- /results -->` of FILE
    --preset FILE     the means also go into the `# Expected:` comment of this preset
    --baseline LOG..  (or a submission.json) compare: Welch's t-test and the 0.005-nats rule
    --program FILE    refuse logs that another program wrote
    --draft           write even where findings would refuse; they stay in submission.json
    --report FILE     plots of the logs as one HTML file, PNGs beside it
    --audit FILE      do the logs bear out this submission.json? A folder: the file and logs in it
    --scores FILE     check a file that an evaluation with SCORES_PATH wrote, and the LOG with it
    --source LOG      print the program that a log carries

Exit code 0: nothing found; 1: findings (--audit, --scores); 2: something could not be read, or the
logs are refused. Nothing enters submission.json that a log does not say; a figure that a log lacks
is null. Statistics are the mean and the sample standard deviation over the logs, one log a seed.
Reading logs is runlogs.py's affair, what they must bear out logchecks.py's.
"""

import argparse
import json
import os.path
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import claims
from baseline import compare, verdict
from logchecks import build, read_log, table
from runlogs import (
    FIGURES,
    FREE,
    LIMIT_BYTES,
    LIMIT_SECONDS,
    UserError,
    alike,
    defaults_of,
    parse_json,
    read_text,
    source_of,
)

__all__ = ["FIGURES", "FREE", "LIMIT_BYTES", "LIMIT_SECONDS", "UserError", "alike", "build",
           "compare", "defaults_of", "read_log", "source_of", "table",
           "verdict"]  # what others read from here


# ---- audit

def audit(claim: Path, logs: list[Path]) -> list[str]:
    """What a submission.json (ours or another's) says that its logs do not, and what is wrong with
    the logs."""
    return claims.audit_parts(claim, logs)[0][0]


def audit_lines(claim: Path, logs: list[Path]) -> tuple[list[str], int]:
    """(report, number of findings) for --audit."""
    (found, compared, unknown), runs = claims.audit_parts(claim, logs)
    values = [run["val_bpb"] for run in runs if run["val_bpb"] is not None]
    lines = [f"logs: {', '.join(str(log) for log in logs)}"]
    if len(values) > 1:
        lines += [f"val_bpb of the logs: mean {statistics.mean(values):.5f}, sample std "
                  f"{statistics.stdev(values):.5f} (divided by n: "
                  f"{statistics.pstdev(values):.5f}), n = {len(values)}"]
    lines += [f"compared: {'; '.join(compared)}"] if compared else []
    return [*lines, *(f"not compared: {line}" for line in unknown),
            *(f"finding: {line}" for line in found),
            f"{len(found)} finding(s) in {claim}"], len(found)


def logs_of(folder: Path) -> list[Path]:
    """The logs in a folder and one level below; other text files are left out."""
    marks = re.compile(r"^(?:Hyperparameters:|not the default: )", re.MULTILINE)
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern)
                   if path.suffix in (".log", ".txt") and path.is_file())
    return [path for path in files if marks.search(read_text(path))]


# ---- files

def write(path: Path, text: str) -> None:
    """Write aside, then rename: an old file stays whole."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def fill_readme(text: str, path: Path, rows: str) -> str:
    """A README's text with the table between its two marks; UserError where they are not there."""
    marks = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
    if not marks.search(text):
        raise UserError(f"{path}: the lines <!-- results --> and <!-- /results --> are missing")
    return marks.sub(lambda found: f"{found[1]}{rows}\n{found[2]}", text)


def fill_preset(text: str, path: Path, summary: dict[str, Any], steps: list[int]) -> str:
    """A preset's text with the means in its `# Expected:` comment, in the words that report.py
    looks for; UserError where it has no such comment, or the logs no such means."""
    comment = re.compile(r"^# Expected: .*(?:\n#  +.*)*", re.MULTILINE)
    names = ("prequant_val_bpb_mean", "quantized_val_bpb_mean", "val_bpb_mean", "bytes_total_mean")
    missing = [name for name in names if name not in summary]
    if missing or not steps:
        raise UserError(f"{path}: the logs give no {', '.join(missing) or 'steps'} to expect")
    if not comment.search(text):
        raise UserError(f"{path}: the comment # Expected: is missing")
    before, quantised, trained, size = (summary[name] for name in names)
    lines = (f"# Expected: {statistics.mean(steps):,.0f} steps, {size:,.0f} bytes, {before:.5f} "
             "BPB before quantisation,",
             f"#   {quantised:.5f} BPB quantised, {trained:.5f} BPB test-time trained (mean of "
             f"{summary['runs']} seeds).")
    return comment.sub(lambda _: "\n".join(lines), text, count=1)


def default_out(logs: list[Path]) -> Path:
    """submission.json in the folder that holds all logs. UserError where that would replace a file
    that this program did not write, or the one that belongs to this repository."""
    folders = [str(path.resolve().parent) for path in logs]
    path = Path(os.path.commonpath(folders)) / "submission.json"
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    if path.is_file():
        try:
            told = parse_json(read_text(path))
        except ValueError:
            told = None
        keys = {"summary", "settings_not_default", "seeds"}
        ours = isinstance(told, dict) and keys <= told.keys()
        if not ours or path.resolve().parent == Path(__file__).resolve().parent:
            raise UserError(f"{path} exists and is not replaced unasked; name a file with --out")
    return path


# ---- command line

def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="logs of train_gpt.py -> submission.json, table")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write submission.json; "
                        "default: the folder that holds the logs")
    parser.add_argument("--readme", type=Path, help="also put the table into this file")
    parser.add_argument("--preset", type=Path, metavar="ENV",
                        help="also put the means into the # Expected: comment of this preset")
    parser.add_argument("--baseline", type=Path, nargs="+", metavar="LOG",
                        help="a submission.json, or logs; where no LOG stands elsewhere, the first "
                        "is the baseline and the rest are the logs")
    parser.add_argument("--program", type=Path, help="the program that must have written the logs")
    parser.add_argument("--draft", action="store_true", help="findings do not refuse")
    parser.add_argument("--audit", type=Path, metavar="JSON", help="check this file on the logs, "
                        "or a folder that holds submission.json and logs")
    parser.add_argument("--report", type=Path, metavar="HTML", help="write plots")
    parser.add_argument("--scores", type=Path, metavar="NPZ", help="check a file of SCORES_PATH, "
                        "and compare it with a LOG")
    parser.add_argument("--source", type=Path, metavar="LOG", help="print the log's program")
    return parser


def sort_baseline(told: argparse.Namespace) -> None:
    """Logs that stand behind --baseline go where they belong: a submission.json stands alone, and
    where no log stands elsewhere only the first one is the baseline."""
    if told.baseline and (not told.logs or told.baseline[0].suffix == ".json"):
        told.logs += told.baseline[1:]
        told.baseline = told.baseline[:1]


def submit(told: argparse.Namespace) -> list[str]:
    """Build and write what was asked for; the lines to print."""
    out = told.out or default_out(told.logs)
    if told.report:
        import report  # first: without matplotlib nothing is written
    submission = build(told.logs, told.draft, told.program)
    if told.baseline:
        submission["comparison"] = compare(told.logs, told.baseline)
    rows = table(submission)
    files = [(out, json.dumps(submission, indent=1) + "\n")]
    if told.readme:
        text = told.readme.read_text(encoding="utf-8")
        files.append((told.readme, fill_readme(text, told.readme, rows)))
    if told.preset:
        steps = [run["steps"] for run in submission["seeds"] if run["steps"]]
        text = told.preset.read_text(encoding="utf-8")
        files.append((told.preset, fill_preset(text, told.preset, submission["summary"], steps)))
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in files:
        write(path, text)
    lines = [rows, *(f"finding: {line}" for line in submission["findings"])]
    if told.baseline:
        lines.append(verdict(submission["comparison"]))
    if told.report:
        report.write(told.logs, told.report, submission)
        files.append((told.report, ""))
    return [*lines, *(f"written: {path}" for path, _ in files)]


def run(parser: argparse.ArgumentParser, told: argparse.Namespace) -> tuple[list[str], int]:
    """(lines to print, exit code) of a command line."""
    if told.source:
        return [source_of(read_text(told.source)).removesuffix("\n")], 0
    if told.scores:
        import scores  # numpy is needed here alone

        lines, findings = scores.check_scores(told.scores, told.logs)
        return lines, int(findings > 0)
    if told.audit and told.audit.is_dir():
        told.logs = told.logs or logs_of(told.audit)
        if not told.logs:
            raise UserError(f"{told.audit}: no log in this folder")
        told.audit /= "submission.json"
    sort_baseline(told)
    if not told.logs:
        parser.error("the following arguments are required: LOG")
    if told.audit:
        lines, findings = audit_lines(told.audit, told.logs)
        return lines, int(findings > 0)
    return submit(told), 0


def printable(line: str) -> str:
    """Text of other people's files without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in line)


def main() -> int:
    parser = arguments()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    told = parser.parse_intermixed_args()
    try:
        lines, code = run(parser, told)
        for line in lines:
            print(line if told.source else printable(line), flush=True)
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; files are whole, the old ones or the new", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
