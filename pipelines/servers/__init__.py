"""What stays up: servers, this machine's worker, deployments and their automations."""
