"""Few-step score identity distillation."""
