"""What a person schedules: Prefect flows, lineage artifacts, and the `unidiffuser` command."""

# The variable by which `unidiffuser --debug` asks for the tracebacks of its jobs too.
DEBUG = "UNIDIFFUSER_DEBUG"
