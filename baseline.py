"""Logs against a baseline, which is logs or a submission.json of anyone: Welch's one-sided t-test
and the challenge's rule of 0.005 nats, for every stage that both have.
"""

import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import claims
from logchecks import read_log
from runlogs import (
    FREE,
    PLACES,
    STAGES,
    UserError,
    alike,
    finite,
    listed_settings,
    parse_json,
    read_text,
    settings_of,
)

RULE_NATS, RULE_P = 0.005, 0.01
STAGE_WORDS = {"val": "test-time trained", "quantized_val": "quantised",
               "prequant_val": "before quantisation"}


def rows_of(paths: list[Path]) -> list[dict[str, Any]]:
    """Figures of every seed: of logs, or of one submission.json (ours or another's)."""
    if paths[0].suffix != ".json":
        return [read_log(path)[0] for path in paths]
    claim = claims.read_claim(paths[0])
    if claim.odd:
        raise UserError(f"{paths[0]}: {claim.odd[0]}")
    return [{"seed": seed, **{said.name: float(said.value) for said in figures}}
            for seed, figures in claim.seeds.items() if figures]


def stage_values(rows: list[dict[str, Any]], stage: str) -> tuple[list[float], list[float]] | None:
    """(losses, BPB) of a stage in all seeds; None where a seed lacks it. ValueError: no figure."""
    pairs = [(row.get(f"{stage}_loss"), row.get(f"{stage}_bpb")) for row in rows]
    if not pairs or any(None in pair for pair in pairs):
        return None
    if any(not finite(x) or x < 1e-6 for pair in pairs for x in pair):
        raise ValueError(f"{stage}_loss, {stage}_bpb are {pairs[0]}: no figures")
    return [loss for loss, _ in pairs], [bpb for _, bpb in pairs]


def settings_differ(paths: list[Path], baseline: list[Path]) -> dict[str, list[str]] | None:
    """NAME -> [ours, the baseline's] of the settings that differ; None where that cannot be told:
    logs list all settings, our submission.json those that are not the default."""
    text = read_text(paths[0])
    if baseline[0].suffix == ".json":
        told = parse_json(read_text(baseline[0]))  # an object: read_claim has read it
        theirs, ours = told.get("settings_not_default"), settings_of(text)
        if not isinstance(theirs, dict) or "not the default: " not in text:
            return None
        names = ours.keys() | theirs.keys()
        pairs = {n: [ours.get(n, "the default"), str(theirs.get(n, "the default"))] for n in names}
    else:
        ours, theirs = listed_settings(text), listed_settings(read_text(baseline[0]))
        pairs = {n: [ours[n], theirs[n]] for n in ours.keys() & theirs.keys()}
    if not pairs and not (ours and theirs):
        return None
    return {name: pairs[name] for name in sorted(pairs)
            if name not in FREE | PLACES and not alike(*pairs[name])}


def check_other_runs(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: Path) -> None:
    """UserError where the baseline holds one of our runs: nothing would be compared."""
    for a in ours:
        for b in theirs:
            keys = [key for key in ("val_loss", "val_bpb", "prequant_val_loss", "prequant_val_bpb",
                                    "train_time_ms") if None not in (a.get(key), b.get(key))]
            if keys and a["seed"] == b["seed"] and all(abs(a[k] - b[k]) < 1e-9 for k in keys):
                raise UserError(f"{name}: the run of seed {a['seed']} is also among the logs; a "
                                "baseline is of other runs")


def compare_stage(ours: tuple[list[float], list[float]], theirs: tuple[list[float], list[float]],
                  name: Path) -> dict[str, Any]:
    """Gain in nats a token and in BPB, and Welch's one-sided p (ours lower)."""
    from scipy.stats import ttest_ind

    ratios = [statistics.mean(bpb) / statistics.mean(loss) for loss, bpb in (ours, theirs)]
    if abs(ratios[0] / ratios[1] - 1) > 2e-4:
        raise UserError(f"{name}: val_bpb/val_loss is {ratios[1]:.6f}, here {ratios[0]:.6f}:"
                        " another validation set or tokenizer, so nats a token do not compare")
    gains = [statistics.mean(b) - statistics.mean(a) for a, b in zip(ours, theirs, strict=True)]
    p = None
    if min(len(ours[0]), len(theirs[0])) > 1 and (len({*ours[0]}) > 1 or len({*theirs[0]}) > 1):
        with warnings.catch_warnings(action="ignore"):  # of a side without any deviation
            p = float(ttest_ind(ours[0], theirs[0], equal_var=False, alternative="less").pvalue)
        p = p if math.isfinite(p) else None
    return {"n": [len(ours[0]), len(theirs[0])], "nats": gains[0], "bpb": gains[1], "welch_p": p}


def compare(paths: list[Path], baseline: list[Path]) -> dict[str, Any]:
    """Against a baseline's seeds: Welch's one-sided t-test (ours lower) and the 0.005-nats rule,
    on the loss in nats a token, for every stage that both have; the last one counts. UserError
    where the two have other targets or bytes, no stage in common, or a run in common."""
    try:
        import scipy.stats  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("--baseline needs scipy; source .venv/bin/activate, or pip install -r "
                        "requirements-report.txt") from None
    ours, theirs = rows_of(paths), rows_of(baseline)
    check_other_runs(ours, theirs, baseline[0])
    stages = {}
    try:
        for stage in STAGES:
            a, b = stage_values(ours, stage), stage_values(theirs, stage)
            if a and b:
                stages[stage] = compare_stage(a, b, baseline[0])
    except ValueError as error:
        raise UserError(f"{baseline[0]}: {error}") from None
    if not stages:
        raise UserError(f"{baseline[0]}: no val_loss and val_bpb of every seed that the logs have, "
                        "too: nothing to compare")
    stage, last = list(stages.items())[-1]
    return {"baseline": [str(path) for path in baseline], "stage": stage, **last, "stages": stages,
            "settings_differ": settings_differ(paths, baseline),
            "meets_0.005_nats": last["nats"] >= RULE_NATS,
            "meets_p_0.01": last["welch_p"] is not None and last["welch_p"] < RULE_P}


def verdict(result: dict[str, Any]) -> str:
    """Both rules in one line; then other stages and the settings that differ, a line each."""
    p = "not defined (it takes 2 seeds a side that differ)" if result["welch_p"] is None else (
        f"{result['welch_p']:.4g}")
    yes = {True: "met", False: "not met"}
    stage = "" if result["stage"] == "val" else f" ({STAGE_WORDS[result['stage']]})"
    lines = [f"gain over the baseline{stage}: {result['nats']:+.5f} nats, {result['bpb']:+.5f} BPB "
             f"(n = {result['n'][0]}, {result['n'][1]}); 0.005 nats: "
             f"{yes[result['meets_0.005_nats']]}; Welch's one-sided t-test p = {p}, below 0.01: "
             f"{yes[result['meets_p_0.01']]}"]
    lines += [f"{STAGE_WORDS[name]}: {other['nats']:+.5f} nats, {other['bpb']:+.5f} BPB"
              for name, other in result["stages"].items() if name != result["stage"]]
    differ = result["settings_differ"]
    if differ is None:
        return "\n".join([*lines, "not compared: settings (not all are listed on both sides)"])
    told = "; ".join(f"{name} {a} (baseline {b})" for name, (a, b) in differ.items())
    return "\n".join([*lines, f"settings that differ: {told or 'none'}"])
