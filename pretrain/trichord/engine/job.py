"""What of the engine's config only the job knows: its ranks, its device, this DeepSpeed, the disk of a node.

Asked before the shards are looked at, which may take hours, and again where an engine is built without a run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trichord.core.errors import ConfigError, TrichordError
from trichord.core.log import FILE_ONLY, get_logger
from trichord.core.status import try_write
from trichord.engine.config import EngineConfig
from trichord.engine.deepspeed_config import deepspeed_config

log = get_logger(__name__)

_OUTSIDE = (TrichordError, MemoryError, OSError, RuntimeError)  # memory, disks, peers: no matter of an overlay


def check_job(engine: EngineConfig, micro_rows: int, world_size: int) -> None:
    """On every rank, before anything is built.

    Raises:
        ConfigError: `engine.hpz_ranks` does not divide the job, this device has no fp16, the NVMe disk cannot be used,
            or DeepSpeed does not take `engine.deepspeed`.
    """
    if world_size % engine.hpz_ranks:
        raise ConfigError(
            f"engine.hpz_ranks is {engine.hpz_ranks}, which does not divide the {world_size} ranks of this job; "
            "set it to the ranks of a node, or to 1"
        )
    _check_deepspeed(engine, deepspeed_config(engine, micro_rows=micro_rows, grad_accum_steps=1))
    if engine.nvme_path is not None:
        _check_nvme(Path(engine.nvme_path))


@contextmanager
def overlay_named(engine: EngineConfig) -> Iterator[None]:
    """What DeepSpeed does not take of the user's overlay it says in many ways, none of them a bug of this run.

    Raises:
        ConfigError: it fails, and there is an overlay. The traceback is in the log of the rank.
    """
    try:
        yield
    except Exception as error:
        outside = isinstance(error, _OUTSIDE) and not isinstance(error, NotImplementedError)
        if outside or not engine.deepspeed:
            raise
        log.error("DeepSpeed refuses the overlay", exc_info=True, extra=FILE_ONLY)
        raise _refused_overlay(engine.deepspeed, error) from error


def _refused_overlay(overlay: dict[str, Any], error: BaseException) -> ConfigError:
    """DeepSpeed's own words, on one line."""
    said = " ".join(str(error).split())[:300] or "no reason"
    return ConfigError(
        f"DeepSpeed does not take engine.deepspeed ({', '.join(overlay)}): {type(error).__name__}: {said}; correct it, "
        "or take it out"
    )


def _check_deepspeed(engine: EngineConfig, config: dict[str, Any]) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    accelerator: Any = get_accelerator()
    if "fp16" in config and not accelerator.is_fp16_supported():
        raise ConfigError("engine.precision fp16 does not run on this device; use bf16, autocast_bf16 or fp32")
    zero = config["zero_optimization"]
    if accelerator.device_name() == "cpu":
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
            if zero.get(key):
                raise ConfigError(
                    f"engine.deepspeed.zero_optimization.{key} needs a GPU: DeepSpeed has its arithmetic for those "
                    "only; take it out"
                )
    try:
        DeepSpeedZeroConfig(**zero)
        DeepSpeedConfig(config)
    except ValidationError as error:
        raise _explained(engine.deepspeed, error) from error
    except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refused_overlay(engine.deepspeed, error) from error


def _explained(overlay: dict[str, Any], error: ValidationError) -> ConfigError:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if error.title != DeepSpeedZeroConfig.__name__:
        return _refused_overlay(overlay, error)
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    near = difflib.get_close_matches(key, known, n=1) if first["type"] == "extra_forbidden" else []
    hint = f"; nearest: {near[0]}" if near else ""
    where = ".".join(filter(None, ("engine.deepspeed.zero_optimization", key)))
    return ConfigError(f"{where}: DeepSpeed says: {first['msg']}{hint}")


def _check_nvme(folder: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        try_write(folder)
    except OSError as error:
        raise ConfigError(
            f"engine.nvme_path {folder}: expected a folder on a local disk that can be written, got {error.strerror}; "
            "name one, or leave nvme_path out"
        ) from error
    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "engine.nvme_path: DeepSpeed's async_io cannot be built on this machine, which lacks libaio; install "
            "libaio-dev, or leave nvme_path out"
        )
