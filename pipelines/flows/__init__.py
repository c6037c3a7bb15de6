"""What runs under Prefect: flows of recipes and nodes, their jobs, and how they stop."""
