"""Floating-point operations of the model, from plain counts of what it is given: 2 per multiplication and addition.

Only matrix products and convolutions count, as everywhere in the literature (PaLM, Chowdhery et al. 2022, appendix B):
norms, activations, rotations and the Fourier transform of the log-mel front end are left out. Attention counts the
pairs of query and key that the mask lets see each other, the vocabulary only the rows with a label.

    flops = step_flops(flop_table(model), counts)
    flops["trunk"].forward, flops["trunk"].backward, flops["trunk"].again

The backward pass of a linear map is one such product for its weights, where they learn, and one for its input, where
something below learns. What is computed a second time is kept apart: model FLOPs (MFU) leave it out, hardware FLOPs
(HFU) count it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trichord.encoders.image_flops import image_flops
from trichord.fusion.counts import Counts
from trichord.fusion.model import Trichord

# How much of an attention's forward pass its backward pass runs again. A fused backward makes the scores anew (1 of
# the forward's 2 products); ours makes the scores and the gradient of the weights once for the queries and once for
# keys and values: 7 products where 4 would do (kernels/trichord_kernels/ops/attention_backward.py).
_AGAIN_IN_FUSED_ATTENTION = 0.5
_AGAIN_IN_OUR_ATTENTION = 1.5


@dataclass(frozen=True)
class Flops:
    """FLOPs of one room: forward, backward, and again, what the backward pass computes a second time."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    @property
    def model(self) -> float:
        """What a step needs: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What a step executes: the numerator of HFU."""
        return self.forward + self.backward + self.again


@dataclass(frozen=True)
class Piece:
    """Work of one kind in one room.

    unit: the field of `Counts` it grows with; forward: FLOPs per unit; backward: times forward, 0 to 2; again: times
    forward, what the backward pass computes anew in any case; in_blocks: share of it that activation checkpointing of
    all blocks runs again. (A block's last product is not: torch stops where it has all that the backward pass needs.)
    """

    room: str
    unit: str
    forward: float
    backward: float
    again: float = 0.0
    in_blocks: float = 0.0


def flop_table(model: Trichord) -> list[Piece]:
    """The work of a model per unit of what it is given. Takes a model on any device, the meta device included, and one
    whose weights ZeRO-3 has split; call it again when rooms are frozen or thawed.

    A room learns where any of its parameters requires gradients: its first layer then has gradients on its input too,
    but for images and sound, whose input is data.
    """
    learns = _rooms_that_learn(model)
    pieces = [*_vision(model, learns), *_audio(model, learns), *_text(model, learns), *_heads(model, learns)]
    return [*pieces, *_connectors(model, learns), *_trunk(model, learns)]


def step_flops(
    table: Sequence[Piece], counts: Counts, *, blocks_again: float = 0.0, towers_twice: bool = False
) -> dict[str, Flops]:
    """Room -> FLOPs of a step on `counts` (of one rank or of all).

    blocks_again: share of the blocks' forward pass that activation checkpointing runs again, 0 to 1. towers_twice: the
    towers ran once more without gradients, as contrastive training does where it accumulates.
    """
    rooms: dict[str, Flops] = {}
    for piece in table:
        forward = piece.forward * getattr(counts, piece.unit)
        learns = piece.backward > 0
        again = (piece.again + blocks_again * piece.in_blocks) * learns
        again += towers_twice and piece.room in ("vision", "audio", "text", "heads") and piece.unit != "contrasts"
        rooms[piece.room] = rooms.get(piece.room, Flops()) + Flops(forward, piece.backward * forward, again * forward)
    return rooms


def forward_flops(model: Trichord, counts: Counts) -> dict[str, float]:
    """Room -> FLOPs of one forward pass."""
    return {room: flops.forward for room, flops in step_flops(flop_table(model), counts).items()}


def _rooms_that_learn(model: Trichord) -> dict[str, bool]:
    rooms = {"vision": model.vision, "audio": model.audio, "text": model.text, "trunk": model.trunk}
    rooms |= {"connector": model.connectors, "heads": model.heads}
    return {room: module is not None and any(p.requires_grad for p in module.parameters())
            for room, module in rooms.items()}  # fmt: skip


def _vision(model: Trichord, learns: Mapping[str, bool]) -> list[Piece]:
    if model.vision is None:
        return []
    flops, on = image_flops(model.vision), learns["vision"]
    return [
        Piece("vision", "images", flops.stem, 1.0 * on),
        Piece("vision", "images", flops.layers, 2.0 * on, in_blocks=1.0 - flops.last / max(flops.layers, 1.0)),
        Piece("vision", "images", flops.attention, 2.0 * on, _AGAIN_IN_FUSED_ATTENTION, in_blocks=1.0),
    ]


def _audio(model: Trichord, learns: Mapping[str, bool]) -> list[Piece]:
    if model.audio is None:
        return []
    encoder: Any = model.audio.encoder
    mel, on = model.audio.config.mel, learns["audio"]
    layers = getattr(encoder, "transformer", encoder).layers
    bins = mel.n_fft // 2 + 1
    return [
        Piece("audio", "frames_on_device", 2.0 * bins * mel.n_mels, 0.0),  # filter bank; without weights
        Piece("audio", "frames", _conv_flops(encoder.conv1), 1.0 * on),
        Piece("audio", "audio_tokens", _conv_flops(encoder.conv2), 2.0 * on),
        *_blocks("audio", "audio_tokens", "audio_pairs", layers, model.audio.hidden_size, on),
    ]


def _text(model: Trichord, learns: Mapping[str, bool]) -> list[Piece]:
    if model.text is None or model.text.transformer is None:  # a mean of embeddings has no product
        return []
    layers = model.text.transformer.layers
    return _blocks("text", "text_tokens", "text_pairs", layers, model.text.hidden_size, learns["text"])


def _blocks(room: str, tokens: str, pairs: str, layers: Any, width: int, learns: bool) -> list[Piece]:
    """Transformer blocks in which every token sees every other: 4 FLOPs per pair, layer and channel."""
    linear, last = _linear_flops(layers), sum(_linear_flops(layer.fc2) for layer in layers)
    return [
        Piece(room, tokens, linear, 2.0 * learns, in_blocks=1.0 - last / linear),
        Piece(room, pairs, 4.0 * width * len(layers), 2.0 * learns, _AGAIN_IN_FUSED_ATTENTION, in_blocks=1.0),
    ]


def _heads(model: Trichord, learns: Mapping[str, bool]) -> list[Piece]:
    """Projections, whose inputs need gradients for the norm before them; and the similarities of the loss."""
    units = {"image": "images", "audio": "clips", "text": "texts"}
    pieces = [
        Piece("heads", units[name], _linear_flops(head), _backward(learns["heads"], below=learns[tower]))
        for name, head in model.heads.items()
        for tower in [{"image": "vision"}.get(name, name)]
    ]
    if pieces:
        head: Any = next(iter(model.heads.values()))
        dim = head.proj.out_features
        pieces.append(Piece("heads", "contrasts", 2.0 * dim, 2.0, again=1.0))
    return pieces


def _connectors(model: Trichord, learns: Mapping[str, bool]) -> list[Piece]:
    pieces = []
    for name, connector in model.connectors.items():
        backward = _backward(learns["connector"], below=learns[{"image": "vision"}.get(name, name)])
        flops = _linear_flops(connector)
        if name == "image" and model.vision is not None:
            pieces.append(Piece("connector", "images", flops * model.vision.tokens_per_image, backward))
        else:
            pieces.append(Piece("connector", "audio_features", flops, backward))
    return pieces


def _trunk(model: Trichord, learns: Mapping[str, bool]) -> list[Piece]:
    if model.trunk is None:
        return []
    config, head = model.trunk.config, model.trunk.lm_head
    below = any(learns[room] for room in ("vision", "audio", "connector"))
    backward = _backward(learns["trunk"], below)
    pairs = "visible_pairs" if model.bidirectional_images else "causal_pairs"
    per_pair = 4.0 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    flows = 2.0 * (backward > 0)
    layers = model.trunk.model.layers
    linear, last = _linear_flops(layers), sum(_linear_flops(layer.mlp.down_proj) for layer in layers)
    return [
        Piece("trunk", "tokens", linear, backward, in_blocks=1.0 - last / linear),
        Piece("trunk", pairs, per_pair, flows, _AGAIN_IN_OUR_ATTENTION, in_blocks=1.0),
        Piece("trunk", "labels", 2.0 * head.in_features * head.out_features, backward, again=1.0),
    ]


def _backward(learns: bool, below: bool) -> float:
    """Products of the backward pass per product of the forward pass: for the weights and for the input."""
    return 2.0 if learns else 1.0 if below else 0.0


def _linear_flops(module: nn.Module) -> float:
    """FLOPs per token of all linear maps in a module, from their sizes: ZeRO-3 leaves their weights empty."""
    return sum(2.0 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _conv_flops(conv: nn.Conv1d) -> float:
    """FLOPs per output step."""
    return 2.0 * conv.kernel_size[0] * conv.in_channels * conv.out_channels / conv.groups


def row_cost(model: Trichord, audio_tokens: Callable[[int], int] | None) -> Callable[[int, int, int], float]:
    """(stream tokens, images, audio samples) of a row -> its forward FLOPs, 2 per parameter and token (Kaplan et al.
    2020, section 2.1), attention left out: what the loader deals rows to ranks by, as far as rows differ.

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
