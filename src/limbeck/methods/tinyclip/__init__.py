"""Smaller dual encoders of images and texts: affinity mimicking, and weights inherited by rule or by learnt masks."""
