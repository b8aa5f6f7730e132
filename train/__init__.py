"""The training job: configuration, data, the loop, checkpoints, metrics."""
