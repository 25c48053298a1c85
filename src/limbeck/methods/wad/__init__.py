"""Weight-aware distillation: few labels, and a pool in which some classes are unknown (Du et al. 2023)."""
