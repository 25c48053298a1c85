"""One-step generation with random scales of guidance, and negative prompts in attention: SNOOPI (Nguyen et al. 2024)."""
