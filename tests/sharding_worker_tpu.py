"""Prints the program that a slice of eight TPU chips would run for one sharded update."""

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_moma as om

SHAPES = {"kernel": (512, 1024), "stack": (2, 1024, 512), "bias": (1024,)}
SPECS = {"kernel": P("fsdp", "tensor"), "stack": P(None, "tensor", "fsdp"), "bias": P("tensor")}


def main() -> None:
    mesh = topologies.make_mesh(
        topologies.get_topology_desc("v5e:2x4", platform="tpu"), (4, 2), ("fsdp", "tensor")
    )

    def placed(shapes, specs):
        """The shapes with the shardings that their arrays would have on the slice."""
        leaves, treedef = jax.tree.flatten(shapes)
        specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
        return treedef.unflatten(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
            for x, spec in zip(leaves, specs, strict=True)
        )

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    tx = om.moma(1e-3, rank=16, weight_decay=0.1)
    state = placed(jax.eval_shape(tx.init, params), om.state_partition_specs(tx, params, SPECS))
    params = placed(params, SPECS)
    print(jax.jit(tx.update).lower(params, state, params).compile().as_text())


if __name__ == "__main__":
    main()
