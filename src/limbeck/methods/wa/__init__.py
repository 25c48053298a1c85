"""Weight aligning for class-incremental learning (Zhao et al. 2020)."""
