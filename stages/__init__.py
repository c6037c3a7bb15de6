"""What each step does: one file a stage, and the one runner. Ray runs here; Prefect does not."""
