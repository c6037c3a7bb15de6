"""folder: a corpus of one's own, packed as download packs the web's."""
