"""Demos, one file each; the recipe `image_classification`; and the experiments."""
