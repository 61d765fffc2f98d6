"""The whole run: every room's leaf under the room's name, plus the identity of the run."""

from pydantic import Field, model_validator

from trichord.batches.config import BatchesConfig
from trichord.checkpoints.config import CheckpointsConfig
from trichord.core.leaf import Leaf
from trichord.encoders.config import EncodersConfig
from trichord.engine.config import EngineConfig, heads_refusal, tokens_refusal, trunk_refusal
from trichord.evaluation.config import EvaluationConfig
from trichord.fusion.config import FusionConfig
from trichord.layers.config import LayersConfig
from trichord.objectives.config import ObjectivesConfig
from trichord.samples.config import SamplesConfig
from trichord.shards.config import ShardsConfig
from trichord.tracking.config import TrackingConfig


class RunIdentity(Leaf):
    """Name, place, length and starting point of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    root: str = "runs"
    seed: int = Field(default=0, ge=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. null: counted from the sources' `epochs`, which must then all be set."""
    resume: str = Field(default="auto", pattern=r"^(auto|never|.+@\d+)$")
    """auto: go on where the run folder stands. never: refuse an existing folder. RUN@STEP: a new run (a branch) that
    starts from step STEP of run folder RUN, with its data position."""
    init_from: str | None = None
    """Start a new run from these weights: an export folder, a checkpoint folder, or `hub-id@revision`."""


class RunConfig(Leaf):
    """Everything that decides a run. Overrides on the command line name it by path: `engine.lr=3e-4`."""

    run: RunIdentity
    shards: ShardsConfig
    samples: SamplesConfig = SamplesConfig()
    batches: BatchesConfig
    layers: LayersConfig = LayersConfig()
    encoders: EncodersConfig = EncodersConfig()
    fusion: FusionConfig
    objectives: ObjectivesConfig
    engine: EngineConfig = EngineConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig | None = None
    """null: no evaluation during training."""

    @model_validator(mode="after")
    def _rooms_agree(self):
        if self.objectives.next_token and self.fusion.trunk is None:
            raise ValueError(
                "objectives.next_token needs a language model: set fusion.kind to interleave and fusion.trunk"
            )
        if self.objectives.contrastive:
            self._check_pairs(self.objectives.contrastive.pairs)
        self._check_learning_rooms()
        self._check_sequence_parallel()
        self._check_loss_weights()
        if self.evaluation is not None and self.evaluation.ema and self.engine.ema_decay is None:
            raise ValueError(
                "evaluation.ema evaluates the average of the weights: set engine.ema_decay, or ema to false"
            )
        if self.run.max_steps is None and any(source.epochs is None for source in self.shards.sources):
            raise ValueError("set run.max_steps, or `epochs` on every source so that the steps can be counted")
        return self

    def _check_learning_rooms(self) -> None:
        towers = {"vision": self.encoders.vision, "audio": self.encoders.audio, "text": self.encoders.text}
        for room, leaf in (towers | {"trunk": self.fusion.trunk}).items():
            if room in self.engine.rooms and (leaf is None or getattr(leaf, "freeze", False)):
                why = "has none" if leaf is None else "has it frozen"
                raise ValueError(f"engine.rooms.{room}: the model {why}, so take the key out")

    def _check_sequence_parallel(self) -> None:
        size, tokens = self.engine.sequence_parallel, self.batches.micro_rows * self.batches.row_tokens
        trunk = self.fusion.trunk
        refusals = [trunk_refusal(size, trunk is not None), tokens_refusal(size, tokens)]
        if trunk is not None and trunk.weights is None:  # else its heads are those of the released trunk
            refusals.append(heads_refusal(size, trunk.num_heads, trunk.num_kv_heads))
        for refusal in filter(None, refusals):
            raise ValueError(refusal)

    def _check_loss_weights(self) -> None:
        weighed = [source.name for source in self.shards.sources if source.loss_weight != 1.0]
        if weighed and self.objectives.next_token is None:
            raise ValueError(
                f"shards.sources {', '.join(weighed)}: loss_weight counts in objectives.next_token, which this run "
                "does not have; change `weight`, the share of draws"
            )

    def _check_pairs(self, pairs) -> None:
        towers = {"image": self.encoders.vision, "audio": self.encoders.audio, "text": self.encoders.text}
        for pair in pairs:
            for modality in pair.split("-"):
                if towers[modality] is None:
                    key = "vision" if modality == "image" else modality
                    raise ValueError(f"objectives.contrastive pair {pair!r} needs a tower: set encoders.{key}")
