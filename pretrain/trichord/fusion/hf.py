"""`Trichord` as a transformers model: `from_pretrained`, `generate`, the Auto classes.

Importing this module registers the model type `trichord`; nothing is ever run from a hub repository. Weights keep their
training names below `model.`.

Shapes: B rows, L tokens, V vocabulary, I images, A clips, N samples of the longest clip, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from trichord.encoders.padding import flatten_items, masked_mean
from trichord.fusion.hf_config import TrichordConfig, build_from_config
from trichord.fusion.model import Trichord
from trichord.fusion.prompt import (
    expand_items,
    image_blocks,
    pad_left,
    pad_waveforms,
    prefill_mask,
    prompt_positions,
)
from trichord.fusion.splice import splice
from trichord.layers.loss import next_token_loss


class TrichordPreTrainedModel(PreTrainedModel):
    """Loading, saving and the towers; see the two classes below."""

    config_class = TrichordConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")  # pyright: ignore[reportAssignmentType]  as in its own models
    _supports_attention_backend = True
    _no_split_modules = {"LlamaDecoderLayer", "Qwen3DecoderLayer", "WhisperEncoderLayer", "Block"}  # noqa: RUF012

    def __init__(self, config: TrichordConfig, model: Trichord | None = None):
        """model: wrap these live modules instead of building new ones; their weights are shared, not copied."""
        super().__init__(config)
        if model is not None:
            for module in model.modules():  # else post_init gives fresh weights to what transformers did not make
                module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]  a flag, not a submodule
        self.model = build_from_config(config) if model is None else model
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"model.trunk.lm_head.weight": "model.trunk.model.embed_tokens.weight"}
        self._shapes_only = model is None and any(parameter.is_meta for parameter in self.parameters())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Our modules come initialised. After a build on the meta device, what a checkpoint lacked is left to do.
        if self._shapes_only:
            super()._init_weights(module)

    def initialize_weights(self) -> None:
        """As transformers calls it once the weights are in; then the tables of the vision tower that no file holds."""
        super().initialize_weights()
        if self._shapes_only and self.model.vision is not None:
            buffers = list(self.model.vision.buffers())
            if buffers and not any(buffer.is_meta for buffer in buffers):
                self.model.vision.refill_buffers()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, S, S) uint8 -> the vision tower's tokens (I, P, D)."""
        if self.model.vision is None:
            raise ValueError("pixel_values were given, but this model has no vision tower")
        return self.model.vision(pixel_values)

    def get_audio_features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, list[int]]:
        """(A, N) int16, (A,) -> the audio tower's tokens (A, T, D) and how many belong to each clip."""
        if self.model.audio is None:
            raise ValueError("waveforms were given, but this model has no audio tower")
        lengths = waveform_lengths.tolist()
        flat = torch.cat([clip[:length] for clip, length in zip(waveforms, lengths)])
        offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        return self.model.audio(flat, offsets), self.model.audio.count_tokens(offsets)


class TrichordModel(TrichordPreTrainedModel):
    """The towers as feature extractors: `get_image_features`, `get_audio_features`, `embed_*`."""

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, S, S) uint8 -> (I, E) fp32 of length 1."""
        return self.model.heads["image"](self.get_image_features(pixel_values).float().mean(1))

    def embed_audio(self, waveforms: Tensor, waveform_lengths: Tensor) -> Tensor:
        """(A, N) int16, (A,) -> (A, E) fp32 of length 1."""
        return self.model.heads["audio"](masked_mean(*self.get_audio_features(waveforms, waveform_lengths)))

    def embed_text(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token rows, without [BOS] and [EOS], none empty -> (B, E) fp32 of length 1."""
        if self.model.text is None:
            raise ValueError("this model has no text tower")
        lengths = [len(row) for row in rows]
        stream = torch.tensor([token for row in rows for token in row], device=self.device)
        starts = torch.tensor([0, *lengths[:-1]], device=self.device).cumsum(0)
        return self.model.heads["text"](self.model.text(stream, starts, lengths))


class TrichordForConditionalGeneration(TrichordPreTrainedModel, GenerationMixin):
    """Text from text, images and audio. Image and audio tokens stand in `input_ids` where the features go."""

    def __init__(self, config: TrichordConfig, model: Trichord | None = None):
        super().__init__(config, model)
        if self.model.trunk is None:
            raise ValueError("this model has no trunk (fusion.kind none): load it with AutoModel, it cannot generate")
        special = config.special or {}
        marks = {special[name] for name in ("image_id", "audio_id", "pad_id", "bos_id") if name in special}
        never = sorted(marks - {special.get("eos_id")})  # GPT-style tokenizers use one token for several of them
        unused = range(config.tokenizer_size, self.model.trunk.config.vocab_size)
        self.generation_config = GenerationConfig(
            bos_token_id=special.get("bos_id"),
            eos_token_id=special.get("eos_id"),
            pad_token_id=special.get("pad_id"),
            suppress_tokens=[*never, *unused] or None,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.trunk.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.model.trunk.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        waveforms: Tensor | None = None,
        waveform_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over padded rows.

        input_ids (B, L); attention_mask (B, past + L), 0 at padding; position_ids (3, B, L) or (B, L), None: derived,
        which needs all tokens at once; pixel_values (I, 3, S, S) uint8 and waveforms (A, N) int16 with
        waveform_lengths (A,), row by row in order; labels (B, L) aligned with input_ids, -100 ignored.
        Returns logits (B, L, V), with `logits_to_keep` only the last so many, and in training with labels none; loss is
        the mean over labels.
        """
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], past_length + input_ids.shape[1])
        if position_ids is None:
            if past_length:
                raise ValueError(f"position_ids are needed to go on after {past_length} cached tokens")
            position_ids = self._positions(input_ids, attention_mask)
        out = self.model.trunk.model(
            inputs_embeds=self._embed(input_ids, pixel_values, waveforms, waveform_lengths),
            attention_mask=self._mask(input_ids, attention_mask, past_length),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        head, hidden = self.model.trunk.lm_head, out.last_hidden_state
        loss = None if labels is None else next_token_loss(head, hidden, labels)
        # In training nobody reads the logits, and all of them at once are most of the memory of a step.
        logits = None if self.training and labels is not None else head(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def prepare_prompts(
        self,
        pixels: Sequence[Tensor | None],
        waveforms: Sequence[Tensor | None],
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """Inputs of `generate` for samples laid out as in training: [BOS] image audio prompt.

        pixels: (3, S, S) uint8 or None per row; waveforms: (n,) int16 or None; prompts: token ids, None: no prompts.
        """
        special, model = self.config.special, self.model
        rows: list[list[int]] = []
        for number, (image, clip) in enumerate(zip(pixels, waveforms, strict=True)):
            row = [special["bos_id"]]
            if image is not None:
                row += [special["image_id"]] * model.vision.tokens_per_image
            if clip is not None:
                row += [special["audio_id"]] * model.audio.count_tokens([0, clip.shape[0]])[0]
            rows.append(row + list(prompts[number] if prompts else ()))
        input_ids, attention_mask = pad_left(rows, special["pad_id"])
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if images := [image for image in pixels if image is not None]:
            inputs["pixel_values"] = torch.stack(images)
        if clips := [clip for clip in waveforms if clip is not None]:
            inputs["waveforms"], inputs["waveform_lengths"] = pad_waveforms(clips)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        waveforms: Tensor | None,
        waveform_lengths: Tensor | None,
    ) -> Tensor:
        embeds = self.get_input_embeddings()(input_ids)
        special = self.config.special
        if pixel_values is not None and pixel_values.shape[0]:
            features = self.model.connectors["image"](self.get_image_features(pixel_values)).flatten(0, 1)
            embeds = _place(embeds, features, input_ids == special["image_id"], "image")
        if waveforms is not None and waveforms.shape[0]:
            if waveform_lengths is None:
                raise ValueError("waveforms were given without waveform_lengths, the samples of each clip")
            features = flatten_items(*self.get_audio_features(waveforms, waveform_lengths))
            features = self.model.connectors["audio"](features)
            embeds = _place(embeds, features, input_ids == special["audio_id"], "audio")
        return embeds

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        grid = self.model.vision.grid if self.model.vision is not None else None
        return prompt_positions(input_ids, attention_mask, self.config.special["image_id"], grid)

    def _mask(self, input_ids: Tensor, attention_mask: Tensor, past_length: int) -> Tensor:
        """The 2-D mask where plain causal attention is meant; else 4-D, with images that see themselves both ways."""
        if self.model.vision is None or not self.model.bidirectional_images:
            return attention_mask
        blocks = image_blocks(input_ids, self.config.special["image_id"], self.model.vision.tokens_per_image)
        if input_ids.shape[1] == 1 or not bool((blocks >= 0).any()):
            return attention_mask
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            raise ValueError(
                "prompts with images need a 2-D attention_mask: their tokens see each other both ways. Static caches "
                "bring their own mask and are not supported; leave cache_implementation at its default"
            )
        return prefill_mask(blocks, attention_mask, past_length)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        input_ids, mask = model_kwargs.get("input_ids", inputs_tensor), model_kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] != input_ids.shape[1]:
            raise ValueError(
                f"got {input_ids.shape[1]} tokens for an attention_mask of {mask.shape[1]}; "
                "give all tokens, those in the cache too"
            )
        return self._positions(input_ids, mask)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        last = model_kwargs["position_ids"][..., -1:].amax(0)  # after an image the largest axis counts
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        steps = torch.arange(1, num_new_tokens + 1, device=last.device)
        model_kwargs["position_ids"][..., -num_new_tokens:] = last + steps
        return model_kwargs

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            for name in ("pixel_values", "waveforms", "waveform_lengths"):
                inputs.pop(name, None)  # they are in the cache
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Beams: items go with their rows, of which some have none and some several."""
        items = {k: kwargs.pop(k) for k in ("pixel_values", "waveforms", "waveform_lengths") if k in kwargs}
        if expand_size > 1 and input_ids is not None:
            for name, tensor in items.items():
                if tensor is not None:
                    counts = self._items_per_row(input_ids, name, items)
                    items[name] = expand_items(tensor, counts, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **items}

    def _items_per_row(self, input_ids: Tensor, name: str, items: dict[str, Any]) -> list[int]:
        special = self.config.special
        if name == "pixel_values":
            places = (input_ids == special["image_id"]).sum(1).tolist()
            return [count // self.model.vision.tokens_per_image for count in places]
        places, counts = (input_ids == special["audio_id"]).sum(1).tolist(), []
        offsets = [0, *items["waveform_lengths"].cumsum(0).tolist()]
        lengths = iter(self.model.audio.count_tokens(offsets))
        for left in places:
            counts.append(0)
            while left > 0:
                left -= next(lengths)
                counts[-1] += 1
        return counts


def _place(embeds: Tensor, features: Tensor, places: Tensor, what: str) -> Tensor:
    """embeds (B, L, D) with features (R, D) at the R true entries of places (B, L), in reading order."""
    index = places.flatten().nonzero()[:, 0]
    if index.shape[0] != features.shape[0]:
        raise ValueError(
            f"input_ids have {index.shape[0]} {what} tokens, but the {what} items give {features.shape[0]} features"
        )
    return splice(embeds.flatten(0, 1), features, index).view_as(embeds)


def wrap_model(model: Trichord, config: TrichordConfig) -> TrichordForConditionalGeneration:
    """A live training model with `generate`; weights are shared, and nothing is initialised again."""
    return TrichordForConditionalGeneration(config, model)


AutoConfig.register(TrichordConfig.model_type, TrichordConfig)
AutoModel.register(TrichordConfig, TrichordModel)
AutoModelForCausalLM.register(TrichordConfig, TrichordForConditionalGeneration)
AutoModelForImageTextToText.register(TrichordConfig, TrichordForConditionalGeneration)
