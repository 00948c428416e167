"""Training: one step, the loop around it, optimizer, schedule, EMA, callbacks and checkpoints."""
