"""Phased DMD: few-step distribution matching with an expert for each phase (Fan et al. 2025)."""
