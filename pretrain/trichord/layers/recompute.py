"""Activation checkpointing of transformers models, always the non-reentrant kind."""

from __future__ import annotations

from typing import Any


def recompute_layers(model: Any) -> None:
    """Recompute the layers of a transformers model in the backward pass instead of keeping their activations.

    Non-reentrant: the reentrant kind drops gradients of inputs passed by keyword and calls hooks in another order.
    """
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
