"""More voices for the quick-start: spoken digits of seven people in four languages, from Debian's Asterisk prompts.

Only where `apt-get` and `dpkg` are (Debian, Ubuntu). The packages are fetched, checked by hash and unpacked into a
folder of ours; nothing is installed. Four speakers are trained on, three others are kept for the report: each speaks a
language that was heard, in a voice that was not.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trichord.core.errors import ConfigError, DataError

RATE = 8000  # Hz, as all Asterisk prompts


@dataclass(frozen=True)
class VoicePackage:
    """One speaker. sha256: of the .deb this was written against; licence: of the recordings."""

    package: str
    speaker: str
    language: str
    licence: str
    unseen: bool
    sha256: str
    digits: str


VOICES = (
    VoicePackage(
        "asterisk-core-sounds-en-gsm", "allison-en", "en", "CC-BY-SA-3.0", False,
        "ddc33205a56aebf54c73a0fb95c3a0d8131087878d74857a4e54bcab2b0d72ae", "en_US_f_Allison/digits",
    ),
    VoicePackage(
        "asterisk-core-sounds-es-gsm", "allison-es", "es", "CC-BY-SA-3.0", False,
        "533b4c29e232cae99f89a6933b5fc0af5341514e513924df401c683e222614b7", "es_MX_f_Allison/digits",
    ),
    VoicePackage(
        "asterisk-core-sounds-fr-gsm", "june-fr", "fr", "CC-BY-SA-3.0", False,
        "97bd8bebb7ef775046802a5a466d8f89916f54f437e158a1ec537cef814d44fd", "fr_CA_f_June/digits",
    ),
    VoicePackage(
        "asterisk-core-sounds-it-gsm", "carlo-it", "it", "CC-BY-3.0", False,
        "fb6d6ce94502894714f00240c372a291bcaa4cd3e05fdf278780a4dd9edfabab", "it_IT_m_Carlo/digits",
    ),
    VoicePackage(
        "asterisk-prompt-es-co", "es-co", "es", "GPL-2.0", True,
        "6702696e045514699e87dc8fb70f370717e5df91f821f7bec8dd0df1be008e83", "es/digits",
    ),
    VoicePackage(
        "asterisk-prompt-fr-armelle", "armelle-fr", "fr", "GPL-2.0-or-later", True,
        "162570b1a9b3512a98f06b89f60c7c17cf1b9b52297315adca9a4e5be728bea3", "fr/digits",
    ),
    VoicePackage(
        "asterisk-prompt-it-menardi-gsm", "menardi-it", "it", "CC-BY-SA-3.0-IT", True,
        "36ca6a951c029a94e6773c1c7d433042f5e4e2d9403c953005b0b7c9b2f9fbc2", "it_IT_f_Menardi/digits",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SpokenDigit:
    """One recording: waveform (n,) float32 in [-1, 1] at `RATE`."""

    speaker: str
    language: str
    digit: int
    unseen: bool
    waveform: np.ndarray


def fetch_voices(folder: Path) -> list[SpokenDigit]:
    """The ten digits of every voice; packages are downloaded into `folder` unless they are there.

    Raises:
        ConfigError: no apt-get or dpkg on this machine. DataError: a download failed or is not what was expected.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise ConfigError(f"--voices needs {tool} (Debian or Ubuntu); leave --voices out on this machine")
    folder.mkdir(parents=True, exist_ok=True)
    return [clip for voice in VOICES for clip in _read_voice(voice, _unpack(voice, folder))]


def _unpack(voice: VoicePackage, folder: Path) -> Path:
    """Folder of the voice's digits."""
    place = folder / voice.package
    if not place.exists():
        archive = _download(voice, folder)
        staging = folder / f".{voice.package}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _run(["dpkg", "-x", archive.name, staging.name], folder)
        staging.rename(place)
    return place / "usr/share/asterisk/sounds" / voice.digits


def _download(voice: VoicePackage, folder: Path) -> Path:
    found = sorted(folder.glob(f"{voice.package}_*.deb"))
    if not found:
        _run(["apt-get", "download", "-qq", voice.package], folder)
        found = sorted(folder.glob(f"{voice.package}_*.deb"))
    if not found:
        raise DataError(
            f"apt-get download {voice.package} left no file in {folder}; run `apt-get update` and try again"
        )
    digest = hashlib.sha256(found[-1].read_bytes()).hexdigest()
    if digest != voice.sha256:
        raise DataError(
            f"{found[-1]} has SHA-256 {digest}, expected {voice.sha256}: another version of the package, whose "
            "recordings were not looked at; leave --voices out"
        )
    return found[-1]


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise DataError(
            f"`{' '.join(command)}` failed: {done.stderr.strip().splitlines()[-1:]}; run `apt-get update` first"
        )


def _read_voice(voice: VoicePackage, digits: Path) -> list[SpokenDigit]:
    import soundfile

    clips = []
    for digit in range(10):
        path = digits / f"{digit}.gsm"
        if not path.exists():
            raise DataError(f"package {voice.package} has no {path.name} in {digits}")
        samples, _ = soundfile.read(path, samplerate=RATE, channels=1, subtype="GSM610", format="RAW", dtype="float32")
        clips.append(SpokenDigit(voice.speaker, voice.language, digit, voice.unseen, samples))
    return clips
