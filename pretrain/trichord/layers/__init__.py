"""Layers: our kernels bound into transformers and timm modules, by registration and by replacement at build time."""
