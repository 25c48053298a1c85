"""Knowledge distillation by softened class probabilities (Hinton, Vinyals and Dean 2015)."""
