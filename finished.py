"""What the folder of a finished run says of itself, settings and figures; the audit of it:

    python train_gpt.py audit [FOLDER]        FOLDER: ARTIFACT_DIR, else the current folder

The artifact fixes the architecture; the other settings are those of the log that was written with
it or, where there is none, those that the packed program beside it carries."""

import ast
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brotli

import train_gpt as t

# Settings of the run that are none of the artifact's.
OWN = t.NOT_OF_A_RUN | {"TTT_EVAL_ONLY", "PREQUANT_ONLY", "QUANTIZE_ONLY", "INIT_FROM"}


def artifact_of(folder: Path) -> Path:
    """The artifact in `folder`; UserError where there is none."""
    path = folder / t.ARTIFACT_FILE
    t.require(path.is_file(),
              f"{path}: no artifact; train first, or set ARTIFACT_DIR to its folder")
    return path


def log_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """(text, figures of its last line) of the newest log that was written with the artifact in
    `folder`, in it or in its logs/; ("", {}) where there is none."""
    digest = hashlib.sha256(artifact_of(folder).read_bytes()).hexdigest()
    logs = sorted((*folder.glob("*.txt"), *folder.glob("logs/*.txt")),
                  key=lambda path: path.stat().st_mtime, reverse=True)
    for text in (path.read_text(encoding="utf-8", errors="replace") for path in logs):
        for line in re.findall(r'^(\{"result": .*\})$', text, re.MULTILINE)[-1:]:
            try:
                record = json.loads(line)["result"]
                if record["bytes"]["sha256"][t.ARTIFACT_FILE] == digest:
                    return text, record
            except (ValueError, KeyError, TypeError):  # of a rescoring, or another program's
                continue
    return "", {}


def record(folder: Path) -> dict[str, Any]:
    """The figures of the run that made the artifact in `folder`, {} where no log tells."""
    return log_of(folder)[1]


def said_by_log(text: str) -> dict[str, Any]:
    """NAME -> text of the settings in a log, PRESET included; {} where it says none."""
    told = re.findall(r"^not the default: (\{.*\})$", text, re.MULTILINE)
    named = re.findall(r"^preset: (\S+)$", text, re.MULTILINE)
    found = json.loads(told[-1]) if told else {}
    return found | {"PRESET": named[-1]} if named else found


def said_by_program(path: Path) -> dict[str, Any]:
    """The same of a packed program; {} where it is none."""
    try:
        packed = zipfile.ZipFile(path).infolist()[0].header_offset  # the source stands before it
        source = brotli.decompress(path.read_bytes()[:packed]).decode()
        return ast.literal_eval(re.search(r"^BAKED: ?[^=]*= ?(\{[^}]*\})", source, re.M)[1])
    except (OSError, ValueError, zipfile.BadZipFile, brotli.error, TypeError, SyntaxError):
        return {}


def architecture(path: Path) -> dict[str, Any]:
    """Config.architecture() of an artifact; {} for a damaged one, which scoring will refuse."""
    try:
        made = t._read_directory(path.read_bytes())[0]
        return {name: made[name] for name in t.Config().architecture() if name in made}
    except Exception:  # damaged files make the reader raise nearly anything
        return {}


def settings(folder: Path) -> dict[str, str]:
    """NAME -> text of the run that made the artifact in `folder`; PRESET: its preset's name."""
    made = architecture(artifact_of(folder))
    told = said_by_log(log_of(folder)[0]) or said_by_program(folder / t.PROGRAM_FILE)
    told = {name: str(text) for name, text in told.items()
            if name == "PRESET" or name in t.SETTINGS.keys() - OWN}
    if width := made.get("model_dim"):
        made["mlp_mult"] = made.get("hidden_dim", 4 * width) / width
    fixed = {name: str(int(x) if isinstance(x, bool) else x) for name, x in made.items()}
    return told | {name.upper(): x for name, x in fixed.items() if name.upper() in t.SETTINGS}


def configure(environ: Mapping[str, str], root: Path,
              folder: Path) -> tuple[t.Config, dict[str, str]]:
    """(settings for scoring the artifact in `folder`, those of its run): environment and preset, if
    any, over the run's own. UserError where they contradict the artifact, or each other."""
    path, own = artifact_of(folder), settings(folder)
    cfg = t.Config.from_env(environ, root, own, check=False)
    for name, value in architecture(path).items():
        asked = cfg.architecture()[name]
        t.require(asked == value, f"{path}: made with {name.upper()}={value}, the settings say "
                  f"{asked}; use the settings it was made with")
    return cfg.checked(), own


def main(arguments: list[str]) -> None:
    """`python train_gpt.py audit [FOLDER]`."""
    t.require(len(arguments) < 2 and not "".join(arguments).startswith("-"),
              "usage: python train_gpt.py audit [FOLDER]")
    given = {"ARTIFACT_DIR": arguments[0]} if arguments else {}
    t.run({**os.environ, **given}, audit=True)
