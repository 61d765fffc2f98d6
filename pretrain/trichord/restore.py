"""A trained model back from a checkpoint: for evaluation, export, generation; and the checkpoint a rewind goes to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError

from trichord.batches.tokenizer import TextTokenizer, load_tokenizer
from trichord.batches.windows import ItemLengths
from trichord.checkpoints.contents import ExpectedModel
from trichord.checkpoints.load import check_shapes, load_weights, read_train_state, resolve_checkpoint
from trichord.checkpoints.manifest import TRAIN_STATE_FILE, Manifest, incomplete_reason, read_json, step_folders
from trichord.config.run import RunConfig
from trichord.core.dist import rank_facts
from trichord.core.errors import CheckpointError, TrichordError
from trichord.core.log import get_logger
from trichord.core.phase import set_phase
from trichord.encoders.lengths import audio_tokens, tower_lengths
from trichord.encoders.log_mel import clip_log_mel
from trichord.engine.together import decide_on_rank_0, gather_lists
from trichord.fusion.flops import row_cost
from trichord.fusion.hf import TrichordConfig, TrichordForConditionalGeneration, wrap_model
from trichord.fusion.model import Trichord, build_model, param_room
from trichord.layers.initial import SkipInitialValues
from trichord.layers.stored import stored_buffers, stored_tensors

log = get_logger(__name__)

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Restored:
    """A model with its weights (fp32, CPU, eval mode), the config it was trained with, its tokenizer, and its step."""

    model: Trichord
    config: RunConfig
    tokenizer: TextTokenizer
    tokenizer_folder: str
    step: int
    folder: Path


def restore(path: Path, ema: bool = False) -> Restored:
    """Load the model of a checkpoint folder, or of a run folder's newest checkpoint. ema: with the average of its
    weights.

    Raises:
        CheckpointError: there is none, it is damaged, this version cannot build its model, or it has no average.
    """
    folder = resolve_checkpoint(path)
    facts = read_train_state(folder, needs=("step", "config"))
    config = stored_config(folder, facts["config"])
    tokenizer_folder = _tokenizer_of(folder, config)
    tokenizer = load_tokenizer(tokenizer_folder)
    model = build_from_config(config, tokenizer, random_weights=False)
    weights = load_weights(folder, ema)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    buffers = {name: tuple(buffer.shape) for name, buffer in stored_buffers(model).items()}
    check_shapes(folder, {name: tuple(weight.shape) for name, weight in weights.items()}, shapes, buffers)
    with torch.no_grad():
        for name, tensor in stored_tensors(model).items():
            if name in weights:
                tensor.copy_(weights[name])
    return Restored(model.eval(), config, tokenizer, tokenizer_folder, int(facts["step"]), folder)


def stored_config(folder: Path, fields: dict) -> RunConfig:
    """The run config inside a checkpoint."""
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{folder}: the config stored in it does not fit this version of trichord ({where}: {first['msg']}); "
            "use the version that wrote it"
        ) from error


def build_from_config(config: RunConfig, tokenizer: TextTokenizer, random_weights: bool = True) -> Trichord:
    """The model of a run config. `random_weights=False`: all weights will be overwritten, so none is drawn, and none
    read from disk."""
    with contextlib.nullcontext() if random_weights else SkipInitialValues():
        return build_model(
            config.encoders,
            config.fusion,
            config.objectives,
            config.samples,
            config.layers,
            tokenizer.vocab_size,
            tokenizer.special_ids,
        )


def expected_model(folder: Path) -> ExpectedModel | str:
    """The model that a checkpoint's own config builds, without memory for it; or why it cannot be built here."""
    try:
        config = stored_config(folder, read_json(folder / TRAIN_STATE_FILE)["config"])
        tokenizer = load_tokenizer(_tokenizer_of(folder, config))
        with torch.device("meta"):
            model = build_from_config(config, tokenizer, random_weights=False)
    except (TrichordError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else str(error)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    return ExpectedModel(shapes, param_room, tuple(tuple(tied) for tied in names.values() if len(tied) > 1))


def with_generate(restored: Restored) -> TrichordForConditionalGeneration | None:
    """The same live modules as a transformers model that generates; None without a trunk."""
    model, config = restored.model, restored.config
    if model.trunk is None:
        return None
    facts = TrichordConfig.from_leaves(
        config.encoders,
        config.fusion,
        config.objectives,
        config.samples,
        model.trunk.config,
        restored.tokenizer.vocab_size,
        restored.tokenizer.special_ids,
    )
    return wrap_model(model, facts).eval()


def item_lengths(config: RunConfig) -> ItemLengths:
    """`tower_lengths` of a whole config."""
    return tower_lengths(config.encoders, config.samples.image.size, config.fusion.trunk is not None)


def training_lengths(config: RunConfig, model: Trichord) -> ItemLengths:
    """`item_lengths`, with the predicted cost of rows, and log-mel where workers compute it."""
    lengths, audio = item_lengths(config), config.encoders.audio
    tokens = (lambda samples: audio_tokens(audio, samples)) if audio is not None else None
    lengths = replace(lengths, cost=row_cost(model, tokens))
    if audio is None or config.samples.audio.mel == "device":
        return lengths
    return replace(lengths, log_mel=clip_log_mel(audio, config.samples.audio.sample_rate), num_mels=audio.mel.n_mels)


def whole_to_rewind(folder: Path, before: int | None) -> Path | None:
    """The newest checkpoint to go back to whose bytes are those of its save. Called on all ranks."""
    while (back := decide_on_rank_0(partial(find_to_rewind, folder, before))) is not None:
        damage = _damage_of(back)
        if damage is None:
            return back
        log.warning("%s; the rewind takes an older one", damage)
        before = int(back.name.removeprefix("step-"))
    return None


def find_to_rewind(folder: Path, before: int | None) -> Path | None:
    """The newest complete checkpoint of a run that was not saved among skipped steps, as the last of an attempt may be:
    its weights are those that led there; a damaged one is passed over with a warning. before: older than this step, to
    whose weights no finite step has followed.
    """
    for step, path in reversed(step_folders(folder).items()):
        if incomplete_reason(path) is not None or (before is not None and step >= before):
            continue
        try:
            skipped = read_train_state(path)["progress"]["skipped_in_a_row"]
        except CheckpointError as error:
            log.warning("%s; the rewind takes an older one", error)
            continue
        if not skipped:
            return path
    return None


def _damage_of(folder: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint; None: nothing. Called on all ranks, which share out its files."""
    manifest, facts = Manifest(folder), rank_facts()
    problems = []
    for name in sorted(manifest.files)[facts.rank :: facts.world_size]:
        set_phase("verify", file=name)
        try:
            manifest.verify(name)
        except CheckpointError as error:
            problems.append(str(error))
    return next(iter(gather_lists(problems)), None)


def _tokenizer_of(folder: Path, config: RunConfig) -> str:
    """The copy in the run folder (`runs/NAME/checkpoints/step-N` -> `runs/NAME/tokenizer`), else the config's own."""
    beside = folder.resolve().parents[1] / TOKENIZER_FOLDER
    return str(beside) if (beside / "tokenizer.json").exists() else config.batches.tokenizer
