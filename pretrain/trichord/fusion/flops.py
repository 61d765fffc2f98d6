"""How much work a row is, as far as rows differ: what the loader deals rows to ranks by."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from trichord.fusion.model import Trichord


def row_cost(model: Trichord, audio_tokens: Callable[[int], int] | None) -> Callable[[int, int, int], float]:
    """(stream tokens, images, audio samples) of a row -> its forward FLOPs, 2 per parameter and token (Kaplan et al.
    2020, section 2.1), attention left out.

    audio_tokens: samples -> tokens, of the audio tower. A row's slack runs through the trunk like its tokens, so what
    tells rows apart is mostly the towers' work.
    """
    per_image = 2.0 * _parameters(model.vision) * (model.vision.tokens_per_image if model.vision is not None else 0)
    per_token = 2.0 * (_parameters(model.trunk) + _parameters(model.text))
    per_audio_token = 2.0 * _parameters(model.audio)

    def cost(tokens: int, images: int, audio_samples: int) -> float:
        clips = audio_tokens(audio_samples) if audio_tokens is not None and audio_samples else 0
        return per_token * tokens + per_image * images + per_audio_token * clips

    return cost


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
