# SPDX-License-Identifier: Apache-2.0
"""The sharding of every array, and the sharding constraints inside a program.

Weights are stored sharded (`state_shardings`) and all-gathered at use (`all_gather_weights`).
Without these constraints XLA may gather the activations of the whole batch instead.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax.errors import UserError
from dcae_jax.runtime import mesh as mesh_lib

SMALL = 2**16  # smaller parameters are replicated: sharding them only adds communication

Rules = Sequence[tuple[str, str]]  # config.sharding: (path pattern, one of RULES)
RULES = ("fsdp", "rows", "columns", "replicate")


def weight_spec(
    shape: tuple[int, ...], rule: str, mesh: Mesh | AbstractMesh, stacked: bool = False
) -> P:
    """The PartitionSpec of a weight of `shape`.

    'fsdp' shards the largest axis that divides over that mesh axis. 'rows' shards a kernel's
    inputs over the mesh axis tensor, 'columns' its outputs; fsdp then shards as before. With
    `stacked`, the first axis is the layer, which is never sharded: `scan` takes one at a time.
    """
    if rule not in RULES:
        raise UserError(f"sharding rule {rule!r} is not known; choose one of {', '.join(RULES)}")
    first = 1 if stacked else 0
    left = list(shape)
    names: list[tuple[str, ...]] = [() for _ in shape]
    axis = len(shape) - {"rows": 2, "columns": 1}.get(rule, len(shape) + 1)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if axis >= first and tensor > 1 and left[axis] % tensor == 0:
        left[axis] //= tensor
        names[axis] += ("tensor",)
    fitting = [a for a in range(first, len(shape)) if left[a] % fsdp == 0]
    if rule != "replicate" and fsdp > 1 and math.prod(shape[first:]) >= SMALL and fitting:
        names[max(fitting, key=lambda a: left[a])] += ("fsdp",)
    while names and not names[-1]:
        names.pop()
    return P(*(name[0] if len(name) == 1 else name or None for name in names))


def _rule(path: str, rules: Rules) -> str:
    """The rule of the first (pattern, rule) pair that matches the path; else 'replicate'."""
    return next((rule for pattern, rule in rules if re.fullmatch(pattern, path)), "replicate")


def check_tensor(weights: dict[str, Any], rules: Rules, mesh: Mesh) -> None:
    """Raises UserError if devices along mesh.tensor would all do the same work."""
    specs = [weight_spec(w.shape, _rule(k, rules), mesh, "*" in k) for k, w in weights.items()]
    if mesh.shape["tensor"] > 1 and all(map(_without_tensor, specs)):
        raise UserError(
            f"mesh.tensor={mesh.shape['tensor']} shards no weight of this model, which is "
            "not a transformer or does not divide; use mesh.data, mesh.fsdp or mesh.spatial"
        )


def _without_tensor(spec: P) -> bool:
    return not any(names == "tensor" or "tensor" in (names or ()) for names in spec)


def check_rules(rules: Rules) -> None:
    """Raises UserError unless each of config.sharding is (regular expression, known rule)."""
    for pair in rules:
        if len(pair) != 2 or pair[1] not in RULES:
            raise UserError(
                f"sharding: {tuple(pair)!r} must be (path pattern, rule), with one of the rules "
                f"{', '.join(RULES)}"
            )
        try:
            re.compile(pair[0])
        except re.error as error:
            raise UserError(
                f"sharding: {pair[0]!r} is not a regular expression ({error}); fix the pattern"
            ) from error


def state_shardings(state: Any, rules: Rules, mesh: Mesh) -> Any:
    """The tree `state` (arrays or shapes) with a NamedSharding for each leaf.

    Leaves under a parameter's path (weights, moments and averages alike) follow the first of
    `rules` (pattern, rule) that matches the path; everything else is replicated.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not names or not leaf.shape:
            return mesh_lib.replicated(mesh)
        spec = weight_spec(leaf.shape, _rule(names[-1], rules), mesh, "*" in names[-1])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def chip_bytes(tree: Any) -> int:
    """Bytes of the arrays (or shapes with a sharding) of `tree` on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


# --- in a program ---------------------------------------------------------------------------------
# The functions below use the mesh that the program has entered (`on_mesh`). Without one, or with
# replicated weights, they change nothing.

ACTIVATION = "activation"  # the checkpoint_name of what remat may save for a block's backward pass


def on_mesh(mesh: Mesh) -> Any:
    """A context to enter inside a jitted function: its sharding constraints refer to `mesh`.

    There it also works for devices you don't have (the planner's), and it affects nothing outside
    the program.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def weights_mesh() -> AbstractMesh | None:
    """The mesh of the program, if it shards weights or heads; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if max(mesh.shape.get("fsdp", 1), mesh.shape.get("tensor", 1)) > 1 else None


def set_rules(model: nnx.Module, rules: Rules) -> nnx.Module:
    """Adds each parameter's rule of config.sharding to its metadata, in place; returns `model`.

    Metadata is part of the graphdef, so a layer that is merged by itself inside `scan` still has
    the rule of its full path.
    """
    for path, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            param.set_metadata(sharding_rule=_rule(".".join(map(str, path)), rules))
    return model


def all_gather_weights(model: nnx.Module) -> nnx.Module:
    """All-gathers the weights of `model` over fsdp, in place; over tensor they stay sharded.

    Their gradients are reduce-scattered to the sharding of the stored weights. Stacked layers ('*'
    in the path) are left to the `scan` over them, which passes one layer at a time.
    """
    mesh = weights_mesh()
    if mesh is None:
        return model
    for path, param in nnx.iter_graph(model):
        rule = isinstance(param, nnx.Param) and param.get_metadata("sharding_rule", None)
        if not rule or "*" in path:
            continue
        stored = weight_spec(param.shape, rule, mesh)
        if any(stored):
            used = P(*(_without_fsdp(names) for names in stored))
            param.set_value(reshard_with_grad(param.get_value(), used, stored))
    return model


def reshard_with_grad(x: jax.Array, forward: P, backward: P) -> jax.Array:
    """x constrained to `forward`; its gradient, to `backward`."""
    resharded = jax.custom_vjp(lambda x: constrain(x, forward))
    resharded.defvjp(
        lambda x: (constrain(x, forward), None), lambda _, grad: (constrain(grad, backward),)
    )
    return resharded(x)


def split_qkv_heads(kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A kernel [inputs, 3 C] with the rule 'rows' -> `shape` [inputs, 3, heads, D], split by head.

    A contiguous part of the 3 C channels would hold, say, all heads of q and none of k.
    """
    kernel = constrain(kernel, P("tensor"))  # its gradient is constrained too
    return constrain(kernel.reshape(shape), P(None, None, "tensor"))


def constrain_activations(x: jax.Array, axis: int = 0) -> jax.Array:
    """x [B, ...] sharded over its batch and, in `axis` > 0 (heads or channels), over tensor.

    Also names it as a value that remat may save for the backward pass of a block.
    """
    if weights_mesh() is None:
        return x
    spec = P(mesh_lib.BATCH_AXES, *[None] * (axis - 1), *["tensor"] * (axis > 0))
    return checkpoint_name(constrain(x, spec), ACTIVATION)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """x with a sharding constraint under the mesh of the program."""
    return jax.lax.with_sharding_constraint(x, spec)


def replicate_weights(weights: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """`weights` all-gathered onto every device, for a model whose program is not sharded."""
    if mesh.size == 1:
        return weights
    everywhere = mesh_lib.replicated(mesh)
    return {k: jax.lax.with_sharding_constraint(v, everywhere) for k, v in weights.items()}


def _without_fsdp(names: str | tuple[str, ...] | None) -> str | None:
    """One entry of a PartitionSpec with fsdp left out."""
    names = (names,) if isinstance(names, str) else names or ()
    return "tensor" if "tensor" in names else None
