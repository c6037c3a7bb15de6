"""select: from metadata to the rows worth downloading."""
