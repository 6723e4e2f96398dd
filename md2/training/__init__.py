"""The training loop: steps, validation, precision, logs and pictures."""
