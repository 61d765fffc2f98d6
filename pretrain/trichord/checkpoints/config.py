"""Config of the checkpoints room: when to save and what to keep."""

from pydantic import Field

from trichord.core.leaf import Leaf


class CheckpointsConfig(Leaf):
    """Saving. A checkpoint counts only once its manifest is written."""

    save_every_steps: int = Field(default=1000, ge=1)
    keep_last: int = Field(default=3, ge=1)
    commit_timeout_s: float = Field(default=600.0, gt=0)
    """A save whose ranks are not all done after this long is abandoned; the previous checkpoint stays."""
