"""Devices on which a run is computed, and how weights and images lie on them.

The images of a batch are shared out among the devices; everything else, the training
data, weights and statistics, is the same on each. There are two ways to do that:

    jit    arrays are sharded, and the compiler distributes a program that is written as
           for one device
    pmap   every device runs the program on its share, as an axis that is named
           (:data:`AXIS`), and averages gradients and statistics itself
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import chex
import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .config import Config
from .errors import DevicesError

Parallel = Literal["jit", "pmap"]

AXIS = "data"
"""Name of the axis of devices."""


class Devices:
    """Some devices, used by jit.

    Attributes:
      count: how many, on all hosts.
      axis_name: of the axis that programs see, or `None`.
      sharded: the same devices, used by jit.
    """

    axis_name: str | None = None

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.count = len(devices)
        self.sharded = self
        self._mesh = Mesh(np.array(devices), (AXIS,))
        self._replicated = NamedSharding(self._mesh, P())
        self._by_row = NamedSharding(self._mesh, P(AXIS))

    def compile(self, function: Callable[..., Any], donate: bool = False) -> Any:
        """Compile a function of replicated and assembled arguments.

        All that it returns is the same on all devices. With `donate`, its first
        argument is used up.
        """
        donated = (0,) if donate else ()
        return jax.jit(function, donate_argnums=donated, out_shardings=self._replicated)

    def share(self, batch: chex.ArrayTree) -> chex.ArrayTree:
        """Return, within a program, what this device computes of a whole batch."""
        return lax.with_sharding_constraint(batch, self._by_row)

    def mean(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Average, within a program, over the shares of a batch."""
        return tree  # under jit a mean is one over the whole batch already

    def replicate(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Bring arrays of the host to every device."""
        return self._put(tree, self._replicated)

    def distribute(self, tree: chex.ArrayTree, axis: int) -> chex.ArrayTree:
        """Share out arrays that every host has whole, along one of their axes."""
        return self._put(tree, NamedSharding(self._mesh, P(*[None] * axis, AXIS)))

    def assemble(self, rows: chex.ArrayTree) -> chex.ArrayTree:
        """Bring this host's rows of a batch to its devices."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._by_row, x), rows
        )

    def fetch(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Return one copy of replicated arrays, on the host."""
        return jax.tree.map(np.asarray, tree)

    def _put(self, tree: chex.ArrayTree, sharding: NamedSharding) -> chex.ArrayTree:
        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

        return jax.tree.map(put, tree)


class Pmapped(Devices):
    """Some devices, used by pmap: arrays have a first axis of this host's devices."""

    axis_name = AXIS

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        super().__init__(devices)
        self.sharded = Devices(devices)
        self._devices = devices
        own = jax.process_index()
        self._local_count = sum(device.process_index == own for device in devices)
        self._placed = self.compile(lambda tree: tree)

    def compile(self, function: Callable[..., Any], donate: bool = False) -> Any:
        """Compile for every device."""
        donated = (0,) if donate else ()
        return jax.pmap(
            function, axis_name=AXIS, devices=self._devices, donate_argnums=donated
        )

    def share(self, batch: chex.ArrayTree) -> chex.ArrayTree:
        """Cut this device's rows out."""

        def of_device(x: chex.Array) -> chex.Array:
            size = x.shape[0] // self.count
            return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size)

        return jax.tree.map(of_device, batch)

    def mean(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Average over the devices."""
        return lax.pmean(tree, AXIS)

    def replicate(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Bring arrays of the host to every device."""
        count = self._local_count
        return self._placed(
            jax.tree.map(lambda x: np.broadcast_to(x, (count, *np.shape(x))), tree)
        )

    def assemble(self, rows: chex.ArrayTree) -> chex.ArrayTree:
        """Bring this host's rows of a batch to its devices."""
        return self._placed(
            jax.tree.map(lambda x: x.reshape(self._local_count, -1, *x.shape[1:]), rows)
        )

    def fetch(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Return one copy of replicated arrays, on the host."""
        return jax.tree.map(
            lambda x: np.asarray(x.addressable_shards[0].data).reshape(x.shape[1:]),
            tree,
        )


def divide_host(count: int | None) -> None:
    """Let a CPU pass for so many devices; `DevicesError` if JAX has looked already."""
    if count is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise DevicesError(
            f"host_devices must be set before JAX is used, got {count}."
        ) from None


def choose(parallel: Parallel = "jit", count: int | None = 1) -> Devices:
    """Return so many devices of this host, or all of all hosts, and how to use them.

    `DevicesError` if there are fewer, or other hosts.
    """
    devices = jax.devices()
    if count is not None:
        if jax.process_count() > 1:
            raise DevicesError(
                f"devices must be None with several processes, which use all of their "
                f"devices, got {count}."
            )
        if count > len(devices):
            raise DevicesError(
                f"devices must be at most {len(devices)}, the number of "
                f"{jax.default_backend()} devices, got {count}."
            )
        devices = devices[:count]
    return Devices(devices) if parallel == "jit" else Pmapped(devices)


def check(devices: Devices, config: Config) -> None:
    """Raise `DevicesError` unless the devices can share a batch out as configured."""
    if devices.count == 1:
        return
    images = config.micro_batch
    share, m = images // devices.count, config.examples_per_perturbation
    n = config.hvp_examples
    if images % devices.count:
        raise DevicesError(
            f"{devices.count} devices cannot share out micro-batches of {images} "
            "images: choose another batch_size or --devices."
        )
    if n is not None and not config.has_parts and n % devices.count:
        raise DevicesError(
            f"hvp_examples must be a multiple of the {devices.count} devices, got {n}."
        )
    for name, wrong in (
        ("examples_per_perturbation", config.has_parts),
        ("synchronized_batch_norm", not config.synchronized_batch_norm),
    ):
        if wrong and devices.axis_name is None:
            raise DevicesError(
                f"{name}={getattr(config, name)} needs every device by itself: use "
                "--parallel pmap."
            )
    if m is not None and config.has_parts and share % m:
        raise DevicesError(
            f"examples_per_perturbation must divide the {share} images of a device, or "
            f"be all {images}, got {m}: use fewer --devices."
        )
