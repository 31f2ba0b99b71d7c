"""Fixtures, the order of the files, and the machine's threads."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PRESET"):  # the suite itself is one process
    os.environ.pop(name, None)

import train_gpt as t  # noqa: E402
from tests import tools  # noqa: E402


def pytest_collection_modifyitems(items):
    """The smallest whole-stack test first, then the structure, then the sections."""
    items.sort(key=lambda item: item.path.name != "test_tiny.py")


@pytest.fixture
def tiny():
    """A factory of tiny configurations."""
    return tools.tiny


@pytest.fixture
def rt():
    """The runtime of one process on the CPU."""
    return tools.runtime()


@pytest.fixture
def data(tmp_path):
    """A folder of small shards with a byte sidecar."""
    return tools.write_data(tmp_path / "data")


@pytest.fixture(scope="session")
def shared_golden():
    """Folder of the reference figures; a test that needs it is skipped where it is absent."""
    folder = tools.SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder}: reference figures are not on this machine")
    return folder


@pytest.fixture
def program(monkeypatch, tmp_path, data, capsys):
    """Runs main() in this process: program(NAME=value, ...) -> (exit code, stdout, stderr)."""
    for name in [name for name in os.environ if t.is_ours(name) or name == "PRESET"]:
        monkeypatch.delenv(name)

    def call(**settings):
        given = {**tools.TINY, "DATA_PATH": data, "ARTIFACT_DIR": tmp_path / "out",
                 "RUN_ID": "log", **settings}
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train_gpt.py"])
            for name, value in given.items():
                if value is not None:
                    patch.setenv(name, str(value))
            code = t.main()
        out, err = capsys.readouterr()
        return code, out, err

    call.out, call.data = tmp_path / "out", data
    return call
