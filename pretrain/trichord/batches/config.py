"""Config of the batches room: tokenizer, rows, packing, workers."""

from pydantic import Field

from trichord.core.leaf import Leaf


class BatchesConfig(Leaf):
    """How samples become rows of tokens, and rows become steps."""

    tokenizer: str
    """Folder with a `tokenizer.json` (from `trichord data tokenizer`), or `hub-id@revision`."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows of the global batch. Each row of a step comes from its own lane, so this is also the number of lanes."""
    micro_rows: int = Field(default=1, ge=1)
    """Rows per rank and micro-step. Accumulation follows: ceil(rows_per_step / (world_size * micro_rows))."""
    row_tokens: int = Field(default=2048, ge=8)
    max_samples_per_row: int = Field(default=64, ge=1)
    """Upper bound of samples in a row; fixes the size of the feature gather of contrastive objectives."""
    num_workers: int = Field(default=0, ge=0)
    prefetch_steps: int = Field(default=2, ge=1)
    label_prompt: bool = False
    """Also learn the prompt (`prompt` of the meta json); default: only the text after it."""
