"""What `examples/experiments/curvature_report/__main__.py` measures, draws and writes."""
