"""A small language model by five optimizers, with and without HERO."""
