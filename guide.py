"""What a run says to the person who started it: names that it does not read, what it will cost on a
CPU, where its files lie and what to do next. train_gpt.py does without where this file is missing.
"""

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import preset
import train_gpt as t

SHARE = 0.5  # of that speed which a whole model reaches, roughly
MODES = {"audit": "finished", "sample": "sample", "calibrate": "calibrate"}  # argument: module
SHORT, LONG = 60.0, 3600.0  # seconds: not worth a word; a smaller model is proposed


def another_mode(mode: str, words: list[str], environ: Mapping[str, str]) -> bool:
    """Do what `python train_gpt.py MODE WORDS` asks for; False where it asks for a run. Variables
    that nothing reads are warned about first, so that the warning stands above any error.
    UserError for a mode that there is not."""
    if environ.get("RANK", "0") == "0":
        for line in preset.near_misses(environ):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    if mode in MODES:
        module = t.extra(MODES[mode])
        if {"--help", "-h"} & {*words} and mode != "sample":  # which has options, and lists them
            print(module.__doc__, flush=True)
        else:
            module.main(words)
    elif {"--help", "-h"} & {mode, *words}:
        preset.print_help()
    else:
        t.require(not mode, f"{mode}: {no_mode(mode)}")
        return False
    return True


def no_mode(word: str) -> str:
    """What to do instead of giving this word as an argument."""
    name, sign, _ = word.partition("=")
    if sign and (name in t.SETTINGS or name == "PRESET"):
        return (f"a setting stands before the command: {shlex.quote(word)} python train_gpt.py; "
                "see --help")
    if word.startswith("-") or sign:
        return "settings are environment variables; see --help"
    return f"no such mode{preset.nearest(word, MODES)}; there are: {', '.join(MODES)}; see --help"


def data_remedy(cfg: t.Config) -> str:
    """What to do where there are no shards: the command that makes those of these settings."""
    root = shlex.quote(cfg.data_dir.rstrip("/") or "/")
    if Path(cfg.data_dir).name == "demo":
        make = (f"--demo {root} --train-tokenizer --vocab-size {cfg.vocab_size} --val-docs 32 "
                f"--out {root}")
    elif cfg.caseops_enabled and cfg.vocab_size == t.Config().vocab_size:
        make = f"--download caseops --train-shards 80 --out {root}"
    else:
        make = (f"--docs FILE.jsonl --train-tokenizer --vocab-size {cfg.vocab_size} --out {root}")
    text = (f"set DATA_PATH to the folder with the shards, or make them: "
            f"python prepare_caseops_data.py {make}")
    if not torch.cuda.is_available() and "--demo" not in make:
        text += ("; without a GPU take the demo, ./run_3seed.sh cpu_demo, which makes its data and "
                 "runs PRESET=cpu_demo")
    return text


def before(cfg: t.Config, rt: t.Runtime, environ: Mapping[str, str]) -> None:
    """Lines for the log before anything is computed."""
    for line in preset.near_misses(environ):  # the console has them from `another_mode`
        rt.log(f"warning: {line}", console=False)
    if rt.device.type == "cpu" and rt.rank == 0:
        speed = rt.world * flops_per_second(cfg.model_dim)
        if text := estimate(cfg, speed, validation_tokens(cfg)):
            rt.log(text)


def flops_per_second(width: int) -> float:
    """Of a product of `width` columns in float32 on this CPU, the best of three."""
    x, w, best = torch.randn(2048, width), torch.randn(width, 4 * width), 0.0
    for _ in range(3):
        started = time.perf_counter()
        x @ w
        best = max(best, 8 * 2048 * width * width / (time.perf_counter() - started))
    return best


def forward_flops(cfg: t.Config, looped: bool, context: int) -> float:
    """Multiplications and additions for one token."""
    d, kv = cfg.model_dim, cfg.kv_dim
    weights = 2 * d * d + 2 * kv * d + 2 * cfg.hidden_dim * d
    passes = len(t.layer_plan(cfg, looped))
    return 2 * (passes * (weights + d * context) + cfg.vocab_size * d)


def validation_tokens(cfg: t.Config) -> int:
    """From the sizes of the shards; 0 where there are none."""
    paths = (p for p in t.data_folder(cfg).glob("fineweb_val_*.bin") if "_bytes_" not in p.name)
    return sum(max(0, p.stat().st_size - t.SHARD_HEADER) // 2 for p in paths if p.is_file())


def costs(cfg: t.Config, speed: float, targets: int) -> dict[str, float]:
    """Seconds of a step, of training, calibration and scoring, by arithmetic: a backward pass costs
    two forward ones; training with test-time adapters, which chunk by chunk run once more."""
    speed, plain = speed * SHARE, 1 - cfg.enable_looping_at * (cfg.num_loops > 0)
    forward, looped = (forward_flops(cfg, x, cfg.train_seq_len) for x in (False, True))
    step = 3 * cfg.train_batch_tokens * (plain * looped + (1 - plain) * forward) / speed
    calibration = cfg.gptq_calibration_batches * cfg.train_batch_tokens * looped / speed
    chunk = forward_flops(cfg, True, cfg.ttt_eval_seq_len // 2)
    again = 1.0 if cfg.ttt_stream else max(1.0, cfg.ttt_eval_seq_len / 2 / cfg.ttt_chunk_size)
    scoring = targets * (2 * looped + 3 * chunk * again * cfg.ttt_enabled) / speed
    training = step * (cfg.force_stop_step or cfg.iterations)
    if cfg.max_wallclock_seconds and not cfg.force_stop_step:
        training = min(training, max(cfg.max_wallclock_seconds, step))
    return {"step": step, "training": training, "calibration": calibration, "scoring": scoring}


def duration(seconds: float) -> str:
    """About so long, in a unit that is easy to read."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def estimate(cfg: t.Config, speed: float, targets: int) -> str:
    """What this run will cost on a CPU, to a factor of 2 or so, and what to do if it is much; ""
    where it is little."""
    cost = costs(cfg, speed, targets)
    parts = ["training", "calibration", "scoring"]
    if cfg.ttt_eval_only:
        parts = ["scoring"]
    elif cfg.quantize_only:
        parts = ["calibration", "scoring"]
    elif cfg.prequant_only:
        parts = ["training", "scoring"]
    told = ", ".join(f"{part} about {duration(cost[part])}" for part in parts if cost[part])
    text = (f"estimate for this CPU ({speed / 1e9:.0f} GFLOP/s in products): a step about "
            f"{duration(cost['step'])}; {told}")
    total = sum(cost[part] for part in parts)
    if total < SHORT:
        return ""
    if total > LONG:
        text += ("; this model is meant for GPUs: PRESET=cpu_demo runs every part of it in minutes "
                 "(./run_3seed.sh cpu_demo makes its data, too)")
    return text


def again(cfg: t.Config, rt: t.Runtime) -> str:
    """The settings of this run as they stand before a command: its preset, and what differs."""
    named = rt.record.get("preset", "none")
    root = Path(t.__file__).parent
    known = (root / "presets" / f"{named}.env").is_file()
    base = t.Config.from_env({"PRESET": named}, root, {}, check=False) if known else t.Config()
    given = {"PRESET": named} if known else {}
    own = t.NOT_OF_A_RUN | {"PREQUANT_ONLY", "INIT_FROM"}
    given |= {name: text for name, text in t.changed(cfg, base).items() if name not in own}
    return "".join(f"{name}={shlex.quote(text)} " for name, text in given.items())


def after(cfg: t.Config, rt: t.Runtime, folder: Path) -> None:
    """Where everything lies, and the next command."""
    names = {"model": t.MODEL_FILE, "artifact": t.ARTIFACT_FILE, "program": t.PROGRAM_FILE}
    if cfg.ttt_eval_only:
        names = {"artifact": t.ARTIFACT_FILE}
    elif cfg.prequant_only:
        names = {"model": t.MODEL_FILE}
    found = [f"{what} {folder / name}" for what, name in names.items()
             if (folder / name).is_file()]
    rt.log(f"files: {'; '.join([f'log {rt.log_path}', *found])}")
    place = f"ARTIFACT_DIR={folder} " if cfg.artifact_dir else ""
    if cfg.prequant_only:
        rt.log(f"next: {again(cfg, rt)}QUANTIZE_ONLY=1 {place}python train_gpt.py")
    elif not cfg.ttt_eval_only:
        rt.log(f"next: python submission.py --draft --report {folder}/report.html {rt.log_path}")
        rt.log(f'or:   {place}python train_gpt.py sample "Once upon"')
