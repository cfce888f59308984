"""Step times, and what else costs how much."""
