"""§0 Header: the file keeps the form that makes it readable, and importing it does nothing."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train_gpt as t
from tests.tools import PRESETS, PROGRAM, ROOT

SOURCE = PROGRAM.read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
RULE = "# " + "=" * 98

# section: (title, lines that it may have). The sum only falls; the record's program has 3,753.
SECTIONS = {
    0: ("Header", 65), 1: ("Config", 447), 2: ("Runtime", 165), 3: ("Kernels", 720),
    4: ("Attention", 137), 5: ("Model", 399), 6: ("Optimisers", 205), 7: ("Data", 205),
    8: ("Quantisation", 541), 9: ("Artifact", 424), 10: ("Evaluation", 137),
    11: ("Test-time training", 481), 12: ("N-gram", 89), 13: ("Score adjustment", 66),
    14: ("Training", 300), 15: ("Main", 219),
}
MOST_LINES = 4600
MOST_DATA_LINES = 3467  # of caseops/, all files together; it only falls
LONGEST_FUNCTION = 65
# Public names whose name, annotations and one or two lines of body say everything.
NO_DOCSTRING = {
    "suggest", "head_dim", "kv_dim", "hidden_dim", "dtype", "barrier", "generator", "batch",
    "word_experts", "update", "load_train", "row", "decode_gptq",
    "decode_group", "decode_lqer", "top", "round", "targets", "is_looped", "keep",
    "log_score", "timed_evaluation", "tl", "seconds", "write_log",
}


def banners() -> list[tuple[int, str, int]]:
    """(number, title, line) of every section, in the order of the file."""
    hits = ((re.fullmatch(r"# §(\d+) ([\w -]*\w)(?: -+)?", line), i)
            for i, line in enumerate(LINES, 1))
    return [(int(hit[1]), hit[2], i) for hit, i in hits if hit]


def definitions(node=TREE, inside=False):
    """(definition, whether it stands inside a function) for all functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child, inside
        yield from definitions(child, inside or isinstance(child, ast.FunctionDef))


def test_contents_are_the_banners():
    contents = t.__doc__[t.__doc__.index("\nContents"):t.__doc__.index("\nSymbols")]
    told = sorted((int(n), title) for n, title in
                  re.findall(r"§(\d+) ([A-Z][\w-]*(?: [\w-]+)*)", contents))
    assert told == [(number, title) for number, title, _ in banners()]


def test_banners_are_known_in_order_and_alike():
    found = banners()
    numbers = [number for number, _, _ in found]
    assert numbers == sorted(set(numbers))
    assert set(range(1, 16)) <= set(numbers)
    for number, title, _ in found:
        assert SECTIONS[number][0] == title
    odd = [title for _, title, line in found if LINES[line - 2] != RULE or LINES[line] != RULE]
    assert not odd, f"banners between two lines of {RULE[:12]}...: {odd}"


def test_every_section_has_its_test_file():
    files = {int(path.name[5:7]) for path in Path(__file__).parent.glob("test_[0-9][0-9]_*.py")}
    assert {number for number, _, _ in banners()} <= files


def test_line_ceilings():
    assert sum(most for _, most in SECTIONS.values()) <= MOST_LINES
    found = banners()
    ends = [line for _, _, line in found[1:]] + [len(LINES) + 2]
    counts = {number: end - begin for (number, _, begin), end in zip(found, ends, strict=True)}
    counts[0] = found[1][2] - 2  # from the first line of the file
    table = "\n".join(f"§{n:<2} {c:4} of {SECTIONS[n][1]}{' <-- too long' * (c > SECTIONS[n][1])}"
                      for n, c in counts.items())
    assert all(count <= SECTIONS[number][1] for number, count in counts.items()), "\n" + table
    assert len(LINES) <= MOST_LINES


def test_ceiling_of_the_data_tool():
    counts = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("caseops/*.py")}
    assert sum(counts.values()) <= MOST_DATA_LINES, counts


@pytest.mark.parametrize("path", sorted(
    path for part in ("", "caseops/", "bench/", "tests/") for path in ROOT.glob(f"{part}*.py")),
    ids=lambda path: path.name)
def test_lines_are_at_most_100_columns(path):
    long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long


def test_functions_are_short():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node, _ in definitions()
               if isinstance(node, ast.FunctionDef)}
    assert not {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION}


def test_public_names_have_docstrings():
    bare = {node.name for node, inside in definitions()
            if not inside and not node.name.startswith("_") and not ast.get_docstring(node)}
    methods = {"forward", "backward", "__init__"}
    assert bare - methods - NO_DOCSTRING == set()


def test_nothing_is_defined_in_vain():
    """Every top-level name is used: in the program, or by the files around it (then say which)."""
    elsewhere: set[str] = set()
    names = [node.name for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names += [target.id for node in TREE.body if isinstance(node, ast.Assign)
              for target in node.targets if isinstance(target, ast.Name)]
    once = {name for name in names if len(re.findall(rf"\b{name}\b", SOURCE)) < 2}
    assert once <= elsewhere
    assert len(names) == len(set(names)), "a name is defined twice"


def test_forbidden_constructs():
    for node in ast.walk(TREE):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name not in ("pickle.load", "pickle.loads", "os.system"), node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), node.lineno
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load":
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            if getattr(node.func.value, "id", "") == "torch":
                assert options["weights_only"].value is True, node.lineno


def test_dependencies_point_upwards():
    """A section's code, run at import, uses only what stands above: Python sees to that. Here: no
    function body of §1-§13 names anything that only §14 or §15 defines."""
    found = {number: line for number, _, line in banners()}
    own = {node.name: node.lineno for node in TREE.body
           if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    late = {name for name, line in own.items() if line > found[14]}
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno < found[14]:
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            local = {n.id for n in names if isinstance(n.ctx, ast.Store)}
            local |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
            used = {n.id for n in names} - local
            assert not used & late, f"{node.name} uses {used & late}"


def test_every_setting_is_read():
    """A setting that nothing reads is a promise that nothing keeps."""
    start = next(n for n in TREE.body if getattr(n, "name", "") == "Config")
    fields = "\n".join(LINES[start.lineno - 1:start.end_lineno])
    rest = SOURCE.replace(fields[:fields.index("def from_env")], "")
    rest += (ROOT / "variants.py").read_text()
    for name in t.SETTINGS:
        used = re.search(rf"\.{name.lower()}\b|[\"']{name.lower()}[\"']", rest)
        assert used, f"{name} is read nowhere"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_known(name):
    path = ROOT / "presets" / f"{name}.env"
    cfg = t.Config.from_env({"PRESET": name}, ROOT)
    assert cfg == t.Config.from_env({"PRESET": str(path)})
    assert "# Launch:" in path.read_text()


def test_best_is_the_default():
    assert t.Config.from_env({"PRESET": "best"}, ROOT) == t.Config()


def test_pr1855_is_the_record():
    """All that the record's program and command had otherwise than the defaults."""
    assert t.Config.from_env({"PRESET": "pr1855"}, ROOT) == replace(
        t.Config(), ema_horizon_frac=0.0, muon_momentum_warmup_frac=0.0,
        seq_change_warmup_frac=0.0, warmup_steps=20, matrix_lr=0.026, leaky_relu_slope=0.5,
        qk_gain_init=5.0, train_seq_len=2048,
        train_seq_schedule="", seq_change_warmup_steps=0, gptq_reserve_seconds=0.5,
        quantiser="uniform", compressor="pergroup", eval_seq_len=2048, ttt_eval_seq_len=2048,
        ttt_batch_size=64, ttt_chunk_size=48, ttt_stream=False, phased_ttt_num_phases=3,
        ngram_tilt_enabled=False)


def test_presets_say_only_what_differs():
    """From the preset that one starts from; pr1855 says what its command named, too."""
    for path in (ROOT / "presets" / f"{name}.env" for name in PRESETS):
        own = dict(re.findall(r"^([A-Z0-9_]+)=([^ #\n]*)", path.read_text(), re.MULTILINE))
        if base := own.pop("PRESET", None):
            values = vars(t.Config.from_env({"PRESET": base, "ALLOW_ILLEGAL": "1"}, ROOT))
            for name, text in own.items():
                value = t.parse_value(t.SETTINGS[name], text, name)
                assert value != values[name.lower()] or name == "ALLOW_ILLEGAL", (path.stem, name)


IMPORT = """
import os, sys, collections
import numpy, numba, torch, brotli
try:
    import triton, triton.language, triton.tools.tensor_descriptor
except ImportError:
    pass
read = []
class Watched(collections.UserDict):
    def __getitem__(self, key):
        read.append(key)
        return super().__getitem__(key)
    def __contains__(self, key):
        read.append(key)
        return super().__contains__(key)
os.environ = Watched(dict(os.environ))
state, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
import train_gpt
names = {*train_gpt.SETTINGS, *train_gpt.FIXED, "PRESET", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
ours = names & set(read)
assert not ours, ours
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(state, torch.get_rng_state())
assert (dtype, threads) == (torch.get_default_dtype(), torch.get_num_threads())
assert "sentencepiece" not in sys.modules and "python_minifier" not in sys.modules
assert os.listdir() == [], os.listdir()
"""


def test_import_does_nothing(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path.parent), "PYTHONPATH": str(ROOT),
           "PYTHONDONTWRITEBYTECODE": "1", "PRESET": "nosuch", "MODEL_DIM": "x", "TTT_RNAK": "1",
           "WORLD_SIZE": "3", "RANK": "x"}
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=env, text=True,
                         capture_output=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
