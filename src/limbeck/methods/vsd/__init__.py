"""Variational score distillation (Wang et al. 2023)."""
