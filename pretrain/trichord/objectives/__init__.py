"""Outputs of the model -> losses, each normalised by the global count of the optimizer step."""
