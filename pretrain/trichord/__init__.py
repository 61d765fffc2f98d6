"""Trichord: large-scale pretraining of vision-language-audio transformers.

The rooms follow the data (see README): shards -> samples -> batches -> layers -> encoders -> fusion ->
objectives -> engine -> checkpoints -> evaluation -> release, told as one story by `trichord.train`.
"""

__version__ = "0.1.0"
