"""Tile sizes, warps and pipeline stages of the kernels, per architecture, with the source of each choice."""
