"""Exchange of weights with other software: released checkpoints, diffusers."""
