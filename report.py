"""Plots of a submission's logs: `python submission.py --report report.html LOG [LOG ...]`.

One HTML file that holds everything, and the same pictures as PNG files beside it. What a log does
not say is left out, with a line that says so. The docstring of a plot is the text below it.
"""

import base64
import html
import io
import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import baseline
import logchecks
import runlogs

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ModuleNotFoundError:
    raise runlogs.UserError("--report needs matplotlib; source .venv/bin/activate, or pip install "
                            "-r requirements-report.txt") from None

PRESETS = Path(__file__).resolve().parent / "presets"
STYLE = {"figure.figsize": (7.5, 4.2), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
         "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True}
MARKERS, LINES = "osD^vP*X", ("-", "--", "-.", ":")


class Log:
    """One log: its figures, its JSON line, its text, and how its lines are drawn."""

    def __init__(self, path: Path, index: int = 0):
        self.figures, _ = logchecks.read_log(path)
        read = runlogs.load(path)
        self.text, self.told = read.text, read.told
        self.name = f"seed {self.figures['seed']}"
        self.settings = {name.lower(): value for name, value in
                         runlogs.listed_settings(self.text).items()}
        self.style = {"color": f"C{index % 10}", "ls": LINES[index % len(LINES)]}
        self.marker = MARKERS[index % len(MARKERS)]

    def lines(self, pattern: str) -> list[tuple[float, ...]]:
        """The numbers in all lines of a form."""
        return [tuple(map(float, found.groups())) for found in
                re.finditer(pattern, self.text, re.MULTILINE)]

    def number(self, name: str, default: float = math.nan) -> float:
        """A setting's value."""
        return float(self.settings.get(name, default))


def losses(ax: Any, logs: list[Log]) -> None:
    """Loss of the training batches (lines) and of the whole validation set (markers). A dotted
    line marks the step from which layers are looped; seeds should lie on one another."""
    for log in logs:
        steps = log.lines(r"^(\d+)/\d+ train_loss: (\S+) ")
        ax.plot(*zip(*steps), label=f"{log.name}, training", lw=1, **log.style)
        if val := log.lines(r"^(\d+)/\d+ val_loss: (\S+) "):
            ax.plot(*zip(*val), log.marker, color=log.style["color"],
                    label=f"{log.name}, validation")
        for step, in log.lines(r"^layer_loop:on step:(\d+) "):
            ax.axvline(step, color=log.style["color"], ls=":", lw=1)
    ax.set(xlabel="step (dotted: looping begins)", ylabel="loss (nats a token)",
           title="Loss of all seeds")
    ax.legend(fontsize=8, ncols=2)


def schedule(ax: Any, logs: list[Log]) -> None:
    """What the settings prescribe over the course of training: the factor of all learning rates
    (left axis) and the longest segment of a row (right axis)."""
    log = logs[0]
    down, floor = log.number("warmdown_frac"), log.number("min_lr")
    at = [k / 400 for k in range(401)]
    rate = [1.0 if not down or f < 1 - down else max((1 - f) / down, floor) for f in at]
    ax.plot(at, rate, label="learning rate over its start", color="tab:blue")
    ax.axvline(log.number("enable_looping_at"), color="grey", ls=":", label="looping begins")
    ax.set(xlabel="fraction of training (of its time, or of its steps)", ylim=(0, 1.08),
           ylabel="factor of the learning rate", title="Learning rate and context")
    right = ax.twinx()
    right.grid(False)
    told = log.settings.get("train_seq_schedule") or f"{log.number('train_seq_len')}@1"
    lengths, ends = zip(*(map(float, part.split("@")) for part in told.split(",")), strict=True)
    right.step([0, *ends], [lengths[0], *lengths], color="tab:orange", label="longest segment")
    right.set(ylabel="longest training context (tokens)", ylim=(0, 1.2 *
                                                                log.number("train_seq_len")))
    handles = [h for axis in (ax, right) for h in axis.get_legend_handles_labels()[0]]
    ax.legend(handles, [h.get_label() for h in handles], loc="lower left", fontsize=8)


def stages(ax: Any, logs: list[Log]) -> None:
    """Mean BPB over the seeds: before quantisation, what quantisation adds and what test-time
    training takes away, and the score that remains. The axis does not begin at 0."""
    words = {"prequant_val_bpb": "before\nquantisation", "quantized_val_bpb": "quantisation",
             "val_bpb": "test-time\ntraining"}
    means = {name: sum(log.figures[name] for log in logs) / len(logs) for name in words
             if all(log.figures[name] is not None for log in logs)}
    (first, level), *rest = means.items()
    bars = [(words[first], 0.0, level, "tab:grey")]
    for name, value in rest:
        colour = "tab:red" if value > level else "tab:green"
        bars.append((words[name], level, value - level, colour))
        level = value
    bars += [("score", 0.0, level, "tab:blue")] if rest else []
    for k, (_, bottom, height, colour) in enumerate(bars):
        ax.bar(k, height, bottom=bottom, color=colour, width=0.6)
        text = f"{height:+.5f}" if bottom else f"{height:.5f}"
        ax.text(k, max(bottom, bottom + height), text, ha="center", va="bottom")
    low, high = min(means.values()), max(means.values())
    room = max(high - low, 1e-4)
    ax.set(xticks=range(len(bars)), xticklabels=[bar[0] for bar in bars], xlabel="stage",
           ylabel="bits per byte (axis cut)", ylim=(low - room, high + room / 2),
           title=f"BPB by stage, mean of {len(logs)} run(s)")


def sizes(ax: Any, logs: list[Log]) -> None:
    """Bytes of the first seed's artifact by group of tensors, and of the packed program: their sum
    is what counts against 16,000,000."""
    log = logs[0]
    groups = log.told.get("bytes", {}).get("groups")
    if groups is None:
        groups = runlogs.json_line(log.text, "artifact bytes by group")
    rest = "all tensors" if len(groups) == 2 else "other tensors"
    parts = sorted([*((rest if k == "rest" else k, v) for k, v in groups.items()),
                    ("program", log.figures["bytes_code"])], key=lambda part: part[1])
    ax.barh([name for name, _ in parts], [size / 1000 for _, size in parts])
    for k, (_, size) in enumerate(parts):
        ax.text(size / 1000, k, f" {size:,}", va="center", fontsize=8)
    ax.margins(x=0.15)
    ax.set(xlabel="size (kB, 1000 bytes)", ylabel="group",
           title=f"Artifact and program: {log.figures['bytes_total']:,} bytes ({log.name})")


def running(ax: Any, logs: list[Log]) -> None:
    """BPB of everything scored so far, as test-time training goes through the documents from long
    to short; the last marker is the score. Points are the log's progress lines, which are of rank
    0, and sums of the whole set by length of document; the line joins those that are more."""
    for log in logs:
        points = [(100 * done / total, bpb) for done, total, bpb in
                  log.lines(r"^ttt_progress: (\d+)/(\d+) .*val_bpb:(\S+) time") if total]
        sums = summed_by_length(log)
        if not points and not sums:
            raise ValueError("neither progress lines nor sums by length")
        line, rest = (points, sums) if len(points) >= len(sums) else (sums, points)
        end = (100, log.figures["val_bpb"])
        ax.plot(*zip(*[*line, end]), marker=".", label=log.name, **log.style)
        ax.plot(*end, log.marker, color=log.style["color"])
        if rest:
            ax.plot(*zip(*rest), log.marker, color=log.style["color"], mfc="none")
    ax.set(xlabel="share of the targets that are scored (%)", ylabel="bits per byte so far",
           title="BPB during test-time training")
    ax.legend(fontsize=8)


def summed_by_length(log: Log) -> list[tuple[float, float]]:
    """(% of the targets, BPB so far) after each row of `by_length`, the longest documents first."""
    rows = [row for row in reversed(log.told.get("by_length", [])) if row[2]]
    total, nats, tokens, size, points = sum(row[1] for row in rows), 0.0, 0.0, 0.0, []
    for row in rows:
        nats, tokens, size = nats + row[0], tokens + row[1], size + row[2]
        points.append((100 * tokens / total, nats / math.log(2) / size))
    return points


def by_length(ax: Any, logs: list[Log]) -> None:
    """BPB by length of document, in powers of two, after test-time training; in brackets the share
    of all targets. Long documents give the adapters more to learn from."""
    # Row k of the record holds batches whose longest document has 2^(k-1) to 2^k - 1 targets; a
    # batch is of documents of like length, and only a batch of one is exact.
    total = sum(tokens for _, tokens, _ in logs[0].told["by_length"])
    labels = {}
    for log in logs:
        rows = [(k, *row) for k, row in enumerate(log.told["by_length"]) if row[2]]
        ax.plot([k for k, *_ in rows], [nats / math.log(2) / size for _, nats, _, size in rows],
                marker=log.marker, label=log.name, **log.style)
        labels |= {k: f"{2 ** k >> 1:,}\nto {2 ** k - 1:,}\n({tokens / total:.1%})"
                   for k, _, tokens, _ in rows}
    ax.set_xticks(list(labels), list(labels.values()), fontsize=7)
    batch = int(logs[0].number("ttt_batch_size", 1))
    ax.set(xlabel="targets of " + (f"the longest of the {batch} documents of a batch" if batch > 1
                                   else "a document") + " (share of all targets)",
           ylabel="bits per byte", title="BPB by document length, test-time trained")
    ax.legend(fontsize=8)


def times(ax: Any, logs: list[Log]) -> None:
    """Seconds of every phase of each run, one after the other. Training with calibration and the
    evaluation have 600 s each in the challenge; packing is in neither clock."""
    kinds = ("start", "training", "calibration", "quantisation", "compression",
             "quantised evaluation", "test-time training")
    for k, log in enumerate(logs):
        told, left = log.told, 0.0
        seconds = (
            told.get("start_seconds"), (log.figures["train_time_ms"] or 0) / 1000,
            log.figures["calibration_s"], told.get("quantisation_seconds"),
            told.get("compression_seconds"),
            told.get("diagnostic quantized", {}).get("seconds"),
            (log.figures["eval_time_ms"] or 0) / 1000)
        for n, value in enumerate(seconds):
            ax.barh(k, value or 0, left=left, color=f"C{n}", label=kinds[n] if not k else None)
            left += value or 0
        ax.text(left, k, f" {left:.0f} s", va="center", fontsize=8)
    ax.margins(x=0.12)
    if ax.get_xlim()[1] > 500:
        ax.axvline(runlogs.LIMIT_SECONDS, color="black", ls=":", lw=1)
    ax.set(yticks=range(len(logs)), yticklabels=[log.name for log in logs], xlabel="time (s)",
           ylabel="run", title="Time by phase")
    ax.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.16))


def memory(ax: Any, logs: list[Log]) -> None:
    """Peak memory of rank 0: what PyTorch allocated on the GPU or, on a CPU, what the process
    held."""
    values = [log.told["peak_memory_mib"] for log in logs]
    ax.bar([log.name for log in logs], values, width=0.5)
    for k, value in enumerate(values):
        ax.text(k, value, f"{value:,}", ha="center", va="bottom")
    on_gpu = "CPU" not in (logs[0].figures["hardware"] or "")
    ax.set(ylabel="peak (MiB)", xlabel="run",
           title=f"Peak memory, {'GPU of rank 0' if on_gpu else 'resident'}")


PLOTS = (losses, schedule, stages, sizes, running, by_length, times, memory)


def picture(plot: Any, logs: list[Log]) -> bytes | None:
    """A PNG, or None where the logs lack what the plot needs."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots()
        try:
            plot(ax, logs)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            return None
        finally:
            plt.close(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


# ---- the page

def row(cells: list[Any], tag: str = "td") -> str:
    """A row of an HTML table; text is escaped, what is marked as HTML (a tuple) is not."""
    inner = (cell[0] if isinstance(cell, tuple) else html.escape(str(cell)) for cell in cells)
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in inner) + "</tr>"


def table(head: list[Any], rows: list[list[Any]]) -> str:
    """An HTML table."""
    return "<table>" + "\n".join([row(head, "th"), *map(row, rows)]) + "</table>"


def runs_table(built: dict[str, Any], place: Path) -> str:
    """The seeds, with a link to each log, and the mean."""
    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for run in built["seeds"]:
        link = quote(os.path.relpath(run["log"], place.parent))
        seconds = None if run["train_time_ms"] is None else run["train_time_ms"] / 1000
        rows.append([run["seed"], *(cell(run[name], ".5f") for name in logchecks.STATISTICS[:2]),
                     cell(run["val_bpb"], ".5f"), cell(run["bytes_total"], ","),
                     cell(seconds, ".1f"), cell(run["total_eval_time_s"], ".1f"),
                     (f'<a href="{html.escape(link)}">log</a>',)])
    s = built["summary"]
    if s["runs"] > 1:
        means = [cell(s.get(f"{name}_mean"), ".5f") for name in
                 ("prequant_val_bpb", "quantized_val_bpb", "val_bpb")]
        spread = cell(s.get("val_bpb_std"), ".5f")
        rows.append(["mean", *means[:2], f"{means[2]} (std {spread})", "", "", "", ""])
    return table(["seed", "BPB before quantisation", "quantised BPB", "test-time-trained BPB",
                  "bytes", "training s", "evaluation s", "log"], rows)


def expected_of(preset: str) -> str:
    """What presets/PRESET.env says after `# Expected:`, further lines of the comment included that
    begin with two blanks or more; empty where there is none."""
    if not re.fullmatch(r"[\w-]+", preset) or not (PRESETS / f"{preset}.env").is_file():
        return ""
    text = runlogs.read_text(PRESETS / f"{preset}.env")
    found = re.search(r"^# Expected: +(.*(?:\n#  +.*)*)", text, re.MULTILINE)
    return " ".join(re.sub(r"\n#", " ", found[1]).split()) if found else ""


def published_of(preset: str) -> str:
    """The BPB that a preset's comment calls published, as text; empty where it names none."""
    path = PRESETS / f"{preset}.env"
    named = re.fullmatch(r"[\w-]+", preset) and path.is_file()
    text = runlogs.read_text(path) if named else ""
    comment = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    found = re.search(r"[Pp]ublished (\d\.\d+) BPB", comment)
    return found[1] if found else ""


LABELS = {"prequant_val_bpb": "BPB before quantisation", "quantized_val_bpb": "BPB quantised",
          "val_bpb": "BPB", "train_time_ms": "training s"}
# figure: (what an Expected comment says of it, form of the measured one, scale)
EXPECTED = {
    "prequant_val_bpb": (r"([\d.]+) BPB before quantisation", "{:.5f}", 1),
    "quantized_val_bpb": (r"([\d.]+) BPB quantised", "{:.5f}", 1),
    "val_bpb": (r"([\d.]+) BPB test-time trained", "{:.5f}", 1),
    "steps": (r"([\d,]+) steps", "{:,.0f}", 1),
    "train_time_ms": (r"steps.* in ([\d.]+) s", "{:.1f}", 1e-3),
    "bytes_total": (r"([\d,]+ bytes|[\d.]+ MB)", "{:,.0f} bytes", 1),
    "total_eval_time_s": (r"evaluation ([\d.]+ to [\d.]+|[\d.]+) s", "{:.1f}", 1),
}


def expected_table(built: dict[str, Any]) -> str:
    """Figures of the preset's comment beside the measured means; empty without a preset."""
    presets = dict.fromkeys(run["preset"] for run in built["seeds"] if run.get("preset"))
    parts = []
    for preset in presets:
        text, published = expected_of(preset), published_of(preset)
        rows = []
        for name, (pattern, form, scale) in EXPECTED.items():
            values = [run[name] for run in built["seeds"] if run.get(name) is not None]
            measured = form.format(scale * sum(values) / len(values)) if values else "-"
            found = re.search(pattern, text)
            want = found[1] if found else published if name == "val_bpb" else ""
            if want:
                rows.append([LABELS.get(name, name.replace("_", " ")), want, measured])
        parts.append(f"<h2>Expected of preset {html.escape(preset)}</h2>"
                     + (table(["figure", "expected", "measured, mean"], rows) if rows else "")
                     + f"<p>presets/{html.escape(preset)}.env says: "
                     f"{html.escape(text or 'nothing')}</p>")
    return "".join(parts)


def settings_table(log: Log, built: dict[str, Any]) -> str:
    """What differs from the preset or, in a log that does not say, from the defaults."""
    preset = runlogs.json_line(log.text, "not the preset")
    known = re.search(r"^not the preset: ", log.text, re.MULTILINE)
    given = {n: v for n, v in preset.items() if n not in runlogs.FREE | runlogs.PLACES} if (
        known) else built["settings_not_default"]
    what = "preset" if known else "defaults"
    if not given:
        return f"<h2>Settings</h2><p>Those of the {what}.</p>"
    return f"<h2>Settings that differ from the {what}</h2>" + table(
        ["setting", "value"], [[name, value] for name, value in sorted(given.items())])


def comparison(built: dict[str, Any]) -> str:
    """The verdict on the baseline, empty where there is none."""
    if "comparison" not in built:
        return ""
    result = built["comparison"]
    rows = [[baseline.STAGE_WORDS[name], f"{stage['nats']:+.5f}", f"{stage['bpb']:+.5f}",
             "-" if stage["welch_p"] is None else f"{stage['welch_p']:.4g}"]
            for name, stage in result["stages"].items()]
    lines = "<br>".join(html.escape(line) for line in baseline.verdict(result).splitlines())
    return (f"<h2>Against {html.escape(', '.join(result['baseline']))}</h2>"
            + table(["stage", "gain (nats a token)", "gain (BPB)", "Welch's p"], rows)
            + f"<p>{lines}</p>")


def plots(logs: list[Log], place: Path) -> str:
    """All plots with the text below each; PNG files beside `place`."""
    parts = []
    for plot in PLOTS:
        png = picture(plot, logs)
        if png is None:
            parts.append(f"<p>{plot.__name__}: the logs do not say.</p>")
            continue
        place.with_name(f"{place.stem}_{plot.__name__}.png").write_bytes(png)
        text = html.escape(" ".join(plot.__doc__.split()))
        parts.append(f'<figure><img alt="{plot.__name__}" src="data:image/png;base64,'
                     f'{base64.b64encode(png).decode()}"><figcaption>{text}</figcaption></figure>')
    return "\n".join(parts)


def write(paths: list[Path], place: Path, built: dict[str, Any] | None = None) -> None:
    """The report of some logs at `place`, PNGs beside it; UserError as for submission.json, which
    `built` is (with its comparison), if it is made already."""
    built = built or logchecks.build(paths, draft=True)
    logs = [Log(path, index) for index, path in enumerate(paths)]
    place.parent.mkdir(parents=True, exist_ok=True)
    findings = "".join(f"<li>{html.escape(line)}</li>" for line in built["findings"])
    first = built["seeds"][0]
    told = "; ".join(html.escape(str(first[name])) for name in ("hardware", "versions"))
    preset = f"Preset <code>{html.escape(first['preset'])}</code>. " if first["preset"] else ""
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Report</title>
<style>body {{ font: 15px sans-serif; max-width: 1000px; margin: 2em auto; }}
td, th {{ padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }}
figure {{ margin: 18px 0 }} img {{ max-width: 100% }} figcaption {{ color: #444 }}
code {{ font-size: 12px }}</style>
<h1>Report of {len(logs)} run(s)</h1>
<p>{preset}Program <code>{first['program_sha256']}</code>; {told}.</p>
{runs_table(built, place)}
<h2>Findings</h2><ul>{findings or "<li>none</li>"}</ul>
{comparison(built)}{expected_table(built)}{settings_table(logs[0], built)}
<h2>Plots</h2>
{plots(logs, place)}
</html>
"""
    place.write_text(text, encoding="utf-8", errors="replace")
