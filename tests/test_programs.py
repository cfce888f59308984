"""Programs are found again while their functions live, and go with them."""

import dataclasses
import gc
import weakref

import jax.numpy as jnp
import pytest

from hero_jax import _programs


def times_two(function, x):
    return 2.0 * function(x)


@dataclasses.dataclass(frozen=True)
class Pair(_programs.MadeOfFunctions):
    first: object
    second: object

    def __call__(self, x):
        return self.first(x) + self.second(x)


class Model:
    def loss(self, x):
        return x + 1.0


class WithoutHash(Model):
    __hash__ = None
    __call__ = Model.loss


def test_the_same_function_has_the_same_program_and_takes_it_along():
    def loss(x):
        return x + 1.0

    program = _programs.compiled(times_two, loss)
    assert program(1.0) == 4.0
    assert _programs.compiled(times_two, loss) is program
    assert _programs.compiled(times_two, lambda x: x) is not program
    gone = weakref.ref(program)
    del program, loss
    gc.collect()
    assert gone() is None


def test_methods_and_what_is_made_of_functions_are_found_again():
    """Every access to a method makes a new object, and so may every call."""
    model, add = Model(), jnp.sin
    for kind in (lambda method: method, lambda method: Pair(add, method)):
        program = _programs.compiled(times_two, kind(model.loss))
        gc.collect()
        assert _programs.compiled(times_two, kind(model.loss)) is program
        assert program(0.0) == 2.0
    gone = weakref.ref(program)
    del program, model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("function", [WithoutHash(), WithoutHash().loss])
def test_what_has_no_hash_is_compiled_for_every_call(function):
    program = _programs.compiled(times_two, function)
    assert program(1.0) == 4.0
    assert _programs.compiled(times_two, function) is not program
