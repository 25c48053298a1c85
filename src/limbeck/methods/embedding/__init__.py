"""Distillation of sentence, image or other embeddings."""
