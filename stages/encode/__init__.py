"""encode: latents in Parquet; and the text codec that it needs."""
