"""Simple semi-supervised label distillation (SSLD)."""
