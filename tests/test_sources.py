"""caseops/sources.py and workers.py: formats, damage, order, memory, processes that die."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import prepare_caseops_data as prep  # noqa: E402
from caseops import UserError, sources, workers  # noqa: E402
from caseops import encoder as encoding  # noqa: E402
from tests.test_prepare import (  # noqa: E402, F401 - fixtures
    SET,
    english,
    fails,
    model,
    tree,
    write_docs,
)
from tests.tools import hear_ctrl_c  # noqa: E402

TOOL = str(ROOT / "prepare_caseops_data.py")


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


def parquet(data, *, group=7, column="text", **options):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(arrow.table({"id": list(range(len(texts))), column: texts}), sink,
                                row_group_size=group, write_page_checksum=True, **options)
    return sink.getvalue()


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstd, "xz": lzma.compress,
        "parquet": parquet}


@pytest.fixture(scope="module")
def texts(english):  # noqa: F811
    return [t[:3000] for t in english[:40]] + ["", " \n", "é\u2581", "x" * 5000] + english[40:60]


@pytest.fixture(scope="module")
def plain(texts, tmp_path_factory):
    return write_docs(tmp_path_factory.mktemp("plain") / "docs.jsonl", texts)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few documents, so that a small input has many."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1500)


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("misnamed", [False, True])
def test_every_format_gives_the_same_documents(kind, misnamed, plain, texts, tmp_path,
                                               small_chunks):
    path = tmp_path / ("docs.txt" if misnamed else f"docs.{kind}")
    path.write_bytes(PACK[kind](plain.read_bytes()))
    source = sources.Source(path)
    assert [d.text for d in source] == texts
    assert source.position == source.size == path.stat().st_size
    assert source.digests == [sources.hashlib.sha256(path.read_bytes()).hexdigest()]
    assert len(list(source.chunks())) > 1


def test_two_members_and_padding_are_one_stream(plain, texts, tmp_path):
    lines = plain.read_bytes().splitlines(keepends=True)
    for kind in ("gz", "zst", "xz"):
        packed = b"".join(PACK[kind](b"".join(part)) for part in (lines[:5], lines[5:]))
        (tmp_path / kind).write_bytes(packed + b"\0" * (512 if kind == "gz" else 0))
        assert [d.text for d in sources.Source(tmp_path / kind)] == texts
    for zeros in (sources.PACKED_BYTES, 3 * sources.BLOCK_BYTES):  # in blocks of their own
        (tmp_path / "gz").write_bytes(PACK["gz"](plain.read_bytes()) + b"\0" * zeros)
        assert [d.text for d in sources.Source(tmp_path / "gz")] == texts


def test_zstd_may_begin_with_a_frame_to_be_skipped(plain, texts, tmp_path):
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"  # as pzstd writes it
    (tmp_path / "d").write_bytes(skipped + zstd(plain.read_bytes()) + skipped)
    assert [d.text for d in sources.Source(tmp_path / "d")] == texts


def test_chunks_end_at_the_held_out_documents(plain, texts, tmp_path, small_chunks):
    (tmp_path / "p").write_bytes(parquet(plain.read_bytes()))
    for path in (plain, tmp_path / "p"):
        for n in (1, 7, 8, 43, len(texts)):
            chunks = list(sources.Source(path).chunks(n))
            held = [d.text for c in chunks if c.held_out for d in c.parse()]
            rest = [d.text for c in chunks if not c.held_out for d in c.parse()]
            assert held == texts[:n]
            assert held + rest == texts


def test_lines_longer_than_a_chunk(tmp_path, small_chunks):
    rows = ["a", "b" * 50_000, "c", "d" * 9_000, "e" * 9_000]
    source = sources.Source(write_docs(tmp_path / "d.jsonl", rows))
    assert [(d.text, d.line) for d in source] == list(zip(rows, range(1, 6), strict=True))


def test_several_files_and_a_directory(plain, texts, tmp_path, model):  # noqa: F811
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (folder / "a.parquet").write_bytes(parquet(plain.read_bytes()))
    (folder / "notes.txt").write_text("not ours")
    source = sources.Source([folder, plain])
    assert [Path(p).name for p in source.paths] == ["a.parquet", "b.jsonl.gz", "docs.jsonl"]
    assert [d.text for d in source] == texts * 3
    manifest = prep.prepare([folder, plain], tmp_path / "o", sp=model, val_docs=len(texts) + 3)
    assert [f["file"] for f in manifest["source"]["files"]] == ["a.parquet", "b.jsonl.gz",
                                                               "docs.jsonl"]
    assert manifest["source"]["bytes"] == source.size
    equal = manifest["split"]["train_documents_equal_to_validation"]
    assert equal == manifest["split"]["train_documents"]


def test_text_column(plain, tmp_path, capsys):
    (tmp_path / "p").write_bytes(parquet(plain.read_bytes(), column="body"))
    assert len(list(sources.Source(tmp_path / "p", "body"))) == 64
    with pytest.raises(UserError, match="no column 'text'; give --text-column one of id, body"):
        sources.Source(tmp_path / "p")
    with pytest.raises(UserError, match="column 'id' holds int64, not strings"):
        sources.Source(tmp_path / "p", "id")
    (tmp_path / "j").write_text('{"body": "x"}\n')
    assert [d.text for d in sources.Source(tmp_path / "j", "body")] == ["x"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    table = arrow.table([arrow.array(["a"]), arrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(UserError, match="2 columns 'text'"):
        sources.Source(tmp_path / "d.parquet")


def test_null_in_parquet_names_its_row(tmp_path, model, capsys):  # noqa: F811
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    table = arrow.table({"text": ["a", "b", "c", None, "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "p", row_group_size=2)
    fails(["--docs", tmp_path / "p", "--sp", model, "--out", tmp_path / "o", "--val-docs", 1],
          f'{tmp_path / "p"}:row 4: "text" must be a string, not NoneType', capsys)


@pytest.mark.parametrize("kind", ["zst", "parquet"])
def test_packages_in_a_process_of_its_own(kind, plain, tmp_path, model):  # noqa: F811
    """A submodule that nobody imported is no attribute of its package."""
    (tmp_path / "f").write_bytes(PACK[kind](plain.read_bytes()))
    done = run_tool("--docs", tmp_path / "f", "--sp", model, "--out", tmp_path / "o", "-j", 1,
                    "--val-docs", 9)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("module", "kind"), [("zstandard", "zst"), ("pyarrow", "parquet")])
def test_missing_package_is_told_before_anything_else(module, kind, plain, tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(PACK[kind](plain.read_bytes()))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"needs {module}; pip install -r requirements-data.txt"):
        sources.Source(tmp_path / "f")


def test_dictionary_encoded_parquet_is_read(tmp_path, small_chunks):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = ["one", "two", None, "one"] * 300
    column = arrow.array(rows).dictionary_encode()
    pyarrow.parquet.write_table(arrow.table({"id": range(1200), "text": column}), tmp_path / "d")
    source = sources.Source(tmp_path / "d")
    with pytest.raises(UserError, match='d:row 3: "text" must be a string, not NoneType'):
        list(source)
    column = arrow.array([x or "three" for x in rows]).dictionary_encode()
    pyarrow.parquet.write_table(arrow.table({"text": column}), tmp_path / "d", row_group_size=500)
    assert [d.text for d in sources.Source(tmp_path / "d")] == ["one", "two", "three", "one"] * 300
    numbers = arrow.array([1, 2]).dictionary_encode()
    pyarrow.parquet.write_table(arrow.table({"text": numbers}), tmp_path / "d")
    with pytest.raises(UserError, match="holds dictionary<.*, not strings|holds int64"):
        sources.Source(tmp_path / "d")


def test_values_of_other_keys_matter_nowhere(tmp_path):
    """Whole numbers beyond Python's limit, and a byte order mark where files were joined."""
    raw = '{"text": "a", "id": ' + "9" * 6000 + ', "n": [-' + "1" * 5000 + ']}\n'
    (tmp_path / "d").write_text(raw + '\ufeff{"text": "b"}\n \ufeff"c"\n', encoding="utf-8")
    found = iter(sources.Source(tmp_path / "d"))
    assert [next(found).text, next(found).text] == ["a", "b"]
    with pytest.raises(UserError, match="d:3: not JSON"):  # a blank before the mark
        next(found)


def test_another_key_is_named(tmp_path):
    for value, said in [
            ({"content": "x", "title": "y", "n": 3}, "but 'content', 'title': give --text-column"),
            ({f"k{i}": "x" for i in range(20)}, "'k7', ...: give --text-column"),
            ({"row": {"text": "x"}}, 'only inside of "row", which is not read'),
            ({"n": 3}, 'the object has no "text"; mend')]:
        (tmp_path / "d").write_text(json.dumps(value) + "\n")
        with pytest.raises(UserError, match=f"d:1: .*{said}"):
            list(sources.Source(tmp_path / "d"))


OBJECTS = [{"text": f"Document {i}."} for i in range(40)]
LINES = "".join(json.dumps(x) + "\n" for x in OBJECTS)
OTHER_FORMATS = {
    "array": (json.dumps(OBJECTS), "one JSON array, not JSON lines; .*jq -c"),
    "long array": (json.dumps(OBJECTS * 9000), "one JSON array"),
    "pretty array": ("\ufeff" + json.dumps(OBJECTS, indent=1), "one JSON array"),
    "array of lines": ("[" + LINES.replace("}\n", "},\n")[:-2] + "]", "one JSON array"),
    "pretty object": (json.dumps(OBJECTS[0], indent=1), "JSON over several lines"),
    "cr": (LINES.replace("\n", "\r"), "lines that end in CR alone; .*tr "),
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 4\n", "Git LFS"),
    "utf-16": (LINES.encode("utf-16"), "UTF-16 or UTF-32, not UTF-8; .*iconv"),
    "utf-16-be": (LINES.encode("utf-16-be"), "UTF-16"),
    "utf-32": (LINES.encode("utf-32"), "UTF-16 or UTF-32"),
    "csv": ("id,text\n1,one\n2,two\n", "CSV, TSV or plain text, not JSON lines; convert"),
    "quoted csv": ('"id","text"\n1,"one"\n', "CSV, TSV"), "tsv": ("text\tid\na\t1\n", "TSV"),
    "plain": ("Once upon a time\nthere was\n", "plain text"), "html": ("<html>", "HTML"),
    "zip": (b"PK\3\4" + b"\0" * 600, "a zip archive, not JSON lines or Parquet; unpack"),
    "tar": (b"d.jsonl".ljust(257, b"\0") + b"ustar\0" + b"\0" * 249, "a tar archive"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_a_file_of_another_format_is_called_by_its_name(kind, pack, tmp_path):
    data, said = OTHER_FORMATS[kind]
    (tmp_path / "d.jsonl").write_bytes(pack(data if isinstance(data, bytes) else data.encode()))
    with pytest.raises(UserError, match=f"d.jsonl: .*{said}") as e:
        sources.choose_val_docs(sources.Source(tmp_path / "d.jsonl"), 5)
    assert "\n" not in str(e.value)
    assert "mend or remove" not in str(e.value)


@pytest.mark.parametrize("head", ['["a list"]\n', "3\n", "{oops\n", '"oops\n'])
def test_a_bad_first_line_is_no_other_format(head, tmp_path):
    (tmp_path / "d").write_text(head + LINES)
    with pytest.raises(UserError, match="d:1: "):
        list(sources.Source(tmp_path / "d"))
    (tmp_path / "d").write_text('{"text": \r"a"}\r\r\n' + LINES, newline="")  # CR is white space
    assert len(list(sources.Source(tmp_path / "d"))) == 41


def test_links_to_nothing_and_empty_folders(tmp_path):
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="d.jsonl: no such file .a dangling link."):
        sources.Source(tmp_path / "d.jsonl")
    with pytest.raises(UserError, match="a directory without files that end in .*bz2"):
        sources.Source(tmp_path)


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("workers_", [1, 2])
def test_damaged_files_are_one_line(kind, workers_, plain, tmp_path, model, capsys):  # noqa: F811
    whole, random_ = PACK[kind](plain.read_bytes()), random.Random(1)
    if kind == "zst":  # zstd has no checksum unless asked for
        import zstandard
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(plain.read_bytes())
    path = tmp_path / "damaged"
    argv = ["--docs", path, "--sp", model, "--out", tmp_path / "o", "-j", workers_]
    damaged = [whole[:len(whole) // 2], whole[:-3]]
    for _ in range(3):
        at = random_.randrange(20, len(whole) - 20)
        if kind == "parquet":  # in the pages of the text, not in numbers that nobody reads
            at = whole.index(b"Help topic") if b"Help topic" in whole else len(whole) // 2
        damaged.append(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:])
    for data in damaged:
        path.write_bytes(data)
        fails(argv, f"{path}: ", capsys)
        path.write_bytes(data)
        with pytest.raises(UserError, match="break off at byte|damaged .*(byte|group|footer)"):
            list(sources.Source(path))
    assert not (tmp_path / "o").exists()


def test_nonsense_from_a_flipped_bit_is_told_as_damage(tmp_path, model, capsys):  # noqa: F811
    """Stored blocks: the text itself is hit, and only the checksum at the end tells."""
    data = b'{"text": "a"}\n' * 20
    packed = bytearray(gzip.compress(data, 0))
    packed[packed.index(b'{"text"') + 14 * 5] ^= 1
    (tmp_path / "d.gz").write_bytes(packed)
    for n in (1, 2):
        fails(["--docs", tmp_path / "d.gz", "--sp", model, "--out", tmp_path / "o", "-j", n,
               "--val-docs", 1], "damaged gzip data", capsys)


# ---- standard input ------------------------------------------------------------------------------


def run_tool(*argv, **options):
    return subprocess.run([sys.executable, TOOL, *map(str, argv)], capture_output=True,
                          timeout=120, check=False, **options)


def test_standard_input(plain, texts, tmp_path, model):  # noqa: F811
    prep.prepare(plain, tmp_path / "file", sp=model, val_docs=9)
    argv = ["--docs", "-", "--sp", model, "--val-docs", 9, "--out"]
    done = run_tool(*argv, tmp_path / "pipe", input=gzip.compress(plain.read_bytes()))
    assert (done.returncode, done.stderr) == (0, b"")
    one, two = ({n: d for n, d in tree(tmp_path / k).items() if n.endswith(".bin")}
                for k in ("file", "pipe"))
    assert one == two
    for arguments, data, said in [
            ([*argv, tmp_path / "x"], b'"a"\n' * 9, b"9 documents, none of them left to train on"),
            ([*argv, tmp_path / "x"], b"", b"0 documents"),
            ([*argv, tmp_path / "x"], parquet(plain.read_bytes()), b"cannot be read from a pipe"),
            (["--docs", "-", "--train-tokenizer", "--vocab-size", 300, "--out", tmp_path / "x"],
             b"", b"--train-tokenizer reads the input twice")]:
        done = run_tool(*arguments, input=data)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1
        assert said in done.stderr
        assert not (tmp_path / "x").exists()


# ---- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
def test_files_do_not_depend_on_the_number_of_workers(n, plain, tmp_path, model,  # noqa: F811
                                                      small_chunks):
    for workers_ in (1, n):
        prep.prepare(plain, tmp_path / str(workers_), sp=model, val_docs=9, shard_tokens=900,
                     workers=workers_)
    assert tree(tmp_path / "1") == tree(tmp_path / str(n))


@pytest.mark.parametrize("n", [1, 2])
def test_the_first_bad_document_is_told(n, texts, tmp_path, capsys, small_chunks,
                                        model):  # noqa: F811
    lines = [json.dumps({"text": t}) for t in texts]
    lines[30] = "{bad"
    lines[31] = "{worse"
    lines[-1] = "{worst"
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    fails(["--docs", tmp_path / "d.jsonl", "--sp", model, "--out", tmp_path / "o", "-j", n,
           "--val-docs", 3], ":31: not JSON", capsys)


def test_a_long_piece_before_a_bad_line_is_told_first(tmp_path, encoder_that_fails):
    path = tmp_path / "d.jsonl"
    path.write_text('"fine"\n"too long"\n{bad\n')
    chunk, = sources.Source(path).chunks()
    with pytest.raises(sources.DocumentProblem, match="d.jsonl:2: a piece too long"):
        workers.encode_chunk(encoder_that_fails, chunk)


@pytest.fixture
def encoder_that_fails():
    class Encoder:
        def encode_documents(self, texts, counts):
            raise encoding.DocumentError("a piece too long", texts.index("too long"))
    return Encoder()


def test_a_worker_that_dies_is_one_line(plain, tmp_path, model, monkeypatch, capsys,  # noqa: F811
                                        small_chunks):
    begin = workers.Pool.__init__

    def with_a_casualty(self, *arguments):
        begin(self, *arguments)
        os.kill(list(self.workers.values())[1].pid, signal.SIGKILL)
    monkeypatch.setattr(workers.Pool, "__init__", with_a_casualty)
    fails(["--docs", plain, "--sp", model, "--out", tmp_path / "o", "-j", 2],
          "a worker process ended by SIGKILL; run the same command again", capsys)


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(c) for t in tasks for c in t.read_text().split()]


def start_endless(tmp_path, model, *argv):  # noqa: F811
    """The tool on an endless standard input, and its child processes."""
    run = subprocess.Popen(
        [sys.executable, TOOL, "--docs", "-", "--sp", str(model), "--val-docs", "2", "--out",
         str(tmp_path / "o"), "-j", "2", "--shard-tokens", "200000", *argv],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=hear_ctrl_c)
    staged = tmp_path / "o" / "datasets" / (SET + ".partial") / "journal.json"
    line = json.dumps({"text": "Some English words, and more. " * 100}).encode() + b"\n"
    deadline = time.monotonic() + 60
    while not staged.exists() and time.monotonic() < deadline:
        run.stdin.write(line * 20)
    assert staged.exists()
    return run, children(run.pid)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_worker_survives(how, code, tmp_path, model):  # noqa: F811
    run, workers_ = start_endless(tmp_path, model)
    assert len(workers_) >= 2
    for pid in [run.pid, *workers_] if how == signal.SIGINT else [run.pid]:  # as a terminal does
        os.kill(pid, how)
    _, error = run.communicate(timeout=30)
    assert run.returncode == code
    if how == signal.SIGINT:
        assert error.startswith(b"interrupted; the old files are as they were; ")
        assert error.count(b"\n") == 1
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{p}").exists() for p in workers_) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{p}").exists() for p in workers_)


def test_a_failed_write_ends_the_workers_in_one_line(tmp_path, model):  # noqa: F811
    line = json.dumps({"text": "The words of one document.\n" * 150}) + "\n"
    (tmp_path / "d.jsonl").write_text(line * 1500)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    done = run_tool("--docs", tmp_path / "d.jsonl", "--sp", model, "--val-docs", 9, "-j", 2,
                    "--out", tmp_path / "o", preexec_fn=limit)
    assert done.returncode == 2
    assert b"File too large" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "o").exists()


MEASURE = """
import re, sys
from pathlib import Path
import prepare_caseops_data as prep
if __name__ == "__main__":
    assert prep.main(sys.argv[1:]) == 0
    # not getrusage: its maximum begins with that of the process that started this one
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_input(tmp_path, model):  # noqa: F811
    """The parent of two workers, on 6 MB of input and on eight times that."""
    script, peaks = tmp_path / "measure.py", []
    script.write_text(MEASURE)
    line = json.dumps({"text": "The words of one document.\n" * 150}) + "\n"
    for megabytes in (6, 48):
        path = tmp_path / "big.jsonl"
        path.write_text(line * (megabytes * 1_000_000 // len(line)))
        done = subprocess.run(
            [sys.executable, str(script), "--docs", str(path), "--sp", str(model), "--val-docs",
             "100", "-j", "2", "--out", str(tmp_path / f"o{megabytes}")], capture_output=True,
            text=True, timeout=120, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 20
    assert peaks[1] < 250


# ---- output that nobody reads --------------------------------------------------------------------


@pytest.mark.parametrize("stdout", ["pipe", "/dev/full"])
def test_output_that_cannot_be_written(stdout, plain, tmp_path, model):  # noqa: F811
    for argv in (["--docs", plain, "--sp", model, "--out", tmp_path / "o"], ["--help"]):
        read, write = os.pipe()
        if stdout != "pipe":
            write = os.open(stdout, os.O_WRONLY)
        os.close(read)
        done = subprocess.run([sys.executable, TOOL, *map(str, argv)], stdout=write, check=False,
                              stderr=subprocess.PIPE, timeout=60)
        os.close(write)
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr
        assert done.stderr.count(b"\n") <= 1
    folder = tmp_path / "o" / "datasets" / SET
    assert (folder / "manifest.json").exists()
    for closed, *argv in (["<&-", "--docs", "-", "--sp", model, "--out", tmp_path / "c"],
                          [">&-", "--export", folder], [">&-", "--audit", folder]):
        done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, TOOL,
                               *map(str, argv)], check=False, stderr=subprocess.PIPE, timeout=60)
        told = [b"closed"] if "--audit" not in argv else []
        assert [b"closed" for x in done.stderr.splitlines() if b"is closed; " in x] == told
        assert done.stderr.count(b"\n") == len(told)
    export = subprocess.Popen([sys.executable, TOOL, "--export", str(folder)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    export.stdout.close()
    assert export.stderr.read() == b""
    assert export.wait(60) == 128 + signal.SIGPIPE
