"""The commands of `unidiffuser` as typer sees them: arguments, options and their help; the work is in `pipelines.commands`."""
