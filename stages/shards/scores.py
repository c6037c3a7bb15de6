"""The scores that rows carry, in the one order in which they are asked, stored and shown."""

# Cosine of image and caption embeddings as computed here, then what LAION's metadata holds.
SCORES = ("clip_similarity", "similarity", "punsafe", "pwatermark", "aesthetic")
METADATA_SCORES = SCORES[1:]
