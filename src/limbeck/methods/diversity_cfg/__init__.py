"""SwiftBrush: one-step generation by variational score distillation (Nguyen and Tran 2024)."""
