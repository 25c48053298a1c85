"""Pseudo-subclasses from linear projections of a teacher's embedding: LELP (Loo, Iliopoulos, Hu and Vee 2024)."""
