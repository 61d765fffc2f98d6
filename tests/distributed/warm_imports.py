"""Imported once by the fork server of `ranks.py`: what every rank of every case needs."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import timm
import transformers

from trichord.engine import build

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["build", "deepspeed", "timm", "transformers"]
