"""report.py: one file that holds everything, a picture for every plot, units on every axis."""

import json
import math
import re

import pytest

import submission as s
from tests.test_submission import with_result, write_logs

pytest.importorskip("matplotlib")
import report  # noqa: E402

HEADER = """  warmdown_frac: 0.85
  min_lr: 0.1
  enable_looping_at: 0.35
  train_seq_len: 2048
"""
BODY = """val_tokens: 47853343
1/4931 train_loss: 9.0 train_time: 0.1m tok/s: 9
500/4931 train_loss: 3.1 train_time: 1.0m tok/s: 9
layer_loop:on step:2900 frac:0.350
4931/4931 val_loss: 2.33 val_bpb: 1.065
ttt_progress: 100/47853343 targets of rank 0 val_loss:2.3 val_bpb:1.07 time:20.0s
"""


@pytest.fixture
def logs(tmp_path):
    """Three logs in which every plot finds what it needs."""
    paths = write_logs(tmp_path, (42, 1.0611), (0, 1.0620), (1234, 1.0602))
    for path in paths:
        text = path.read_text().replace("  model_dim: 512\n", "  model_dim: 512\n" + HEADER)
        path.write_text(text.replace("training stopped", BODY + "training stopped"))
        sizes = {"model": 15870000, "code": 27000, "total": 15897000,
                 "groups": {"directory": 9000, "rest": 61000, "query": 15800000}}
        with_result(path, bytes=sizes, peak_memory_mib=41234, quantisation_seconds=9.0,
                    compression_seconds=80.0, by_length=[[0, 0, 0]] * 5 + [[900.0, 300, 600]])
    return paths


def test_every_plot_is_in_the_report(logs, tmp_path):
    place = tmp_path / "report" / "report.html"
    report.write(logs, place)
    text = place.read_text()
    assert text.count("data:image/png;base64,") == len(report.PLOTS) == 8
    assert "the logs do not say" not in text and not re.search(r'src="(?!data:)', text)
    assert len(list(place.parent.glob("report_*.png"))) == 8
    assert "<li>none</li>" in text and "<td>42</td>" in text
    captions = re.findall(r"<figcaption>(.+?)</figcaption>", text)
    assert len(captions) == 8 and all(caption.endswith(".") for caption in captions)
    links = re.findall(r'href="([^"]+)"', text)
    assert [place.parent / link for link in links] == [
        place.parent / ".." / path.name for path in logs]  # relative: the folder may move
    assert all((place.parent / link).is_file() for link in links)


def test_seeds_can_be_told_apart(logs):
    drawn = [report.Log(path, index) for index, path in enumerate(logs)]
    assert len({(log.style["color"], log.style["ls"], log.marker) for log in drawn}) == 3
    for plot in (report.losses, report.running, report.by_length):
        figure, ax = report.plt.subplots()
        plot(ax, drawn)
        looks = {(line.get_color(), line.get_linestyle()) for line in ax.get_lines()
                 if line.get_linestyle() not in ("None", ":")}
        assert len(looks) == 3, plot.__name__
        report.plt.close(figure)


def test_the_score_so_far_has_more_than_three_points(logs):
    """From progress lines or, where the log has fewer, from the sums by length of document."""
    rows = [[math.log(2) * 2.0 * size, tokens, size] for tokens, size in
            ((5, 10), (10, 20), (20, 40), (30, 60), (40, 80))]
    with_result(logs[0], by_length=rows)
    log = report.Log(logs[0])
    points = report.summed_by_length(log)
    assert [x for x, _ in points] == pytest.approx([100 * n / 105 for n in (40, 70, 90, 100, 105)])
    assert [y for _, y in points] == pytest.approx([2.0] * 5)
    figure, ax = report.plt.subplots()
    report.running(ax, [log])
    assert len(ax.get_lines()[0].get_xdata()) == 6 and len(ax.get_lines()[2].get_xdata()) == 1
    report.plt.close(figure)
    more = "".join(f"ttt_progress: {k}00/47853343 targets of rank 0 val_loss:2.3 val_bpb:1.07 "
                   f"time:{k}.0s\n" for k in range(2, 12))
    logs[0].write_text(more + logs[0].read_text())
    figure, ax = report.plt.subplots()
    report.running(ax, [report.Log(logs[0])])
    assert len(ax.get_lines()[0].get_xdata()) == 12
    report.plt.close(figure)


def test_what_differs_from_the_preset_is_a_table(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PLOTS", ())
    place = tmp_path / "report.html"
    report.write(logs, place)
    text = place.read_text()
    assert "Settings that differ from the defaults" in text and "Preset <code>" not in text
    assert "<tr><td>MATRIX_LR</td><td>0.03</td></tr>" in text
    for path in logs:
        path.write_text('preset: pr1855\nnot the preset: {"TTT_LORA_RANK": "96", "RUN_ID": "x"}\n'
                        + path.read_text())
    report.write(logs, place)
    text = place.read_text()
    assert "Settings that differ from the preset" in text and "Preset <code>pr1855</code>" in text
    assert "<tr><td>TTT_LORA_RANK</td><td>96</td></tr>" in text and "<td>RUN_ID" not in text
    assert "<tr><td>BPB</td><td>1.06108</td><td>1.06110</td></tr>" in text
    assert "<tr><td>steps</td><td>4,931</td><td>4,931</td></tr>" in text
    assert "<td>599.5</td><td>590.0</td>" in text and "<td>15.90 MB</td>" in text
    for path in logs:
        path.write_text(re.sub("not the preset: .*", "not the preset: {}", path.read_text()))
    report.write(logs, place)
    assert "<p>Those of the preset.</p>" in place.read_text()


@pytest.mark.parametrize("preset", ["best", "cpu_demo", "pr1430_causal", "pr1855", "pr2140"])
def test_presets_say_what_they_expect(preset):
    text = report.expected_of(preset)
    assert text.endswith(".") and "\n" not in text and "Differs:" not in text and "# " not in text
    told = (report.PRESETS / f"{preset}.env").read_text()
    assert bool(report.published_of(preset)) == bool(re.search(r"[Pp]ublished \d", told))


def test_expected_stands_beside_measured_for_every_stage(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PLOTS", ())
    for path in logs:
        path.write_text("preset: cpu_demo\n" + path.read_text())
    report.write(logs, tmp_path / "r.html")
    text, told = (tmp_path / "r.html").read_text(), report.expected_of("cpu_demo")
    for name, label in report.LABELS.items():
        if name.endswith("bpb"):
            want = re.search(report.EXPECTED[name][0], told)[1]
            mean = sum(report.Log(path).figures[name] for path in logs) / len(logs)
            assert f"<tr><td>{label}</td><td>{want}</td><td>{mean:.5f}</td></tr>" in text


@pytest.mark.parametrize("preset", ["", "none", "../presets/pr1855", "a b"])
def test_a_preset_that_is_not_there_expects_nothing(preset):
    assert report.expected_of(preset) == report.published_of(preset) == ""


def test_the_baseline_is_shown(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PLOTS", ())
    (tmp_path / "b").mkdir()
    theirs = write_logs(tmp_path / "b", (42, 1.0700), (0, 1.0690), (1234, 1.0710), lr="0.02")
    monkeypatch.setattr(s.sys, "argv", ["submission.py", "--out", str(tmp_path / "o.json"),
                                        "--report", str(tmp_path / "r.html"), *map(str, logs),
                                        "--baseline", *map(str, theirs)])
    assert s.main() == 0
    text = (tmp_path / "r.html").read_text()
    assert f"<h2>Against {theirs[0]}, " in text and "gain over the baseline: +0.01" in text
    assert "<tr><td>test-time trained</td><td>+0.0" in text


def test_a_run_that_ended_early_has_its_stages(logs):
    for path in logs:
        text = path.read_text()
        path.write_text(text[:text.index("Code size")])
    figure, ax = report.plt.subplots()
    report.stages(ax, [report.Log(path) for path in logs])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["before\nquantisation"]
    report.plt.close(figure)


def test_text_of_a_log_is_no_html(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PLOTS", (report.memory,))
    for path in logs:
        text = path.read_text().replace("NVIDIA H100", "<script>x</script>")
        path.write_text(text.replace('"MATRIX_LR": "0.03"', '"MATRIX_LR": "<b>&"')
                        .replace("preset", "x"))
    report.write(logs, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script>" not in text and "<b>" not in text and "&lt;b&gt;&amp;" in text


def test_axes_have_units(logs):
    for plot in report.PLOTS:
        with report.plt.rc_context(report.STYLE):
            figure, ax = report.plt.subplots()
            plot(ax, [report.Log(path) for path in logs])
            assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title(), plot.__name__
            report.plt.close(figure)


@pytest.mark.parametrize("told, want", [
    ("", [(0, 2048), (1, 2048)]), ("512@0.1,2048@1", [(0, 512), (0.1, 512), (1, 2048)])])
def test_the_context_follows_its_schedule(logs, told, want):
    logs[0].write_text(logs[0].read_text().replace(
        "  train_seq_len: 2048\n", f"  train_seq_len: 2048\n  train_seq_schedule: {told}\n"))
    figure, ax = report.plt.subplots()
    report.schedule(ax, [report.Log(logs[0])])
    (line,) = figure.axes[1].get_lines()
    assert list(zip(*line.get_data(), strict=True)) == want
    report.plt.close(figure)


@pytest.mark.parametrize("batch, words", [(1, "a document"), (64, "of the 64 documents of")])
def test_lengths_are_those_of_the_record(logs, batch, words):
    """Each log's own rows, at their place; a range, a share and what was counted on the axis."""
    rows = [[0, 0, 0]] * 32
    rows[3], rows[6] = [math.log(2) * 20, 30, 10], [math.log(2) * 150, 70, 100]
    other = [*rows[:3], [0, 0, 0], [math.log(2) * 30, 30, 10], *rows[5:]]
    for path, told in zip(logs, (rows, other, rows), strict=True):
        with_result(path, by_length=told)
        path.write_text(path.read_text().replace(
            "  min_lr: 0.1\n", f"  min_lr: 0.1\n  ttt_batch_size: {batch}\n"))
    figure, ax = report.plt.subplots()
    report.by_length(ax, [report.Log(path) for path in logs])
    lines = [[(k, pytest.approx(y)) for k, y in zip(*line.get_data(), strict=True)]
             for line in ax.get_lines()]
    assert lines == [[(3, 2.0), (6, 1.5)], [(4, 3.0), (6, 1.5)], [(3, 2.0), (6, 1.5)]]
    ticks = dict(zip(ax.get_xticks(), (x.get_text() for x in ax.get_xticklabels()), strict=True))
    assert ticks == {3: "4\nto 7\n(30.0%)", 4: "8\nto 15\n(30.0%)", 6: "32\nto 63\n(70.0%)"}
    assert words in ax.get_xlabel() and ax.get_ylabel() == "bits per byte"
    report.plt.close(figure)


def test_what_logs_lack_is_said(logs, tmp_path):
    for path in logs:
        lines = path.read_text().splitlines()
        told = json.loads(lines[-1])
        del told["result"]["by_length"]
        path.write_text("\n".join([*lines[:-1], json.dumps(told)]) + "\n")
    place = tmp_path / "report.html"
    report.write(logs, place)
    assert "by_length: the logs do not say" in place.read_text()
    with pytest.raises(s.UserError):
        report.write([tmp_path / "none.txt"], place)
