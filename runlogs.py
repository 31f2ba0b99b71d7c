"""Logs of runs -> figures and settings: of this train_gpt.py, of #1855 and its lineage, and of the
older logs of the field (`quantized_ttt`, `quantized_sliding_window`).

Nothing is computed here that a log does not say; a figure that a log lacks is None. The JSON line
at a log's end is trusted over its text.
"""

import base64
import codecs
import json
import lzma
import re
from pathlib import Path
from typing import Any, NamedTuple

# of training with calibration, and of evaluation from the process's start; of artifact and program
LIMIT_SECONDS, LIMIT_BYTES = 600.0, 16_000_000
SOURCE_BYTES = 1 << 25  # more than any program: a log's source is not unpacked beyond it

# figure: (pattern of its line in a log, type); of several lines the last counts
FIGURES = {
    "seed": (r"^ *seed: ?(\d+)", int),
    "preset": (r"^preset: (\S+)", str),
    "program_sha256": (r"^program: \S+ sha256:(\w+)", str),
    "versions": (r"^(python \S+, torch \S+, numpy \S+)", str),
    "hardware": (r"^devices: (.+?), torch\.", str),
    "steps": (r"^(?:training stopped|stopping_early)\b.*train_time: ?\d+ms step: ?(\d+)/", int),
    "train_time_ms": (r"^(?:training stopped|stopping_early)\b.*train_time: ?(\d+)ms", int),
    "calibration_s": (r"^(?:calibration: \d+ batches|GPTQ:collected \d+ Hessians in) ([\d.]+)s",
                      float),
    "prequant_val_loss": (r"^(?:diagnostic )?pre-quantization .*val_loss:(\S+)", float),
    "prequant_val_bpb": (r"^(?:diagnostic )?pre-quantization .*val_bpb:(\S+)", float),
    "quantized_val_loss": (r"^(?:diagnostic )?quantized val_loss:(\S+)", float),
    "quantized_val_bpb": (r"^(?:diagnostic )?quantized val_loss:\S+ val_bpb:(\S+)", float),
    "val_loss": (r"^quantized_ttt(?:_phased)? val_loss:(\S+)", float),
    "val_bpb": (r"^quantized_ttt(?:_phased)? val_loss:\S+ val_bpb:(\S+)", float),
    "compressor": (r"^Serialized model quantized\+(\w+):", str),
    "bytes_model": (r"^Serialized model quantized\+\w+: (\d+) bytes", int),
    "bytes_code": (r"^Code size(?: \(compressed\))?: (\d+) bytes", int),
    "bytes_total": (r"^Total submission size quantized\+\w+: (\d+) bytes", int),
    "eval_time_ms": (r"^quantized_ttt(?:_phased)? .*eval_time:(\d+)ms", int),
    "total_eval_time_s": (r"^total_eval_time:(\S+)s", float),
    "val_tokens": (r"^(?:train_tokens: \d+ )?val_tokens: (\d+)", int),
    "data_bytes": (r'^data: .*"val": \{[^}]*"original_bytes": (\d+)', int),
    "illegal": (r"^illegal: (.+)$", str),  # why the challenge would refuse this score; null: legal
}
# of a log without test-time training: there the sliding window's score is the final one
SLIDING = {
    "val_loss": (r"^quantized_sliding_window val_loss:(\S+)", float),
    "val_bpb": (r"^quantized_sliding_window val_loss:\S+ val_bpb:(\S+)", float),
    "eval_time_ms": (r"^quantized_sliding_window .*eval_time:(\d+)ms", int),
}
STAGES = ("prequant_val", "quantized_val", "val")  # in the order of a run
PAIRS = tuple((f"{stage}_loss", f"{stage}_bpb") for stage in STAGES)
# settings in which the logs of one submission may differ: train_gpt.NOT_OF_A_RUN, the seed, places
FREE = {"SEED", "RUN_ID", "ARTIFACT_DIR", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "LOGFILE",
        "CHECKPOINT_EVERY_SECONDS", "LEGALITY_CHECK", "SCORES_PATH"}
PLACES = {"TRAIN_FILES", "VAL_FILES", "VAL_BYTES_FILES", "DATASETS_DIR", "MODEL_PATH",
          "QUANTIZED_MODEL_PATH", "RANK", "LOCAL_RANK", "IS_MAIN_PROCESS"}
KNOWN = "quantized_ttt_phased, quantized_ttt, quantized_sliding_window"


class UserError(Exception):
    """A mistake that the user can mend: one line, exit code 2."""


class RunLog(NamedTuple):
    """One log. `figures` holds every name of FIGURES, `told` what the JSON line at its end says
    ({} without one), `settings` those in which logs must agree."""

    path: Path
    text: str
    figures: dict[str, Any]
    told: dict[str, Any]
    settings: dict[str, str]


def read_text(path: Path) -> str:
    """A text file as the field's tools write it: UTF-8 or UTF-16, with a byte-order mark or
    without, any line ends. What is no text at all comes back as nonsense, never as an error."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    head = data[:4096]
    encoding = "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif head[1::2].count(0) > len(head) // 4:
        encoding = "utf-16-le"
    elif head[::2].count(0) > len(head) // 4:
        encoding = "utf-16-be"
    text = data.decode(encoding, errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, **options: Any) -> Any:
    """As json.loads, but whatever is wrong with the text is a ValueError."""
    try:
        return json.loads(text, **options)
    except (RecursionError, ArithmeticError) as error:
        raise ValueError(str(error)) from None


def json_line(text: str, name: str) -> dict[str, Any]:
    """The object that stands after `NAME: ` on a line of a log, {} where there is none; ValueError
    where it is damaged."""
    found = re.search(rf"^{name}: (\{{.*)$", text, re.MULTILINE)
    if not found:
        return {}
    given = parse_json(found[1])
    if not isinstance(given, dict):
        raise ValueError(f"{name}: no object")
    return given


def listed_settings(text: str) -> dict[str, str]:
    """NAME -> value of the list of all settings at a log's beginning, {} where there is none."""
    block = re.search(r"^Hyperparameters:\n((?: +\w+:.*\n)+)", text, re.MULTILINE)
    found = re.findall(r"^ +(\w+): ?(.*)$", block[1], re.MULTILINE) if block else []
    return {name.upper(): value.removesuffix("  (not the default)") for name, value in found}


def settings_of(text: str) -> dict[str, str] | None:
    """The settings in which logs must agree: those that are not the default or, in a log of
    #1855's lineage, all. None where the log has neither."""
    listed = re.search(r"^not the default: ", text, re.MULTILINE)
    given = json_line(text, "not the default") if listed else listed_settings(text)
    if not given and not listed:
        return None
    return {name: str(value) for name, value in given.items() if name not in FREE | PLACES}


def last_line(text: str) -> dict[str, Any]:
    """The object in the JSON line at the end of a log, {} where there is none; ValueError where
    it is no object."""
    found = re.findall(r'^(\{"result": .*\})$', text, re.MULTILINE)
    told = parse_json(found[-1])["result"] if found else {}
    if not isinstance(told, dict):
        raise ValueError("the last line holds no result")
    return told


def figures_told(told: dict[str, Any]) -> dict[str, Any]:
    """Figures by the names of FIGURES, and some more, of what the JSON line says. What is not of
    the type that it should be raises TypeError, KeyError or AttributeError."""
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
    figures.update({key: told[key] for key in ("seed", "preset", "program_sha256", "versions",
                                               "hardware") if key in told})
    figures = {name: value for name, value in figures.items() if value not in (None, {})}
    for name, value in figures.items():
        kind = {"sha256": dict, "legality": list}.get(name, FIGURES.get(name, (0, int))[1])
        if not isinstance(value, (int, float) if kind in (int, float) else kind):
            raise TypeError(f"{name} is {value!r}")
    return figures


def read_figures(text: str) -> dict[str, Any]:
    """The figures that the text of a log gives; ValueError for one that is no number."""
    figures: dict[str, Any] = {}
    for name, (pattern, kind) in FIGURES.items():
        found = re.findall(pattern, text, re.MULTILINE)
        figures[name] = kind(found[-1]) if found else None
    sliding = {name: kind(found[-1]) for name, (pattern, kind) in SLIDING.items()
               if (found := re.findall(pattern, text, re.MULTILINE))}
    if sliding and figures["val_bpb"] is None:
        figures.update(sliding)
    return figures | {f"sliding_{name}": value for name, value in sliding.items()}


def load(path: Path) -> RunLog:
    """One log; UserError where it is none, or damaged beyond reading."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the log in it")
    if not path.is_file():
        raise UserError(f"{path}: no such log; run ./run_3seed.sh first")
    text = read_text(path)
    try:
        figures, settings = read_figures(text), settings_of(text)
        told = last_line(text)
        figures_told(told)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: a damaged log ({line[:120]})") from None
    if figures["seed"] is None or settings is None:
        raise UserError(f"{path}: not a log of a kind that is known (no seed and settings in it)")
    if figures["program_sha256"] is None and all(figures[name] is None for _, name in PAIRS):
        raise UserError(f"{path}: not a log of a kind that is known (no score; looked for {KNOWN})")
    return RunLog(path, text, figures, told, settings)


def source_of(text: str) -> str:
    """The program that a log carries, empty where it carries none; UserError if it is damaged."""
    found = re.search(r"^source: (\S+)$", text, re.MULTILINE)
    if not found:
        return ""
    unpack = lzma.LZMADecompressor()
    try:
        source = unpack.decompress(base64.b85decode(found[1]), SOURCE_BYTES).decode()
    except (ValueError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"the source in the log is damaged ({error})") from None
    if not unpack.eof:
        raise UserError("the source in the log is cut, or larger than any program")
    return source


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


def finite(value: Any) -> bool:
    """Whether a value is a number that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e18 < value < 1e18
