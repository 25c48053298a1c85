"""Ensemble distillation into a well-initialised student (MEAL V2)."""
