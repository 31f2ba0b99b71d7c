"""§1 Config: every mistake is one clear line, and nothing that belongs to others trips it."""

import dataclasses
import re

import pytest

import preset
import train_gpt as t
from tests.tools import PRESETS, ROOT, TINY


def refused(environ, folder=ROOT) -> str:
    with pytest.raises(t.UserError) as caught:
        t.Config.from_env(environ, folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("name", "suggestion"), [
    ("TTT_RNAK", "TTT_LORA_RANK"), ("TTT_LORA_RNAK", "TTT_LORA_RANK"), ("MATRIX_RL", "MATRIX_LR"),
    ("ITERATION", "ITERATIONS"), ("MODEL_DIMS", "MODEL_DIM"), ("EMA_DECAYS", "EMA_DECAY"),
    ("GLOBAL_TTT_MOMENTUMS", "GLOBAL_TTT_MOMENTUM"),
    ("VOCABSIZE", "VOCAB_SIZE"), ("ARTIFACT_DIRS", "ARTIFACT_DIR"),
    ("PHASED_TTT_PREFIX_DOC", "PHASED_TTT_PREFIX_DOCS"),
])
def test_a_misspelt_name_is_an_error_with_a_suggestion(name, suggestion):
    text = refused({name: "80"})
    assert name in text
    assert f"did you mean {suggestion}" in text


OTHERS = """
    MAX_JOBS NUM_PROCS DATA_SOMETHING RUN_FOO OMP_NUM_THREADS MASTER_ADDR MASTER_PORT
    TORCH_LOGS TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR TRITON_INTERPRET CUDA_VISIBLE_DEVICES
    NCCL_DEBUG PATH HOME PYTHONPATH LANG LC_ALL TERM SHELL USER PWD TMPDIR HOSTNAME RANK SEEDS
    WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MODEL_PATH MODEL_NAME MIN_FOO
    ATTENTION_BACKEND COMPILE_FLAGS ARTIFACT_STORE VIRTUAL_ENV TOKENIZERS_PARALLELISM HF_HOME
    HF_TOKEN WANDB_PROJECT CI GITHUB_RUN_ID MKL_NUM_THREADS KMP_AFFINITY SSH_TTY LOGNAME
    PYTEST_CURRENT_TEST PYTORCH_CUDA_ALLOC_CONF XDG_RUNTIME_DIR SLURM_JOB_ID LS_COLORS _
"""


def test_other_programs_variables_do_not_trip_it():
    assert t.Config.from_env(dict.fromkeys(OTHERS.split(), "anything")) == t.Config()


@pytest.mark.parametrize("name", ["ENABLE_PERSISTENT_TMA_MATMUL", "PARALLEL_SEQ", "PARALLEL_PID"])
def test_common_first_words_do_not_trip_it(name):
    assert t.Config.from_env({name: "1"}) == t.Config()


@pytest.mark.parametrize(("environ", "words"), [
    ({"MODEL_DIM": "wide"}, "MODEL_DIM=wide: must be a whole number"),
    ({"MODEL_DIM": "512.0"}, "must be a whole number"),
    ({"MODEL_DIM": ""}, "must be a whole number"),
    ({"MATRIX_LR": "fast"}, "MATRIX_LR=fast: must be a number"),
    ({"MATRIX_LR": "nan"}, "must be finite"),
    ({"MAX_WALLCLOCK_SECONDS": "inf"}, "must be finite"),
    ({"TTT_ENABLED": "yes"}, "TTT_ENABLED=yes: must be 0 or 1"),
    ({"VOCAB_SIZE": "70000"}, "must be at most 65536"),
    ({"MATRIX_BITS": "9"}, "must be at most 8"),
    ({"MATRIX_BITS": "1"}, "must be at least 2"),
    ({"TTT_BETA2": "1"}, "TTT_BETA2=1: must be at most"),
    ({"MIN_LR": "-0.1"}, "must be at least 0"),
    ({"COMPRESSOR": "zip"}, "must be one of ans, pergroup, brotli, lzma"),
    ({"ATTENTION": "fa5"}, "must be one of auto"),
    ({"PARALLEL_FINAL_LANE": "both"}, "must be one of mean, attn, mlp"),
    ({"TIE_EMBEDDINGS": "0"}, "only 1 is possible"),
    ({"TTT_GRAD_STEPS": "2"}, "only 1 is possible"),
])
def test_a_bad_value_names_the_setting_and_what_it_must_be(environ, words):
    text = refused(environ)
    assert words in text
    assert "environment: " + next(iter(environ)) in text


@pytest.mark.parametrize("environ", [
    {"MODEL_DIM": "500"}, {"NUM_HEADS": "8", "NUM_KV_HEADS": "3"},
    {"MODEL_DIM": "24", "NUM_HEADS": "8", "NUM_KV_HEADS": "4"}, {"ROPE_DIMS": "7"},
    {"ROPE_DIMS": "66"}, {"MLP_MULT": "1.3"}, {"GATE_WINDOW": "513"}, {"LOOP_START": "6"},
    {"LOOP_END": "11"}, {"PARALLEL_START_LAYER": "5"}, {"TRAIN_BATCH_TOKENS": "1001"},
    {"VAL_BATCH_TOKENS": "1001"}, {"TTT_CHUNK_SIZE": "4096"}, {"GLOBAL_TTT_CHUNK_TOKENS": "1024"},
    {"GPTQ_RESERVE_SECONDS": "600"}, {"TTT_EVAL_ONLY": "1", "PREQUANT_ONLY": "1"},
    {"QUANTIZE_ONLY": "1", "TTT_EVAL_ONLY": "1"}, {"LQER_RANK": "256", "NUM_KV_HEADS": "1"},
], ids=lambda e: ",".join(f"{k}={v}" for k, v in e.items()))
def test_contradictory_settings_are_refused(environ):
    text = refused(environ)
    assert any(name in text for name in environ), text


@pytest.mark.parametrize("environ", [
    {"NUM_LOOPS": "0", "LOOP_START": "9", "LOOP_END": "2"}, {"PARALLEL_START_LAYER": "0"},
    {"NUM_LOOPS": "0", "PARALLEL_START_LAYER": "3"}, {"ROPE_DIMS": "0"}, {"XSA_LAST_N": "0"},
    {"MAX_WALLCLOCK_SECONDS": "0", "GPTQ_RESERVE_SECONDS": "9"}, {"MLP_MULT": "0.5"},
])
def test_settings_that_only_look_contradictory_are_taken(environ):
    t.Config.from_env(environ)


@pytest.mark.parametrize("environ", [
    {"PARALLEL_START_LAYER": "11"},  # lanes that never start would have no gradient
    {"SEED": str(2**64)},
])
def test_settings_that_cannot_run_are_refused(environ):
    refused(environ)


def test_record_names_that_have_one_value_are_taken():
    assert t.Config.from_env({n: v for n, (v, *_) in t.FIXED.items()}) == t.Config()
    assert not t.FIXED.keys() & t.SETTINGS.keys()


def test_values_are_of_their_type_and_blanks_do_not_matter():
    cfg = t.Config.from_env({"MODEL_DIM": " 256 ", "SMEAR_GATE_ENABLED": "False",
                             "LN_SCALE": "true", "ADAM_EPS": "1e-6"})
    assert (cfg.model_dim, cfg.smear_gate_enabled, cfg.ln_scale, cfg.adam_eps) == (
        256, False, True, 1e-6)
    for f in dataclasses.fields(t.Config):
        assert type(f.default) is f.type, f.name


def test_every_setting_has_help_and_a_default_within_its_range():
    text = preset.help_text()
    for name, f in t.SETTINGS.items():
        assert t.parse_value(f, str(f.default), name) == f.default
        assert len(f.metadata["help"]) > 5
        assert re.search(rf"^  {name} \[{re.escape(str(f.default))}\] \S", text, re.MULTILINE)


def written(tmp_path, text) -> str:
    (tmp_path / "mine.env").write_text(text)
    return str(tmp_path / "mine.env")


def test_environment_over_preset_over_defaults(tmp_path, monkeypatch):
    path = written(tmp_path, "# why\nMODEL_DIM=256   # narrow\n\nNUM_LAYERS = 6\nNUM_LOOPS=0\n"
                  "PARALLEL_START_LAYER=0\n")
    cfg = t.Config.from_env({"PRESET": path, "NUM_LAYERS": "7"})
    assert (cfg.model_dim, cfg.num_layers, cfg.num_heads) == (256, 7, 8)
    monkeypatch.setattr(t, "BAKED", {"NUM_LAYERS": "5", "MODEL_DIM": "128", "SEED": "3"})
    cfg = t.Config.from_env({"PRESET": path})
    assert (cfg.model_dim, cfg.num_layers, cfg.seed) == (256, 6, 3)


@pytest.mark.parametrize(("line", "words"), [
    ("MODEL_DIMM=3", "did you mean MODEL_DIM?"), ("FOO_BAR=3", "no such setting"),
    ("MODEL_DIM", "not a NAME=value line"), ("MODEL_DIM=x", "must be a whole number"),
    ("TIE_EMBEDDINGS=0", "only 1 is possible"), ("MIN_LR=2", "must be at most 1"),
])
def test_preset_errors_name_file_and_line(tmp_path, line, words):
    path = written(tmp_path, f"# comment\n\n{line}\n")
    text = refused({"PRESET": path})
    assert f"{path}:3: {line.split('=')[0]}" in text or f"{path}:3: not a" in text
    assert words in text


def test_a_preset_starts_from_another(tmp_path):
    (tmp_path / "base.env").write_text("PRESET=pr1855\nMODEL_DIM=256\nSEED=3\n")
    path = written(tmp_path, "# why\nPRESET=base   # beside it\nSEED=4\n")
    cfg = t.Config.from_env({"PRESET": path, "NUM_LAYERS": "10"}, ROOT)
    assert (cfg.model_dim, cfg.seed, cfg.leaky_relu_slope, cfg.num_layers) == (256, 4, 0.5, 10)
    (tmp_path / "best.env").write_text("PRESET=best\nSEED=5\n")  # a name that the program has, too
    assert t.Config.from_env({"PRESET": str(tmp_path / "best.env")}, ROOT) == t.Config(seed=5)


@pytest.mark.parametrize(("text", "words"), [
    ("PRESET=nosuch", ":1: PRESET=nosuch: no file"), ("SEED=1\nPRESET=pr1855", "the first setting"),
    ("PRESET=pr1855\nPRESET=best", "the first setting"), ("PRESET=round", "starts from itself")])
def test_a_wrong_start_is_refused(tmp_path, text, words):
    (tmp_path / "round.env").write_text(f"PRESET={tmp_path}/mine.env\n")
    assert words in refused({"PRESET": written(tmp_path, text)})


@pytest.mark.parametrize(("given", "gives_way"), [
    ("TRAIN_SEQ_LEN=1024", dict(train_seq_schedule="")), ("TRAIN_SEQ_LEN=3072", {}),
    ("TTT_ENABLED=0", dict(ngram_tilt_enabled=False)), ("TTT_ENABLED=1", {}),
    ("NGRAM_MIXER=exact", dict(ngram_tilt_enabled=False)),
    ("SLOT_ENABLED=1", dict(ttt_stream=False)),
    ("TTT_SHORT_SCORE_FIRST_ENABLED=1", dict(ttt_stream=False)),
    ("AWQ_LITE_ENABLED=1", dict(quantiser="uniform"))])
@pytest.mark.parametrize("named", ["", "best"])
def test_what_leaves_no_room_makes_give_way(given, gives_way, named):
    """What the environment asks for wins over the defaults, and over a preset that says them."""
    name, _, text = given.partition("=")
    value = t.parse_value(t.SETTINGS[name], text, name)
    cfg = t.Config.from_env({name: text, "PRESET": named}, ROOT)
    assert cfg == dataclasses.replace(t.Config(), **{name.lower(): value}, **gives_way)
    for other in gives_way:  # but not over what stands beside it
        kept = {other.upper(): str(getattr(t.Config(), other))}
        assert "contradictory" in refused({name: text, "PRESET": named, **kept})


def test_unknown_preset_lists_the_known():
    text = refused({"PRESET": "pr1866"})
    assert "PRESET=pr1866" in text
    assert {*PRESETS} <= {*text.partition("presets here: ")[2].split(", ")}


def test_tiny_is_a_configuration():
    cfg = t.Config.from_env(TINY)
    assert (cfg.head_dim, cfg.kv_dim, cfg.hidden_dim) == (8, 16, 64)
    assert cfg.architecture().keys() >= {"vocab_size", "num_layers", "model_dim", "hidden_dim"}


@pytest.mark.parametrize("name", ["SKYLIGHT_UW_FLOOR", "MTP_NUM_HEADS", "SWA_ENABLED"])
def test_techniques_that_are_lacking_are_refused_not_ignored(name):
    with pytest.raises(t.UserError, match=f"{name}: no such setting"):
        t.Config.from_env({name: "1"})


@pytest.mark.parametrize("name", ["GLOBAL_RANK", "SKIP_TESTS"])
def test_launchers_variables_are_left_alone(name):
    assert t.Config.from_env({name: "0"}) == t.Config()
