"""Mixed precision of trained networks: what `mixed_precision.py` measures and shows."""
