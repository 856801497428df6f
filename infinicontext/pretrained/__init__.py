"""Pretrained weights in and out."""

from infinicontext.pretrained.huggingface import load, read_config, save

__all__ = ["load", "read_config", "save"]
