"""Values of runs: the root, one file per family of groups, and experiments."""
