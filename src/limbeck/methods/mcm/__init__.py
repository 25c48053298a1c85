"""Video diffusion in few steps, motion from the teacher and appearance from images: MCM (Zhai et al. 2024)."""
