"""Small real shards, and shards with every kind of fault planted in them."""

import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np


def png(value: int, size: tuple[int, int] = (24, 16)) -> bytes:
    from PIL import Image

    rng = np.random.default_rng(value)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def wav(frames: int = 1600, rate: int = 16_000, pitch: float = 220.0) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = 8000 * np.sin(2 * np.pi * pitch * np.arange(frames) / rate)
        file.writeframes(tone.astype("<i2").tobytes())
    return out.getvalue()


def flac(frames: int = 16_000) -> bytes:
    import soundfile

    out = io.BytesIO()
    noise = np.random.default_rng(7).normal(0, 0.1, frames)
    soundfile.write(out, noise, 16_000, format="FLAC")
    return out.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, content), in that order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def pairs(count: int, start: int = 0, label: str | None = None) -> list[tuple[str, bytes]]:
    """Pictures with words, and json with a label; every fourth has a clip."""
    members = []
    for i in range(start, start + count):
        members += [(f"{i:04d}.png", png(i, (16 + i % 5, 16))), (f"{i:04d}.txt", f"thing {i} of the world".encode())]
        members.append((f"{i:04d}.json", json.dumps({"kind": label or ("cat" if i % 4 else "dog")}).encode()))
        if i % 4 == 0:
            members.append((f"{i:04d}.wav", wav(800 + 160 * (i % 7), pitch=200 + 20 * i)))
    return members


GOOD_IN_FAULTY = 20
BAD_IN_FAULTY = {
    "cut-picture": "image",  # measured by its header, bad only when decoded
    "no-picture": "image",
    "bad-text": "text",
    "bad-json": "meta",
    "twice": "two members",
    "alien": "no member with a mapped extension",
    "cut-clip": "audio",
}


def faulty_members() -> list[tuple[str, bytes]]:
    """20 good samples, one of each fault of BAD_IN_FAULTY, a pickle, a loose file, and a key that comes back."""
    noise = png(99, (64, 64))
    clip = flac()
    planted = [
        ("cut-picture.png", noise[: len(noise) // 2]),
        ("cut-picture.txt", b"half a picture"),
        ("no-picture.png", b"GIF89a, they said"),
        ("bad-text.png", png(1)),
        ("bad-text.txt", b"\xff\xfe\xfa"),
        ("bad-json.png", png(2)),
        ("bad-json.json", b"{no json"),
        ("twice.png", png(3)),
        ("twice.png", png(4)),
        ("alien.npy", b"\x93NUMPY"),
        ("cut-clip.flac", clip[: len(clip) // 2]),
        ("cut-clip.txt", b"half a clip"),
        ("0003.pkl", b"cos\nsystem\n(S'touch pwned'\ntR."),
        ("README", b"of no sample"),
    ]
    return [*pairs(GOOD_IN_FAULTY), *planted, ("0000.png", png(5)), ("0000.txt", b"back again")]


CONFIG = """\
run: {name: demo, max_steps: 2}
shards:
  window_samples: 8
  sources:
    - {name: cats, shards: good/cats-*.tar}
    - {name: dogs, shards: good/dogs-*.tar, weight: 2}
batches: {tokenizer: tok, rows_per_step: 2, micro_rows: 2, row_tokens: 64, max_samples_per_row: 8}
samples:
  image: {size: 16, resize: random_resized_crop, min_crop_frac: 0.5}
  targets: {kind: {key: kind, names: [cat, dog]}}
encoders:
  vision: {name: vit_tiny_patch16_224, options: {patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}
  audio: {hidden_size: 16, num_layers: 1, num_heads: 2}
  text: {kind: mean, hidden_size: 16}
fusion: {kind: none}
objectives:
  contrastive: {pairs: [image-text], embed_dim: 8}
engine: {zero_stage: 0, precision: fp32, lr: 1e-3}
tracking: {log_every_steps: 1, wandb: {mode: off}}
"""


def chat_members() -> list[tuple[str, bytes]]:
    """A caption with a prompt, a chat about two pictures and a clip, a document, and a picture that is cut."""
    chat = [
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "who is this"}]},
        {"role": "assistant", "content": "a heron it is"},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "and <b>that</b>"}],
        },
        {"role": "assistant", "content": "größer 鷺"},
    ]
    document = [{"role": "document", "content": [{"type": "text", "text": "once"}, {"type": "image"}]}]
    noise = png(98, (64, 64))
    return [
        ("cap.png", png(1)),
        ("cap.txt", b"a thing of the world"),
        ("cap.json", json.dumps({"prompt": "describe:", "kind": "cat"}).encode()),
        ("chat.0.png", png(2)),
        ("chat.1.png", png(3)),
        ("chat.wav", wav(3200)),
        ("chat.json", json.dumps({"messages": chat}).encode()),
        ("doc.0.png", png(4)),
        ("doc.json", json.dumps({"messages": document}).encode()),
        ("half.png", noise[: len(noise) // 2]),
        ("half.txt", b"half a picture"),
        ("nothing.png", b"none"),
        ("short.txt", b"x"),
    ]


TRUNK_CONFIG = """\
run: {name: rows, max_steps: 2}
shards:
  window_samples: 6
  sources:
    - {name: talk, shards: talk.tar, filters: {min_text_chars: 3}}
batches: {tokenizer: tok, rows_per_step: 1, row_tokens: 160, max_samples_per_row: 8}
samples:
  image: {size: 16}
  targets: {kind: {key: kind, names: [cat, dog]}}
encoders:
  vision: {name: vit_tiny_patch16_224, options: {patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}
  audio: {hidden_size: 16, num_layers: 1, num_heads: 2}
fusion:
  kind: interleave
  trunk: {family: llama, hidden_size: 16, intermediate_size: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2}
objectives: {next_token: {}}
engine: {zero_stage: 0, precision: fp32, lr: 1e-3}
"""
