"""The paper's networks in Flax Linen."""
