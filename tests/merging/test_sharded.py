"""Sharded leaves stay sharded, and merge to the bits of one device."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_moma as om
from optax_moma import merging

METHODS = {
    "average": merging.average(),
    "ties": merging.ties(0.3),
    "global ties": merging.chain(
        merging.trim(0.3, scope="global"), merging.elect(), merging.mean()
    ),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", METHODS)
def test_bits_of_one_device(name, axis_type):
    rng = np.random.default_rng(0)
    base, *experts = ({"w": rng.normal(size=(16, 32)).astype(np.float32)} for _ in range(4))
    expected = om.merge(METHODS[name], experts, base=base)["w"]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    put = lambda tree: jax.device_put(tree, NamedSharding(mesh, P("x")))
    with jax.set_mesh(mesh):
        found = om.merge(METHODS[name], [put(e) for e in experts], base=put(base))["w"]
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)
