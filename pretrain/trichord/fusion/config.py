"""Config of the fusion room: how features of several modalities meet."""

from typing import Literal

from pydantic import Field, model_validator

from trichord.core.leaf import Leaf

RoomName = Literal["vision", "audio", "text", "connector", "trunk", "heads"]
"""The parts of the model, by which parameters are counted, loaded and learn."""


class TrunkConfig(Leaf):
    """A transformers causal language model, built from these numbers or from a released checkpoint."""

    family: Literal["llama", "qwen3"] = "qwen3"
    hidden_size: int = Field(default=512, ge=1)
    intermediate_size: int = Field(default=1536, ge=1)
    num_layers: int = Field(default=8, ge=1)
    num_heads: int = Field(default=8, ge=1)
    num_kv_heads: int = Field(default=8, ge=1)
    head_dim: int | None = None
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_sections: tuple[int, int, int] | None = None
    """Rotary frequencies per axis (time, height, width), summing to head_dim / 2; null: as equal as possible."""
    tie_word_embeddings: bool = True
    weights: str | None = None
    """Folder, or `hub-id@revision`, of a released Llama or Qwen3 checkpoint; its own shape then holds. null: random."""
    freeze: bool = False

    @model_validator(mode="after")
    def _fits(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        # A released checkpoint brings its own head_dim; it is compared when it is built.
        if self.weights is None and self.rope_sections and 2 * sum(self.rope_sections) != self.resolved_head_dim:
            raise ValueError(
                f"rope_sections {self.rope_sections} must sum to head_dim / 2 = {self.resolved_head_dim // 2}"
            )
        return self

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads


class FusionConfig(Leaf):
    """`interleave`: feature tokens are spliced into the trunk's token stream. `none`: towers only."""

    kind: Literal["interleave", "none"] = "interleave"
    trunk: TrunkConfig | None = None
    connector: Literal["linear", "mlp"] = "mlp"
    bidirectional_images: bool = True
    """Tokens of one image see each other both ways; text and audio stay causal."""

    @model_validator(mode="after")
    def _trunk_where_needed(self):
        if (self.kind == "interleave") != (self.trunk is not None):
            need = "needs fusion.trunk" if self.trunk is None else "has no trunk; remove fusion.trunk"
            raise ValueError(f"fusion kind {self.kind!r} {need}")
        return self
