"""What `examples/curvature_report.py` measures, draws and writes."""
