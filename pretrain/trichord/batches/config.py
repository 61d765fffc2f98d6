"""Config of the batches room: tokenizer, rows, packing, workers."""

from typing import Literal

from pydantic import Field

from trichord.core.leaf import Leaf


MAX_LANES = 1024
"""Above this many rows per step a lane gives several rows of each step, to bound the windows that are open at once."""


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
    """`tokens`: best-fit decreasing by length. `count`: max_samples_per_row samples of similar length in every row, for
    models of towers only, whose work is per sample."""
    long_samples: Literal["drop", "split"] = "drop"
    """A sample longer than a row: quarantined, or its text goes on in further segments; never cut."""
    deal_ranks: int = Field(default=1, ge=1)
    """Neighbouring ranks that share out their rows of each step by predicted cost (tokens, image pixels, audio seconds).
    Order and digest stay as they are. Each plans the rows of all of them, so take a divisor of the world size up to 16."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode; one more plans. 0: both happen in the process that asks."""
    prefetch_steps: int = Field(default=2, ge=1)
    chat: ChatConfig = ChatConfig()
    label_prompt: bool = False
    """Also learn the prompt (`prompt` of the meta json); default: only the text after it."""

    @property
    def rows_per_lane(self) -> int:
        """Rows that each lane gives per step."""
        divisors = (n for n in range(-(-self.rows_per_step // MAX_LANES), self.rows_per_step + 1))
        return next(n for n in divisors if self.rows_per_step % n == 0)

    @property
    def num_lanes(self) -> int:
        """Lanes of the global batch; row r of a step belongs to lane r // rows_per_lane."""
        return self.rows_per_step // self.rows_per_lane
