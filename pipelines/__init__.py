"""What a person schedules: Prefect flows, lineage artifacts, and the `unidiffuser` command."""
