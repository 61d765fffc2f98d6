"""Config of the engine room: optimizer, ZeRO stage, precision."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from trichord.core.leaf import Leaf
from trichord.core.schedule import ScheduleName
from trichord.fusion.config import RoomName

# bf16 has 8 significant bits: what falls by less than 2^-8 of itself in a step is rounded back to where it was.
LARGEST_BF16_BETA = 1.0 - 2.0**-8

# Torch keeps time limits as whole nanoseconds in 64 bits; a month is longer than any collective.
LONGEST_TIMEOUT_S = 30 * 86400.0

Beta = Annotated[float, Field(ge=0, lt=1)]


class RoomRates(Leaf):
    """How fast one room of the model learns, beside the others."""

    lr_ratio: float = Field(default=1.0, ge=0)
    """Times `engine.lr`."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Times this once per layer from the last one down; embeddings lie below the first (BEiT, Bao et al. 2022)."""
    weight_decay: float | None = Field(default=None, ge=0)
    """null: `engine.weight_decay`."""
    schedule: ScheduleName | None = None
    """null: `engine.schedule`."""
    start_step: int = Field(default=0, ge=0)
    """Until this step the room stands still; then it warms up over `engine.warmup_steps`."""


class MuonConfig(Leaf):
    """Muon, on the matrices of hidden layers; AdamW's keys are for the rest."""

    lr: float | None = Field(default=None, gt=0)
    """null: `engine.lr`."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """match_rms_adamw: updates as large as AdamW's, whose rate and decay then fit. original: for rates about 0.02."""


class EngineConfig(Leaf):
    """One optimizer step, run by DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16", "autocast_bf16"] = "bf16"
    """bf16 and fp16 keep fp32 master weights. autocast_bf16: fp32 parameters, bf16 matrix products."""
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop", "muon", "adamw_8bit"] = "adamw"
    """adamw, adamw_8bit (torchao) and muon decay weights by themselves; the others add the decay to the gradient."""
    optimizer_states: Literal["fp32", "bf16"] = "fp32"
    """adamw and adam: how the two moments are stored. bf16 takes 4 bytes of a parameter less; the update stays fp32."""
    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """All but sgd and rmsprop: of the first and second moment. rmsprop: the second is the decay of its average."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd and rmsprop."""
    eps: float = Field(default=1e-8, gt=0)
    muon: MuonConfig = MuonConfig()
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices only; vectors (norms, biases, scales) are not decayed."""
    rooms: dict[RoomName, RoomRates] = {}
    """Rooms that learn at rates of their own."""
    schedule: ScheduleName = "cosine"
    """wsd: constant after the warm-up, then a fall over the last `decay_steps`. constant: for endless streams."""
    decay_steps: int | None = Field(default=None, ge=1)
    """wsd: length of the fall; null: a fifth of the run."""
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an average of the weights, fp32: after each update `decay` of it and `1 - decay` of the new weights."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Blocks whose activations are computed again in the backward pass. selective: all but the results of matrix
    products, convolutions and attention."""
    checkpoint_every_blocks: int = Field(default=1, ge=1)
    """The first of every so many blocks is recomputed, the others keep their activations."""
    compile: bool = False
    """torch.compile, block by block, in towers and trunk."""
    zero_init: bool = True
    """Stage 3 on several ranks: build the model in slices, so that no rank ever holds it whole."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run goes back, or stops."""
    rewinds: int = Field(default=0, ge=0)
    """How often in a run: after `max_bad_steps`, go on with the weights of the newest checkpoint, past this data."""
    timeout_s: float = Field(default=1800.0, gt=0, le=LONGEST_TIMEOUT_S)
    """Limit of any collective, applied to every process group."""
    heartbeat_timeout_s: float = Field(default=20.0, ge=3.0, le=LONGEST_TIMEOUT_S)
    """A rank whose peer has given no sign of life for this long leaves without saving."""
    stuck_after_s: float | None = Field(default=None, gt=0)
    """When nothing has moved on any rank for this long, the run says which rank is stuck in what, and leaves; it warns
    at half of it. null: half of `timeout_s`, after which a collective fails without saying why."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer states (optimizer) or also parameters (all, stage 3) in host memory."""
    offload_optimizer: Literal["deepspeed", "torch"] = "deepspeed"
    """adamw and adam under `offload`: DeepSpeed's CPU Adam (C++, built at the first use), or torch's."""
    nvme_path: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] | None = None
    """Folder on a local NVMe disk: what `offload` names goes there instead of host memory. Stage 3. Untested."""
    hpz_ranks: int = Field(default=1, ge=1)
    """Stage 3: keep a second copy of the weights in slices over so many ranks, those of a node, and gather from it in
    the backward pass (hpZ of ZeRO++). Untested on more than one node."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Neighbouring ranks that share each row of tokens (DeepSpeed-Ulysses), for rows that are too long for one: each
    has a stretch of the stream, and for attention a share of the trunk's heads."""
    deepspeed: dict[str, Any] = {}
    """Overlay on the DeepSpeed JSON that is derived from this leaf; a conflict is an error."""

    @property
    def stuck_limit_s(self) -> float:
        return self.stuck_after_s if self.stuck_after_s is not None else self.timeout_s / 2

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _once_a_switch(cls, value: Any) -> Any:
        """Runs from before there were kinds of it go on."""
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _supported(self):
        if self.stuck_limit_s >= self.timeout_s:
            raise ValueError(
                f"stuck_after_s {self.stuck_limit_s:g} must be below timeout_s {self.timeout_s:g}: after that a "
                "collective fails before anybody could say which rank is stuck"
            )
        if self.zero_stage == 0 and self.precision in ("bf16", "fp16"):
            raise ValueError(
                f"zero_stage 0 with precision {self.precision} is refused: DeepSpeed's unfused optimizer starts Adam "
                "one step late there and the first updates come out wrong; use zero_stage 1, or precision autocast_bf16"
            )
        if self.zero_stage == 3 and self.activation_checkpointing == "selective" and self.checkpoint_every_blocks > 1:
            raise ValueError(
                "activation_checkpointing selective at zero_stage 3 recomputes every block, got "
                f"checkpoint_every_blocks {self.checkpoint_every_blocks}: the others would hold on to their gathered "
                "weights; use full, or 1"
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload 'all' moves parameters and needs zero_stage 3, got {self.zero_stage}")
        if self.nvme_path is not None and (self.offload == "none" or self.zero_stage != 3):
            raise ValueError(
                f"nvme_path says where offload goes and needs zero_stage 3, got offload {self.offload!r} at stage "
                f"{self.zero_stage}; set offload to optimizer or all, or leave nvme_path out"
            )
        if self.hpz_ranks > 1 and self.zero_stage != 3:
            raise ValueError(
                f"hpz_ranks is a second copy of ZeRO-3's slices and needs zero_stage 3, got {self.zero_stage}"
            )
        if self.sequence_parallel > 1 and self.compile:
            raise ValueError(
                "compile with sequence_parallel is refused: the exchange in each attention would break every compiled "
                "block apart; use one of them"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload 'optimizer' needs zero_stage 1, 2 or 3, got 0")
        return self

    @model_validator(mode="after")
    def _states_can_be_bf16(self):
        if self.optimizer_states == "fp32":
            return self
        if self.optimizer not in ("adamw", "adam"):
            raise ValueError(
                f"optimizer_states bf16 is for the moments of adamw and adam, got optimizer {self.optimizer}"
            )
        if self.offload != "none" and self.offload_optimizer == "deepspeed":
            raise ValueError(
                "optimizer_states bf16 with offload: DeepSpeed's CPU Adam keeps its states in fp32; "
                "set offload_optimizer to torch, or optimizer_states to fp32"
            )
        if max(self.betas) > LARGEST_BF16_BETA:
            raise ValueError(
                f"optimizer_states bf16 with betas {list(self.betas)}: bf16 rounds a moment that falls by less than "
                f"2^-8 in a step back to itself: it would never fall; no beta may exceed {LARGEST_BF16_BETA:.4f}"
            )
        return self


def ranks_refusal(size: int, ranks: int) -> str | None:
    """Why `sequence_parallel` ranks cannot share the rows of a job of so many; None: they can. So, too, below."""
    if ranks % size == 0:
        return None
    below = ranks - ranks % size
    fit = f"{below} or {below + size}" if below else f"{size}"
    return (
        f"engine.sequence_parallel {size} does not divide the {ranks} ranks of this job; start {fit} ranks, or set it "
        "to a divisor of the ranks"
    )


def trunk_refusal(size: int, has_trunk: bool) -> str | None:
    if size == 1 or has_trunk:
        return None
    return f"engine.sequence_parallel {size} shares out the trunk's tokens, and this model has no trunk: set 1"


def tokens_refusal(size: int, tokens: int) -> str | None:
    """tokens: of a micro-step on one rank."""
    if tokens % size == 0:
        return None
    return (
        f"engine.sequence_parallel {size} does not divide the {tokens} tokens of a micro-step "
        "(batches.micro_rows * batches.row_tokens); round batches.row_tokens"
    )


def heads_refusal(size: int, heads: int, key_heads: int) -> str | None:
    """heads, key_heads: of the trunk's attention."""

    def fits(size: int) -> bool:
        return heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0)

    if fits(size):
        return None
    fitting = ", ".join(str(size) for size in range(1, heads + 1) if fits(size))
    return (
        f"engine.sequence_parallel {size} cannot share the {heads} attention heads and {key_heads} key-value heads of "
        f"the trunk: it must divide the first, and divide the second or be a multiple of it; these do: {fitting}"
    )
