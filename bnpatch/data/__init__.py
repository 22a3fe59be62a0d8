"""Images and targets: from where they lie to batches of inputs."""
