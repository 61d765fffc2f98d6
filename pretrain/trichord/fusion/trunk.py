"""The trunk: a transformers causal language model with our attention, norms, rotary positions and loss head.

Shapes: T packed tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trichord.batches.packed_batch import PackedBatch
from trichord.core.errors import ConfigError
from trichord.encoders.weights import StoredWeights, read_safetensors
from trichord.fusion.config import TrunkConfig
from trichord.layers.attention import NAME, register_attention
from trichord.layers.initial import SkipInitialValues, skips_initial_values
from trichord.layers.layout import PackedLayout
from trichord.layers.loss import replace_lm_head
from trichord.layers.rope import resolve_sections
from trichord.layers.sequence import SequenceGroup
from trichord.layers.swap import swap_decoder

# LlamaForCausalLM or Qwen3ForCausalLM, with parts replaced by ours: neither class would be the true type.
CausalLM: TypeAlias = Any

FAMILIES = ("llama", "qwen3")
_VOCAB_MULTIPLE = 8  # rows beyond the tokenizer's are never targets; they keep the vocabulary matmul aligned


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the trunk's embedding: the tokenizer's size rounded up to a multiple of 8."""
    return -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def trunk_config(config: TrunkConfig, vocab_size: int, special: Mapping[str, int]) -> Any:
    """The transformers config of the trunk: from our leaf, or the released checkpoint's own.

    special: token ids by name; of these pad_id, bos_id and eos_id matter here.

    Raises:
        ConfigError: there is no checkpoint, or it is of a kind that is not supported.
    """
    from transformers import LlamaConfig, Qwen3Config

    if config.weights is not None:
        released = _released_config(config)
        released.vocab_size = max(released.vocab_size, padded_vocab_size(vocab_size))
        return released
    family = {"llama": LlamaConfig, "qwen3": Qwen3Config}[config.family]
    return family(
        vocab_size=padded_vocab_size(vocab_size),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.resolved_head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        attention_dropout=0.0,
        pad_token_id=special.get("pad_id"),
        bos_token_id=special.get("bos_id"),
        eos_token_id=special.get("eos_id"),
    )


def _hub_arguments(weights: str) -> tuple[str, dict[str, Any]]:
    """`folder` or `hub-id@revision` -> what transformers' loaders take. Code from the hub is never run."""
    if Path(weights).exists():
        return weights, {"local_files_only": True}
    name, _, revision = weights.partition("@")
    return name, {"revision": revision or "main"}


def _released_config(config: TrunkConfig) -> Any:
    from transformers import AutoConfig

    name, arguments = _hub_arguments(str(config.weights))
    try:
        released = AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"fusion.trunk.weights {config.weights!r}: no transformers checkpoint there: {error}"
        ) from error
    if released.model_type not in FAMILIES:
        raise ConfigError(
            f"fusion.trunk.weights {config.weights!r} is a {released.model_type!r} model; expected one of {FAMILIES}"
        )
    if "sliding_attention" in (getattr(released, "layer_types", None) or ()):
        raise ConfigError(
            f"fusion.trunk.weights {config.weights!r} uses sliding-window attention, which is not supported"
        )
    return released


def build_trunk(config: TrunkConfig, vocab_size: int, special: Mapping[str, int]) -> CausalLM:
    """A LlamaForCausalLM or Qwen3ForCausalLM with our parts in place. Released weights are not read on the meta device,
    nor where all weights will be overwritten."""
    from transformers import AutoModelForCausalLM

    if config.weights is None or torch.get_default_device().type == "meta" or skips_initial_values():
        planned = trunk_config(config, vocab_size, special)
        trunk = AutoModelForCausalLM.from_config(planned, dtype=torch.float32)
    else:
        trunk = _load_released(config, vocab_size)
    return replace_parts(trunk, config.rope_sections)


def _load_released(config: TrunkConfig, vocab_size: int) -> CausalLM:
    """Not by `from_pretrained`, which holds the whole model at some moment, and many tensors twice."""
    from transformers import AutoModelForCausalLM

    released = _released_config(config)
    weights = _released_weights(config)
    with SkipInitialValues():
        trunk = AutoModelForCausalLM.from_config(released, dtype=torch.float32)
    own = dict(trunk.named_parameters())  # tied ones once
    missing = sorted(own.keys() - weights.keys())
    mismatched = sorted(n for n, p in own.items() if n in weights and weights.shapes[n] != tuple(p.shape))
    problems = {"missing keys": missing, "mismatched keys": mismatched}
    if missing or mismatched:
        raise ConfigError(
            f"fusion.trunk.weights {config.weights!r} is incomplete: "
            + ", ".join(f"{len(keys)} {kind} ({keys[0]})" for kind, keys in problems.items() if keys)
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    if released.vocab_size < padded_vocab_size(vocab_size):
        trunk.resize_token_embeddings(padded_vocab_size(vocab_size))
    return trunk


def _released_weights(config: TrunkConfig) -> StoredWeights:
    """The tensors of a released checkpoint under the names of a causal language model."""
    name, arguments = _hub_arguments(str(config.weights))
    try:
        folder = Path(name) if Path(name).exists() else _fetch(name, arguments["revision"])
        weights = read_safetensors(folder)
    except (OSError, ConfigError) as error:
        raise ConfigError(f"fusion.trunk.weights {config.weights!r} cannot be loaded: {error}") from error
    if not any(key.startswith("model.") for key in weights):  # saved as the decoder alone
        weights = weights.renamed(lambda key: f"model.{key}")
    return weights


def _fetch(name: str, revision: str) -> Path:
    """A snapshot of a hub repository, from the cache where there is no internet."""
    from huggingface_hub import snapshot_download

    files = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=files))


def replace_parts(trunk: CausalLM, sections: tuple[int, int, int] | None) -> CausalLM:
    """Our attention, rotary embedding, norms and loss head in a transformers causal LM; Parameters stay the same
    objects.

    Raises:
        ConfigError: the rotary type or the sections do not fit.
    """
    register_attention()
    trunk.set_attn_implementation(NAME)
    swap_decoder(trunk.model, resolve_sections(sections, trunk.config.head_dim))
    replace_lm_head(trunk)
    return trunk


def run_packed(
    trunk: CausalLM,
    embeds: Tensor,
    batch: PackedBatch,
    bidirectional_images: bool,
    sequence: SequenceGroup | None = None,
) -> Tensor:
    """embeds (T, D) of a packed stream -> last hidden states (T, D); of the stretch that is this rank's, where
    `sequence` shares the stream.

    The layout travels to the attention function as a keyword argument. The 4-D stand-in for a mask tells transformers
    that masks are settled: it would otherwise look for packing in the positions, which waits for the device.
    """
    spans = batch.span_ends if bidirectional_images else None
    layout = PackedLayout.build(batch.cu_seqlens, batch.segment_ids, spans)
    own = batch.own
    out = trunk.model(
        inputs_embeds=embeds[None],
        position_ids=batch.position_ids[:, None, own.own(own.tokens)],
        attention_mask=torch.empty((1, 1, 1, 1), dtype=torch.bool, device=embeds.device),
        use_cache=False,
        packed_layout=layout,
        sequence_group=sequence if own.size > 1 else None,
    )
    return out.last_hidden_state[0]
