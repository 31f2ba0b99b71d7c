"""Logs -> submission.json and a table: `python submission.py [options] LOG [LOG ...]`.

    --readme FILE     the table also goes between `<!-- results -->` and `<!-- /results -->` of FILE
    --baseline LOG..  (or a submission.json) compare: Welch's t-test and the 0.005-nats rule
    --program FILE    refuse logs that another program wrote
    --draft           write even where findings would refuse; they stay in submission.json
    --audit FILE      do the logs bear out this submission.json? Exit code 1 where they do not
    --report FILE     plots of the logs as one HTML file, PNGs beside it
    --source LOG      print the program that a log carries

Nothing enters submission.json that a log does not say; a figure that a log lacks is null. The JSON
line at a log's end is trusted over its text. Statistics are the mean and the sample standard
deviation over the logs, one log a seed. Logs of #1855 and its lineage are read, too.
"""

import argparse
import base64
import hashlib
import json
import lzma
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

# figure: (pattern of its line in a log, type); of several lines the last counts
FIGURES = {
    "seed": (r"^ *seed: (\d+)", int),
    "program_sha256": (r"^program: \S+ sha256:(\w+)", str),
    "versions": (r"^(python \S+, torch \S+, numpy \S+)", str),
    "hardware": (r"^devices: (.+?), torch\.", str),
    "steps": (r"^(?:training stopped|stopping_early)\b.*train_time: ?\d+ms step: (\d+)/", int),
    "train_time_ms": (r"^(?:training stopped|stopping_early)\b.*train_time: ?(\d+)ms", int),
    "calibration_s": (r"^(?:calibration: \d+ batches|GPTQ:collected \d+ Hessians in) ([\d.]+)s",
                      float),
    "prequant_val_loss": (r"^diagnostic pre-quantization .*val_loss:(\S+)", float),
    "prequant_val_bpb": (r"^diagnostic pre-quantization .*val_bpb:(\S+)", float),
    "quantized_val_loss": (r"^diagnostic quantized val_loss:(\S+)", float),
    "quantized_val_bpb": (r"^diagnostic quantized val_loss:\S+ val_bpb:(\S+)", float),
    "val_loss": (r"^quantized_ttt_phased val_loss:(\S+)", float),
    "val_bpb": (r"^quantized_ttt_phased val_loss:\S+ val_bpb:(\S+)", float),
    "compressor": (r"^Serialized model quantized\+(\w+):", str),
    "bytes_model": (r"^Serialized model quantized\+\w+: (\d+) bytes", int),
    "bytes_code": (r"^Code size: (\d+) bytes", int),
    "bytes_total": (r"^Total submission size quantized\+\w+: (\d+) bytes", int),
    "eval_time_ms": (r"^quantized_ttt_phased .*eval_time:(\d+)ms", int),
    "total_eval_time_s": (r"^total_eval_time:(\S+)s", float),
    "val_tokens": (r"^(?:train_tokens: \d+ )?val_tokens: (\d+)", int),
    "data_bytes": (r'^data: .*"val": \{[^}]*"original_bytes": (\d+)', int),
    "illegal": (r"^illegal: (.+)$", str),  # why the challenge would refuse this score; null: legal
}
NEEDED = ("train_time_ms", "prequant_val_bpb", "quantized_val_bpb", "val_bpb", "bytes_total",
          "total_eval_time_s")  # the phases of a whole run
STATISTICS = ("prequant_val_bpb", "quantized_val_bpb", "val_loss", "val_bpb", "bytes_total")
PAIRS = (("prequant_val_loss", "prequant_val_bpb"), ("quantized_val_loss", "quantized_val_bpb"),
         ("val_loss", "val_bpb"))
# settings in which the logs of one submission may differ: train_gpt.NOT_OF_A_RUN, the seed, places
FREE = {"SEED", "RUN_ID", "ARTIFACT_DIR", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "LOGFILE",
        "CHECKPOINT_EVERY_SECONDS", "LEGALITY_CHECK"}
# of training with calibration, and of evaluation from the process's start; of artifact and program
LIMIT_SECONDS, LIMIT_BYTES = 600.0, 16_000_000
FULL_BYTES = 151_074_309  # original bytes of the challenge's validation set
RULE_NATS, RULE_P = 0.005, 0.01


class UserError(Exception):
    """A mistake that the user can mend: one line, exit code 2."""


def settings_of(text: str) -> dict[str, str] | None:
    """The settings in which logs must agree: those that are not the default or, in a log of
    #1855's lineage, all."""
    found = re.search(r"^not the default: (\{.*\})$", text, re.MULTILINE)
    if found:
        given = json.loads(found[1])
    else:
        block = re.search(r"^Hyperparameters:\n((?: +\w+: .*\n)+)", text, re.MULTILINE)
        given = block and {name.upper(): value for name, value in
                           re.findall(r"^ +(\w+): (.*)$", block[1], re.MULTILINE)}
    own = FREE | {"TRAIN_FILES", "VAL_FILES", "VAL_BYTES_FILES", "DATASETS_DIR", "MODEL_PATH",
                  "QUANTIZED_MODEL_PATH", "RANK", "LOCAL_RANK", "IS_MAIN_PROCESS"}
    return given and {name: value for name, value in given.items() if name not in own}


def last_line(text: str) -> dict[str, Any]:
    """The figures of the JSON line at the end of a log, {} where there is none."""
    if not (found := re.findall(r'^(\{"result": .*\})$', text, re.MULTILINE)):
        return {}
    told = json.loads(found[-1])["result"]
    scores = {"prequant": told.get("diagnostic pre-quantization post-ema"),
              "quantized": told.get("diagnostic quantized"), "": told.get("quantized_ttt_phased")}
    figures = {f"{stage}{'_' * bool(stage)}val_{key}": score[key]
               for stage, score in scores.items() if score for key in ("loss", "bpb")}
    if scored := next((s for s in reversed(scores.values()) if s), None):
        figures.update(val_tokens=scored["tokens"], val_bytes=scored["bytes"])
    sizes = told.get("bytes", {})
    figures.update({f"bytes_{key}": sizes[key] for key in ("model", "code", "total") if sizes})
    training = told.get("training", {})
    figures.update(
        steps=training.get("steps"), calibration_s=told.get("calibration_seconds"),
        train_time_ms=training and round(1000 * training["seconds"]),
        total_eval_time_s=told.get("evaluation_seconds"), start_s=told.get("start_seconds"),
        peak_memory_mib=told.get("peak_memory_mib"), resumed=told.get("resumed"),
        sha256=sizes.get("sha256"), legality=told.get("legality"))
    figures.update({key: told[key] for key in ("seed", "program_sha256", "versions", "hardware")
                    if key in told})
    return {name: value for name, value in figures.items() if value not in (None, {})}


def read_log(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(figures, settings) of one log; UserError if it has neither."""
    if not path.is_file():
        raise UserError(f"{path}: no such log; run ./run_3seed.sh first")
    figures: dict[str, Any] = {"log": str(path)}
    try:
        text = path.read_text(encoding="utf-8")
        for name, (pattern, kind) in FIGURES.items():
            found = re.findall(pattern, text, re.MULTILINE)
            figures[name] = kind(found[-1]) if found else None
        settings, told = settings_of(text), last_line(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: unreadable ({error}); run ./run_3seed.sh again") from None
    if figures["seed"] is None or settings is None:
        raise UserError(f"{path}: not a log of this train_gpt.py (no settings in it)")
    begun = len(re.findall(r"^program: ", text, re.MULTILINE))
    if begun > 1 + len(re.findall(r"^resumed: ", text, re.MULTILINE)):
        raise UserError(f"{path}: two runs in one log; give every run a RUN_ID of its own")
    odd = [n for n, v in figures.items() if isinstance(v, float) and not math.isfinite(v)]
    if odd:
        raise UserError(f"{path}: {odd[0]} is {figures[odd[0]]}; leave this run out")
    findings = contradictions(figures, told)
    figures.update(told)
    figures["findings"] = findings + check_run(figures, text, path)
    return figures, settings


def contradictions(text: dict[str, Any], told: dict[str, Any]) -> list[str]:
    """Figures for which a log's text and its last line say different things."""
    found = []
    for name in sorted(text.keys() & told.keys()):
        a, b = text[name], told[name]
        same = a == b or isinstance(a, int | float) and isinstance(b, int | float) and (
            math.isclose(a, b, rel_tol=2e-8, abs_tol=0.051 if name.endswith("_s") else 1e-8))
        if a is not None and not same:
            found.append(f"{name}: the text says {a}, the last line {b}")
    return found


# ---- what a log must bear out (rows of docs/legality.md)

def check_run(run: dict[str, Any], text: str, path: Path) -> list[str]:
    """Everything wrong with one log, one sentence each."""
    missing = [name for name in NEEDED if run[name] is None]
    found = [f"missing: {', '.join(missing)}"] if missing else []
    return [*found, *check_budgets(run, text, path), *check_figures(run),
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
    evaluated += run.get("start_s", 0.0)
    if evaluated > LIMIT_SECONDS:
        found.append(f"evaluation {evaluated:.1f} s from the process's start is over "
                     f"{LIMIT_SECONDS:.0f} s")
    if "precompute_outside_timer" in text:
        found.append("evaluation work outside the timer: n-gram hints")
    if (run["bytes_total"] or 0) > LIMIT_BYTES:
        found.append(f"{run['bytes_total']:,} bytes are over {LIMIT_BYTES:,}")
    parts = run["bytes_model"], run["bytes_code"]
    if None not in (*parts, run["bytes_total"]) and sum(parts) != run["bytes_total"]:
        found.append(f"bytes: model {parts[0]} + code {parts[1]} is not {run['bytes_total']}")
    for name, digest in run.get("sha256", {}).items():
        file = path.parent / name
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            found.append(f"{file} is not the file that this log was written with")
    return found


def check_figures(run: dict[str, Any]) -> list[str]:
    """val_bpb against val_loss, targets and bytes: bytes = targets loss / (bpb ln 2)."""
    found, tokens, size = [], run["val_tokens"], run.get("val_bytes")
    ratios = {bpb: run[bpb] / run[loss] for loss, bpb in PAIRS if run[loss] and run[bpb]}
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


def check_settings(run: dict[str, Any], text: str) -> list[str]:
    """Settings that rule a record out, and settings that the log does not own up to."""
    found = []
    gates = re.search(r"within_gate=(\d+) word_gate=(\d+)", text)
    if "ngram_target_gate: False" not in text and gates and (int(gates[1]) or int(gates[2])):
        found.append(f"illegal gates: within_gate={gates[1]} word_gate={gates[2]} look at the "
                     "target's class")
    if forced := re.search(r"^ *force_stop_step: ([1-9]\d*)", text, re.MULTILINE | re.IGNORECASE):
        found.append(f"FORCE_STOP_STEP={forced[1]}: the clock did not end training")
    if re.search(r"^ *smear_gate_bos_fix: (0|False)", text, re.MULTILINE | re.IGNORECASE):
        found.append("SMEAR_GATE_BOS_FIX=0: SmearGate reads across documents")
    if run.get("illegal"):
        found.append(f"illegal: {run['illegal']}")
    if run.get("resumed"):
        found.append(f"resumed {run['resumed']} time(s): what was computed after a checkpoint and "
                     "lost is in no clock; for a record run without interruption")
    if source := source_of(text):
        if hashlib.sha256(source.encode()).hexdigest() != run["program_sha256"]:
            found.append("the source in the log is not of the program hash in the log")
        defaults = defaults_of(source)
        listed = re.search(r"^not the default: (\{.*\})$", text, re.MULTILINE)
        told = json.loads(listed[1]) if listed else {}
        for name, value in re.findall(r"^  (\w+): (.*)$", text, re.MULTILINE):
            default = defaults.get(name, value)
            if not alike(told.get(name.upper(), default), value):
                found.append(f"{name}: {value} ran, the program's default is {default}, and the "
                             f"log lists {told.get(name.upper(), 'nothing else')}")
    return found


def defaults_of(source: str) -> dict[str, str]:
    """Setting -> default, as text, read off a program's source."""
    found = re.findall(r"^    (\w+): \w+ = setting\((\"[^\"]*\"|[^,]+),", source, re.MULTILINE)
    return {name: text.strip('"') for name, text in found}


def alike(a: str, b: str) -> bool:
    """Whether two texts of a value are the same number, switch or text."""
    a, b = ({"True": "1", "False": "0"}.get(x, x) for x in (a, b))
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def source_of(text: str) -> str:
    """The program that a log carries, empty where it carries none."""
    found = re.search(r"^source: (\S+)$", text, re.MULTILINE)
    if not found:
        return ""
    return lzma.decompress(base64.b85decode(found[1])).decode()


# ---- several logs

def build(paths: list[Path], draft: bool = False, program: Path | None = None) -> dict[str, Any]:
    """What goes into submission.json; UserError where the logs are not of one configuration or,
    unless it is a draft, where something in them is wrong."""
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
    if program and hashlib.sha256(program.read_bytes()).hexdigest() != runs[0]["program_sha256"]:
        raise UserError(f"{runs[0]['log']}: written by another program than {program}; run again")
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


def drift(runs: list[dict[str, Any]]) -> list[str]:
    """Lines of one kind whose val_bpb/val_loss is another in some log: one validation set has one
    ratio, to the last digit that is printed."""
    found = []
    for loss, bpb in PAIRS:
        ratios = {run["log"]: run[bpb] / run[loss] for run in runs if run[loss] and run[bpb]}
        middle = statistics.median(ratios.values()) if ratios else 0
        found += [f"{log}: {bpb}/{loss} is {ratio:.6f}, in the other logs {middle:.6f}"
                  for log, ratio in ratios.items() if abs(ratio / middle - 1) > 2e-5]
    return found


def values_of(paths: list[Path], name: str) -> list[float]:
    """A figure's values in logs, or in the seeds of one submission.json (ours or another's)."""
    if paths[0].suffix != ".json":
        return [run[name] for run in (read_log(path)[0] for path in paths)]
    told = json.loads(paths[0].read_text())
    seeds = told.get("seed_results") or told["seeds"]
    return [run[name] for run in (seeds.values() if isinstance(seeds, dict) else seeds)]


def compare(paths: list[Path], baseline: list[Path]) -> dict[str, Any]:
    """Against a baseline's seeds: Welch's one-sided t-test (ours lower) and the 0.005-nats rule,
    on val_loss in nats a token. UserError where the two have other targets or bytes."""
    try:
        from scipy.stats import ttest_ind
    except ModuleNotFoundError:
        raise UserError("--baseline needs scipy; source .venv/bin/activate, or pip install -r "
                        "requirements-report.txt") from None
    try:
        ours, theirs = (values_of(p, "val_loss") for p in (paths, baseline))
        bpb = [statistics.mean(values_of(p, "val_bpb")) for p in (paths, baseline)]
        gain = statistics.mean(theirs) - statistics.mean(ours)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{baseline[0]}: no val_loss and val_bpb of every seed ({error})") from None
    ratios = [b / statistics.mean(v) for b, v in zip(bpb, (ours, theirs))]
    if abs(ratios[0] / ratios[1] - 1) > 2e-4:
        raise UserError(f"{baseline[0]}: val_bpb/val_loss is {ratios[1]:.6f}, here {ratios[0]:.6f}:"
                        " another validation set or tokenizer, so nats a token do not compare")
    p = None
    if min(len(ours), len(theirs)) > 1:
        p = float(ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue)
    return {"baseline": [str(path) for path in baseline], "n": [len(ours), len(theirs)],
            "nats": gain, "bpb": bpb[1] - bpb[0], "welch_p": p,
            "meets_0.005_nats": gain >= RULE_NATS,
            "meets_p_0.01": p is not None and p < RULE_P}


def verdict(result: dict[str, Any]) -> str:
    """Both rules in one line."""
    p = "not defined (it takes 2 seeds a side)" if result["welch_p"] is None else (
        f"{result['welch_p']:.4g}")
    yes = {True: "met", False: "not met"}
    return (f"gain over the baseline: {result['nats']:+.5f} nats, {result['bpb']:+.5f} BPB "
            f"(n = {result['n'][0]}, {result['n'][1]}); 0.005 nats: "
            f"{yes[result['meets_0.005_nats']]}; Welch's one-sided t-test p = {p}, below 0.01: "
            f"{yes[result['meets_p_0.01']]}")


def audit(claim: Path, logs: list[Path]) -> list[str]:
    """What a submission.json (ours or another's) says that its logs do not, and what is wrong with
    the logs."""
    try:
        told = json.loads(claim.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{claim}: unreadable ({error})") from None
    runs = [read_log(path)[0] for path in logs]
    found = [f"{run['log']}: {line}" for run in runs for line in run["findings"]] + drift(runs)
    summary = told.get("summary", told)
    for name in ("val_bpb", "val_loss"):
        values = [run[name] for run in runs if run[name] is not None]
        said = summary.get(f"{name}_mean", summary.get(name))
        if not values or said is None:
            found.append(f"{name}: no figure in {'the logs' if said else claim.name}")
            continue
        mean = statistics.mean(values)
        if abs(said - mean) > 1e-5:
            found.append(f"{name} {said:.5f} is not in the logs: their mean is {mean:.5f}")
        spread = summary.get(f"{name}_std")
        stds = [statistics.stdev(values), statistics.pstdev(values)] if len(values) > 1 else []
        if spread is not None and stds and min(abs(spread - s) for s in stds) > 1e-5:
            found.append(f"{name}_std {spread:.5f}: the logs give {stds[0]:.5f}")
    seeds = told.get("seed_results", {})
    for run in runs:
        claimed = seeds.get(str(run["seed"]), {})
        pairs = (("val_bpb", "val_bpb", 1e-6), ("val_loss", "val_loss", 1e-6),
                 ("steps", "steps", 0), ("artifact_bytes", "bytes_total", 0))
        for theirs, ours, most in pairs:
            if theirs in claimed and run[ours] is not None and abs(
                    claimed[theirs] - run[ours]) > most:
                found.append(f"seed {run['seed']}: {theirs} {claimed[theirs]}, the log says "
                             f"{run[ours]}")
    if len(runs) < 3:
        found.append(f"{len(runs)} log(s): a record needs 3 seeds")
    return found


def audit_lines(claim: Path, logs: list[Path]) -> tuple[list[str], int]:
    """(report, number of findings) for --audit."""
    found, runs = audit(claim, logs), [read_log(path)[0] for path in logs]
    values = [run["val_bpb"] for run in runs if run["val_bpb"] is not None]
    lines = []
    if len(values) > 1:
        lines = [f"val_bpb of the logs: mean {statistics.mean(values):.5f}, sample std "
                 f"{statistics.stdev(values):.5f} (divided by n: {statistics.pstdev(values):.5f}), "
                 f"n = {len(values)}"]
    return [*lines, *(f"finding: {line}" for line in found),
            f"{len(found)} finding(s) in {claim}"], len(found)


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


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="logs of train_gpt.py -> submission.json, table")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG")
    parser.add_argument("--readme", type=Path, help="also put the table into this file")
    parser.add_argument("--baseline", type=Path, nargs="+", help="logs or a submission.json")
    parser.add_argument("--program", type=Path, help="the program that must have written the logs")
    parser.add_argument("--draft", action="store_true", help="findings do not refuse")
    parser.add_argument("--audit", type=Path, metavar="JSON", help="check this file on the logs")
    parser.add_argument("--report", type=Path, metavar="HTML", help="write plots")
    parser.add_argument("--source", type=Path, metavar="LOG", help="print the log's program")
    return parser


def main() -> int:
    parser = arguments()
    told = parser.parse_args()
    try:
        if told.source:
            print(source_of(told.source.read_text()), end="")
            return 0
        if not told.logs:
            parser.error("the following arguments are required: LOG")
        if told.audit:
            lines, findings = audit_lines(told.audit, told.logs)
            print("\n".join(lines))
            return int(findings > 0)
        submission = build(told.logs, told.draft, told.program)
        if told.baseline:
            submission["comparison"] = compare(told.logs, told.baseline)
        if told.readme:
            fill_readme(told.readme, table(submission))
        write(Path("submission.json"), json.dumps(submission, indent=1) + "\n")
        print(table(submission), flush=True)
        for line in submission["findings"]:
            print(f"finding: {line}")
        if told.baseline:
            print(verdict(submission["comparison"]))
        if told.report:
            import report

            report.write(told.logs, told.report)
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
