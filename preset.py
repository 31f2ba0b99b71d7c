"""Presets, the list of all settings, and names that are nearly settings.

train_gpt.py loads this beside itself; its packed program carries the settings of its run and does
without."""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import train_gpt as t

# What other programs call a setting of ours; "": there is none. Only warned about: these names may
# belong to somebody else.
RATES = "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR"
ELSEWHERE = {
    RATES: "LR LEARNING_RATE MAX_LR BASE_LR PEAK_LR",
    "SEED": "SEEDS RANDOM_SEED MANUAL_SEED RNG_SEED",
    "TRAIN_BATCH_TOKENS": "BATCH BATCH_SIZE BATCHSIZE BS GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE "
                          "DEVICE_BATCH_SIZE TOTAL_BATCH_SIZE BATCH_TOKENS",
    "ITERATIONS": "EPOCHS NUM_EPOCHS MAX_EPOCHS N_EPOCHS NUM_TRAIN_EPOCHS STEPS MAX_STEPS "
                  "NUM_STEPS N_STEPS TOTAL_STEPS MAX_ITERS NUM_ITERS ITERS N_ITERS MAX_ITERATIONS "
                  "NUM_ITERATIONS",
    "MAX_WALLCLOCK_SECONDS": "TIME_LIMIT MAX_TIME MAX_SECONDS BUDGET TIME_BUDGET WALLCLOCK "
                             "WALLCLOCK_SECONDS MAX_MINUTES TRAIN_SECONDS",
    "MUON_WD, EMBED_WD and ADAM_WD": "WD WEIGHT_DECAY",
    "MUON_MOMENTUM": "MOMENTUM",
    "GRAD_CLIP_NORM": "CLIP CLIP_NORM GRADIENT_CLIP MAX_GRAD_NORM CLIP_GRAD_NORM",
    "TRAIN_SEQ_LEN": "SEQ_LEN SEQLEN SEQUENCE_LENGTH MAX_SEQ_LEN MAX_SEQUENCE_LENGTH BLOCK_SIZE "
                     "CONTEXT_LENGTH CONTEXT_SIZE CTX_LEN MAX_LENGTH",
    "NUM_LAYERS": "LAYERS N_LAYER N_LAYERS DEPTH",
    "MODEL_DIM": "DIM D_MODEL N_EMBD N_EMBED EMBED_DIM HIDDEN_SIZE HIDDEN_DIM WIDTH",
    "NUM_HEADS": "HEADS N_HEAD N_HEADS",
    "DATA_PATH": "DATA DATASET DATASETS DATASET_PATH DATASET_DIR DATA_FOLDER DATA_ROOT",
    "ARTIFACT_DIR": "OUT OUT_DIR OUTDIR OUTPUT OUTPUT_DIR SAVE_DIR LOG_DIR",
    "TOKENIZER_PATH": "TOKENIZER TOKENIZER_MODEL",
    "INIT_FROM": "INIT_CHECKPOINT LOAD_FROM LOAD_CHECKPOINT RESUME RESUME_FROM CKPT CKPT_PATH "
                 "CHECKPOINT PRETRAINED WEIGHTS",
    "CHECKPOINT_EVERY_SECONDS": "SAVE_EVERY SAVE_STEPS SAVE_INTERVAL",
    "TRAIN_LOG_EVERY": "LOG_EVERY LOG_INTERVAL LOGGING_STEPS LOG_STEPS",
    "VAL_LOSS_EVERY": "EVAL_EVERY EVAL_STEPS EVAL_INTERVAL",
    "PRESET": "PRESETS CONFIG_NAME",
    "torchrun --nproc_per_node": "GPUS NGPU NGPUS NUM_GPUS N_GPUS NPROC NPROC_PER_NODE "
                                 "NUM_PROCESSES",
    "": "DROPOUT"}
OURS = {name: ours for ours, names in ELSEWHERE.items() for name in names.split()}


def read(name: str, folder: Path, where: str = "PRESET",
         above: tuple[Path, ...] = ()) -> dict[str, tuple[str, str]]:
    """Name -> (value, place) of the NAME=value lines of a preset; `#` begins a comment. PRESET=NAME
    comes first, if at all, and starts from another one, beside it or here. `where` asks for this
    preset, `above` are those that started from it. UserError for a file that is not such."""
    path = Path(name) if name.endswith(".env") else folder / "presets" / f"{name}.env"
    if not path.is_file():
        known = sorted(p.stem for p in (folder / "presets").glob("*.env"))
        near = nearest(path.stem, known)
        raise t.UserError(
            f"{where}={name}: no file {path}{near}; presets here: {', '.join(known) or 'none'}")
    above = path.resolve(), *above
    t.require(above[0] not in above[1:],
              f"{where}={name}: this preset starts from itself; break it")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise t.UserError(f"{path}: unreadable ({error}); save it as UTF-8 text") from None
    found = {}
    for number, line in enumerate(lines, 1):
        key, sep, value = (part.strip() for part in line.split("#")[0].partition("="))
        t.require(sep or not key, f"{path}:{number}: not a NAME=value line: {key}")
        if key == "PRESET":
            t.require(not found, f"{path}:{number}: PRESET must be the first setting of a preset")
            near = path.parent / f"{value.removesuffix('.env')}.env"
            base = str(near) if near.is_file() and near.resolve() != above[0] else value
            found = read(base, folder, f"{path}:{number}: PRESET", above)
        elif sep:
            found.pop(t.COUNTS.get(key), None)
            found[key] = value, f"{path}:{number}: {key}"
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """"; did you mean X?" for the known word that is most like this one, "" where none is."""
    near = difflib.get_close_matches(word.lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def suggest(name: str) -> str:
    """What other programs call so, else the known name that is nearest word by word, then as a
    whole, if any is near."""
    if OURS.get(name):
        return f"; did you mean {OURS[name]}?"

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def likeness(known: str) -> tuple[float, float]:
        words = [max(alike(a, b) for b in known.split("_")) for a in name.split("_")]
        return sum(words) / len(words), alike(name, known)

    best = max(t.SETTINGS, key=likeness)
    return f"; did you mean {best}?" if likeness(best)[0] > 0.6 else ""


def near_misses(environ: Mapping[str, str]) -> Iterator[str]:
    """One line for every variable that looks as if it were meant for this program, and is not read:
    what other programs call such a setting, other capitals, one or two letters more or less."""
    for name in sorted(environ):
        upper = name.upper()
        if t.is_ours(name) or name in ("PRESET", "PATH"):
            continue
        near = upper if upper in t.SETTINGS else OURS.get(upper)
        if near is None:
            near = next(iter(difflib.get_close_matches(upper, t.SETTINGS, 1, 0.85)), None)
        if near == "":
            yield f"{name}={environ[name]} is not read: there is no such setting; see --help"
        elif near and near not in environ:
            yield f"{name}={environ[name]} is not read; the setting is {near}, see --help"


def help_text() -> str:
    """All settings with their defaults and one line each, for --help."""
    lines = [f"  {n} [{f.default}] {f.metadata['help']}" for n, f in t.SETTINGS.items()]
    return "\n".join((t.__doc__ or "train_gpt.py", "Settings, with their [defaults]:", *lines))


def print_help() -> None:
    """The same on standard output, whose reader (`| head`) may leave."""
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
