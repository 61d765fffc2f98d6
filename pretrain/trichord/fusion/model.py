"""`Trichord`: towers, connectors and trunk as one module that knows only `PackedBatch`.

The modality rule: every forward calls every parametrised module once, in one order, whatever the batch holds, and the
output of every head, connector and scale reaches `ModelOutput.placeholder`, times zero. So every rank runs the same
collectives in the forward and in the backward pass, and every trainable parameter has a gradient, zero where its
modality is absent.

Ranks of a sequence-parallel group hold the same batch and compute a part each (`PackedBatch.own`).

Shapes: T packed tokens, S segments, I images, A clips, P patches, D hidden, E embed_dim; each of this rank's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from trichord.batches.packed_batch import PackedBatch
from trichord.batches.sequence_part import Bounds, ItemParts
from trichord.core.errors import ConfigError
from trichord.encoders.audio import AudioTower
from trichord.encoders.config import EncodersConfig
from trichord.encoders.padding import flatten_items, masked_mean
from trichord.encoders.text import TextTower
from trichord.encoders.vision import VisionTower
from trichord.fusion.config import FusionConfig, RoomName
from trichord.fusion.connector import Connector
from trichord.fusion.late import EmbeddingHead, LogitScale
from trichord.fusion.splice import rows_in_stream, select_rows, splice
from trichord.fusion.trunk import CausalLM, build_trunk, padded_vocab_size, run_packed
from trichord.layers.blocks import block_lists
from trichord.layers.config import LayersConfig
from trichord.layers.recompute import Recompute, recompute_blocks
from trichord.layers.selection import select_kernels
from trichord.layers.sequence import SequenceGroup
from trichord.objectives.config import ObjectivesConfig
from trichord.samples.config import SamplesConfig

ROOMS: tuple[RoomName, ...] = get_args(RoomName)
_ROOM_OF = {"connectors": "connector", "logit_scale": "heads"}


def param_room(name: str) -> str:
    """The room of a parameter by its name in `Trichord`: one of `ROOMS`."""
    first = name.split(".", 1)[0]
    room = _ROOM_OF.get(first, first)
    if room not in ROOMS:
        raise ValueError(f"parameter {name!r} belongs to no room of {ROOMS}")
    return room


@dataclass(frozen=True)
class ModelOutput:
    """What the objectives need.

    next_token_loss_sum: () fp32, cross-entropy summed over the labelled positions, in training with the smoothing and
        the z-loss that the objective asks for, and by the weight of each label; None without trunk or objective.
    next_token_losses (K,) fp32, without gradient: the same, label by label, unweighed; None where there is no label.
    image_embeds (I, E), audio_embeds (A, E), text_embeds (S, E): fp32 of length 1, segments without text all 0; None
        without a contrastive objective or tower.
    logit_scale, logit_bias: (1,) fp32; None without a contrastive objective.
    placeholder: () fp32, always 0. It MUST be added to the loss: it is how modules without items get zero gradients.
    """

    next_token_loss_sum: Tensor | None
    next_token_losses: Tensor | None
    image_embeds: Tensor | None
    audio_embeds: Tensor | None
    text_embeds: Tensor | None
    logit_scale: Tensor | None
    logit_bias: Tensor | None
    placeholder: Tensor


@dataclass
class _Features:
    """A tower's output over its items; a placeholder item where there are none. lengths: tokens per item."""

    padded: Tensor
    lengths: list[int]
    num_items: int

    @property
    def real_lengths(self) -> list[int]:
        return self.lengths[: self.num_items]


class _Anchors:
    """The modality rule for one call of any module: its output, times zero, stays in the graph of the loss."""

    def __init__(self, device: torch.device):
        self.total = torch.zeros((), device=device)

    def run(self, module: nn.Module, *inputs: Any) -> Any:
        """Call a module, on this rank's items or on a placeholder, so that it runs backwards on every rank too. Returns
        its output, a tensor or several."""
        output = module(*inputs)
        for tensor in (output,) if isinstance(output, Tensor) else output:
            self.total = self.total + 0.0 * tensor.float().sum()
        return output


class Trichord(nn.Module):
    """See the module's docstring. Build it with `build_model`."""

    def __init__(
        self,
        vision: VisionTower | None,
        audio: AudioTower | None,
        text: TextTower | None,
        trunk: CausalLM | None,
        fusion: FusionConfig,
        objectives: ObjectivesConfig,
        special: Mapping[str, int],
    ):
        super().__init__()
        self.vision, self.audio, self.text, self.trunk = vision, audio, text, trunk
        self.bidirectional_images = fusion.bidirectional_images
        self.special = dict(special)
        self.sequence: SequenceGroup | None = None
        """The ranks that share batches with this one, where the run has such groups."""
        widths = {name: tower.hidden_size for name, tower in (("image", vision), ("audio", audio)) if tower is not None}
        self.connectors = nn.ModuleDict()
        if trunk is not None:
            if objectives.next_token is not None:
                trunk.lm_head.label_smoothing = objectives.next_token.label_smoothing
                trunk.lm_head.z_loss = objectives.next_token.z_loss
            width = trunk.config.hidden_size
            self.connectors.update({k: Connector(fusion.connector, v, width) for k, v in widths.items()})
        self.heads = nn.ModuleDict()
        self.logit_scale: LogitScale | None = None
        if objectives.contrastive is not None:
            if text is not None:
                widths["text"] = text.hidden_size
            dim = objectives.contrastive.embed_dim
            self.heads.update({name: EmbeddingHead(size, dim) for name, size in widths.items()})
            self.logit_scale = LogitScale(objectives.contrastive)

    def forward(self, batch: PackedBatch, towers_only: bool = False) -> ModelOutput:
        """One micro-batch. `towers_only`: towers, heads and scale, not connectors and trunk."""
        anchors = _Anchors(batch.input_ids.device)
        image = self._run_vision(batch)
        audio = self._run_audio(batch)
        embeds = {
            "image": self._embed(batch, image, "image", batch.own.images, anchors),
            "audio": self._embed(batch, audio, "audio", batch.own.audios, anchors),
        }
        embeds["text"] = self._embed_text(batch, anchors)
        scale = bias = None
        if self.logit_scale is not None:
            scale, bias = anchors.run(self.logit_scale)
        loss_sum = losses = None
        if self.trunk is not None and not towers_only:
            loss_sum, losses = self._next_token_loss(batch, self._stream(batch, image, audio, anchors))
        return ModelOutput(
            *(loss_sum, losses), embeds["image"], embeds["audio"], embeds["text"], scale, bias, anchors.total
        )

    def logits(self, batch: PackedBatch, positions: Tensor | None = None) -> Tensor:
        """Next-token logits, for evaluation and tests: (T, V) of the whole stream, or (K, V) of positions (K,) int64.

        The modality rule holds here too: equally many calls on all ranks run the same modules.
        """
        anchors = _Anchors(batch.input_ids.device)
        hidden = self._stream(batch, self._run_vision(batch), self._run_audio(batch), anchors)
        if positions is None:
            return self.trunk.lm_head(hidden)
        return self.trunk.lm_head(hidden[positions] if len(positions) else hidden[:1])[: len(positions)]

    def _run_vision(self, batch: PackedBatch) -> _Features | None:
        if self.vision is None:
            return None
        own = batch.own.own(batch.own.images.items)
        num_images = own.stop - own.start
        pixels = batch.pixels[own] if num_images else self.vision.placeholder(batch.input_ids.device)
        tokens = self.vision(pixels, num_images)
        return _Features(tokens, [self.vision.tokens_per_image] * pixels.shape[0], num_images)

    def _run_audio(self, batch: PackedBatch) -> _Features | None:
        if self.audio is None:
            return None
        own = batch.own.own(batch.own.audios.items)
        num_audios = own.stop - own.start
        waveforms, offsets, log_mels, mel_offsets = batch.clips(own)
        if log_mels.shape[0]:  # computed by the workers, for every clip
            tokens = self.audio(waveforms, offsets, log_mels, mel_offsets)
            return _Features(tokens, self.audio.count_mel_tokens(mel_offsets), num_audios)
        if not num_audios:
            waveforms, offsets = self.audio.placeholder(batch.input_ids.device)
        tokens = self.audio(waveforms, offsets)
        return _Features(tokens, self.audio.count_tokens(offsets), num_audios)

    def _embed(
        self, batch: PackedBatch, features: _Features | None, modality: str, parts: ItemParts, anchors: _Anchors
    ) -> Tensor | None:
        """Mean token -> head -> (items, E) of this rank's segments; no rows where there was only a placeholder."""
        if features is None or modality not in self.heads:
            return None
        embeds = anchors.run(self.heads[modality], masked_mean(features.padded, features.lengths))
        return self._exchange(batch, embeds[: features.num_items], parts.items, parts.contrasted)

    def _exchange(self, batch: PackedBatch, rows: Tensor, have: Bounds, need: Bounds) -> Tensor:
        """Rows made by the ranks that have the items, to those that need them. It runs backwards on all of them, since
        what takes the rows, the splice or the contrastive loss, keeps them in the graph also where there are none."""
        if batch.own.size == 1:
            return rows
        assert self.sequence is not None
        return self.sequence.exchange(rows, have, need)

    def _embed_text(self, batch: PackedBatch, anchors: _Anchors) -> Tensor | None:
        if self.text is None:
            return None
        own = batch.own.own(batch.own.segments)
        starts, lengths = batch.text_spans[own, 0], list(batch.text_lengths[own])
        num_texts = len(lengths)
        if not lengths:  # empty rows: one placeholder text of the stream's first token
            starts, lengths = batch.input_ids.new_zeros(1), [1]
        embeds = anchors.run(self.heads["text"], anchors.run(self.text, batch.input_ids, starts, lengths))
        has_text = (batch.text_spans[own, 1] > batch.text_spans[own, 0])[:, None]
        return torch.where(has_text, embeds[:num_texts], 0.0)

    def _stream(
        self, batch: PackedBatch, image: _Features | None, audio: _Features | None, anchors: _Anchors
    ) -> Tensor:
        """Token embeddings with feature tokens spliced in, through the trunk -> (T, D)."""
        own = batch.own
        stretch = own.own(own.tokens)
        embeds = self.trunk.model.embed_tokens(batch.input_ids[stretch])
        items = (
            ("image", image, own.images, batch.image_counts, batch.image_index),
            ("audio", audio, own.audios, batch.audio_counts, batch.audio_index),
        )
        for modality, features, parts, counts, index in items:
            if features is None:
                continue
            connected = anchors.run(self.connectors[modality], flatten_items(features.padded, features.lengths))
            rows = rows_in_stream(counts[own.own(parts.items)], features.real_lengths, modality)
            placed = self._exchange(batch, select_rows(connected, rows), parts.rows, parts.places)
            places = index[own.own(parts.places)]
            embeds = splice(embeds, placed, places - stretch.start if stretch.start else places)
        return run_packed(self.trunk, embeds, batch, self.bidirectional_images, self.sequence)

    def _next_token_loss(self, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum over all labels, and the loss of each without its gradient."""
        own = batch.own
        if own.count(own.labels):
            places = batch.label_index[own.own(own.labels)]
            labels, first = batch.labels[places], own.tokens[own.place]
            losses = self.trunk.lm_head(hidden[places - first if first else places], labels, reduction="none")
            if batch.label_weights is None or not self.training:
                return losses.sum(), losses.detach()
            return (losses * batch.label_weights[own.own(own.labels)]).sum(), losses.detach()
        # No label on this rank: one row times zero, so that the head and the trunk still run backwards.
        return 0.0 * self.trunk.lm_head(hidden[:1], torch.zeros_like(batch.labels[:1])), None

    def enable_activation_checkpointing(self, mode: Recompute = "full", every_blocks: int = 1) -> None:
        """Recompute activations block by block in the backward pass, in towers and trunk."""
        for blocks in block_lists(self):
            recompute_blocks(blocks, mode, every_blocks)


def build_model(
    encoders: EncodersConfig,
    fusion: FusionConfig,
    objectives: ObjectivesConfig,
    samples: SamplesConfig,
    layers: LayersConfig,
    vocab_size: int,
    special: Mapping[str, int],
) -> Trichord:
    """The model a run config describes, in fp32; under `torch.device("meta")` shapes only, no weights read.

    vocab_size: the tokenizer's; special: its ids as image_id, audio_id, pad_id, bos_id, eos_id.

    Raises:
        ConfigError: unknown model names, options or weights that do not fit.
    """
    select_kernels(layers.kernels)
    trunk = build_trunk(fusion.trunk, vocab_size, special) if fusion.trunk else None
    model = assemble_model(encoders, fusion, objectives, samples, trunk, vocab_size, special)
    frozen = {"vision": encoders.vision, "audio": encoders.audio, "text": encoders.text, "trunk": fusion.trunk}
    for room, leaf in frozen.items():
        if leaf is not None and leaf.freeze:
            getattr(model, room).requires_grad_(False)
    return model


def assemble_model(
    encoders: EncodersConfig,
    fusion: FusionConfig,
    objectives: ObjectivesConfig,
    samples: SamplesConfig,
    trunk: CausalLM | None,
    vocab_size: int,
    special: Mapping[str, int],
) -> Trichord:
    """As `build_model`, around a trunk that is there already, parts replaced; nothing is frozen."""
    _refuse_unused(encoders, fusion, objectives)
    return Trichord(
        VisionTower(encoders.vision, samples.image) if encoders.vision else None,
        AudioTower(encoders.audio, samples.audio) if encoders.audio else None,
        TextTower(encoders.text, padded_vocab_size(vocab_size)) if encoders.text else None,
        trunk,
        fusion,
        objectives,
        special,
    )


def _refuse_unused(encoders: EncodersConfig, fusion: FusionConfig, objectives: ObjectivesConfig) -> None:
    """A part no objective reads would be carried along untrained, and is most likely a mistake."""
    if encoders.text is not None and objectives.contrastive is None:
        raise ConfigError("encoders.text is only used by objectives.contrastive: set that, or encoders.text to null")
    if fusion.trunk is not None and objectives.next_token is None:
        raise ConfigError("fusion.trunk is only used by objectives.next_token: set that, or fusion.kind to none")
