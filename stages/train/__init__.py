"""train: the U-ViT, from latents to checkpoints."""
