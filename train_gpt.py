"""Train a 36M-parameter language model in 600 s on 8 H100s, pack it into 16 MB, score it.
Claim     record #1855 of parameter-golf (1.06108 BPB, n = 3) and what followed; README.md has more
Launch    torchrun --standalone --nproc_per_node=8 train_gpt.py     1, 2, 4 or 8 processes
          PRESET=cpu_demo python train_gpt.py                       a laptop CPU
          TTT_EVAL_ONLY=1 python final_program.py                   score a finished artifact again
          python train_gpt.py audit | calibrate | sample "Once upon a time"     see README.md
Settings  environment variables; --help lists them all; PRESET=NAME reads presets/NAME.env.
Contents
  §0 Header            §4 Attention         §8 Quantisation           §12 N-gram
  §1 Config            §5 Model             §9 Artifact               §13 Score adjustment
  §2 Runtime           §6 Optimisers        §10 Evaluation            §14 Training
  §3 Kernels           §7 Data              §11 Test-time training    §15 Main
Symbols: B batch, T tokens, N = B T, d width, D head width, H query, K key heads, V vocabulary.
"""
# ==================================================================================================
# §0 Header
# ==================================================================================================
import base64
import contextlib
import difflib
import functools
import gc
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import lzma
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

if "__program__" not in globals():  # what runs, before the slow imports; a packed one brings it
    __program__ = Path(__file__).read_bytes()
    linecache.cache[__file__] = 0, None, __program__.decode().splitlines(True), __file__
NEEDED = "is not installed; source .venv/bin/activate, or pip install -r requirements.txt"
try:
    import brotli
    import numba
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
except (ModuleNotFoundError, KeyboardInterrupt) as error:
    print(f"error: {error.name} {NEEDED}" if error.args else "interrupted", file=sys.stderr)
    sys.exit(2 if error.args else 130)


# ==================================================================================================
# §1 Config
# ==================================================================================================
class UserError(Exception):
    """A mistake that the user can mend: main() prints its one line and exits with code 2."""


def require(holds: Any, problem: str) -> None:
    """UserError with the text of the problem unless it holds."""
    if not holds:
        raise UserError(problem)


def extra(name: str, needed: bool = True) -> Any:
    """A module beside this file that only some modes need. The packed program travels alone, with
    variants.py inside where its settings ask for that."""
    sys.modules.setdefault("train_gpt", sys.modules[__name__])  # which is what it imports
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        require(error.name == name, f"{error.name} {NEEDED}")
        require(not needed, f"{name}.py is missing: run train_gpt.py in its repository")
        return None


def setting(default: Any, text: str, lo: float | None = None, hi: float | None = None,
            choices: tuple = ()) -> Any:
    """A field of Config: default, one line of help, closed range or choices of legal values."""
    return field(default=default, metadata={"help": text, "lo": lo, "hi": hi, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting, once; its environment variable is its name in capitals. Defaults: best.env."""

    # -- run and files
    seed: int = setting(1337, "of weights, adapters and synthetic warm-up data", 0, 2**32 - 1)
    run_id: str = setting("", "name of the log; default: date, time and process")
    artifact_dir: str = setting("", "folder for log, model, artifact; default: logs/ and .")
    data_dir: str = setting("./data/", "root under which data sets are looked for")
    data_path: str = setting("", "folder with the shards; default: the CaseOps set under DATA_DIR")
    tokenizer_path: str = setting("", "SentencePiece model; given: checked against the data")
    caseops_enabled: bool = setting(True, "look for the CaseOps data set under DATA_DIR")
    attention: str = setting("auto", "backend", choices=("auto", "fa4", "varlen", "sdpa", "ref"))
    compile: bool = setting(True, "torch.compile on CUDA (the CPU always runs eagerly)")
    ttt_eval_only: bool = setting(False, "load the artifact and only score it")
    prequant_only: bool = setting(False, "stop before quantisation")
    quantize_only: bool = setting(False, "load final_model.pt instead of training")
    init_from: str = setting("", "a final_model.pt whose weights training starts from")
    checkpoint_every_seconds: float = setting(0.0, "between checkpoints; 0: none, no resuming", 0)
    legality_check: bool = setting(False, "audit the artifact at the end of a run")
    scores_path: str = setting("", "FILE.npz for every target's nats and its place in the order")
    # -- data and batches, in tokens
    vocab_size: int = setting(8192, "V, size of the vocabulary", 8, 65536)
    train_batch_tokens: int = setting(786432, "tokens a step: 8 rows, shared by the processes", 64)
    train_seq_len: int = setting(3072, "longest attention segment in training", 2)
    val_batch_tokens: int = setting(524288, "tokens of 8 evaluation rows", 64)
    eval_seq_len: int = setting(3072, "longest attention segment in plain evaluation", 2)
    eval_include_tail: bool = setting(True, "score all; off: a multiple of EVAL_SEQ_LEN targets")
    train_seq_schedule: str = setting("1024@0.1,2048@0.7,3072@1.0", "LENGTH@END,... or none")
    seq_change_warmup_steps: int = setting(32, "steps of rising rate after a change of length", 0)
    seq_change_warmup_frac: float = setting(0.00649, "the same, of all steps; 0: that count", 0, 1)
    # -- model
    num_layers: int = setting(11, "n, blocks", 2, 256)
    model_dim: int = setting(512, "d, width of the residual stream", 8)
    num_heads: int = setting(8, "H, query heads", 1)
    num_kv_heads: int = setting(4, "K, key and value heads", 1)
    mlp_mult: float = setting(4.0, "hidden width of the MLP over d", 0.25, 64)
    rope_base: float = setting(10000.0, "base of the rotary angles", 1)
    rope_dims: int = setting(16, "channels of a head that rotate; 0: all", 0)
    qk_gain_init: float = setting(5.25, "start of the per-head query gain")
    xsa_last_n: int = setting(11, "layers, from the top, with exclusive self-attention", 0)
    sparse_attn_gate_enabled: bool = setting(True, "per-head output gate from the first channels")
    sparse_attn_gate_scale: float = setting(0.5, "factor inside that gate's sigmoid")
    gate_window: int = setting(12, "channels that the sparse gate and SmearGate read", 1)
    smear_gate_enabled: bool = setting(True, "mix in the previous embedding, not across BOS")
    skip_gates_enabled: bool = setting(True, "skips blend by a gate; off: they add")
    ln_scale: bool = setting(True, "scale the normalised input of layer i by 1/sqrt(i+1)")
    logit_softcap: float = setting(30.0, "c of c tanh(z/c)", 1e-3)
    asym_logit_rescale: bool = setting(False, "learn c apart for logits above and below 0")
    leaky_relu_slope: float = setting(0.3, "of the MLP's activation below 0", 0, 1)
    gated_xsa: bool = setting(False, "scale XSA by tanh of a learnt gate a head; it starts off")
    tied_embed_init_std: float = setting(0.005, "deviation of the embedding at the start", 0)
    num_loops: int = setting(2, "extra passes over the looped layers; 0: never looped", 0, 16)
    loop_start: int = setting(3, "first looped layer", 0)
    loop_end: int = setting(5, "last looped layer", 0)
    enable_looping_at: float = setting(0.35, "fraction of training that runs without loop", 0, 1)
    parallel_start_layer: int = setting(8, "first layer on two lanes; 0: one lane", 0)
    parallel_final_lane: str = setting("mean", "lane that leaves", choices=("mean", "attn", "mlp"))
    # -- training
    iterations: int = setting(20000, "most steps", 1)
    force_stop_step: int = setting(0, "stop after this step, whatever the clock says; 0: off", 0)
    max_wallclock_seconds: float = setting(600.0, "training budget; 0: ITERATIONS rule", 0)
    gptq_reserve_seconds: float = setting(-1.0, "kept of it for calibration; -1: as measured", -1)
    warmup_steps: int = setting(3, "untimed steps of every shape on synthetic ids", 0)
    warmdown_frac: float = setting(0.85, "last fraction over which the learning rate falls", 0, 1)
    min_lr: float = setting(0.1, "floor of the learning-rate multiplier", 0, 1)
    matrix_lr: float = setting(0.028, "Muon's learning rate", 0)
    scalar_lr: float = setting(0.02, "AdamW's learning rate for everything small", 0)
    tied_embed_lr: float = setting(0.03, "AdamW's learning rate for the embedding", 0)
    muon_momentum: float = setting(0.97, "Muon's momentum after its warm-up", 0, 0.9999)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at step 0", 0, 0.9999)
    muon_momentum_warmup_steps: int = setting(1500, "steps of that linear warm-up", 0)
    muon_momentum_warmup_frac: float = setting(0.3042, "the same, of training; 0: that count", 0, 1)
    muon_backend_steps: int = setting(5, "Polar-Express iterations", 1, 5)
    muon_row_normalize: bool = setting(True, "divide each row of Muon's update by its L2 norm")
    muon_wd: float = setting(0.095, "decoupled weight decay of the matrices", 0)
    embed_wd: float = setting(0.085, "weight decay of the embedding", 0)
    adam_wd: float = setting(0.02, "weight decay of everything small", 0)
    beta1: float = setting(0.9, "AdamW's first beta", 0, 0.9999)
    beta2: float = setting(0.99, "AdamW's second beta", 0, 0.99999)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", 0)
    grad_clip_norm: float = setting(0.3, "global gradient norm; 0: no clipping", 0)
    ema_decay: float = setting(0.9965, "decay of the weight average that is quantised", 0, 0.999999)
    ema_horizon_frac: float = setting(0.05794, "1/(1 - decay) over all steps; 0: EMA_DECAY", 0, 1)
    train_log_every: int = setting(500, "steps between training lines", 1)
    val_loss_every: int = setting(0, "steps between plain evaluations; 0: only at the end", 0)
    fused_ce_enabled: bool = setting(True, "fused softcap and cross-entropy kernel on CUDA")
    # -- quantisation and artifact: bits, clips, AWQ and LQER are of the uniform quantiser
    quantiser: str = setting("tcq", "tcq fills the budget; or uniform", choices=("uniform", "tcq"))
    trellis_states: int = setting(32, "states of its trellis", choices=(4, 8, 16, 32, 64))
    artifact_budget_bytes: int = setting(16_000_000, "program and artifact together", 1)
    gptq_calibration_batches: int = setting(16, "training batches behind the Hessians", 1)
    matrix_bits: int = setting(6, "bits of the block matrices", 2, 8)
    embed_bits: int = setting(7, "bits of the embedding", 2, 8)
    attn_clip_sigmas: float = setting(13.0, "clipping range of the attention matrices", 0.1)
    mlp_clip_sigmas: float = setting(11.5, "of the MLP matrices", 0.1)
    embed_clip_sigmas: float = setting(14.0, "of the embedding", 0.1)
    gated_attn_quant_gate: bool = setting(True, "store the sparse gates as int8 rows; off: float16")
    gptq_damp_factor: float = setting(0.01, "of the mean diagonal, added to a Hessian", 1e-9)
    awq_lite_enabled: bool = setting(False, "more bits for the columns that matter most")
    awq_lite_bits: int = setting(8, "bits of those columns", 3, 8)
    awq_lite_group_size: int = setting(64, "neighbouring columns that get them together", 1)
    awq_lite_group_top_k: int = setting(1, "such groups in the whole model", 0)
    lqer_enabled: bool = setting(True, "low-rank correction of the worst quantisation errors")
    lqer_rank: int = setting(4, "rank of a correction", 1, 256)
    lqer_top_k: int = setting(3, "matrices that get one", 0)
    lqer_gain_select: bool = setting(False, "rank by what a correction gains; off: by the error")
    lqer_asym_enabled: bool = setting(True, "factors in 2 and 4 bits; off: LQER_FACTOR_BITS")
    lqer_asym_group: int = setting(64, "elements of B that share a scale", 1)
    lqer_factor_bits: int = setting(4, "bits of both factors when symmetric", 2, 8)
    compressor: str = setting("ans", "entropy coder", choices=("ans", "pergroup", "brotli", "lzma"))
    # -- test-time training
    ttt_enabled: bool = setting(True, "score with phased test-time training")
    ttt_lora_rank: int = setting(80, "rank of a document's adapters", 1)
    ttt_lora_alpha: float = setting(144.0, "adapter outputs are scaled by alpha/rank", 0)
    ttt_lora_lr: float = setting(1e-4, "AdamW's learning rate for the adapters", 0)
    ttt_beta1: float = setting(0.0, "its first beta", 0, 0.9999)
    ttt_beta2: float = setting(0.99, "its second beta", 0, 0.99999)
    ttt_weight_decay: float = setting(0.5, "its weight decay", 0)
    ttt_local_lr_mult: float = setting(1.0, "factor of TTT_LORA_LR", 0)
    ttt_mask: str = setting("", "adapters left out", choices=("", "all", "no_q", "no_v", "no_qv"))
    ttt_q_lora: bool = setting(True, "adapters on the query projections")
    ttt_k_lora: bool = setting(True, "adapters on the key projections")
    ttt_v_lora: bool = setting(True, "adapters on the value projections")
    ttt_mlp_lora: bool = setting(True, "adapters on the MLPs")
    ttt_o_lora: bool = setting(True, "adapters on the attention outputs")
    ttt_warm_start_a: bool = setting(True, "keep A from batch to batch")
    ttt_chunk_size: int = setting(32, "targets scored between two updates", 1)
    ttt_short_score_first_enabled: bool = setting(False, "other chunks for batches of short ones")
    ttt_short_score_first_steps: str = setting("", "LONGEST:CHUNK,... by the longest document")
    ttt_short_doc_len: int = setting(512, "without that list: longest document of such a batch", 1)
    ttt_short_chunk_size: int = setting(48, "and its chunk", 1)
    ttt_batch_size: int = setting(24, "documents in a batch", 1)
    ttt_eval_seq_len: int = setting(3072, "longest context of a chunk, in tokens", 2)
    ttt_stream: bool = setting(True, "run a chunk once, on kept keys and values of earlier ones")
    phased_ttt_prefix_docs: int = setting(2500, "documents of the global phases; 0: no phase", 0)
    phased_ttt_num_phases: int = setting(1, "global phases", 1)
    global_ttt_lr: float = setting(1e-3, "SGD's learning rate in a global phase", 0)
    global_ttt_momentum: float = setting(0.9, "its momentum", 0, 0.9999)
    global_ttt_grad_clip: float = setting(1.0, "its gradient norm; 0: no clipping", 0)
    global_ttt_chunk_tokens: int = setting(32768, "tokens of one learning rate there", 2)
    global_ttt_batch_seqs: int = setting(32, "sequences of a step there, all processes", 1)
    global_ttt_respect_doc_boundaries: bool = setting(True, "documents apart there")
    global_ttt_optimizer: str = setting("sgd", "optimiser there", choices=("sgd", "adamw"))
    ttt_freeze_blocks: int = setting(0, "first blocks that a global phase leaves as they are", 0)
    ttt_lr_floor_frac: float = setting(0.0, "floor of the learning rate's cosine there", 0, 1)
    ttt_second_pass_frac: float = setting(0.0, "ILLEGAL: learn all, this part twice; score", 0, 1)
    # -- what a score takes besides the model's probabilities
    allow_illegal: bool = setting(False, "allow what the challenge refuses; scores say so")
    ngram_tilt_enabled: bool = setting(True, "raise the token that n-grams of the prefix expect")
    token_order: int = setting(16, "n of the token expert", 2)
    token_threshold: float = setting(0.8, "least share of the expected token in its context", 0, 1)
    token_boost: float = setting(2.625, "what it adds to the logit", 0, 20)
    within_tau: float = setting(0.45, "the same for the expert inside words", 0)
    within_boost: float = setting(0.0, "and its boost", 0, 20)
    word_order: int = setting(4, "words of the expert for word starts, the expected one too", 2)
    word_tau: float = setting(0.65, "its least share", 0)
    word_boost: float = setting(0.0, "and its boost", 0, 20)
    agree_add_boost: float = setting(0.0, "added where two experts agree", 0, 20)
    ngram_target_gate: bool = setting(False, "ILLEGAL: word experts see the class of the target")
    ngram_mixer: str = setting("", "n-grams; hashed: ILLEGAL", choices=("", "exact", "hashed"))
    ngram_order: int = setting(22, "longest n-gram of the mixer", 2)
    ngram_buckets: int = setting(4194304, "of each order of the hashed mixer", 1)
    ngram_min_tokens: int = setting(5000, "tokens before which nothing is mixed in", 0)
    ngram_alpha_base: float = setting(0.20, "weight of the n-grams: base +", 0)
    ngram_alpha_range: float = setting(0.55, "range * sigmoid(2 (entropy -", 0)
    ngram_alpha_center: float = setting(2.5, "center)), of the model's prediction in nats")
    slot_enabled: bool = setting(False, "fit shifts of state and logits before a chunk is scored")
    slot_fit: str = setting("context", "to what; scored: ILLEGAL", choices=("context", "scored"))
    slot_context: int = setting(64, "targets before the chunk that they are fitted to", 1)
    slot_steps: int = setting(24, "AdamW steps of a fit", 1)
    slot_lr: float = setting(0.432, "its learning rate, falling as a cosine", 0)
    slot_lr_min: float = setting(0.001, "to this", 0)
    slot_beta1: float = setting(0.6, "its first beta", 0, 0.9999)
    slot_beta2_ps: float = setting(0.5, "its second beta", 0, 0.99999)
    slot_batch_seqs: int = setting(128, "divisor of its gradients", 1)

    @staticmethod
    def from_env(environ: Mapping[str, str], folder: Path = Path(),
                 own: Mapping[str, str] | None = None, check: bool = True) -> "Config":
        """Settings from a mapping like os.environ, over presets/PRESET.env, over `own` (BAKED);
        each makes those below it give way (a schedule of lengths to another length, for one).
        UserError for names that are unknown, values unreadable or out of range, contradictions."""
        own = {k: v for k, v in (BAKED if own is None else own).items() if k != "PRESET"}
        preset = extra("preset").read(environ["PRESET"], folder) if environ.get("PRESET") else {}
        cfg = Config()
        for layer in ({k: (v, f"the run's own settings: {k}") for k, v in own.items()}, preset,
                      {k: (v, f"environment: {k}") for k, v in environ.items() if is_ours(k)}):
            new = read_settings(layer)
            other_length = new.get("train_seq_len", cfg.train_seq_len) != cfg.train_seq_len
            own_chunks = new.get("slot_enabled") or new.get("ttt_short_score_first_enabled")
            no_tilt = new.get("ngram_mixer") or new.get("ttt_enabled") is False
            yields = (("train_seq_schedule", "", other_length), ("ttt_stream", False, own_chunks),
                      ("ngram_tilt_enabled", False, no_tilt),
                      ("quantiser", "uniform", new.get("awq_lite_enabled")),
                      *((COUNTS[n].lower(), 0.0, n.lower() in new) for n in COUNTS))
            cfg = replace(cfg, **{name: value for name, value, holds in yields if holds} | new)
        return cfg.checked() if check else cfg

    def checked(self) -> "Config":
        """This configuration, or UserError for the first settings that contradict each other."""
        loops, lanes, wall = self.num_loops, self.parallel_start_layer, self.max_wallclock_seconds
        stages = self.pairs("train_seq_schedule", "@")
        chunks = (self.ttt_chunk_size, *(int(c) for _, c in self.short_chunks))
        rules = (
            (self.model_dim % self.num_heads == 0, "MODEL_DIM must be a multiple of NUM_HEADS"),
            (self.num_heads % self.num_kv_heads == 0, "NUM_KV_HEADS must divide NUM_HEADS"),
            (self.head_dim % 2 == 0, "MODEL_DIM / NUM_HEADS must be even, for the rotary pairs"),
            (self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim,
             "ROPE_DIMS must be even and at most MODEL_DIM / NUM_HEADS"),
            ((self.mlp_mult * self.model_dim) % 1 == 0, "MLP_MULT * MODEL_DIM must be whole"),
            (self.gate_window <= self.model_dim, "GATE_WINDOW must be at most MODEL_DIM"),
            (not loops or self.loop_start <= self.loop_end < self.num_layers,
             "LOOP_START <= LOOP_END < NUM_LAYERS must hold where NUM_LOOPS > 0"),
            (not (loops and lanes) or self.loop_end < lanes,
             "LOOP_END must be below PARALLEL_START_LAYER: two lanes do not join again"),
            (lanes < self.num_layers, "PARALLEL_START_LAYER must be below NUM_LAYERS"),
            (self.train_batch_tokens % 8 == 0, "TRAIN_BATCH_TOKENS must be a multiple of 8"),
            (self.val_batch_tokens % 8 == 0, "VAL_BATCH_TOKENS must be a multiple of 8"),
            (min(chunks) > 0 and max(chunks) <= self.ttt_eval_seq_len,
             "TTT_CHUNK_SIZE and those of short documents must be at most TTT_EVAL_SEQ_LEN"),
            (not stages or max(n for n, _ in stages) == self.train_seq_len,
             "TRAIN_SEQ_LEN must be the longest of TRAIN_SEQ_SCHEDULE"),
            ([end for _, end in stages] == sorted({end for _, end in stages})
             and all(n >= 2 for n, _ in stages) and (not stages or stages[-1][1] == 1),
             "TRAIN_SEQ_SCHEDULE must have rising fractions, the last one 1"),
            (self.global_ttt_chunk_tokens >= self.eval_seq_len,
             "GLOBAL_TTT_CHUNK_TOKENS must be at least EVAL_SEQ_LEN"),
            (not wall or self.gptq_reserve_seconds < wall,
             "GPTQ_RESERVE_SECONDS must be below MAX_WALLCLOCK_SECONDS"),
            (self.ttt_eval_only + self.prequant_only + self.quantize_only <= 1,
             "of TTT_EVAL_ONLY, PREQUANT_ONLY and QUANTIZE_ONLY at most one can be 1"),
            (self.lqer_rank <= self.kv_dim, "LQER_RANK must be at most NUM_KV_HEADS * head width"),
            (not (self.ngram_tilt_enabled and self.ngram_mixer),
             "of NGRAM_TILT_ENABLED and NGRAM_MIXER at most one can be on"),
            (self.tokenizer_path or not self.word_experts,
             "WITHIN_BOOST and WORD_BOOST need TOKENIZER_PATH, the data's SentencePiece model"),
            (self.ngram_alpha_base + self.ngram_alpha_range < 1,
             "NGRAM_ALPHA_BASE + NGRAM_ALPHA_RANGE must be below 1"),
            (self.ngram_buckets.bit_count() == 1, "NGRAM_BUCKETS must be a power of 2"),
            (not (self.ttt_stream and (self.slot_enabled or self.short_chunks)),
             "SLOT_ENABLED=1 and TTT_SHORT_SCORE_FIRST_ENABLED=1 need TTT_STREAM=0"),
            (self.quantiser == "uniform" or not self.awq_lite_enabled,
             "AWQ_LITE_ENABLED=1 needs QUANTISER=uniform"),
            (self.ttt_enabled or not (self.slot_enabled or self.ngram_tilt_enabled
                                      or self.ngram_mixer or self.ttt_second_pass_frac),
             "n-gram rules, SLOT and a second pass need TTT_ENABLED=1"),
            (self.allow_illegal or not self.illegal(),
             f"{'; '.join(self.illegal())}: the challenge refuses such a score. ALLOW_ILLEGAL=1 "
             "runs it, and says so beside the score"))
        for holds, text in rules:
            require(holds, f"contradictory settings: {text}")
        return self

    def pairs(self, name: str, mark: str) -> tuple[tuple[int, float], ...]:
        """The numbers of a setting of the form "A@B,A@B" (mark @); UserError if it is not."""
        parts = (part.split(mark) for part in getattr(self, name).split(",") if part.strip())
        try:
            return tuple((int(a), float(b)) for a, b in parts)
        except ValueError:
            raise UserError(f"{name.upper()}={getattr(self, name)}: must be numbers as in "
                            f"512{mark}1,1024{mark}2") from None

    @property
    def word_experts(self) -> bool:
        return self.ngram_tilt_enabled and (self.within_boost > 0 or self.word_boost > 0)

    @property
    def variants(self) -> bool:
        """Whether a score takes what variants.py holds."""
        return bool(self.slot_enabled or self.ngram_mixer or self.word_experts
                    or self.ttt_second_pass_frac or self.ttt_freeze_blocks)

    def illegal(self) -> list[str]:
        """Why the challenge would refuse a score made with these settings."""
        reasons = (
            (self.word_experts and self.ngram_target_gate,
             "NGRAM_TARGET_GATE=1 gives a hint by the class of the token being scored"),
            (self.ngram_mixer == "hashed",
             "NGRAM_MIXER=hashed is no distribution: it does not sum to one over the vocabulary"),
            (self.slot_enabled and self.slot_fit == "scored",
             "SLOT_FIT=scored scores the tokens that it was fitted to"),
            (self.ttt_second_pass_frac,
             "TTT_SECOND_PASS_FRAC scores tokens after training on them"))
        return [text for holds, text in reasons if holds]

    @property
    def short_chunks(self) -> tuple[tuple[int, float], ...]:
        """(longest document of a batch, chunk of that batch), from the shortest up."""
        if not self.ttt_short_score_first_enabled:
            return ()
        steps = self.pairs("ttt_short_score_first_steps", ":")
        return steps or ((self.ttt_short_doc_len, self.ttt_short_chunk_size),)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    def architecture(self) -> dict[str, Any]:
        """The settings that fix the function of given weights; an artifact carries them."""
        names = ("vocab_size num_layers model_dim num_heads num_kv_heads hidden_dim gate_window "
                 "num_loops loop_start loop_end rope_base rope_dims xsa_last_n "
                 "sparse_attn_gate_enabled sparse_attn_gate_scale smear_gate_enabled "
                 "skip_gates_enabled ln_scale logit_softcap asym_logit_rescale leaky_relu_slope "
                 "gated_xsa parallel_start_layer parallel_final_lane")
        return {name: getattr(self, name) for name in names.split()}


SETTINGS = {f.name.upper(): f for f in fields(Config)}
# Names that #1855 and its lineage set, each with the only values that this program can honour.
FIXED = {name: tuple(values.split("|")) for name, values in re.findall(r"(\w+)=(\S*)", """
    TIE_EMBEDDINGS=1 ROPE_YARN=0 ROPE_TRAIN_SEQ_LEN=2048|3072 EVAL_STRIDE=64|1536
    COMPILE_SHAPE_WARMUP=1 SKYLIGHT_MUON=0 TRAIN_SEQ_SCHEDULE_MODE=wallclock
    TEMPERATURE_SCALE=1.0|1 WORD_NORMALIZE=strip_punct_lower NGRAM_HINT_PRECOMPUTE_OUTSIDE=0
    GATED_ATTN_ENABLED=0 GATED_ATTN_INIT_STD=0.01 VAL_DOC_FRACTION=1.0 ATTN_OUT_GATE_ENABLED=0
    ATTN_OUT_GATE_SRC=proj PHASED_TTT_ENABLED=1 SPARSE_ATTN_GATE_INIT_STD=0.0|0 TTT_EVAL_BATCHES=
    TTT_GRAD_STEPS=1 TTT_OPTIMIZER=adam GLOBAL_TTT_EPOCHS=1 GLOBAL_TTT_WARMUP_CHUNKS=0
    GLOBAL_TTT_WARMUP_START_LR=0.0|0 MATRIX_CLIP_SIGMAS=12.85 LQER_SCOPE=all""")}
# A setting in steps makes the one that says the same by the fraction of training give way.
COUNTS = {"EMA_DECAY": "EMA_HORIZON_FRAC", **{f"{name}_WARMUP_STEPS": f"{name}_WARMUP_FRAC"
                                              for name in ("SEQ_CHANGE", "MUON_MOMENTUM")}}
# First words that other programs use too: there only a near miss of a whole name counts as ours.
GENERIC = set(re.findall(r"\w+", """ALLOW ARTIFACT ATTENTION CHECKPOINT COMPILE DATA ENABLE FORCE
    GLOBAL ITERATIONS MAX MIN MODEL NUM PARALLEL RUN SEED SKIP TOKEN"""))
# The last three are of techniques in the lineage that this program lacks: refused, not ignored.
PREFIXES = {name.split("_")[0] for name in (*SETTINGS, *FIXED, "MTP", "SWA", "QUANTIZER")} - GENERIC
BAKED: dict[str, str] = {}  # the packed program carries the settings of its run here
# Where a run writes, and how it is watched: no part of its configuration.
NOT_OF_A_RUN = {"RUN_ID", "ARTIFACT_DIR", "CHECKPOINT_EVERY_SECONDS", "LEGALITY_CHECK",
                "SCORES_PATH"}


def is_ours(name: str) -> bool:
    """Whether an environment variable is a setting or looks like a misspelt one."""
    known = name in SETTINGS or name in FIXED or "_" in name and name.split("_")[0] in PREFIXES
    known = known or name.startswith(("GLOBAL_TTT_", "SKIP_GATE"))
    return known or bool(difflib.get_close_matches(name, SETTINGS, 1, 0.9))


def read_settings(given: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Field of Config -> value, of NAME -> (text, where it came from); UserError as from_env."""
    values = {}
    for name, (text, where) in given.items():
        if name in FIXED:
            require(text.strip() in FIXED[name],
                    f"{where}={text}: only {FIXED[name][0]} is possible; unset it")
        elif name in SETTINGS:
            values[name.lower()] = parse_value(SETTINGS[name], text, where)
        else:
            near = (helper := extra("preset", needed=False)) and helper.suggest(name)
            raise UserError(f"{where}: no such setting{near or ''}; --help lists all")
    return values


def parse_value(entry: Any, text: str, where: str) -> Any:
    """The value of one setting from its text, or UserError naming where it came from."""
    kind, (lo, hi, choices) = entry.type, (entry.metadata[x] for x in ("lo", "hi", "choices"))
    words = {"0": False, "1": True, "false": False, "true": True}
    try:
        value = words[text.strip().lower()] if kind is bool else kind(text.strip())
    except (ValueError, KeyError):
        names = {int: "a whole number", float: "a number", bool: "0 or 1"}
        raise UserError(f"{where}={text}: must be {names[kind]}") from None
    require(not choices or value in choices,
            f"{where}={text}: must be one of {', '.join(map(str, choices))}")
    require(kind is not float or math.isfinite(value), f"{where}={text}: must be finite")
    require(lo is None or value >= lo, f"{where}={text}: must be at least {lo}")
    require(hi is None or value <= hi, f"{where}={text}: must be at most {hi}")
    return value


def changed(cfg: Config, base: Config = Config()) -> dict[str, str]:  # noqa: B008
    """The settings that differ from the defaults or `base`, as the environment would hold them."""
    found = ((name, f.type, getattr(cfg, f.name)) for name, f in SETTINGS.items())
    return {name: str(int(x) if kind is bool else x) for name, kind, x in found
            if x != getattr(base, name.lower())}


def baked(source: str, cfg: Config, preset: str = "") -> str:
    """The program with this run's settings as its defaults, so that it scores without a preset."""
    own = NOT_OF_A_RUN | {"TOKENIZER_PATH", "TTT_EVAL_ONLY", "QUANTIZE_ONLY", "INIT_FROM"}
    given = {n: text for n, text in changed(cfg).items() if n not in own} | {"PRESET": preset}
    line = re.compile(r"^BAKED: ?dict\[str, ?str\] ?= ?\{[^}]*\}", re.MULTILINE)
    assert len(line.findall(source)) == 1
    return line.sub(lambda _: f"BAKED: dict[str, str] = {given!r}", source)


LAUNCH = "start with torchrun, or unset WORLD_SIZE and RANK"


def read_launch(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world, local rank) from what torchrun sets, (0, 1, 0) without it; UserError for what
    is unreadable, or left over in a shell."""
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    told |= {name: environ[name] for name in told if name in environ}
    for name, text in told.items():
        require(re.fullmatch(r"\s*-?\d+\s*", text), f"{name}={text}: not a whole number; {LAUNCH}")
    rank, world, local, port = map(int, told.values())
    require(world > 0 and 8 % world == 0,
            f"WORLD_SIZE={world}: must divide 8, the rows of a step; use 1, 2, 4 or 8")
    require(0 <= rank < world, f"RANK={rank}: must be below WORLD_SIZE={world}; {LAUNCH}")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if world > 1 else ():
        require(environ.get(name), f"WORLD_SIZE={world} without {name}; {LAUNCH}")
    require(local >= 0 and 0 < port < 65536,
            f"LOCAL_RANK={local} MASTER_PORT={port}: out of range; {LAUNCH}")
    return rank, world, local


# ==================================================================================================
# §2 Runtime
# ==================================================================================================
@dataclass
class Runtime:
    """Rank, world size, device, number type; collectives are the identity in a world of one."""

    rank: int
    world: int
    device: torch.device
    log_path: Path | None = None
    checkpointer: Any = None  # reliability.Checkpointer, where the run keeps checkpoints
    heartbeat: Any = None  # reliability.Heartbeat, where there are several ranks
    record: dict[str, Any] = field(default_factory=dict)  # figures for the log's last line

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank runs in a step: 8 over the world size."""
        return 8 // self.world

    def log(self, text: str, console: bool = True) -> None:
        """One line to the log file and the console, by rank 0; UserError where that fails."""
        if self.rank == 0:
            if console:
                print(text, flush=True)
            if self.log_path:
                self.write_log(text + "\n")

    def open_log(self, path: Path) -> None:
        """Log lines also go to the end of `path`."""
        self.log_path = path
        if self.rank == 0:
            self.write_log("")

    def write_log(self, text: str) -> None:
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("a") as f:
                f.write(text)
        except OSError as error:
            raise UserError(f"{self.log_path}: the log cannot be written ({error.strerror}); free "
                            "the disk or set another ARTIFACT_DIR") from None

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum_(self, x: Tensor) -> Tensor:
        """x, in place, summed over the ranks."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def sync_clock(self, seconds: float) -> float:
        """Rank 0's reading: every rank takes the same learning rate and stops at the same step."""
        shared = torch.tensor(seconds, dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(shared, 0)
        return shared.item()

    def seconds(self) -> float:
        """A monotonic clock read after the device has finished its queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


def process_age() -> float:
    """Seconds since the process began, imports included; 0 where /proc does not tell."""
    with contextlib.suppress(OSError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def start_runtime(environ: Mapping[str, str]) -> Runtime:
    """The runtime of this process under torchrun, or alone."""
    rank, world, local = read_launch(environ)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        require(local < (gpus := torch.cuda.device_count()),
                f"LOCAL_RANK={local}: only {gpus} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        # Tensors on the host (the clock) go through gloo, those on devices through NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        hosts = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            if helper := extra("reliability", needed=False):
                helper.await_store(environ["MASTER_ADDR"], environ["MASTER_PORT"], hosts, 100)
            store, *_ = next(dist.rendezvous("env://", rank, world, timeout=timedelta(seconds=100)))
        except (RuntimeError, OSError):
            raise UserError(f"rank {rank}: no other rank at MASTER_ADDR; {LAUNCH}") from None
        # else a restarted run would find the addresses of the processes that died
        store = dist.PrefixStore(environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=1))  # rank 0 compresses for minutes
    return Runtime(rank, world, device)


class CudaGraphCache:
    """Runs functions of tensors as CUDA graphs, so that no kernel waits for the host.

    What a key stands for runs at once when it is first met, is recorded when it comes again and
    replayed from then on, whatever `work` is by then. A result is overwritten by the next call.
    Once `sealed` it records no more: other keys run at once, counted in `loose`."""

    def __init__(self, record: bool):
        self.record, self.graphs, self.pool, self.sealed, self.loose = record, {}, None, False, 0

    def __call__(self, key: tuple, work: Callable, inputs: Sequence[Tensor]) -> Any:
        """work(*inputs); the key names all that `work` depends on besides, shapes included."""
        if not self.record or self.sealed and not self.graphs.get(key):
            self.loose += self.sealed
            return work(*inputs)
        if key not in self.graphs:
            self.graphs[key] = None
            return work(*inputs)
        if self.graphs[key] is None:
            still, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            gc.collect()  # what is left of the first run is bound to another stream
            # NCCL's own thread may ask for events meanwhile: not this thread's error
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                result = work(*still)
            self.graphs[key], self.pool = (graph, still, result), graph.pool()
        graph, still, result = self.graphs[key]
        torch._foreach_copy_(still, inputs)
        graph.replay()
        return result


def progress_bar(total: int, rt: Runtime, label: str, unit: str) -> Any:
    """A tqdm bar on rank 0's terminal; elsewhere it shows nothing, since logs get plain lines."""
    from tqdm import tqdm
    shown = rt.rank == 0 and sys.stderr.isatty()
    return tqdm(total=total, desc=label, unit=unit, disable=not shown, leave=False)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes the file `path` whole or not at all: an older file stays until the new one is on disk.
    UserError if that fails (disk full, no such folder, no rights)."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write {len(data):,} bytes ({error.strerror}); an older "
                        "file stays whole: free the disk or set another ARTIFACT_DIR") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


# ==================================================================================================
# §3 Kernels
# ==================================================================================================
# Each kernel stands under its `*_ref` twin: its documentation, its test and, where it cannot run,
# its stand-in. An autograd function launches it forward and backward.

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    jit = triton.jit
except ImportError:  # without Triton the kernels stay plain functions that nothing calls
    class tl:
        constexpr = int
    triton, jit = None, lambda kernel: kernel


def fused(x: Tensor) -> bool:
    """Whether the kernels take x: of 2 or 4 bytes an element, on CUDA from sm80 or on the CPU under
    the interpreter (tests: TRITON_INTERPRET=1, set before this file is imported)."""
    if triton is None or x.element_size() not in (2, 4):
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


def _programs(x: Tensor, tiles: int, each: int) -> int:
    """How many programs share `tiles` tiles in a loop: so many a multiprocessor."""
    if not x.is_cuda:  # under the interpreter, so that each walks over several tiles
        return min(tiles, 2)
    return min(tiles, each * torch.cuda.get_device_properties(x.device).multi_processor_count)


# ---- softcap + cross-entropy

def softcap(z: Tensor, cap: "float | Tensor") -> Tensor:
    """cap * tanh(z / cap) in float32; cap [2] holds that of z > 0, then that of the others."""
    z = z.float()
    cap = cap if isinstance(cap, float) else torch.where(z > 0, *cap.float())
    return cap * torch.tanh(z / cap)


def softcap_cross_entropy_ref(z: Tensor, targets: Tensor, cap: "float | Tensor",
                              w: Tensor | None = None) -> Tensor:
    """z [N, V] raw logits, or z w^T, targets [N] int64 -> losses [N] float32, in nats."""
    return F.cross_entropy(softcap(z if w is None else z @ w.T, cap), targets, reduction="none")


@jit
def _tanh(u):
    """(t = tanh u, 1 - t^2, t - u (1 - t^2)) to float32 rounding, by a polynomial near 0."""
    s = u * u
    near = s * (0.13333114 + s * (-0.05390943 + s * (0.02130939 - s * 0.00661023))) - 0.33333332
    e, close = tl.exp(-2.0 * tl.abs(u)), s < 0.3025
    r = 1.0 / (1.0 + e)
    far, slope = 1.0 - 2.0 * e * r, 4.0 * e * r * r
    t = tl.where(close, u + u * s * near, tl.where(u < 0.0, -far, far))
    return t, slope, tl.where(close, u * (s * near + t * t), t - u * slope)


# Saves the float32 softcapped logits, their log-softmax and its gradient: 4 bytes a logit each,
# written and read again (3.2 GB at N=98304, V=8192). One program holds its row in registers, reads
# it once and leaves its loss's gradient, dlogits slope, in z's place; a cap's sums dlogits bend.
@jit
def _softcap_ce(z_ptr, target_ptr, loss_ptr, dz_ptr, cap, dcap_ptr, V, LEARNT: tl.constexpr,
                BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
    if LEARNT:
        cap = tl.where(z > 0.0, tl.load(cap).to(tl.float32), tl.load(cap + 1).to(tl.float32))
    t, slope, bend = _tanh(z * (1.0 / cap))
    logits = tl.where(cols < V, cap * t, -1e38)
    top, target = tl.max(logits, 0), tl.load(target_ptr + row)
    e = tl.exp(logits - top)
    total = tl.sum(e, 0)
    hit = cols == target
    tl.store(loss_ptr + row, (top - tl.sum(tl.where(hit, logits, 0.0), 0)) + tl.log(total))
    dlogits = e * (1.0 / total) - tl.where(hit, 1.0, 0.0)
    dz = dlogits * slope
    tl.store(dz_ptr + row * V + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < V)
    if LEARNT:
        dcap = dlogits * bend
        tl.store(dcap_ptr + 2 * row, tl.sum(tl.where(z > 0.0, dcap, 0.0), 0))
        tl.store(dcap_ptr + 2 * row + 1, tl.sum(tl.where(z > 0.0, 0.0, dcap), 0))


MOST_LOGITS = 16384  # of a row that a program holds in registers


class SoftcapCrossEntropy(torch.autograd.Function):
    """Losses for z = h w^T, or z = h without w; keeps their gradients dz [N, V] in z's place."""

    @staticmethod
    def forward(ctx, h: Tensor, w: Tensor | None, targets: Tensor, cap: float | Tensor) -> Tensor:
        z = h.contiguous() if w is None else h @ w.T
        dz, learnt = torch.empty_like(z) if w is None else z, isinstance(cap, Tensor)
        (N, V), losses = z.shape, z.new_empty(z.shape[0], dtype=torch.float32)
        dcap = losses.new_empty(N, 2) if learnt else None
        if N:
            _softcap_ce[N,](z, targets.contiguous(), losses, dz, cap, dcap, V, LEARNT=int(learnt),
                            BLOCK=triton.next_power_of_2(V), num_warps=16)
        ctx.save_for_backward(None if w is None else h, w, dz, dcap)
        return losses

    @staticmethod
    def backward(ctx, dlosses: Tensor) -> tuple:
        (h, w, dz, dcap), scale = ctx.saved_tensors, dlosses[:, None]
        dcap = None if dcap is None else (dcap * scale).sum(0)
        if w is None:
            return dz * scale.to(dz.dtype), None, None, dcap
        return (dz @ w * scale).to(h.dtype), dz.T @ (h * scale).to(h.dtype), None, dcap


def softcap_cross_entropy(z: Tensor, targets: Tensor, cap: "float | Tensor",
                          w: Tensor | None = None) -> Tensor:
    """Cross-entropy of cap * tanh(z / cap), token by token; all arithmetic in float32.

    z [N, V] raw logits (bfloat16, float16 or float32), or their factors: z [N, d] and w [V, d];
    then the logits are never kept. targets [N] int64 in 0..V-1 (not checked) -> losses [N] float32,
    in nats. Gradients have their input's dtype. A learnt cap [2] is `softcap`'s."""
    if fused(z) and (z.shape[1] if w is None else len(w)) <= MOST_LOGITS:
        return SoftcapCrossEntropy.apply(z, w, targets, cap)
    return softcap_cross_entropy_ref(z, targets, cap, w)


# ---- MLP with squared LeakyReLU

def leaky_mlp_ref(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """x [N, d], up [h, d], down [d, h] -> [N, d]: leaky_relu(x up^T)^2 down^T."""
    return F.leaky_relu(x @ up.T, slope).square() @ down.T


# Saves the passes over [N, h] (0.4 GB each at N=98304, h=2048) after the two large products: with
# pre = x up^T and f(z) = max(z, slope z)^2, act = f(pre) and dpre = (dy down) f'(pre) leave the
# registers done. pre is not kept: |f'| follows from f, and the last bit of act is pre's sign. An
# act off by at most one unit in the last place is as near as the square of a rounded pre.
# Persistent: the next tile's TMA loads overlap this one's epilogue. Tiles run along h first, so
# that programs side by side share a few row blocks of `a`; all of `b` stays in L2.
@jit
def _leaky_mlp(a_desc, b_desc, act_desc, out_desc, N, depth, width, slope,
               BACKWARD: tl.constexpr, PRECISION: tl.constexpr, BITS: tl.constexpr,
               PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    across = tl.cdiv(width, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BM) * across, PROGRAMS, flatten=True):
        row, col = (tile // across) * BM, (tile % across) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, depth, BK):
            # [BK, BN] from down [depth, width] or from up [width, depth]
            b = b_desc.load([k, col]) if BACKWARD else b_desc.load([col, k]).T
            acc = tl.dot(a_desc.load([row, k]), b, acc, input_precision=PRECISION)
        halves = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        for i in tl.static_range(2):  # half the staging memory: room for one more stage of loads
            half, at = halves[i], col + i * (BN // 2)
            if BACKWARD:
                act = act_desc.load([row, at])
                slopes = tl.where((act.to(BITS, bitcast=True) & 1) == 0, 2.0, -2.0 * slope)
                out = (half * slopes * tl.sqrt(act.to(tl.float32))).to(out_desc.dtype)
            else:
                leaky = tl.maximum(half, slope * half)
                act = leaky * leaky
                near = act.to(out_desc.dtype)
                bits = near.to(BITS, bitcast=True)
                ulp = tl.where(act >= near.to(tl.float32), 1, -1)  # to the next on act's side
                wrong = (bits & 1) != (half < 0.0).to(BITS)
                out = tl.where(wrong, bits + ulp, bits).to(BITS).to(out_desc.dtype, bitcast=True)
            out_desc.store([row, at], out)


# (BM, BN, BK, warps, stages) by bytes an element, then forward, backward. At 2 bytes, all that
# sm90's 227 KiB of shared memory hold (224 and 208 KiB); under 170 registers, nothing spilled.
LEAKY_MLP_TILES = {2: ((128, 256, 64, 8, 4), (128, 256, 64, 8, 3)),
                   4: ((64, 64, 32, 8, 2), (64, 64, 32, 8, 2))}


def _launch_leaky_mlp(a: Tensor, b: Tensor, act: Tensor, out: Tensor,
                      slope: float, backward: bool) -> None:
    (N, depth), width = a.shape, act.shape[1]
    BM, BN, BK, warps, stages = LEAKY_MLP_TILES[a.element_size()][backward]
    programs = _programs(a, triton.cdiv(N, BM) * triton.cdiv(width, BN), 1)
    blocks = [BM, BK], [BK, BN] if backward else [BN, BK], [BM, BN // 2], [BM, BN // 2]
    tensors = a.contiguous(), b.contiguous(), act, out
    described = map(TensorDescriptor.from_tensor, tensors, blocks)
    exact = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if programs:
        _leaky_mlp[programs,](
            *described, N, depth, width, slope, BACKWARD=int(backward), PROGRAMS=programs,
            PRECISION="ieee" if exact else "tf32", BM=BM, BN=BN, BK=BK,
            BITS=tl.int16 if a.element_size() == 2 else tl.int32, num_warps=warps,
            num_stages=stages)


class LeakyMlp(torch.autograd.Function):
    """Keeps act [N, h], with the signs in its last bits."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        act = x.new_empty(x.shape[0], up.shape[0])
        _launch_leaky_mlp(x, up, act, act, slope, backward=False)
        ctx.save_for_backward(x, up, down, act)
        ctx.slope = slope
        return act @ down.T

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        x, up, down, act = ctx.saved_tensors
        need_x, need_up, need_down, _ = ctx.needs_input_grad
        dpre = torch.empty_like(act)
        _launch_leaky_mlp(dy, down, act, dpre, ctx.slope, backward=True)
        return (dpre @ up if need_x else None, dpre.T @ x if need_up else None,
                dy.T @ act if need_down else None, None)


def leaky_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """MLP with squared LeakyReLU: leaky_relu(x up^T, slope)^2 down^T, 0 <= slope <= 1.

    x [N, d], up [h, d], down [d, h], of one dtype -> [N, d]. Sums are float32, results x's dtype.
    Tensor descriptors (TMA) need rows of 16-byte multiples; other widths take the twin."""
    aligned = all(t.shape[1] * t.element_size() % 16 == 0 for t in (up, down))
    if fused(x) and aligned:
        return LeakyMlp.apply(x, up, down, slope)
    return leaky_mlp_ref(x, up, down, slope)


# ---- residual mix + RMSNorm
# Between two products the state passes through here. One kernel a direction; the backward kernel
# works from n and 1/rms, so that u need not be kept, and adds its parameters' gradients up in
# registers, program by program, always in the same order.

EPS = float(torch.finfo(torch.float32).eps)


def rms(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension without a weight; epsilon is float32's."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def mix_skip(a: Tensor, skip: Tensor, lerp: Tensor) -> Tensor:
    """a and the skip, times weight lerp[0], joined by gate lerp[1] if there is one."""
    weight, *gate = lerp.to(a.dtype)
    return torch.lerp(weight * skip, a, gate[0].sigmoid()) if gate else a + weight * skip


def residual_mix_rmsnorm_ref(a: Tensor, m: Tensor | None, skip: Tensor | None, lerp: Tensor | None,
                             x0: Tensor | None, mix: Tensor | None, scale: float,
                             window: int) -> tuple:
    """a, m, skip, x0 [..., d]; lerp [1 or 2, d], mix [2, d] -> (a + m, u, n, n[..., :window], x0).

    u is a + m with the skip (weight lerp[0], gate lerp[1]) and x0 mixed in; n = rms(u) * scale."""
    a = a if m is None else a + m
    u = a if skip is None else mix_skip(a, skip, lerp)
    if mix is not None:
        u = mix[0].to(a.dtype) * u + mix[1].to(a.dtype) * x0
    n = rms(u) * scale
    return a, u, n, n[..., :window], x0


@jit
def _residual_mix_rmsnorm_forward(
        v_ptr, m_ptr, skip_ptr, lerp_ptr, x0_ptr, mix_ptr, a_ptr, u_ptr, n_ptr, gate_input_ptr,
        rstd_ptr, N, d, window, scale, eps, ADD: tl.constexpr, SKIP: tl.constexpr,
        MIX: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside, wide = (rows < N)[:, None] & (cols < d)[None, :], cols < d
    at = rows.to(tl.int64)[:, None] * d + cols[None, :]
    u = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        u += tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(a_ptr + at, u.to(a_ptr.dtype.element_ty), mask=inside)
    if SKIP:
        skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
        skip *= tl.load(lerp_ptr + cols, mask=wide, other=0.0).to(tl.float32)[None, :]
        if SKIP == 2:
            gate = tl.sigmoid(tl.load(lerp_ptr + d + cols, mask=wide, other=0.0).to(tl.float32))
            u = skip + gate[None, :] * (u - skip)
        else:
            u += skip
    if MIX:
        x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mix0 = tl.load(mix_ptr + cols, mask=wide, other=0.0).to(tl.float32)
        mix1 = tl.load(mix_ptr + d + cols, mask=wide, other=0.0).to(tl.float32)
        u = mix0[None, :] * u + mix1[None, :] * x0
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=inside)
    rstd = tl.rsqrt(tl.sum(u * u, 1) / d + eps)
    n = (u * (rstd * scale)[:, None]).to(n_ptr.dtype.element_ty)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    tl.store(n_ptr + at, n, mask=inside)
    if WINDOW:
        gate_at = rows[:, None] * window + cols[None, :]
        tl.store(gate_input_ptr + gate_at, n, mask=inside & (cols < window)[None, :])


# With g = dn * scale and h = n / scale: du = rstd (g - h mean(h g)), and what came for u itself.
# u = mix0 (keep a + join weight skip) + mix1 x0, where keep = sigmoid(gate) and join = 1 - keep, or
# both 1: every parameter's gradient follows from the sums of a du, x0 du and skip du.
@jit
def _residual_mix_rmsnorm_backward(
        da_ptr, du_ptr, dn_ptr, dgate_input_ptr, dx0_in_ptr, a_ptr, n_ptr, rstd_ptr, skip_ptr,
        lerp_ptr, x0_ptr, mix_ptr, dv_ptr, dskip_ptr, dx0_ptr, sums_ptr, N, d, window, scale,
        DA: tl.constexpr, DU: tl.constexpr, DWINDOW: tl.constexpr, DX0: tl.constexpr,
        SKIP: tl.constexpr, MIX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    wide = cols < d
    to_a = 1.0
    if MIX:
        mix0 = tl.load(mix_ptr + cols, mask=wide, other=0.0).to(tl.float32)[None, :]
        to_x0 = tl.load(mix_ptr + d + cols, mask=wide, other=0.0).to(tl.float32)[None, :]
        to_a = mix0
        sum_a = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        sum_x0 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if SKIP:
        to_skip = mix0 * tl.load(lerp_ptr + cols, mask=wide, other=0.0).to(tl.float32)[None, :]
        if SKIP == 2:
            gate = tl.load(lerp_ptr + d + cols, mask=wide, other=0.0).to(tl.float32)
            to_a *= tl.sigmoid(gate)[None, :]
            to_skip *= tl.sigmoid(-gate)[None, :]
        sum_skip = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=2):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & wide[None, :]
        at = rows.to(tl.int64)[:, None] * d + cols[None, :]
        g = tl.load(dn_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if DWINDOW:
            gate_at = rows[:, None] * window + cols[None, :]
            g += tl.load(dgate_input_ptr + gate_at, mask=inside & (cols < window)[None, :],
                         other=0.0).to(tl.float32)
        g *= scale
        h = tl.load(n_ptr + at, mask=inside, other=0.0).to(tl.float32) / scale
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        du = rstd[:, None] * (g - h * (tl.sum(h * g, 1) / d)[:, None])
        if DU:
            du += tl.load(du_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if MIX:
            sum_a += du * tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_x0 += du * tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dx0 = to_x0 * du
            if DX0:
                dx0 += tl.load(dx0_in_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx0_ptr + at, dx0.to(dx0_ptr.dtype.element_ty), mask=inside)
        if SKIP:
            sum_skip += du * tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dskip_ptr + at, (to_skip * du).to(dskip_ptr.dtype.element_ty), mask=inside)
        dv = to_a * du
        if DA:
            dv += tl.load(da_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    at = sums_ptr + tl.program_id(0) * 3 * d + cols
    if MIX:
        tl.store(at, tl.sum(sum_a, 0), mask=wide)
        tl.store(at + d, tl.sum(sum_x0, 0), mask=wide)
    if SKIP:
        tl.store(at + 2 * d, tl.sum(sum_skip, 0), mask=wide)


def _tile(x: Tensor, elements: int) -> dict[str, int]:
    """ROWS and BLOCK of a tile of about so many elements of x."""
    block = triton.next_power_of_2(x.shape[-1])
    return dict(ROWS=max(1, elements // block), BLOCK=block)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


class ResidualMixRMSNorm(torch.autograd.Function):
    """The results that are not given; the gradients of x0 and gate_input that come back from where
    they were used next are added in the kernel, not in passes of their own."""

    @staticmethod
    def forward(ctx, a, m, skip, lerp, x0, mix, scale, window):
        *rows, d = a.shape
        ctx.set_materialize_grads(False)
        a, m, skip, lerp, given_x0, mix = _dense(a, m, skip, lerp, x0, mix)
        whole = None if m is None else torch.empty_like(a)
        u = None if mix is None else torch.empty_like(a)
        n, gate_input = torch.empty_like(a), a.new_empty(*rows, window)
        rstd, tile = a.new_empty(rows, dtype=torch.float32), _tile(a, 4096)
        if N := rstd.numel():
            _residual_mix_rmsnorm_forward[triton.cdiv(N, tile["ROWS"]),](
                a, m, skip, lerp, given_x0, mix, whole, u, n, gate_input, rstd, N, d, window, scale,
                EPS, ADD=int(m is not None), SKIP=0 if skip is None else len(lerp),
                MIX=int(mix is not None), WINDOW=int(window > 0), **tile)
        kept = None if mix is None else a if m is None else whole
        ctx.save_for_backward(kept, n, rstd, skip, lerp, given_x0, mix)
        ctx.scale, ctx.window = scale, window
        return whole, u, n, gate_input, x0

    @staticmethod
    def backward(ctx, da, du, dn, dgate_input, dx0):
        a, n, rstd, skip, lerp, x0, mix = ctx.saved_tensors
        dn = torch.zeros_like(n) if dn is None else dn
        da, du, dn, dgate_input, dx0 = _dense(da, du, dn, dgate_input, dx0)
        tile, d, N = _tile(n, 2048), n.shape[-1], rstd.numel()
        programs = _programs(n, triton.cdiv(N, tile["ROWS"]), 4)
        dv, dskip, to_x0 = (None if x is None else torch.empty_like(n) for x in (n, skip, mix))
        sums = n.new_empty(programs, 3, d, dtype=torch.float32)  # of a du, x0 du and skip du
        if N:
            _residual_mix_rmsnorm_backward[programs,](
                da, du, dn, dgate_input, dx0, a, n, rstd, skip, lerp, x0, mix, dv, dskip, to_x0,
                sums, N, d, ctx.window, ctx.scale, DA=int(da is not None), DU=int(du is not None),
                DWINDOW=int(dgate_input is not None and ctx.window > 0), DX0=int(dx0 is not None),
                SKIP=0 if skip is None else len(lerp), MIX=int(mix is not None), **tile)
        dlerp = dmix = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[5]:
            of_a, of_x0, of_skip = sums.sum(0)
            if skip is not None:
                weight, *gate = lerp.float()
                keep, join = (gate[0].sigmoid(), (-gate[0]).sigmoid()) if gate else (1.0, 1.0)
                dlerp = mix[0] * join * of_skip, mix[0] * keep * join * (of_a - weight * of_skip)
                dlerp = torch.stack(dlerp[: len(lerp)]).to(lerp.dtype)
                of_a = keep * of_a + join * weight * of_skip
            dmix = torch.stack((of_a, of_x0)).to(mix.dtype)
        return dv, dv if ctx.needs_input_grad[1] else None, dskip, dlerp, to_x0, dmix, None, None


def residual_mix_rmsnorm(a: Tensor, m: Tensor | None = None, skip: Tensor | None = None,
                         lerp: Tensor | None = None, x0: Tensor | None = None,
                         mix: Tensor | None = None, scale: float = 1.0, window: int = 0) -> tuple:
    """The twin in one kernel; a skip needs a mix. Use the gate_input and x0 that it returns."""
    if not fused(a):
        return residual_mix_rmsnorm_ref(a, m, skip, lerp, x0, mix, scale, window)
    whole, u, n, gate_input, x0 = ResidualMixRMSNorm.apply(a, m, skip, lerp, x0, mix, scale, window)
    whole = a if m is None else whole
    return whole, whole if mix is None else u, n, gate_input, x0


# ---- FlashAttention-4 (twin: attend_ref, §4)
# q, y [N, H, D]; k, v [N, K, D]; cu_seqlens int32 [S + 1], bounds of segments of at most max_len.

FA4 = "flash_attn.cute.interface"


def fa4_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> tuple:
    """(y, lse [H, N] float32)."""
    y, lse, *_ = importlib.import_module(FA4)._flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_len,
        max_seqlen_k=max_len, causal=True, return_lse=True)
    return y, lse


def fa4_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
                 cu_seqlens: Tensor, max_len: int) -> list[Tensor]:
    """[dq, dk, dv]."""
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    importlib.import_module(FA4)._flash_attn_bwd(
        q, k, v, y, dy, lse, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_len, max_seqlen_k=max_len, dq=grads[0], dk=grads[1], dv=grads[2])
    return grads


def attend_fa4(q: Tensor, k: Tensor, v: Tensor, segments: "Segments") -> Tensor:
    """A backend of §4, for bfloat16 on sm90 and later; `attention_core` fuses around it."""
    cu_seqlens, most = segments.cu_seqlens, segments.max_len
    return importlib.import_module(FA4).flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=most,
        max_seqlen_k=most, causal=True)[0]


# ---- between the QKV product and the output product
# One kernel before attention, one after it. Keys and values are written once for every query head:
# the forward pass reads one copy, and FlashAttention's backward pass then needs no float32 sums
# over the heads of a group (0.21 of 1.23 ms); they are added where dk and dv are read anyway.

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: x [B, T, heads, D]; cos, sin [T, R/2] turn channels 2j and 2j + 1 of the first R."""
    (turned, rest), cos, sin = x.tensor_split([2 * cos.shape[1]], -1), cos[:, None], sin[:, None]
    x0, x1 = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((x0 * cos + x1 * sin, x1 * cos - x0 * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def attention_core_ref(x: Tensor, gate_input: Tensor, gain: Tensor, gate: Tensor | None,
                       rope: Tensor, attend: Callable, xsa: "bool | Tensor",
                       gate_scale: float) -> Tensor:
    """x [B, T, H + 2K, D] queries, keys, values; gate_input [B, T, W]; gain [H]; gate [H, W]; rope
    [2, T, R/2] float32 -> [B, T, H D]: norm, RoPE and gain on q and k, attention, XSA (of xsa
    [H] how much a head), sparse gate."""
    H, K = len(gain), (x.shape[2] - len(gain)) // 2
    qk, v = x.split([H + K, K], dim=2)
    gain = torch.cat((gain, gain.new_ones(K))).to(x.dtype)
    y = attend(*(rotate(rms(qk), *rope) * gain[:, None]).split([H, K], dim=2), v)
    if xsa is not False:  # less its part along the token's own value
        y, axis = y.unflatten(2, (K, -1)), F.normalize(v, dim=-1)[:, :, :, None]
        along = (y * axis).sum(-1, keepdim=True)
        along = along if xsa is True else along * xsa.to(y.dtype).view(K, -1, 1)
        y = (y - along * axis).flatten(2, 3)
    if gate is not None:
        y = y * torch.sigmoid(gate_scale * F.linear(gate_input, gate.to(x.dtype)))[..., None]
    return y.flatten(2)


@jit
def _rotation(rope_ptr, rows, T, PAIRS: tl.constexpr, D: tl.constexpr):
    pair = tl.arange(0, D // 2)[None, :]
    at, turns = (rows % T)[:, None] * PAIRS + pair, (rows >= 0)[:, None] & (pair < PAIRS)
    cos = tl.load(rope_ptr + at, mask=turns, other=1.0)
    sin = tl.load(rope_ptr + T * PAIRS + at, mask=turns, other=0.0)
    return cos[:, None, :], sin[:, None, :]


# A tile holds all heads of ROWS tokens: q, k and v beside each other, HEADS >= H + 2K of them.
@jit
def _qk_norm_rope(x_ptr, gain_ptr, rope_ptr, q_ptr, k_ptr, v_ptr, N, T, eps, H: tl.constexpr,
                  K: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
                  ROWS: tl.constexpr):
    G: tl.constexpr = H // K
    rows, heads = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEADS)
    head, col = heads[None, :, None], tl.arange(0, D)[None, None, :]
    row = rows.to(tl.int64)[:, None, None]
    inside = (row < N) & (col < D)
    x = tl.load(x_ptr + row * ((H + 2 * K) * D) + head * D + col, mask=inside & (head < H + 2 * K),
                other=0.0).to(tl.float32)
    x0, x1 = tl.split(tl.reshape(x, (ROWS, HEADS, D // 2, 2)))
    cos, sin = _rotation(rope_ptr, rows, T, PAIRS, D)
    rstd = tl.rsqrt(tl.sum(x0 * x0 + x1 * x1, 2) / D + eps)
    gain = tl.load(gain_ptr + heads, mask=heads < H, other=1.0)
    f = (rstd * gain[None, :])[:, :, None]
    turned = tl.join(f * (x0 * cos + x1 * sin), f * (x1 * cos - x0 * sin))
    out = tl.where(head < H + K, tl.reshape(turned, (ROWS, HEADS, D)), x).to(q_ptr.dtype.element_ty)
    at = row * (H * D) + col
    tl.store(q_ptr + at + head * D, out, mask=inside & (head < H))
    for g in tl.static_range(G):
        tl.store(k_ptr + at + ((head - H) * G + g) * D, out,
                 mask=inside & (head >= H) & (head < H + K))
        tl.store(v_ptr + at + ((head - H - K) * G + g) * D, out,
                 mask=inside & (head >= H + K) & (head < H + 2 * K))


# With n = x rstd, t the gradient turned back: dgain = sum n t, dx = gain rstd (t - n mean(n t)).
@jit
def _qk_norm_rope_backward(dq_ptr, dk_ptr, dv_ptr, dvx_ptr, x_ptr, gain_ptr, rope_ptr, dx_ptr,
                           dgain_ptr, N, T, eps, XSA: tl.constexpr, H: tl.constexpr,
                           K: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
                           HEADS: tl.constexpr, ROWS: tl.constexpr):
    G: tl.constexpr = H // K
    heads = tl.arange(0, HEADS)
    head, col = heads[None, :, None], tl.arange(0, D)[None, None, :]
    gain = tl.load(gain_ptr + heads, mask=heads < H, other=1.0)
    sums = tl.zeros((ROWS, HEADS), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row = rows.to(tl.int64)[:, None, None]
        inside = (row < N) & (col < D)
        is_k, is_v = (head >= H) & (head < H + K), (head >= H + K) & (head < H + 2 * K)
        at = row * (H * D) + col
        dy = tl.load(dq_ptr + at + head * D, mask=inside & (head < H), other=0.0).to(tl.float32)
        for g in tl.static_range(G):
            dy += tl.load(dk_ptr + at + ((head - H) * G + g) * D, mask=inside & is_k,
                          other=0.0).to(tl.float32)
            dy += tl.load(dv_ptr + at + ((head - H - K) * G + g) * D, mask=inside & is_v,
                          other=0.0).to(tl.float32)
        if XSA:
            dy += tl.load(dvx_ptr + row * (K * D) + (head - H - K) * D + col, mask=inside & is_v,
                          other=0.0).to(tl.float32)
        at = row * ((H + 2 * K) * D) + head * D + col
        x = tl.load(x_ptr + at, mask=inside & (head < H + K), other=0.0).to(tl.float32)
        x0, x1 = tl.split(tl.reshape(x, (ROWS, HEADS, D // 2, 2)))
        y0, y1 = tl.split(tl.reshape(dy, (ROWS, HEADS, D // 2, 2)))
        cos, sin = _rotation(rope_ptr, rows, T, PAIRS, D)
        t0, t1 = y0 * cos - y1 * sin, y1 * cos + y0 * sin
        rstd = tl.rsqrt(tl.sum(x0 * x0 + x1 * x1, 2) / D + eps)
        nt = tl.sum(x0 * t0 + x1 * t1, 2) * rstd
        sums += nt
        f, along = (rstd * gain[None, :])[:, :, None], (nt * rstd / D)[:, :, None]
        dx = tl.reshape(tl.join(f * (t0 - x0 * along), f * (t1 - x1 * along)), (ROWS, HEADS, D))
        dx = tl.where(head < H + K, dx, dy).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, dx, mask=inside & (head < H + 2 * K))
    tl.store(dgain_ptr + tl.program_id(0) * HEADS + heads, tl.sum(sums, 0))


@jit
def _attn_gate(input_ptr, gate_ptr, rows, N, window, scale, H: tl.constexpr, WINDOW: tl.constexpr):
    """(sigmoid [ROWS, H], gate_input [ROWS, 1, WINDOW], gate [1, H, WINDOW])."""
    w, heads = tl.arange(0, WINDOW), tl.arange(0, H)
    gate_input = tl.load(input_ptr + rows[:, None] * window + w[None, :], other=0.0, mask=(
        rows < N)[:, None] & (w < window)[None, :]).to(tl.float32)[:, None, :]
    gate = tl.load(gate_ptr + heads[:, None] * window + w[None, :], other=0.0,
                   mask=(w < window)[None, :] & (heads >= 0)[:, None]).to(tl.float32)[None, :, :]
    return tl.sigmoid(scale * tl.sum(gate_input * gate, 2)), gate_input, gate


@jit
def _value_axis(x_ptr, row, N, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
    """(the values' directions [ROWS, H, D], 1 / their lengths [ROWS, H, 1])."""
    head, col = tl.arange(0, H)[None, :, None], tl.arange(0, D)[None, None, :]
    at = row * ((H + 2 * K) * D) + (H + K + head // (H // K)) * D + col
    v = tl.load(x_ptr + at, mask=(row < N) & (col < D), other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(v * v, 2)), 1e-12)
    return v * inverse[:, :, None], inverse[:, :, None]


@jit
def _xsa_gate(y_ptr, x_ptr, gate_input_ptr, gate_ptr, alpha_ptr, out_ptr, N, window, scale,
              XSA: tl.constexpr, GATE: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
              D: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, head = rows.to(tl.int64)[:, None, None], tl.arange(0, H)[None, :, None]
    col = tl.arange(0, D)[None, None, :]
    at, inside = row * (H * D) + head * D + col, (row < N) & (col < D) & (head < H)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if XSA:
        axis, _ = _value_axis(x_ptr, row, N, H, K, D)
        y -= tl.load(alpha_ptr + head) * tl.sum(y * axis, 2)[:, :, None] * axis
    if GATE:
        y *= _attn_gate(gate_input_ptr, gate_ptr, rows, N, window, scale, H, WINDOW)[0][:, :, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


# z = y - alpha (y.axis) axis, out = z s: with dz = dout s, dy = dz - alpha (dz.axis) axis, dalpha =
# -(y.axis) (dz.axis), dv = alpha (2 (y.axis) (dz.axis) axis - (y.axis) dz - (dz.axis) y) / |v|.
@jit
def _xsa_gate_backward(dout_ptr, y_ptr, x_ptr, gate_input_ptr, gate_ptr, alpha_ptr, dy_ptr, dvx_ptr,
                       dgate_input_ptr, dgate_ptr, dalpha_ptr, N, window, scale, XSA: tl.constexpr,
                       GATE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
                       WINDOW: tl.constexpr, ROWS: tl.constexpr):
    head, col = tl.arange(0, H)[None, :, None], tl.arange(0, D)[None, None, :]
    heads, w = tl.arange(0, H), tl.arange(0, WINDOW)
    alpha, of_alpha = tl.load(alpha_ptr + head), tl.zeros((H,), dtype=tl.float32)
    if GATE:
        sums = tl.zeros((H, WINDOW), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row = rows.to(tl.int64)[:, None, None]
        at, inside = row * (H * D) + head * D + col, (row < N) & (col < D) & (head < H)
        dz = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if XSA:
            axis, inverse = _value_axis(x_ptr, row, N, H, K, D)
            along = tl.sum(y * axis, 2)[:, :, None]
        if GATE:
            s, gate_input, gate = _attn_gate(gate_input_ptr, gate_ptr, rows, N, window, scale, H,
                                             WINDOW)
            z = y
            if XSA:
                z = y - alpha * along * axis
            dlogit = (tl.sum(dz * z, 2) * s * (1.0 - s) * scale)[:, :, None]
            sums += tl.sum(dlogit * gate_input, 0)
            tl.store(dgate_input_ptr + rows[:, None] * window + w[None, :],
                     tl.sum(dlogit * gate, 1).to(dgate_input_ptr.dtype.element_ty),
                     mask=(rows < N)[:, None] & (w < window)[None, :])
            dz *= s[:, :, None]
        if XSA:
            back = tl.sum(dz * axis, 2)[:, :, None]
            of_alpha -= tl.sum(tl.reshape(along * back, (ROWS, H)), 0)
            dv = (2.0 * along * back * axis - along * dz - back * y) * inverse * alpha
            dv = tl.sum(tl.reshape(dv, (ROWS, K, H // K, D)), 2)
            group = tl.arange(0, K)[None, :, None]
            tl.store(dvx_ptr + row * (K * D) + group * D + col, dv.to(dvx_ptr.dtype.element_ty),
                     mask=(row < N) & (col < D) & (group < K))
            dz -= alpha * back * axis
        tl.store(dy_ptr + at, dz.to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(dalpha_ptr + tl.program_id(0) * H + heads, of_alpha)
    if GATE:
        at = (tl.program_id(0) * H + heads[:, None]) * WINDOW + w[None, :]
        tl.store(dgate_ptr + at, sums)


class FusedAttentionCore(torch.autograd.Function):
    """The twin around FlashAttention-4; H, K and D are powers of 2. Tiles: fastest on an H200."""

    @staticmethod
    def forward(ctx, x: Tensor, gate_input: Tensor, gain: Tensor, gate: Tensor | None, rope: Tensor,
                segments: "Segments", xsa: bool | Tensor, gate_scale: float) -> Tensor:
        x, gate_input, gain, rope = _dense(x, gate_input, gain, rope.float())
        (*rows, channels, D), (H,), (_, T, pairs) = x.shape, gain.shape, rope.shape
        N, K = math.prod(rows), (channels - H) // 2
        alpha = (xsa if isinstance(xsa, Tensor) else torch.ones_like(gain)).float()
        ctx.before = dict(H=H, K=K, D=D, PAIRS=pairs, HEADS=triton.next_power_of_2(channels))
        ctx.after = dict(XSA=int(xsa is not False), GATE=int(gate is not None), H=H, K=K,
                         D=D, WINDOW=triton.next_power_of_2(max(1, gate_input.shape[-1])))
        ctx.sizes, ctx.max_len = (N, gate_input.shape[-1], gate_scale), segments.max_len
        q, k, v = (x.new_empty(N, H, D) for _ in range(3))
        _qk_norm_rope[triton.cdiv(N, 2),](x, gain, rope, q, k, v, N, T, EPS, **ctx.before, ROWS=2)
        y, lse = fa4_forward(q, k[:, :: H // K], v[:, :: H // K], segments.cu_seqlens, ctx.max_len)
        out = x.new_empty(*rows, H * D)
        _xsa_gate[triton.cdiv(N, 4),](y, x, gate_input, gate, alpha, out, *ctx.sizes, **ctx.after,
                                      ROWS=4)
        ctx.save_for_backward(x, gate_input, gain, gate, rope, alpha, q, k, v, y, lse,
                              segments.cu_seqlens)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple:
        x, gate_input, gain, gate, rope, alpha, *attention = ctx.saved_tensors
        y, (N, window, _), K, D = attention[3], ctx.sizes, ctx.before["K"], ctx.before["D"]
        programs, H, dvx = _programs(x, triton.cdiv(N, 2), 16), len(gain), x.new_empty(N, K, D)
        dy, dgate_input = torch.empty_like(y), torch.empty_like(gate_input)
        dgate, dalpha = (rope.new_empty(programs, H, n) for n in (ctx.after["WINDOW"], 1))
        _xsa_gate_backward[programs,](dout.contiguous(), y, x, gate_input, gate, alpha, dy, dvx,
                                      dgate_input, dgate, dalpha, *ctx.sizes, **ctx.after, ROWS=2,
                                      num_warps=2)
        dqkv = fa4_backward(dy, *attention, ctx.max_len)
        dx, programs = torch.empty_like(x), _programs(x, triton.cdiv(N, 4), 4)
        dgain = rope.new_empty(programs, ctx.before["HEADS"])
        _qk_norm_rope_backward[programs,](*dqkv, dvx, x, gain, rope, dx, dgain, N, rope.shape[1],
                                          EPS, XSA=ctx.after["XSA"], **ctx.before, ROWS=4)
        dgain = dgain.sum(0)[:H].to(gain.dtype)
        dgate = None if gate is None else dgate.sum(0)[:, :window].to(gate.dtype)
        dalpha = dalpha.sum(0)[:, 0] if ctx.needs_input_grad[6] else None
        return dx, None if gate is None else dgate_input, dgain, dgate, None, None, dalpha, None


def attention_core_fits(H: int, K: int, D: int) -> bool:
    """Whether the kernels take so many heads of this width: powers of 2."""
    return all(n & (n - 1) == 0 for n in (H, K, D))


def attention_core(x: Tensor, gate_input: Tensor, gain: Tensor, gate: Tensor | None, rope: Tensor,
                   attend: Callable, segments: "Segments", xsa: "bool | Tensor",
                   gate_scale: float) -> Tensor:
    """The twin over segments; fused around FlashAttention-4 where the shapes are its kernels'."""
    H, K = len(gain), (x.shape[2] - len(gain)) // 2
    if attend is attend_fa4 and fused(x) and attention_core_fits(H, K, x.shape[3]):
        return FusedAttentionCore.apply(x, gate_input, gain, gate, rope, segments, xsa, gate_scale)

    def packed(q, k, v):
        return attend(*(t.flatten(0, 1) for t in (q, k, v)), segments).view_as(q)
    return attention_core_ref(x, gate_input, gain, gate, rope, packed, xsa, gate_scale)


# ==================================================================================================
# §4 Attention
# ==================================================================================================
# Causal inside each segment of a packed row, grouped heads, scale 1 / sqrt(D). In every backend:
# q [N, H, D]; k, v [N, K, D], head h reads group h // (H // K); -> y [N, H, D].
@dataclass(frozen=True, eq=False)
class Segments:
    """cu_seqlens int32 [S + 1]: 0 to N, may end in several N; max_len bounds every length."""
    cu_seqlens: Tensor
    max_len: int

    @classmethod
    def batch(cls, B: int, T: int, device: torch.device) -> "Segments":
        return cls(torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device), T)

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(count, length) for each run of neighbours of equal length; read from the device once."""
        lengths = itertools.groupby(n for n in self.cu_seqlens.diff().tolist() if n)
        return [(len(list(run)), length) for length, run in lengths]


class KVCache:
    """Keys and values of earlier chunks of B documents read in step, C tokens at once: kv [call,
    2, B, K, ring, D], the last TTT_EVAL_SEQ_LEN // C - 1 chunks as they ran, without gradient. Keys
    are rotated by their position in the document; products see differences only, so the context
    slides, in any order. After `seek` one forward runs the next chunk and stores what it adds."""

    def __init__(self, cfg: Config, B: int, device: torch.device, dtype: torch.dtype):
        self.cfg, self.C = cfg, cfg.ttt_chunk_size
        self.ring = (cfg.ttt_eval_seq_len // self.C - 1) * self.C
        shape = num_block_calls(cfg), 2, B, cfg.num_kv_heads, self.ring, cfg.head_dim
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def seek(self, chunk: Tensor, docs: slice, kv_len: int) -> None:
        """Chunk number `chunk` (on the device) of documents `docs` is next; `kv_len`, at most the
        ring, is at least the tokens that are stored. Shapes depend on docs and kv_len alone."""
        new = torch.arange(self.C, device=chunk.device)
        positions = chunk * self.C + new
        self.docs, self.kv_len, self.place = docs, kv_len, positions % max(self.ring, 1)
        self.rope = rotation(positions, self.cfg)
        stored = torch.arange(kv_len, device=chunk.device) < chunk * self.C
        seen = torch.cat((stored.expand(self.C, -1), new[:, None] >= new), dim=1)
        self.mask = seen.repeat(self.cfg.num_heads // self.cfg.num_kv_heads, 1)

    def attend(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, C, H, D], k and v [b, C, K, D] -> y [b, C, H, D]; then k and v are stored."""
        groups, new = k.shape[2], torch.stack((k, v)).transpose(2, 3)  # [2, b, K, C, D]
        kv = self.kv[slot, :, self.docs]
        k, v = torch.cat((kv[..., : self.kv_len, :], new), dim=3)
        if self.ring:
            kv.index_copy_(3, self.place, new.detach())
        q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [b, K, H/K C, D]
        y = F.scaled_dot_product_attention(q, k, v, self.mask)
        return y.unflatten(2, (-1, self.C)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_ref(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The definition, over the full N x N matrix."""
    N, H, D = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))  # [N, H, D]
    token = torch.arange(N, device=q.device)
    segment = torch.searchsorted(segments.cu_seqlens, token, right=True)
    seen = (segment[:, None] == segment) & (token[:, None] >= token)  # [N, N]
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(D)
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """PyTorch's dense attention, one call for each run of equal lengths. A compiled graph cannot
    read lengths: there each segment is read out to max_len, on into the next ones, which causal
    order keeps out of its results ([S, max_len] tokens of memory)."""
    def dense(q, k, v, S, L):
        q, k, v = (x.unflatten(0, (S, L)).transpose(1, 2) for x in (q, k, v))  # [S, heads, L, D]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)

    cu_seqlens, L = segments.cu_seqlens, segments.max_len
    N, S = q.shape[0], cu_seqlens.numel() - 1
    if S * L == N:  # then every segment is max_len long: a [B, T] batch
        return dense(q, k, v, S, L)
    if not torch.compiler.is_compiling():
        parts = [x.split([count * n for count, n in segments.runs]) for x in (q, k, v)]
        return torch.cat([dense(*x, *run) for *x, run in zip(*parts, segments.runs, strict=True)])
    token = torch.arange(N, device=q.device)
    segment = torch.searchsorted(cu_seqlens, token, right=True) - 1
    read = (cu_seqlens[:-1, None] + torch.arange(L, device=q.device)).clamp(max=N - 1).flatten()
    return dense(q[read], k[read], v[read], S, L)[segment * L + token - cu_seqlens[segment]]


def attend_packed(function: Callable) -> Callable:
    """A backend from PyTorch's varlen_attn, whose options change by release."""
    options = dict(is_causal=True, window_size=(-1, 0), enable_gqa=True)
    options = {n: options[n] for n in inspect.signature(function).parameters if n in options}
    return lambda q, k, v, s: function(q, k, v, *[s.cu_seqlens] * 2, *[s.max_len] * 2, **options)


class Attention(NamedTuple):
    """A backend: function(q, k, v, segments) -> y, and one line that says why it was chosen."""
    name: str
    reason: str
    function: Callable


# Fastest first: name: (least compute capability, module, backend if known, how to get it)
ATTENTION = {"fa4": (9, FA4, attend_fa4, "pip install flash-attn-4==4.0.0b36"),
             "varlen": (8, "torch.nn.attention.varlen", None, "pip install 'torch>=2.10'"),
             "sdpa": (0, "torch", attend_sdpa, ""), "ref": (0, "torch", attend_ref, "")}


def choose_attention(device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> Attention:
    """The fastest backend that runs `dtype` on `device`, or the wanted one; else UserError."""
    flash, rejected = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16), []
    for name in ATTENTION if wanted == "auto" else [wanted]:
        lowest, module, function, remedy = ATTENTION[name]
        try:
            if lowest and not (flash and torch.cuda.get_device_capability(device)[0] >= lowest):
                raise ImportError(f"needs CUDA from sm{lowest}0 and bfloat16")
            found = importlib.import_module(module)
            function = function or attend_packed(found.varlen_attn)
            return Attention(name, "; ".join([*rejected, f"using {name}"]), function)
        except Exception as error:  # a half-installed package may raise anything
            rejected.append(f"{name}: " + str(error).partition("\n")[0])
    raise UserError(f"ATTENTION={rejected[0]}; {remedy}; or set ATTENTION=auto")


def agree_on(attention: Attention, rt: Runtime) -> Attention:
    """This rank's choice, which must be every rank's; else UserError, on all ranks."""
    chosen: list = [attention[:2]] * rt.world
    if rt.world > 1:
        dist.all_gather_object(chosen, attention[:2])
    for rank, (name, why) in enumerate(chosen):
        require(name == chosen[0][0], f"attention: rank 0 takes {chosen[0][0]}, rank {rank} {name} "
                f"({why}); install the same packages for every rank, or set ATTENTION=sdpa")
    return attention._replace(reason=f"{attention.reason} on every rank")


# ==================================================================================================
# §5 Model
# ==================================================================================================
class BlockCall(NamedTuple):
    """One run of one block: what the forward needs to know about it, fixed before anything runs."""

    layer: int
    slot: int  # position in the order; adapters are per slot, weights per layer
    push: bool  # encoder: the output goes on the stack of skips
    skip: int | None  # decoder: row of skip_weights for the skip popped before the block
    lanes: bool  # attention and MLP side by side on two lanes


def layer_plan(cfg: Config, looped: bool) -> tuple[BlockCall, ...]:
    """Block calls in order: first half encoder, second half decoder, skips last in first out."""
    n, first, last = cfg.num_layers, cfg.loop_start, cfg.loop_end
    order = list(range(n))
    if looped and cfg.num_loops:
        order[first : last + 1] = order[first : last + 1] * (cfg.num_loops + 1)
    encoder = len(order) // 2
    skips = min(encoder, num_skips(cfg))
    plan = []
    for slot, layer in enumerate(order):
        j = slot - encoder
        lanes = j >= 0 and 0 < cfg.parallel_start_layer <= layer
        plan.append(BlockCall(layer, slot, j < 0, j if 0 <= j < skips else None, lanes))
    return tuple(plan)


def num_block_calls(cfg: Config) -> int:
    """Block calls of the looped order: 17 for the record's settings."""
    return cfg.num_layers + cfg.num_loops * (cfg.loop_end - cfg.loop_start + 1)


def num_skips(cfg: Config) -> int:
    """S, rows of skip_weights: the shorter half of the looped order."""
    return num_block_calls(cfg) // 2


class Matrix(NamedTuple):
    """One weight matrix inside a bank (or the embedding, bank index None): quantised on its own."""

    name: str
    role: str
    bank: str
    index: int | None
    source: str  # the name under which GPT.hidden shows its input to `calibration_hook`


def matrices(cfg: Config) -> tuple[Matrix, ...]:
    """All matrices that GPTQ quantises: six a layer and the embedding (67 for 11 layers)."""
    n = cfg.num_layers
    layer = (("attn.c_q", "query", "qo_bank", 0, "attn"), ("attn.c_k", "key", "kv_bank", 0, "attn"),
             ("attn.c_v", "value", "kv_bank", n, "attn"),
             ("attn.proj", "attn_out", "qo_bank", n, "attn_out"),
             ("mlp.fc", "mlp_up", "mlp_up_bank", 0, "mlp"),
             ("mlp.proj", "mlp_down", "mlp_down_bank", 0, "mlp_hidden"))
    return (Matrix("tok_emb.weight", "embedding", "tok_emb.weight", None, "head"),
            *(Matrix(f"blocks.{i}.{name}.weight", role, bank, first + i, f"{source}.{i}")
              for i in range(n) for name, role, bank, first, source in layer))


def paired(w: Tensor, cfg: Config) -> Tensor:
    """Rows of query and key matrices [..., heads * D, in], in the order in which `rotate` takes
    channels: j and j + R/2, which RoPE turns together, side by side. Scores do not see it."""
    R, D = cfg.rope_dims or cfg.head_dim, cfg.head_dim
    turned, rest = w.unflatten(-2, (-1, D)).split([R, D - R], dim=-2)
    turned = turned.unflatten(-2, (2, R // 2)).transpose(-3, -2).flatten(-3, -2)
    return torch.cat((turned, rest), dim=-2).flatten(-3, -2)


def gather_positions(h: Tensor, positions: Tensor) -> Tensor:
    """States [b, C, d] at the positions at [b, C] of h [b, T, d]."""
    return h.gather(1, positions[:, :, None].expand(-1, -1, h.shape[-1]))


class AttentionParameters(nn.Module):
    """The small tensors of one attention layer; its matrices live in the banks."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        if cfg.gated_xsa and layer >= cfg.num_layers - cfg.xsa_last_n:
            self.xsa_alpha = nn.Parameter(torch.zeros(cfg.num_heads))
        if cfg.sparse_attn_gate_enabled:
            self.attn_gate_w = nn.Parameter(torch.zeros(cfg.num_heads, cfg.gate_window))


class Block(nn.Module):
    """The small tensors of one block."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn = AttentionParameters(cfg, layer)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim))


class GPT(nn.Module):
    """The model, with ONE forward for training, evaluation, calibration and test-time training.

    Three objects may ride along and cost nothing when absent: `lora` adds low-rank deltas per
    document, `kv_cache` stands in for `segments` where ids continue documents (ids [B, 1 + T]: the
    id before them first), `calibration_hook(name, x)` sees the input x of every matrix. The state
    dict is #1855's: banks [2n, d, d], [2n, K*D, d], [n, hidden, d], [n, d, hidden] of float32
    matrices [out, in], which are cast once a forward to `dtype`."""

    def __init__(self, cfg: Config, attend: Callable, dtype: torch.dtype = torch.float32):
        super().__init__()
        n, d, kv, hidden = cfg.num_layers, cfg.model_dim, cfg.kv_dim, cfg.hidden_dim
        self.cfg, self.attend, self.dtype = cfg, attend, dtype
        self.plans = {looped: layer_plan(cfg, looped) for looped in (False, True)}
        self.tok_emb = nn.Embedding(cfg.vocab_size, d)
        self.qo_bank = nn.Parameter(torch.empty(2 * n, d, d))
        self.kv_bank = nn.Parameter(torch.empty(2 * n, kv, d))
        self.mlp_up_bank = nn.Parameter(torch.empty(n, hidden, d))
        self.mlp_down_bank = nn.Parameter(torch.empty(n, d, hidden))
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(n))
        self.skip_weights = nn.Parameter(torch.ones(num_skips(cfg), d))
        if cfg.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips(cfg), d))
        if cfg.parallel_start_layer:
            self.parallel_post_lambdas = nn.Parameter(torch.ones(n, 2, 2))
            self.parallel_resid_lambdas = nn.Parameter(torch.full((n, 2), 1.1))
        if cfg.smear_gate_enabled:
            self.smear_gate = nn.Linear(cfg.gate_window, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if cfg.asym_logit_rescale:
            self.softcap_pos, self.softcap_neg = (
                nn.Parameter(torch.tensor([cfg.logit_softcap])) for _ in range(2))
        longest = max(cfg.train_batch_tokens // 8, cfg.val_batch_tokens // 8, cfg.ttt_eval_seq_len,
                      cfg.global_ttt_batch_seqs * cfg.eval_seq_len)  # that a row can have
        self.register_buffer("rope", rotation(torch.arange(longest), cfg), persistent=False)
        self.reset_parameters()

    @contextlib.contextmanager
    def compiled(self, wanted: bool) -> Iterator[None]:
        """Inside, if wanted, the stretches between products and kernels are compiled, one graph
        each, which takes seconds; nobody else waits for the host, since steps are recorded."""
        parts = ["weights", "smear", "mix_skip", "mix_lanes"] * wanted
        parts += ["attention_core"] * (wanted and self.attend is not attend_fa4)
        for part in parts:
            setattr(self, part, torch.compile(getattr(self, part), dynamic=False, fullgraph=True))
        try:
            yield
        finally:
            for part in parts:
                delattr(self, part)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal query, key, value and up; zero output and down; small normal embedding."""
        n = self.cfg.num_layers
        for matrix in (*self.qo_bank[:n], *self.kv_bank, *self.mlp_up_bank):
            nn.init.orthogonal_(matrix)
        self.qo_bank[n:].zero_()
        self.mlp_down_bank.zero_()
        self.tok_emb.weight.normal_(std=self.cfg.tied_embed_init_std)
        if self.cfg.smear_gate_enabled:
            self.smear_gate.weight.zero_()

    def forward(self, ids: Tensor, targets: Tensor, segments: "Segments | None", looped: bool,
                lora: "Lora | None" = None, positions: Tensor | None = None,
                kv_cache: "KVCache | None" = None, on_hidden: Callable | None = None) -> Tensor:
        """Cross-entropy in nats of every target: ids, targets [B, T] -> float32 [B, T]; or of those
        at `positions` [B, C]: targets and result [B, C]. `on_hidden` gets the state [B, T, d]."""
        h = self.hidden(ids, segments, looped, lora, kv_cache=kv_cache)
        if on_hidden:
            on_hidden(h.detach())
        h = h if positions is None else gather_positions(h, positions)
        return self.losses(h, targets, lora)

    def losses(self, h: Tensor, targets: Tensor, lora: "Lora | None" = None) -> Tensor:
        """Cross-entropy [B, T] of targets [B, T] at the final states h [B, T, d]."""
        z, w = (h, self.tok_emb.weight.to(h.dtype)) if lora is None else (self.head(h, lora), None)
        loss = softcap_cross_entropy if self.cfg.fused_ce_enabled else softcap_cross_entropy_ref
        return loss(z.flatten(0, 1), targets.flatten(), self.cap(), w).view_as(targets)

    def cap(self) -> float | Tensor:
        """The softcap: a constant, or two parameters, which training and global phases move."""
        if not self.cfg.asym_logit_rescale:
            return self.cfg.logit_softcap
        return torch.cat((self.softcap_pos, self.softcap_neg))

    def head(self, h: Tensor, lora: "Lora | None" = None) -> Tensor:
        """Logits before the softcap: h [B, T, d] -> [B, T, V], with the tied embedding."""
        z = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return z if lora is None else z + lora("head", 0, h)

    def logits(self, h: Tensor, lora: "Lora | None" = None) -> Tensor:
        """Logits as the loss sees them: h [B, T, d] -> float32 [B, T, V]."""
        return softcap(self.head(h, lora), self.cap())

    def hidden(self, ids: Tensor, segments: "Segments | None", looped: bool,
               lora: "Lora | None" = None, calibration_hook: Callable | None = None,
               kv_cache: "KVCache | None" = None) -> Tensor:
        """The normalised final state: ids [B, T] -> [B, T, d]; attention stays in `segments`."""
        cfg, weights = self.cfg, self.weights()
        gates = [self.skip_gates] if cfg.skip_gates_enabled else []
        skips = torch.stack([self.skip_weights, *gates], 1).unbind()  # weight, gate if there is one
        rope = self.rope[:, : ids.shape[1]].contiguous() if kv_cache is None else kv_cache.rope
        x = F.embedding(ids, self.tok_emb.weight.to(self.dtype))
        if cfg.smear_gate_enabled:
            x = self.smear(x, ids)
        a = x0 = rms(x if kv_cache is None else x[:, 1:])
        m, b, stack = None, None, []  # the state is a + m; b the second lane, while there is one
        for call in self.plans[looped]:
            block, (qkv, out, up, down) = self.blocks[call.layer], weights[call.layer]
            scale = 1 / math.sqrt(call.layer + 1) if cfg.ln_scale else 1.0
            skip, lerp = None, None
            if m is not None and (call.lanes or call.skip == 0):  # else residual_mix_rmsnorm adds m
                a, m = a + m, None
            if call.lanes and b is None:
                b = a
            if call.skip is not None:  # the last one pushed is the state itself
                skip, lerp = stack.pop() if call.skip else a, skips[call.skip]
            if call.lanes and skip is not None:
                a, skip, lerp = self.mix_skip(a, skip, lerp), None, None
            a, u, n, gate_input, x0 = residual_mix_rmsnorm(
                a, m, skip, lerp, x0, block.resid_mix, scale, cfg.gate_window)
            if call.push and call.slot:  # what the call before this one put out
                stack.append(a)
            y = self.attention(call, n, gate_input, (qkv, out), rope, kv_cache or segments, lora,
                               calibration_hook)
            if b is None:
                a, _, n, *_ = residual_mix_rmsnorm(u, y, scale=scale)
                m = self.mlp(call, n, up, down, lora, calibration_hook)
            else:
                n = residual_mix_rmsnorm(b, scale=scale)[2]
                m = self.mlp(call, n, up, down, lora, calibration_hook)
                (a, b), m = self.mix_lanes(a, b, y, m, self.parallel_resid_lambdas[call.layer],
                                           self.parallel_post_lambdas[call.layer]), None
        if b is not None:
            a = {"mean": (a + b) * 0.5, "attn": a, "mlp": b}[cfg.parallel_final_lane]
        h = residual_mix_rmsnorm(a, m)[2]
        if calibration_hook:
            calibration_hook("head", h)
        return h

    def weights(self) -> list[tuple[Tensor, ...]]:
        """(qkv, out, up, down) of each layer, cast once, rows of q and k as `paired`; the scales of
        what attention and MLP add to the state are factors of their last matrices' rows."""
        (q, o), (k, v) = self.qo_bank.chunk(2), self.kv_bank.chunk(2)
        attn, mlp = (torch.stack([getattr(block, name) for block in self.blocks])[:, :, None]
                     for name in ("attn_scale", "mlp_scale"))
        q, k = paired(q, self.cfg), paired(k, self.cfg)
        stacks = torch.cat((q, k, v), 1), attn * o, self.mlp_up_bank, mlp * self.mlp_down_bank
        return list(zip(*(w.to(self.dtype).unbind() for w in stacks), strict=True))

    def smear(self, x: Tensor, ids: Tensor) -> Tensor:
        """x_t += lambda sigmoid(w . x_t[:window]) x_{t-1}, never into a BOS, which keeps a packed
        row's documents apart. idea: @kellerjordan"""
        gate = torch.sigmoid(F.linear(x[:, 1:, : self.cfg.gate_window],
                                      self.smear_gate.weight.to(x.dtype)))
        gate = self.smear_lambda.to(x.dtype) * gate * (ids[:, 1:, None] != BOS)
        return torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)

    mix_skip, attention_core = staticmethod(mix_skip), staticmethod(attention_core)

    @staticmethod
    def mix_lanes(a: Tensor, b: Tensor, y: Tensor, m: Tensor, keep: Tensor,
                  post: Tensor) -> tuple[Tensor, ...]:
        """Both lanes after attention y and MLP m: keep [lane], post [attention or MLP, lane]."""
        keep, post = keep.to(a.dtype), post.to(a.dtype)
        return tuple(keep[lane] * x + post[0, lane] * y + post[1, lane] * m
                     for lane, x in enumerate((a, b)))

    def attention(self, call: BlockCall, n: Tensor, gate_input: Tensor, matrices: tuple,
                  rope: Tensor, segments: "Segments | KVCache", lora: "Lora | None",
                  calibration_hook: Callable | None) -> Tensor:
        """The products around `attention_core`: n [B, T, d], gate_input [B, T, W] -> [B, T, d]."""
        cfg, block, (qkv, out) = self.cfg, self.blocks[call.layer], matrices
        x = F.linear(n, qkv)
        if lora is not None:
            parts = zip("qkv", x.split([cfg.model_dim, cfg.kv_dim, cfg.kv_dim], -1), strict=True)
            x = torch.cat([y + lora(role, call.slot, n) for role, y in parts], dim=-1)
        x = x.unflatten(-1, (-1, cfg.head_dim))
        gate = block.attn.attn_gate_w if cfg.sparse_attn_gate_enabled else None
        xsa = call.layer >= cfg.num_layers - cfg.xsa_last_n
        if xsa and cfg.gated_xsa:  # idea: #2018
            xsa = torch.tanh(block.attn.xsa_alpha)
        inputs = x, gate_input, block.attn.q_gain, gate, rope
        rest = xsa, cfg.sparse_attn_gate_scale
        if isinstance(segments, KVCache):
            y = attention_core_ref(*inputs, functools.partial(segments.attend, call.slot), *rest)
        else:
            y = self.attention_core(*inputs, self.attend, segments, *rest)
        if calibration_hook:
            calibration_hook(f"attn.{call.layer}", n)
            calibration_hook(f"attn_out.{call.layer}", y)
        y = F.linear(y, out)
        return y if lora is None else y + block.attn_scale.to(y.dtype) * lora("o", call.slot, n)

    def mlp(self, call: BlockCall, n: Tensor, up: Tensor, down: Tensor,
            lora: "Lora | None", calibration_hook: Callable | None) -> Tensor:
        """Squared LeakyReLU between up and down: n [B, T, d] -> [B, T, d], scaled."""
        if calibration_hook:
            calibration_hook(f"mlp.{call.layer}", n)
            hidden = F.leaky_relu(F.linear(n, up), self.cfg.leaky_relu_slope).square()
            calibration_hook(f"mlp_hidden.{call.layer}", hidden)
        y = leaky_mlp(n.flatten(0, 1), up, down, self.cfg.leaky_relu_slope).view_as(n)
        if lora is not None:
            y = y + self.blocks[call.layer].mlp_scale.to(y.dtype) * lora("mlp", call.slot, n)
        return y


def log_slow_paths(cfg: Config, attention: Attention, rt: Runtime) -> None:
    """A line for each setting, package or lack of the GPU that leaves the fused kernels."""
    shape, size = (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim), rt.dtype.itemsize
    for slow, text in (
            (attention.name != "fa4", f"{attention.name} instead of FlashAttention-4, on 4 H200s "
             f"3.7 instead of 4.8 M tokens/s; {ATTENTION['fa4'][3]}"),
            (not fused(torch.empty(0, device=rt.device)), "no kernels without Triton and sm80"),
            (not attention_core_fits(*shape),
             f"heads, key heads and width {shape} are not powers of 2"),
            (cfg.model_dim * size % 16 or cfg.hidden_dim * size % 16, "MLP: no rows of 16 k bytes"),
            (cfg.vocab_size > MOST_LOGITS, f"float32 logits: VOCAB_SIZE is over {MOST_LOGITS}"),
            (not cfg.fused_ce_enabled, "float32 logits: FUSED_CE_ENABLED=0"),
            (not cfg.compile, "small operations one by one: COMPILE=0")):
        if slow and rt.device.type == "cuda":
            rt.log(f"slow path: {text}")


def rotation(positions: Tensor, cfg: Config) -> Tensor:
    """cos and sin of position * base^(-2j/R) for the R/2 pairs that turn: at [T] -> float32
    [2, T, R/2], rounded from float64, in whose last bits alone processors differ."""
    R = cfg.rope_dims or cfg.head_dim
    pair = torch.arange(0, R, 2, dtype=torch.float64, device=positions.device)
    angle = positions[:, None] * cfg.rope_base ** (-pair / R)
    return torch.stack((angle.cos(), angle.sin())).float()


class LowRank(torch.autograd.Function):
    """scale x A^T B^T for x [b, T, in], A [b, r, in], B [b, out, r], in x's number type.

    Written out for the gradients: those of A and B leave the products in their masters' type and
    layout, without a pass over them for either."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        a, b = A.to(x.dtype), B.to(x.dtype)
        h = (x @ a.mT).mul_(scale)  # [b, T, r]
        ctx.save_for_backward(x, a, b, h)
        ctx.scale, ctx.master = scale, A.dtype
        return h @ b.mT

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, a, b, h = ctx.saved_tensors
        same = x.dtype == ctx.master
        dh = (dy @ b).mul_(ctx.scale)
        wide = {} if same or not x.is_cuda else {"out_dtype": ctx.master}
        dA, dB = (torch.bmm(p.mT, q, **wide).to(ctx.master) for p, q in ((dh, x), (dy, h)))
        return dh @ a, dA, dB, None


class Lora(nn.Module):
    """Low-rank adapters, one set a document: delta = (alpha/r) x A^T B^T. idea: arXiv:2106.09685

    A [B, r, in] and B [B, out, r] for every role and slot; the head has one slot. `init(A)` fills A
    in place; B starts at zero, so a fresh adapter changes nothing."""

    def __init__(self, cfg: Config, batch: int, device: torch.device, init: Callable):
        super().__init__()
        d, kv, r = cfg.model_dim, cfg.kv_dim, cfg.ttt_lora_rank
        out = {"q": d, "k": kv, "v": kv, "o": d, "mlp": d, "head": cfg.vocab_size}
        on = {"q": cfg.ttt_q_lora and cfg.ttt_mask not in ("no_q", "no_qv"), "k": cfg.ttt_k_lora,
              "v": cfg.ttt_v_lora and cfg.ttt_mask not in ("no_v", "no_qv"), "o": cfg.ttt_o_lora,
              "mlp": cfg.ttt_mlp_lora}
        self.scale, self.init, self.docs = cfg.ttt_lora_alpha / r, init, slice(None)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for role in (role for role in out if on.get(role, True)):
            for slot in range(1 if role == "head" else num_block_calls(cfg)):
                self.A[f"{role}{slot}"] = torch.empty(batch, r, d, device=device)
                self.B[f"{role}{slot}"] = torch.empty(batch, out[role], r, device=device)
        self.reset(warm=False)

    @torch.no_grad()
    def reset(self, warm: bool) -> None:
        """For a new batch of documents: B to zero, and A to its start unless it is kept warm."""
        for key in self.A:
            self.B[key].zero_()
            if not warm:
                self.init(self.A[key])

    def forward(self, role: str, slot: int, x: Tensor) -> Tensor | float:
        """x [b, T, in] of documents `self.docs` -> delta [b, T, out], or 0 for a role left out."""
        key = f"{role}{slot}"
        if key not in self.A:
            return 0.0
        return LowRank.apply(x, self.A[key][self.docs], self.B[key][self.docs], self.scale)


def uniform_start(generator: torch.Generator) -> Callable[[Tensor], None]:
    """An initialiser of A: uniform in +-1/sqrt(in)."""
    return lambda a: a.uniform_(-(a.shape[-1] ** -0.5), a.shape[-1] ** -0.5, generator=generator)


# ==================================================================================================
# §6 Optimisers
# ==================================================================================================
class Route(NamedTuple):
    """What happens to the parameters whose whole name matches: one line of the routing table."""

    pattern: str
    optimiser: str  # muon or adamw
    lr: str  # settings that hold its learning rate and its decay
    decay: str
    store: str  # number format in the artifact


SMALL = (r"blocks\.\d+\.(attn\.(q_gain|xsa_alpha)|attn_scale|mlp_scale|resid_mix)|"
         r"skip_(weights|gates)|parallel_(post|resid)_lambdas|smear_lambda|smear_gate\.weight")
ROUTES = (
    Route(r"(qo|kv|mlp_up|mlp_down)_bank", "muon", "matrix_lr", "muon_wd", "gptq"),
    Route(r"tok_emb\.weight", "adamw", "tied_embed_lr", "embed_wd", "gptq"),
    Route(r"blocks\.\d+\.attn\.attn_gate_w", "adamw", "scalar_lr", "adam_wd", "int8_rows"),
    Route(SMALL, "adamw", "scalar_lr", "adam_wd", "float16"),
    Route(r"softcap_(pos|neg)", "adamw", "scalar_lr", "", "float16"),  # decay would pull them to 0
)


def route(names: list[str]) -> dict[str, Route]:
    """The route of every parameter; ValueError unless each name matches exactly one line."""
    routes = {}
    for name in names:
        hits = [r for r in ROUTES if re.fullmatch(r.pattern, name)]
        if len(hits) != 1:
            raise ValueError(f"parameter {name} matches {len(hits)} lines of ROUTES, must be one")
        routes[name] = hits[0]
    return routes


# (a, b, c) of the five iterations; each is the best odd polynomial for the singular values that the
# ones before leave (Polar Express, arXiv:2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearly the polar factor U V^T of every matrix: g [..., m, n] -> bfloat16 [..., m, n].

    X <- aX + (bA + cA^2)X with A = X X^T, on the wide orientation, so that A is the smaller one."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = x @ x.mT
        if x.is_cuda and x.ndim == 3:  # the same in 3 launches instead of 8, and rounded less often
            x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * A + c * (A @ A)) @ x
    return x.mT if tall else x


class Optimisers:
    """Muon for the banks, AdamW for the rest; gradients are averaged before they are clipped.

    Every rank holds all parameters. It owns a share of each bank's matrices: their averaged
    gradients arrive by reduce-scatter, their momentum lives only there, and their bfloat16 update
    leaves by all-gather, so that every rank applies the same bits. Averaging comes before the
    global norm, so the same global batch gives the same run in any world size (#1855 clips first).
    Muon: momentum, Nesterov, unit rows, orthogonalise, decoupled decay. idea: @kellerjordan"""

    def __init__(self, model: GPT, cfg: Config, rt: Runtime):
        self.cfg, self.rt = cfg, rt
        self.graph_cache = CudaGraphCache(cfg.compile and rt.device.type == "cuda")
        if self.graph_cache.record:
            for part in ("nesterov_momentum", "apply_update"):
                setattr(self, part, torch.compile(getattr(self, part), dynamic=False))
        params = dict(model.named_parameters())
        routes = route(list(params))
        self.banks = [p for name, p in params.items() if routes[name].optimiser == "muon"]
        self.shares = [-(-p.shape[0] // rt.world) for p in self.banks]  # rounded up
        groups = {}
        for name, p in params.items():
            if routes[name].optimiser == "adamw":
                groups.setdefault(routes[name][2:4], []).append(p)
        self.small = [p for group in groups.values() for p in group]
        self.params = [*self.banks, *self.small]
        self.adamw = torch.optim.AdamW(
            [{"params": ps, "lr": getattr(cfg, lr), "base_lr": getattr(cfg, lr),
              "weight_decay": getattr(cfg, decay) if decay else 0.0}
             for (lr, decay), ps in groups.items()],
            betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=rt.device.type == "cuda")
        self.momenta = [torch.zeros(share, *p.shape[1:], device=p.device)
                        for share, p in zip(self.shares, self.banks, strict=True)]

    def reset(self) -> None:
        """Forget every moment, in place: the next step waits for no memory."""
        for moment in (*self.momenta, *(x for s in self.adamw.state.values() for x in s.values())):
            moment.zero_()

    @torch.no_grad()
    def step(self, lr_factor: float, momentum: float) -> Tensor:
        """One update from the .grad of all parameters, which it clears; returns the global norm."""
        grads, small = self.reduce_gradients()
        squares = self.square_norms(grads)
        norm = torch.cat([*squares, torch.stack(torch._foreach_norm(small)).square()]).sum().sqrt()
        limit = self.cfg.grad_clip_norm or math.inf
        clip = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(small, clip)
        self.step_muon(grads, clip, lr_factor, momentum)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        self.adamw.step()
        for p in self.params:
            p.grad = None
        return norm

    def square_norms(self, grads: list[Tensor]) -> list[Tensor]:
        """Squared norms of every bank's matrices [n], from this rank's shares of gradients: one
        number a matrix, so that their sum does not depend on how the banks are shared."""
        before, after = self.rt.rank, self.rt.world - 1 - self.rt.rank  # ranks: zeros for theirs
        parts = [F.pad(torch.linalg.vector_norm(g, dim=(1, 2)).square(),
                       (before * len(g), after * len(g))) for g in grads]
        found = self.rt.sum_(torch.cat(parts)).split([len(part) for part in parts])
        return [part[: len(bank)] for part, bank in zip(found, self.banks, strict=True)]

    def reduce_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients averaged over ranks: this rank's share of the banks, and all small ones."""
        small, world, rank = [p.grad for p in self.small], self.rt.world, self.rt.rank
        if world == 1:
            return [p.grad for p in self.banks], small
        shares, waits = [], []
        for share, p in zip(self.shares, self.banks, strict=True):
            padded = F.pad(p.grad, (0, 0, 0, 0, 0, share * world - p.shape[0]))
            if self.rt.device.type == "cuda":
                mine = torch.empty_like(padded[:share])
                waits.append(dist.reduce_scatter_tensor(mine, padded, async_op=True))
            else:  # gloo has no reduce-scatter
                waits.append(dist.all_reduce(padded, async_op=True))
                mine = padded[rank * share : (rank + 1) * share]
            shares.append(mine)
        flat = torch.cat([g.flatten() for g in small])
        waits.append(dist.all_reduce(flat, async_op=True))
        for wait in waits:
            wait.wait()
        torch._foreach_div_([*shares, flat], world)
        parts = flat.split([g.numel() for g in small])
        torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])
        return shares, small

    def nesterov_momentum(self, grad: Tensor, moment: Tensor, clip: Tensor,
                          momentum: Tensor) -> Tensor:
        """Adds the clipped gradient to its moment; Nesterov's update of it, with unit rows."""
        grad = grad * clip
        moment.mul_(momentum).add_(grad)
        update = grad + momentum * moment
        if self.cfg.muon_row_normalize:
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        return update.bfloat16()

    @staticmethod
    def apply_update(p: Tensor, update: Tensor, keep: Tensor, rate: Tensor) -> None:
        """Decay and step, in place."""
        p.mul_(keep).sub_(rate * update)

    def step_muon(self, grads: list[Tensor], clip: Tensor, lr_factor: float,
                  momentum: float) -> None:
        """Momentum and orthogonalisation on the own share, then the same update on every rank."""
        cfg, pending, beta = self.cfg, [], torch.full_like(clip, momentum)
        updates = [self.nesterov_momentum(g, m, clip, beta)
                   for g, m in zip(grads, self.momenta, strict=True)]
        updates = self.graph_cache(("directions",), lambda *us: [
            orthogonalise(u, cfg.muon_backend_steps) for u in us], updates)
        for update, p in zip(updates, self.banks, strict=True):
            full, wait = update, None
            if self.rt.world > 1:
                full = update.new_empty(update.shape[0] * self.rt.world, *update.shape[1:])
                wait = dist.all_gather_into_tensor(full, update.contiguous(), async_op=True)
            pending.append((p, full, wait))
        lr = cfg.matrix_lr * lr_factor
        for p, update, wait in pending:
            if wait:
                wait.wait()
            scale = math.sqrt(max(1.0, p.shape[-2] / p.shape[-1]))
            keep, rate = (torch.full_like(clip, x) for x in (1 - lr * cfg.muon_wd, lr * scale))
            self.apply_update(p, update[: p.shape[0]], keep, rate)


class Ema:
    """Exponential moving average of all weights, updated every step; it is what gets quantised."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.weights = decay, list(model.parameters())
        self.average = [w.detach().clone() for w in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.average, [w.detach() for w in self.weights], 1 - self.decay)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the average into the model (the last raw weights are lost)."""
        torch._foreach_copy_(self.weights, self.average)


# ==================================================================================================
# §7 Data
# ==================================================================================================
BOS = 1  # id of the token that begins every document
SHARD_HEADER, SHARD_MAGIC, SHARD_VERSION = 1024, 20240520, 1


def open_shard(path: Path) -> np.ndarray:
    """The uint16 values of a shard, memory-mapped; UserError where the file is not what it says.

    Format: 256 little-endian int32 (magic, version, count, zeros), then `count` uint16."""
    def check(holds: bool, problem: str) -> None:
        require(holds, f"{path}: {problem}; prepare the data again or fetch the file again")

    check(path.is_file(), f"{'a folder' if path.is_dir() else 'no such file (a dangling link)'}")
    size = path.stat().st_size
    check(size >= SHARD_HEADER, f"{size} bytes, shorter than a shard's header")
    magic, version, count = (int(x) for x in np.fromfile(path, "<i4", 3))
    check(magic == SHARD_MAGIC, f"magic {magic}, a shard has {SHARD_MAGIC}: not a shard")
    check(version == SHARD_VERSION, f"shard version {version}, known is {SHARD_VERSION}")
    check(size == SHARD_HEADER + 2 * count, f"header says {count} values = "
          f"{SHARD_HEADER + 2 * count} bytes, the file has {size}")
    check(count > 0, "no tokens")
    return np.memmap(path, "<u2", "r", SHARD_HEADER, (count,))


class TokenStream:
    """The values of several shards as one sequence; slices may cross shard borders."""

    def __init__(self, paths: list[Path]):
        self.paths, self.shards = paths, [open_shard(p) for p in paths]
        *self.starts, self.size = itertools.accumulate(map(len, self.shards), initial=0)

    def __len__(self) -> int:
        return self.size

    def read(self, begin: int, end: int) -> np.ndarray:
        """uint16 values [begin, end) of the sequence."""
        return np.concatenate([shard[max(0, begin - start) : max(0, end - start)]
                               for start, shard in zip(self.starts, self.shards, strict=True)])

    def place(self, index: int) -> str:
        """File and position of a value, for messages."""
        start, path = max(p for p in zip(self.starts, self.paths, strict=True) if p[0] <= index)
        return f"{path}: token {index - start}"

    def checked_ids(self, begin: int, end: int, vocab_size: int) -> np.ndarray:
        """Token ids [begin, end) as int64; UserError for one outside the vocabulary."""
        ids = self.read(begin, end)
        if ids.size and ids.max() >= vocab_size:
            at = int(np.argmax(ids >= vocab_size))
            raise UserError(f"{self.place(begin + at)}: id {ids[at]} is outside the vocabulary of "
                            f"{vocab_size}; set VOCAB_SIZE to the tokenizer's size")
        return ids.astype(np.int64)


class PackedBatch(NamedTuple):
    """A packed row, or several side by side: ids, targets [B, T] and the attention segments."""

    ids: Tensor
    targets: Tensor
    segments: "Segments"


def segment_bounds(ids: np.ndarray, longest: int) -> np.ndarray:
    """Cumulative bounds, int32, of a row's segments: at every BOS and after `longest` tokens of a
    document, counted from its BOS (or from the row's start)."""
    starts = np.unique(np.concatenate(([0], np.flatnonzero(ids == BOS), [len(ids)])))
    cuts = [np.arange(a, b, longest) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return np.concatenate((*cuts, [len(ids)])).astype(np.int32)


def make_row(ids: np.ndarray, targets: np.ndarray, longest: int, device: torch.device,
             documents: bool = True) -> PackedBatch:
    """A row on the device; without `documents` only its length cuts it. Empty segments give rows
    one shape: room for documents of 512 tokens and their cuts, for denser ones a multiple."""
    bounds = segment_bounds(ids if documents else np.zeros_like(ids), longest)
    room = len(ids) // 512 + len(ids) // longest + 64
    bounds = np.pad(bounds, (0, -len(bounds) % room), constant_values=len(ids))
    parts = [torch.from_numpy(np.ascontiguousarray(x)) for x in (ids, targets, bounds)]
    if device.type == "cuda":
        parts = [x.pin_memory() for x in parts]
    ids_, targets_, cu_seqlens = (x.to(device, non_blocking=True) for x in parts)
    return PackedBatch(ids_[None], targets_[None], Segments(cu_seqlens, min(longest, len(ids))))


class TrainRows:
    """The training stream cut into rows, in order and then over again: row g is a pure function."""

    def __init__(self, stream: TokenStream, cfg: Config, rt: Runtime):
        self.stream, self.cfg, self.rt, self.length = stream, cfg, rt, cfg.train_batch_tokens // 8
        self.count, self.longest = (len(stream) - 1) // self.length, cfg.train_seq_len
        require(self.count, f"{stream.paths[0].parent}: {len(stream)} training tokens, less than a "
                f"row of {self.length} + 1; lower TRAIN_BATCH_TOKENS or add data")
        for g in np.linspace(0, self.count - 1, 256).astype(int):  # the others when they are cut
            stream.checked_ids(g * self.length, (g + 1) * self.length + 1, cfg.vocab_size)

    def row(self, g: int) -> PackedBatch:
        begin = g % self.count * self.length
        ids = self.stream.checked_ids(begin, begin + self.length + 1, self.cfg.vocab_size)
        return make_row(ids[:-1], ids[1:], self.longest, self.rt.device)

    def step(self, step: int) -> list[PackedBatch]:
        """This rank's rows of a step: the 8 rows of the step are shared out in order."""
        first = 8 * step + self.rt.rank * self.rt.accumulation
        return [self.row(g) for g in range(first, first + self.rt.accumulation)]


def prefetch(make: Callable[[int], Any], first: int, depth: int = 4) -> Iterator[Any]:
    """make(first), make(first + 1), ... computed by a thread that stays `depth` ahead."""
    pool = ThreadPoolExecutor(1)
    ahead = [pool.submit(make, first + k) for k in range(depth)]
    try:
        for index in itertools.count(first + depth):
            ahead.append(pool.submit(make, index))
            yield ahead.pop(0).result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def data_folder(cfg: Config) -> Path:
    """DATA_PATH, or where prepare_caseops_data.py or the hub put the set under DATA_DIR."""
    if cfg.data_path:
        return Path(cfg.data_path)
    root, name = Path(cfg.data_dir) / "datasets", f"sp{cfg.vocab_size}"
    name += "_lossless_caps_caseops_v1_reserved" if cfg.caseops_enabled else ""
    found = list(root.glob(f"*_{name}")) or list(root.glob(f"*/datasets/datasets/*_{name}"))
    require(len(found) < 2, f"{root}: several sets end in _{name}; set DATA_PATH to one of them")
    return found[0] if found else root / f"fineweb10B_{name}"


def load_split(cfg: Config, split: str) -> TokenStream:
    """The shards of train or val in order; byte sidecars, alike in name, are left out."""
    folder, pattern = data_folder(cfg), f"fineweb_{split}_*.bin"
    found = sorted(p for p in folder.glob(pattern) if "_bytes_" not in p.name)
    remedy = not found and (guide := extra("guide", needed=False)) and guide.data_remedy(cfg)
    require(found, f"{folder}/{pattern}: no such file; {remedy or 'set DATA_PATH to its folder'}")
    gap = next((x for x in enumerate(found) if not re.search(f"_0*{x[0]}$", x[1].stem)), None)
    require(not gap, f"{gap and gap[1]}: shard {gap and gap[0]} before it is missing; fetch it")
    stream = TokenStream(found)
    first = stream.shards[0][0]
    require(first == BOS, f"{stream.place(0)}: id {first}, but a document begins with BOS ({BOS})")
    return stream


def load_train(cfg: Config, rt: Runtime) -> TrainRows:
    return TrainRows(load_split(cfg, "train"), cfg, rt)


def check_data(cfg: Config) -> str:
    """The data's identity, for the log. Raises where its manifest says that this run cannot be
    right: documents on both sides of the split, another validation file, another vocabulary."""
    path = data_folder(cfg) / "manifest.json"
    if not path.is_file():
        check_tokenizer(cfg, path, {})
        return (f"data: {path.parent}, no manifest: nothing says that the split is clean; see "
                "prepare_caseops_data.py --audit")
    try:
        manifest = json.loads(path.read_text())
        # Other tools' manifests have other contents: what is not told cannot be checked.
        told, split, files, totals = (part if isinstance(part := manifest.get(key), dict) else {}
                                      for key in ("tokenizer", "split", "files", "totals"))
        ends = int(split.get("val_end_document", 0)), split.get("train_first_document", math.inf)
        overlap = bool(split.get("overlap")) or ends[0] > ends[1]
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a manifest; prepare the data again") from None
    check_tokenizer(cfg, path, told)
    require(not overlap or cfg.ttt_eval_only,
            f"{path}: validation documents are also training documents (val up to {ends[0]}, train "
            f"from {ends[1]}); prepare the data with one --val-docs")
    listed = {name for name in files if "_val_" in name}
    found = {file.name for file in path.parent.glob("fineweb_val_*.bin")} if listed else set()
    for name in sorted(listed | found):
        file, entry = path.parent / name, files.get(name, {"sha256": "none"})
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        require(file.is_file(), f"{file}: no such file, but {path.name} lists it; prepare it again")
        require(not digest or hashlib.sha256(file.read_bytes()).hexdigest() == digest,
                f"{file}: not the file that {path.name} was written with, so training may hold its "
                "documents; prepare the data again, or see --audit of prepare_caseops_data.py")
    return (f"data: {path.parent} manifest sha256:{hashlib.sha256(path.read_bytes()).hexdigest()} "
            f"{json.dumps(totals)} training documents equal to a validation document: "
            f"{split.get('train_documents_equal_to_validation', 'not known')}")


def check_tokenizer(cfg: Config, manifest: Path, told: dict) -> None:
    """TOKENIZER_PATH, where given, must have VOCAB_SIZE pieces and the hash that is `told`."""
    size = told.get("vocab_size", cfg.vocab_size)
    require(size == cfg.vocab_size, f"{manifest}: made with a vocabulary of {size}, but "
            f"VOCAB_SIZE={cfg.vocab_size}; set VOCAB_SIZE={size}")
    if not cfg.tokenizer_path:
        return
    path = Path(cfg.tokenizer_path)
    from sentencepiece import SentencePieceProcessor
    try:
        size = SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (RuntimeError, OSError):
        raise UserError(f"TOKENIZER_PATH={path}: no such file, or no tokenizer; mend it") from None
    require(size == cfg.vocab_size,
            f"{path}: {size} pieces, but VOCAB_SIZE={cfg.vocab_size}; set it to {size}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    want = told.get("sha256", digest)
    require(want == digest, f"{path}: not the tokenizer that made {manifest.parent}: its sha256 is "
            f"{digest[:16]}..., the manifest says {want[:16]}...")


# ==================================================================================================
# §8 Quantisation
# ==================================================================================================
@torch.no_grad()
def add_hessian(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    """sums[name] += X^T X, the inputs x [..., in] of the matrices whose source is `name`."""
    x = x.flatten(0, -2).float()
    if name not in sums:
        sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    sums[name].addmm_(x.mT, x)


@torch.no_grad()
def calibrate(model: GPT, rows: "TrainRows", first_step: int, rt: Runtime,
              batches: int = 0) -> dict[str, Tensor]:
    """Mean Hessian a batch, by source, over the GPTQ_CALIBRATION_BATCHES batches that training
    would have seen next, looped (#1855 keeps rank 0's share only)."""
    count, sums = batches or model.cfg.gptq_calibration_batches, {}
    calibration_hook = functools.partial(add_hessian, sums)
    for step in range(first_step, first_step + count):
        for row in rows.step(step):
            model.hidden(row.ids, row.segments, looped=True, calibration_hook=calibration_hook)
    return {name: rt.sum_(h).div_(count) for name, h in sums.items()}


class Grid(NamedTuple):
    """A uniform quantiser a row: integers in +-top, step = sigmas * std(row) / top, as float16."""

    bits: int
    sigmas: float

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def steps(self, W: Tensor) -> Tensor:
        """float16 [rows]; never zero, so that a constant row stays decodable."""
        return (self.sigmas * W.std(dim=1) / self.top).half().clamp_min(2.0**-24)

    def round(self, w: Tensor, s: Tensor) -> Tensor:
        return (w / s).round().clamp(-self.top, self.top)


def grid_for(role: str, cfg: Config) -> Grid:
    """Bits and clipping range by the role of a matrix."""
    if role == "embedding":
        return Grid(cfg.embed_bits, cfg.embed_clip_sigmas)
    return Grid(cfg.matrix_bits, cfg.mlp_clip_sigmas if "mlp" in role else cfg.attn_clip_sigmas)


def spread(starts: Tensor, size: int, cols: int) -> Tensor:
    """bool [cols]: the columns of groups of `size` that begin at `starts`."""
    inside = torch.arange(cols)[:, None] - starts.cpu().long()
    return ((inside >= 0) & (inside < size)).any(1)


def matrix_of(state: Mapping[str, Tensor], m: Matrix) -> Tensor:
    """The float32 weights of a matrix."""
    return (state[m.bank] if m.index is None else state[m.bank][m.index]).float()


class Factor(NamedTuple):
    """What GPTQ needs of a Hessian: which inputs are always zero, the order of the columns (by
    falling diag(H)) and U, the upper Cholesky factor of H^-1 in that order."""
    dead: Tensor
    order: Tensor
    U: Tensor


def factorise(H: Tensor, damp: float = 0.01, log: Callable[[str], Any] = str) -> Factor:
    """H [cols, cols], damped by `damp` times its mean diagonal or, where that leaves it singular
    (fewer inputs than columns), by as many tens more as it takes; UserError if it is not finite."""
    H = H.float().clone()
    require(torch.isfinite(H).all(), "a Hessian is not finite; train longer, or at lower rates")
    dead = H.diagonal() == 0  # an input that is always zero: its weight does not matter
    H.diagonal()[dead] = 1
    for raised in (damp * 10**k for k in range(13)):
        damped = H + torch.diag((raised * H.diagonal().mean()).expand(len(H)))
        order = damped.diagonal().argsort(descending=True)
        with contextlib.suppress(torch.linalg.LinAlgError):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
            U = torch.linalg.cholesky(inverse, upper=True)
            if torch.isfinite(U).all():
                if raised > damp:
                    log(f"warning: GPTQ_DAMP_FACTOR={damp:g} raised to {raised:g} for a Hessian")
                return Factor(dead, order, U)
    raise UserError("a Hessian does not factor, however damped; train longer, or at lower rates")


@torch.no_grad()
def gptq(W: Tensor, H: Tensor | Factor, grid: Grid, block: int = 128, damp: float = 0.01,
         fine: Tensor | None = None, finer: Grid | None = None) -> tuple[Tensor, Tensor]:
    """GPTQ (arXiv:2210.17323): round column by column, push each error onto the columns to come.

    W [rows, cols] float32, H [cols, cols] or its factor -> q int8 [rows, cols], s float16 [rows];
    W ~ q s. E holds a block's scaled errors. Columns in `fine` [cols] are on the grid `finer`."""
    dead, order, U = H if isinstance(H, Factor) else factorise(H, damp)
    s = grid.steps(W.float())
    kinds = [(grid, s.float()), (finer, finer.steps(W.float()).float() if finer else None)]
    kind = [0] * W.shape[1] if fine is None else fine[order.cpu()].int().tolist()
    W = W.float().masked_fill(dead, 0)[:, order]
    Q = torch.empty_like(W)
    for i in range(0, W.shape[1], block):
        j = min(i + block, W.shape[1])
        E = torch.empty_like(W[:, i:j])
        for c in range(i, j):
            own, scale = kinds[kind[c]]
            Q[:, c] = own.round(W[:, c], scale)
            E[:, c - i] = (W[:, c] - Q[:, c] * scale) / U[c, c]
            W[:, c:j] -= E[:, c - i, None] * U[c, c:j]
        W[:, j:] -= E @ U[i:j, j:]
    return Q[:, order.argsort()].to(torch.int8), s


def decode_gptq(q: Tensor, s: Tensor) -> Tensor:
    """q s, float32 [rows, cols]; decodes `encode_rows` too."""
    return q.float() * s.float()[:, None]


# ---- Trellis-coded quantisation with entropy coding (ECTCQ: Fischer and Wang, 1992)
# Integers k of one fine grid run down a column. A walker whose state is its last v bits takes one
# bit a step, b; the state alone fixes the parity of k, state and b fix k mod 4: twice the step's
# choice of values for the rate of a coarse grid. k is stored as m = k >> 1, with the parity as the
# context under which the entropy coder codes m; the state follows from the m above.
# k mod 4 = y0 + 2 y1, y0 = parity(state & low), y1 = b xor parity(state & high); the next state is
# (2 state + b) mod S (Ungerboeck's codes).
TRELLISES = {4: (1, 2), 8: (1, 6), 16: (2, 9), 32: (4, 18), 64: (10, 33)}  # states S: (low, high)
TRELLIS_NOISE = 0.26  # mean squared error in squared steps
TRELLIS_RUN = 128  # rows after which the walk begins again in state 0, so that runs are parallel
LANES = 4  # runs side by side in one vector: 512 rows are 4 runs


def octaves(c: Tensor) -> Tensor:
    """2^(c/8) of c int8, float32: correctly rounded everywhere, as exp2 is not."""
    c8, table = c.cpu().numpy(), np.float32(2 ** (np.arange(8) / 8))  # float64 before rounding
    return torch.from_numpy(np.ldexp(table[c8 & 7], c8 >> 3)).to(c.device)


def trellis_bits(states: int) -> np.ndarray:
    """[2, S] int64: parity of state & low, parity of state & high. One state: no trellis, zeros."""
    masks = TRELLISES.get(states, (0, 0))
    return np.array([[(s & mask).bit_count() & 1 for s in range(states)] for mask in masks])


def trellis_ways(states: int) -> np.ndarray:
    """[S, 2] k mod 4 on the way to each state from the states s >> 1 and S / 2 + (s >> 1)."""
    (low, high), s = trellis_bits(states), np.arange(states)[:, None]
    before = s // 2 + (0, states // 2)
    return low[before] + 2 * (high[before] ^ s % 2)


@numba.njit(nogil=True)
def trellis_walk(m: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """k [rows, cols] int16 of the symbols m = k >> 1 int8; bits: `trellis_bits`."""
    state, k = np.zeros(m.shape[1], np.int64), np.empty(m.shape, np.int16)
    for r in range(len(m)):
        for c in range(m.shape[1]):
            s = state[c] if r % TRELLIS_RUN else 0
            k[r, c] = 2 * m[r, c] + bits[0, s]
            state[c] = (2 * s + ((m[r, c] & 1) ^ bits[1, s])) % bits.shape[1]
    return k


@numba.njit(nogil=True)
def _viterbi(x: np.ndarray, ways: np.ndarray, k: np.ndarray) -> None:
    """Into k [L, LANES] the walks nearest to x [L, LANES], in steps; float32; `trellis_ways`."""
    L, half, four, quarter = len(x), len(ways) >> 1, np.float32(4), np.float32(0.25)
    near, cost = np.empty((4, LANES), np.float32), np.empty((L + 1, 2 * half, LANES), np.float32)
    cost[0], cost[0, 0] = 1e30, 0
    for r in range(L):
        for y in range(4):
            for i in range(LANES):
                u = x[r, i] - np.float32(y)
                u -= four * np.rint(u * quarter)
                near[y, i] = u * u
        old, new = cost[r], cost[r + 1]
        for s in range(2 * half):
            p, a, b = s >> 1, ways[s, 0], ways[s, 1]
            for i in range(LANES):  # of constant length: one vector instruction each
                u, v = old[p, i] + near[a, i], old[p + half, i] + near[b, i]
                new[s, i] = v if v < u else u
    for i in range(LANES):
        s = np.argmin(cost[L, :, i])
        for r in range(L - 1, -1, -1):
            p, a, b = s >> 1, np.float32(ways[s, 0]), np.float32(ways[s, 1])
            u, v = x[r, i] - a, x[r, i] - b
            m, n = four * np.rint(u * quarter), four * np.rint(v * quarter)
            u, v = u - m, v - n
            other = cost[r, p + half, i] + v * v < cost[r, p, i] + u * u
            k[r, i], s = (n + b, p + half) if other else (m + a, p)


@numba.njit(nogil=True)
def _trellis_feedback(W: np.ndarray, U: np.ndarray, rows: np.ndarray, cols: np.ndarray,
                      ways: np.ndarray, block: int) -> np.ndarray:
    """GPTQ on some runs of a matrix: W [LANES, L, n], U [n, n] -> k like W. Steps are rows[0]
    cols[0]; weights are shrunk by 1 / (1 + rows[1] cols[1]) first. W ends as the scaled errors,
    which reach the columns of their block at once, those beyond at its end, four by four."""
    (_, L, n), K = W.shape, np.empty_like(W)
    x, k = np.empty((L, LANES), np.float32), np.empty((L, LANES), np.float32)
    for begin in range(0, n, block):
        end = min(begin + block, n)
        for c in range(begin, end):
            for i in range(LANES):
                for r in range(L):
                    u = W[i, r, c] / (1 + rows[1, i, r] * cols[1, c]) / (rows[0, i, r] * cols[0, c])
                    x[r, i] = min(max(u, -250), 250)
            _viterbi(x, ways, k)
            for i in range(LANES):
                for r in range(L):
                    e = (W[i, r, c] - k[r, i] * rows[0, i, r] * cols[0, c]) / U[c, c]
                    K[i, r, c], W[i, r, c], w, u = k[r, i], e, W[i, r, c + 1:end], U[c, c + 1:end]
                    for j in range(len(w)):
                        w[j] -= e * u[j]
        if end == n:
            break
        for row in W.reshape(LANES * L, n):
            w = row[end:]
            for c in range(begin, end, 4):
                a, b, e, f = row[c:c + 4]
                t, u, v, x4 = U[c, end:], U[c + 1, end:], U[c + 2, end:], U[c + 3, end:]
                for j in range(len(w)):
                    w[j] -= a * t[j] + b * u[j] + e * v[j] + f * x4[j]
    return K


@torch.no_grad()
def gptq_trellis(W: Tensor, factor: Factor, s: Tensor, c: Tensor, states: int,
                 block: int = 128) -> Tensor:
    """GPTQ whose columns are walks of a trellis with steps s [rows] 2^(c [cols] / 8) -> symbols m.

    The rows of a column are independent given the columns before, so a walk down the column needs
    no decision ahead of time. Entropy coding asks for small k: for Gaussian weights of deviation
    sigma, error^2 + lambda bits is least for the walk nearest to w / (1 + D / sigma^2). On the CPU
    whatever the device; equal arguments give equal symbols. block: a multiple of 4."""
    (n, width), power = W.shape, W.float().square().clamp_min(1e-20)
    rows = torch.stack([s.float(), TRELLIS_NOISE * s.float().square() / power.mean(1)])
    scale = octaves(c)
    cols = torch.stack([scale, scale.square() * power.mean() / power.mean(0)])[:, factor.order]
    more, ways = -n % (LANES * TRELLIS_RUN), trellis_ways(states)
    W = F.pad(W.float().masked_fill(factor.dead, 0)[:, factor.order], (0, 0, 0, more))
    rows = F.pad(rows, (0, more), value=1.0).view(2, -1, TRELLIS_RUN)
    W = W.view(-1, TRELLIS_RUN, width)
    W, U, rows, cols = (x.contiguous().cpu().numpy() for x in (W, factor.U, rows, cols))
    k = [_trellis_feedback(W[i:i + LANES].copy(), U, rows[:, i:i + LANES].copy(), cols, ways, block)
         for i in range(0, len(W), LANES)]
    k = torch.from_numpy(np.concatenate(k)).view(-1, width)[:n, factor.order.argsort().cpu()]
    return (k / 2).floor().to(torch.int8)


def decode_matrix(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Of either quantiser, without its low-rank correction."""
    q, s, c = (tensors.get(f"{name}.{part}") for part in "qsc")
    if c is not None:
        return decode_trellis(q, s, c, int(tensors["trellis"]))
    W = decode_gptq(q, s)
    if f"{name}.awq_start" in tensors:
        start, size, s = (tensors[f"{name}.awq_{part}"] for part in ("start", "size", "s"))
        fine = spread(start, int(size), W.shape[1])
        W[:, fine] = decode_gptq(q, s)[:, fine]
    return W


def decode_trellis(m: Tensor, s: Tensor, c: Tensor, states: int) -> Tensor:
    """k s 2^(c/8), float32 [rows, cols]."""
    k = torch.from_numpy(trellis_walk(m.cpu().numpy(), trellis_bits(states))).to(m.device)
    return k * s.float()[:, None] * octaves(c)


def encode_rows(W: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """W [rows, cols] -> q int8 in +-top, top = 2^(bits-1) - 1, s = max|row|/top float16 [rows]."""
    top = 2 ** (bits - 1) - 1
    s = (W.float().abs().amax(dim=1) / top).half().clamp_min(2.0**-24)
    return (W / s.float()[:, None]).round().clamp(-top, top).to(torch.int8), s


def encode_group(x: Tensor, low: int, high: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers low..high with one float16 scale max|x|/(high + 1/2) for `group` elements in order.

    x any shape -> int8 of that shape, scales [G = ceil(numel / group)]. Where groups do not fill
    up, all get ceil(numel / G) elements but the last, so that G alone tells their length."""
    group = -(-x.numel() // -(-x.numel() // group))
    flat = F.pad(x.flatten(), (0, -x.numel() % group)).view(-1, group)
    s = (flat.abs().amax(dim=1) / (high + 0.5)).half().clamp_min(2.0**-24)
    q = (flat / s.float()[:, None]).round().clamp(low, high).to(torch.int8)
    return q.flatten()[: x.numel()].view_as(x), s


def decode_group(q: Tensor, s: Tensor) -> Tensor:
    group = -(-q.numel() // s.numel())
    flat = F.pad(q.flatten().float(), (0, s.numel() * group - q.numel())).view(-1, group)
    return (flat * s.float()[:, None]).flatten()[: q.numel()].view_as(q)


@torch.no_grad()
def encode_lqer(E: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Low-rank approximation A B of a quantisation error E [rows, cols]: LQER, arXiv:2402.02446.

    A = U S [rows, r], B = V^T [r, cols]. Asymmetric: A in -2..1 with one scale, B in -8..7 with one
    for LQER_ASYM_GROUP elements; symmetric: LQER_FACTOR_BITS and one scale a row, both."""
    U, S, Vt = torch.linalg.svd(E.float(), full_matrices=False)
    r = min(cfg.lqer_rank, S.numel())
    A, B = (U[:, :r] * S[:r]).contiguous(), Vt[:r].contiguous()
    if cfg.lqer_asym_enabled:
        a, sa = encode_group(A, -2, 1, A.numel())
        b, sb = encode_group(B, -8, 7, min(cfg.lqer_asym_group, B.numel()))
    else:
        (a, sa), (b, sb) = (encode_rows(x, cfg.lqer_factor_bits) for x in (A, B))
    return {"lqer_a": a, "lqer_sa": sa, "lqer_b": b, "lqer_sb": sb}


def decode_lqer(tensors: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    a, sa, b, sb = (tensors[f"{prefix}lqer_{part}"] for part in ("a", "sa", "b", "sb"))
    A, B = decode_group(a, sa), decode_group(b, sb)
    return sum(A[:, k, None] * B[k] for k in range(len(B)))  # a product's order is its library's


RARE_ROWS = 0.1  # of the mean sensitivity of a matrix, added to every row's


def sensitivities(model: GPT, rows: "TrainRows", first_step: int, hessians: Mapping[str, Tensor],
                  rt: Runtime) -> dict[str, Tensor]:
    """By matrix, [rows]: what noise E in a row costs for each unit of E H E^T, but for one factor
    that all share: the mean square of the loss's gradient g by that output.

    A row's gradient is a sum of g x over tokens and passes, H one of x x^T: where the g are
    independent, E|dW|^2 = trace(H) mean g^2. What batch rows have in common is no noise: rows i of
    both steps are subtracted, in any world. Fisher's matrix stands for the loss's curvature."""
    found, params = matrices(model.cfg), dict(model.named_parameters())
    sums = [torch.zeros(matrix_of(params, m).shape[0], device=rt.device) for m in found]
    for pair in zip(rows.step(first_step), rows.step(first_step + 1), strict=True):
        losses = (model(row.ids, row.targets, row.segments, True).mean() for row in pair)
        one, other = (torch.autograd.grad(loss, [*params.values()]) for loss in losses)
        grads = dict(zip(params, torch._foreach_sub(one, other), strict=True))
        for m, total in zip(found, sums, strict=True):
            total += matrix_of(grads, m).square().sum(1)
    sums = rt.sum_(torch.cat(sums)).split([len(x) for x in sums])
    costs = {m.name: (x + RARE_ROWS * x.mean()) / (hessians[m.source].trace() + 1e-30)
             for m, x in zip(found, sums, strict=True)}
    least = max(1e-30, 1e-12 * max(x.max().item() for x in costs.values()))
    return {name: x.clamp_min(least).cpu() for name, x in costs.items()}


def water_level(deviations: Sequence[float], units: Sequence[float], counts: Sequence[int],
                bits: float) -> float:
    """The level at which steps 2^level * unit give matrices of these deviations `bits` in sum.

    Reverse water-filling: with units 1/sqrt(cost of noise) all noise costs the same, but for
    matrices that lie below it, which get none. Rate of a Gaussian, with the trellis' 0.42 dB."""
    def total(level: float) -> float:
        ratios = (x / (2**level * unit) for x, unit in zip(deviations, units, strict=True))
        return sum(n * (0.5 * math.log2(1 + r * r / TRELLIS_NOISE) + min(0.07, r))
                   for r, n in zip(ratios, counts, strict=True))

    low, high = -200.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > bits else (low, middle)
    return high


def fill_budget(encode: Callable[[float], bytes], budget: int, weights: int, level: float,
                slack: int = 2048, tries: int = 24) -> bytes:
    """The longest of the tried encode(level) that is at most `budget` bytes, or the shortest if
    none is. Ends within `slack`, in a closed bracket, or where three in turn are equally long.
    Guesses go by the last two tries (at first a bit a weight for an octave; sizes are noisy: within
    a factor of 4); one outside the bracket halves it, and so does every third."""
    best, sizes, slope, last, fine, coarse = None, [], weights / 8, level, -math.inf, math.inf
    for k in range(tries):
        blob = encode(level)
        best = max(best or blob, blob, key=lambda x: (len(x) <= budget, -abs(budget - len(x))))
        fits, sizes = len(blob) <= budget, [*sizes, len(blob)]
        fine, coarse = (fine, min(level, coarse)) if fits else (max(level, fine), coarse)
        if coarse < math.inf and (budget - slack < len(best) or 0 < coarse - fine < 1e-4
                                  or fits and sizes[-3:] == 3 * sizes[-1:]):
            break
        if level != last:
            slope = min(max((sizes[-2] - sizes[-1]) / (level - last), weights / 32), weights / 2)
        least, last = 0.005 * 2**k if coarse == math.inf else -4, level  # till one fits: coarser
        level += min(max((len(blob) - budget + slack / 2) / slope, least, -4), 4)
        if math.isfinite(coarse - fine) and (k % 3 == 2 or not fine < level < coarse):
            level = (fine + coarse) / 2
    return best


def trellis_unit(factor: Factor, sensitivity: Tensor) -> Tensor:
    """Steps [rows] at level 0: noise of as many steps costs the same in every row. In quarters of
    octaves, which are cheap to store."""
    unit = factor.U.diagonal().log2().mean().cpu() - sensitivity.log2() / 2
    return ((4 * unit).round() / 4).exp2()


def trellis_steps(W: Tensor, factor: Factor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """s [rows] and c [cols] of the steps s 2^(c/8), s = unit [rows]: as fine in column c as its
    error is dear, 1 / U_cc^2 (arXiv:2210.17323, eq. 3), but so coarse that all fit int8."""
    u = factor.U.diagonal()[factor.order.argsort()].log2()
    c = (8 * (u - u.mean())).round().clamp(-127, 127).to(torch.int8)
    floor = (W.abs() / octaves(c)).amax(dim=1) / 200
    return floor.maximum(unit.to(floor)).half().clamp(2.0**-24, 65504), c


def quantise_trellis(state: Mapping[str, Tensor], factors: Mapping[str, Factor],
                     sensitivity: Mapping[str, Tensor], level: float,
                     cfg: Config) -> dict[str, Tensor]:
    """NAME.q (symbols m), NAME.s and NAME.c of every matrix, and the number of states."""
    def one(m: Matrix) -> dict[str, Tensor]:
        W, factor = matrix_of(state, m), factors[m.source]
        s, c = trellis_steps(W, factor, 2**level * trellis_unit(factor, sensitivity[m.name]))
        q = gptq_trellis(W, factor, s, c, cfg.trellis_states)
        return {f"{m.name}.q": q, f"{m.name}.s": s, f"{m.name}.c": c}

    out = {"trellis": torch.tensor([cfg.trellis_states], dtype=torch.int16)}
    with ThreadPoolExecutor(numba.config.NUMBA_DEFAULT_NUM_THREADS) as pool:
        for part in pool.map(one, matrices(cfg)):
            out |= part
    return out


@torch.no_grad()
def fit_trellis(state: Mapping[str, Tensor], hessians: Mapping[str, Tensor],
                noise: Mapping[str, Tensor], cfg: Config, budget: int,
                encode: Callable[[dict[str, Tensor]], bytes], log: Callable[[str], None]) -> bytes:
    """The artifact whose trellis-coded matrices fill `budget` bytes; noise: `sensitivities`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    factors = {name: factorise(H, cfg.gptq_damp_factor, log) for name, H in hessians.items()}
    units, counts, spreads = zip(*(
        (trellis_unit(factors[m.source], noise[m.name]).log2().mean().exp2().item(), W.numel(),
         W.square().mean().sqrt().item())
        for m in matrices(cfg) for W in [matrix_of(state, m)]), strict=True)

    def attempt(level: float) -> bytes:
        blob = encode(quantise_trellis(state, factors, noise, level, cfg))
        log(f"trellis: level {level:.4f} gives {len(blob)} of {budget} bytes")
        return blob

    start = water_level(spreads, units, counts, 8 * budget)
    blob = fill_budget(attempt, budget, sum(counts), start)
    if budget - len(blob) > 2048:
        log(f"trellis: {budget - len(blob)} bytes stay free: no finer steps were found that fit")
    return blob


@torch.no_grad()
def quantise(state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], cfg: Config,
             by_trellis: Mapping | None = None, log: Callable = str) -> dict[str, Tensor]:
    """The state dict as the tensors of an artifact, on the CPU.

    A matrix NAME becomes NAME.q and NAME.s, and NAME.lqer_* where it is corrected, NAME.awq_* where
    it has columns of more bits; int8 rows become NAME.q and NAME.s; everything else NAME in
    float16. by_trellis: of `quantise_trellis`, without corrections, which gain nothing there."""
    torch.backends.cuda.matmul.allow_tf32 = False  # errors are fed back: full float32
    out, errors, found = dict(by_trellis or {}), {}, () if by_trellis else matrices(cfg)
    weights, protected = {m.name: matrix_of(state, m) for m in found}, {}
    if found and cfg.awq_lite_enabled:
        protected = extra("variants").protected_columns(weights, hessians, cfg)
    factor = functools.cache(lambda name: factorise(hessians[name], cfg.gptq_damp_factor, log))
    for m in found:
        W, grid, starts = weights[m.name], grid_for(m.role, cfg), protected.get(m.name)
        finer, fine = grid._replace(bits=cfg.awq_lite_bits), None
        if starts is not None:
            fine = spread(starts, cfg.awq_lite_group_size, W.shape[1])
            size = torch.tensor([cfg.awq_lite_group_size], dtype=torch.int16)
            out.update({f"{m.name}.awq_start": starts, f"{m.name}.awq_size": size,
                        f"{m.name}.awq_s": finer.steps(W)})
        q, s = gptq(W, factor(m.source), grid, fine=fine, finer=finer)
        out[f"{m.name}.q"], out[f"{m.name}.s"] = q, s
        errors[m.name] = W - decode_matrix(out, m.name)
    if cfg.lqer_enabled:
        gain = {name: E.norm().item() for name, E in errors.items()}
        if cfg.lqer_gain_select:  # what the stored correction takes off, not what there is to take
            gain = {n: g - (errors[n] - decode_lqer(encode_lqer(errors[n], cfg))).norm().item()
                    for n, g in gain.items()}
        worst = sorted((name for name in gain if gain[name] > 0), key=lambda name: -gain[name])
        for name in worst[: cfg.lqer_top_k]:
            out.update({f"{name}.{k}": v for k, v in encode_lqer(errors[name], cfg).items()})
    for name, r in route(list(state)).items():
        if r.store == "int8_rows" and cfg.gated_attn_quant_gate:
            out[f"{name}.q"], out[f"{name}.s"] = encode_rows(state[name])
        elif r.store != "gptq":
            out[name] = state[name].half()
    torch.backends.cuda.matmul.allow_tf32 = True
    return {name: t.cpu().contiguous() for name, t in out.items()}


def check_pieces(pieces: Mapping[str, tuple[str, Sequence[int]]], model: GPT) -> None:
    """UserError if an artifact's pieces, name -> (type, shape), are not those of this model."""
    left, remedy = dict(pieces), "it is of another model: use the settings it was made with"

    def take(name: str, dtype: str, *want: int, most: int = 0) -> None:
        require(name in left, f"artifact: no piece {name}; {remedy}")
        have, shape = left.pop(name)
        want = (max(1, min(math.prod(shape), most)),) if most else want  # or fewer
        require((have, *shape) == (dtype, *want),
                f"artifact: {name} is {have} {list(shape)}, not {dtype} {list(want)}; {remedy}")

    whole = {name: list(p.shape) for name, p in model.state_dict().items()}
    shapes = {m.name: whole[m.bank][-2:] for m in matrices(model.cfg)}
    shapes |= {n: x for n, x in whole.items() if n not in {m.bank for m in matrices(model.cfg)}}
    if any(name.endswith(".c") for name in left):
        take("trellis", "int16", 1)
    for name, shape in shapes.items():
        if f"{name}.q" not in left:
            take(name, "float16", *shape)
            continue
        take(f"{name}.q", "int8", *shape)
        take(f"{name}.s", "float16", shape[0])
        if f"{name}.c" in left:
            take(f"{name}.c", "int8", shape[1])
        if f"{name}.awq_start" in left and f"{name}.c" not in pieces:
            take(f"{name}.awq_start", "int16", most=shape[1])
            take(f"{name}.awq_size", "int16", 1)
            take(f"{name}.awq_s", "float16", shape[0])
        if any(f"{name}.lqer_{part}" in left for part in ("a", "b", "sa", "sb")):
            rank = max(1, min([*shape, *left.get(f"{name}.lqer_a", ("", [1]))[1][-1:]]))
            take(f"{name}.lqer_a", "int8", shape[0], rank)
            take(f"{name}.lqer_b", "int8", rank, shape[1])
            take(f"{name}.lqer_sa", "float16", most=shape[0] * rank)
            take(f"{name}.lqer_sb", "float16", most=shape[1] * rank)
    require(not left, f"artifact: a piece {min(left, default='')} that this model lacks; {remedy}")


@torch.no_grad()
def dequantise(tensors: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """The float32 state dict that `quantise` stored; UserError for a missing or misshapen piece."""
    check_pieces({n: (str(x.dtype)[6:], x.shape) for n, x in tensors.items()}, model)
    require("trellis" not in tensors or int(tensors["trellis"]) in TRELLISES,
            "artifact: the piece trellis holds no known number of states")

    def weight(name: str) -> Tensor:
        if name in tensors:
            return tensors[name].float()
        W = decode_matrix(tensors, name)
        return W + decode_lqer(tensors, f"{name}.") if f"{name}.lqer_a" in tensors else W

    banks = {}
    for m in sorted(matrices(model.cfg), key=lambda m: m.index or 0):
        banks.setdefault(m.bank, []).append(weight(m.name))
    return {name: weight(name) if name not in banks else torch.stack(banks[name]).view_as(p)
            for name, p in model.state_dict().items()}


# ==================================================================================================
# §9 Artifact
# ==================================================================================================
# file = header, directory, streams, without gaps; header = magic, version, bytes of the directory
# (stored, raw) and of the file, digest of the directory; directory = JSON [meta, streams] (brotli);
# stream = [group, codec, start after the directory, stored bytes, raw bytes, digest of the stored,
# pieces]; piece = [name, kind, dtype, shape, start in the raw stream, bytes, digest].
# A digest is the first 16 bytes of sha256: enough against damage, and nothing here is signed.
MAGIC, FORMAT_VERSION, HEADER = b"\x93GOLF16\n", 1, struct.Struct("<8sHIIQ16s")
MODEL_FILE, PROGRAM_FILE = "final_model.pt", "final_program.py"
ARTIFACT_FILE = "final_model.int6.ptz"
RAW_LIMIT = 1 << 30  # decompressed bytes that a file may ask for
PIECE_KINDS = ("plain", "transposed", "walked", "order")  # walked: rows in an order, transposed
PIECE_DTYPES = ("int8", "uint8", "int16", "uint16", "float16", "float32")
ROLES = ("mlp_up", "mlp_down", "embedding", "query", "attn_out", "key", "value")  # largest first
WALKED_ROLES, WALK_ROWS = ("embedding", "query", "mlp_up"), 16384  # the walk holds rows^2 floats
COMPRESSORS = {"ans": "ans", "pergroup": "lrzip", "brotli": "brotli", "lzma": "lzma"}  # matrices'
CODECS = {  # name: (compress, decompress to `size` bytes, stopping soon after); ans: shapes, too
    "brotli": (lambda raw, *_: brotli.compress(raw, quality=11, lgwin=24),
               lambda raw, n, *_: brotli.Decompressor().process(raw, output_buffer_limit=n + 1)),
    "lzma": (lambda raw, *_: lzma.compress(raw, check=lzma.CHECK_NONE,
                                           preset=9 | lzma.PRESET_EXTREME),
             lambda raw, n, *_: lzma.LZMADecompressor(memlimit=1 << 27).decompress(raw, n + 1)),
    "lrzip": (lambda raw, *_: _lrzip(raw, "-z -L 9", limit=2 * len(raw) + 65536),
              lambda raw, n, *_: _lrzip(raw, "-d", limit=n)),
    "ans": (lambda *given: _ans_encode(*given), lambda *given: _ans_decode(*given))}


def check_compressor(name: str, packing: bool = True) -> None:
    """UserError with the remedy if an artifact could not be written; call it before training."""
    require(name in COMPRESSORS,
            f"COMPRESSOR={name} is unknown: choose from {', '.join(COMPRESSORS)}")
    require(not packing or importlib.util.find_spec("python_minifier"),
            "the packed program needs python-minifier: pip install python-minifier")
    require(name != "pergroup" or shutil.which("lrzip"), "COMPRESSOR=pergroup needs the program "
            "lrzip: apt-get install lrzip, or brew install lrzip, or set COMPRESSOR=ans")


def _lrzip(data: bytes, options: str, limit: int) -> bytes:
    """`data` through lrzip, which may write about `limit` bytes; some exception where it fails."""
    check_compressor("pergroup", packing=False)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").write_bytes(data)
        # -N 0: lrzip lowers its own priority otherwise; -p 1: groups run side by side instead
        command = f"ulimit -f {limit // 512 + 2} && exec lrzip -Q -N 0 -p 1 {options} -o out in"
        subprocess.run(["sh", "-c", command], cwd=folder, check=True, timeout=120 + limit // 20_000,
                       capture_output=True, env={**os.environ, "LRZIP": "NOCONFIG", "TMP": folder})
        return Path(folder, "out").read_bytes()


# ---- ans: int8 matrices of one shape, an adaptive model, rANS (arXiv:1402.3392)
# One walk visits the integers for both directions, so that model and inverse cannot differ. All it
# computes is exact on any machine: integers, + - * / of float64 one by one, which IEEE 754 fixes
# (numba neither fuses nor reorders them), and sums of whole numbers below 2^53. Settings, of which
# the encoder takes the best: rows that the mean of all matrices counts for in a column's variance;
# columns that 1 counts for in a row's factor (below 0, times C: rows of the uniform quantiser have
# one energy, so what began loud ends quiet); rows that independence counts for in prediction, or 0
ANS_SETTINGS = ((64, -1.1, 0), (512, -1.1, 0), (64, 8192, 0), (256, 48, 0), (128, 16, 512),
                (512, 256, 2048))
ANS_HEAD, ANS_SCALES = struct.Struct("<BBbB5s"), 128  # setting, states, least, span - 1, rANS state


@numba.njit(nogil=True)
def _ans_predictor(cov: np.ndarray, ridge: float) -> np.ndarray:
    """Column c's coefficients in those before it, int16 / 2^12 [:, c], from second moments
    cov [C, C]: I - L^-1 of cov = L D L^T, by element since a BLAS would round."""
    a, C = cov.copy(), len(cov)
    for c in range(C):
        a[c, c] = cov[c, c] * (1 + ridge) + 1
    for c in range(C - 1):
        for i in range(c + 1, C):
            factor = a[i, c] / a[c, c]
            for j in range(C):
                a[i, j] -= factor * a[c, j]
            a[i, c] = -factor  # L^-1 grows where the lower half of cov is done with
    for c in range(C):
        a[c, c:] = 0
    return np.clip(np.rint(a.T * -4096), -16384, 16384).astype(np.int16)


@numba.njit(nogil=True)
def _ans_renew(table: np.ndarray, context: int, total: int) -> None:
    """Frequencies of 65,536 in all, and their sums, from the counts of one context."""
    n, most, left = table.shape[2], 0, 65536
    for k in range(n):
        table[1, context, k] = 1 + table[0, context, k] * (65536 - n) // total
        left -= table[1, context, k]
        most = k if table[1, context, k] > table[1, context, most] else most
    table[1, context, most] += left
    for k in range(1, n):
        table[2, context, k] = table[2, context, k - 1] + table[1, context, k - 1]


@numba.njit(nogil=True)
def _ans_rows(cube: np.ndarray, span: tuple, setting: tuple, trellis: np.ndarray, least: int,
              energy: np.ndarray, state: np.ndarray, table: np.ndarray, totals: np.ndarray,
              coef: np.ndarray, seen: np.ndarray, codes: np.ndarray, words: np.ndarray,
              at: int, x: int) -> tuple[int, int]:
    """Rows span of cube [M, R, C], one by one, the M matrices by turns: into codes, or from words
    where there are no codes. Returns (place in them, state of the rANS), place -1 for an error.

    Values are in quarters: t is the distance of 4 m + 2 parity from its prediction, its variance
    the column's mean of t^2 in the rows above times the row's factor from the columns to the left.
    The fourths of the prediction and the parity choose one of four phases of a distribution."""
    (M, _, C), (prior, left, ridge), n = cube.shape, setting, table.shape[2]
    guess, pool, v = np.zeros(C, np.int32), np.empty(C), np.empty(1)
    bits, left = v.view(np.int64), left if left > 0 else -left * C
    for r in range(span[0], span[1]):
        if r % TRELLIS_RUN == 0:
            state[:] = 0
        mean = energy.sum() / (r * M * C) if r else 96.0
        for c in range(C):
            pool[c] = (energy[:, c].sum() + 1024 * mean) / (M * r + 1024)
        for m in range(M):
            loud, guess[:] = 0.0, 0
            for c in range(C):
                base = max((energy[m, c] + prior * pool[c]) / (r + prior), 1.0)
                v[0] = base * min(max((loud + left) / (c + left), 0.25), 4.0)
                # exponent and three bits of the mantissa: a logarithm that no libm has a say in
                scale = min(max((bits[0] >> 49) - (1023 << 3), 0), ANS_SCALES - 1)
                s, near = state[m, c], min(max((np.int64(guess[c]) + 2048) >> 12, -508), 508)
                shift = near - 2 * trellis[0, s]
                context = 4 * scale + (shift & 3)
                if totals[0, context] > totals[1, context] + (totals[1, context] >> 3):
                    totals[1, context] = totals[0, context]
                    _ans_renew(table, context, totals[0, context])
                freq, start = table[1, context], table[2, context]
                if len(codes):
                    k = (cube[m, r, c] - (shift >> 2) - least) % n
                    codes[at] = (freq[k] - 1) << 16 | start[k]
                    at += 1
                else:
                    k, high, slot = 0, n, x & 65535
                    while high - k > 1:
                        middle = (k + high) >> 1
                        if start[middle] <= slot:
                            k = middle
                        else:
                            high = middle
                    x = freq[k] * (x >> 16) + slot - start[k]
                    if x < 1 << 24:
                        if at == len(words):
                            return -1, x
                        x, at = x << 16 | words[at], at + 1
                    cube[m, r, c] = (k + (shift >> 2)) % n + least
                table[0, context, k] += 64
                totals[0, context] += 64
                q = np.int64(cube[m, r, c])
                t = 4 * q - shift
                loud += t * t / base
                energy[m, c] += t * t
                state[m, c] = (2 * s + ((q & 1) ^ trellis[1, s])) & (trellis.shape[1] - 1)
                if ridge:
                    value, later, row = np.int32(t + near), guess[c + 1:], coef[c, c + 1:]
                    seen[r, c] = value
                    for j in range(len(row)):
                        later[j] += row[j] * value
    return at, x


@numba.njit(nogil=True)
def _ans_push(codes: np.ndarray) -> tuple[int, np.ndarray]:
    """The rANS state in front, 16-bit words of codes (freq - 1) << 16 | start; last in first out"""
    x, words, at = 1 << 24, np.empty(len(codes), np.uint16), len(codes)
    for code in codes[::-1]:
        freq, start = (np.int64(code) >> 16) + 1, np.int64(code) & 65535
        if x >= freq << 24:
            at -= 1
            words[at] = x & 65535
            x >>= 16
        x += x // freq * (65536 - freq) + start
    return x, words[at:].copy()


def _ans_walk(cube: np.ndarray, index: int, states: int, least: int, n: int, codes: np.ndarray,
              words: np.ndarray, x: int) -> tuple[int, int]:
    """`_ans_rows` on all of cube, with all that it learns: frequencies by context, of 65,536, are
    a Gaussian worth 1,024 observations, then what is seen; predictions at rows 64, 128, ..."""
    (M, R, C), setting, at = cube.shape, ANS_SETTINGS[index], 0
    edges = ((np.arange(ANS_SCALES + 1) + (1023 << 3)) << 49).view(np.float64) / 16
    far = np.arange(least, least + n) - np.arange(4)[:, None] / 4
    w = 1 / (1 + far * far / (edges[:-1] + edges[1:])[:, None, None] / 1024)
    for _ in range(10):  # (1 + y / 1024)^-1024 for exp(-y), which differs between libraries
        w = w * w
    w = np.rint(w * 2.0**30).astype(np.int64).reshape(-1, n)
    table, totals = np.zeros((3, *w.shape), np.int64), np.zeros((2, len(w)), np.int64)
    table[0] = (w << 16) // np.maximum(w.sum(1, keepdims=True), 1)
    totals[0] = table[0].sum(1) + 1
    energy, state, side = np.zeros((M, C)), np.zeros((M, C), np.int64), C if setting[2] else 0
    seen, coef, cov = np.zeros((R, side)), np.zeros((side, side), np.int16), 0
    edges = [0, 64, 128, 256, 512, *range(1024, R, 1024)] if side else [0]
    for span in itertools.pairwise([e for e in edges if e < R] + [R]):
        at, x = _ans_rows(cube, span, tuple(map(float, setting)), trellis_bits(states), least,
                          energy, state, table, totals, coef, seen, codes, words, at, x)
        require(at >= 0, "ans: the words end before the integers")
        if side and span[1] < R:
            new = seen[span[0]:span[1]]
            cov = cov + new.T @ new
            coef = _ans_predictor(cov, setting[2] / span[1])
    return at, x


def _ans_settings(M: int, R: int, C: int) -> list[int]:
    """Those that may be tried: prediction (C^3 operations) only for one tall and narrow matrix."""
    return [i for i, setting in enumerate(ANS_SETTINGS)
            if not setting[2] or (M == 1 and R >= 2 * C and C <= 1024)]


def _ans_encode(raw: bytes, shapes: Sequence[tuple[int, int]], states: int) -> bytes:
    """Concatenated int8 matrices -> head, words of 16 bits. states: of the trellis, or 1."""
    cube = np.frombuffer(raw, np.int8).reshape(len(shapes), *shapes[0]).copy()
    least, most, none = int(cube.min()), int(cube.max()), np.zeros(0, np.uint16)

    def codes(part: np.ndarray, index: int) -> np.ndarray:
        out = np.empty(part.size, np.uint32)
        _ans_walk(part, index, states, least, most - least + 1, out, none, 0)
        return out

    sample = cube[::2].copy()
    tried = {i: -np.log2((codes(sample, i) >> 16) + 1.0).sum() for i in _ans_settings(*cube.shape)}
    index = min(tried, key=tried.get)
    x, words = _ans_push(codes(cube, index))
    head = ANS_HEAD.pack(index, states, least, most - least, x.to_bytes(5, "little"))
    return head + words.astype("<u2").tobytes()


def _ans_decode(stored: bytes, size: int, shapes: Sequence[Sequence[int]]) -> bytes:
    """The `size` bytes that were encoded; an exception for what `_ans_encode` cannot have made."""
    M, (R, C) = len(shapes), shapes[0]
    index, states, least, span, x = ANS_HEAD.unpack_from(stored)
    require(size == M * R * C and shapes.count(shapes[0]) == M and least + span <= 127
            and index in _ans_settings(M, R, C) and (states == 1 or states in TRELLISES),
            "ans: sizes, setting or states do not agree")
    cube, x = np.zeros((M, R, C), np.int8), int.from_bytes(x, "little")
    words = np.frombuffer(stored, "<u2", -1, ANS_HEAD.size).astype(np.uint16)
    at, x = _ans_walk(cube, index, states, least, span + 1, np.zeros(0, np.uint32), words, x)
    require(at == len(words) and x == 1 << 24, "ans: the integers end at another place")
    return cube.tobytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _nearest_walk(matrix: np.ndarray) -> np.ndarray:
    """Row order [R] uint16: from row 0 on, always to the nearest (L1) row not yet visited, the
    first of equals. matrix [R, C] int8, R at most WALK_ROWS; float32 holds these sums exactly."""
    rows, order = torch.from_numpy(matrix).float(), np.zeros(len(matrix), np.uint16)
    distance = np.empty((len(rows), len(rows)), np.float32)
    for i in range(0, len(rows), 256):  # one triangle of blocks, mirrored
        distance[i:i + 256, i:] = torch.cdist(rows[i:i + 256], rows[i:], p=1)
        distance[i:, i:i + 256] = distance[i:i + 256, i:].T
    for step in range(1, len(rows)):
        distance[:, order[step - 1]] = np.inf
        order[step] = distance[order[step - 1]].argmin()
    return order


def _encode_stream(job: tuple[str, str, str, dict[str, np.ndarray]],
                   states: int) -> tuple[list, bytes]:
    """(group, codec, kind, arrays) -> the directory's row (start still 0), the stored bytes."""
    (group, codec, kind, arrays), rows, raw = job, [], bytearray()
    for name, array in arrays.items():
        order = _nearest_walk(array) if kind == "walked" else slice(None)
        if kind == "walked":  # the order comes first, as a piece of its own
            rows.append((f"{name}/order", "order", order, order))
        rows.append((name, kind, array, array if kind == "plain" else array[order].T))
    for i, (name, kind, array, stored) in enumerate(rows):
        data = stored.astype(array.dtype.newbyteorder("<")).tobytes()
        rows[i] = [name, kind, array.dtype.name, array.shape, len(raw), len(data), _digest(data)]
        raw += data
    stored = CODECS[codec][0](bytes(raw), [a.shape for a in arrays.values()], states)
    return [group, codec, 0, len(stored), len(raw), _digest(stored), rows], stored


def _decode_stream(row: list, stored: bytes) -> dict[str, np.ndarray]:
    """The arrays of one directory row; UserError (or another) if anything does not agree."""
    group, codec, _, _, size, digest, pieces = row
    require(_digest(stored) == digest, f"stream {group!r}: hash differs")
    raw = CODECS[codec][1](stored, size, [piece[3] for piece in pieces])
    arrays, order = {}, None
    require(len(raw) == size, f"stream {group!r}: does not hold the {size} bytes declared")
    for name, kind, dtype, shape, start, length, digest in pieces:
        at, data = f"piece {name!r}", raw[start:start + length]
        require(len(data) == length, f"{at}: range outside its stream")
        require(_digest(data) == digest, f"{at}: hash differs")
        array = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
        array = array.reshape(shape[::-1]).T if kind in ("transposed", "walked") else array
        if kind == "order":
            order = array
        else:
            array = array[np.argsort(order)] if kind == "walked" else array
            arrays[name] = np.array(array, dtype, order="C").reshape(shape)
    return arrays


def encode_artifact(tensors: dict[str, np.ndarray], roles: dict[str, str], meta: dict,
                    compressor: str) -> bytes:
    """The artifact file; equal arguments give equal bytes. UserError: a tensor that has no place.

    tensors: arrays or CPU torch tensors of the PIECE_DTYPES. roles: integer matrix -> one of
    ROLES; "ans" and "pergroup" compress each role by itself and the rest by brotli, the others all
    in one stream. meta: what JSON holds. idea: groups by role, the walk and ZPAQ: #1855."""
    groups, best, end, codec = {"rest": {}}, {}, 0, COMPRESSORS[compressor]
    states = int(tensors["trellis"][0]) if "trellis" in tensors else 1
    for name, array in ((name, np.asarray(tensor)) for name, tensor in tensors.items()):
        role = roles.get(name, "rest") if codec in ("ans", "lrzip") and array.size else "rest"
        require(array.dtype.name in PIECE_DTYPES and (role == "rest" or role in ROLES and
                array.ndim == 2), f"cannot store {name}: {array.dtype} {array.shape} as {role}")
        first = next(iter(groups.get(role, {}).values()), array)
        if codec == "ans" and not (array.dtype == np.int8 and array.shape == first.shape):
            role = "rest"
        groups.setdefault(role, {})[name] = array
    jobs = [("rest", "lzma" if codec == "lzma" else "brotli", "plain", groups.pop("rest"))]
    for group, arrays in ((role, groups[role]) for role in ROLES if role in groups):
        jobs.append((group, codec, "plain" if codec == "ans" else "transposed", arrays))
        most = max(map(len, arrays.values()))
        # both ways are tried: for independent weights an order costs more than it saves
        if codec == "lrzip" and group in WALKED_ROLES and most <= WALK_ROWS:
            jobs.append((group, codec, "walked", arrays))
    with ThreadPoolExecutor(numba.config.NUMBA_DEFAULT_NUM_THREADS) as pool:
        for row, stored in pool.map(_encode_stream, jobs, itertools.repeat(states)):
            if row[0] not in best or len(stored) < len(best[row[0]][1]):
                best[row[0]] = row, stored
    for row, stored in best.values():
        row[2], end = end, end + len(stored)
    raw = json.dumps([meta, [row for row, _ in best.values()]], separators=(",", ":")).encode()
    directory = CODECS["brotli"][0](raw)
    header = HEADER.pack(MAGIC, FORMAT_VERSION, len(directory), len(raw),
                         HEADER.size + len(directory) + end, bytes.fromhex(_digest(directory)))
    return b"".join([header, directory, *(stored for _, stored in best.values())])


def _read_directory(blob: bytes) -> tuple[dict, list[tuple[list, bytes]]]:
    """(meta, [(stream's row, stored bytes)]): what the rows say about sizes agrees with itself."""
    require(blob[:8] == MAGIC, "not an artifact of this program (its first bytes differ)")
    require(len(blob) >= HEADER.size, f"truncated: {len(blob)} bytes do not hold the header")
    _, version, packed, raw, total, digest = HEADER.unpack_from(blob)
    require(version == FORMAT_VERSION, f"format {version}; this program reads {FORMAT_VERSION}")
    require(total == len(blob), f"truncated: header says {total} bytes, the file has {len(blob)}")
    end = base = HEADER.size + packed
    require(_digest(blob[HEADER.size:base]) == digest.hex(), "directory: hash differs")
    meta, rows = json.loads(CODECS["brotli"][1](blob[HEADER.size:base], min(raw, 1 << 24)))
    sizes = [row[4] for row in rows]
    require(min(sizes, default=0) >= 0 and sum(sizes) <= RAW_LIMIT,
            "declares more bytes than are allowed")
    for group, codec, start, stored, size, _, pieces in rows:
        require(codec in CODECS, f"stream {group!r}: unknown compressor {codec!r}")
        require(start == end - base and 0 <= stored <= total - end,
                f"stream {group!r}: range outside the file, or not where the one before ends")
        end += stored
        for name, kind, dtype, shape, _, length, _ in pieces:
            require(kind in PIECE_KINDS and dtype in PIECE_DTYPES,
                    f"piece {name!r}: unknown {kind=}, {dtype=}")
            whole = all(type(n) is int and n >= 0 for n in shape)
            require(whole and length == math.prod(shape) * np.dtype(dtype).itemsize,
                    f"piece {name!r}: shape and size do not agree")
        total_raw = sum(piece[5] for piece in pieces)
        require(total_raw == size, f"stream {group!r}: pieces of other size")
    require(end == total, "bytes at the end that belong to no stream")
    names = [piece[0] for row in rows for piece in row[6]]
    require(len(set(names)) == len(names), "two pieces have the same name")
    require(set(map(type, [meta, *names])) <= {dict, str}, "meta or a name is of a wrong type")
    return meta, [(row, blob[base + row[2]:base + row[2] + row[3]]) for row in rows]


def decode_artifact(blob: bytes, source: str, check: Callable = lambda meta, pieces: None,
                    ) -> tuple[dict[str, np.ndarray], dict]:
    """(tensors, meta) as encoded. UserError, one line that begins with `source`, for a file that is
    damaged, truncated, of another version or foreign. Nothing in the file is executed, and nothing
    but the directory unpacked before check(meta, {name: (type, shape)}) has returned."""
    try:
        meta, streams = _read_directory(blob)
        pieces = [piece for row, _ in streams for piece in row[6]]
        check(meta, {n: (dtype, shape) for n, kind, dtype, shape, *_ in pieces if kind != "order"})
        for order, of in itertools.pairwise(pieces):
            require(order[1] != "order" or order[3] == of[3][:1], f"piece {order[0]!r}: too long")
        with ThreadPoolExecutor(numba.config.NUMBA_DEFAULT_NUM_THREADS) as pool:
            parts = list(pool.map(_decode_stream, *zip(*streams)))
    except UserError as error:
        raise UserError(f"{source}: {error}"[:400]) from error
    except Exception as error:  # decompressors, JSON and rows of another form raise many types
        text = " ".join(str(error).split())
        raise UserError(f"{source}: unreadable: {type(error).__name__}: {text}"[:400]) from error
    return {name: array for part in parts for name, array in part.items()}, meta


def artifact_report(blob: bytes) -> dict[str, int]:
    """Bytes by group, for the log; they sum to the file's."""
    sizes = {row[0]: row[3] for row, _ in _read_directory(blob)[1]}
    return {"directory": len(blob) - sum(sizes.values()), **sizes}


# A packed program is brotli data, then a zip file with this member: Python runs a zip whatever
# precedes it. linecache serves tracebacks, inspect, Triton; `n` is no file, lest C print binary.
STUB = """import linecache,os,sys,traceback
try:import brotli
except ImportError:print('error: brotli',%r,file=sys.stderr);sys.exit(2)
__file__,__spec__,__package__=os.path.abspath(__loader__.archive),None,None
sys.path[:1],sys.excepthook=(os.path.dirname(__file__),__file__),traceback.print_exception
with open(__file__,'rb')as f:__program__=f.read()
s,n=brotli.decompress(__program__[:%d]).decode(),__file__+'.source'
for k in(n,__file__):linecache.cache[k]=len(s),None,[l+'\\n'for l in s.split('\\n')],k
exec(compile(s,n,'exec'))
"""


def pack_program(source: str, modules: Mapping[str, str] | None = None) -> bytes:
    """A smaller file that Python runs as it would `source` (__main__, __file__, argv, getsource,
    spawned processes); it needs brotli only, and holds `modules` (name: source) for it to import.
    Annotations stay: custom ops and dataclasses read them. Names stay: some are keywords in Triton,
    and renaming locals would save only 1 kB."""
    import python_minifier
    small = functools.partial(python_minifier.minify, remove_literal_statements=True,
                              remove_annotations=False, rename_locals=False, hoist_literals=False)
    file = io.BytesIO()
    size = file.write(CODECS["brotli"][0](small(source).encode()))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), STUB % (NEEDED, size))
        for name, text in (modules or {}).items():
            archive.writestr(zipfile.ZipInfo(f"{name}.py"), small(text), zipfile.ZIP_DEFLATED)
    return file.getvalue()


# ==================================================================================================
# §10 Evaluation
# ==================================================================================================
class ValSet(NamedTuple):
    """All validation ids (int64) and, parallel to them, the original bytes of each (int32)."""

    ids: np.ndarray
    bytes: np.ndarray

    def documents(self) -> list[tuple[int, int]]:
        """(begin, end) of every document; its last token is the BOS that follows."""
        begins = np.union1d(0, np.flatnonzero(self.ids == BOS))
        ends = np.append(begins[1:] + 1, len(self.ids))
        return [(int(a), int(b)) for a, b in zip(begins, ends, strict=True) if b - a > 1]


def read_pieces(cfg: Config) -> list[str]:
    """The V pieces of the tokenizer at TOKENIZER_PATH, by id; control pieces in <>."""
    from sentencepiece import SentencePieceProcessor
    sp = SentencePieceProcessor(model_file=cfg.tokenizer_path)
    return [f"<{i}>" if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
            else sp.id_to_piece(i) for i in range(cfg.vocab_size)]


def piece_bytes(ids: np.ndarray, pieces: list[str]) -> np.ndarray:
    """Original bytes of each id of a set without sidecar: 1 of a blank (U+2581), 0 right after a
    control piece. U+2581 in the text looks alike: too few bytes, which makes BPB worse."""
    require("\u2581" in pieces or "<0xE2>" not in pieces, "TOKENIZER_PATH: no piece of U+2581 "
            "alone, so a blank is 3 byte pieces, as is U+2581 in the text: make a byte sidecar")
    control, byte, blank = (np.array([bool(re.match(form, piece)) for piece in pieces])
                            for form in (r"<\d+>$", "<0x..>$", "\u2581"))
    text = np.where(byte, 1, [len(p.replace("\u2581", "_").encode()) for p in pieces]) * ~control
    return (text[ids] - (blank[ids] & np.insert(control[ids[:-1]], 0, True))).astype(np.uint16)


def load_val(cfg: Config) -> ValSet:
    """The whole validation set with its byte sidecar, checked against each other."""
    stream = load_split(cfg, "val")
    ids = stream.checked_ids(0, len(stream), cfg.vocab_size)
    sides = [p.with_name(p.name.replace("_val_", "_val_bytes_")) for p in stream.paths]
    told = cfg.caseops_enabled or not cfg.tokenizer_path or any(p.is_file() for p in sides)
    sizes = np.concatenate([*map(read_sidecar, sides, stream.shards)]) if told else piece_bytes(
        ids, read_pieces(cfg))
    require(len(ids) > cfg.eval_seq_len, f"{data_folder(cfg)}: {len(ids)} validation tokens, less "
            f"than one sequence of EVAL_SEQ_LEN={cfg.eval_seq_len} + 1; lower it or add documents")
    kept = len(ids) - (0 if cfg.eval_include_tail else (len(ids) - 1) % cfg.eval_seq_len)
    return ValSet(ids[:kept], sizes[:kept].astype(np.int32))


def read_sidecar(path: Path, shard: np.ndarray) -> np.ndarray:
    """The byte counts of a shard's tokens; UserError where they cannot be theirs."""
    require(path.is_file(), f"{path}: the byte sidecar of a shard is missing; prepare it again")
    sizes, starts = open_shard(path), np.arange(0, max(1, len(shard) - 4095), 4096)
    require(sizes.size == shard.size, f"{path}: {sizes.size} byte counts for the {shard.size} "
            "tokens of its shard; prepare both again, together")
    empty = (np.maximum.reduceat(sizes, starts) == 0) & (np.maximum.reduceat(shard, starts) != BOS)
    at = [*np.flatnonzero((sizes > 0) & (shard == BOS))[:1], *starts[empty], -1][0]
    require(at < 0, f"{path}: position {at} counts bytes for a BOS, or none for 4,096 tokens: not "
            "the sidecar of its shard; prepare both again, together")
    return sizes


class Meter:
    """The one place where losses become val_loss and val_bpb: float64 sums on the device.

    With `places`, the length of the coding order, it also keeps every loss by its place there."""

    def __init__(self, rt: Runtime, places: int = 0):
        self.rt, kind = rt, {"dtype": torch.float64, "device": rt.device}
        self.nats, self.tokens, self.bytes = torch.zeros(3, **kind).unbind()
        self.lengths = torch.zeros(32, 3, **kind)  # the sums by `file_under`
        self.kept = torch.zeros(places and places + 1, device=rt.device)  # the last one: not scored

    def add(self, losses: Tensor, sizes: Tensor, mask: Tensor, place: Tensor | None = None) -> None:
        """Losses [..., C] in nats, original bytes and a 0/1 mask of scored targets; place [...]: of
        the first target of each row in the coding order."""
        self.nats += torch.where(mask, losses.detach(), 0.0).sum(dtype=torch.float64)
        self.bytes += (sizes * mask).sum()
        self.tokens += mask.sum()
        if len(self.kept):
            at = place[..., None] + torch.arange(losses.shape[-1], device=place.device)
            self.kept[at.masked_fill(~mask, len(self.kept) - 1)] = losses.detach()

    def file_under(self, targets: int) -> None:
        """What came since the last call is of documents of at most about so many targets."""
        sums = torch.stack((self.nats, self.tokens, self.bytes))
        self.lengths[targets.bit_length()] += sums - self.lengths.sum(0)

    def result(self, everywhere: bool = True) -> "Score":
        """Over all ranks (a collective call), or of this rank so far."""
        sums = torch.stack((self.nats, self.tokens, self.bytes))
        nats, tokens, size = (self.rt.sum_(sums) if everywhere else sums).tolist()
        bits = nats / math.log(2)
        return Score(nats / max(tokens, 1), bits / max(size, 1), int(tokens), int(size))


class Score(NamedTuple):
    """loss in nats a token, bpb = (nats / ln 2) / original bytes, and what was scored."""

    loss: float
    bpb: float
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(forward: Callable, val: ValSet, cfg: Config, rt: Runtime,
             meter: Meter | None = None) -> Score:
    """Plain evaluation: every target once, in the stream's order, in rows of VAL_BATCH_TOKENS/8
    tokens; row k goes to rank k mod world. On a GPU the last row is filled up with id 0, masked."""
    length, meter = cfg.val_batch_tokens // 8, meter or Meter(rt)
    for begin in range(rt.rank * length, len(val.ids) - 1, rt.world * length):
        end = min(begin + length, len(val.ids) - 1)
        fill = (0, length - (end - begin) if rt.device.type == "cuda" else 0)
        ids, targets = (np.pad(val.ids[begin + k : end + k], fill) for k in (0, 1))
        sizes = torch.from_numpy(np.pad(val.bytes[begin + 1 : end + 1], fill)).to(rt.device)
        row = make_row(ids, targets, cfg.eval_seq_len, rt.device)
        mask = torch.arange(len(ids), device=rt.device) < end - begin
        losses = forward(row.ids, row.targets, row.segments, True)[0]
        meter.add(losses, sizes, mask, torch.tensor(begin, device=rt.device))
    return meter.result()


def log_score(rt: Runtime, label: str, score: Score, seconds: float) -> None:
    rt.record[label] = {**score._asdict(), "seconds": round(seconds, 3)}
    rt.log(f"{label} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} "
           f"eval_time:{1000 * seconds:.0f}ms")


def timed_evaluation(label: str, model: GPT, val: ValSet, cfg: Config, rt: Runtime,
                     meter: Meter | None = None) -> Score:
    started = rt.seconds()
    score = evaluate(model, val, cfg, rt, meter)
    log_score(rt, label, score, rt.seconds() - started)
    return score


# ==================================================================================================
# §11 Test-time training
# ==================================================================================================
class Document(NamedTuple):
    """Tokens [begin, end) of the validation stream: BOS, text, and the BOS that follows."""

    begin: int
    end: int
    place: int = 0  # of its first target in the coding order

    @property
    def targets(self) -> int:
        return self.end - self.begin - 1


def document_batches(documents: list[Document], size: int) -> list[list[Document]]:
    """Batches numbered by rising length, cut from the shortest up; the longest may be short."""
    ordered = sorted(documents, key=lambda doc: doc.end - doc.begin)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def phase_boundaries(cfg: Config, documents: int) -> list[int]:
    """Counts of scored documents at which a global phase runs."""
    prefix, phases = min(cfg.phased_ttt_prefix_docs, documents), cfg.phased_ttt_num_phases
    prefix *= not cfg.ttt_second_pass_frac
    return sorted({prefix * p // phases for p in range(1, phases + 1)} - {0})


CHUNK_BATCH_TOKENS = 131072  # of one forward: bounds the memory; documents do not touch each other


class ChunkBatch(NamedTuple):
    """One chunk of some documents of a batch, planned: what is read, what is scored, who trains."""

    docs: slice  # which documents of the batch
    ids: Tensor  # [b, T] left-aligned contexts that end at the chunk's end, or KVCache's [b, 1 + C]
    positions: Tensor  # [b, C] of the chunk's targets in the context, or the chunk's number
    targets: Tensor  # [b, C]
    sizes: Tensor  # [b, C] original bytes
    mask: Tensor  # [b, C] which targets exist
    trains: Tensor  # [b] 1 where the document has a further chunk
    updates: bool  # whether any has
    count: int  # targets scored
    place: Tensor  # [b] of the chunk's first target in the coding order
    kv_len: int = 0  # tokens in KVCache that are looked at


def width_unit(cfg: Config, device: torch.device) -> int:
    """What widths are rounded up to: a GPU records every shape, and gets about five."""
    chunks = cfg.ttt_eval_seq_len // cfg.ttt_chunk_size
    return max(1, chunks // 5) * cfg.ttt_chunk_size if device.type == "cuda" else 1


def running_docs(counts: np.ndarray, chunk: int, cfg: Config, device: torch.device) -> int:
    """Documents that run: those with a target in the chunk, the batch's last; on a GPU up to twice
    as many, the batch over a power of 2, for fewer shapes."""
    need = int((counts > chunk * cfg.ttt_chunk_size).sum())
    docs = len(counts) if device.type == "cuda" else need
    while docs // 2 >= need:
        docs //= 2
    return docs


def for_batch(batch: list[Document], cfg: Config) -> Config:
    """The settings of a batch: the chunk goes by its longest document. idea: #2014"""
    fits = (int(chunk) for longest, chunk in cfg.short_chunks if batch[-1].targets <= longest)
    return replace(cfg, ttt_chunk_size=next(fits, cfg.ttt_chunk_size))


def upload(x: np.ndarray, device: torch.device) -> Tensor:
    """x on the device, without waiting for what the device is doing."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def plan_chunk_batches(batch: list[Document], val: ValSet, cfg: Config, device: torch.device,
                       ring: int | None = None) -> Iterator[list[ChunkBatch]]:
    """For every chunk its chunk batches: targets [chunk*C, (chunk+1)*C) of those documents, the
    batch's last, that reach it. One with the chunk alone for an adapter that keeps `ring` tokens in
    KVCache, else each of up to TTT_EVAL_SEQ_LEN tokens a document and about CHUNK_BATCH_TOKENS."""
    C, most, unit = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len, width_unit(cfg, device)
    counts = np.array([doc.targets for doc in batch])
    chunks = -(-int(counts[-1]) // C)
    text = np.zeros((2, len(batch), chunks * C + 2), np.int64)  # a column of 0, then the documents
    for b, doc in enumerate(batch):
        for x, source in zip(text, val, strict=True):
            x[b, 1 : doc.targets + 2] = source[doc.begin : doc.end]
    (ids, sizes), numbers = upload(text, device), torch.arange(chunks, device=device)
    places = upload(np.array([doc.place for doc in batch]), device)
    left = upload(counts, device)[:, None] - torch.arange(C, device=device)  # [B, C]
    for chunk in range(chunks):
        at, chunk_batches = chunk * C, []
        size = max(1, CHUNK_BATCH_TOKENS // min(at + C, most)) if ring is None else len(batch)
        for first in range(len(batch) - running_docs(counts, chunk, cfg, device), len(batch), size):
            docs = slice(first, min(first + size, len(batch)))
            new, late, targets = slice(at + 2, at + C + 2), left[docs] - at, counts[docs] - at
            seen, where = ids[docs, at : at + C + 1], numbers[chunk]
            if ring is None:
                end = left[docs, :1].clamp(max=at + C)
                start = (end - most).clamp(min=0)
                width = -(-min(int(counts[docs].max()), at + C) // unit) * unit
                read = start + torch.arange(min(width, most), device=device)
                seen = ids[docs].gather(1, (read + 1).clamp(max=chunks * C + 1)) * (read < end)
                where = (at - start + torch.arange(C, device=device)) * (late > 0)
            chunk_batches.append(ChunkBatch(
                docs, seen, where, ids[docs, new], sizes[docs, new], late > 0,
                (late[:, 0] > C).float(), bool((targets > C).any()), int(targets.clip(0, C).sum()),
                places[docs] + at, min(ring or 0, -(-at // unit) * unit)))
        yield chunk_batches


class Scored:
    """Losses [b, C] that are in the score already. Only LoraTTT.score makes one, and
    LoraTTT.learn takes nothing else: an update cannot come before its score."""

    def __init__(self, losses: Tensor, chunk_batch: ChunkBatch):
        self.losses, self.chunk_batch = losses, chunk_batch


class LoraTTT:
    """Adapters of one batch of documents, their optimiser, and what they do: score, train.

    `adjustment` (§13) may put other losses into the score; what is learnt from are the model's."""

    ring = None  # tokens that are kept of earlier chunks

    def __init__(self, forward: Callable, cfg: Config, rt: Runtime, batch: int, init: Callable,
                 adjustment: Any = None):
        self.forward, self.cfg, self.rt, self.adjustment = forward, cfg, rt, adjustment
        self.on_hidden = adjustment.keep if adjustment else None
        self.lora = Lora(cfg, batch, rt.device, init)
        self.graph_cache = CudaGraphCache(cfg.compile and rt.device.type == "cuda")
        self.optimiser = torch.optim.AdamW(
            self.lora.parameters(), lr=cfg.ttt_lora_lr * cfg.ttt_local_lr_mult,
            betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=1e-10, weight_decay=cfg.ttt_weight_decay,
            fused=rt.device.type == "cuda", capturable=rt.device.type == "cuda")

    def reset(self, anew: bool = False) -> None:
        """For the next documents: B and the moments to zero, A as TTT_WARM_START_A says unless all
        is to be as new. In place: recorded graphs know the addresses."""
        self.lora.reset(warm=self.cfg.ttt_warm_start_a and not anew)
        for moments in self.optimiser.state.values():
            for x in moments.values():
                x.zero_()

    def losses(self, chunk_batch: ChunkBatch) -> Tensor:
        """Of every target of the chunk [b, C], by one forward over the whole contexts."""
        segments = Segments.batch(*chunk_batch.ids.shape, chunk_batch.ids.device)
        return self.forward(chunk_batch.ids, chunk_batch.targets, segments, True, self.lora,
                            chunk_batch.positions, on_hidden=self.on_hidden)

    def score(self, chunk_batch: ChunkBatch, meter: Meter) -> Scored:
        """Add a chunk's losses to the score; the graph is kept only where somebody will train."""
        self.lora.docs = chunk_batch.docs
        with torch.set_grad_enabled(chunk_batch.updates):
            losses = used = self.losses(chunk_batch)
        if self.adjustment:
            used = self.adjustment(losses.detach(), chunk_batch, self.lora)
        meter.add(used, chunk_batch.sizes, chunk_batch.mask, chunk_batch.place)
        return Scored(losses, chunk_batch)

    def learn(self, scored: Scored) -> None:
        """Gradient of the sum over documents of the mean loss of the chunk just scored."""
        (scored.losses.mean(dim=1) * scored.chunk_batch.trains).sum().backward()

    def step(self) -> None:
        """One AdamW step; adapters of documents that have ended only decay."""
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def plan(self, batch: list[Document], val: ValSet) -> Iterator[list[ChunkBatch]]:
        """For every chunk of a batch its chunk batches, usually one."""
        return plan_chunk_batches(batch, val, for_batch(batch, self.cfg), self.rt.device, self.ring)

    def run(self, chunk_batches: list[ChunkBatch], meter: Meter) -> None:
        """A chunk: every chunk batch scored, then learnt from; then one step."""
        for chunk_batch in chunk_batches:
            scored = self.score(chunk_batch, meter)
            if chunk_batch.updates:
                self.learn(scored)
        if any(chunk_batch.updates for chunk_batch in chunk_batches):
            self.step()

    def replay(self, chunk_batches: list[ChunkBatch], meter: Meter) -> None:
        """`run`, on CUDA with COMPILE=1 as a graph; nothing is compiled."""
        chunk_batch, *more = chunk_batches
        if more:
            self.run(chunk_batches, meter)
            return
        tensors = {n: x for n, x in chunk_batch._asdict().items() if isinstance(x, Tensor)}
        key = (meter, chunk_batch.docs.start, chunk_batch.ids.shape, chunk_batch.positions.shape,
               chunk_batch.updates, chunk_batch.kv_len)
        self.graph_cache(key, lambda *xs: self.run([chunk_batch._replace(
            **dict(zip(tensors, xs, strict=True)))], meter), [*tensors.values()])


class StreamingLoraTTT(LoraTTT):
    """Runs every token once (TTT_STREAM): keys and values of earlier chunks are kept, see KVCache.
    For a document of n targets the plain adapter runs about n^2 / 2C tokens, this one n."""

    def __init__(self, forward: Callable, cfg: Config, rt: Runtime, batch: int, init: Callable,
                 adjustment: Any = None):
        super().__init__(forward, cfg, rt, batch, init, adjustment)
        self.kv_cache = KVCache(cfg, batch, rt.device, rt.dtype)
        self.ring = self.kv_cache.ring  # far into a document all of it is looked at

    def losses(self, chunk_batch: ChunkBatch) -> Tensor:
        """Of the chunk alone, which sees the chunks before it."""
        self.kv_cache.seek(chunk_batch.positions, chunk_batch.docs, chunk_batch.kv_len)
        return self.forward(chunk_batch.ids, chunk_batch.targets, None, True, self.lora, None,
                            self.kv_cache, self.on_hidden)


def score_batch(adapter: LoraTTT, batch: list[Document], val: ValSet, meter: Meter,
                advance: Callable[[int], None]) -> None:
    """All chunks of a batch, each scored before its own targets are learnt from."""
    for chunk_batches in adapter.plan(batch, val):
        adapter.replay(chunk_batches, meter)
        advance(sum(chunk_batch.count for chunk_batch in chunk_batches))


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, gradients pass through the base weights and none of the weights' own is computed."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


def planned_cost(batch: list[Document], cfg: Config) -> int:
    """Tokens that a batch runs through the model, up to a factor: what its time is taken to be."""
    C = for_batch(batch, cfg).ttt_chunk_size
    most, chunks = cfg.ttt_eval_seq_len // C, [-(-doc.targets // C) for doc in batch]
    if cfg.ttt_stream:  # in step: the longest document's chunks
        return max(chunks)
    short = [min(n, most) for n in chunks]  # contexts grow by a chunk up to TTT_EVAL_SEQ_LEN
    return sum(k * (k + 1) // 2 + (n - k) * most for k, n in zip(short, chunks, strict=True))


def schedule_batches(batches: list[list[Document]], boundaries: list[int], cfg: Config,
                     world: int) -> list[list[list[int]]]:
    """Rounds of batch numbers for each rank, longest first; a global phase runs after each round.

    A free rank takes the next batch; a round ends where the batches completed hold the boundary's
    documents (those begun are finished first): #1855's queue, with planned costs for clocks."""
    left, rounds, done, limits = list(range(len(batches))), [], 0, list(boundaries)
    while left:
        assignments = [[] for _ in range(world)]
        free = [(0, rank, 0) for rank in range(world)]  # (when, who, documents completed then)
        while left:
            now, rank, count = heapq.heappop(free)
            done += count
            if count and limits and done >= limits[0]:
                break
            assignments[rank].append(left.pop())
            batch = batches[assignments[rank][-1]]
            heapq.heappush(free, (now + planned_cost(batch, cfg), rank, len(batch)))
        done += sum(count for _, _, count in free)
        limits = limits[1:]
        rounds.append(assignments)
    return rounds


class Schedule(NamedTuple):
    """Who scores what, fixed by document lengths, settings and world size before anything is
    scored. It is the coding order: round, rank, batch, document in its batch, position. A target's
    score is a function of the artifact and of the targets before it in that order."""

    batches: list[list[Document]]  # numbered by rising length
    boundaries: list[int]  # see phase_boundaries
    rounds: list[list[list[int]]]  # numbers of batches for each rank; see `schedule_batches`

    def documents(self) -> list[Document]:
        """All documents in the coding order."""
        return [doc for assignments in self.rounds for numbers in assignments for n in numbers
                for doc in self.batches[n]]

    def stream(self, ids: np.ndarray) -> np.ndarray:
        """The validation stream put into the coding order, a BOS behind it; what stands behind
        place t of it is the target at place t."""
        parts = [ids[doc.begin : doc.end - (ids[doc.end - 1] == BOS)] for doc in self.documents()]
        return np.concatenate([*parts, [BOS]])


def make_schedule(val: ValSet, cfg: Config, world: int) -> Schedule:
    """The schedule of phased test-time training in a world of that size."""
    documents, place = [Document(*d) for d in val.documents()], 0
    batches = document_batches(documents, cfg.ttt_batch_size)
    boundaries = phase_boundaries(cfg, len(documents))
    schedule = Schedule(batches, boundaries, schedule_batches(batches, boundaries, cfg, world))
    for batch in (batches[n] for every in schedule.rounds for own in every for n in own):
        for b, doc in enumerate(batch):
            batch[b] = doc._replace(place=place)
            place += doc.targets + int(val.ids[doc.end - 1] != BOS)  # nothing follows the last one
    return schedule


class ScoreProgress:
    """Rank 0's progress through its targets: a bar on a terminal, else a line every 20 s."""

    def __init__(self, total: int, meter: Meter, rt: Runtime):
        self.total, self.meter, self.rt, self.done = total, meter, rt, 0
        self.started, self.reported = time.perf_counter(), 0.0
        self.bar = progress_bar(total, rt, "score", "token")

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def __call__(self, count: int) -> None:
        """`count` more targets are scored."""
        self.done += count
        self.bar.update(count)
        if self.rt.rank == 0 and self.bar.disable and self.seconds() - self.reported > 20:
            self.reported, part = self.seconds(), self.meter.result(everywhere=False)
            self.rt.log(f"ttt_progress: {self.done}/{self.total} targets of rank 0 val_loss:"
                        f"{part.loss:.4f} val_bpb:{part.bpb:.4f} time:{self.seconds():.1f}s")


def global_rows(tokens: np.ndarray, cfg: Config) -> Iterator[tuple[float, int, int]]:
    """(learning rate, begin, sequences) of every step of a global phase over the joined tokens."""
    size, length = cfg.global_ttt_chunk_tokens, cfg.eval_seq_len
    chunks = -(-(len(tokens) - 1) // size)
    for c in range(chunks - 1):  # the last chunk is not trained on
        cosine = 0.5 * (1 + math.cos(math.pi * c / (chunks - 1)))
        lr = cfg.global_ttt_lr * max(cosine, cfg.ttt_lr_floor_frac)
        for s in range(0, size // length, cfg.global_ttt_batch_seqs):
            count = min(cfg.global_ttt_batch_seqs, size // length - s)
            yield lr, c * size + s * length, count


def global_sgd_phase(model: GPT, scored: list[Document], val: ValSet, cfg: Config,
                     rt: Runtime) -> int:
    """One pass of SGD, or of AdamW (0.9, 0.999) without decay, on ALL base weights over documents
    that are scored already; returns steps. The ranks share out the sequences of a step; its
    gradient is that of their mean."""
    tokens = np.concatenate([val.ids[doc.begin : doc.end] for doc in scored])
    params = list(model.parameters())
    optimiser = (torch.optim.AdamW(params, weight_decay=0) if cfg.global_ttt_optimizer == "adamw"
                 else torch.optim.SGD(params, lr=1.0, momentum=cfg.global_ttt_momentum))
    steps, length = 0, cfg.eval_seq_len
    for lr, begin, count in global_rows(tokens, cfg):
        mine = [begin + count * (rt.rank + k) // rt.world * length for k in (0, 1)]
        for p in params:
            p.grad = torch.zeros_like(p)
        if mine[0] < mine[1]:
            ids, targets = (tokens[mine[0] + k : mine[1] + k] for k in (0, 1))
            row = make_row(ids, targets, length, rt.device,
                           documents=cfg.global_ttt_respect_doc_boundaries)
            loss = model(row.ids, row.targets, row.segments, True).sum() / (count * length)
            loss.backward()
        for p in params:
            rt.sum_(p.grad)
        if cfg.ttt_freeze_blocks:
            extra("variants").freeze(model, cfg.ttt_freeze_blocks)
        if cfg.global_ttt_grad_clip:
            nn.utils.clip_grad_norm_(params, cfg.global_ttt_grad_clip)
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
        steps += 1
    optimiser.zero_grad()
    return steps


def score_phased(model: GPT, val: ValSet, cfg: Config, rt: Runtime,
                 init: Callable | None = None, adjustment: Any = None,
                 meter: Meter | None = None) -> Score:
    """The headline evaluation: documents longest first, adapters a document, global phases between,
    which train on what all ranks have scored by then. `adjustment`: see §13."""
    generator = rt.generator(cfg.seed + rt.rank)
    init = init or uniform_start(generator)
    if cfg.ttt_second_pass_frac:
        extra("variants").first_pass(model, val, cfg, rt)
    (batches, boundaries, rounds), adapter = make_schedule(val, cfg, rt.world), None
    meter, make = meter or Meter(rt), StreamingLoraTTT if cfg.ttt_stream else LoraTTT
    mine = (doc.targets for every in rounds for number in every[rt.rank] for doc in batches[number])
    advance = ScoreProgress(sum(mine), meter, rt)
    kept = rt.checkpointer and rt.checkpointer.scoring(model, meter, generator, advance)
    begin = kept.at if kept else (0, 0)  # (round, batch of this rank) at which a killed run goes on
    if kept and kept.warm:
        adapter = make(model, cfg, rt, cfg.ttt_batch_size, init, adjustment)
    if kept:
        kept.restore(adapter)
    del boundaries[: begin[0]]
    for r, assignments in list(enumerate(rounds))[begin[0]:]:
        for k, number in enumerate(assignments[rt.rank]):
            if (r, k) < begin:
                continue
            if kept:
                kept.save((r, k), adapter)
            batch = batches[number]
            whole = len(batch) == cfg.ttt_batch_size
            if whole and adapter:
                adapter.reset()
            used = whole and adapter or make(model, cfg, rt, len(batch), init, adjustment)
            adapter = used if whole else adapter
            with frozen(model):
                score_batch(used, batch, val, meter, advance)
            meter.file_under(batch[-1].targets)
        first = min(number for assignment in assignments for number in assignment)
        if first and boundaries:
            scored = [doc for batch in batches[first:] for doc in batch][: boundaries[0]]
            steps = global_sgd_phase(model, scored, val, cfg, rt)
            rt.log(f"ttt_phase: docs:{boundaries.pop(0)} global_steps:{steps} "
                   f"time:{advance.seconds():.1f}s")
            if adapter:
                adapter.reset(anew=True)
    advance.bar.close()
    rt.record["by_length"] = rt.sum_(meter.lengths).tolist()  # row k: under 2^k targets
    return meter.result()


def target_places(val: ValSet, cfg: Config, world: int) -> tuple[list[Document], np.ndarray]:
    """Documents in the order of the stream; the place of each of their targets, in coding order."""
    documents = [Document(*d, place=d[0]) for d in val.documents()]
    if cfg.ttt_enabled:
        documents = sorted(make_schedule(val, cfg, world).documents())
    return documents, np.concatenate([doc.place + np.arange(doc.targets) for doc in documents])


def write_scores(meter: Meter, score: Score, val: ValSet, cfg: Config, rt: Runtime,
                 artifact: str) -> None:
    """SCORES_PATH: an entry for every target in the order of the stream: nats as they entered the
    score, original bytes, number of its document, place in the coding order; and where they come
    from (a call of all ranks). `python submission.py --scores FILE` reads it."""
    documents, places = target_places(val, cfg, rt.world)
    nats, order = rt.sum_(meter.kept).cpu().numpy()[places], places.argsort().argsort()
    meta = {"artifact_sha256": artifact, "world": rt.world, "val_loss": score.loss,
            "val_bpb": score.bpb, "tokens": score.tokens, "bytes": score.bytes,
            **{name: rt.record.get(name) for name in ("program_sha256", "data", "settings")}}
    if rt.rank == 0:
        np.savez_compressed(file := io.BytesIO(), nats=nats, bytes=val.bytes[1:], order=order,
                            document=np.repeat(np.arange(len(documents), dtype=np.int32),
                                               [doc.targets for doc in documents]),
                            meta=np.array(json.dumps(meta)))
        write_atomic(cfg.scores_path, file.getbuffer())
        rt.log(f"scores: {cfg.scores_path} {len(nats)} targets")


def score_artifact(cfg: Config, rt: Runtime, model: GPT, folder: Path,
                   make_adjustment: Callable) -> None:
    """Read the artifact back and score it: plainly, while §13 builds its tables, then phased."""
    started, path = rt.seconds(), folder / ARTIFACT_FILE
    require(path.is_file(), f"{path}: no artifact; train first, or set ARTIFACT_DIR to its folder")

    def check(made: dict, pieces: dict) -> None:
        for name, value in cfg.architecture().items():
            require(made.get(name) == value, f"made with {name.upper()}={made.get(name)}, the "
                    f"settings say {value}; use the settings it was made with")
        check_pieces(pieces, model)

    blob = path.read_bytes()
    arrays, _ = decode_artifact(blob, str(path), check)
    if rt.checkpointer:
        rt.checkpointer.identity["artifact"] = _digest(blob)
    val = load_val(cfg)  # only now: see legality.py
    adjustment = make_adjustment(cfg, rt, model, val) if cfg.ttt_enabled else None
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
    model.load_state_dict(dequantise(tensors, model))
    rt.log(f"artifact: {path.name} read in {rt.seconds() - started:.1f}s")
    meter = Meter(rt, len(val.ids) if cfg.scores_path else 0)
    score = timed_evaluation("diagnostic quantized", model, val, cfg, rt,
                             None if cfg.ttt_enabled else meter)
    if cfg.ttt_enabled:
        ttt_started = rt.seconds()
        if adjustment:
            adjustment.wait()
        score = score_phased(model, val, cfg, rt, adjustment=adjustment, meter=meter)
        earlier = rt.checkpointer.earlier if rt.checkpointer else 0.0  # before the run was killed
        log_score(rt, "quantized_ttt_phased", score, earlier + rt.seconds() - ttt_started)
        rt.log(f"scored: tokens:{score.tokens} bytes:{score.bytes}")
        if cfg.illegal():
            rt.log(f"illegal: {'; '.join(cfg.illegal())}")
        started -= earlier
    rt.record["evaluation_seconds"] = round(rt.seconds() - started, 3)
    rt.log(f"total_eval_time:{rt.seconds() - started:.1f}s")
    if cfg.scores_path:
        write_scores(meter, score, val, cfg, rt, hashlib.sha256(blob).hexdigest())


# ==================================================================================================
# §12 N-gram
# ==================================================================================================
# Tables over the validation stream. Entry t speaks about ids[t + 1] and is a function of ids[: t+1]
# alone. Nothing is looked up one by one: positions are sorted by context, and what a dictionary
# would have held at t is a running sum or maximum inside the context's run.


def slice_hash(ids: np.ndarray, first: np.ndarray, odd: int) -> np.ndarray:
    """uint64 [n]: hash of ids[first[t]] .. ids[t] for every t, a polynomial in `odd`."""
    powers = np.full((2, len(ids)), 1, np.uint64)  # of odd, and of its inverse modulo 2^64
    powers[:, 1:] = np.array([[odd], [pow(odd, -1, 2**64)]], np.uint64)
    np.multiply.accumulate(powers, axis=1, out=powers)
    sums = np.zeros(len(ids) + 1, np.uint64)
    np.cumsum((ids + 1).astype(np.uint64) * powers[0], out=sums[1:])
    return (sums[1:] - sums[first]) * powers[1][first] * np.uint64(0x9E3779B97F4A7C15)


def contexts(ids: np.ndarray, first: np.ndarray, ends: np.ndarray,
             odd: int = 0xD6E8FEB86659FD93) -> tuple[np.ndarray, np.ndarray]:
    """Which slices ids[first[t]] .. ids[t], t in `ends` (ascending), occur there more than once.

    -> (those ends, run number), by run, in a run by position. Equal slices share a run and no
    others do: hashes only sort, and a collision (none is likely) starts over with another base."""
    h, bits = slice_hash(ids, first, odd), np.uint64(len(ids).bit_length())
    key = np.sort(h[ends] >> bits << bits | ends.astype(np.uint64))  # faster than an argsort
    twice = np.zeros(len(key) + 1, bool)
    twice[1:-1] = key[1:] >> bits == key[:-1] >> bits
    ends = (key[twice[1:] | twice[:-1]] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    ends = ends[np.argsort(h[ends], kind="stable")]
    alike, length = h[ends[1:]] == h[ends[:-1]], ends - first[ends] + 1
    same, back = alike & (length[1:] == length[:-1]), 0
    pairs = np.flatnonzero(same)
    while pairs.size:  # neighbours, compared token by token
        same[pairs] = ids[ends[pairs + 1] - back] == ids[ends[pairs] - back]
        back += 1
        pairs = pairs[same[pairs] & (length[pairs] > back)]
    if (same != alike).any():
        return contexts(ids, first, np.sort(ends), (5 * odd + 4) % 2**64)
    return ends, np.cumsum(np.r_[0, ~same][: len(ends)])


def run_starts(key: np.ndarray) -> np.ndarray:
    """For each index that of the first of its run of equal keys."""
    new = np.flatnonzero(np.r_[True, key[1:] != key[:-1]][: len(key)])
    return np.repeat(new, np.diff(np.r_[new, len(key)]))


def counts_before(run: np.ndarray, y: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """How often y followed in the same run before, entries with `learn` counting. run ascending."""
    pair = run * (int(y.max(initial=0)) + 1) + y
    order = np.argsort(pair, kind="stable")
    seen, found = np.cumsum(learn[order]) - learn[order], np.empty(len(run), np.int64)
    found[order] = seen - seen[run_starts(pair[order])]
    return found


def best_before(run: np.ndarray, y: np.ndarray, learn: np.ndarray) -> tuple[np.ndarray, ...]:
    """What each entry finds in its context: (most frequent y so far, of equals the first to get
    there, its count, total count). Entries without `learn` look, and leave nothing."""
    n, first = len(run), run_starts(run)
    at = np.arange(n)
    count = np.where(learn, counts_before(run, y, learn) + 1, 0)
    most = np.maximum.accumulate(run * (n + 1) + count) - run * (n + 1)
    before = np.where(at > first, most[at - 1], 0)
    rose = np.maximum.accumulate(np.where(most > before, at, 0))
    total = np.cumsum(learn) - learn
    return y[rose[at - 1]], before, total - total[first]


def tilt_hints(ids: np.ndarray, cfg: Config) -> np.ndarray:
    """int32 [n-1]: the token that mostly followed the last TOKEN_ORDER - 1 tokens so far, where its
    share of what followed them is TOKEN_THRESHOLD or more, else -1. idea: #1967"""
    ids, y = ids[:-1], ids[1:]
    at, hint = np.arange(len(ids)), np.full(len(ids), -1, np.int32)
    ends, run = contexts(ids, np.maximum(at - (cfg.token_order - 2), 0), at[cfg.token_order - 2 :])
    top, count, total = best_before(run, y[ends], np.ones(len(ends), bool))
    sure = (total > 0) & (count / np.maximum(total, 1) >= cfg.token_threshold)
    hint[ends[sure]] = top[sure]
    return hint


def tilt(losses: Tensor, p: Tensor, targets: Tensor, hint: Tensor, boost: float) -> Tensor:
    """-log p' of the targets [b, C] for p'(a) = p(a) exp(boost [a = hint]) / Z, where there is a
    hint; p [b, C] is p(hint). Z = 1 + p(hint) (exp(boost) - 1), so p' sums to one like p."""
    moved = torch.log1p(p * math.expm1(boost)) - boost * (targets == hint)
    return losses + moved * (hint >= 0)


# ==================================================================================================
# §13 Score adjustment
# ==================================================================================================
class ScoreAdjustment:
    """What makes a chunk's score of the model's probabilities besides themselves: the n-gram tilt
    (variants.py has more). Gradients never see it. Rank 0 builds the tables, beside whatever else
    runs until `wait`, and the other ranks get them from it."""

    kinds: tuple = (torch.int32,)  # types of the tables

    def __init__(self, cfg: Config, rt: Runtime, model: GPT, val: ValSet):
        self.cfg, self.rt, self.model, self.built = cfg, rt, model, None
        self.count = len(val.ids) - int(val.ids[-1] == BOS)  # entries, one of them never looked at
        if self.kinds and rt.rank == 0:
            self.built = ThreadPoolExecutor(1).submit(self.build, val)

    def tables_over(self, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """The tables; entry t speaks about ids[t + 1] and is a function of ids[: t + 1]."""
        hint = tilt_hints(ids, self.cfg)
        self.rt.log(f"ngram_tilt:hints total={len(hint)} gated={int((hint >= 0).sum())} "
                    f"token_gate={int((hint >= 0).sum())} within_gate=0 word_gate=0 agree2plus=0")
        return (hint,)

    def build(self, val: ValSet) -> list[Tensor]:
        """The tables over the stream in the coding order, on the host; logs how long they took."""
        started = time.perf_counter()
        ids = make_schedule(val, self.cfg, self.rt.world).stream(val.ids)
        tables = self.tables_over(ids)
        self.rt.log(f"ngram_{'mixer' if self.cfg.ngram_mixer else 'tilt'}:precompute_done elapsed="
                    f"{time.perf_counter() - started:.1f}s total_targets={len(val.ids) - 1}")
        return [torch.from_numpy(x).to(kind) for x, kind in zip(tables, self.kinds, strict=True)]

    def wait(self) -> None:
        """Until the tables are there; then every rank has them on its device."""
        empty = (torch.empty(self.count, dtype=kind) for kind in self.kinds)
        found = self.built.result() if self.built else empty
        self.tables = [x.to(self.rt.device) for x in found]
        for table in self.tables if self.rt.world > 1 else ():
            dist.broadcast(table, 0)

    def keep(self, h: Tensor) -> None:
        """The final state of the forward that the next call is about."""
        self.h = h

    def entries(self, chunk_batch: ChunkBatch) -> list[Tensor]:
        """What the tables say [b, C] of a chunk's targets, by their places in the coding order."""
        ahead = torch.arange(chunk_batch.targets.shape[1], device=self.rt.device)
        at = chunk_batch.place[:, None] + ahead
        return [table[at.clamp(max=self.count - 1)] for table in self.tables]

    @torch.no_grad()
    def __call__(self, losses: Tensor, chunk_batch: ChunkBatch, lora: Lora) -> Tensor:
        """The losses [b, C] that enter the score, from the model's."""
        h = self.h if self.cfg.ttt_stream else gather_positions(self.h, chunk_batch.positions)
        (hint,) = self.entries(chunk_batch)  # p by the arithmetic of the losses: p' adds up
        p = torch.exp(-self.model.losses(h, hint.clamp(min=0).long(), lora))
        return tilt(losses, p, chunk_batch.targets, hint, self.cfg.token_boost)


def make_adjustment(cfg: Config, rt: Runtime, model: GPT, val: ValSet) -> ScoreAdjustment | None:
    """The adjustment that the settings ask for, if any."""
    if cfg.slot_enabled or cfg.ngram_mixer or cfg.word_experts:
        return extra("variants").Adjustment(cfg, rt, model, val)
    return ScoreAdjustment(cfg, rt, model, val) if cfg.ngram_tilt_enabled else None


# ==================================================================================================
# §14 Training
# ==================================================================================================
def progress(step: int, seconds: float, cfg: Config) -> float:
    """f, the fraction of training done: of the wallclock less the reserve, or of the steps."""
    if cfg.max_wallclock_seconds:
        return min(1.0, seconds / (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds))
    return step / cfg.iterations


def lr_factor(f: float, cfg: Config) -> float:
    """1, then a straight fall over the last WARMDOWN_FRAC, never below MIN_LR."""
    if not cfg.warmdown_frac or f < 1 - cfg.warmdown_frac:
        return 1.0
    return max((1 - f) / cfg.warmdown_frac, cfg.min_lr)


def rates(step: int, f: float, changed_at: float, cfg: Config) -> tuple[float, float, float]:
    """Learning-rate multiplier, Muon's momentum and the average's decay of a step at fraction f; of
    a _FRAC and its count in steps the count counts where the part is 0. The multiplier rises after
    a change of length; the average's horizon is 1 / (1 - decay) steps."""
    def steps(part: float, count: float) -> float:  # f of all steps are done
        return part * step / max(f, 1e-9) if part else count

    rise = steps(cfg.seq_change_warmup_frac, cfg.seq_change_warmup_steps)
    rise = min(1.0, (step + 1 - changed_at) / max(1, rise))
    warm = steps(cfg.muon_momentum_warmup_frac, cfg.muon_momentum_warmup_steps)
    start, warm = cfg.muon_momentum_warmup_start, min(1.0, step / max(1, warm))
    horizon = max(2.0, steps(cfg.ema_horizon_frac, 0))
    decay = 1 - 1 / horizon if cfg.ema_horizon_frac else cfg.ema_decay
    return rise * lr_factor(f, cfg), start + warm * (cfg.muon_momentum - start), decay


def is_looped(f: float, cfg: Config) -> bool:
    return cfg.num_loops > 0 and f >= cfg.enable_looping_at


def stage_length(f: float, cfg: Config) -> int:
    """Longest attention segment at fraction f: TRAIN_SEQ_SCHEDULE's first stage not ended by f."""
    stages = cfg.pairs("train_seq_schedule", "@")
    return next((length for length, end in stages if f <= end), cfg.train_seq_len)


def train_shapes(cfg: Config) -> list[tuple[int, bool]]:
    """(longest segment, looped) of every stretch of training, in order."""
    ends = [end for _, end in cfg.pairs("train_seq_schedule", "@")]
    cuts = sorted({0.0, 1.0, *ends, cfg.enable_looping_at if cfg.num_loops else 0.0})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(cuts)]
    return list(dict.fromkeys((stage_length(f, cfg), is_looped(f, cfg)) for f in middles))


def row_gradients(forward: Callable, row: PackedBatch, looped: bool,
                  optimisers: Optimisers) -> list[Tensor]:
    """[mean loss, gradient of every parameter of the optimisers]; the next call overwrites them."""
    longest = row.segments.max_len

    def work(ids: Tensor, targets: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        loss = forward(ids, targets, Segments(cu_seqlens, longest), looped).mean()
        return [loss.detach(), *torch.autograd.grad(loss, optimisers.params)]

    key = "row", looped, longest, row.ids.shape, row.segments.cu_seqlens.shape
    return optimisers.graph_cache(key, work, [row.ids, row.targets, row.segments.cu_seqlens])


MICRO_BATCH = 98304  # tokens of a forward on a GPU; on a CPU a row: in any world sums round alike


def batched(rows: list[PackedBatch], most: int) -> list[PackedBatch]:
    """Rows of equal length side by side, a power of 2 of them, at most `most` tokens together."""
    length, count = rows[0].ids.shape[1], 1
    while 2 * count * length <= most and len(rows) % (2 * count) == 0:
        count *= 2
    found = []
    for group in zip(*[iter(rows)] * count, strict=True):
        cu_seqlens = torch.cat([r.segments.cu_seqlens + i * length for i, r in enumerate(group)])
        if cu_seqlens.is_cuda:
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one graph for any number of segments
        ids, targets = (torch.cat(x) for x in zip(*(row[:2] for row in group), strict=True))
        segments = Segments(cu_seqlens, max(r.segments.max_len for r in group))
        found.append(PackedBatch(ids, targets, segments))
    return found


def run_step(forward: Callable, rows: list[PackedBatch], looped: bool, optimisers: Optimisers,
             lr: float, momentum: float) -> Tensor:
    """Forward and backward of this rank's rows, then one update. Returns, on the device, [mean loss
    of this rank, gradient norm over all ranks]."""
    rows = batched(rows, MICRO_BATCH if rows[0].ids.is_cuda else 0)
    total, stack, params = torch.zeros((), device=rows[0].ids.device), [], optimisers.params
    for k, row in enumerate(rows):
        loss, *part = row_gradients(forward, row, looped, optimisers)
        total += loss
        if k % 2 == 0 and k + 1 < len(rows):  # the next row would overwrite it
            part = torch._foreach_mul(part, 1.0)
        while k & 1:  # a binary tree: the same order of addition in any world size
            part, k = torch._foreach_add(stack.pop(), part), k >> 1
        stack.append(part)
    for p, grad in zip(params, torch._foreach_div(stack[0], len(rows)), strict=True):
        p.grad = grad
    total /= len(rows)
    return torch.stack((total, optimisers.step(lr, momentum)))


class SyntheticRows:
    """A row of random ids for every step."""

    def __init__(self, cfg: Config, rt: Runtime):
        self.cfg, self.rt, self.rng = cfg, rt, np.random.default_rng(cfg.seed)

    def step(self, _: int, longest: int = 0) -> list[PackedBatch]:
        """One row [1/8 of a step's tokens] on the device, cut into at most `longest` tokens."""
        ids = self.rng.integers(BOS, self.cfg.vocab_size, self.cfg.train_batch_tokens // 8 + 1)
        ids[self.rng.random(len(ids)) < 1 / 1000] = BOS
        return [make_row(ids[:-1], ids[1:], longest or self.cfg.train_seq_len, self.rt.device)]


def reserve(model: GPT, cfg: Config, rt: Runtime) -> Config:
    """cfg with the seconds that calibration will take, measured on synthetic ids, in
    GPTQ_RESERVE_SECONDS where that is below 0; 10% and half a second more than measured."""
    if not cfg.max_wallclock_seconds or cfg.gptq_reserve_seconds >= 0 or cfg.prequant_only:
        return replace(cfg, gptq_reserve_seconds=max(0.0, cfg.gptq_reserve_seconds))
    rows, clock = SyntheticRows(cfg, rt), []
    for _ in range(2):  # the first one compiles
        clock = [rt.seconds()]
        hessians = calibrate(model, rows, 0, rt, batches=1)
        clock.append(rt.seconds())
        if cfg.quantiser == "tcq":
            sensitivities(model, rows, 0, hessians, rt)
        clock.append(rt.seconds())
    seconds = cfg.gptq_calibration_batches * (clock[1] - clock[0]) + clock[2] - clock[1]
    seconds = rt.sync_clock(0.5 + 1.1 * 8 / rt.world * seconds)  # of all rows of a step
    rt.log(f"calibration: {seconds:.1f}s of training reserved")
    require(seconds <= cfg.max_wallclock_seconds / 2, f"calibration needs {seconds:.0f}s of "
            f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}; lower GPTQ_CALIBRATION_BATCHES")
    return replace(cfg, gptq_reserve_seconds=seconds)


def warm_up(model: GPT, optimisers: Optimisers, cfg: Config, rt: Runtime) -> None:
    """Run every shape of training on synthetic ids: met, recorded and replayed. Then weights and
    moments are put back, and nothing more is recorded: rows of other shapes run as they come."""
    if not cfg.warmup_steps or rt.device.type != "cuda":
        return
    started, state = rt.seconds(), {k: v.clone() for k, v in model.state_dict().items()}
    rows, ema = SyntheticRows(cfg, rt), Ema(model, 0.5)
    for longest, looped in train_shapes(cfg):
        for step in range(cfg.warmup_steps):
            run_step(model, rows.step(step, longest) * rt.accumulation, looped, optimisers, 1.0,
                     cfg.muon_momentum)
            ema.update()
    rows = SyntheticRows(replace(cfg, train_batch_tokens=cfg.val_batch_tokens), rt)
    with torch.no_grad():
        for row in rows.step(0, cfg.eval_seq_len):
            model(row.ids, row.targets, row.segments, True)
    model.load_state_dict(state)
    optimisers.reset()
    optimisers.graph_cache.sealed = cfg.warmup_steps > 1
    rt.log(f"compile warm-up: {cfg.warmup_steps} steps a shape, {rt.seconds() - started:.1f}s")


class DivergenceGuard:
    """Stops a run whose loss or gradient is not finite; keeps the last average that was good."""

    def __init__(self, ema: Ema, model: GPT, folder: Path, rt: Runtime):
        self.ema, self.model, self.path, self.rt = ema, model, folder / "last_good.pt", rt
        self.step, self.weights = 0, None

    def keep(self, step: int) -> None:
        self.step, self.weights = step, [w.clone() for w in self.ema.average]

    def check(self, loss_and_norm: Tensor | None, step: int) -> None:
        """UserError unless both are finite; the norm is of all ranks: they stop together."""
        loss, norm = (0.0, 0.0) if loss_and_norm is None else loss_and_norm.tolist()
        if math.isfinite(norm) and (math.isfinite(loss) or self.rt.world > 1):
            return
        kept = "nothing was kept (no good average yet)"
        if self.weights:
            names = [name for name, _ in self.model.named_parameters()]
            if self.rt.rank == 0:
                save_state(dict(zip(names, self.weights, strict=True)), self.path)
            kept = f"{self.path} holds the average of step {self.step}"
        self.rt.barrier()  # nobody leaves, and so ends the others, before the file is whole
        raise UserError(f"step {step}: loss {loss}, gradient norm {norm}: not finite; {kept}; "
                        "lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR, or check the data")


def train(model: GPT, rows: TrainRows, val: ValSet, cfg: Config, rt: Runtime) -> int:
    """Train until the budget or ITERATIONS is spent; leaves the EMA in the model. Returns steps."""
    optimisers, checkpointer = Optimisers(model, cfg, rt), rt.checkpointer
    warm_up(model, optimisers, cfg, rt)
    ema = Ema(model, cfg.ema_decay)
    clock = {"step": 0, "seconds": 0.0, "changed_at": -math.inf, "waited": 0.0,
             "longest": stage_length(0.0, cfg), "reserve": cfg.gptq_reserve_seconds}
    clock |= checkpointer.restore_training(model, optimisers, ema) if checkpointer else {}
    cfg = replace(cfg, gptq_reserve_seconds=clock["reserve"])
    told, cache = extra("calibrate", needed=False), optimisers.graph_cache
    before = told and told.graphs(cache)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would hold a step up
    marks, changes = run_steps(model, rows, val, cfg, rt, optimisers, ema, clock)
    gc.enable()
    rt.record["training"] = {"steps": clock["step"], "seconds": round(clock["seconds"], 3)}
    if told:
        told.report(marks, changes, clock["waited"], told.graphs(cache) - before, cache, rt)
    ema.swap_in()
    if checkpointer:
        checkpointer.mark("trained", model, clock["step"])
    return clock["step"]


def run_steps(model: GPT, rows: TrainRows, val: ValSet, cfg: Config, rt: Runtime,
              optimisers: Optimisers, ema: Ema, clock: dict[str, float]) -> tuple[list, list]:
    """The steps from clock["step"] on; leaves in the clock what was spent. Returns the seconds
    before each step and the steps that begin a stage. A step's loss is checked during the next."""
    first, rows.longest, checkpointer = clock["step"], clock["longest"], rt.checkpointer
    rows.step(first)  # off the disk before the clock starts
    batches, bar = prefetch(rows.step, first), progress_bar(cfg.iterations, rt, "train", "step")
    guard = DivergenceGuard(ema, model, Path(cfg.artifact_dir or "."), rt)
    looped, result, marks, changes = False, None, [], [first]
    rt.sum_(torch.zeros(1, device=rt.device))  # all ranks are here: none waits in the clock
    lag, resumed = 2 if rt.device.type == "cuda" else 1, rt.seconds()
    for step in itertools.count(first):
        seconds = rt.sync_clock(clock["seconds"] + time.perf_counter() - resumed)
        marks.append(seconds)
        if checkpointer and checkpointer.due(seconds):
            guard.check(result, step)
            now = clock | {"step": step, "seconds": seconds}
            checkpointer.save_training(model, optimisers, ema, now)
        f, timed = progress(step, seconds, cfg), cfg.max_wallclock_seconds
        ahead = lag * float(np.median(np.diff(marks[-6:]))) if step > first else 0.0
        last = step in (cfg.iterations, cfg.force_stop_step or None) or (  # no time for another
            timed and not cfg.force_stop_step and progress(step, seconds + ahead, cfg) >= 1)
        if last or (step and cfg.val_loss_every and step % cfg.val_loss_every == 0):
            clock["seconds"] += rt.seconds() - resumed
            score = evaluate(model, val, cfg, rt)
            rt.log(f"{step}/{cfg.iterations} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")
            resumed = rt.seconds()
        if last:
            break
        if looped != is_looped(f, cfg):
            looped = not looped
            changes.append(step)
            rt.log(f"layer_loop:{'on' if looped else 'off'} step:{step} frac:{f:.3f}")
        if rows.longest != stage_length(f, cfg):  # what is prefetched is cut for the last stage
            batches.close()
            rows.longest = clock["longest"] = stage_length(f, cfg)
            clock["changed_at"] = step
            changes.append(step)
            batches = prefetch(rows.step, step)
            rt.log(f"growth_stage:seq_len:{rows.longest} progress:{f:.3f} step:{step}")
        before, asked = result, time.perf_counter()
        batch = next(batches)
        clock["waited"] += time.perf_counter() - asked
        lr, momentum, ema.decay = rates(step, f, clock["changed_at"], cfg)
        result = run_step(model, batch, looped, optimisers, lr, momentum)
        ema.update()
        bar.update()
        guard.check(before, step)
        if (step + 1) % cfg.train_log_every == 0 or step < 5:
            loss = rt.sum_(result[:1].clone()).item() / rt.world
            guard.check(result, step + 1)
            guard.keep(step + 1)
            s = clock["seconds"] + rt.seconds() - resumed
            rt.log(f"{step + 1}/{cfg.iterations} train_loss: {loss:.4f} train_time: {s / 60:.1f}m "
                   f"tok/s: {(step + 1) * cfg.train_batch_tokens / s:.0f} seconds: {s:.1f} left: "
                   f"{s / max(progress(step + 1, s, cfg), (step + 1) / cfg.iterations) - s:.0f}s")
    batches.close()
    bar.close()
    guard.check(result, step)
    clock["step"] = step
    rt.log(f"training stopped: train_time: {1000 * clock['seconds']:.0f}ms "
           f"step: {step}/{cfg.iterations}")
    return marks, changes


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """A state dict as a torch file, written aside and renamed."""
    buffer = io.BytesIO()
    torch.save({name: t.detach().cpu() for name, t in state.items()}, buffer)
    write_atomic(path, buffer.getvalue())


def load_state(model: GPT, path: Path, log: Callable[[str], Any] = str) -> None:
    """A final_model.pt (ours or #1855's) into the model; UserError for a tensor that is missing or
    of another shape. What these settings have no use for is left out, and logged."""
    require(path.is_file(), f"{path}: no such file; train first, or correct the setting")
    try:
        state = {name: t.detach() for name, t in
                 dict(torch.load(path, map_location="cpu", weights_only=True)).items()}
    except Exception as error:  # damaged files make the reader raise nearly anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable state dict ({reason}); train again") from None
    for name, p in model.state_dict().items():
        have = list(state[name].shape) if name in state else None
        require(have == list(p.shape), f"{path}: {name}: file has {have}, the settings ask for "
                f"{list(p.shape)}; use the model's own settings")
    unused = model.load_state_dict(state, strict=False).unexpected_keys
    log(f"{path}: loaded; not used with these settings: {', '.join(sorted(unused)) or 'nothing'}")


# ==================================================================================================
# §15 Main
# ==================================================================================================
PROGRAM_DIGEST = hashlib.sha256(__program__).hexdigest()  # of what runs, as it was at the start


def log_header(cfg: Config, rt: Runtime, backend: str, preset: str, base: Config) -> None:
    """What ran: program, preset, settings (base: the preset's), versions, devices; why this
    attention backend. The whole list is for the file alone."""
    rt.log(f"program: {Path(__file__).name} sha256:{PROGRAM_DIGEST}")
    source = CODECS["lzma"][0]("".join(linecache.getlines(__file__)).encode())
    rt.log(f"source: {base64.b85encode(source).decode()}", console=False)
    rt.log(f"preset: {preset}{' (defaults = best)' * (preset == 'none')}")
    values = "".join(f"\n  {f.name}: {getattr(cfg, f.name)}" for f in fields(cfg))
    rt.log(f"Hyperparameters:{values}\nnot the default: {json.dumps(changed(cfg))}", console=False)
    rt.log(f"not the preset: {json.dumps(changed(cfg, base))}")
    name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else "CPU"
    versions = f"python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}"
    rt.log(versions)
    rt.log(f"devices: {rt.world} x {name}, {rt.dtype}; attention: {backend}")
    rt.record.update(seed=cfg.seed, preset=preset, program_sha256=PROGRAM_DIGEST,
                     settings=changed(cfg), versions=versions, hardware=f"{rt.world} x {name}",
                     budget_seconds=cfg.max_wallclock_seconds)


def make_model(cfg: Config, rt: Runtime, attention: "Attention") -> GPT:
    """The model with its start weights, the same on every rank and every kind of device."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, attention.function, rt.dtype).to(rt.device)
    rt.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    return model


def train_and_pack(cfg: Config, rt: Runtime, model: GPT, folder: Path) -> None:
    """Train (or load final_model.pt), measure, quantise, and write artifact and program."""
    rows, val = load_train(cfg, rt), load_val(cfg)
    rt.log(f"train_tokens: {len(rows.stream)} val_tokens: {len(val.ids) - 1} "
           f"val_bytes: {int(val.bytes[1:].sum())} data: {data_folder(cfg)}")
    step = 0
    if cfg.quantize_only:
        load_state(model, folder / MODEL_FILE, rt.log)
    elif rt.checkpointer and rt.checkpointer.stage == "trained":
        step = rt.checkpointer.restore_trained(model)
    else:
        if cfg.init_from:
            load_state(model, Path(cfg.init_from), rt.log)
        timed = reserve(model, cfg, rt)
        with model.compiled(cfg.compile and rt.device.type == "cuda"):
            step = train(model, rows, val, timed, rt)
        if rt.rank == 0:
            save_state(model.state_dict(), folder / MODEL_FILE)
    timed_evaluation("diagnostic pre-quantization post-ema", model, val, cfg, rt)
    if cfg.prequant_only:
        return
    started, noise = rt.seconds(), {}
    hessians = calibrate(model, rows, step, rt)
    if cfg.quantiser == "tcq":
        noise = sensitivities(model, rows, step, hessians, rt)
    took = rt.record["calibration_seconds"] = round(rt.seconds() - started, 3)
    rt.log(f"calibration: {cfg.gptq_calibration_batches} batches {took:.1f}s")
    free = cfg.max_wallclock_seconds - rt.record.get("training", {}).get("seconds", -math.inf)
    if cfg.max_wallclock_seconds and took > free:  # of the run before it was resumed, too
        rt.log(f"warning: calibration took longer than reserved: {took:.2f}s of {free:.2f}s left")
    if rt.rank == 0:
        pack(cfg, rt, model, hessians, noise, folder)
    rt.barrier()
    if rt.checkpointer:
        rt.checkpointer.mark("packed", None, step)


def pack(cfg: Config, rt: Runtime, model: GPT, hessians: dict[str, Tensor],
         noise: dict[str, Tensor], folder: Path) -> None:
    """Quantise (noise: `sensitivities`, for tcq), compress, write the two files that count."""
    started, seconds, state = time.perf_counter(), 0.0, model.state_dict()
    roles = {f"{m.name}.q": m.role for m in matrices(cfg)}
    modules = {"variants": inspect.getsource(extra("variants"))} if cfg.variants else {}
    source, preset = "".join(linecache.getlines(__file__)), rt.record.get("preset", "")
    program = pack_program(baked(source, cfg, preset), modules)

    def encode(by_trellis: dict[str, Tensor] | None = None) -> bytes:
        nonlocal seconds
        tensors = quantise(state, hessians, cfg, by_trellis, rt.log)
        arrays = {name: t.numpy() for name, t in tensors.items()}
        begun = time.perf_counter()
        blob = encode_artifact(arrays, roles, cfg.architecture(), cfg.compressor)
        seconds += time.perf_counter() - begun
        return blob

    try:
        blob = encode() if cfg.quantiser == "uniform" else fit_trellis(
            state, hessians, noise, cfg, cfg.artifact_budget_bytes - len(program), encode, rt.log)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"COMPRESSOR={cfg.compressor} failed ({error}); {MODEL_FILE} is written: "
                        "free the disk or set TMPDIR, then run with QUANTIZE_ONLY=1") from error
    write_atomic(folder / ARTIFACT_FILE, blob)
    write_atomic(folder / PROGRAM_FILE, program)
    quantised = time.perf_counter() - started - seconds
    groups, total = artifact_report(blob), len(blob) + len(program)
    rt.record.update(
        quantisation_seconds=round(quantised, 3), compression_seconds=round(seconds, 3),
        bytes={"model": len(blob), "code": len(program), "total": total,
               "groups": groups, "compressor": cfg.compressor,
               "sha256": {ARTIFACT_FILE: hashlib.sha256(blob).hexdigest(),
                          PROGRAM_FILE: hashlib.sha256(program).hexdigest()}})
    rt.log(f"quantisation {quantised:.1f}s compression {seconds:.1f}s")
    rt.log(f"artifact bytes by group: {json.dumps(groups)}")
    rt.log(f"Code size: {len(program)} bytes")
    rt.log(f"Serialized model quantized+{cfg.compressor}: {len(blob)} bytes")
    rt.log(f"Total submission size quantized+{cfg.compressor}: {total} bytes")
    if (over := total - cfg.artifact_budget_bytes) > 0:
        rt.log(f"warning: {over} bytes over ARTIFACT_BUDGET_BYTES={cfg.artifact_budget_bytes}")


def host_peak() -> int:
    """Bytes of the largest resident size so far; 0 where the system does not tell."""
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return 0


def run(environ: Mapping[str, str], age: float = 0.0, audit: bool = False) -> None:
    """A process that began `age` seconds ago: the whole program, or only an artifact's audit."""
    started, root, own = time.perf_counter() - age, Path(__file__).parent, BAKED
    cfg = Config.from_env(environ, root, check=False)
    finished = extra("finished", needed=audit) if audit or cfg.ttt_eval_only else None
    if finished:
        cfg, own = finished.configure(environ, root, Path(cfg.artifact_dir or "."))
    cfg.checked()
    if audit:
        cfg = replace(cfg, ttt_eval_only=True, prequant_only=False, legality_check=True)
    rt = start_runtime(environ)
    folder, scores = Path(cfg.artifact_dir or "."), Path(cfg.scores_path)
    require(not cfg.scores_path or scores.suffix == ".npz" and scores.parent.is_dir(),
            f"SCORES_PATH={scores}: must be a FILE.npz in a folder that exists")
    kind = "-audit" if audit else "-rescoring" * cfg.ttt_eval_only  # no litter beside the artifact
    run_id = cfg.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{kind}"
    for split in ("train", "val")[cfg.ttt_eval_only:]:
        load_split(cfg, split)  # refuses what is missing, before anything is written
    beside, identity = cfg.artifact_dir and (cfg.run_id or not kind), check_data(cfg)
    rt.open_log((folder if beside else Path("logs")) / f"{run_id}.txt")
    if not cfg.ttt_eval_only and not cfg.prequant_only:
        check_compressor(cfg.compressor)
    attention = agree_on(choose_attention(rt.device, rt.dtype, cfg.attention), rt)
    base = Config.from_env({"PRESET": environ.get("PRESET", "")}, root, own, check=False)
    named = environ.get("PRESET") or own.get("PRESET") or "none"
    log_header(cfg, rt, attention.reason, Path(named).name.removesuffix(".env"), base)
    log_slow_paths(cfg, attention, rt)
    rt.log(identity)
    rt.record["data"] = identity
    if guide := extra("guide", needed=False):
        guide.before(cfg, rt, environ)
    if rt.world > 1 and (reliability := extra("reliability", needed=False)):
        rt.heartbeat = reliability.Heartbeat(rt)
        rt.heartbeat.start()
    if cfg.checkpoint_every_seconds:
        rt.checkpointer = extra("reliability").Checkpointer(cfg, rt, folder, identity)
    with extra("legality").guard() if cfg.legality_check else contextlib.nullcontext():
        model = make_model(cfg, rt, attention)
        rt.record["start_seconds"] = round(rt.seconds() - started, 3)
        if not cfg.ttt_eval_only and not (rt.checkpointer and rt.checkpointer.stage == "packed"):
            train_and_pack(cfg, rt, model, folder)
        if not cfg.prequant_only and not audit:
            score_artifact(cfg, rt, model, folder, make_adjustment)
    peak = torch.cuda.max_memory_allocated() if rt.device.type == "cuda" else host_peak()
    rt.record["peak_memory_mib"] = peak >> 20
    rt.log(f"peak memory allocated: {peak >> 20} MiB")
    if guide:
        guide.after(cfg, rt, folder)
    checked = cfg.legality_check and not cfg.prequant_only
    illegal = extra("legality").audit(cfg, rt, folder, audit) if checked else ""
    if rt.checkpointer:
        rt.checkpointer.finish()
    if rt.heartbeat:
        rt.heartbeat.close()
    rt.log(json.dumps({"result": {**rt.record, "complete": True}}), console=False)
    require(not illegal, illegal)


def is_first_to_fail() -> bool:
    """Whether this rank should speak: once is enough, but without torchrun it may be alone."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ
    return dist.distributed_c10d._get_default_store().add("failed", 1) == 1


def main(age: float = 0.0) -> int:
    """Exit code: 0, or after one line on standard error 2 (a mistake to mend), 130 (Ctrl-C)."""
    mode, *rest = sys.argv[1:] or [""]
    try:
        guide = extra("guide", needed=bool(mode))
        if not guide or not guide.another_mode(mode, rest, os.environ):
            run(os.environ, age)
    except (UserError, ModuleNotFoundError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        text, code = f"error: {f'{error.name} {NEEDED}' if missing else error}", 2
    except KeyboardInterrupt:
        text, code = "interrupted" + "; CHECKPOINT_EVERY_SECONDS lets it go on" * (not mode), 130
    except RuntimeError:  # perhaps of a collective: then the heartbeat's message names who is gone
        if dist.is_initialized():
            time.sleep(6)
        raise
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    if is_first_to_fail():
        print(text, file=sys.stderr, flush=True)
    if dist.is_initialized() or code == 130 or __name__ == "__main__":
        os._exit(code)  # others may be inside a collective, threads at work: nothing waits for them
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(process_age()))
    except KeyboardInterrupt:  # while an error was handled, or at the very end
        print("interrupted", file=sys.stderr)
        os._exit(130)
