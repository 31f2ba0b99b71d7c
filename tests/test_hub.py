"""caseops/hub.py against a small HTTP server that speaks the hub's endpoints."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import prepare_caseops_data as prep  # noqa: E402
from caseops import hub  # noqa: E402
from tests.test_prepare import english, model, tree, write_docs  # noqa: E402, F401 - fixtures

VOCAB = 420
LARGE = (".bin", ".model", ".jsonl")  # what the hub keeps in LFS


class Handler(http.server.BaseHTTPRequestHandler):
    """Repository information, file tree, and files with ranges."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server, path = self.server, self.path.split("?")[0].removeprefix("/")
        server.asked.append((self.command, path, self.headers.get("Range")))
        repo = f"datasets/{server.repository}"
        if server.down:
            self.send_error(503)
        elif path in (f"api/{repo}", f"api/{repo}/revision/{server.commit}"):
            self.reply(json.dumps({"id": server.repository, "sha": server.commit}).encode(), body)
        elif path.startswith(f"api/{repo}/tree/{server.commit}"):
            self.reply(json.dumps([self.entry(n) for n in server.files]).encode(), body)
        elif path.removeprefix(f"{repo}/resolve/{server.commit}/") in server.files:
            self.file(path.removeprefix(f"{repo}/resolve/{server.commit}/"), body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def entry(self, name):
        data = self.server.files[name]
        entry = {"type": "file", "path": name, "size": len(data),
                 "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data),
                            "pointerSize": 130}
        return entry

    def file(self, name, body):
        if name.endswith(LARGE) and "cdn" not in self.path:  # kept elsewhere
            self.reply(b"", body, 302, {"Location": self.path + "?cdn"})
            return
        data = self.server.sent.get(name, self.server.files[name])
        if data is None:
            self.reply(b"", body, 404, {"X-Error-Code": "EntryNotFound"})
            return
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        self.reply(data[start:], body, 206 if start else 200, {
            "ETag": f'"{hashlib.sha256(self.server.files[name]).hexdigest()}"',
            "X-Repo-Commit": self.server.commit, "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} | (
                {"X-Linked-Size": str(len(data))} if name.endswith(LARGE) else {}))

    def reply(self, data, body, code=200, headers=None):
        cut = self.server.cut if body and len(data) > 10_000 else None
        if cut:  # three broken answers, then none
            self.server.broken += 1
            self.server.down = self.server.broken == 3
        self.send_response(code)
        for key, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            whole = data[:cut]
            with contextlib.suppress(ConnectionError):  # the client was killed
                self.wfile.write(whole[:self.server.stall])
                if self.server.stall and len(whole) > self.server.stall:
                    self.server.stalled.wait(60)
                self.wfile.write(whole[self.server.stall or len(whole):])


@pytest.fixture(scope="module")
def published(model, english, tmp_path_factory):  # noqa: F811
    """{path in the repository: bytes}: a set as the hub has it, of our own making."""
    out = tmp_path_factory.mktemp("published")
    docs = write_docs(out / "d.jsonl", english[:30])
    manifest = prep.prepare(docs, out, sp=model, val_docs=9, shard_tokens=20_000)
    folder, = (out / "datasets").iterdir()
    files = {f"datasets/datasets/{hub.SET}/{p.name}": p.read_bytes()
             for p in folder.glob("*.bin")}
    totals = manifest["totals"]
    stats = {"files_train": totals["train"]["files"], "tokens_val": totals["val"]["tokens"],
             "docs_val": 9, "docs_train": 21}
    files["datasets/manifest.json"] = json.dumps({
        "num_docs": 30, "num_val_docs": 9, "datasets": [{"name": hub.SET, "stats": stats}],
        "tokenizers": []}).encode()
    files[f"datasets/tokenizers/{hub.TOKENIZER}"] = Path(model).read_bytes()
    files["datasets/docs_selected.jsonl"] = docs.read_bytes()
    files["datasets/docs_selected.source_manifest.json"] = json.dumps(
        {"docs_val": 9, "num_docs": 30, "docs_bytes": docs.stat().st_size}).encode()
    return files


@pytest.fixture
def serving(published):
    """The running server; its attributes say what it holds and how it fails."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.sent, server.asked = dict(published), {}, []
    server.down, server.cut, server.broken, server.commit = False, None, 0, "c" * 40
    server.stall, server.stalled = None, threading.Event()
    server.repository = "someone/some-set"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(serving, monkeypatch):
    """The server, and the library of this process pointed to it, without its waits."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http
    for module in (file_download, _http):  # it waits before it tries again
        monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    address = f"http://127.0.0.1:{serving.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", serving.repository)
    monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
    return serving


# ---- the command in a process of its own, with the library as it is ------------------------------


class Tool:
    """The data tool as a user starts it; the hub's address comes by HF_ENDPOINT."""

    def __init__(self, server, home):
        self.environ = {k: v for k, v in os.environ.items()
                        if not k.startswith(("HF_", "MATCHED_")) and "proxy" not in k.lower()} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home),
            "MATCHED_FINEWEB_REPO_ID": server.repository}

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, prep.__file__, "--download", *map(str, arguments)], text=True,
            env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def fetch(self, *arguments):
        run = self.start(*arguments)
        out, error = run.communicate(timeout=60)
        return run.returncode, out, error

    def fails(self, said, *arguments):
        code, _, error = self.fetch(*arguments)
        lines = [x for x in error.splitlines() if "B/s]" not in x]  # the library's bars
        assert (code, len(lines)) == (2, 1), error
        assert lines[0].startswith("error: "), error
        assert said in lines[0], error


@pytest.fixture
def tool(serving, tmp_path_factory):
    return Tool(serving, tmp_path_factory.mktemp("home"))


def test_the_command_fetches_the_set(serving, tool, published, tmp_path):
    code, out, error = tool.fetch("caseops", "--out", tmp_path)
    assert code == 0, error
    assert "all hashes and headers are right" in out
    for name, data in published.items():
        if name.startswith("datasets/datasets/"):
            assert (tmp_path / "datasets" / hub.SET / Path(name).name).read_bytes() == data


def test_a_killed_download_goes_on_with_the_bytes_it_has(serving, tool, tmp_path):
    name = f"datasets/{hub.DOCS[0]}"
    serving.files[name] = b'{"text": "A document of some words."}\n' * 700_000
    told = f"datasets/{hub.DOCS[1]}"
    serving.files[told] = json.dumps({"docs_bytes": len(serving.files[name])}).encode()
    serving.stall = 15_000_000  # the library hands over 10 MB at a time
    run = tool.start("docs", "--out", tmp_path)
    deadline, size = time.monotonic() + 60, 0
    while size < 10_000_000 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
        size = sum(p.stat().st_size for p in tmp_path.glob(".download/*.part"))
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=30)
    assert run.returncode == -signal.SIGKILL
    assert 10_000_000 <= size < len(serving.files[name])
    assert not (tmp_path / hub.DOCS[0]).exists()
    serving.stall = None
    serving.stalled.set()
    serving.asked.clear()
    code, out, error = tool.fetch("docs", "--out", tmp_path)
    assert code == 0, error
    assert next(r for _, _, r in serving.asked if r) == f"bytes={size}-"
    assert (tmp_path / hub.DOCS[0]).read_bytes() == serving.files[name]
    assert not (tmp_path / ".download").exists()


def test_failures_of_the_command_are_one_line(serving, tool, tmp_path):
    side = f"datasets/datasets/{hub.SET}/fineweb_val_bytes_000000.bin"
    whole = serving.files[side]
    serving.sent[side] = whole[:-2] + b"\1\1"
    tool.fails("fineweb_val_bytes_000000.bin came with hash", "caseops", "--out", tmp_path / "a")
    serving.sent[side] = None  # listed, but not there any more
    tool.fails("fineweb_val_bytes_000000.bin: RemoteEntryNotFoundError: 404", "caseops", "--out",
               tmp_path / "b")
    tool.environ["HF_HUB_OFFLINE"] = "1"
    tool.fails("HF_HUB_OFFLINE", "caseops", "--out", tmp_path / "c")
    del tool.environ["HF_HUB_OFFLINE"]
    tool.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    tool.fails("check the network", "caseops", "--out", tmp_path / "d")


# ---- in this process -----------------------------------------------------------------------------


def fetch(out, *arguments):
    return prep.main(["--download", "caseops", "--out", str(out), *arguments])


def fails(out, said, capsys, *arguments):
    capsys.readouterr()
    assert fetch(out, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert said in error, error


def test_the_set_is_fetched_checked_and_completed(server, published, tmp_path, capsys):
    folder = tmp_path / "datasets" / hub.SET
    assert fetch(tmp_path, "--train-shards", "1") == 0
    train = [n for n in published if "fineweb_train" in n]
    assert len(train) > 2
    assert len(list(folder.glob("fineweb_train_*"))) == 1
    one = json.loads((folder / "manifest.json").read_text())
    assert one["totals"]["train"]["files"] == 1
    server.asked.clear()
    assert fetch(tmp_path) == 0
    fetched = {path.split("/")[-1] for command, path, _ in server.asked if command == "GET"
               and "/resolve/" in path}
    assert fetched == {Path(n).name for n in train} - {"fineweb_train_000000.bin"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["totals"]["train"]["documents"] == 21
    assert manifest["totals"]["val"]["documents"] == 9
    assert manifest["tokenizer"]["vocab_size"] == VOCAB
    for name, data in published.items():
        if name.startswith("datasets/datasets/"):
            assert (folder / Path(name).name).read_bytes() == data
    assert {p.name for p in tmp_path.iterdir()} == {"datasets", "tokenizers"}
    assert "all hashes and headers are right" in capsys.readouterr().out
    assert fetch(tmp_path, "--train-shards", "1") == 0
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_the_documents_are_fetched(server, published, tmp_path, capsys):
    assert prep.main(["--download", "docs", "--out", str(tmp_path)]) == 0
    assert tree(tmp_path) == {Path(n).name: d for n, d in published.items() if "docs_sel" in n}
    assert "--name fineweb10B --val-docs 9" in capsys.readouterr().out


def test_a_broken_transfer_goes_on_where_it_stopped(server, published, tmp_path, capsys):
    server.cut = 4000
    fails(tmp_path, "go on", capsys)
    part, = (tmp_path / ".download").iterdir()
    size = part.stat().st_size
    assert size == 12_000
    server.cut, server.down = None, False
    server.asked.clear()
    assert fetch(tmp_path) == 0
    assert next(r for _, _, r in server.asked if r) == f"bytes={size}-"
    assert not part.parent.exists()


def test_failures_are_one_line(server, published, tmp_path, capsys, monkeypatch):
    fails(tmp_path / "a", "--train-shards 99: someone/some-set has 4", capsys,
          "--train-shards", "99")
    side = f"datasets/datasets/{hub.SET}/fineweb_val_bytes_000000.bin"
    whole = server.files[side]
    server.sent[side] = whole[:-2] + b"\1\1"
    fails(tmp_path / "b", "fineweb_val_bytes_000000.bin came with hash", capsys)
    server.sent.clear()
    server.files[side] = whole[:1024] + b"\7\0" + whole[1026:]
    fails(tmp_path / "c", "does not fit fineweb_val_000000.bin", capsys)
    server.files[side] = whole[:500]
    fails(tmp_path / "d", "not a shard of this format", capsys)
    del server.files[side]
    fails(tmp_path / "e", "no fineweb_val_bytes_000000.bin", capsys)
    server.files[side] = whole
    told = json.loads(published["datasets/manifest.json"])
    told["datasets"][0]["stats"]["tokens_val"] = 5
    server.files["datasets/manifest.json"] = json.dumps(told).encode()
    assert fetch(tmp_path / "f") == 0
    assert "note: published.json says tokens_val 5" in capsys.readouterr().out
    server.files["datasets/manifest.json"] = b"[not a manifest we know"
    assert fetch(tmp_path / "g") == 0
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("U", (), {"free": 10}))
    fails(tmp_path / "h", "free some space", capsys)
    assert not (tmp_path / "h").exists()


def test_disk_that_fills_is_told(server, tmp_path, capsys, monkeypatch):
    from huggingface_hub import file_download

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(file_download, "http_get", full)
    fails(tmp_path, "No space left on device; free some space", capsys)


def test_no_such_repository_and_no_network(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "no/such")
    fails(tmp_path / "a", "no/such: RepositoryNotFoundError", capsys)
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fails(tmp_path / "a", "no/such: ConnectError", capsys)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(tmp_path / "a", "pip install -r requirements-data.txt", capsys)
    assert not (tmp_path / "a").exists()


def test_another_set_is_not_mixed_with_the_published_one(server, tmp_path, capsys):
    folder = tmp_path / "datasets" / hub.SET
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"tokenizer": {"sha256": "0123"}}')
    np.zeros(600, "<u2").tofile(folder / "fineweb_train_000000.bin")
    fails(tmp_path, "a data set of another tokenizer", capsys)
    (folder / "manifest.json").unlink()
    fails(tmp_path, "fineweb_train_000000.bin: a shard of another set", capsys)
    (folder / "fineweb_train_000000.bin").unlink()
    assert fetch(tmp_path, "--train-shards", "1") == 0
    (folder / "manifest.json").unlink()  # as if killed before the end
    assert fetch(tmp_path) == 0
    next((tmp_path / "tokenizers").iterdir()).write_bytes(b"mine")
    fails(tmp_path, "another tokenizer of this name", capsys)
