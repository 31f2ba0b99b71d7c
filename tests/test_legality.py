"""The nineteen ways in which scores of this field were invalid (docs/legality.md): each is planted,
and its detector must see it; and none sees anything in what is legal.

`python -m tests.test_legality` runs these tests and writes the table of docs/legality.md."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import legality
import preset as presets
import submission as s
import train_gpt as t
import variants
from caseops import audit as data_audit
from tests.test_submission import RATIO, RECORD, claim, foreign, write_logs
from tests.tools import (
    PRESETS,
    ROOT,
    TINY,
    TINY_LISTS,
    VAL_LENGTHS,
    busy_model,
    launch,
    tiny,
    val_set,
    write_data,
    write_shard,
)


class Row(NamedTuple):
    """One line of the table: the failure, what detects it, the test that plants it."""

    number: int
    failure: str
    detector: str
    test: str


ROWS = (
    Row(1, "n-gram or byte mix that is no distribution", "`audit`: normalisation", "mix"),
    Row(2, "training and calibration over 600 s", "`submission.py`, `audit`: budget", "train_time"),
    Row(3, "no log, one seed, mixed configurations", "`submission.py`: settings of all logs",
        "mixed"),
    Row(4, "submission.json or README unlike the logs", "`submission.py --audit`", "claim"),
    Row(5, "artifact over 16,000,000 bytes", "`submission.py`: sizes and hashes of the files; "
        "`audit`: budget", "size"),
    Row(6, "wrong byte denominator", "`submission.py`: byte invariant; `audit`: ledger", "bytes"),
    Row(7, "truncated or wrong validation set", "`submission.py`: byte invariant; `audit`: ledger; "
        "the manifest's hashes", "truncated"),
    Row(8, "training on validation data before scoring it",
        "`LEGALITY_CHECK=1`: data access; `audit`: causality, ledger", "prequant"),
    Row(9, "SLOT on scored positions", "`audit`: causality", "slot"),
    Row(10, "validation documents in training shards", "`prepare_caseops_data.py --audit`", "leak"),
    Row(11, "two passes, rescoring", "`audit`: ledger", "rescore"),
    Row(12, "gates that look at the target", "`audit`: normalisation; `submission.py`: counters",
        "gate"),
    Row(13, "SmearGate across documents", "`audit`: document isolation", "smear"),
    Row(14, "evaluation over 600 s, or work outside its timer",
        "`submission.py`, `audit`: clock from the process's start", "eval_time"),
    Row(15, "warm-up on validation tokens", "`LEGALITY_CHECK=1`: data access", "warm_up"),
    Row(16, "steps forced", "`submission.py`: settings; unknown names are refused", "forced"),
    Row(17, "settings that only the environment knew",
        "`submission.py`: settings of the log against its source", "environment"),
    Row(18, "digits that do not fit each other", "`submission.py`: val_bpb/val_loss", "digits"),
    Row(19, "n-gram tables in one order, weights and adapters in another", "`audit`: one order",
        "order"),
)


def bench_of(cfg: t.Config, seed=0) -> legality.Bench:
    """A busy random model as if it came out of an artifact."""
    cfg = legality.small(cfg)
    model = busy_model(cfg, seed, attend=t.attend_sdpa)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    return legality.Bench(cfg, legality.Quiet(0, 1, torch.device("cpu")), model, weights)


def found_in(cfg: t.Config | None = None, lengths=VAL_LENGTHS) -> list[str]:
    """All findings of the audit, as text."""
    lines = []
    return [str(x) for x in legality.findings(bench_of(cfg or tiny()), val_set(lengths),
                                              lines.append)]


def refused(paths, words):
    """submission.py refuses the logs with these words, and a draft lists them."""
    with pytest.raises(s.UserError):
        s.build(paths)
    listed = s.build(paths, draft=True)["findings"]
    assert any(re.search(words, line) for line in listed), listed


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder, log) of a whole tiny run with LEGALITY_CHECK=1."""
    folder = tmp_path_factory.mktemp("real")
    out = folder / "out"
    run = launch({**TINY, "DATA_PATH": write_data(folder / "data"), "ARTIFACT_DIR": out,
                  "RUN_ID": "log", "LEGALITY_CHECK": 1}, folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return out, (out / "log.txt").read_text()


def doctored(real, tmp_path, pattern, text):
    """The log of the real run with one thing changed."""
    log, count = re.subn(pattern, text, real[1], flags=re.MULTILINE)
    assert count >= 1
    path = tmp_path / "log.txt"
    path.write_text(log)
    return path


# ---- nothing is found where nothing is wrong

LEGAL = [name for name in PRESETS if not name.endswith("_as_run")]


@pytest.mark.parametrize("preset", [*LEGAL, "stream", "mixer", "no phases", "no adapters"])
def test_nothing_is_found_in_what_is_legal(preset):
    """Every preset with its own switches at a tiny size, and modes of the evaluation."""
    changes = {"stream": dict(ttt_stream=True, ttt_eval_seq_len=24),
               "mixer": dict(ngram_mixer="exact"),
               "no phases": dict(phased_ttt_prefix_docs=0),
               "no adapters": dict(ttt_enabled=False)}.get(preset, {})
    cfg = tiny(**changes)
    if preset in LEGAL:
        asked = {name: text for name, (text, _) in presets.read(preset, ROOT).items()}
        lists = {name: value for name, value in TINY_LISTS.items() if asked.get(name)}
        cfg = t.Config.from_env({**TINY, **lists, "PRESET": preset}, ROOT)
    assert found_in(cfg) == []


def test_a_real_run_is_legal_and_its_log_is_whole(real):
    out, log = real
    result = json.loads(log.splitlines()[-1])["result"]
    assert result["legality"] == [] and result["complete"] is True
    assert log.splitlines()[0].startswith("program: ") and s.source_of(log) == (
        ROOT / "train_gpt.py").read_text()
    run, _ = s.read_log(out / "log.txt")
    assert run["findings"] == []
    assert result["bytes"]["total"] == sum(
        (out / name).stat().st_size for name in (t.ARTIFACT_FILE, t.PROGRAM_FILE))


def test_audit_alone(real, tmp_path):
    out, log = real
    settings = json.loads(log.splitlines()[-1])["result"]["settings"]
    settings.pop("LEGALITY_CHECK")
    program = tmp_path / "audit.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt as t\n"
                       "sys.argv = ['train_gpt.py', 'audit']; sys.exit(t.main())\n")
    run = launch({**settings, "RUN_ID": "audit"}, tmp_path, program)
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"^legality: [\w ]+ \((?:plain|ttt)\): holds", run.stdout, re.M)) == 12
    (out / t.PROGRAM_FILE).rename(out / "elsewhere")
    run = launch({**settings, "RUN_ID": "audit2"}, tmp_path, program)
    (out / "elsewhere").rename(out / t.PROGRAM_FILE)
    assert run.returncode == 2 and "final_program.py is missing" in run.stderr
    assert run.stderr.count("\n") == 1


# ---- the rows

def patch_loss(monkeypatch, change):
    """Losses become change(losses, targets)."""
    original = t.GPT.forward

    def forward(self, ids, targets, *args, **kwargs):
        return change(original(self, ids, targets, *args, **kwargs), targets)
    monkeypatch.setattr(t.GPT, "forward", forward)


def test_row_01_mix(monkeypatch):
    """Half of the weight goes to a cache that is asked for the target alone."""
    def mixed(losses, targets):
        count = 0.1 + 0.8 * (targets % 3 == 0)
        return -torch.log(0.5 * torch.exp(-losses) + 0.5 * count)
    patch_loss(monkeypatch, mixed)
    assert any(x.startswith("normalisation (ttt)") for x in found_in())


HASHED = dict(ngram_mixer="hashed", allow_illegal=True)
STREAM = dict(ttt_stream=True, ttt_eval_seq_len=24)


def unlike_one(cfg: t.Config) -> list[str]:
    """What the check of normalisation says of test-time training: sums that are not 1."""
    bench = bench_of(cfg)
    found = legality.check_normalisation(
        bench, "ttt", legality.sample_of(val_set(VAL_LENGTHS), bench.cfg))
    return [str(x) for x in found if "add up to" in str(x)]


@pytest.mark.parametrize("mode", [{}, STREAM])
def test_row_01_keyless_buckets_are_no_distribution(mode):
    """Seen only in tables that are full: after a history, in as many buckets as fit it."""
    assert len(unlike_one(tiny(**HASHED, **mode))) == 2


@pytest.mark.parametrize("rule", [dict(ngram_mixer="exact"), dict(ngram_tilt_enabled=True,
                                                                  within_boost=0, word_boost=0)])
def test_exact_rules_are_a_distribution_when_streamed(rule):
    bench = bench_of(tiny(**rule, **STREAM))
    sample = legality.sample_of(val_set(VAL_LENGTHS), bench.cfg)
    assert list(legality.check_normalisation(bench, "ttt", sample)) == []


def test_row_01_best_order_of_each_token(monkeypatch):
    """The exact mixer, but every token takes the order that likes it best."""
    exact = variants.exact_mixer
    monkeypatch.setattr(variants, "exact_mixer", lambda ids, cfg: np.maximum(
        exact(ids, cfg), exact(ids, dataclasses.replace(cfg, ngram_order=2))))
    assert unlike_one(tiny(ngram_mixer="exact"))


@pytest.mark.parametrize("mode", [{}, STREAM])
def test_row_01_tilt_without_its_divisor(monkeypatch, mode):
    """Seen only where a hint is given: in text that n-grams know."""
    monkeypatch.setattr(t, "tilt", lambda losses, p, targets, hint, boost: (
        losses - boost * (targets == hint)))
    found = unlike_one(tiny(ngram_tilt_enabled=True, within_boost=0, word_boost=0, **mode))
    assert len(found) == 1 and "document 10 of the sample" in found[0]


def test_row_01_a_score_that_knows_it_is_asked(monkeypatch):
    """Normalised where all tokens are asked at once, and not in a run."""
    patch_loss(monkeypatch, lambda losses, targets: losses * (1 if len(losses) > 8 else 0.99))
    assert any("in a run and" in x for x in found_in())


class Half(legality.Quiet):
    """A runtime in bfloat16 on a CPU."""

    dtype = torch.bfloat16


@pytest.mark.parametrize("path", ["plain", "ttt"])
@pytest.mark.parametrize("excess, words", [(0, ""), (1e-4, r"add up to 1\.0001"),
                                           (0.5, r"scores .*, the logits say")])
def test_one_tolerance_whatever_the_number_type(monkeypatch, path, excess, words):
    """Sums are taken in float32; losses in bfloat16 are those of the logits, as far as it goes."""
    bench = bench_of(tiny())
    half = dataclasses.replace(bench, rt=Half(0, 1, bench.rt.device), model=busy_model(
        bench.cfg, dtype=torch.bfloat16, attend=t.attend_sdpa))
    half.model.float()
    ask, types = dict(plain="asked_plainly", ttt="asked_in_ttt")[path], []
    original = getattr(legality, ask)
    monkeypatch.setattr(legality, ask, lambda b, v: (
        types.append((b.rt.dtype, b.model.dtype)), original(b, v))[1])
    patch_loss(monkeypatch, lambda losses, targets: losses - excess)
    found = [str(x) for x in legality.check_normalisation(
        half, path, legality.sample_of(val_set(VAL_LENGTHS), bench.cfg))]
    assert not found if not excess else any(re.search(words, x) for x in found), found
    assert types == [(torch.float32, torch.float32)]


def test_row_02_train_time(real, tmp_path):
    path = doctored(real, tmp_path, r'"training": \{"steps": 6, "seconds": [\d.]+',
                    '"training": {"steps": 6, "seconds": 599.5')
    path.write_text(re.sub(r'"calibration_seconds": [\d.]+', '"calibration_seconds": 4.9',
                           path.read_text()))
    refused([path], "training 599.5 s and calibration 4.9 s are over 600 s")
    record = {"training": {"seconds": 599.5}, "calibration_seconds": 4.9}
    assert "GPTQ_RESERVE_SECONDS" in str(next(legality.check_budgets(record, real[0])))


def test_row_03_mixed(tmp_path):
    one = write_logs(tmp_path, (1, 1.06))
    (tmp_path / "b").mkdir()
    other = write_logs(tmp_path / "b", (2, 1.06), lr="0.04")
    with pytest.raises(s.UserError, match="other MATRIX_LR than"):
        s.build(one + other)
    assert s.build(one)["summary"]["note"] == "1 seed(s); a record needs 3"
    with pytest.raises(s.UserError, match="no such log"):
        s.build([tmp_path / "none.txt"])
    mixed = foreign(tmp_path, dict(list(RECORD.items())[:1])) + foreign(
        tmp_path / "b", dict(list(RECORD.items())[1:]), rank=96)
    with pytest.raises(s.UserError, match="other TTT_LORA_RANK than"):
        s.build(mixed, draft=True)


def test_row_04_claim(tmp_path):
    logs = foreign(tmp_path, RECORD, hessians="0.3")
    assert s.audit(claim(tmp_path, RECORD), logs) == []
    found = s.audit(claim(tmp_path, RECORD, val_bpb=1.0435), logs)
    assert found == ["val_bpb 1.04350 is not in the logs: their mean is 1.06108"]


def test_row_05_size(real, tmp_path):
    (path,) = write_logs(tmp_path, (1, 1.06))
    path.write_text(path.read_text().replace("15870000", "15999793").replace("15897000",
                                                                            "16026793"))
    refused([path], "16,026,793 bytes are over 16,000,000")
    log = tmp_path / "log.txt"
    log.write_text(real[1])
    (tmp_path / t.ARTIFACT_FILE).write_bytes(b"another file")
    refused([log], "not the file that this log was written with")
    assert "on the disk" in str(next(legality.check_budgets({"bytes": {"total": 1}}, real[0])))


def test_findings_reach_the_last_line(program, monkeypatch):
    """A violation ends the run with exit code 2, after the JSON line that submission.py reads."""
    monkeypatch.setattr(legality, "LIMIT_BYTES", 1000)
    code, out, err = program(LEGALITY_CHECK=1, ITERATIONS=1, TTT_ENABLED=0)
    assert code == 2 and err.startswith("error: illegal: budget: ") and err.count("\n") == 1
    with pytest.raises(s.UserError, match="more; --draft lists all"):
        s.build([program.out / "log.txt"])
    run, _ = s.read_log(program.out / "log.txt")
    assert any(line.startswith("legality: budget: ") for line in run["findings"])


def test_row_06_bytes(monkeypatch, tmp_path):
    """A leading space counted twice: BPB falls by 17 %, targets and loss stay."""
    (path,) = write_logs(tmp_path, (1, 1.06))
    text = path.read_text()
    for bpb in ("1.0640", "1.0725", "1.06"):
        text = re.sub(rf"val_bpb:{bpb} ", f"val_bpb:{float(bpb) / 1.17:.8f} ", text)
    path.write_text(text.replace("devices:", "val_tokens: 47853343\ndevices:"))
    refused([path], "imply 176.76M bytes; the validation set has 151.07M")
    add = t.Meter.add
    monkeypatch.setattr(t.Meter, "add", lambda self, losses, sizes, *rest: add(
        self, losses, sizes + (sizes > 2), *rest))
    found = legality.check_ledger(bench_of(tiny()), "plain", val_set(VAL_LENGTHS))
    assert any("bytes counted, the data has" in str(x) for x in found)


def test_row_07_truncated(monkeypatch, tmp_path):
    """10,000 documents; and an evaluation that leaves the tail out."""
    (path,) = write_logs(tmp_path, (1, 1.06))
    path.write_text(path.read_text().replace("devices:", "val_tokens: 9662464\ndevices:"))
    refused([path], r"9,662,464 targets imply 30\.50M bytes")
    evaluate = t.evaluate
    monkeypatch.setattr(t, "evaluate", lambda forward, val, *rest: evaluate(
        forward, val._replace(ids=val.ids[:len(val.ids) // 2]), *rest))
    assert any("is not scored" in x for x in found_in(tiny(ttt_enabled=False)))


def test_row_08_prequant(program, monkeypatch):
    """Epochs on validation before quantisation; and a global phase on documents to come."""
    train = t.train

    def cheat(model, rows, val, cfg, rt):
        steps = train(model, rows, val, cfg, rt)
        row = t.make_row(val.ids[:64], val.ids[1:65], 32, rt.device)
        model(row.ids, row.targets, row.segments, True).mean().backward()
        return steps
    with monkeypatch.context() as patch:
        patch.setattr(t, "train", cheat)
        code, _, err = program(LEGALITY_CHECK=1, ITERATIONS=1)
        assert code == 2 and err.count("\n") == 1
        assert "data access: validation ids [slice(None, 64, None)] read" in err
    phase = t.global_sgd_phase

    def early(model, scored, val, *rest):
        every = [t.Document(*d) for d in val.documents()]
        return phase(model, [d for d in every if d not in scored] + scored, val, *rest)
    monkeypatch.setattr(t, "global_sgd_phase", early)
    assert any(x.startswith("causality (ttt)") for x in found_in())


def test_row_08_order_of_processing_with_rules(monkeypatch):
    """Learnt from before all else: the document that comes first in the stream and is scored last.
    To a table of n-grams it is earlier; to the weights it is not."""
    score = t.score_phased

    def early(model, val, cfg, rt, **adjustment):
        first = t.Document(*val.documents()[0])
        t.global_sgd_phase(model, [first] * 20, val, cfg, rt)
        return score(model, val, cfg, rt, **adjustment)
    monkeypatch.setattr(t, "score_phased", early)
    bench, lines = bench_of(tiny(ngram_mixer="exact")), []
    found = legality.findings(bench, val_set([12, 6, 30, 28, 25, 20, 30]), lines.append)
    assert any(x.check == "causality (ttt)" and "the last document in processing order" in str(x)
               for x in found)
    assert "n-gram tables may remember documents" in lines[0]


def fit_before_score(monkeypatch, when=lambda adapter, chunk_batch: True):
    """Plant a step on a chunk's own loss before the chunk is scored."""
    score = t.LoraTTT.score

    def fitted(self, chunk_batch, meter):
        if when(self, chunk_batch):
            self.lora.docs = chunk_batch.docs
            (self.losses(chunk_batch) * chunk_batch.mask).sum().backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
        return score(self, chunk_batch, meter)
    monkeypatch.setattr(t.LoraTTT, "score", fitted)


def test_row_09_slot(monkeypatch):
    """A chunk's own loss is stepped on before the chunk is scored."""
    fit_before_score(monkeypatch)
    assert any(x.startswith("causality (ttt)") for x in found_in())


def test_row_10_leak(tmp_path):
    clean, leaky = (write_data(tmp_path / name, vocab=4096) for name in ("clean", "leaky"))
    val = np.array(t.open_shard(leaky / "fineweb_val_000000.bin"))
    train = np.array(t.open_shard(leaky / "fineweb_train_000001.bin"))
    write_shard(leaky / "fineweb_train_000001.bin", np.concatenate((train, val)))
    verdicts = {}
    for folder in (clean, leaky):
        lines = []
        data_audit.audit(folder, out=lines.append)
        verdicts[folder.name] = [line for line in lines if line.startswith("LEAK")]
    assert not verdicts["clean"] and verdicts["leaky"]


def test_row_11_rescore(monkeypatch):
    """The second pass counts, after the first has adapted to everything."""
    score = t.score_phased

    def twice(*args, **adjustment):
        return min(score(*args, **adjustment), score(*args, **adjustment))
    monkeypatch.setattr(t, "score_phased", twice)
    assert any("scored again" in x for x in found_in())


def test_row_12_gate(monkeypatch, tmp_path):
    """A tilt towards a hint, switched on by the class of the target."""
    def tilted(losses, targets):
        hint, gate = targets == 10, targets % 2 == 0
        return losses - gate * (0.9 * hint) + gate * 0.02
    patch_loss(monkeypatch, tilted)
    assert any(x.startswith("normalisation") for x in found_in())
    gates = "ngram_tilt:hints total=9 gated=9 token_gate=6 within_gate=3 word_gate=0 agree2plus=0\n"
    logs = foreign(tmp_path, RECORD, more=gates, hessians="0.3")
    refused(logs, "illegal gates: within_gate=3")


def test_row_13_smear(monkeypatch, tmp_path):
    def smear(self, x, ids):
        gate = torch.sigmoid(x[:, 1:, :self.cfg.gate_window] @ self.smear_gate.weight.mT)
        return torch.cat((x[:, :1], x[:, 1:] + self.smear_lambda * gate * x[:, :-1]), dim=1)
    monkeypatch.setattr(t.GPT, "smear", smear)
    assert any(x.startswith("document isolation (plain)") for x in found_in())
    logs = foreign(tmp_path, RECORD, hessians="0.3", rank="80\n  smear_gate_bos_fix: False")
    refused(logs, "SMEAR_GATE_BOS_FIX=0")


@pytest.mark.parametrize("rule", [dict(ngram_mixer="exact"),
                                  dict(ngram_tilt_enabled=True, within_boost=0, word_boost=0)])
def test_row_13_neighbours_of_a_batch_with_rules(monkeypatch, rule):
    """Tables of n-grams may know other documents; nothing else may."""
    owner = variants.Adjustment if "ngram_mixer" in rule else t.ScoreAdjustment
    call = owner.__call__
    monkeypatch.setattr(owner, "__call__", lambda self, losses, chunk_batch, lora: call(
        self, losses, chunk_batch, lora) + 1e-3 * losses.mean())
    found = found_in(tiny(**rule))
    assert any(x.startswith("document isolation (ttt)") for x in found), found


def test_row_14_eval_time(real, tmp_path):
    path = doctored(real, tmp_path, r'"start_seconds": [\d.]+', '"start_seconds": 605.5')
    refused([path], r"evaluation 6\d\d\.\d s from the process's start is over 600 s")
    record = {"start_seconds": 95.0, "evaluation_seconds": 515.0}
    assert "evaluation 610.0 s" in str(next(legality.check_budgets(record, real[0])))
    more = "ngram_tilt:precompute_outside_timer_done elapsed=130.1s total_targets=47851520\n"
    refused(foreign(tmp_path, RECORD, more=more, hessians="0.3"), "outside the timer")


def test_row_15_warm_up(program, monkeypatch):
    def cheat(model, optimisers, cfg, rt):
        return t.load_val(cfg).ids[:100].sum()
    monkeypatch.setattr(t, "warm_up", cheat)
    code, _, err = program(LEGALITY_CHECK=1, ITERATIONS=1)
    assert code == 2 and "read in stage 'warm-up'" in err and "synthetic ids" in err


def test_row_16_forced(program, tmp_path):
    logs = foreign(tmp_path, RECORD, hessians="0.3", rank="80\n  force_stop_step: 4920")
    refused(logs, "FORCE_STOP_STEP=4920")


def test_row_17_environment(real, tmp_path):
    path = doctored(real, tmp_path, r"^  warmdown_frac: 0\.85$", "  warmdown_frac: 0.05")
    refused([path], "warmdown_frac: 0.05 ran, the program's default is 0.85, and the log lists")
    path = doctored(real, tmp_path, r"^  matrix_lr: 0\.026$", "  matrix_lr: 0.05")
    refused([path], "matrix_lr: 0.05 ran, the program's default is 0.028, and the log lists 0.026")
    path = doctored(real, tmp_path, r"^not the default: .*$", "")
    refused([path], "matrix_lr: 0.026 ran, the program's default is 0.028, and the log lists no")


def test_row_18_digits(tmp_path):
    paths = write_logs(tmp_path, (1, 1.0600), (2, 1.0610), (3, 1.0605))
    text = paths[1].read_text()
    paths[1].write_text(text.replace(f"val_loss:{1.061 * RATIO:.8f}", "val_loss:2.3225"))
    refused(paths, "val_bpb/val_loss is 0.4568")


TILT = dict(ngram_tilt_enabled=True)


def ordered(cfg: t.Config) -> list[str]:
    """What the check of the coding order says of test-time training."""
    bench = bench_of(cfg)
    return [text for text, _ in legality.check_order(
        bench, "ttt", legality.sample_of(val_set(VAL_LENGTHS), bench.cfg))]


@pytest.mark.parametrize("rule", [TILT, {**TILT, **STREAM}, dict(ngram_mixer="exact")], ids=str)
def test_row_19_order(monkeypatch, rule):
    """Tables over the stream, as public entries build them, looked up where the stream has the
    target; batches run from the longest documents down. First the order claimed is the one of the
    batches, then the stream's."""
    assert ordered(tiny(**rule)) == []
    schedule = t.make_schedule

    def by_stream(adjustment, val):
        tables = adjustment.tables_over(np.append(val.ids, t.BOS))
        return [torch.from_numpy(x).to(kind)
                for x, kind in zip(tables, adjustment.kinds, strict=True)]

    def shuffled(adjustment, val):
        tables = by_stream(adjustment, val)
        moved = [x.clone() for x in tables]
        for doc in schedule(val, adjustment.cfg, 1).documents():
            for new, old in zip(moved, tables, strict=True):
                new[doc.place : doc.place + doc.targets] = old[doc.begin : doc.end - 1]
        return moved
    with monkeypatch.context() as patch:
        patch.setattr(t.ScoreAdjustment, "build", shuffled)
        assert any("placed before it" in text for text in ordered(tiny(**rule)))

    def claimed(val, cfg, world):
        told = schedule(val, cfg, world)
        return told._replace(batches=[[doc._replace(place=doc.begin) for doc in batch]
                                      for batch in told.batches])
    monkeypatch.setattr(t, "make_schedule", claimed)
    monkeypatch.setattr(t.ScoreAdjustment, "build", by_stream)
    assert any("placed before it" in text for text in ordered(tiny(**rule)))


@pytest.mark.parametrize("plant, words", [
    (lambda val, doc: int(val.ids[doc.begin + 1]), "changes the coding order"),
    (lambda val, doc: 0, "places in the coding order")])
def test_row_19_an_order_by_content_or_none(monkeypatch, plant, words):
    """Places that depend on what documents say; two targets at one place."""
    schedule = t.make_schedule
    monkeypatch.setattr(t, "make_schedule", lambda val, *rest: (told := schedule(
        val, *rest))._replace(batches=[[doc._replace(place=plant(val, doc) * 10**4 + (
            doc.place if words.startswith("changes") else 0)) for doc in batch]
            for batch in told.batches]))
    assert any(words in text for text in ordered(tiny()))


def test_row_19_a_look_at_the_middle_of_a_document(monkeypatch):
    """Adapters of a batch start from a token in the middle of its last document."""
    score = t.score_batch

    def peek(adapter, batch, val, *rest):
        with torch.no_grad():
            for A in adapter.lora.A.values():
                A.mul_(1 + 1e-3 * int(val.ids[(batch[-1].begin + batch[-1].end) // 2]))
        score(adapter, batch, val, *rest)
    monkeypatch.setattr(t, "score_batch", peek)
    assert any("changing all from target" in text for text in ordered(tiny()))


def test_row_19_an_order_by_what_stands_within(monkeypatch):
    """By the third token of each document, which no change of its first or last one moves."""
    schedule = t.make_schedule

    def by_content(val, *rest):
        def batches(documents, size):
            found = sorted(documents, key=lambda doc: val.ids[min(doc.begin + 2, doc.end - 1)])
            return [sorted(found[i:i + size], key=lambda doc: doc.targets)
                    for i in range(0, len(found), size)]
        monkeypatch.setattr(t, "document_batches", batches)
        return schedule(val, *rest)
    monkeypatch.setattr(t, "make_schedule", by_content)
    assert any("changes that order" in text for text in ordered(tiny(phased_ttt_prefix_docs=0)))


def test_row_09_only_where_documents_outgrow_the_context(monkeypatch):
    """The audit's documents do, however long the context of the settings is."""
    fit_before_score(monkeypatch, lambda adapter, chunk_batch: chunk_batch.updates and int(
        chunk_batch.positions.max()) >= adapter.cfg.ttt_eval_seq_len - 1)
    assert any(x.startswith("causality (ttt)") for x in found_in(tiny(ttt_eval_seq_len=4096)))


def test_the_table_names_these_tests():
    """docs/legality.md is this file's table, with all results `caught`."""
    text = (ROOT / "docs" / "legality.md").read_text()
    for row in ROWS:
        assert f"test_row_{row.number:02}_{row.test}" in globals()
        assert table_line(row, "caught") in text
    assert [row.number for row in ROWS] == list(range(1, 20))


def table_line(row: Row, result: str) -> str:
    return (f"| {row.number} | {row.failure} | {row.detector} | `test_row_{row.number:02}_"
            f"{row.test}` | {result} |")


def main() -> int:
    """Run the rows' tests and write their results into docs/legality.md."""
    report = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "legality.xml")
    subprocess.run([sys.executable, "-m", "pytest", "-q", __file__, f"--junitxml={report}"],
                   cwd=ROOT, check=False)
    cases = ElementTree.parse(report).iter("testcase")
    passed = {case.get("name"): not len(case) for case in cases}
    lines = ["| # | failure | detector | test | result |", "|--:|---|---|---|---|"]
    for row in ROWS:  # all cases of a test that has several
        cases = [ok for name, ok in passed.items()
                 if name.partition("[")[0] == f"test_row_{row.number:02}_{row.test}"]
        lines.append(table_line(row, "caught" if cases and all(cases) else "NOT CAUGHT"))
    legal = [name for name in passed if name.startswith("test_nothing_is_found")]
    lines += ["", f"Legal settings in which nothing was found: {sum(passed[n] for n in legal)} of "
              f"{len(legal)}: {', '.join(sorted(n.partition('[')[2][:-1] for n in legal))}."]
    path = ROOT / "docs" / "legality.md"
    marks = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
    path.write_text(marks.sub(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
