"""The training loop: a Trainer whose batch is one optimizer step, its checkpoints, and what it shows."""
