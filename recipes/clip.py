"""CLIP with a ViT-B/32 image encoder (151 M parameters)."""

from typing import Any

from torch import nn
from transformers import CLIPConfig, CLIPModel


def vit_b32() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it with the published ones. Its images are normalised as CLIP's are."""
    model: Any = CLIPModel(CLIPConfig())
    model.pretrained_cfg = {
        "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "input_size": (3, 224, 224),
    }  # fmt: skip
    return model
