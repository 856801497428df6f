"""Pretrained weights in and out: `load` and `save` for Hugging Face, `megalodon.load` and `megalodon.save` for the official MEGALODON."""

from infinicontext.pretrained import megalodon
from infinicontext.pretrained.huggingface import load, read_config, save

__all__ = ["load", "megalodon", "read_config", "save"]
