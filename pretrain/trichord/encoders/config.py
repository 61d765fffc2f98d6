"""Config of the encoders room: the towers that turn pixels, waveforms and text into features."""

from typing import Any, Literal

from pydantic import Field, model_validator

from trichord.core.leaf import Leaf


class VisionConfig(Leaf):
    """A timm vision transformer or convolutional network, fed with squares of `samples.image.size`."""

    name: str = "vit_base_patch16_siglip_224"
    """Any timm model that returns patch tokens (vit_..., deit_...) or a feature map (resnet50, convnext_base)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to `timm.create_model` (embed_dim, depth, num_heads, patch_size, ...)."""
    weights: str | None = None
    """Path of a safetensors file or folder to start from; null: random."""
    batch_stats: Literal["sync", "frozen"] = "sync"
    """What batch norms (ResNets have them) normalise by in training. `sync`: statistics over the real items of all
    ranks in this micro-step. `frozen`: the stored ones, as of `weights`. Without such norms: no difference."""
    freeze: bool = False
    """No parameter of it learns, and its batch norms, if any, keep their statistics."""


class MelConfig(Leaf):
    """The log-mel front end (Whisper's definition: Slaney scale, log10, floor 8 below the maximum)."""

    n_mels: int = Field(default=80, ge=1)
    n_fft: int = Field(default=400, ge=16)
    hop_length: int = Field(default=160, ge=1)


class AudioEncoderConfig(Leaf):
    """`mel_transformer`: two convolutions and a small transformer, to train from scratch.
    `whisper`: the transformers Whisper encoder at the clip's own length."""

    kind: Literal["mel_transformer", "whisper"] = "mel_transformer"
    mel: MelConfig = MelConfig()
    hidden_size: int = Field(default=384, ge=1)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=6, ge=1)
    stride: int = Field(default=2, ge=1)
    """Mel frames per audio token. Whisper's is 2."""
    weights: str | None = None
    """Folder of a transformers Whisper checkpoint to start from (kind whisper); null: random."""
    freeze: bool = False

    @model_validator(mode="after")
    def _fits(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.kind == "whisper" and self.stride != 2:
            raise ValueError(f"Whisper's encoder has stride 2, got stride {self.stride}; leave it out")
        return self


class TextEncoderConfig(Leaf):
    """`mean`: embedding and mean. `transformer`: embedding, bidirectional transformer, mean."""

    kind: Literal["mean", "transformer"] = "transformer"
    hidden_size: int = Field(default=384, ge=1)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=6, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    freeze: bool = False


class EncodersConfig(Leaf):
    """The towers; a missing one means the model has no such modality (text: no separate text tower)."""

    vision: VisionConfig | None = None
    audio: AudioEncoderConfig | None = None
    text: TextEncoderConfig | None = None
