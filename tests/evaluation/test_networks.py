# SPDX-License-Identifier: Apache-2.0
"""The metric networks: in float32 everywhere, one batch fetched while the next one runs."""

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from dcae_jax.evaluation import metrics, networks
from dcae_jax.models import inception, lpips

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def products(jaxpr):
    """All matrix products and convolutions in a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products(inner)


def abstract(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def lpips_case(images):
    weights = abstract(lpips.shapes("alex"))
    return networks.lpips_distance, weights, images, images


def inception_case(images):
    def features(weights, levels):
        return networks.inception_features(weights, levels, "pytorch-fid")

    return features, abstract(inception.shapes()), images


def moments_case(images):
    features = jax.ShapeDtypeStruct((4, 8), images.dtype)
    return metrics.moments_update, metrics.moments_init(8), features


def kernel_case(images):
    features = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    return metrics._kernel_sums, features, features


def distances_case(images):
    features = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    return metrics._squared_distances, features, features


@pytest.mark.parametrize(
    "case", [lpips_case, inception_case, moments_case, kernel_case, distances_case]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_product_is_float32_at_the_highest_precision(case, dtype):
    """Catches a score that TF32 or bfloat16 products change, which no test on a CPU can see."""
    function, *arguments = case(jax.ShapeDtypeStruct((2, 64, 64, 3), dtype))
    found = list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert found
    for eqn in found:
        assert eqn.params["precision"] == HIGHEST, eqn
        assert {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)} == {jnp.dtype(jnp.float32)}, eqn


def test_an_item_is_read_once_the_next_one_is_made():
    """Catches a host that waits for each batch before it starts the next, and a last one lost."""
    events = []

    def made():
        for i in range(3):
            events.append(("made", i))
            yield i

    for item in networks.one_behind(made()):
        events.append(("read", item))
    assert events == [
        ("made", 0),
        ("made", 1),
        ("read", 0),
        ("made", 2),
        ("read", 1),
        ("read", 2),
    ]
    assert list(networks.one_behind([])) == []
