"""MiniLM as a classifier of texts: six layers, and a linear layer with a class for each output."""

from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from limbeck.models.sentence import bundled


def minilm(num_classes: int = 2) -> nn.Module:
    """The structure, with random weights; 22.7 M parameters."""
    source = bundled() or "nreimers/MiniLM-L6-H384-uncased"
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(source, num_labels=num_classes))
