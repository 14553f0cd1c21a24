"""States to save, and how the tests of checkpoints save and restore them."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class Mixer:
    """A choice that has gained a field since the steps here were saved."""

    heads: int
    window: int | None = 4


MIXER = {"is": f"{__name__}.Mixer", "heads": 2}
CONFIG = {
    "model": {
        "width": 64,
        "layers": [{"kind": "miras"}, {"kind": "attention"}],
        "mixer": MIXER,
    }
}


class Moments(NamedTuple):
    """An optimizer state is a NamedTuple; orbax stores it as a dict."""

    count: jax.Array
    mean: dict


def make_state(step):
    """Incompressible values, so that the files are larger than a 4 KiB page."""
    weights = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    return {
        "weights": jnp.asarray(weights),
        "layers": [{"bias": jnp.asarray(weights[0], jnp.bfloat16)}, {}],
        "optimizer": (Moments(jnp.int32(step), {"bias": jnp.asarray(weights[1])}),),
        "step": jnp.int32(step),
        "key": jax.random.key(step),
    }


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
    )


def assert_same(got, expected):
    def bits(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
    ):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert bits(ours) == bits(theirs)


def save(checkpoints, step, loss=None):
    checkpoints.save(
        step, make_state(step), data={"next": step}, config=CONFIG, loss=loss
    )


def restore(directory, like=None, config=CONFIG, **options):
    with Checkpoints(directory, **options) as checkpoints:
        return checkpoints.restore(abstract(like or make_state(0)), config=config)
