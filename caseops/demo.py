"""A demo corpus that every machine has: the English that comes with Python itself."""

import ast
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

from caseops.console import say
from caseops.shards import write_whole

_SHORTEST = 200  # characters; a shorter document is not worth a BOS
_C_MODULES = ("array", "math", "cmath", "_datetime", "_decimal", "_socket", "_ssl", "select",
              "zlib", "_bz2", "_lzma", "_json", "_pickle", "_struct", "_random", "_csv", "mmap",
              "unicodedata", "_elementtree", "_asyncio", "_bisect", "_heapq", "_zoneinfo")


def definitions(node):
    """The module `node` and the statements below it; expressions, most of a tree, hold none."""
    yield node
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, ()):
            yield from definitions(child)


def module_prose(name, source, seen):
    """The English of one Python module: docstrings under their signatures, and comment blocks,
    in the order of the file. Strings in `seen` (a set, added to) are left out."""
    found = []
    for node in definitions(ast.parse(source)):
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
    say(f"{path}: {len(documents):,} documents, {sum(len(d.encode()) for d in documents):,} "
        f"bytes of text from Python {platform.python_version()}'s own documentation")
    return path
