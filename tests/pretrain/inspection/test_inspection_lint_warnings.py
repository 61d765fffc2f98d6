"""What lint and stats say beside bad samples: warnings, mistakes told before the work begins, and silence elsewhere."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import soundfile
from inspection_corpus import pairs, png, write_tar

from trichord.cli import main
from trichord.inspection.lint import lint
from trichord.inspection.target import find_target


def test_what_no_sample_reads_is_a_warning(configured, tmp_path, monkeypatch, capsys):
    """The same with a config, which plans and decodes its samples by another road."""
    monkeypatch.chdir(configured)
    chat = {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"}]}]}
    members = [
        ("a.png", png(1)), ("a.input.png", png(2)), ("a.gif", b"GIF89a"), ("a.txt", b"a thing"), ("a.cls", b"3"),
        ("b.png", png(3)), ("b.json", b'{"conversations": [{"from": "human", "value": "x"}]}'),
        ("c.0.png", png(4)), ("c.1.png", png(5)), ("c.txt", b"of a chat"), ("c.json", json.dumps(chat).encode()),
    ]  # fmt: skip
    shard = write_tar(tmp_path / "s.tar", members)
    words = ["c.yaml", f"shards.sources.cats.shards={shard}", "samples.targets={}"]
    expected = {
        ("unmapped", "gif"): "1 member .gif are mapped to no field and are not read; convert them to JPEG",
        ("unmapped", "cls"): "1 member .cls are mapped to no field (`fields` of the source)",
        ("further", "input.png"): "1 member .input.png are read by no sample",
        ("unnamed", "N.png"): "1 member .N.png: of chats whose `messages` do not name them",
        ("chat key", "conversations"): "1 json members hold a chat under `conversations`",
    }
    for target in (find_target([str(shard)]), find_target(words)):
        source = lint(target).sources[0]
        assert source.bad == 0
        assert source.unread == dict.fromkeys(expected, 1)
        assert len(source.warnings) == len(expected)
        for text in expected.values():
            assert any(warning.startswith(text) for warning in source.warnings), source.warnings
    assert main(["data", "lint", str(shard), "--json", str(tmp_path / "lint.json")]) == 0
    printed = capsys.readouterr().out
    assert "shards  1 member .cls are mapped" in printed
    assert printed.endswith("; 5 warnings\n")
    told = json.loads((tmp_path / "lint.json").read_text())["sources"][0]
    assert len(told["warnings"]) == 5
    assert {"why": "unmapped", "what": "gif", "count": 1} in told["unread"]


def test_scattered_members_must_be_mended(tmp_path, capsys):
    whole = [member for member in pairs(30, 1) if not member[0].endswith(".json")]  # whose parts are no bad samples
    scattered = sorted(whole, key=lambda member: member[0].rpartition(".")[2])
    assert main(["data", "lint", str(write_tar(tmp_path / "s.tar", scattered))]) == 3
    printed = capsys.readouterr().out
    assert "times a key comes back after others (0001, 0002, 0003, 0004, 0005): the members of one sample" in printed
    assert "samples come in parts, and training would take each for a sample; 1 warning\n" in printed
    assert main(["data", "lint", str(write_tar(tmp_path / "w.tar", whole))]) == 0


def test_an_exclude_list_that_matches_nothing_is_told(configured, tmp_path, monkeypatch):
    monkeypatch.chdir(configured)
    (tmp_path / "no.jsonl").write_text('{"shard": "cats-0.tar", "key": "9999"}\n{"shard": "x.tar", "key": "0001"}\n')
    (tmp_path / "one.jsonl").write_text('{"shard": "x.tar", "key": "1"}\n{"shard": "d/cats-0.tar", "key": "0001"}\n')
    lists = f"[{tmp_path}/no.jsonl, {tmp_path}/one.jsonl]"
    target = find_target(["c.yaml", f"shards.sources.cats.filters.exclude={lists}", "samples.targets={}"])
    report = lint(target)
    assert report.sources[0].filtered == {"exclude": 1}
    (warning,) = report.sources[0].warnings
    assert warning.startswith(f"filters.exclude: 0 of 2 lines of {tmp_path}/no.jsonl matched a sample of cats")


@pytest.mark.parametrize("verb", ["lint", "stats"])
def test_paths_are_looked_at_before_shards_are(configured, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(shutil.copytree(configured, tmp_path / "c"))
    for place in (tmp_path / "c").rglob("*.idx"):
        place.unlink()
    for words, said in ((["shards.sources.cats.filters.exclude=[no.jsonl]"], "no.jsonl cannot be read"),
                        (["batches.tokenizer=./gone"], "nothing is at './gone'")):  # fmt: skip
        assert main(["data", verb, "c.yaml", *words]) == 2
        assert said in capsys.readouterr().err
    assert not list((tmp_path / "c").rglob("*.idx"))


def test_damaged_mp3_says_nothing_that_names_no_file(tmp_path, capfd):
    """Neither where it is indexed nor where it is decoded, in this process."""
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000, format="MP3")
    data = bytearray(out.getvalue())
    data[3000:3400] = bytes(400)
    shard = write_tar(tmp_path / "s.tar", [("a.mp3", bytes(data)), ("b.mp3", bytes(data[: len(data) // 2]))])
    report = lint(find_target([str(shard)]))
    assert [reason for reason in report.sources[0].reasons if "the audio is cut" in reason]
    said = capfd.readouterr().err
    assert not re.search("xing|mpg123", said, re.IGNORECASE), said


@pytest.mark.parametrize("verb", ["lint", pytest.param("stats", marks=pytest.mark.slow)])
def test_a_signal_ends_it_with_one_line(tmp_path, verb):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", pairs(8, 8 * number))
    command = [sys.executable, "-m", "trichord.cli", "data", verb, str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(psutil.Process(process.pid).children()) < 2:
        time.sleep(0.05)  # they need seconds to start
    workers = psutil.Process(process.pid).children()
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    said = [line for line in said.splitlines() if " INFO " not in line]
    assert len(said) == 1
    assert said[0].startswith("stopped before all samples were")
    assert not psutil.wait_procs(workers, timeout=10)[1]
