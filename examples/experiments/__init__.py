"""What makes the numbers in the documents; each is a command, `python -m` its name.

Experiments may import the recipe `examples.image_classification` and `common`.
"""
