"""Where documents come from: files of JSON lines, and a demo corpus that every machine has."""

import ast
import codecs
import dataclasses
import hashlib
import importlib
import inspect
import json
import platform
import random
import re
import sys
import sysconfig
import tokenize
import types
import warnings
from pathlib import Path

from caseops import UserError
from caseops.shards import write_whole


@dataclasses.dataclass
class Document:
    """One document: its text, size in UTF-8 bytes, and line in the input (from 1)."""

    text: str
    size: int
    line: int


class DocumentFile:
    """The documents of a JSON-lines file, in order, each time it is iterated.

    Raises UserError, naming file and line, for a line that cannot be a document. After a whole
    pass `sha256` is the file's digest; `position` is the number of bytes read so far.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; give --docs a JSON-lines file, or build one "
                            "with --demo DIR")
        self.size = self.path.stat().st_size
        self.position, self.sha256 = 0, None

    def _lines(self):
        digest = hashlib.sha256()
        self.position = 0
        with open(self.path, "rb") as f:
            for number, line in enumerate(f, 1):
                self.position += len(line)
                digest.update(line)
                bare = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
                if bare:
                    yield number, bare
        self.sha256 = digest.hexdigest()

    def __iter__(self):
        return (self._parse(number, line) for number, line in self._lines())

    def _parse(self, number, line):
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as e:
            self.reject(number, f"not UTF-8 ({e.reason} at byte {e.start} of the line)")
        except json.JSONDecodeError as e:
            self.reject(number, f"not JSON ({e.msg} at column {e.colno})")
        except (ValueError, RecursionError) as e:  # a number or a nesting beyond Python's limits
            self.reject(number, f"not JSON that can be read ({e})")
        if isinstance(value, dict):
            if "text" not in value:
                self.reject(number, 'the object has no "text"')
            value = value["text"]
            if not isinstance(value, str):
                self.reject(number, f'"text" must be a string, not {type(value).__name__}')
        elif not isinstance(value, str):
            self.reject(number, f'{type(value).__name__}, where an object with "text" or a string '
                                "was expected")
        try:
            return Document(value, len(value.encode()), number)
        except UnicodeEncodeError as e:
            self.reject(number, f"a lone surrogate (U+{ord(value[e.start]):04X}, "
                                f"character {e.start} of the text)")

    def reject(self, line, reason):
        """Raise the UserError for one line of this file."""
        raise UserError(f"{self.path}:{line}: {reason}; mend or remove this line") from None

    def count(self, at_most):
        """How many documents there are, up to `at_most`; the lines are not looked into."""
        return sum(1 for _ in zip(range(at_most), self._lines(), strict=False))


def choose_val_docs(source, wanted):
    """How many documents to validate on: `wanted`, or a tenth of an input that has no more."""
    found = source.count(wanted + 1)
    if found > wanted:
        return wanted
    if found < 2:
        raise UserError(f"{source.path}: {found} documents; at least 2 are needed, one to validate "
                        "on and one to train on")
    capped = max(1, found // 10)
    print(f"{source.path}: only {found:,} documents, so --val-docs {wanted:,} is capped at "
          f"{capped:,} (one in ten); {found - capped:,} are left for training", flush=True)
    return capped


# ---- the demo corpus -----------------------------------------------------------------------------

_SHORTEST = 200  # characters; a shorter document is not worth a BOS
_C_MODULES = ("array", "math", "cmath", "_datetime", "_decimal", "_socket", "_ssl", "select",
              "zlib", "_bz2", "_lzma", "_json", "_pickle", "_struct", "_random", "_csv", "mmap",
              "unicodedata", "_elementtree", "_asyncio", "_bisect", "_heapq", "_zoneinfo")


def module_prose(name, source, seen):
    """The English of one Python module: docstrings under their signatures, and comment blocks,
    in the order of the file. Strings in `seen` (a set, added to) are left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, node.bases))
            head = f"class {node.name}({bases})\n" if bases else f"class {node.name}\n"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            head = f"{node.name}({ast.unparse(node.args)})\n"
        elif isinstance(node, ast.Module):
            head = ""
        else:
            continue
        if text := ast.get_docstring(node):
            found.append((getattr(node, "lineno", 0), text, head + text))
    for block in re.finditer(r"(?:^[ \t]*#.*\n){2,}", source, re.M):
        text = inspect.cleandoc(re.sub(r"(?m)^[ \t]*#+ ?", "", block[0]))
        found.append((source.count("\n", 0, block.start()) + 1, text, text))
    return _joined(name, found, seen)


def _joined(name, found, seen):
    parts = [name]
    for _, text, shown in sorted(found):
        if text.strip() and text not in seen:
            seen.add(text)
            parts.append(shown.rstrip())
    return "\n\n".join(parts) + "\n"


def builtin_prose(name, seen):
    """The docstrings of a module written in C; importing one runs nothing of note. "" if none."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ""
    found = [(0, inspect.getdoc(module) or "", inspect.getdoc(module) or "")]
    for key, value in sorted(vars(module).items()):
        if not isinstance(value, type | types.BuiltinFunctionType):
            continue
        members = sorted(vars(value).items()) if isinstance(value, type) else []
        for label, item in [(key, value)] + [(f"{key}.{k}", v) for k, v in members]:
            text = getattr(item, "__doc__", None)
            if isinstance(text, str) and len(text) > 40:
                found.append((len(found), inspect.cleandoc(text),
                              f"{label}\n{inspect.cleandoc(text)}"))
    return _joined(name, found, seen)


def demo_documents():
    """English that comes with CPython, one document a help topic or module: pydoc's topics and
    the prose of the standard library, each text once, shuffled with a fixed seed."""
    topics = importlib.import_module("pydoc_data.topics").topics
    seen, documents = set(topics.values()), [text for _, text in sorted(topics.items())]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if {"site-packages", "dist-packages", "pydoc_data"} & set(parts):
            continue
        try:
            with tokenize.open(path) as f, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                documents.append(module_prose(".".join(parts), f.read(), seen))
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue  # the library's own tests hold files that are broken on purpose
    for name in sorted({*sys.builtin_module_names, *_C_MODULES}):
        documents.append(builtin_prose(name, seen))
    documents = sorted({d for d in documents if len(d) >= _SHORTEST
                        and not re.search("[\ud800-\udfff]", d)})
    random.Random(0).shuffle(documents)
    return documents


def build_demo(folder):
    """Write `folder`/docs.jsonl, the demo corpus, and return its path."""
    path = Path(folder) / "docs.jsonl"
    documents = demo_documents()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps({"text": d}) + "\n" for d in documents).encode())
    print(f"{path}: {len(documents):,} documents, {sum(len(d.encode()) for d in documents):,} "
          f"bytes of text from Python {platform.python_version()}'s own documentation", flush=True)
    return path
