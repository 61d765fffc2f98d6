"""Images and clips as data URIs, so that a page holds them itself."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np

_WAVE_POINTS = 240
_MEL_COLORS = "magma"


def image_uri(pixels: np.ndarray) -> str:
    """Pixels (3, H, W) uint8, without loss."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(out, "WEBP", lossless=True)
    return _uri("image/webp", out.getvalue())


def audio_uri(waveform: np.ndarray, sample_rate: int) -> str:
    """A waveform (n,) int16 as a WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(waveform.astype("<i2").tobytes())
    return _uri("audio/wav", out.getvalue())


def mel_uri(log_mel: np.ndarray) -> str:
    """Log-mel (frames, n_mels) as a picture: time to the right, low tones at the bottom."""
    from matplotlib import colormaps
    from PIL import Image

    low, high = float(log_mel.min()), float(log_mel.max())
    scaled = (log_mel.T[::-1] - low) / max(high - low, 1e-6)
    colors = (colormaps[_MEL_COLORS](scaled)[..., :3] * 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(colors).save(out, "WEBP", quality=80)
    return _uri("image/webp", out.getvalue())


def wave_path(waveform: np.ndarray, width: float = 240.0, height: float = 48.0) -> str:
    """The envelope of a waveform (n,) int16 as the path of an SVG of this size; as loud as the clip itself is."""
    parts = np.array_split(waveform.astype(np.float32), min(_WAVE_POINTS, max(1, len(waveform))))
    loudest = max(1.0, float(np.abs(waveform.astype(np.float32)).max(initial=0.0)))
    step, middle = width / len(parts), height / 2
    upper = [(i * step, middle - middle * float(part.max(initial=0)) / loudest) for i, part in enumerate(parts)]
    lower = [(i * step, middle - middle * float(part.min(initial=0)) / loudest) for i, part in enumerate(parts)]
    points = [*upper, *reversed(lower)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
