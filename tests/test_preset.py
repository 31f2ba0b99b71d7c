"""preset.py: near misses of common names; reading a preset is in test_01_config.py."""

import subprocess
import sys

import pytest

import preset
import train_gpt as t
from tests.test_01_config import OTHERS
from tests.tools import PRESETS, PROGRAM, ROOT


def lines(**environ) -> str:
    return "\n".join(preset.near_misses(environ))


@pytest.mark.parametrize(("name", "setting"), [
    ("LEARNING_RATE", "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR"), ("LR", "MATRIX_LR"),
    ("SEEDS", "SEED"), ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"), ("EPOCHS", "ITERATIONS"),
    ("NUM_EPOCHS", "ITERATIONS"), ("MAX_STEPS", "ITERATIONS"), ("STEPS", "ITERATIONS"),
    ("MAX_SECONDS", "MAX_WALLCLOCK_SECONDS"), ("SEQ_LEN", "TRAIN_SEQ_LEN"),
    ("N_LAYERS", "NUM_LAYERS"), ("WEIGHT_DECAY", "MUON_WD, EMBED_WD and ADAM_WD"),
    ("OUTPUT_DIR", "ARTIFACT_DIR"), ("DATASET_PATH", "DATA_PATH"), ("CHECKPOINT", "INIT_FROM"),
    ("NUM_GPUS", "torchrun --nproc_per_node"), ("PRESETS", "PRESET"),
    ("lr", "MATRIX_LR"), ("learning_rate", "MATRIX_LR"), ("matrix_lr", "MATRIX_LR"),
    ("seed", "SEED"), ("Max_Wallclock_Seconds", "MAX_WALLCLOCK_SECONDS"),
    ("DATAPATH", "DATA_PATH"), ("MODELDIM", "MODEL_DIM"),
])
def test_near_misses_are_named(name, setting):
    """Each is warned about or, under a prefix of ours, an error; none is ignored in silence."""
    if t.is_ours(name):
        with pytest.raises(t.UserError, match=f"did you mean {setting}"):
            t.Config.from_env({name: "1"})
        return
    t.Config.from_env({name: "1"})
    told = lines(**{name: "1"})
    assert told.startswith(f"{name}=1 is not read; the setting is {setting}")
    assert "\n" not in told


def test_what_is_no_setting_says_so():
    assert "DROPOUT=0.1 is not read: there is no such setting" in lines(DROPOUT="0.1")


def test_settings_and_other_programs_variables_are_no_near_misses():
    assert lines(**dict.fromkeys(t.SETTINGS, "1"), PRESET="best") == ""
    assert lines(SEEDS="42 0", SEED="42") == ""  # run_3seed.sh sets both
    others = {name: "1" for name in OTHERS.split() if name != "SEEDS"}
    assert lines(**others) == ""


def test_names_of_other_programs_name_settings_of_ours():
    known = t.SETTINGS.keys() | {"PRESET", "torchrun --nproc_per_node", ""}
    for ours in preset.ELSEWHERE:
        assert {*ours.replace(" and ", ", ").split(", ")} <= known, ours
    assert not preset.OURS.keys() & t.SETTINGS.keys()


def test_a_run_warns(program):
    code, out, err = program(PREQUANT_ONLY=1, ITERATIONS=1, LEARNING_RATE=1)
    assert code == 0, err
    warning = "warning: LEARNING_RATE=1 is not read; the setting is MATRIX_LR"
    assert err.startswith(warning) and err.count("\n") == 1
    assert (program.out / "log.txt").read_text().count(warning) == 1


@pytest.mark.parametrize("wrong", [{"TTT_RNAK": 80}, {"PRESET": "nosuch"}, {"NUM_HEADS": 5},
                                   {"WORLD_SIZE": 3}, {"DATA_PATH": "/nowhere"}],
                         ids=lambda wrong: next(iter(wrong)))
def test_near_misses_stand_above_an_error(program, wrong):
    code, out, err = program(LR=1, **wrong)
    first, second = err.splitlines()
    assert (code, out) == (2, "") and second.startswith("error: ")
    assert first.startswith("warning: LR=1 is not read; the setting is MATRIX_LR")


@pytest.mark.parametrize(("name", "near"), [
    ("cpu_dmo", "cpu_demo"), ("pr1885", "pr1855"), ("Best", "best"), ("xyzzy", "")])
def test_a_misspelt_preset_gets_the_nearest(program, name, near):
    code, out, err = program(PRESET=name)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert (f"; did you mean {near}?" in err) if near else ("did you mean" not in err)
    assert {*PRESETS} <= {*err.strip().partition("presets here: ")[2].split(", ")}


def test_help_may_be_cut_short():
    """`python train_gpt.py --help | head -1`"""
    command = f"set -o pipefail; {sys.executable} {PROGRAM} --help | head -1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False,
                         timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("Train a ")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_alike_by_name_and_path(name):
    assert preset.read(name, ROOT).keys() == preset.read(
        str(ROOT / "presets" / f"{name}.env"), ROOT).keys()
