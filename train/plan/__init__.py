"""What a training step needs on a machine, compiled for it before it is there."""
