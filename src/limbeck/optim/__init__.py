"""Optimizers that torch does not have, as plain `torch.optim.Optimizer`s."""
