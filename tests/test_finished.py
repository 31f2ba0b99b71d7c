"""finished.py: settings and figures of a finished run; the audit of its folder."""

import json
import os
import re
import shutil

import pytest

import finished
import legality
import train_gpt as t
from tests.tools import ROOT, TINY, launch, write_data

OTHER = {"LOGIT_SOFTCAP": "20", "NUM_LOOPS": "2", "TTT_LORA_RANK": "3", "NGRAM_TILT_ENABLED": "1",
         "ROPE_DIMS": "6", "LN_SCALE": "0", "MLP_MULT": "1.5", "SMEAR_GATE_ENABLED": "0"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run with settings of its own."""
    place = tmp_path_factory.mktemp("finished")
    t.run({**TINY, **OTHER, "DATA_PATH": str(write_data(place / "data")), "ITERATIONS": "2",
           "ARTIFACT_DIR": str(place / "out"), "RUN_ID": "log"})
    return place / "out"


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """main(argument, ..., NAME=value, ...) in an empty folder -> (code, stdout, stderr)."""
    for name in [n for n in os.environ if t.is_ours(n) or n == "PRESET"]:
        monkeypatch.delenv(name)

    def call(*arguments, **settings):
        (tmp_path / "here").mkdir(exist_ok=True)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / "here")
            patch.setattr(t.sys, "argv", ["train_gpt.py", *map(str, arguments)])
            for name, value in settings.items():
                patch.setenv(name, str(value))
            code = t.main()
        return code, *capsys.readouterr()
    return call


def values(cfg: t.Config) -> dict[str, str]:
    """What is not of the run itself."""
    return {n: x for n, x in t.changed(cfg).items() if n not in finished.OWN}


@pytest.mark.parametrize("without", ["", "log", "log, program"])
def test_settings_are_those_of_the_run(folder, without):
    """From its log, else from its program, else at least the architecture from the artifact."""
    if "log" in without:
        (folder / "log.txt").unlink()
    if "program" in without:
        (folder / t.PROGRAM_FILE).unlink()
    ran = t.Config.from_env({**TINY, **OTHER})
    own = finished.settings(folder)
    cfg = t.Config.from_env({}, ROOT, own, check=False)
    assert cfg.architecture() == ran.architecture()
    if "program" not in without:
        told = {n: x for n, x in values(cfg).items() if n != "DATA_PATH"}
        want = {n: x for n, x in values(ran).items() if n != "DATA_PATH"}
        assert {**want, "ITERATIONS": "2"} == told
        assert own["PRESET"] == "pr1855"
    assert bool(finished.record(folder)) == (without == "")


def test_only_the_log_of_this_very_artifact_counts(folder):
    text = (folder / "log.txt").read_text()
    (folder / "other.txt").write_text(re.sub(r'"TTT_LORA_RANK": "3"', '"TTT_LORA_RANK": "2"',
                                             text.replace(json.loads(text.splitlines()[-1])[
                                                 "result"]["bytes"]["sha256"][t.ARTIFACT_FILE],
                                                 "0" * 64)))
    os.utime(folder / "other.txt", (2e9, 2e9))
    assert finished.settings(folder)["TTT_LORA_RANK"] == "3"
    (folder / "broken.txt").write_text('{"result": []}\n{"result": {"bytes": 3}}\n')
    assert finished.record(folder)["seed"] == 1337


def test_scoring_again_needs_no_settings_and_leaves_the_folder_alone(folder, main, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, err = main(TTT_EVAL_ONLY=1, ARTIFACT_DIR=folder)
    assert code == 0, err
    line = r"^(?:diagnostic quantized|quantized_ttt_phased) (val_loss:\S+ val_bpb:\S+)"
    first = re.findall(line, before["log.txt"].decode(), re.MULTILINE)
    assert re.findall(line, out, re.MULTILINE) == first and len(first) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (log,) = (tmp_path / "here" / "logs").iterdir()
    assert log.name.endswith("-rescoring.txt") and log.name.startswith("20")
    assert "\npreset: pr1855\n" in log.read_text()
    code, out, err = main(TTT_EVAL_ONLY=1, ARTIFACT_DIR=folder, RUN_ID="mine", TTT_ENABLED=0)
    assert code == 0 and (folder / "mine.txt").is_file()  # where a name is given, there


@pytest.mark.parametrize(("setting", "words"), [
    ({"NUM_LOOPS": 1}, "made with NUM_LOOPS=2, the settings say 1; use the settings"),
    ({"MODEL_DIM": 64}, "made with MODEL_DIM=32, the settings say 64"),
    ({"LOGIT_SOFTCAP": 30}, "made with LOGIT_SOFTCAP=20.0, the settings say 30.0"),
    ({"PRESET": "cpu_demo"}, "made with VOCAB_SIZE=64, the settings say 1024")])
@pytest.mark.parametrize("arguments", [[], ["audit"]])
def test_what_contradicts_the_artifact_is_one_line(folder, main, setting, words, arguments):
    mode = {} if arguments else {"TTT_EVAL_ONLY": 1}
    code, out, err = main(*arguments, **mode, **setting, ARTIFACT_DIR=folder)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {folder}/{t.ARTIFACT_FILE}: {words}") and err.count("\n") == 1


def test_audit_of_a_folder_counts_its_checks(folder, main, monkeypatch):
    """Settings from the folder; the last line counts, the budget included."""
    seen = []

    def findings(bench, val, out, rt):
        seen.append(bench.cfg)
        out("legality: causality (plain): holds 0.1s")
        return []
    monkeypatch.setattr(legality, "findings", findings)
    code, out, err = main("audit", folder)
    assert code == 0, err
    assert re.match(r"legality: 2 of 2 checks hold \d", out.splitlines()[-1])
    assert "legality: budget: holds\n" in out
    assert seen[0].architecture() == t.Config.from_env({**TINY, **OTHER}).architecture()
    assert seen[0].ngram_tilt_enabled
    assert {path.name for path in folder.iterdir()} == {
        "log.txt", t.MODEL_FILE, t.ARTIFACT_FILE, t.PROGRAM_FILE}
    monkeypatch.chdir(folder)  # here, without an argument
    assert main("audit", ARTIFACT_DIR=folder)[0] == 0


def test_audit_says_which_check_did_not_hold(folder, main, monkeypatch):
    """A budget that the log says was spent; sizes that are not the log's."""
    monkeypatch.setattr(legality, "findings", lambda *_: [])
    log = folder / "log.txt"
    log.write_text(re.sub(r'"training": {"steps": 2, "seconds": [\d.]+',
                          '"training": {"steps": 2, "seconds": 700.0', log.read_text()))
    code, out, err = main("audit", folder)
    assert code == 2
    assert err.startswith("error: illegal: budget: training 700.0 s") and err.count("\n") == 1
    assert "legality: budget: VIOLATED\n" in out
    assert "legality: found: budget: training 700.0 s" in out
    assert "legality: 0 of 1 checks hold" in out.splitlines()[-1]
    log.unlink()
    code, out, err = main("audit", folder)
    assert code == 0, err
    assert "legality: budget: holds for the sizes; no log of this artifact tells the times" in out


@pytest.mark.parametrize(("arguments", "words"), [
    (["audit", "nowhere"], "nowhere/final_model.int6.ptz: no artifact; train first"),
    (["audit"], "final_model.int6.ptz: no artifact; train first"),
    (["audit", "a", "b"], "usage: python train_gpt.py audit [FOLDER]"),
    (["audit", "--hepl"], "usage: python train_gpt.py audit [FOLDER]")])
def test_wrong_words_after_audit_are_one_line(main, arguments, words):
    code, out, err = main(*arguments)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1


def test_a_damaged_artifact_is_one_line(folder, main):
    path = folder / t.ARTIFACT_FILE
    path.write_bytes(path.read_bytes()[:-9])
    for arguments, mode in ((["audit"], {}), ([], {"TTT_EVAL_ONLY": 1})):
        code, _, err = main(*arguments, **mode, ARTIFACT_DIR=folder)
        assert code == 2 and err.startswith(f"error: {path}: ") and err.count("\n") == 1


def test_the_packed_program_scores_with_its_own_settings(folder, tmp_path):
    """Alone, in another folder; it names its preset, and its log stays out of the seed's folder."""
    place = tmp_path / "place"
    place.mkdir()
    names = {path.name for path in folder.iterdir()}
    run = launch({"TTT_EVAL_ONLY": 1, "ARTIFACT_DIR": folder, "TTT_ENABLED": 0,
                  "NGRAM_TILT_ENABLED": 0}, place, folder / t.PROGRAM_FILE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[1] == "preset: pr1855"
    assert re.search(r'^not the preset: {"ARTIFACT_DIR": "\S+", "TTT_EVAL_ONLY": "1", '
                     r'"TTT_ENABLED": "0", "NGRAM_TILT_ENABLED": "0"}$', run.stdout, re.MULTILINE)
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in place.iterdir()] == ["logs"]
