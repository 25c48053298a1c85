"""Compensators that all classes share, added to real images."""
