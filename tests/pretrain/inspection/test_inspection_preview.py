"""`trichord data preview` shows the rows that training gets, no others, and says what is what."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from inspection_corpus import TRUNK_CONFIG, chat_members, write_tar

from trichord.batches.loader import Loader
from trichord.batches.packed_batch import IGNORE_INDEX
from trichord.batches.tokenizer import train_tokenizer
from trichord.cli import main
from trichord.config.load import load_run_config
from trichord.inspection.row_view import token_texts, view_rows
from trichord.restore import item_lengths

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`c.yaml`, `talk.tar`, `tok/`. Not changed by tests."""
    folder = tmp_path_factory.mktemp("talk")
    write_tar(folder / "talk.tar", chat_members())
    texts = ["a thing of the world", "describe: who is this a heron it is", "and <b>that</b>", "once größer 鷺"]
    train_tokenizer(texts, "bpe", 320, folder / "tok")
    (folder / "c.yaml").write_text(TRUNK_CONFIG)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def first_step(**options):
    config = load_run_config("c.yaml")
    lengths = item_lengths(config)
    loader = Loader(config.shards, config.samples, config.batches, seed=0, lengths=lengths, **options)
    return next(iter(loader)), loader.tokenizer


def test_rows_are_read_back_from_the_batch(here):
    step, tokenizer = first_step()
    batch = step.micro_batches[0]
    (row,) = view_rows(batch, 160, tokenizer)
    assert row.useful == batch.useful_tokens
    assert sum(segment.end - segment.start for segment in row.segments if not segment.bad) == row.useful
    ids = batch.input_ids.tolist()
    for segment in row.segments:
        places = [place for run in segment.runs for place in range(run.start, run.end)]
        assert places == ([] if segment.bad else list(range(segment.start, segment.end)))
        for run in segment.runs:
            assert [token.id for token in run.tokens] == (ids[run.start : run.end] if run.tokens else [])
            learned = [batch.labels[place - 1] != IGNORE_INDEX for place in range(run.start, run.end)]
            assert all(flag == run.learned for flag in learned)


def test_parts_of_captions_chats_and_documents_are_told_apart(here):
    step, tokenizer = first_step()
    (row,) = view_rows(step.micro_batches[0], 160, tokenizer)
    seen = {}
    for segment in row.segments:
        text = [(run.kind, "".join(token.text for token in run.tokens)) for run in segment.runs]
        seen[segment.sample[2]] = text
    assert seen[0] == [
        *[("special", "bos"), ("image", ""), ("prompt", "describe:")],
        *[("learned", "a thing of the world"), ("special", "eos")],
    ]
    assert [kind for kind, _ in seen[1]] == [
        *["special", "prompt", "image", "prompt", "learned", "special"],
        *["prompt", "image", "audio", "prompt", "learned", "special"],
    ]
    assert ("learned", "größer 鷺") in seen[1]
    assert seen[2] == [("special", "bos"), ("learned", "once"), ("image", ""), ("special", "eos")]
    bad = [segment for segment in row.segments if segment.bad]
    assert [(segment.sample[2], segment.runs) for segment in bad] == [(3, [])]
    assert bad[0].end > bad[0].start + 1


def test_token_texts_are_the_decoded_text_in_pieces(tmp_path):
    texts = ["größer 鷺 and more words", "who  is   this\n", "🦩🦩 heron"]
    for kind in ("bpe", "unigram", "word"):
        tokenizer = train_tokenizer(["größer and more words who is this heron 鷺 🦩"], kind, 300, tmp_path / kind)
        for text in texts:
            ids = tokenizer.encode(text)
            pieces = token_texts(ids, tokenizer)
            assert len(pieces) == len(ids)
            assert "".join(pieces) == tokenizer.decode(ids)


def page_of(here, tmp_path, *words: str) -> str:
    out = tmp_path / "p.html"
    assert main(["data", "preview", "c.yaml", *words, "--out", str(out)]) == 0
    return out.read_text()


def test_the_page_holds_everything_itself_and_escapes_it(here, tmp_path, capsys):
    page = page_of(here, tmp_path)
    assert "1 rows, 3 samples" in capsys.readouterr().out
    assert page.count("<audio") == 1
    assert page.count("<figure><img") == 4
    assert "data:audio/wav;base64," in page
    assert "<b>that</b>" not in page.replace("<b title", "")
    assert "&lt;" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    text = html.unescape(page)
    assert "not an image in JPEG" in text  # left out by its index
    assert "min_text_chars" in text  # filtered
    assert re.search("its slot is slack: the image cannot be decoded", text)
    assert "target kind</dt><dd>cat<" in page


def test_pictures_and_sounds_are_those_of_the_batch(here, tmp_path):
    import base64
    import io
    import wave

    from PIL import Image

    page = page_of(here, tmp_path)
    batch = first_step()[0].micro_batches[0]
    images = [
        base64.b64decode(one) for one in re.findall(r'<figure><img[^>]*src="data:image/webp;base64,([^"]+)', page)
    ]
    shown = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).transpose(2, 0, 1) for one in images]
    assert sorted(one.tobytes() for one in shown) == sorted(one.numpy().tobytes() for one in batch.pixels)
    with wave.open(io.BytesIO(base64.b64decode(re.search(r"data:audio/wav;base64,([^\"]+)", page)[1]))) as file:
        assert file.getframerate() == 16_000
        assert np.array_equal(np.frombuffer(file.readframes(10**6), "<i2"), batch.waveforms.numpy())


def test_ranks_see_their_own_rows_and_the_number_of_rows_is_bounded(here, tmp_path):
    words = ("batches.rows_per_step=2", "shards.window_samples=2")
    keys = [re.findall(r'class="key">\d+\. (\w+)<', page_of(here, tmp_path, *words, *ranks)) for ranks in (
        ("--rank", "0", "--world-size", "2"), ("--rank", "1", "--world-size", "2"), ())]  # fmt: skip
    assert keys[0] + keys[1] == keys[2]
    page = page_of(here, tmp_path, *words, "--steps", "2", "--rows", "1")
    assert page.count('<section class="row"') == 1
    assert "3 more rows are not shown" in page


def test_mel_in_the_worker_and_dealt_rows_are_shown_too(here, tmp_path):
    page = page_of(here, tmp_path, "samples.audio.mel=worker")
    assert page.count("<audio") == 1
    assert page.count('alt="log-mel') == 1
    words = ("batches.deal_ranks=2", "batches.rows_per_step=2")
    assert "Step 1, row 1" in page_of(here, tmp_path, *words, "--world-size", "2")


def test_an_empty_row_says_so(here, tmp_path):
    page = page_of(here, tmp_path, "shards.sources.talk.epochs=1", "--steps", "3")
    assert "An empty row" in page


def test_wrong_asks_are_answered(here, tmp_path, capsys):
    assert main(["data", "preview", "c.yaml", "--rank", "2", "--world-size", "2"]) == 2
    assert "--rank must be less than --world-size 2, got 2" in capsys.readouterr().err
    assert main(["data", "preview", "c.yaml", "shards.sources.talk.shards=none.tar"]) == 3
    capsys.readouterr()
    for shards in ("talk.tar", "."):
        assert main(["data", "preview", shards]) == 2
        assert (
            f"takes a config, since rows depend on the model; got shards, {shards}. Make one" in capsys.readouterr().err
        )
    (tmp_path / "file").write_text("")
    assert main(["data", "preview", "c.yaml", "--out", str(tmp_path / "file" / "p.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no browser; apt-get install chromium brings one")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_whole_page_without_scrolling_sideways(here, tmp_path, width):
    """Every picture and clip loads, no script or style complains, and nothing sticks out of the window."""
    page = page_of(here, tmp_path)
    probe = """<script>
    addEventListener("load", async () => {
      const clips = [...document.querySelectorAll("audio")];
      await Promise.all(clips.map(clip => new Promise(done => {
        clip.onloadedmetadata = clip.onerror = done; clip.preload = "auto"; clip.load(); })));
      const facts = {
        width: innerWidth, content: document.documentElement.scrollWidth,
        images: [...document.images].map(image => image.naturalWidth),
        seconds: clips.map(clip => clip.duration),
        segments: [...document.querySelectorAll(".strip a")].map(one => one.getBoundingClientRect().width),
        strip: document.querySelector(".strip").getBoundingClientRect().width };
      parent.postMessage(JSON.stringify(facts), "*"); });
    </script></body>"""
    (tmp_path / "inner.html").write_text(page.replace("</body>", probe))
    # Headless windows are at least 500 pixels wide, so the page sits in a frame of the wanted width.
    (tmp_path / "outer.html").write_text(
        f'<body><pre id="facts"></pre><iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe>'
        '<script>addEventListener("message", e => document.getElementById("facts").textContent = e.data)</script>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=1500,1000", "--virtual-time-budget=8000"]
    command += ["--dump-dom", f"file://{tmp_path}/outer.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    facts = json.loads(html.unescape(re.search(r'<pre id="facts">(.*?)</pre>', done.stdout)[1]))
    assert facts["width"] == width
    assert facts["content"] <= width
    assert len(facts["images"]) == 5  # four pictures and a log-mel
    assert min(facts["images"]) > 0
    assert facts["seconds"] == [pytest.approx(0.2)]
    assert 0 < sum(facts["segments"]) < facts["strip"]
