"""The transformers config of a Trichord: all that is needed to build the model, and no path to anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trichord.encoders.config import EncodersConfig
from trichord.fusion.config import FusionConfig, TrunkConfig
from trichord.fusion.model import Trichord, assemble_model
from trichord.fusion.trunk import replace_parts
from trichord.objectives.config import ObjectivesConfig
from trichord.samples.config import SamplesConfig


class TrichordConfig(PretrainedConfig):
    """Everything needed to build the model without any other file.

    encoders, fusion, objectives, samples: the run config's leaves as plain dicts; text_config: the trunk's transformers
    config (None: towers only); tokenizer_size: ids the tokenizer knows; special: ids as pad_id, bos_id, eos_id,
    image_id, audio_id.
    """

    model_type = "trichord"

    encoders: Any = None
    fusion: Any = None
    objectives: Any = None
    samples: Any = None
    text_config: Any = None
    tokenizer_size: int = 0
    special: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, Mapping):
            fields = dict(self.text_config)
            self.text_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        if self.text_config is not None:
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        special = self.special or {}
        for name in ("pad", "bos", "eos"):
            kwargs.setdefault(f"{name}_token_id", special.get(f"{name}_id"))
        super().__post_init__(**kwargs)

    @classmethod
    def from_leaves(
        cls,
        encoders: EncodersConfig,
        fusion: FusionConfig,
        objectives: ObjectivesConfig,
        samples: SamplesConfig,
        text_config: PretrainedConfig | None,
        vocab_size: int,
        special: Mapping[str, int],
    ) -> TrichordConfig:
        """The config of a trained model. Paths of weights that training started from are left out."""
        fusion = _with_true_sizes(fusion, text_config)
        leaves = {"encoders": encoders, "fusion": fusion, "objectives": objectives, "samples": samples}
        fields: dict[str, Any] = {name: _without_start(leaf.model_dump(mode="json")) for name, leaf in leaves.items()}
        trunk = None if text_config is None else text_config.to_dict()
        return cls(**fields, text_config=trunk, tokenizer_size=vocab_size, special=dict(special))


def _without_start(fields: dict[str, Any]) -> dict[str, Any]:
    """Leaves without `weights` and `freeze`: how training began is no part of the model."""
    return {
        key: _without_start(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in ("weights", "freeze")
    }


def _with_true_sizes(fusion: FusionConfig, text_config: PretrainedConfig | None) -> FusionConfig:
    """The leaf with the sizes the trunk really has: one from a released checkpoint ignores those configured."""
    if fusion.trunk is None or text_config is None:
        return fusion
    trunk = TrunkConfig(
        family=text_config.model_type,  # pyright: ignore[reportArgumentType]  pydantic checks it
        hidden_size=text_config.hidden_size,
        intermediate_size=text_config.intermediate_size,
        num_layers=text_config.num_hidden_layers,
        num_heads=text_config.num_attention_heads,
        num_kv_heads=text_config.num_key_value_heads,
        head_dim=text_config.head_dim,
        rope_theta=text_config.rope_parameters["rope_theta"],
        rope_sections=fusion.trunk.rope_sections,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    return fusion.model_copy(update={"trunk": trunk})


def build_from_config(config: TrichordConfig) -> Trichord:
    """The modules a config describes, with new weights (or none, on the meta device)."""
    trunk = None
    fusion = FusionConfig.model_validate(config.fusion)
    if config.text_config is not None:
        # Without a dtype of its own the trunk follows the one asked of from_pretrained, like the rest.
        text_config = type(config.text_config)(**{**config.text_config.to_dict(), "dtype": None})
        sections = fusion.trunk.rope_sections if fusion.trunk else None
        trunk = replace_parts(AutoModelForCausalLM.from_config(text_config), sections)
    return assemble_model(
        EncodersConfig.model_validate(config.encoders),
        fusion,
        ObjectivesConfig.model_validate(config.objectives),
        SamplesConfig.model_validate(config.samples),
        trunk,
        config.tokenizer_size,
        config.special or {},
    )
