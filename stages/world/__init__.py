"""world: pairs of a world whose every distribution is known, as latents."""
