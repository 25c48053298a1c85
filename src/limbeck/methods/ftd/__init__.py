"""Flat trajectory distillation, and matching of training trajectories, its base."""
