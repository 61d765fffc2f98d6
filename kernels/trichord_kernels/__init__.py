"""Fused kernels for multimodal pretraining. Needs torch and triton only."""
