"""A report on the curvature around trained weights."""
