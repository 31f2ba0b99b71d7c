"""What logs must bear out, one log and several together: rows of docs/legality.md. `build` and
`audit` (submission.py) ask the same questions here. A finding is one sentence.
"""

import hashlib
import math
import re
import statistics
from pathlib import Path
from typing import Any

from runlogs import (
    LIMIT_BYTES,
    LIMIT_SECONDS,
    PAIRS,
    RunLog,
    UserError,
    alike,
    defaults_of,
    figures_told,
    finite,
    json_line,
    load,
    source_of,
)

NEEDED = ("train_time_ms", "prequant_val_bpb", "quantized_val_bpb", "val_bpb", "bytes_total",
          "total_eval_time_s")  # the phases of a whole run
STATISTICS = ("prequant_val_bpb", "quantized_val_bpb", "val_loss", "val_bpb", "bytes_total")
FULL_BYTES = 151_074_309  # original bytes of the challenge's validation set


# ---- one log

def read_log(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(figures with `findings`, settings) of one log; UserError where it cannot be read."""
    log = load(path)
    told = figures_told(log.told)
    figures = {"log": str(path), **log.figures}
    found = [*check_one_run(log), *contradictions(figures, told)]
    figures.update(told)
    odd = [name for name, value in figures.items()
           if isinstance(value, int | float) and not finite(value)]
    found += [f"{name} is {figures[name]}: no figure; leave this run out" for name in odd]
    figures.update(dict.fromkeys(odd))
    figures["findings"] = found + check_run(figures, log.text, path)
    return figures, log.settings


def check_one_run(log: RunLog) -> list[str]:
    """A log in which several runs stand: of each figure it is unclear whose it is. And one that
    is cut in its last line."""
    def count(pattern: str) -> int:
        return len(re.findall(pattern, log.text, re.MULTILINE))

    begun = max(count(r"^program: "), count(r"^Hyperparameters:"))
    scored = max(count(rf"^{label} val_loss:") for label in (
        "quantized_ttt_phased", "quantized_ttt", "quantized_sliding_window"))
    if begun > 1 + count(r"^resumed: "):
        return ["two runs in one log; give every run a RUN_ID of its own"]
    found = ["two scores in one log; give every run a RUN_ID of its own"] if scored > 1 else []
    cut = count(r'^\{"result": ') and not log.told
    return [*found, "the last line, which holds the figures, is cut"] if cut else found


def contradictions(text: dict[str, Any], told: dict[str, Any]) -> list[str]:
    """Figures for which a log's text and its last line say different things."""
    found = []
    for name in sorted(text.keys() & told.keys()):
        a, b = text[name], told[name]
        same = a == b or finite(a) and finite(b) and (
            math.isclose(a, b, rel_tol=2e-8, abs_tol=0.051 if name.endswith("_s") else 1e-8))
        if a is not None and not same:
            found.append(f"{name}: the text says {a}, the last line {b}")
    return found


def check_run(run: dict[str, Any], text: str, path: Path) -> list[str]:
    """Everything wrong with one log, one sentence each."""
    missing = [name for name in NEEDED if run[name] is None]
    if run["program_sha256"] is None and run["eval_time_ms"] is not None:
        missing = [name for name in missing if name != "total_eval_time_s"]  # older logs lack it
    found = [f"missing: {', '.join(missing)}"] if missing else []
    return [*found, *check_budgets(run, text, path), *check_clock(text), *check_figures(run),
            *check_settings(run, text), *(f"legality: {line}" for line in run.get("legality", []))]


def check_budgets(run: dict[str, Any], text: str, path: Path) -> list[str]:
    """Time and size: training with calibration, evaluation with its start, shipped files."""
    found = []
    if run["train_time_ms"] is not None:
        trained, calibrated = run["train_time_ms"] / 1000, run["calibration_s"] or 0.0
        if trained + calibrated > LIMIT_SECONDS:
            found.append(f"training {trained:.1f} s and calibration {calibrated:.1f} s are over "
                         f"{LIMIT_SECONDS:.0f} s; raise GPTQ_RESERVE_SECONDS")
    evaluated = max(run["total_eval_time_s"] or 0.0, (run["eval_time_ms"] or 0) / 1000)
    evaluated += run.get("start_s") or 0.0
    if evaluated > LIMIT_SECONDS:
        found.append(f"evaluation {evaluated:.1f} s from the process's start is over "
                     f"{LIMIT_SECONDS:.0f} s")
    if hints_outside_timer(text):
        found.append("evaluation work outside the timer: n-gram hints")
    if (run["bytes_total"] or 0) > LIMIT_BYTES:
        found.append(f"{run['bytes_total']:,} bytes are over {LIMIT_BYTES:,}")
    parts = run["bytes_model"], run["bytes_code"]
    if None not in (*parts, run["bytes_total"]) and sum(parts) != run["bytes_total"]:
        found.append(f"bytes: model {parts[0]} + code {parts[1]} is not {run['bytes_total']}")
    for name, digest in (run.get("sha256") or {}).items():
        file = path.parent / Path(name).name
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            found.append(f"{file} is not the file that this log was written with")
    return found


def hints_outside_timer(text: str) -> bool:
    """Whether n-gram hints were computed before the evaluation's timer started. Where the line
    stands decides, or else the setting; the words of the line alone only where a log has neither
    (#2140 prints "outside" from inside)."""
    hints = re.search(r"^ngram_tilt:precompute\w*_done", text, re.MULTILINE)
    timer = re.search(r"^beginning TTT eval timer", text, re.MULTILINE)
    setting = re.search(r"^ *ngram_hint_precompute_outside: (\w+)", text, re.MULTILINE)
    if hints and timer:
        return hints.start() < timer.start()
    if setting:
        return bool(hints) and setting[1] not in ("0", "False")
    return bool(hints) and "outside_timer" in hints[0]


def check_clock(text: str) -> list[str]:
    """What went on in the clocks that should not, by the program's own account."""
    graphs = [int(n) for n in re.findall(r"^graphs recorded in the clock: (\d{1,9})\b", text,
                                         re.MULTILINE)]
    found = [f"graphs recorded in the clock: {max(graphs)}; every rank waited for each"] if (
        graphs and max(graphs)) else []
    late = re.search(r"^(?:warning: training and calibration took .*|.*took longer than reserved"
                     r".*)$", text, re.MULTILINE)
    return found + ([f"the program warns: {late[0][:200]}"] if late else [])


def check_figures(run: dict[str, Any]) -> list[str]:
    """val_bpb against val_loss, targets and bytes: bytes = targets loss / (bpb ln 2)."""
    found, tokens, size = [], run["val_tokens"], run.get("val_bytes")
    found += [f"{name} is {run[name]}: no figure" for pair in PAIRS for name in pair
              if run[name] is not None and run[name] <= 0]
    ratios = ratios_of(run)
    if len(ratios) > 1 and max(ratios.values()) / min(ratios.values()) - 1 > 2e-4:
        told = ", ".join(f"{name} {ratio:.6f}" for name, ratio in ratios.items())
        found.append(f"val_bpb/val_loss differs within the log: {told}")
    if tokens and "val_bpb" in ratios:
        implied = tokens / (ratios["val_bpb"] * math.log(2))
        want = size or run["data_bytes"] or (FULL_BYTES if tokens > 5_000_000 else None)
        if want and abs(implied / want - 1) > (1e-5 if size else 4e-3):
            found.append(f"val_loss, val_bpb and {tokens:,} targets imply {implied / 1e6:.2f}M "
                         f"bytes; the validation set has {want / 1e6:.2f}M: other bytes, or a "
                         "part of it")
    if size and run["data_bytes"] and abs(size / run["data_bytes"] - 1) > 4e-3:
        found.append(f"{size:,} bytes scored, the data has {run['data_bytes']:,}")
    return found


def ratios_of(run: dict[str, Any]) -> dict[str, float]:
    """BPB over loss of every stage that has both; 1e-9 apart from 0, so that it can divide."""
    return {bpb: run[bpb] / run[loss] for loss, bpb in PAIRS
            if (run[loss] or 0) > 1e-9 and (run[bpb] or 0) > 1e-9}


def check_settings(run: dict[str, Any], text: str) -> list[str]:
    """Settings that rule a record out, and settings that the log does not own up to."""
    found = []
    gates = re.search(r"within_gate=(\d{1,18}) word_gate=(\d{1,18})", text)
    if "ngram_target_gate: False" not in text and gates and (int(gates[1]) or int(gates[2])):
        found.append(f"illegal gates: within_gate={gates[1]} word_gate={gates[2]} look at the "
                     "target's class")
    if forced := re.search(r"^ *force_stop_step: ([1-9]\d*)", text, re.MULTILINE | re.IGNORECASE):
        found.append(f"FORCE_STOP_STEP={forced[1]}: the clock did not end training")
    if start := re.search(r"^ *init_from: *(\S.*)$", text, re.MULTILINE | re.IGNORECASE):
        found.append(f"INIT_FROM={start[1].strip()}: training began with weights of another run, "
                     "whose time is in no clock of this log")
    if re.search(r"^ *smear_gate_bos_fix: (0|False)", text, re.MULTILINE | re.IGNORECASE):
        found.append("SMEAR_GATE_BOS_FIX=0: SmearGate reads across documents")
    if run.get("illegal"):
        found.append(f"illegal: {run['illegal']}")
    if run.get("resumed"):
        found.append(f"resumed {run['resumed']} time(s): what was computed after a checkpoint and "
                     "lost is in no clock; for a record run without interruption")
    try:
        source = source_of(text)
    except UserError as error:
        return [*found, str(error)]
    if source:
        if hashlib.sha256(source.encode()).hexdigest() != run["program_sha256"]:
            found.append("the source in the log is not of the program hash in the log")
        defaults, told = defaults_of(source), json_line(text, "not the default")
        for name, value in re.findall(r"^  (\w+): (.*)$", text, re.MULTILINE):
            default = defaults.get(name, value)
            if not alike(str(told.get(name.upper(), default)), value):
                found.append(f"{name}: {value} ran, the program's default is {default}, and the "
                             f"log lists {told.get(name.upper(), 'nothing else')}")
    return found


# ---- several logs

def check_together(runs: list[tuple[dict[str, Any], dict[str, str]]]) -> list[str]:
    """Why these logs are not one submission: other settings, program or machine than the first
    log's, a seed that counts twice."""
    found, (first, base) = [], runs[0]
    for figures, settings in runs[1:]:
        unlike = sorted(n for n in base.keys() | settings if base.get(n) != settings.get(n))
        same = ("program_sha256", "hardware", "versions")
        unlike += [name for name in same if figures[name] != first[name]]
        if unlike:
            found.append(f"{figures['log']}: other {', '.join(unlike)} than {first['log']}; a "
                         "submission is one configuration")
    seeds = [figures["seed"] for figures, _ in runs]
    if len(set(seeds)) < len(seeds):
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        found.append(f"two logs have the same seed ({', '.join(map(str, twice))}); a submission "
                     "counts every seed once")
    return found


def drift(runs: list[dict[str, Any]]) -> list[str]:
    """Lines of one kind whose val_bpb/val_loss is another in some log: one validation set has one
    ratio, to the last digit that is printed."""
    found = []
    for loss, bpb in PAIRS:
        ratios = {run["log"]: ratios_of(run)[bpb] for run in runs if bpb in ratios_of(run)}
        middle = statistics.median(ratios.values()) if ratios else 0
        found += [f"{log}: {bpb}/{loss} is {ratio:.6f}, in the other logs {middle:.6f}"
                  for log, ratio in ratios.items() if abs(ratio / middle - 1) > 2e-5]
    return found


def build(paths: list[Path], draft: bool = False, program: Path | None = None) -> dict[str, Any]:
    """What goes into submission.json; UserError where the logs are not of one configuration or,
    unless it is a draft, where something in them is wrong."""
    read = [read_log(path) for path in paths]
    runs, first = [figures for figures, _ in read], read[0][1]
    if unlike := check_together(read):
        raise UserError(unlike[0])
    if program and hashlib.sha256(program.read_bytes()).hexdigest() != runs[0]["program_sha256"]:
        raise UserError(f"{runs[0]['log']}: written by another program than {program}; run "
                        "again, e.g. with ./run_3seed.sh --overwrite")
    summary: dict[str, Any] = {"runs": len(runs)}
    for name in STATISTICS:
        values = [run[name] for run in runs if run[name] is not None]
        if len(values) == len(runs):
            summary[f"{name}_mean"] = statistics.mean(values)
            summary[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    found = [f"{run['log']}: {line}" for run in runs for line in run["findings"]] + drift(runs)
    if len(runs) < 3:
        summary["note"] = f"{len(runs)} seed(s); a record needs 3"
    if found and not draft:
        more = f" (and {len(found) - 1} more; --draft lists all)" if len(found) > 1 else ""
        raise UserError(f"{found[0]}{more}")
    return {"summary": summary, "settings_not_default": first, "findings": found, "seeds": runs}


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
    presets = dict.fromkeys(run["preset"] for run in submission["seeds"] if run["preset"])
    rows += [f"\nPreset: {', '.join(presets)}."] if presets else []
    reasons = dict.fromkeys(run["illegal"] for run in submission["seeds"] if run.get("illegal"))
    rows += [f"\nIllegal: {reason}." for reason in reasons]
    return "\n".join(rows)
