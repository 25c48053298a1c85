"""Multi-student diffusion distillation."""
