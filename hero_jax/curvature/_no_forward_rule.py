"""What to say where the gradient of a loss cannot be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

from hero_jax._typing import Grads, Params

WAYS_ROUND = (
    "Pass hvp='reverse', which differentiates backwards twice, or "
    "hvp='finite_difference', which needs gradients alone."
)


@contextlib.contextmanager
def backwards(grad_fn: Callable[[Params], Grads], W: Params) -> Iterator[None]:
    """Add to an error what else to try, unless it is the gradient itself that fails."""
    try:
        yield
    except Exception as error:
        try:
            jax.eval_shape(grad_fn, W)
        except Exception:
            raise error from None
        error.add_note(
            "hero_jax: hvp='reverse' differentiates the gradient of the loss "
            "backwards. Pass hvp='finite_difference', which needs gradients alone."
        )
        raise


@contextlib.contextmanager
def forwards_too_late() -> Iterator[None]:
    """Do the same where only compiling finds a `jax.custom_vjp` without that rule."""
    try:
        yield
    except TypeError as error:
        notes = "".join(getattr(error, "__notes__", []))
        if "custom_vjp" in str(error) and "hero_jax: " not in notes:
            error.add_note(f"hero_jax: the loss has no forward-mode rule. {WAYS_ROUND}")
        raise
