"""Plots of a submission's logs: `python submission.py --report report.html LOG [LOG ...]`.

One HTML file that holds everything, and the same pictures as PNG files beside it. What a log does
not say is left out, with a line that says so."""

import base64
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import submission

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ModuleNotFoundError:
    raise submission.UserError("--report needs matplotlib; source .venv/bin/activate, or pip "
                               "install -r requirements-report.txt") from None

STYLE = {"figure.figsize": (7.5, 4.2), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
         "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True}


class Log:
    """One log: its figures, its JSON line and its text."""

    def __init__(self, path: Path):
        self.figures, _ = submission.read_log(path)
        self.text = path.read_text(encoding="utf-8")
        found = re.findall(r'^\{"result": .*\}$', self.text, re.MULTILINE)
        self.told: dict[str, Any] = json.loads(found[-1])["result"] if found else {}
        self.name = f"seed {self.figures['seed']}"
        self.settings = dict(re.findall(r"^  (\w+): (.*)$", self.text, re.MULTILINE))

    def lines(self, pattern: str) -> list[tuple[float, ...]]:
        """The numbers in all lines of a form."""
        return [tuple(map(float, found.groups())) for found in
                re.finditer(pattern, self.text, re.MULTILINE)]

    def number(self, name: str, default: float = math.nan) -> float:
        """A setting's value."""
        return float(self.settings.get(name, default))


def losses(ax: Any, logs: list[Log]) -> None:
    """Training loss and, as points, plain validation loss."""
    for log in logs:
        steps = log.lines(r"^(\d+)/\d+ train_loss: (\S+) ")
        curve, = ax.plot(*zip(*steps), label=f"{log.name}, training")
        val = log.lines(r"^(\d+)/\d+ val_loss: (\S+) ")
        ax.plot(*zip(*val), "o", color=curve.get_color(), label=f"{log.name}, validation")
        for step, in log.lines(r"^layer_loop:on step:(\d+) "):
            ax.axvline(step, color=curve.get_color(), ls=":", lw=1)
    ax.set(xlabel="step (dotted: looping begins)", ylabel="loss (nats a token)",
           title="Loss of all seeds")
    ax.legend(fontsize=8, ncols=2)


def schedule(ax: Any, logs: list[Log]) -> None:
    """Learning-rate factor and longest context over the fraction of training."""
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
    """Mean BPB before quantisation, and what quantisation and test-time training change."""
    names = ("prequant_val_bpb", "quantized_val_bpb", "val_bpb")
    means = [sum(log.figures[name] for log in logs) / len(logs) for name in names]
    labels = ["before\nquantisation", "quantisation", "test-time\ntraining", "score"]
    bars = [(0, means[0], "tab:grey"), (means[0], means[1] - means[0], "tab:red"),
            (means[1], means[2] - means[1], "tab:green"), (0, means[2], "tab:blue")]
    for k, (bottom, height, colour) in enumerate(bars):
        ax.bar(k, height, bottom=bottom, color=colour, width=0.6)
        text = f"{height:.5f}" if k in (0, 3) else f"{height:+.5f}"
        ax.text(k, max(bottom, bottom + height), text, ha="center", va="bottom")
    low, high = min(means), max(means)
    room = max(high - low, 1e-4)
    ax.set(xticks=range(4), xticklabels=labels, ylabel="bits per byte (axis cut)",
           ylim=(low - room, high + room / 2), xlabel="stage",
           title=f"BPB by stage, mean of {len(logs)} run(s)")


def sizes(ax: Any, logs: list[Log]) -> None:
    """Bytes of the artifact by group, and of the program."""
    log = logs[0]
    groups = log.told.get("bytes", {}).get("groups")
    if groups is None:
        groups = json.loads(re.search(r"^artifact bytes by group: (\{.*\})$", log.text,
                                      re.MULTILINE)[1])
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
    """BPB of what is scored so far (of rank 0); documents go from long to short."""
    pattern = r"^ttt_progress: (\d+)/\d+ .*val_bpb:(\S+) time"
    for log in logs:
        points = log.lines(pattern)
        done = [*points, (log.figures["val_tokens"], log.figures["val_bpb"])]
        line, = ax.plot(*zip(*done), ".-", label=log.name)
        ax.plot(*done[-1], "o", color=line.get_color())
    ax.set(xlabel="targets scored (o: the whole set)", ylabel="bits per byte so far",
           title="BPB during test-time training")
    ax.legend(fontsize=8)


def by_length(ax: Any, logs: list[Log]) -> None:
    """BPB of documents by their length, in powers of two."""
    # Row k of the record holds batches whose longest document has 2^(k-1) to 2^k - 1 targets; a
    # batch is of documents of like length, and only a batch of one is exact.
    total = sum(tokens for _, tokens, _ in logs[0].told["by_length"])
    labels = {}
    for log in logs:
        rows = [(k, *row) for k, row in enumerate(log.told["by_length"]) if row[2]]
        ax.plot([k for k, *_ in rows], [nats / math.log(2) / size for _, nats, _, size in rows],
                "o-", label=log.name)
        labels |= {k: f"{2 ** k >> 1:,}\nto {2 ** k - 1:,}\n({tokens / total:.1%})"
                   for k, _, tokens, _ in rows}
    ax.set_xticks(list(labels), list(labels.values()), fontsize=7)
    batch = int(logs[0].number("ttt_batch_size", 1))
    ax.set(xlabel="targets of " + (f"the longest of the {batch} documents of a batch" if batch > 1
                                   else "a document") + " (share of all targets)",
           ylabel="bits per byte", title="BPB by document length, test-time trained")
    ax.legend(fontsize=8)


def times(ax: Any, logs: list[Log]) -> None:
    """Seconds of every phase, stacked for each run."""
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
    ax.axvline(submission.LIMIT_SECONDS, color="black", ls=":", lw=1) if ax.get_xlim()[1] > 500 \
        else None
    ax.set(yticks=range(len(logs)), yticklabels=[log.name for log in logs], xlabel="time (s)",
           ylabel="run", title="Time by phase")
    ax.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.16))


def memory(ax: Any, logs: list[Log]) -> None:
    """Peak memory of rank 0: of the GPU, or of the process on a CPU."""
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
        except (KeyError, TypeError, ValueError):
            return None
        finally:
            plt.close(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def write(paths: list[Path], place: Path) -> None:
    """The report of some logs at `place`, PNGs beside it; UserError as for submission.json."""
    logs = [Log(path) for path in paths]
    built = submission.build(paths, draft=True)
    parts = []
    place.parent.mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        png = picture(plot, logs)
        if png is None:
            parts.append(f"<p>{plot.__name__}: the logs do not say.</p>")
            continue
        place.with_name(f"{place.stem}_{plot.__name__}.png").write_bytes(png)
        data = base64.b64encode(png).decode()
        parts.append(f'<img alt="{plot.__name__}: {html.escape(plot.__doc__)}" '
                     f'src="data:image/png;base64,{data}">')
    rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")]
            for line in submission.table(built).splitlines() if "--:" not in line]
    cells = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
                      for row in rows)
    findings = "".join(f"<li>{html.escape(line)}</li>" for line in built["findings"])
    findings = findings or "<li>none</li>"
    run = built["seeds"][0]
    submission.write(place, f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Report</title>
<style>body {{ font: 15px sans-serif; max-width: 1000px; margin: 2em auto; }}
td {{ padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }}
img {{ max-width: 100%; margin: 8px 0 }} code {{ font-size: 12px }}</style>
<h1>Report of {len(logs)} run(s)</h1>
<p>Program <code>{run['program_sha256']}</code>; {html.escape(str(run['hardware']))};
{html.escape(str(run['versions']))}.<br>Settings that are not the default:
<code>{html.escape(json.dumps(built['settings_not_default']))}</code></p>
<table>{cells}</table>
<h2>Findings</h2><ul>{findings}</ul>
<h2>Plots</h2>
{"".join(parts)}
</html>
""")
