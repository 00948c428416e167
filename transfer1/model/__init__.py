"""The networks: the base DiT, the control branch, and the two composed."""
