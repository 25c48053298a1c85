"""Fair synthetic tables by distilling a fair latent space."""
