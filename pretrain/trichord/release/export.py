"""A trained model as a Hugging Face folder that loads without Trichord's run config, data or checkpoints.

config.json, model*.safetensors, generation_config.json   for `AutoModel...`, after `import trichord.fusion.hf`
tokenizer.json, tokenizer_config.json                     for `AutoTokenizer`
preprocessor_config.json                                  what pixels and waveforms have to look like
trunk/                                                    the language model alone, for plain transformers
README.md                                                 the model card
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trichord.batches.tokenizer import TextTokenizer
from trichord.core.errors import CheckpointError, ConfigError
from trichord.core.log import get_logger
from trichord.encoders.config import EncodersConfig
from trichord.fusion.config import FusionConfig
from trichord.fusion.hf import TrichordForConditionalGeneration, TrichordModel
from trichord.fusion.hf_config import TrichordConfig, build_from_config
from trichord.fusion.model import Trichord
from trichord.fusion.trunk import CausalLM, trunk_config
from trichord.layers.stored import stored_buffers, stored_tensors
from trichord.objectives.config import ObjectivesConfig
from trichord.release.card import render_card
from trichord.release.coverage import compare
from trichord.samples.config import SamplesConfig

log = get_logger(__name__)

MAX_SHARD_SIZE = "5GB"
PREPROCESSOR_FILE = "preprocessor_config.json"


class ModelLeaves(Protocol):
    """The part of a run config that says what the model is; `RunConfig` has it."""

    @property
    def encoders(self) -> EncodersConfig: ...
    @property
    def fusion(self) -> FusionConfig: ...
    @property
    def objectives(self) -> ObjectivesConfig: ...
    @property
    def samples(self) -> SamplesConfig: ...


def export_checkpoint(
    weights: Mapping[str, Tensor],
    config: ModelLeaves,
    tokenizer: TextTokenizer,
    out_dir: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the folder described above. It appears whole or not at all.

    weights: every parameter and stored buffer by its name in `Trichord`, as `stored_tensors` has them.
    dtype: of the parameters; buffers, such as running statistics, stay fp32.
    facts: lines for the model card, such as run name and step.

    Raises:
        ConfigError: `out_dir` exists, or cannot be written.
        CheckpointError: the weights are not those of the configured model.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise ConfigError(f"{out_dir} exists already; an export never overwrites: name a new folder, or remove it")
    hf_config = describe(config, tokenizer)
    with torch.device("meta"):
        model = build_from_config(hf_config)
    report = compare(
        {n: tuple(t.shape) for n, t in stored_tensors(model).items()}, {n: tuple(w.shape) for n, w in weights.items()}
    )
    if not report.complete:
        raise CheckpointError(f"the weights are not those of the configured model: {report.summary()}")
    buffers = stored_buffers(model)
    _assign(model, {n: t.detach().to(torch.float32 if n in buffers else dtype) for n, t in weights.items()})
    partial = out_dir.with_name(f".{out_dir.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        _write(partial, model, hf_config, config, tokenizer, facts or {})
        os.rename(partial, out_dir)
    except OSError as error:
        raise ConfigError(f"cannot write the export {out_dir}: {error}; choose a folder on a disk with room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("exported %d tensors to %s", len(weights), out_dir)
    return out_dir


def describe(config: ModelLeaves, tokenizer: TextTokenizer) -> TrichordConfig:
    """The transformers config of the model that a run config describes."""
    vocab_size, special = tokenizer.vocab_size, tokenizer.special_ids
    text_config = trunk_config(config.fusion.trunk, vocab_size, special) if config.fusion.trunk else None
    return TrichordConfig.from_leaves(
        config.encoders, config.fusion, config.objectives, config.samples, text_config, vocab_size, special
    )


def _assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give meta-built modules their weights without a copy, and tie again what was tied."""
    result = model.load_state_dict(dict(weights), strict=False, assign=True)
    trunk = getattr(model, "trunk", None)
    tied = "trunk.lm_head.weight"
    if trunk is not None and tied in result.missing_keys:
        trunk.lm_head.weight = trunk.model.embed_tokens.weight
    left = [name for name in result.missing_keys if name != tied]
    if left:
        raise CheckpointError(f"the model has buffers that no checkpoint holds: {left[:3]}")


def _write(
    folder: Path,
    model: Trichord,
    hf_config: TrichordConfig,
    config: ModelLeaves,
    tokenizer: TextTokenizer,
    facts: Mapping[str, Any],
) -> None:
    wrapper = TrichordModel if model.trunk is None else TrichordForConditionalGeneration
    wrapper(hf_config, model).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save(folder)
    if model.trunk is not None:
        _write_trunk(folder / "trunk", model.trunk, hf_config)
        tokenizer.save(folder / "trunk")
    (folder / PREPROCESSOR_FILE).write_text(json.dumps(_preprocessor(config), indent=2, sort_keys=True) + "\n")
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        room = name.split(".", 1)[0]
        counts[room] = counts.get(room, 0) + parameter.numel()
    (folder / "README.md").write_text(render_card(hf_config, counts, facts), encoding="utf-8")


def _write_trunk(folder: Path, trunk: CausalLM, hf_config: TrichordConfig) -> None:
    """The trunk as transformers itself builds it: same names, same weights, none of our parts."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(trunk.config)(**trunk.config.to_dict()))
    plain.load_state_dict(trunk.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)


def _preprocessor(config: ModelLeaves) -> dict[str, Any]:
    """What the model expects of its inputs. Normalisation and log-mel happen inside the model."""
    image, audio = config.samples.image, config.samples.audio
    facts: dict[str, Any] = {}
    if config.encoders.vision is not None:
        facts["image"] = {
            "size": [image.size, image.size],
            "resize": image.resize,
            "dtype": "uint8",
            "layout": "channels, height, width",
            "normalised_in_model": {"mean": image.mean, "std": image.std},
        }
    if config.encoders.audio is not None:
        facts["audio"] = {
            "sample_rate_hz": audio.sample_rate,
            "channels": 1,
            "dtype": "int16",
            "max_seconds": audio.max_seconds,
            "log_mel_in_model": config.encoders.audio.mel.model_dump(),
        }
    return facts
