"""evaluate: figures and pictures of a checkpoint; and export, which takes it elsewhere."""
