"""Metrics -> JSONL record -> Weights & Biases mirror, progress on the screen, HTML report. No torch."""
