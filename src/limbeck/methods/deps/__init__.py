"""Delayed epsilon-shrinking: one training, networks of many sizes."""
