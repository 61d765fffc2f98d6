"""Config of the objectives room: what is learned, and with what weight."""

from typing import Literal

from pydantic import Field, model_validator

from trichord.core.leaf import Leaf

Pair = Literal["image-text", "audio-text", "image-audio"]


class NextTokenConfig(Leaf):
    """Cross-entropy of the next text token, given all before it (images and audio included)."""

    weight: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target spread over the vocabulary. Training only: evaluation is the plain cross-entropy."""
    z_loss: float = Field(default=0.0, ge=0)
    """Times the squared log of the softmax's denominator (PaLM, Chowdhery et al. 2022: 1e-4). Training only."""


class ContrastiveConfig(Leaf):
    """Agreement of the towers over the whole global batch; items with equal groups are all positives."""

    weight: float = Field(default=1.0, gt=0)
    kind: Literal["infonce", "sigmoid"] = "infonce"
    pairs: tuple[Pair, ...] = Field(default=("image-text", "audio-text", "image-audio"), min_length=1)
    embed_dim: int = Field(default=256, ge=1)
    init_temperature: float = Field(default=0.07, gt=0)
    init_logit_bias: float = -10.0
    """Only for kind sigmoid (SigLIP, Zhai et al. 2023)."""
    max_logit_scale: float = Field(default=100.0, gt=0)


class ObjectivesConfig(Leaf):
    """At least one objective."""

    next_token: NextTokenConfig | None = None
    contrastive: ContrastiveConfig | None = None

    @model_validator(mode="after")
    def _at_least_one(self):
        if self.next_token is None and self.contrastive is None:
            raise ValueError("at least one of next_token, contrastive must be set")
        return self
