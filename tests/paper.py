"""HERO as the paper's text has it: along Eq. 11, with a sum of squares."""

import functools

import hero_jax

AS_IN_THE_PAPER = {"perturbation": "layerwise", "reduction": "sum"}

hero = functools.partial(hero_jax.hero, **AS_IN_THE_PAPER)
hero_value_and_grad = functools.partial(hero_jax.hero_value_and_grad, **AS_IN_THE_PAPER)
