"""A small language model: what `language_model.py` trains, on what, and how."""
