"""The report in a browser: plots, pictures and sounds are there, nothing sticks out or complains; and its parts."""

import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from trichord.tracking.differences import config_differences
from trichord.tracking.metrics import EventsWriter, MetricsWriter
from trichord.tracking.pages import file_uri
from trichord.tracking.previews import MAX_STEPS, PreviewsWriter, read_previews
from trichord.tracking.report import render_report
from trichord.tracking.sample_view import SampleView

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONG = "photographs-of-the-northern-collection-with-a-name-that-does-not-end"
CONFIG = """\
run: {{name: {name}, max_steps: 400}}
shards: {{sources: [{{name: scans, weight: 3}}, {{name: {long}, weight: 1}}]}}
engine: {{zero_stage: {stage}, precision: bf16, lr: 0.001}}
objectives: {{next_token: {{weight: 1.0}}}}
"""
CURVES = {  # title of a chart -> metrics that its curves are of
    "Loss": ["train/loss"],
    "Next-token loss per source": [f"train/loss/next_token/source/{name}" for name in ("scans", LONG)],
    "Next-token loss by what samples hold": [f"train/loss/next_token/modality/{kind}" for kind in ("text", "image")],
    "Evaluation: loss": ["eval/scans/loss/next_token"],
    "Throughput": ["speed/tokens_per_s"],
    "FLOPs utilisation": ["speed/mfu_frac", "speed/hfu_frac"],
    "Sent by a rank per step": ["comm/wire_mib", "comm/wire_mib/all_gather"],
    "Memory": ["memory/peak_gib", "memory/host_gib"],
    "Learning rate": ["train/lr", "train/lr/vision"],
    "Data mix": ["data/mix_frac/scans", f"data/mix_frac/{LONG}"],
    "Bad samples": ["data/bad_samples"],
}
PIXELS = np.random.default_rng(0).integers(0, 255, (3, 24, 32), dtype=np.uint8)
CLIP = (8000 * np.sin(np.arange(4000) / 9)).astype(np.int16)
SAMPLES = [
    SampleView(0, 0, 5, "what is it?", "a <b>heron</b>", "a crane", 0.5, (PIXELS,), (CLIP,)),
    SampleView(1, 0, 6, "text " * 300, "", None, None),
]


def write_run(folder, stage=2):
    writer, events = MetricsWriter(folder, resume_step=None), EventsWriter(folder)
    events.log("start", step=0, world_size=2)
    for step in range(1, 401):
        line = {name: 1.0 + math.sin(step / (20 + 3 * i)) for names in CURVES.values() for i, name in enumerate(names)}
        line |= {"speed/step_ms": 100.0, "data/wait_ms": 10.0, "speed/forward_ms": 30.0, "speed/backward_ms": 50.0}
        line |= {"data/mix_target_frac/scans": 0.75, f"data/mix_target_frac/{LONG}": 0.25}
        writer.log(step, line)
    events.log("skipped_step", step=7, samples=[[0, 1, 5]])
    events.log("fault", step=200, reason=f"rank 3: /a/very/long/path/{'x' * 300} cannot be read")
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, long=LONG, stage=stage))
    previews = PreviewsWriter(folder, ["scans", LONG], 16000, 1)
    for step in (100, 400):
        previews.write(step, SAMPLES)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "one"), write_run(root / "two", stage=3)]


@pytest.fixture(scope="module")
def pages(folders):
    """Of one run, and of two."""
    return {n: render_report(folders[:n], folders[0].parent / f"report{n}.html") for n in (1, 2)}


def test_the_page_needs_nothing_from_outside_and_escapes_samples(pages):
    page = pages[1].read_text()
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<script" not in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.count("data:audio/wav;base64,") == 2
    assert "a &lt;b&gt;heron" in page
    assert "50 % of the tokens right" in page


def test_differences_of_the_configs_are_shown(pages):
    text = re.sub(r"<[^>]+>|\s+", " ", pages[2].read_text())
    assert re.search(r"Config differences .*? engine.zero_stage\s+2\s+3\s", text)
    assert "engine.precision" not in text.split("Curves")[0]


def test_config_differences():
    one = {"run": {"name": "a"}, "sources": [{"name": "x", "weight": 1}, {"name": "y", "weight": 2}], "lr": 0.1}
    two = {"run": {"name": "b"}, "sources": [{"name": "y", "weight": 2}, {"name": "x", "weight": 3}], "lr": None}
    assert config_differences([one, two]) == [("sources.x.weight", ["1", "3"]), ("lr", ["0.1", "null"])]
    assert config_differences([one, {**one, "more": True}]) == [("more", ["not set", "true"])]
    assert config_differences([one, one]) == []


def test_previews_are_bounded_and_steps_done_again_stand_once(tmp_path):
    writer = PreviewsWriter(tmp_path, ["scans", "other"], 16000, 1)
    large = SampleView(0, 0, 1, "x" * 5000, "", None, None, (np.zeros((3, 900, 600), np.uint8),) * 9)
    for step in range(1, MAX_STEPS + 3):
        writer.write(step, [large] if step == 1 else SAMPLES)
    PreviewsWriter(tmp_path, ["scans", "other"], 16000, 2).write(5, SAMPLES[:1])
    with open(tmp_path / "previews.jsonl", "a") as file:
        file.write('{"step": 99, "numb')
    lines = read_previews(tmp_path)
    assert [line["step"] for line in lines if line["step"] in (4, 5)] == [4, 4, 5], (
        "of step 5 only the second attempt's"
    )
    assert len(lines[0]["given"]) == 1000
    assert len(lines[0]["images"]) == 4
    assert len(list((tmp_path / "previews").iterdir())) == MAX_STEPS
    assert file_uri(tmp_path, lines[0]["images"][0], "image/jpeg") is None, "the oldest are gone"
    from PIL import Image

    writer.write(900, [large])
    assert Image.open(tmp_path / "previews" / "step-000900" / "0-0.jpg").size == (171, 256)
    assert file_uri(tmp_path, "../other/secret.jpg", "image/jpeg") is None
    assert file_uri(tmp_path, "/etc/passwd", "image/jpeg") is None


PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(String(e.message || e.target)), true);
addEventListener("load", async () => {
  const clips = [...document.querySelectorAll("audio")];
  document.querySelectorAll("details").forEach(one => one.open = true);
  await Promise.all(clips.map(clip => new Promise(done => {
    clip.onloadedmetadata = clip.onerror = done; clip.preload = "auto"; clip.load(); })));
  const charts = {};
  document.querySelectorAll("figure").forEach(one => {
    const drawn = [...one.querySelectorAll("svg")], sizes = drawn.map(svg => svg.getBoundingClientRect());
    const points = drawn.map(svg => [...svg.querySelectorAll("path")].filter(path => path.getTotalLength() > 20)
      .map(path => (path.getAttribute("d").match(/[ML]/g) || []).length));
    charts[one.querySelector("h3").textContent] = {
      widths: sizes.map(box => box.width), heights: sizes.map(box => box.height),
      points: points.map(found => Math.max(...found)),
      long: points.flat().filter(count => count > 100).length }; });
  const facts = { errors, charts, width: innerWidth, content: document.documentElement.scrollWidth,
    images: [...document.images].map(one => one.naturalWidth), seconds: clips.map(clip => clip.duration),
    ground: getComputedStyle(document.body).backgroundColor };
  parent.postMessage(JSON.stringify(facts), "*"); });
</script></head>"""


def look(page, tmp_path, width, dark=False):
    """What a browser finds on the page in a window of that width, and what it wrote to its console."""
    (tmp_path / "inner.html").write_text(page.read_text().replace("</head>", PROBE, 1))
    # Headless windows are at least 500 pixels wide, so the page sits in a frame of the wanted width.
    (tmp_path / "outer.html").write_text(
        '<body><pre id="facts"></pre><script>addEventListener("message", e => '
        'document.getElementById("facts").textContent = e.data)</script>'
        f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=1500,1000", "--virtual-time-budget=8000"]
    command += ["--enable-logging=stderr", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/outer.html"], capture_output=True, text=True, timeout=60
    )
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(re.search(r'<pre id="facts">(.*?)</pre>', done.stdout)[1])), said


@pytest.mark.skipif(CHROMIUM is None, reason="no browser; apt-get install chromium brings one")
@pytest.mark.parametrize(("width", "runs"), [(390, 1), (1440, 1), (390, 2)])
def test_a_browser_shows_every_plot_and_nothing_sticks_out(pages, tmp_path, width, runs):
    facts, said = look(pages[runs], tmp_path, width, dark=runs == 2)
    assert (facts["errors"], said) == ([], [])
    assert facts["width"] == width
    assert facts["content"] <= width, "the page scrolls sideways"
    assert set(facts["charts"]) == {*CURVES, "Time of a step"}
    for title, chart in facts["charts"].items():
        assert min(chart["points"]) > 100, title
        assert 250 < min(chart["widths"]) <= max(chart["widths"]) < width
        assert 120 < min(chart["heights"]) <= max(chart["heights"]) < 500
        if title in CURVES and title != "Data mix":
            assert chart["long"] >= len(CURVES[title]) * runs, title
            assert len(chart["widths"]) == (1 if runs == 1 else len(CURVES[title])), title
    assert facts["images"] == [32] * 2 * runs
    assert facts["seconds"] == [pytest.approx(0.25)] * 2 * runs
    assert facts["ground"] == ("rgb(18, 22, 27)" if runs == 2 else "rgb(244, 246, 248)")
