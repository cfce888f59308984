"""What is differentiated: a loss, over which examples, and which matrix of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, get_args

import chex
import jax
import jax.numpy as jnp
from jax import lax

from hero_jax import _autodiff, _batches, _checks, _programs, _tree
from hero_jax._typing import Grads, Params
from hero_jax.curvature import _no_forward_rule, _progress
from hero_jax.leaves import Overrides

Matrix = Literal["hessian", "gauss_newton"]
Product = Literal["exact", "reverse", "finite_difference"]
MatVec = Callable[[Params], Params]
Outputs = TypeVar("Outputs")


class Options(TypedDict, total=False):
    """Options that all diagnostics share.

    Attributes:
      has_aux: whether `loss_fn` returns `(loss, auxiliary)`; the latter is dropped.
      matrix: "hessian" (default), or "gauss_newton" for a :class:`ComposedLoss`.
      hvp: how products with the Hessian are taken. "exact" (default) differentiates
        the gradient forwards. Losses that cannot be, such as those with a
        `jax.custom_vjp`, take "reverse", backwards once more: as exact, at up to twice
        the price and memory. "finite_difference" asks for nothing but gradients, as of
        callbacks: `(grad L(W + e v) - grad L(W - e v)) / 2e`, with a step of
        `eps^(1/3) ||W||`. In float32 it is off by about 1e-3 where the loss is smooth,
        and is no good where it has kinks, as rectifiers do.
      batch_size: examples that go through `loss_fn` at once, which must return the mean
        over them; all by default. The memory is then that of one batch, and the mean
        over all examples is exact, also if the last batch is smaller. Every product
        computes the gradient again, which those over a single batch share.
      batch_argnums: positions of the arguments of `loss_fn` whose arrays have a leading
        axis of examples, as `argnums` counts them in JAX; all but `params`, which are
        at 0, by default. For `batch_size`.
      leaves: what :mod:`hero_jax.leaves` does not see in paths and shapes, where layers
        are told apart; in :mod:`hero_jax.mixed_precision` as for its errors.
      progress: `(done, total)`, called on the host whenever a batch has been through a
        product. It is not called inside `jax.jit`.
    """

    has_aux: bool
    matrix: Matrix
    hvp: Product
    batch_size: int | None
    batch_argnums: int | Sequence[int] | None
    leaves: Overrides | None
    progress: Callable[[int, int], None] | None


@dataclasses.dataclass(frozen=True)
class ComposedLoss(_programs.MadeOfFunctions, Generic[Outputs]):
    """A loss that knows its network: `criterion(outputs_fn(params, *args), *args)`.

    It is a loss function itself. `matrix="gauss_newton"` needs it: with J the Jacobian
    of the outputs and C the Hessian of the criterion in them, that matrix is J'CJ. It
    is positive semidefinite where the criterion is convex, and equals the Hessian where
    the network is linear or fits perfectly.

    Attributes:
      outputs_fn: `(params, *args) -> outputs`, such as logits.
      criterion: `(outputs, *args) -> loss`, a mean over examples.

    References:
      Schraudolph, `Fast curvature matrix-vector products
      <https://doi.org/10.1162/08997660260028683>`_, 2002.
    """

    outputs_fn: Callable[..., Outputs]
    criterion: Callable[..., chex.Array]

    def __call__(self, params: Params, *args: Any) -> chex.Array:
        """Return the loss."""
        return self.criterion(self.outputs_fn(params, *args), *args)


class Problem(NamedTuple):
    """All about a diagnostic but the arrays; hashable."""

    loss_fn: Callable[..., Any]
    has_aux: bool
    matrix: Matrix
    hvp: Product
    batch_size: int | None
    batch_argnums: tuple[int, ...]
    reports: bool

    def loss(self, params: Params, args: Sequence[Any]) -> chex.Array:
        """Return the loss of one batch, a scalar of float32 or wider."""
        value = self.loss_fn(params, *args)
        loss, _ = _checks.loss_and_aux("loss_fn", value, self.has_aux)
        return jnp.asarray(loss, _tree.wide_dtype(jnp.result_type(loss)))

    def mean(
        self, function: Callable[[Sequence[Any]], Any], args: Sequence[Any]
    ) -> Any:
        """Average a function of a batch over all examples, one batch at a time."""
        if self.batch_size is None or self.num_batches(args) == 1:
            return function(args)
        all_args, where = [None, *args], self.batch_argnums  # params come first
        size = _batches.number_of_examples(all_args, where)
        parts, rest = _batches.cut(all_args, where, self.batch_size)

        def weighted(examples: list[Any]) -> Any:
            share = jax.tree.leaves(examples)[0].shape[0] / size
            batch = _batches.replaced(all_args, where, examples)[1:]
            return jax.tree.map(
                lambda x: x * jnp.asarray(share, x.dtype), function(batch)
            )

        def body(total: Any, part: list[Any]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, weighted(part)), None

        if rest is None:
            shapes = jax.eval_shape(
                lambda: weighted(jax.tree.map(lambda x: x[0], parts))
            )
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        else:
            total = weighted(rest)
        return lax.scan(body, total, parts)[0]

    def mean_loss(self, params: Params, args: Sequence[Any]) -> chex.Array:
        """Return the loss over all examples."""
        return self.mean(lambda batch: self.loss(params, batch), args)

    def loss_and_gradient(
        self, params: Params, args: Sequence[Any], reports: bool = False
    ) -> tuple[chex.Array, Grads]:
        """Return loss and gradient over all examples."""

        def of_batch(batch: Sequence[Any]) -> tuple[chex.Array, Grads]:
            loss, gradient = jax.value_and_grad(self.loss)(params, batch)
            if reports:
                _progress.tick_after(gradient)
            return loss, gradient

        loss, gradient = self.mean(of_batch, args)
        return loss, gradient

    def product(self, params: Params, args: Sequence[Any]) -> MatVec:
        """Return the function `v -> Av` with the matrix of all examples."""
        if self.num_batches(args) == 1:
            return self._reporting(self._product_of_batch(params, args))

        def matvec(v: Params) -> Params:
            return self.mean(
                lambda batch: self._reporting(self._product_of_batch(params, batch))(v),
                args,
            )

        return matvec

    def num_batches(self, args: Sequence[Any]) -> int:
        """Return how many batches there are."""
        if self.batch_size is None:
            return 1
        size = _batches.number_of_examples([None, *args], self.batch_argnums)
        return math.ceil(size / self.batch_size)

    def _product_of_batch(self, params: Params, args: Sequence[Any]) -> MatVec:
        if self.matrix == "gauss_newton":
            return _gauss_newton(self.loss_fn, params, args, self.hvp)
        return _hvp(lambda W: jax.grad(self.loss)(W, args), params, self.hvp)

    def _reporting(self, matvec: MatVec) -> MatVec:
        if not self.reports:
            return matvec

        def reporting(v: Params) -> Params:
            result = matvec(v)
            _progress.tick_after(result)
            return result

        return reporting


def _hvp(grad_fn: Callable[[Params], Grads], W: Params, hvp: Product) -> MatVec:
    """Return the product with the derivative of a gradient at W."""
    if hvp == "finite_difference":
        return lambda v: _central_difference(grad_fn, W, v)
    if hvp == "exact":
        _, product, _ = _autodiff.gradient_and_hvp(
            lambda W: (grad_fn(W), None), W, way_round=_no_forward_rule.WAYS_ROUND
        )
        return product

    def matvec(v: Params) -> Params:
        with _no_forward_rule.backwards(grad_fn, W):
            return pull(v)[0]

    with _no_forward_rule.backwards(grad_fn, W):
        _, pull = jax.vjp(grad_fn, W)
    return matvec


def _central_difference(
    grad_fn: Callable[[Params], Grads], W: Params, v: Params
) -> Params:
    length, weights = _tree.global_norm(v), _tree.global_norm(W)
    step = jnp.finfo(length.dtype).eps ** (1 / 3) * jnp.where(weights > 0, weights, 1)
    e = step / jnp.where(length > 0, length, 1)

    def at(t: chex.Array) -> Grads:
        return grad_fn(jax.tree.map(lambda w, d: w + t.astype(w.dtype) * d, W, v))

    return jax.tree.map(lambda a, b: (a - b) / (2 * e).astype(a.dtype), at(e), at(-e))


def _gauss_newton(
    loss: Any, params: Params, args: Sequence[Any], hvp: Product
) -> MatVec:
    """Return the product J'CJ v.

    J v is taken as the transpose of the linear function `u -> J'u`, which asks for
    nothing but reverse mode of the network: its convolutions may have no other.
    """
    outputs, pull = jax.vjp(lambda W: loss.outputs_fn(W, *args), params)
    _, push = jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, outputs))

    def criterion(y: Any) -> chex.Array:
        value, _ = _checks.loss_and_aux("criterion", loss.criterion(y, *args), False)
        return value

    curve = _hvp(jax.grad(criterion), outputs, hvp)
    return lambda v: pull(curve(push(v)[0]))[0]


def make(
    loss_fn: Callable[..., Any],
    params: Params,
    args: Sequence[Any],
    options: Options,
) -> Problem:
    """Check what all diagnostics share."""
    _checks.check_callable("loss_fn", loss_fn, "(params, *args) -> loss")
    _tree.check_params("params", params)
    _checks.check_options(options, Options.__annotations__)
    matrix = options.get("matrix", "hessian")
    _checks.check_choice("matrix", matrix, get_args(Matrix))
    hvp = options.get("hvp", "exact")
    _checks.check_choice("hvp", hvp, get_args(Product))
    if matrix == "gauss_newton" and not isinstance(loss_fn, ComposedLoss):
        raise TypeError(
            "matrix='gauss_newton' needs loss_fn to be a ComposedLoss, which tells the "
            f"network from the criterion, got {type(loss_fn).__name__}."
        )
    progress = options.get("progress")
    if progress is not None:
        _checks.check_callable("progress", progress, "(done, total)")
    batch_size = options.get("batch_size")
    where = batch_positions(args, options)
    has_aux = options.get("has_aux", False)
    problem = Problem(
        loss_fn, has_aux, matrix, hvp, batch_size, where, progress is not None
    )
    if batch_size is not None:
        _checks.check_integer("batch_size", batch_size)
        problem.num_batches(args)
    return problem


def batch_positions(args: Sequence[Any], options: Options) -> tuple[int, ...]:
    """Return the positions of the examples, `params` being at 0."""
    batch_argnums = options.get("batch_argnums")
    if batch_argnums is None:
        return tuple(range(1, len(args) + 1))
    return _batches.positions(batch_argnums, len(args) + 1, weights=(0,))
