"""Mixed precision: bits of every layer by its sensitivity."""
