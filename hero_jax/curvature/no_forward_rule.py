"""What to tell where the gradient of a loss cannot be differentiated."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from hero_jax._typing import Grads, Params

_WAYS = {
    "exact": "forwards. Pass hvp='reverse', which differentiates backwards twice, or",
    "reverse": "backwards. Pass",
}


@contextlib.contextmanager
def found_by_tracing(
    grad_fn: Callable[[Params], Grads], W: Params, hvp: str
) -> Iterator[None]:
    """Add to an error what else to try, unless it is the gradient itself that fails."""
    try:
        yield
    except Exception as error:
        try:
            jax.eval_shape(grad_fn, W)
        except Exception:
            raise error from None
        _tell(error, hvp)
        raise


@contextlib.contextmanager
def found_by_compiling() -> Iterator[None]:
    """Do the same where a program has a `jax.custom_vjp` that is asked for too late."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" in str(error):
            _tell(error, "exact")
        raise


def _tell(error: Exception, hvp: str) -> None:
    if "hero_jax: " not in "".join(getattr(error, "__notes__", [])):
        error.add_note(
            f"hero_jax: hvp={hvp!r} differentiates the gradient of the loss "
            f"{_WAYS[hvp]} hvp='finite_difference', which needs gradients alone."
        )
