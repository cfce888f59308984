"""What the numbers in the documents come from: `python -m examples.experiments.NAME`.

Experiments may import the recipe `examples.image_classification` and `common`.
"""
