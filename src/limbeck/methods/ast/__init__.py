"""Alignment with smooth expert trajectories."""
