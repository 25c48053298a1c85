"""Plackett-Luce distillation (Bassam, Zhu and Bian 2025)."""
