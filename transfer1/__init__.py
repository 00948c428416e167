"""transfer1: training of a controllable video world model."""
