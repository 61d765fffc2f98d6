"""Imported once by the fork server of `ranks.py`: what every rank of every case needs."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import pytest
import scipy.signal
import timm
import transformers.models.llama.modeling_llama
import webdataset

from trichord import train
from trichord.fusion import hf

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed", "hf", "pytest", "scipy", "timm", "train", "transformers", "webdataset"]
