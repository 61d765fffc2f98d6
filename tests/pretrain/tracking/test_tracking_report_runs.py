"""The report of runs that went wrong, of many runs, and of places and files that are no good."""

import json
import math
import re

import pytest

from trichord.cli import main
from trichord.core.errors import ConfigError
from trichord.core.status import Status, write_status
from trichord.tracking.metrics import MetricsWriter
from trichord.tracking.record import read_record
from trichord.tracking.report import read_runs, render_report, write_report
from trichord.tracking.report_curves import Line, line_chart, non_finite_stretches, tick_text
from trichord.tracking.report_figures import headline
from trichord.tracking.report_names import short_names
from trichord.tracking.report_view import run_view

PARTS = {"speed/step_ms": 100.0, "data/wait_ms": 10.0, "speed/forward_ms": 60.0}


def write_run(folder, losses=(3.0, 2.0), name=None, **metrics):
    writer = MetricsWriter(folder, resume_step=None)
    for step, loss in enumerate(losses, start=1):
        writer.log(step, {"train/loss": loss, **{key.replace("__", "/"): value for key, value in metrics.items()}})
    (folder / "config.yaml").write_text(f"run: {{name: {name or folder.name}, max_steps: 30}}\n")
    return folder


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL))


def test_steps_without_a_finite_loss_are_marked_on_the_axis_of_all_charts(tmp_path):
    nan = math.nan
    folder = write_run(tmp_path / "nans", losses=[4.0, nan, nan, nan, nan, nan], train__lr=0.1)
    page = render_report([folder], tmp_path / "r.html")
    charts = dict(re.findall(r"<figure[^>]*><h3>([^<]+)</h3>(.*?)</figure>", page.read_text(), flags=re.DOTALL))
    for chart in charts.values():
        assert [f">{step}</text>" in chart for step in range(1, 7)] == [True] * 6, "one axis of steps"
    assert "<use" in charts["Loss"].split("line2d_")[-1], "the only value has a marker"
    assert "fill: #c2352b" in charts["Loss"]
    assert "#c2352b" not in charts["Learning rate"]
    assert "loss, last finite, at step 1" in text_of(page)
    assert "not finite, 5 of 6 log steps" in text_of(page)
    empty = write_run(tmp_path / "empty", losses=[nan, nan])
    assert [tile.text for tile in headline(read_record(empty))] == ["not finite", "2"]


def test_stretches_without_a_finite_value():
    values = [1, math.nan, math.inf, 1, math.nan, 1, math.nan]
    assert non_finite_stretches(range(7), values) == [(1, 2), (4, 4), (6, 6)]
    assert non_finite_stretches(range(7), values, gap=2) == [(1, 6)]


def test_axes_of_counts_start_at_zero_and_ticks_need_no_offset():
    minus = "\N{MINUS SIGN}"
    zeros = line_chart([Line("", [1, 2], [0, 0])], key="a", span=(1, 2000))
    assert minus not in zeros
    assert ">1</text>" in zeros
    assert ">2000</text>" in zeros, "the axis goes on to the last step of the run"
    assert minus in line_chart([Line("", [1, 2], [-1, 1])], key="a", span=(1, 2))
    assert [tick_text(v) for v in (0.25, 1500, 12_500, 7.5e8, -2.0, 1e30)] == [
        *("0.25", "1500", "12.5k", "750M", f"{minus}2", "1e+30")
    ]


def test_zeros_that_say_nothing_are_left_out_and_a_slow_step_does_not_flatten_the_others(tmp_path):
    folder = write_run(tmp_path / "one", losses=[2.0] * 30, comm__wire_mib=0.0, data__filtered_samples=0, **PARTS)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 31, "train/loss": 2.0, **PARTS, "speed/step_ms": 2500.0}) + "\n")
    text = text_of(render_report([folder], tmp_path / "r.html"))
    assert "Sent by a rank" not in text
    assert "Filtered samples" in text
    assert "1 of 31 steps are higher than shown (triangles), up to 2.5 s" in text


def test_many_runs_are_all_there_and_told_apart_in_one_legend(tmp_path):
    sources = {f"train__loss__next_token__source__{name}": 1.0 for name in ("scans", "speech")}
    names = [f"sweep-lr-{i}-a-long-name-of-a-run" for i in range(12)]
    folders = [write_run(tmp_path / name, **sources, **PARTS) for name in names]
    shown, steps = read_runs(folders), []
    page = write_report(shown, tmp_path / "r.html", lambda done, total: steps.append((done, total)))
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1] > 0
    html = page.read_text()
    assert "<h1>12 runs</h1>" in html
    legend = re.search(r'<div class="runs legend">(.*?)</div>', html, flags=re.DOTALL)[1]
    assert re.findall(r"</i>(\d+)</span>", legend) == [str(i) for i in range(12)]
    assert len(set(re.findall(r'style="([^"]+)"', legend))) == 12, "no two look the same"
    charts = dict(re.findall(r"<figure[^>]*><h3>([^<]+)</h3>(.*?)</figure>", html, flags=re.DOTALL))
    assert len(re.findall(r"stroke: #0072b2|stroke: #009e73", charts["Loss"])) == 4, "two of each colour"
    assert re.findall(r"<h4>(.*?)</h4>", charts["Next-token loss per source"]) == ["scans", "speech"]
    assert "<summary>12 charts, one per run</summary>" in charts["Time of a step"]
    assert short_names(["base", "other"]) == (["base", "other"], "")


def test_runs_of_one_name_are_called_by_their_folders_and_one_given_twice_is_shown_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("runs", "other"):
        write_run(tmp_path / place / "tiny")
    assert main(["report", "runs/tiny", "other/tiny", "other/../runs/tiny", "--out", "r.html"]) == 0
    text = text_of(tmp_path / "r.html")
    assert "<h1>runs/tiny, other/tiny" in (tmp_path / "r.html").read_text()
    assert "runs/tiny was given 2 times, and is shown once" in text


def test_a_killed_run_shows_since_when_it_is_silent(tmp_path):
    folder = write_run(tmp_path / "killed")
    write_status(folder, Status("running", 0, 2, "", 1, 1000.0))
    record = read_record(folder)
    last = record.rows[-1]["time"]
    assert record.last_sign == last
    dead, alive = run_view(record, last + 4000), run_view(record, last + 20)
    assert dead["outcome"] == "no sign of life"
    assert re.search(r"no sign of life since \S+ \S+ \(1h06m before this page was written\)", dead["reason"])
    assert (alive["outcome"], alive["look"]) == ("running", "running")
    assert "last sign of life" in alive["reason"]


@pytest.mark.parametrize("out", ["folder", "/proc/page.html", "file/page.html"])
def test_a_place_for_no_page_is_told_in_one_line(tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["report", "run", "--out", out]) == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: --out \S+: .*name a.*", last)
    assert not [line for line in progress if " INFO " not in line], "no traceback above it"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"run: {name: x\n - : [", "is no YAML"),
        (b"[1]", "holds no config"),
        (b"\xff\xfe\x00", "is no text"),
        (b"run: x\nshards: {sources: [a]}\nengine: 3\nencoders: [a]\nfusion: x\nobjectives: 3", ""),
    ],
)
def test_a_config_that_is_torn_is_left_out_and_told(tmp_path, config, said):
    folder = write_run(tmp_path / "torn")
    (folder / "config.yaml").write_bytes(config)
    text = text_of(render_report([folder], tmp_path / "r.html"))
    assert "2 loss, last" in text
    assert f"config.yaml {said}" in text or not said


def test_a_run_that_logged_no_step_says_so(tmp_path):
    assert run_view(read_record(write_run(tmp_path, losses=())), 0.0)["progress"] == "no step of 30 was logged"


def test_draws_stand_beside_their_targets_and_shards_seen_most_and_least(tmp_path):
    folder = write_run(tmp_path / "draws", data__mix_target_frac__scans=0.75, data__mix_target_frac__speech=0.25)
    counts = {f"s3://bucket/scans-{i:03d}.tar": 10 + i for i in range(20)}
    data = {"step": 40, "since_step": 8, "samples_per_source": {"scans": 60, "speech": 40}, "filtered": {"short": 3}}
    (folder / "data.json").write_text(json.dumps({**data, "samples_per_shard": counts}))
    text = text_of(render_report([folder], tmp_path / "r.html"))
    assert "scans 60 75 % 60 % speech 40 25 % 40 %" in text
    assert "from step 8 to the checkpoint of step 40" in text
    assert "scans-019.tar 29 scans-018.tar 28 scans-017.tar 27 14 more scans-002.tar 12" in text
    assert "seen most and least, of 20" in text
    assert "3 short" in text


def test_the_columns_of_a_run_are_gathered_once_and_hold_numbers_only(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/loss": "oops", "time": "t"}\n')
    record = read_record(folder)
    assert record.columns is record.columns
    assert record.series("train/loss") == ([1, 2], [3.0, 2.0])
    with pytest.raises(ConfigError, match="no run folder"):
        read_runs([tmp_path])
