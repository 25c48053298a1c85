"""Continuous, differentiable semi-structured sparsity: training that ends 2:4 sparse."""
