"""Our kernels in a transformers model that is built already, by replacing modules; nothing is patched at import."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from trichord.core.errors import ConfigError
from trichord.layers.attention import NAME, register_attention
from trichord.layers.decoder import fuse_layer
from trichord.layers.loss import LMHead, next_token_loss, replace_lm_head
from trichord.layers.norm import replace_rms_norms
from trichord.layers.rope import Rotary, replace_rotary

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def swap_kernels(model: Any) -> Any:
    """Put our attention, rotary embedding with QK-norm, RMSNorm with residual sum, and loss into a transformers model.

    model: a causal language model, or its decoder alone, of one of `SUPPORTED`; it is changed and returned. Parameters
    stay the same objects under the same names, so optimizers, tied weights, checkpoints and `generate()` go on as
    before. In training `model(input_ids, labels=...)` returns the loss without ever holding all logits
    (`output.logits` is None); in evaluation it returns both, as transformers does. Attention weights are never there.

    Raises:
        ConfigError: the model's type, or its rotary type, is not supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in SUPPORTED:
        raise ConfigError(f"swap_kernels: expected a model of type {', '.join(SUPPORTED)}, got {kind!r}")
    swap_decoder(getattr(model, "model", model), sections=None)  # first: it refuses some models before it changes them
    register_attention()
    model.set_attn_implementation(NAME)
    if hasattr(model, "lm_head"):
        replace_lm_head(model)
        model.forward = MethodType(_forward, model)
    return model


def swap_decoder(decoder: Any, sections: tuple[int, int, int] | None) -> None:
    """Our rotary module, layers and norms in a decoder; sections: frequencies per position axis, None: one axis.

    Raises:
        ConfigError: the rotary type or the sections do not fit.
    """
    if isinstance(decoder.rotary_emb, Rotary):
        raise ConfigError("swap_kernels: this model holds our kernels already; swap once")
    replace_rotary(decoder, sections)
    decoder.layers = nn.ModuleList(fuse_layer(layer) for layer in decoder.layers)
    replace_rms_norms(decoder)


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> Any:
    """The causal LM's own forward, except in training with labels, where the head returns the loss."""
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    if labels is None or not self.training:
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if not isinstance(self.lm_head, LMHead):  # resized, or set anew: transformers makes a plain one
        replace_lm_head(self)
    num_items = kwargs.pop("num_items_in_batch", None)
    shift_labels = kwargs.pop("shift_labels", None)
    return_dict = kwargs.pop("return_dict", None)
    out = self.model(**inputs, **kwargs)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    loss = next_token_loss(self.lm_head, out.last_hidden_state[:, kept], labels, shift_labels, num_items)
    result = CausalLMOutputWithPast(
        loss=loss, past_key_values=out.past_key_values, hidden_states=out.hidden_states, attentions=out.attentions
    )
    return result.to_tuple() if return_dict is False else result
