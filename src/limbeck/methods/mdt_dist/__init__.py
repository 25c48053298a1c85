"""MDT-dist: velocity matching and velocity distillation of rectified flows (Zhou et al. 2025)."""
