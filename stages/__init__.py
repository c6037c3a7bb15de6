"""What each step does: a folder a stage, and the one runner. Ray runs here; Prefect does not."""
