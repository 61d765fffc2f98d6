"""Config of the batches room: tokenizer, rows, packing, workers."""

from typing import Literal

from pydantic import Field, field_validator

from trichord.core.leaf import Leaf

MIN_LANES, MAX_LANES = 256, 1024
"""Above MAX_LANES rows per step a lane gives several rows of each step, to bound the windows that are open at once."""


class ChatConfig(Leaf):
    """How the turns of a chat become text. Assistant turns are learned, with the end token behind each."""

    system: str = ""
    """Put in front of a system turn, and so on."""
    user: str = "\nUser: "
    assistant: str = "\nAssistant: "
    tool: str = "\nTool: "


class BatchesConfig(Leaf):
    """How samples become rows of tokens, and rows become steps."""

    tokenizer: str
    """Folder with a `tokenizer.json` (from `trichord data tokenizer`), or `hub-id@revision`."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows of the global batch. Up to 1,024 rows, each comes from its own lane."""
    micro_rows: int = Field(default=1, ge=1)
    """Rows per rank and micro-step. Accumulation follows: ceil(rows_per_step / (world_size * micro_rows))."""
    row_tokens: int = Field(default=2048, ge=8)
    max_samples_per_row: int = Field(default=64, ge=1)
    """Upper bound of samples in a row; fixes the size of the feature gather of contrastive objectives."""
    packing: Literal["tokens", "count"] = "tokens"
    """`tokens`: best-fit decreasing by length. `count`: max_samples_per_row samples of similar length in each row, or
    as many as row_tokens hold; for models of towers only, whose work is per sample."""
    long_samples: Literal["drop", "split"] = "drop"
    """A sample longer than a row: left out, or its text goes on in further segments; never cut. What is left out is
    counted as filters count, and is not bad data."""
    deal_ranks: int = Field(default=1, ge=1)
    """Neighbouring ranks that share out their rows of each step by predicted cost (tokens, images, audio). Order and
    digest stay as they are. Each plans the rows of all of them, so take a divisor of the world size, up to 16."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode; one more plans. 0: both happen in the process that asks."""
    prefetch_steps: int = Field(default=2, ge=1, le=64)
    chat: ChatConfig = ChatConfig()
    label_prompt: bool = False
    """Also learn the prompt (`prompt` of the meta json); default: only the text after it."""

    @field_validator("rows_per_step")
    @classmethod
    def _has_lanes(cls, rows: int) -> int:
        if rows > MAX_LANES and not _lanes_of(rows):
            near = sorted((n for n in range(rows - 64, rows + 64) if _lanes_of(n)), key=lambda n: (abs(n - rows), n))
            raise ValueError(
                f"above {MAX_LANES} rows it must be a multiple of a number from {MIN_LANES} to {MAX_LANES}, the lanes; "
                f"{rows} is not, {near[0]} is"
            )
        return rows

    @property
    def rows_per_lane(self) -> int:
        """Rows that each lane gives per step."""
        return self.rows_per_step // self.num_lanes

    @property
    def num_lanes(self) -> int:
        """Lanes of the global batch; row r of a step belongs to lane r // rows_per_lane."""
        return _lanes_of(self.rows_per_step)


def _lanes_of(rows: int) -> int:
    """The rows themselves up to MAX_LANES, else their largest divisor up to it; 0 where that is below MIN_LANES."""
    if rows <= MAX_LANES:
        return rows
    return next((lanes for lanes in range(MAX_LANES, MIN_LANES - 1, -1) if rows % lanes == 0), 0)
