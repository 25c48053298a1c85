"""Self-distillation guided by the labels: a closed-form share of the ground truth (Borup and Andersen 2021)."""
