"""The base of every config leaf: frozen, and unknown keys are an error."""

from pydantic import BaseModel, ConfigDict


class Leaf(BaseModel):
    """One room's part of the run config. Values never change after validation; derived values are properties."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
