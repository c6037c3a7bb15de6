"""Trains the small encoders that the project ships: autoencoder, tokenizer, CLIP and GPT-2, all on composed scenes."""
