"""DistillNearest: the most related of several models of other tasks teaches one classifier."""
