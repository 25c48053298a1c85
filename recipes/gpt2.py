"""GPT-2 of 124 M parameters."""

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it with the published ones."""
    return GPT2LMHeadModel(GPT2Config(use_cache=False))
