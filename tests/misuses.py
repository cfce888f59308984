"""Mistakes that newcomers make, what they are told, and what to do: `docs/errors.md`.

`python -m tests.misuses > docs/errors.md` writes the page; `test_misuse.py` makes every
mistake, and compares the page.
"""

import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hero_jax
from hero_jax import curvature, family, landscape, quant

EXAMPLES = Path(__file__).parents[1] / "examples"

x, y = np.linspace(-1.0, 1.0, 32, dtype=np.float32).reshape(8, 4), np.arange(8) % 3
params = {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.zeros(3)}
integers = {"kernel": jnp.ones((4, 3), jnp.int32), "bias": jnp.zeros(3)}


class Misuse(NamedTuple):
    """A mistake.

    Attributes:
      id: names the test.
      did: what the newcomer did.
      do: does it.
      error: what is raised.
      told: parts of the message, in order.
      remedy: what to do.
      needs: packages beyond those of the core.
    """

    id: str
    did: str
    do: Callable[[], Any]
    error: type[BaseException]
    told: tuple[str, ...]
    remedy: str
    needs: tuple[str, ...] = ()


def losses(params: Any, x: Any, y: Any) -> jax.Array:
    logits = x @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def loss_fn(params: Any, x: Any, y: Any) -> jax.Array:
    return losses(params, x, y).mean()


@jax.custom_vjp
def square(w: jax.Array) -> jax.Array:
    return w**2


square.defvjp(lambda w: (square(w), w), lambda w, t: (2.0 * w * t,))


def with_its_own_rule(params: Any, x: Any, y: Any) -> jax.Array:
    return loss_fn({**params, "kernel": square(params["kernel"])}, x, y)


def with_aux(params: Any, x: Any, y: Any) -> tuple[jax.Array, Any]:
    return loss_fn(params, x, y), {"batch_stats": jnp.ones(3)}


@jax.jit
def grad_fn(params: Any) -> Any:
    return jax.grad(loss_fn)(params, x, y)


def hero(loss_fn: Any = loss_fn, *args: Any, **options: Any) -> Callable[..., Any]:
    """Return the drop-in for `jax.value_and_grad`."""
    return hero_jax.hero_value_and_grad(loss_fn, *args, **{"h": 0.04} | options)


def cure(loss_fn: Any = loss_fn) -> Callable[..., Any]:
    """Return CURE's drop-in for `jax.value_and_grad`."""
    return family.cure_value_and_grad(loss_fn, h=1.0, gamma=0.1)


def nnx_net() -> Any:
    """Return a module with BatchNorm."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))


def nnx_loss(model: Any, x: Any, y: Any) -> jax.Array:
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def nnx_with_aux(model: Any, x: Any, y: Any) -> tuple[jax.Array, Any]:
    return nnx_loss(model, x, y), x


def nnx_counting(model: Any, x: Any, y: Any) -> jax.Array:
    model.calls = getattr(model, "calls", 0) + 1
    return nnx_loss(model, x, y)


def nnx_hero(loss_fn: Any = nnx_loss, **options: Any) -> Callable[..., Any]:
    """Return the drop-in for `nnx.value_and_grad`."""
    import hero_jax.nnx

    return hero_jax.nnx.hero_value_and_grad(loss_fn, **{"h": 0.04} | options)


def nnx_core() -> Any:
    """Take the state of a module for a tree of weights."""
    from flax import nnx

    state = nnx.state(nnx_net())
    return hero(lambda state, x, y: nnx_loss(nnx_net(), x, y))(state, x, y)


def update(*args: Any, **kwargs: Any) -> Any:
    """Call the update of `hero`: without arguments, but for these, as it should be."""
    tx = hero_jax.hero(h=0.04)
    usual = (grad_fn(params), tx.init(params), params)
    return tx.update(*args, *usual[len(args) :], **kwargs)


def flax_train_state(tx: Any) -> Any:
    from flax.training.train_state import TrainState

    return TrainState.create(apply_fn=None, params=params, tx=tx)


def train_state() -> Any:
    tx = optax.chain(hero_jax.hero(h=0.04), optax.sgd(0.1))
    return flax_train_state(tx).apply_gradients(grads=grad_fn(params))


def equinox_net() -> Any:
    import equinox as eqx

    return eqx.nn.MLP(4, 3, 8, depth=1, key=jax.random.key(0))


def calling_itself() -> Callable[[Any], jax.Array]:
    """Return a loss that has no forward mode."""
    power = jax.custom_vjp(lambda w: w**2)
    power.defvjp(lambda w: (power(w), power(w)), lambda p, dy: (2 * dy * p**0.5,))
    return lambda w: jnp.sum(power(w))


def batch_norm() -> tuple[Any, Any]:
    """Return a network with BatchNorm, and its variables."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dense(3)(x)

    return Net(), Net().init(jax.random.key(0), x, train=False)


def flax_loss(variables: Any, x: Any, y: Any, **kwargs: Any) -> Any:
    """Return the loss; after new statistics, if they are `mutable`."""
    net, _ = batch_norm()
    logits = net.apply(variables, x, train=True, **kwargs)
    logits, *new = logits if kwargs else (logits,)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return (loss, *new) if new else loss


def without_has_aux() -> Any:
    _, variables = batch_norm()
    stats = variables["batch_stats"]

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        return flax_loss(variables, x, y, mutable=["batch_stats"])

    return hero(loss_fn)(variables["params"], x, y)


def without_mutable() -> Any:
    _, variables = batch_norm()
    stats = {"batch_stats": variables["batch_stats"]}
    loss_fn = lambda params, x, y: flax_loss({"params": params, **stats}, x, y)
    return hero(loss_fn)(variables["params"], x, y)


def all_variables() -> Any:
    _, variables = batch_norm()
    loss_fn = lambda v, x, y: flax_loss(v, x, y, mutable=["batch_stats"])
    return hero(loss_fn, has_aux=True)(variables, x, y)


def quantized_to_flax() -> Any:
    net, variables = batch_norm()
    small = {**variables, "params": quant.quantize(variables["params"], bits=4)}
    return net.apply(small, x, train=False)


def quantized_train_state() -> Any:
    from flax.training.train_state import TrainState

    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    return quant.quantize(state, bits=4)


def nnx_linear() -> Any:
    import pytest
    from flax import nnx

    pytest.importorskip("flax", minversion="0.12")  # modules are trees since

    return nnx.Linear(4, 4, rngs=nnx.Rngs(0))


def quantized_nnx_shared() -> Any:
    from flax import nnx

    net = nnx.Sequential(nnx_linear(), nnx_linear())
    net.layers[1].kernel = net.layers[0].kernel
    return quant.quantize(net, bits=4)


def load(damage: Callable[[bytes], bytes] | None = None, like: Any = None) -> Any:
    """Save quantized weights, damage the file, load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.safetensors")
        if damage is not None:
            quant.save(path, quant.quantize(params, bits=4))
            path.write_bytes(damage(path.read_bytes()))
        return quant.load(path, like=like)


def load_foreign() -> Any:
    import safetensors.numpy

    return load(lambda _: safetensors.numpy.save({"kernel": np.ones((4, 3))}))


def save_nowhere() -> None:
    with tempfile.TemporaryDirectory() as folder:
        quant.save(Path(folder, "weights", "net.safetensors"), params)


def surface(loss_fn: Any = loss_fn, directions: Any = None, **options: Any) -> Any:
    axis = jnp.linspace(-1.0, 1.0, 3)
    directions = [params] if directions is None else directions
    return landscape.loss_surface(loss_fn, params, directions, [axis], x, y, **options)


def model(name: str = "resnet8", num_classes: int = 10) -> Any:
    from hero_jax import models

    return models.create(name, num_classes=num_classes)


def initialize(*shape: int) -> Any:
    init = model().init
    return jax.eval_shape(
        lambda: init(jax.random.key(0), jnp.zeros(shape), train=False)
    )


def command(name: str, *arguments: str) -> None:
    """Run a command of the examples; what it prints becomes that of a `SystemExit`."""
    told = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(told):
        arguments = (*arguments, "--out", folder)
        try:
            module = importlib.import_module(f"examples.{name}")
            status = getattr(module, "parse" if "experiments" in name else "main")(
                arguments
            )
        except SystemExit as error:
            status = error.code
    if isinstance(status, int) and status:
        raise SystemExit(told.getvalue())


def run_of_another_config() -> None:
    """Use the folder of a run again with another config."""
    with tempfile.TemporaryDirectory() as folder:
        from examples.image_classification import config, run

        Path(folder, "config.toml").write_text(config.dumps(config.Config()))
        run.check_folder(Path(folder), config.Config(gamma=7.0))


RECIPE = ("tyro", "orbax.checkpoint", "tensorflow_datasets")
FLAX = ("flax",)
FILES = ("safetensors", "flatbuffers")

TABLE: dict[str, tuple[Misuse, ...]] = {
    "`hero`, the link of a chain": (
        Misuse(
            "no_grad_fn",
            "Called `tx.update(grads, state, params)`, as for any other optimizer.",
            lambda: update(),
            ValueError,
            (
                "hero needs",
                "grad_fn",
                "tx.update(grads, state, params, grad_fn=grad_fn)",
            ),
            "Pass `grad_fn=jax.grad(lambda params: loss_fn(params, batch))`.",
        ),
        Misuse(
            "no_params",
            "Left `params` out of `tx.update`.",
            lambda: update(grad_fn(params), hero_jax.hero(h=0.04).init(params), None),
            ValueError,
            (
                "hero needs the weights",
                "tx.update(grads, state, params, grad_fn=grad_fn)",
            ),
            "Pass the weights as the third argument.",
        ),
        Misuse(
            "train_state",
            "Put `hero` into the chain of a Flax `TrainState`.",
            train_state,
            ValueError,
            (
                "hero needs the weights, and grad_fn",
                "TrainState.apply_gradients, use hero_jax.hero_value_and_grad",
            ),
            "Take the gradient by `hero_value_and_grad`, and leave `hero` out of `tx`.",
            FLAX,
        ),
        Misuse(
            "state_of_another",
            "Put `hero` into the chain, but kept the old optimizer's state.",
            lambda: update(
                grad_fn(params), optax.sgd(0.1).init(params), grad_fn=grad_fn
            ),
            TypeError,
            ("state must be the HeroState", "init(params)", "got tuple"),
            "Call `tx.init(params)` again after changing the chain.",
        ),
        Misuse(
            "grads_of_another_structure",
            "Passed the gradients of some of the weights.",
            lambda: update({"kernel": grad_fn(params)["kernel"]}, grad_fn=grad_fn),
            ValueError,
            ("grads must have the tree structure of params", "expected", "got"),
            "Pass gradients of all weights; choose leaves by `perturb_mask` and "
            "`penalty_mask`.",
        ),
        Misuse(
            "grads_of_other_shapes",
            "Passed gradients that were reshaped.",
            lambda: update(jax.tree.map(jnp.ravel, grad_fn(params)), grad_fn=grad_fn),
            ValueError,
            ("grads must have the shapes of params", "(4, 3) at ['kernel']", "(12,)"),
            "Put `hero` first in the chain, before what changes shapes.",
        ),
        Misuse(
            "grad_fn_with_value",
            "Passed a `grad_fn` made by `jax.value_and_grad`.",
            lambda: update(
                grad_fn=jax.value_and_grad(lambda p: loss_fn(p, x, y)),
            ),
            ValueError,
            ("grad_fn's result, the gradient without value", "structure of params"),
            "Make it by `jax.grad`.",
        ),
        Misuse(
            "grad_fn_with_aux",
            "Passed a `grad_fn` made by `jax.grad(..., has_aux=True)`.",
            lambda: update(
                grad_fn=jax.grad(lambda p: with_aux(p, x, y), has_aux=True),
            ),
            ValueError,
            ("without value or auxiliary output", "structure of params"),
            "Drop the auxiliary output: `lambda params: grad_and_aux(params)[0]`.",
        ),
        Misuse(
            "grad_fn_of_batch",
            "Passed `grad_fn=jax.grad(loss_fn)`, which wants the batch, too.",
            lambda: update(grad_fn=jax.grad(loss_fn)),
            TypeError,
            (
                "missing 2 required positional arguments",
                "grad_fn was called as grad_fn(params)",
                "jax.grad(lambda params: loss_fn(params, batch))",
            ),
            "Close over the batch that the gradients came from.",
        ),
        Misuse(
            "grads_for_grad_fn",
            "Passed the gradients themselves as `grad_fn`.",
            lambda: update(grad_fn=grad_fn(params)),
            TypeError,
            ("grad_fn must be a callable params -> grads", "got dict"),
            "Pass the function.",
        ),
    ),
    "The loss": (
        Misuse(
            "has_aux_forgotten",
            "Returned `(loss, aux)` from the loss, without `has_aux=True`.",
            lambda: hero(with_aux)(params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "got a tuple of 2", "has_aux=True"),
            "Pass `has_aux=True`.",
        ),
        Misuse(
            "has_aux_without_aux",
            "Passed `has_aux=True`, and returned the loss alone.",
            lambda: hero(loss_fn, has_aux=True)(params, x, y),
            TypeError,
            ("loss_fn must return a pair (loss, aux) with has_aux=True", "float32"),
            "Return `(loss, aux)`, or leave `has_aux` out.",
        ),
        Misuse(
            "aux_of_two",
            "Returned `(loss, logits, batch_stats)` with `has_aux=True`.",
            lambda: hero(lambda *a: (loss_fn(*a), 1, 2), has_aux=True)(params, x, y),
            TypeError,
            ("loss_fn must return a pair (loss, aux)", "got a tuple of 3"),
            "Return `(loss, (logits, batch_stats))`.",
        ),
        Misuse(
            "aux_first",
            "Returned `(aux, loss)`.",
            lambda: hero(lambda *a: with_aux(*a)[::-1], has_aux=True)(params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "got dict for the loss"),
            "Return `(loss, aux)`.",
        ),
        Misuse(
            "losses_of_examples",
            "Returned the losses of all examples.",
            lambda: hero(losses)(params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "shape (8,)", "Take the mean"),
            "Return their mean.",
        ),
        Misuse(
            "loss_of_one_entry",
            "Returned a loss of shape `(1,)`.",
            lambda: hero(lambda *a: loss_fn(*a)[None])(params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "shape (1,)"),
            "Return `loss[0]`, or a mean.",
        ),
        Misuse(
            "no_return",
            "Forgot `return` in the loss.",
            lambda: hero(lambda *a: None)(params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "got NoneType"),
            "Return the loss.",
        ),
        Misuse(
            "count_as_loss",
            "Returned the number of errors, an integer.",
            lambda: hero(lambda *a: jnp.sum(y))(params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss, a real floating-point number", "int"),
            "Return a differentiable loss.",
        ),
        Misuse(
            "no_forward_mode",
            "Differentiated a loss with a `custom_vjp`, a callback or a neural ODE "
            "inside, for which JAX has no forward mode.",
            lambda: hero(calling_itself(), gamma=0.5)(jnp.ones((2, 2))),
            TypeError,
            ("custom_vjp", "has no forward-mode rule", "hvp=hero_jax.FiniteDifference"),
            "Pass `hvp=hero_jax.FiniteDifference()`; to GNP and GRAD-L1 `radius`.",
        ),
        Misuse(
            "value_for_loss_fn",
            "Passed the loss in place of the function.",
            lambda: hero(loss_fn(params, x, y)),
            TypeError,
            ("loss_fn must be a callable (params, *args, **kwargs) -> loss", "Array"),
            "Pass `loss_fn`, without calling it.",
        ),
    ),
    "`h`, `gamma` and other options": (
        Misuse(
            "h_string",
            'Passed `h="1"`, from a command line.',
            lambda: hero(h="1"),
            TypeError,
            ("h must be a real number >= 0", "got str: '1'"),
            "Convert it: `float(h)`.",
        ),
        Misuse(
            "h_negative",
            "Passed a negative `h`.",
            lambda: hero(h=-0.5),
            ValueError,
            ("h must be finite and >= 0, got -0.5",),
            "Pass a number of at least 0.",
        ),
        Misuse(
            "h_several",
            "Passed an array of several `h`.",
            lambda: hero(h=jnp.array([0.5, 1.0])),
            ValueError,
            ("h must be a scalar, got shape (2,)", "jax.vmap"),
            "Use `jax.vmap` over a function of `h`.",
        ),
        Misuse(
            "h_schedule",
            "Passed a schedule to `hero_value_and_grad`.",
            lambda: hero(h=optax.cosine_decay_schedule(1.0, 100)),
            TypeError,
            ("h must be a real number", "Schedules are accepted by hero_jax.hero only"),
            "Pass `h=schedule(step)` inside the jitted step, or use `hero`.",
        ),
        Misuse(
            "gamma_nan",
            "Passed a `gamma` that is NaN.",
            lambda: hero(gamma=float("nan")),
            ValueError,
            ("gamma must be finite and >= 0, got nan",),
            "Pass a number of at least 0.",
        ),
        Misuse(
            "h_by_position",
            "Passed `h` by position: `hero_value_and_grad(loss_fn, 0.1)`.",
            lambda: hero(loss_fn, 0.1),
            TypeError,
            ("argnums must name arguments by their positions", "got 0.1"),
            "Name it: `h=0.1`. The second argument is `argnums`, as in JAX.",
        ),
        Misuse(
            "perturbation_unknown",
            'Passed `perturbation="layer_wise"`.',
            lambda: hero(perturbation="layer_wise"),
            ValueError,
            (
                "perturbation must be one of",
                "'layerwise', 'normalized'",
                "got 'layer_wise'",
            ),
            "Take one of these names, or a function.",
        ),
        Misuse(
            "perturbation_called",
            "Passed `perturbation=hero_jax.perturbation.layerwise()`.",
            lambda: hero(perturbation=hero_jax.perturbation.layerwise()),
            TypeError,
            ("layerwise takes two arguments", "without calling it"),
            "Leave the parentheses out.",
        ),
        Misuse(
            "perturbation_none",
            "Passed `perturbation=None`.",
            lambda: hero(perturbation=None),
            TypeError,
            ("perturbation must be a callable (params, grads) -> z, or one of", "None"),
            "Leave it out for the default.",
        ),
        Misuse(
            "perturbation_of_another_structure",
            "Wrote a perturbation that returns something else than a tree like params.",
            lambda: hero(h=1.0, perturbation=lambda W, g: W["kernel"])(params, x, y),
            ValueError,
            ("the perturbation's result must have the tree structure of params",),
            "Return a tree like `params`, with zeros where nothing moves.",
        ),
        Misuse(
            "inject_hyperparams",
            "Wrapped `hero` with a perturbation that is a function in "
            "`optax.inject_hyperparams`.",
            lambda: optax.inject_hyperparams(hero_jax.hero)(
                0.04, perturbation=hero_jax.perturbation.adaptive
            ).init(params),
            TypeError,
            (
                "adaptive takes two arguments",
                "optax.inject_hyperparams calls every function as a schedule",
                "perturbation='adaptive'",
            ),
            "Name it by its string, or list it in `static_args`.",
        ),
        Misuse(
            "reduction_unknown",
            'Passed `reduction="avg"`.',
            lambda: hero(reduction="avg"),
            ValueError,
            ("reduction must be one of ['mean', 'norm', 'sum'], got 'avg'",),
            'Take `"norm"`, `"sum"` (the paper) or `"mean"` (the released code).',
        ),
        Misuse(
            "hvp_unknown",
            'Passed `hvp="finite_difference"`.',
            lambda: hero(hvp="finite_difference"),
            ValueError,
            ("hvp must be 'exact' or a hero_jax.FiniteDifference(step=...)", "got"),
            "Say with which step: `hvp=hero_jax.FiniteDifference(1e-3)`.",
        ),
        Misuse(
            "rho",
            "Passed `rho`, as SAM's libraries call it.",
            lambda: hero(rho=0.05),
            TypeError,
            ("unexpected keyword argument 'rho'",),
            "It is called `h` here, in units of the perturbation.",
        ),
    ),
    "Weights": (
        Misuse(
            "params_integer",
            "Passed weights that are integers.",
            lambda: hero()(integers, x, y),
            TypeError,
            ("params must have real floating-point arrays", "int32 at ['kernel']"),
            "Cast them, or pass what is not trained as another argument of the loss.",
        ),
        Misuse(
            "params_complex",
            "Passed complex weights.",
            lambda: hero()({**params, "bias": jnp.zeros(3, jnp.complex64)}, x, y),
            TypeError,
            ("params must have real floating-point arrays", "complex64 at ['bias']"),
            "Keep real and imaginary part as two leaves.",
        ),
        Misuse(
            "params_bool",
            "Kept a mask of booleans among the weights.",
            lambda: hero()({**params, "mask": jnp.ones(3, bool)}, x, y),
            TypeError,
            ("params must have real floating-point arrays", "bool at ['mask']"),
            "Pass it as another argument of the loss.",
        ),
        Misuse(
            "params_none",
            "Passed `None` for the weights.",
            lambda: hero()(None, x, y),
            TypeError,
            ("params must be weights alone, got None",),
            "Pass the weights; look for an `init` that returned nothing.",
        ),
        Misuse(
            "params_quantized",
            "Trained on with quantized weights.",
            lambda: hero()(quant.quantize(params, bits=4), x, y),
            TypeError,
            ("params must have real floating-point", "quant.dequantize(params)"),
            "Pass `quant.dequantize(params)`.",
        ),
        Misuse(
            "params_by_keyword",
            "Passed the weights by keyword.",
            lambda: hero()(params=params, x=x, y=y),
            TypeError,
            ("argnums=0 asks for a positional argument", "Pass params by position"),
            "Pass them by position, as to `jax.value_and_grad`.",
        ),
        Misuse(
            "argnums_out_of_range",
            "Passed `argnums=3` for a loss of three arguments.",
            lambda: hero(argnums=3)(params, x, y),
            TypeError,
            ("argnums=3 asks for a positional argument", "got 3 positional arguments"),
            "Count from 0.",
        ),
        Misuse(
            "argnums_at_labels",
            "Pointed `argnums` at integer labels.",
            lambda: hero(argnums=2)(params, x, y),
            TypeError,
            ("params must have real floating-point arrays", "int"),
            "Point it at the weights.",
        ),
        Misuse(
            "argnums_name",
            'Passed `argnums="params"`.',
            lambda: hero(argnums="params"),
            TypeError,
            ("argnums must name arguments by their positions", "got 'params'"),
            "Pass the position.",
        ),
        Misuse(
            "mask_of_another_structure",
            "Passed a mask for names that are not there.",
            lambda: hero(penalty_mask={"kernels": True})(params, x, y),
            ValueError,
            ("penalty_mask must have the tree structure of params", "'kernels'"),
            "Use the tree of `params`, a prefix of it, or a function of it.",
        ),
        Misuse(
            "mask_of_numbers",
            "Passed a mask of ones and zeros.",
            lambda: hero(perturb_mask={"kernel": 1, "bias": 0})(params, x, y),
            TypeError,
            ("perturb_mask must have plain booleans", "got 0 at ['bias']"),
            "Use `True` and `False`.",
        ),
        Misuse(
            "mask_of_arrays",
            "Passed a mask with an entry for every weight.",
            lambda: hero(
                perturb_mask=jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
            )(params, x, y),
            TypeError,
            ("perturb_mask must have plain booleans, one for each leaf", "(3,)"),
            "Choose whole leaves; single weights are for a perturbation of your own.",
        ),
        Misuse(
            "mask_of_path_and_leaf",
            "Passed a mask function of path and leaf.",
            lambda: hero(penalty_mask=lambda path, leaf: True)(params, x, y),
            TypeError,
            ("missing 1 required", "penalty_mask was called as penalty_mask(params)"),
            "Take the whole tree: `jax.tree_util.tree_map_with_path(f, params)`.",
        ),
        Misuse(
            "mask_of_path",
            'Passed a mask function of a path, `lambda path: "kernel" in path`.',
            lambda: hero(penalty_mask=lambda path: "kernel" in path)(params, x, y),
            TypeError,
            ("penalty_mask must return a tree of booleans", "got True", "whole tree"),
            "Take the whole tree: `jax.tree_util.tree_map_with_path(f, params)`.",
        ),
        Misuse(
            "mask_of_leaf",
            "Passed a mask function of a leaf, `lambda x: x.ndim > 1`.",
            lambda: hero(penalty_mask=lambda x: x.ndim > 1)(params, x, y),
            AttributeError,
            ("ndim", "penalty_mask was called as penalty_mask(params)", "whole tree"),
            "Pass `lambda params: jax.tree.map(lambda x: x.ndim > 1, params)`.",
        ),
        Misuse(
            "nothing_to_penalize",
            "Flattened the weights to one vector: by default only leaves of two or "
            "more dimensions move and are penalized.",
            lambda: hero(lambda w: (w**2).mean())(jnp.ones(4)),
            ValueError,
            ("h must have leaves to act on", "perturb_mask=True", "h=0"),
            "Pass `perturb_mask=True`, with the penalty `penalty_mask=True`, too.",
        ),
        Misuse(
            "params_train_state",
            "Passed a `TrainState` for the weights.",
            lambda: hero()(flax_train_state(optax.sgd(0.1)), x, y),
            TypeError,
            ("params must be weights alone", "got a TrainState", "state.params"),
            "Pass `state.params`.",
            FLAX,
        ),
        Misuse(
            "params_equinox",
            "Passed an Equinox module for the weights.",
            lambda: hero()(equinox_net(), x, y),
            TypeError,
            ("params must have real floating-point arrays", "eqx.partition(model"),
            "Pass `params` of `params, static = eqx.partition(model, "
            "eqx.is_inexact_array)`, and `eqx.combine` them in the loss.",
            ("equinox",),
        ),
    ),
    "Flax": (
        Misuse(
            "flax_without_has_aux",
            'Used `mutable=["batch_stats"]` in the loss, without `has_aux=True`.',
            without_has_aux,
            TypeError,
            ("loss_fn must return a scalar loss", "a tuple of 2", "has_aux=True"),
            "Pass `has_aux=True`, and keep the statistics that come back.",
            FLAX,
        ),
        Misuse(
            "flax_without_mutable",
            "Applied BatchNorm with `train=True`, without `mutable`.",
            without_mutable,
            Exception,
            ("Cannot update variable", 'collection "batch_stats" is immutable'),
            'Flax\'s own message: pass `mutable=["batch_stats"]`, which returns '
            "`(logits, new)`.",
            FLAX,
        ),
        Misuse(
            "flax_variables",
            "Passed all variables as `params`, BatchNorm's statistics included.",
            all_variables,
            TypeError,
            ("params must be weights alone", "['batch_stats', 'params']", "perturbed"),
            "Pass `variables['params']`, and `batch_stats` as another argument.",
            FLAX,
        ),
        Misuse(
            "flax_model",
            "Passed the model in place of its weights.",
            lambda: hero()(batch_norm()[0], x, y),
            TypeError,
            ("params must have real floating-point arrays", "got Net"),
            "Pass `variables['params']`.",
            FLAX,
        ),
    ),
    "Several devices, parts of a batch": (
        Misuse(
            "axis_of_no_map",
            "Passed `axis_name` without `pmap`, `shard_map` or `vmap`.",
            lambda: hero(axis_name="batch")(params, x, y),
            ValueError,
            ("axis_name must be an axis of the surrounding", "'batch'", "jit"),
            "Leave it out: `jit` of sharded arrays needs none.",
        ),
        Misuse(
            "averaged_without_axis",
            "Averaged over devices on one device.",
            lambda: hero_jax.parts.averaged(jax.value_and_grad(loss_fn), None),
            TypeError,
            ("averaged needs the axis_name", "use in_parts"),
            "Use `parts.in_parts` there.",
        ),
        Misuse(
            "parts_of_what",
            "Cut a batch in parts without saying which arguments it is.",
            lambda: hero_jax.parts.in_parts(hero(), 4, batch_argnums=None),
            TypeError,
            ("batch_argnums must name arguments by their positions", "got None"),
            "Say which arguments have a leading axis of examples: `(1, 2)`.",
        ),
        Misuse(
            "parts_not_dividing",
            "Asked for parts of 3 of 8 examples.",
            lambda: hero_jax.parts.in_parts(hero(), 3, batch_argnums=(1, 2))(
                params, x, y
            ),
            ValueError,
            ("size must divide the 8 examples", "got 3"),
            "Take a divisor of the batch.",
        ),
        Misuse(
            "parts_of_weights",
            "Counted the weights among the examples.",
            lambda: hero_jax.parts.in_parts(hero(), 4, batch_argnums=(0, 1))(
                params, x, y
            ),
            ValueError,
            ("must have the same number of them", "got the shapes ["),
            "Name the arguments behind them.",
        ),
    ),
    "Quantization": (
        Misuse(
            "bits_1",
            "Asked for 1 bit.",
            lambda: quant.quantize(params, bits=1, scheme="symmetric"),
            ValueError,
            ("bits must be an integer from 2 to 8, or 16, got 1",),
            "Ask for 2 to 8, or 16.",
        ),
        Misuse(
            "bits_9",
            "Asked for 9 bits.",
            lambda: quant.quantize(params, bits=9),
            ValueError,
            ("bits must be an integer from 2 to 8, or 16, got 9",),
            "Ask for 2 to 8, or 16.",
        ),
        Misuse(
            "bits_string",
            'Passed `bits="4"`.',
            lambda: quant.quantize(params, bits="4"),
            TypeError,
            ("bits must be an integer from 2 to 8, or 16", "got str: '4'"),
            "Pass the integer.",
        ),
        Misuse(
            "bits_tuple",
            "Passed several precisions, `bits=(4, 8)`.",
            lambda: quant.quantize(params, bits=(4, 8)),
            ValueError,
            ("bits must be an integer, a tree of integers", "got (4, 8)"),
            "Call it once for each, or use `quant.accuracy_against_bits`.",
        ),
        Misuse(
            "bits_of_nothing",
            "Gave bits to a pattern that matches no leaf.",
            lambda: quant.quantize(params, bits={"conv*": 4, "*": 8}),
            ValueError,
            ("'conv*' matches none of ['kernel']",),
            "Patterns are of paths such as `block/kernel`; biases are not quantized.",
        ),
        Misuse(
            "bits_for_some",
            "Gave patterns that leave some leaves out.",
            lambda: quant.quantize(params, bits={"head/*": 4, "head": 4}),
            ValueError,
            ("bits must have a pattern for every quantized leaf", "'*' matches all"),
            "Put `'*': 8` last, or choose the leaves by `mask`.",
        ),
        Misuse(
            "bits_traced",
            "Passed `bits` through `jax.jit`.",
            lambda: jax.jit(quant.quantize)(params, 4),
            TypeError,
            ("bits must be", "known before tracing", "fake_quantize takes traced"),
            "Use `quant.fake_quantize`, or `static_argnames`.",
        ),
        Misuse(
            "quantize_twice",
            "Quantized quantized weights again, to fewer bits.",
            lambda: quant.quantize(quant.quantize(params, bits=8), bits=4),
            ValueError,
            ("params must have a leaf to quantize", "QuantizedArray of 8 bits"),
            "Start from the float weights, or `dequantize` first.",
        ),
        Misuse(
            "quantize_integers",
            "Quantized weights that are integers already.",
            lambda: quant.quantize(integers, bits=4),
            ValueError,
            ("params must have a leaf to quantize: a floating-point", "int32 of shape"),
            "Pass floats.",
        ),
        Misuse(
            "quantize_chosen_integers",
            "The same, with `mask=True`.",
            lambda: quant.quantize(integers, bits=4, mask=True),
            TypeError,
            ("real floating-point arrays", "int32", "['kernel']"),
            "Pass floats.",
        ),
        Misuse(
            "quantize_vectors",
            "Quantized a tree of vectors: by default only matrices and kernels are.",
            lambda: quant.quantize({"scale": jnp.ones(3)}, bits=4),
            ValueError,
            ("params must have a leaf to quantize", "unless mask chooses", "(3,)"),
            "Choose leaves by `mask`; `mask=True` takes all.",
        ),
        Misuse(
            "quantize_nan",
            "Quantized weights of a training that diverged.",
            lambda: quant.quantize({"kernel": jnp.full((2, 2), jnp.nan)}, bits=4),
            ValueError,
            ("params must be finite to be quantized", "['kernel'] has NaN"),
            "Look at the training.",
        ),
        Misuse(
            "axis_out_of_range",
            "Passed `axis=2` for matrices.",
            lambda: quant.quantize(params, bits=4, axis=2),
            ValueError,
            ("axis 2 is out of bounds", "of dimension 2 (at ['kernel'])"),
            "Count from the end: `axis=-1` are the output channels of any Flax kernel.",
        ),
        Misuse(
            "group_without_axis",
            "Passed `group_size` without `axis`.",
            lambda: quant.quantize(params, bits=4, group_size=2),
            ValueError,
            ("group_size needs the axis to which it applies", "axis=None"),
            "Pass `axis`, too.",
        ),
        Misuse(
            "group_size_zero",
            "Passed `group_size=0`.",
            lambda: quant.quantize(params, bits=4, axis=0, group_size=0),
            ValueError,
            ("group_size must", "got 0"),
            "At least 1. It need not divide the axis: the last group is smaller then.",
        ),
        Misuse(
            "symmetric_flag",
            "Passed `symmetric=True`.",
            lambda: quant.quantize(params, bits=4, symmetric=True),
            TypeError,
            ("unknown options ['symmetric']", "known are", "scheme"),
            'Pass `scheme="symmetric"`.',
        ),
        Misuse(
            "percentile_as_share",
            "Passed a percentile of 0.999.",
            lambda: quant.quantize(
                params, bits=4, calibration="percentile", percentile=0.999
            ),
            ValueError,
            ("percentile must be above 50 and at most 100, got 0.999",),
            "Pass 99.9.",
        ),
        Misuse(
            "quantized_to_flax",
            "Called a network with quantized weights.",
            quantized_to_flax,
            TypeError,
            ("QuantizedArray",),
            "Call it with `quant.dequantize(tree)`, inside of `jit` to stay small.",
            FLAX,
        ),
        Misuse(
            "quantized_nnx",
            "Called a quantized Flax NNX module.",
            lambda: quant.quantize(nnx_linear(), bits=4)(x),
            TypeError,
            ("a QuantizedArray becomes an array by", "quant.dequantize(tree)"),
            "Call `quant.dequantize(module)`, inside of `jit` to stay small.",
            FLAX,
        ),
        Misuse(
            "quantized_nnx_shared",
            "Quantized a Flax NNX module that has a variable in two places.",
            quantized_nnx_shared,
            ValueError,
            ("one Flax NNX variable in two places", "Pass nnx.state(model)"),
            "Quantize `nnx.state(model)`, and `nnx.update(model, dequantized)`.",
            FLAX,
        ),
        Misuse(
            "quantized_train_state",
            "Quantized a `TrainState`, the moments of its optimizer with it.",
            quantized_train_state,
            ValueError,
            ("params must be weights alone", "opt_state", "Pass state.params"),
            "Pass `state.params`.",
            FLAX,
        ),
    ),
    "Files": (
        Misuse(
            "file_missing",
            "Loaded a file that is not there.",
            load,
            FileNotFoundError,
            ("No such file", "net.safetensors"),
            "Look at the path; relative ones are relative to the working directory.",
            FILES,
        ),
        Misuse(
            "folder_missing",
            "Saved into a folder that is not there.",
            save_nowhere,
            FileNotFoundError,
            ("No such file or directory", "weights"),
            "Make the folder.",
            FILES,
        ),
        Misuse(
            "file_foreign",
            "Loaded a safetensors file of another library.",
            load_foreign,
            quant.QuantFileError,
            ("was not written by hero_jax.quant.save",),
            "Load it by `safetensors.numpy.load_file`, and `quantize` it.",
            FILES,
        ),
        Misuse(
            "file_of_another_kind",
            "Loaded a file that is no safetensors file.",
            lambda: load(lambda _: b"PK\x03\x04 and so on"),
            quant.QuantFileError,
            ("is not a valid safetensors file",),
            "Load what `quant.save` wrote.",
            FILES,
        ),
        Misuse(
            "file_cut_off",
            "Loaded a file of which a part is missing.",
            lambda: load(lambda whole: whole[:-8]),
            quant.QuantFileError,
            ("is not a valid safetensors file",),
            "Copy or write it again.",
            FILES,
        ),
        Misuse(
            "file_damaged",
            "Loaded a file in which a bit has flipped.",
            lambda: load(lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])),
            quant.QuantFileError,
            ("is damaged: its checksum does not fit",),
            "Copy or write it again.",
            FILES,
        ),
        Misuse(
            "file_of_another_model",
            "Loaded the weights of another model.",
            lambda: load(lambda whole: whole, like={"w": jnp.zeros((4, 3))}),
            ValueError,
            ("like must have the structure of the file", "['w']", "['bias', 'kernel']"),
            "Pass `like=params`, as here: without it the loss or Flax finds out later.",
            FILES,
        ),
    ),
    "Curvature and landscape": (
        Misuse(
            "curvature_of_examples",
            "Asked for eigenvalues of the losses of all examples.",
            lambda: curvature.top_eigenvalues(losses, params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "shape (8,)", "Take the mean"),
            "Return their mean.",
        ),
        Misuse(
            "curvature_without_has_aux",
            "Used the training's loss, which has an auxiliary output.",
            lambda: curvature.trace(with_aux, params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "a tuple of 2", "has_aux=True"),
            "Pass `has_aux=True`.",
        ),
        Misuse(
            "curvature_option",
            "Misspelt an option.",
            lambda: curvature.trace(loss_fn, params, x, y, batchsize=4),
            TypeError,
            ("unknown options ['batchsize']", "known are", "batch_size"),
            "Take one of those that are listed.",
        ),
        Misuse(
            "curvature_no_vector",
            "Left the vector of `hvp` out.",
            lambda: curvature.hvp(loss_fn, params, x, y),
            ValueError,
            ("vector must have the tree structure of params",),
            "Pass it behind `params`.",
        ),
        Misuse(
            "gauss_newton_of_function",
            'Asked for `matrix="gauss_newton"` of a plain loss.',
            lambda: curvature.trace(loss_fn, params, x, y, matrix="gauss_newton"),
            TypeError,
            ("matrix='gauss_newton' needs loss_fn to be a ComposedLoss", "function"),
            "Wrap network and criterion: `curvature.ComposedLoss(outputs, criterion)`.",
        ),
        Misuse(
            "curvature_without_forward_rule",
            "Asked for the curvature of a loss with a `jax.custom_vjp`.",
            lambda: curvature.trace(with_its_own_rule, params, x, y),
            TypeError,
            ("custom_vjp function", "Pass hvp='reverse'", "hvp='finite_difference'"),
            "Pass `hvp='reverse'` or, if that is refused, `hvp='finite_difference'`.",
        ),
        Misuse(
            "direction_name",
            'Named a direction: `directions=["random"]`.',
            lambda: surface(directions=["random"]),
            TypeError,
            ("directions[0] must have real floating-point arrays", "got str"),
            "Pass `landscape.random_direction(key, params)`.",
        ),
        Misuse(
            "direction_alone",
            "Passed one direction, not in a list.",
            lambda: surface(directions=params),
            TypeError,
            ("directions[0] must have real floating-point arrays", "got str"),
            "Put it into a list.",
        ),
        Misuse(
            "surface_of_examples",
            "Drew the losses of all examples.",
            lambda: surface(losses),
            TypeError,
            ("loss_fn must return a scalar, the mean over the examples", "(8,)"),
            "Return their mean.",
        ),
    ),
    "Flax NNX": (
        Misuse(
            "nnx_module_as_tree",
            "Passed an NNX module's whole state to `hero_jax.hero_value_and_grad`.",
            nnx_core,
            TypeError,
            ("params must be weights alone", "'BatchStat'", "hero_jax.nnx"),
            "Use `hero_jax.nnx.hero_value_and_grad`, with the module.",
            FLAX,
        ),
        Misuse(
            "nnx_linen",
            "Passed a tree of weights to `hero_jax.nnx.hero_value_and_grad`.",
            lambda: nnx_hero()(params, x, y),
            TypeError,
            ("must be an nnx.Module, got dict", "hero_jax.hero_value_and_grad"),
            "Use `hero_jax.hero_value_and_grad`.",
            FLAX,
        ),
        Misuse(
            "nnx_list",
            "Passed a list of modules.",
            lambda: nnx_hero()([nnx_net()], x, y),
            TypeError,
            ("must be an nnx.Module, got list", "nnx.List"),
            "Put them into an `nnx.List`.",
            FLAX,
        ),
        Misuse(
            "nnx_without_has_aux",
            "Returned `(loss, logits)`, without `has_aux=True`.",
            lambda: nnx_hero(nnx_with_aux)(nnx_net(), x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "a tuple of 2", "has_aux=True"),
            "Pass `has_aux=True`.",
            FLAX,
        ),
        Misuse(
            "nnx_wrt_name",
            'Passed `wrt="kernel"`.',
            lambda: nnx_hero(wrt="kernel")(nnx_net(), x, y),
            ValueError,
            ("wrt must select variables", "'kernel'", "nnx.PathContains"),
            'Pass `wrt=nnx.PathContains("kernel")`.',
            FLAX,
        ),
        Misuse(
            "nnx_counter",
            "Counted calls in an attribute of the module that is no variable.",
            lambda: nnx_hero(nnx_counting)(nnx_net(), x, y),
            ValueError,
            ("loss_fn must change variables of the modules only", "a counter"),
            "Make it an `nnx.Variable`, or count outside of the loss.",
            FLAX,
        ),
    ),
    "The family": (
        Misuse(
            "hutchinson_uncalled",
            "Passed `perturbation=perturbation.hutchinson`, without a key.",
            lambda: hero(perturbation=hero_jax.perturbation.hutchinson)(params, x, y),
            ValueError,
            ("lacks a key", "hero_jax.perturbation.hutchinson(key)"),
            "Call it: `perturbation=perturbation.hutchinson(key)`.",
        ),
        Misuse(
            "hutchinson_by_name",
            'Passed `perturbation="hutchinson"`.',
            lambda: hero(perturbation="hutchinson"),
            ValueError,
            ("lacks a key", "hero_jax.perturbation.hutchinson(key)"),
            "Pass `perturbation.hutchinson(key)`.",
        ),
        Misuse(
            "cure_of_tokens",
            "Passed integer tokens as inputs to `cure_value_and_grad`.",
            lambda: cure()(params, y, x),
            TypeError,
            ("x must have real floating-point arrays", "int"),
            "Embed them before, and take the embeddings as inputs.",
        ),
        Misuse(
            "cure_without_has_aux",
            "Returned `(loss, aux)` to `cure_value_and_grad`.",
            lambda: cure(with_aux)(params, x, y),
            TypeError,
            ("loss_fn must return a scalar loss", "a tuple of 2", "has_aux=True"),
            "Pass `has_aux=True`.",
        ),
        Misuse(
            "gnp_radius_zero",
            "Passed `radius=0` to `gnp_value_and_grad` for the exact product.",
            lambda: family.gnp_value_and_grad(loss_fn, strength=0.1, radius=0.0),
            ValueError,
            ("radius must be finite and > 0, got 0",),
            "Leave it out.",
        ),
        Misuse(
            "gsam_schedule",
            "Passed a schedule to `gsam_value_and_grad`.",
            lambda: family.gsam_value_and_grad(
                loss_fn, h=optax.constant_schedule(0.1), alpha=0.1
            ),
            TypeError,
            ("h must be a real number", "traced scalar"),
            "Pass `h=schedule(step)` inside the jitted step.",
        ),
    ),
    "Models": (
        Misuse(
            "model_unknown",
            'Called `models.create("resnet21", ...)`.',
            lambda: model("resnet21"),
            ValueError,
            ("name must be one of", "'resnet20'", "got 'resnet21'"),
            "Take one of these names.",
            FLAX,
        ),
        Misuse(
            "model_without_classes",
            "Passed `num_classes=0`.",
            lambda: model(num_classes=0),
            ValueError,
            ("num_classes must be an integer >= 1, got 0",),
            "Pass the number of logits.",
            FLAX,
        ),
        Misuse(
            "images_nchw",
            "Passed images with the channels first, as in PyTorch.",
            lambda: initialize(2, 3, 32, 32),
            ValueError,
            ("must have shape [batch, height, width, channels]", "(2, 3, 32, 32)"),
            "Transpose them: `images.transpose(0, 2, 3, 1)`.",
            FLAX,
        ),
        Misuse(
            "images_without_batch",
            "Passed one image, without an axis for the batch.",
            lambda: initialize(32, 32, 3),
            ValueError,
            ("must have shape [batch, height, width, channels]", "(32, 32, 3)"),
            "Add the axis: `image[None]`.",
            FLAX,
        ),
    ),
    "Commands": (
        Misuse(
            "epochs_0",
            "Ran `python examples/quickstart.py --epochs 0`.",
            lambda: command("quickstart", "--epochs", "0"),
            SystemExit,
            ("--epochs >= 1", "'epochs': 0"),
            "Train for an epoch at least.",
            ("matplotlib", "sklearn", "flax", "tqdm"),
        ),
        Misuse(
            "seeds_twice",
            "Ran `python examples/quickstart.py --seeds 0 0`.",
            lambda: command("quickstart", "--seeds", "0", "0"),
            SystemExit,
            ("--seeds must differ and be >= 0", "'seeds': [0, 0]"),
            "Name the seeds, not how many: `--seeds 0 1 2`.",
            ("matplotlib", "sklearn", "flax", "tqdm"),
        ),
        Misuse(
            "average_bits_20",
            "Ran `python -m examples.experiments.mixed_precision --average-bits 20`.",
            lambda: command(
                "experiments.mixed_precision.__main__", "--average-bits", "20"
            ),
            SystemExit,
            ("--average-bits must be 2 to 8, as --choices are, got 20",),
            "Ask for a number between the least and the most of `--choices`.",
            ("matplotlib", "sklearn", "flax", "tqdm"),
        ),
        Misuse(
            "config_unknown",
            "Ran the recipe with a config that is not there.",
            lambda: command("image_classification.__main__", "cifar10_resnet21_hero"),
            SystemExit,
            ("no config 'cifar10_resnet21_hero'", "cifar10_resnet20_hero"),
            "Take a name like those that are told, or the path of a TOML file.",
            RECIPE,
        ),
        Misuse(
            "noise_150_percent",
            "Ran the recipe with `--label-noise 1.5`.",
            lambda: command(
                "image_classification.__main__", "digits", "--label-noise", "1.5"
            ),
            SystemExit,
            ("label_noise must be", "got 1.5"),
            "It is a share: 0.4 for 40 %.",
            RECIPE,
        ),
        Misuse(
            "adamw_at_the_rate_of_sgd",
            "Ran the recipe with `--optimizer adamw` and no learning rate of its own.",
            lambda: command(
                "image_classification.__main__", "digits", "--optimizer", "adamw"
            ),
            SystemExit,
            ("learning_rate must be at most 0.02", "0.001 is usual", "got 0.1"),
            "Add `--learning-rate 0.001`, and a larger `--weight-decay`, such as 0.05.",
            RECIPE,
        ),
        Misuse(
            "dataset_unknown",
            "Ran the recipe with a data set that there is not.",
            lambda: command(
                "image_classification.__main__", "digits", "--dataset", "cifar11"
            ),
            SystemExit,
            (
                "data set 'cifar11' cannot be opened",
                "no .npz file or folder that exists",
            ),
            "Take a name of TensorFlow Datasets, an `.npz` file or a folder.",
            RECIPE,
        ),
        Misuse(
            "data_missing",
            "Ran the recipe with a `--data-dir` in which the data are not.",
            lambda: command(
                "image_classification.__main__",
                *("cifar10_resnet20_sgd", "--data-dir", "/nowhere"),
            ),
            SystemExit,
            ("data set 'cifar10' is not at /nowhere", "--data-dir", "--download"),
            "Point it to where they are prepared, or add `--download`.",
            RECIPE,
        ),
        Misuse(
            "file_of_data_missing",
            "Ran the recipe with an `.npz` file that is not there.",
            lambda: command(
                "image_classification.__main__",
                "digits",
                "--dataset",
                "/nowhere/data.npz",
            ),
            SystemExit,
            ("no file /nowhere/data.npz",),
            "Look at the path.",
            RECIPE,
        ),
        Misuse(
            "run_of_another_config",
            "Ran the recipe with other settings in the folder of an earlier run.",
            run_of_another_config,
            Exception,
            ("belongs to a run with another config", "gamma was", "now 7.0", "--out"),
            "Choose another `--out`: a run resumes only from its own checkpoints.",
            RECIPE,
        ),
    ),
}

HEAD = """\
# Errors, and what to do

Common mistakes, each tried by a test (`tests/test_misuse.py`), with what the message
says in essence. An error that is not here, or a message that does not help, is worth an
issue.

This page is written by `python -m tests.misuses > docs/errors.md`.
"""

SILENT = """\
## What no message tells

These run, and give other numbers than you want.

- **`hero` behind another link of the chain.** It takes what comes in for the gradient:
  put it first. Weight decay, clipping and momentum come behind it; behind Adam it sees
  steps for gradients, and the loss grows.
- **`hero` without an optimizer behind it.** What comes out is a gradient, and
  `optax.apply_updates` adds it to the weights: the loss grows. Put an optimizer behind
  it, `optax.chain(hero_jax.hero(...), optax.sgd(0.1))`.
- **`grad_fn` of another mini-batch, or another dropout key, than the gradients.** The
  difference of gradients is then noise, and the penalty drives the weights along it.
- **`hero` in the chain and `hero_value_and_grad` as well.** The one perturbs what the
  other has made. Use one of them.
- **`reduction="sum"` or `"mean"` for a loss that is a sum over the examples, or scaled
  for float16.** The penalty grows with its square: for S times the loss take
  `gamma / S`.
- **`h` or `gamma` that become negative or NaN inside of `jit`.** Only values that are
  known before tracing are checked.
- **`batch_argnums` of images, not labels**, in a loss that broadcasts: a part of
  the images then meets all labels. Most losses raise an error of their own.
- **A loss made of `float(...)` or NumPy constants.** Its gradient is zero, as in JAX.
- **`jax.jit` around a loss of an NNX module.** What happens to the module inside, such
  as new BatchNorm statistics, is dropped. Take `nnx.jit`.
- **`hero_jax.hero(perturbation=hutchinson(key))`.** The link is made once, with one
  key: every step goes the same way. Use `hero_value_and_grad` within the jitted step.
- **`dequantize` of a tree that is not quantized** returns it as it is.
- **Integer images from 0 to 255** are taken as such: scale them first.
"""


def rows(misuses: Iterable[Misuse]) -> Iterable[str]:
    for misuse in misuses:
        told = " … ".join(f"`{part}`" for part in misuse.told)
        kind = "" if misuse.error is Exception else f"`{misuse.error.__name__}`: "
        cells = (misuse.did, f"{kind}{told}", misuse.remedy)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Return the page of the documentation."""
    parts = [HEAD]
    for title, misuses in TABLE.items():
        head = "| what you did | what you are told | what to do |\n|---|---|---|\n"
        parts.append(f"## {title}\n\n{head}" + "\n".join(rows(misuses)) + "\n")
    return "\n".join([*parts, SILENT])


if __name__ == "__main__":
    sys.stdout.write(page())
