"""What the commands do. Nothing here imports Prefect before a run needs it."""
