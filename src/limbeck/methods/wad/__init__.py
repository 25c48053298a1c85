"""Weight-aware distillation (WAD)."""
