"""Somebody's submission.json against the logs. The field's files call and nest their figures as
they like; what is found under a name that is known is compared at the digits that it gives, and
what is not compared is said.
"""

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import logchecks
from runlogs import UserError, load, parse_json, read_text

# Keys that speak of other runs, or of differences to them.
OTHERS = re.compile(r"delta|gain|improve|baseline|prev|prior|sota|(^|_)(vs|base|cap|p)_|diff|target"
                    r"|thresh|p_?value|welch|leaderboard|merged|parent|budget|limit|saved|margin"
                    r"|per_step|step_avg|train_loss|reference|sliding.*loss")
SAME = ("val_tokens", "calibration_s", "data_bytes", "start_s", "peak_memory_mib", "val_bytes")
# Figure: what its key looks like, in lower case with _ between words. The first that fits counts.
KEYS = (
    ("sliding_val_bpb", r"sliding.*bpb"),
    ("prequant_val_bpb", r"(pre_?quant|pre_?q|post_ema|unquantized).*(bpb|bits_per_byte)"),
    ("quantized_val_bpb", r"(pre_?ttt|no_?ttt|without_ttt|(post_?)?quant(ized)?)_(val_)?bpb"),
    ("quantized_val_bpb", r"(post_?quant|pre_?ttt).*bpb"),
    ("val_bpb", r"bpb|bits_per_byte"),
    ("prequant_val_loss", r"(pre_?quant|pre_?q|post_ema|unquantized).*loss"),
    ("quantized_val_loss", r"(pre_?ttt|no_?ttt|post_?quant).*loss|(^|_)quant(ized)?_(val_)?loss"),
    ("val_loss", r"val_loss|(^|_)(mean|avg|ttt|eval|final)_loss|^loss$|loss_(mean|nats)"),
    ("bytes_code", r"(code|program|script|wrapper).*(bytes|size$)|bytes_(code|program)"),
    ("bytes_model", r"(model|weights|blob|compressed|quantized).*bytes|bytes_(model|weights)"),
    ("bytes_total", r"(total|submission).*bytes|bytes_total|artifact_(total|submission)"),
    ("artifact", r"bytes"),
    ("steps", r"^((max|min|mean|avg|train|training|num|final|n)_)*steps?"
              r"(_(completed|trained|mean|stop))?$"),
    ("train_s", r"^((max|mean|avg)_)?train(ing)?_(wall)?(time|clock|clock_time)?_?"
                r"(s|sec|seconds|ms)(_max|_mean)?$"),
    ("eval_s", r"^((max|mean|avg|total|ttt)_)*(eval|evaluation|ttt)_(wall)?"
               r"(time|clock|clock_time)?_?(s|sec|seconds|ms)(_max|_mean)?$"),
)
SPREAD = re.compile(r"(^|_)(std|stdev|sd|sigma|stddev|std_dev|spread)(_|$)")
EXTREMES = (("max", r"(^|_)(max|worst)(_|$)"), ("min", r"(^|_)(min|best)(_|$)"))
# objects in which a submission's own figures stand; what stands in others is not looked at
NESTED = re.compile(r"summary|results?|metrics|mean|std|averages?|aggregate\w*|stat\w*|scores?"
                    r"|final\w*|three_seed\w*|pre_?quant\w*|quantized\w*|post_\w*|ttt\w*"
                    r"|.*bpb.*|.*val_loss.*")
BY_SEED = re.compile(r"seed|run|result|bpb|loss|bytes|log")
OF_SEED = re.compile(r"(^|_)(seed|s)_?(\d{1,18})(_|$)")
PLAIN = re.compile(r"(mean_|ttt_|final_)*val_(bpb|loss)(_mean)?")
SEED_KEY = re.compile(r"(?:seed|s)?[ _-]?(\d{1,18})", re.IGNORECASE)
SOUGHT = "val_bpb, mean_val_bpb, val_bpb_mean, ttt_val_bpb, seed_results"
LEAST_DIGITS = 3  # after the point: fewer say nothing in this field
Lines = tuple[list[str], list[str], list[str]]


class Said(NamedTuple):
    """One figure of a claim: where it stands, which it is, of which kind (mean, std, max, min)."""

    key: str
    name: str
    how: str
    value: Decimal


@dataclass
class Claim:
    """What a submission.json says. seeds: seed -> its figures; bare: figures of seeds that it does
    not number; skipped: keys whose value is a number and of no figure that is known."""

    said: list[Said] = field(default_factory=list)
    seeds: dict[int, list[Said]] = field(default_factory=dict)
    bare: list[Said] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


def number(value: Any) -> Decimal | None:
    """A figure, also one that is written as text, with or without words after it; else None."""
    if isinstance(value, str):
        text = re.sub(r"(?<=\d)[,_](?=\d{3})", "", value.strip())
        found = re.match(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?|[-+]?nan|[-+]?inf(?:inity)?)(?![^\s±+(])",
                         text, re.IGNORECASE)
        value = found[1] if found else None
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        return None
    try:
        return Decimal(value)
    except InvalidOperation:
        return None


def word(key: str) -> str:
    """A key in lower case, with one _ between words."""
    return re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_")


def named(key: str) -> tuple[str | None, str]:
    """(figure, how) that a key speaks of; figure None: none that is known."""
    text = word(key)
    name = next((name for name in SAME if text.endswith(name)), None)
    if not name and not OTHERS.search(text):
        name = next((name for name, pattern in KEYS if re.search(pattern, text)), None)
    how = "std" if SPREAD.search(text) else next(
        (how for how, pattern in EXTREMES if re.search(pattern, text)), "mean")
    return name, how


def seed_of(key: Any) -> int | None:
    """The seed that a key or a value names."""
    if isinstance(key, bool) or not isinstance(key, str | int):
        return None
    if isinstance(key, int) and not 0 <= key < 1e18:
        return None
    found = SEED_KEY.fullmatch(str(key).strip())
    return int(found[1]) if found else None


def read_claim(path: Path) -> Claim:
    """A submission.json of anyone; UserError where it is none."""
    try:
        given = parse_json(read_text(path), parse_float=Decimal, parse_constant=Decimal)
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({str(error)[:120]})") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: no JSON object, but a {type(given).__name__}")
    claim = Claim()
    walk(claim, given, "")
    if not (claim.said or any(claim.seeds.values()) or claim.bare or claim.odd):
        raise UserError(f"{path}: no figure that is known; looked for {SOUGHT} and the like")
    return claim


def walk(claim: Claim, given: dict[str, Any], prefix: str, depth: int = 0) -> None:
    """Sort what an object says into `claim`."""
    for key, value in given.items():
        path, others = f"{prefix}{key}", OTHERS.search(word(key))
        if key in ("seeds", "seed"):
            take_seed_numbers(claim, value, several=key == "seeds")
        if isinstance(value, list | dict) and others:
            claim.skipped.append(path)
        elif isinstance(value, list):
            take_list(claim, path, value)
        elif isinstance(value, dict):
            take_object(claim, path, key, value, depth)
        elif found := OF_SEED.search(word(key)):
            take_bare(claim, claim.seeds.setdefault(int(found[3]), []), path, value)
        elif key not in ("seed", "seeds"):
            take(claim, claim.said, path, value)
    numbers = [seed for seed, said in claim.seeds.items() if not said]
    if claim.bare and len(numbers) == len(claim.bare) == len(claim.seeds):
        for seed, said in zip(numbers, claim.bare, strict=True):  # numbers beside their seeds
            claim.seeds[seed].append(said)
        claim.bare = []


def take_object(claim: Claim, path: str, key: str, value: dict[str, Any], depth: int) -> None:
    """An object: one seed's figures, several seeds', or figures of all seeds."""
    if key.lower().startswith("s") and seed_of(key) is not None:
        take_seeds(claim, path, {seed_of(key): value})
        return
    rows = {seed_of(k): v for k, v in value.items() if seed_of(k) is not None}
    rows = rows if BY_SEED.search(key.lower()) or named(key)[0] else {}
    take_seeds(claim, path, rows)
    rest = {k: v for k, v in value.items() if not rows or seed_of(k) is None}
    if depth < 4 and rest and (rows or NESTED.fullmatch(key.lower())):
        walk(claim, rest, f"{path}.", depth + 1)
    elif any(isinstance(v, int | Decimal) and not isinstance(v, bool) for _, v in flat(rest)):
        claim.skipped.append(path)


def take_seed_numbers(claim: Claim, value: Any, several: bool) -> None:
    """The seeds that `seed` names (a number) or `seeds` (a list or text; a number counts them)."""
    values = re.split(r"[,;\s]+", value.strip()) if isinstance(value, str) else value
    values = values if isinstance(values, list) else [values]
    seeds = [seed_of(seed) for seed in values if not isinstance(seed, dict)]
    if None in seeds or several and len(seeds) < 2 and not isinstance(value, list):
        return
    for seed in seeds:
        claim.seeds.setdefault(seed, [])


def take(claim: Claim, place: list[Said], path: str, value: Any) -> None:
    """One key with its value, if that is a figure."""
    name, how = named(path)
    figure = number(value)
    if figure is None:
        if isinstance(value, str | bool) and PLAIN.fullmatch(word(path.rpartition(".")[2])):
            claim.odd.append(f"{path} is not a number: {str(value)[:40]}")
    elif name is None:
        claim.skipped += [] if isinstance(value, str) else [path]
    elif not figure.is_finite() or abs(figure) > 10 ** 18:
        claim.odd.append(f"{path} is {str(figure)[:40]}: no figure")
    else:
        place.append(Said(path, name, how, figure))


def take_bare(claim: Claim, place: list[Said], path: str, value: Any) -> None:
    """A number without a name of its own: the figure that `path` names or, where it names none and
    the number looks like one, val_bpb."""
    figure = number(value)
    if named(path)[0]:
        take(claim, place, path, value)
    elif figure is not None and (not figure.is_finite() or 0 < figure < 20 and figure % 1):
        take(claim, place, f"{path} (val_bpb)", value)


def take_seeds(claim: Claim, path: str, rows: dict[int | None, Any]) -> None:
    """Figures by seed: objects, or bare numbers."""
    for seed, value in rows.items():
        place = claim.seeds.setdefault(seed, [])
        if isinstance(value, dict):
            for key, figure in flat(value):
                if key != "seed":
                    take(claim, place, key, figure)
        else:
            take_bare(claim, place, path, value)


def take_list(claim: Claim, path: str, rows: list[Any]) -> None:
    """Figures by seed as a list of objects or of bare numbers."""
    known = named(path)[0]
    if not known and not BY_SEED.search(path.lower()):
        return
    for row in rows:
        if isinstance(row, dict):
            seed = seed_of(row.get("seed"))
            if seed is not None:
                take_seeds(claim, path, {seed: row})
            else:
                for key, figure in flat(row):
                    take(claim, claim.bare, key, figure)
        else:
            take_bare(claim, claim.bare, path, row)


def flat(given: dict[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(key, value) of an object and of the objects in it, which are one seed's."""
    for key, value in given.items():
        if isinstance(value, dict) and depth < 3:
            yield from flat(value, f"{prefix}{key}.", depth + 1)
        elif not isinstance(value, list | dict):
            yield f"{prefix}{key}", value


# ---- against the logs

def close(said: Decimal, value: float, floor: float) -> bool:
    """Whether a figure is what a log says, at the digits that it gives."""
    exponent = said.as_tuple().exponent
    digits = max(-exponent, LEAST_DIGITS) if isinstance(exponent, int) else LEAST_DIGITS
    return abs(float(said) - value) <= max(0.5 * 10.0 ** -digits * (1 + 1e-9), floor)


def values_of(run: dict[str, Any], name: str) -> list[float]:
    """All that a log gives under the name of a figure: code and artifact are counted in two ways,
    times by two clocks."""
    values = [run.get(name)]
    if name == "artifact":
        values = [run["bytes_total"], run["bytes_model"]]
    elif name == "bytes_code":
        values = [run["bytes_code"], *run.get("code_sizes", [])]
    elif name == "train_s" and run["train_time_ms"] is not None:
        seconds = run["train_time_ms"] / 1000
        values = [seconds, seconds + (run["calibration_s"] or 0)]
    elif name == "eval_s":
        taken = run["eval_time_ms"]
        values = [run["total_eval_time_s"], None if taken is None else taken / 1000]
    return [value for value in values if value is not None]


def counted(said: Said) -> bool:
    """Whether a figure is a count, which has no digits to round."""
    return said.name in ("steps", "artifact") or said.name.startswith("bytes")


def seconds(said: Said) -> float | None:
    """The seconds that a figure gives, None where it is no time."""
    if said.name not in ("train_s", "eval_s"):
        return None
    return float(said.value) / (1000 if re.search(r"ms(_|$)", word(said.key)) else 1)


def agrees(said: Said, values: list[float], floor: float) -> bool:
    """Whether one of the values is what is said; times to a second."""
    if (time := seconds(said)) is not None:
        return any(abs(time - value) <= 1 for value in values)
    if counted(said):
        return any(said.value == value for value in values)
    return any(close(said.value, value, floor) for value in values)


def compare_seed(seed: int, claimed: list[Said], run: dict[str, Any]) -> Lines:
    """(findings, what was compared, what could not be) of one seed."""
    found, compared, not_compared = [], [], []
    for said in claimed:
        values = values_of(run, said.name)
        if not values:
            not_compared.append(f"seed {seed}: {said.key} (not in its log)")
            continue
        compared.append(said.name)
        if not agrees(said, values, 1e-6):
            value = f"{values[0]:.1f} s" if seconds(said) is not None else values[0]
            found.append(f"seed {seed}: {said.key} {short(said.value)}, the log says {value}")
    return found, compared, not_compared


def compare_whole(said: Said, runs: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    """(finding, what could not be compared) of a figure of all seeds together."""
    each = [values_of(run, said.name) for run in runs]
    if not all(each):
        return None, f"{said.key} ({'some log' if any(each) else 'every log'} lacks it)"
    first, every = [found[0] for found in each], [value for found in each for value in found]
    mean, what = statistics.mean(first), "mean"
    if said.how == "std":
        if len(first) < 2 or seconds(said) is not None:
            return None, f"{said.key} (a deviation of one log, or of times)"
        stds = [statistics.stdev(first), statistics.pstdev(first)]
        if any(close(said.value, std, 1 if counted(said) else 1e-5) for std in stds):
            return None, None
        return f"{said.key} {short(said.value)}: the logs give {stds[0]:.5f}", None
    if (time := seconds(said)) is not None:
        least = max(map(min, each)) if said.how == "max" else min(every)
        right = least - 1 <= time <= max(every) + 1
    elif counted(said):
        right = said.value in every or abs(float(said.value) - mean) <= 1
    else:
        expected, what = {"max": (max(first), "greatest"), "min": (min(first), "least")}.get(
            said.how, (mean, "mean"))
        digits = max(-said.value.as_tuple().exponent, LEAST_DIGITS)
        rounded = statistics.mean(round(value, digits) for value in first)
        if close(said.value, expected, 1e-5) or what == "mean" and close(said.value, rounded, 0):
            return None, None
        return (f"{said.key} {short(said.value)} is not in the logs: their {what} is "
                f"{expected:.5f}"), None
    listed = ", ".join(f"{value:,}" for value in first)
    return None if right else f"{said.key} {said.value} is not in the logs: they say {listed}", None


def short(value: Decimal) -> str:
    """With five digits after the point where it has so few."""
    digits = -value.as_tuple().exponent
    return f"{value:.5f}" if 0 < digits <= 5 else str(value)[:40]


def compare_claim(claim: Claim, runs: list[dict[str, Any]]) -> Lines:
    """(findings, what was compared, what could not be) of a claim on the logs' figures."""
    found, compared, not_compared = list(claim.odd), [], []
    by_seed, alike = {run["seed"]: run for run in runs}, {}
    for said in claim.said:
        wrong, unknown = compare_whole(said, runs)
        found += [wrong] if wrong else []
        not_compared += [unknown] if unknown else []
        compared += [] if unknown else [said.key]
    for seed, claimed in claim.seeds.items():
        if seed not in by_seed:
            found.append(f"seed {seed} is claimed, and none of the logs is of it")
            continue
        parts = compare_seed(seed, claimed, by_seed[seed])
        found += parts[0]
        if parts[1]:
            alike.setdefault(", ".join(dict.fromkeys(parts[1])), []).append(str(seed))
        not_compared += parts[2]
    compared += [f"{names} of seed {', '.join(seeds)}" for names, seeds in alike.items()]
    for said in claim.bare:
        values = [value for run in runs for value in values_of(run, said.name)]
        if values and not agrees(said, values, 1e-6):
            found.append(f"{said.key} {said.value} of a seed is in none of the logs")
        (compared if values else not_compared).append(f"{said.key} {said.value} of a seed")
    if claim.seeds:
        found += [f"seed {seed} has a log and is not among the claimed" for seed in by_seed
                  if seed not in claim.seeds]
    told = {said.name for said in claim.said} | {
        said.name for each in [*claim.seeds.values(), claim.bare] for said in each}
    not_compared += [f"{name} (the claim does not give it)" for name in ("val_bpb", "val_loss")
                     if name not in told and not any(name in line for line in claim.odd)]
    not_compared += [f"{key} (no figure that the logs give under a known name)"
                     for key in claim.skipped]
    return found, compared, not_compared


def audit_parts(claim: Path, logs: list[Path]) -> tuple[Lines, list[dict[str, Any]]]:
    """(findings, what was compared, what could not be), and the logs' figures."""
    said = read_claim(claim)
    read = [logchecks.read_log(path) for path in logs]
    runs = [figures for figures, _ in read]
    for run, path in zip(runs, logs, strict=True):
        sizes = re.findall(r"^Code size.*: (\d{1,18}) bytes", load(path).text, re.MULTILINE)
        run["code_sizes"] = [int(size) for size in sizes]
    found = [f"{run['log']}: {line}" for run in runs for line in run["findings"]]
    found += logchecks.check_together(read) + logchecks.drift(runs)
    unlike, compared, not_compared = compare_claim(said, runs)
    if len(runs) < 3:
        unlike.append(f"{len(runs)} log(s): a record needs 3 seeds")
    return (found + unlike, compared, not_compared), runs
