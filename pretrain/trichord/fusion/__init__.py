"""Fusion: features of several modalities and text tokens become one stream of hidden states, or aligned embeddings."""
