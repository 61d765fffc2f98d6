"""The report page: complete, self-contained, escaped, and possible for any state of a run folder."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from trichord.core.errors import ConfigError
from trichord.core.status import Status, write_status
from trichord.tracking.metrics import EventsWriter, MetricsWriter
from trichord.tracking.record import read_record
from trichord.tracking.report import render_report
from trichord.tracking.report_curves import thin

EVIL = "<script>alert('x')</script>"
CONFIG = """\
run: {name: digits, max_steps: 30}
shards: {sources: [{name: scans, weight: 3}, {name: speech, weight: 1}]}
engine: {zero_stage: 2, precision: fp32, lr: 0.001}
objectives: {next_token: {weight: 1.0}, contrastive: null}
"""


class Page(HTMLParser):
    """Text, ids and links of a page; `open` must be empty at the end."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.text, self.ids, self.links, self.tags, self.open = "", [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"
        self.text += " "

    def handle_data(self, data):
        self.text += data


def write_run(folder, *, scale=1.0, extra=None):
    writer, events = MetricsWriter(folder, resume_step=None), EventsWriter(folder)
    events.log("start", step=0, world_size=2)
    for step in range(1, 31):
        metrics = {
            "train/loss": math.nan if step == 7 else scale * 3.0 / step,
            "train/loss/next_token": 2.0 / step,
            "speed/tokens_per_s": 80_000.0,
            "speed/step_ms": 100.0,
            "data/wait_ms": 10.0,
            "speed/update_ms": 60.0,
            "data/bad_samples": step // 10,
            "data/mix_frac/scans": 0.7,
            "data/mix_frac/speech": 0.3,
            "memory/peak_gib": 1.5,
        }
        writer.log(step, {**metrics, **(extra or {})})
    events.log("start", step=12, world_size=1, note=EVIL)
    (folder / "config.yaml").write_text(CONFIG)
    write_status(folder, Status("finished", 0, 30, "all steps done"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    write_run(folder, extra={"fusion/gate": 0.25})
    with open(folder / "quarantine.jsonl", "w") as file:
        for key in range(3):
            line = {"shard": "https://store.example/a.tar", "key": f"{key}", "reason": f"truncated {EVIL}"}
            file.write(json.dumps(line) + "\n")
        file.write('{"shard": "torn')
    metrics = {
        "image-text R@1": {"value": 0.972, "chance": 0.0278, "baseline": 0.961, "held_out": True},
        "audio-text R@1": {"value": 1.0, "chance": 0.0278, "held_out": False, "note": "recall of known recordings"},
    }
    captions = [{"truth": "three", "caption": f"three {EVIL}"}]
    (folder / "result.json").write_text(
        json.dumps({"metrics": metrics, "seconds": {"train": 64.1}, "captions": captions})
    )
    return render_report([folder], folder / "report.html").read_text()


def test_the_page_shows_the_run(page):
    text = re.sub(r"\s+", " ", Page(page).text)
    for part in (
        "digits finished",
        "step 30 of 30 · 2 starts",
        "0.1 loss, last",
        "80k tokens/s",
        "100 ms step",
        "10 % waiting for data",
        "1.5 GiB peak memory",
        "1 non-finite losses",
        "image-text R@1 0.972 0.0278 0.961 yes",
        "audio-text R@1 1 0.0278 no recall of known recordings",
        "scans 75 % 70 %",
        "3 truncated",
        "objectives next_token",
        "train 64.1 s",
        "Loss per objective",
        "Time of a step",
        "fusion/gate",
        "2 events",
        "zero_stage: 2",
    ):
        assert part in text, part


def test_the_page_is_whole_and_needs_nothing_from_outside(page):
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids)), "charts share an id"
    assert all(link.startswith("#") for link in parsed.links), parsed.links
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "http://" not in page
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)


def test_what_users_wrote_is_escaped(page):
    assert EVIL not in page
    assert page.count("&lt;script&gt;") >= 3, "event, reason and caption are shown as text"


def test_charts_have_the_curves_the_marks_and_their_exact_labels(page):
    charts = dict(re.findall(r"<figure[^>]*><h3>([^<]+)</h3>(.*?)</figure>", page, flags=re.DOTALL))
    assert "Samples per second" not in charts, "no chart without a metric"
    assert "stroke-dasharray" in charts["Loss"], "a dotted line where the run went on"
    for label in ("wait", "update", "other"):
        assert f"</i>{label}</span>" in charts["Time of a step"]
    assert "</i>scans</span>" in charts["Data mix"]


def test_several_runs_share_their_charts(tmp_path):
    for name, scale in (("a", 1.0), ("b", 2.0)):
        write_run(tmp_path / name, scale=scale)
        (tmp_path / name / "config.yaml").write_text(CONFIG.replace("digits", name))
    html = render_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text()
    parsed = Page(html)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    text = re.sub(r"\s+", " ", parsed.text)
    assert "Side by side" in text
    assert "a finished 0.1 80k" in text
    assert "b finished 0.2 80k" in text
    figures = dict(re.findall(r"<figure[^>]*><h3>([^<]+)</h3>(.*?)</figure>", html, flags=re.DOTALL))
    assert re.findall(r"<h4>(.*?)</h4>", figures["Time of a step"]) == ["a", "b"]
    assert re.findall(r"<h4>(.*?)</h4>", figures["Data mix"]) == ["scans", "speech"]
    assert figures["Loss"].count("<svg") == 1


def test_a_run_that_has_logged_nothing_yet_still_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    html = render_report([tmp_path], tmp_path / "report.html").read_text()
    assert "No metrics have been logged yet" in html
    assert Page(html).open == []


def test_one_logged_step_is_enough(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None)
    writer.log(1, {"train/loss": 2.0, "train/grad_norm": 0.0})
    html = render_report([tmp_path], tmp_path / "report.html").read_text()
    assert "<h3>Gradient norm</h3>" in html


def test_broken_side_files_do_not_hinder_the_page(tmp_path):
    write_run(tmp_path)
    for name in ("status.json", "result.json", "environment.json"):
        (tmp_path / name).write_text('{"torn')
    record = read_record(tmp_path)
    assert (record.status, record.result, record.environment) == (None, {}, {})
    assert record.resumed_at == [12]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        render_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="at least one"):
        render_report([], tmp_path / "report.html")


def test_long_curves_keep_their_extremes():
    values = [1.0] * 10_000
    values[5_000] = 9.0
    values[7_000] = math.nan
    steps, means, lows, highs = thin(range(10_000), values, limit=100)
    assert len(steps) == len(means) == 100
    assert (max(highs), min(lows)) == (9.0, 1.0)
    assert not any(math.isnan(mean) for mean in means)
    assert thin([1, 2], [3.0, math.nan])[0] == [1, 2]
