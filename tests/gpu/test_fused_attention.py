# SPDX-License-Identifier: Apache-2.0
"""cuDNN's fused attention against an explicit softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import on_gpu

from dcae_jax.models import transformer

pytestmark = pytest.mark.skipif(on_gpu.MODE == "cpu", reason="cuDNN needs an NVIDIA GPU")
# (tokens, heads, channels per head): UViT-H on 8 x 8 latents and patches of 2 of 64 x 64, DiT-XL
SHAPES = [(66, 16, 72), (1026, 16, 72), (256, 16, 72), (64, 2, 64)]


def _fused(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


@pytest.mark.parametrize("tokens, heads, width", SHAPES)
def test_fused_attention_and_its_gradient_are_those_of_the_definition(tokens, heads, width):
    """Catches a wrong scale, attention to padded tokens, and gradients in another order.

    Tolerance: 2 % of the largest value, twice that of plain attention in bfloat16.
    """
    random = np.random.default_rng(0)
    q, k, v, weight = random.standard_normal((4, 2, tokens, heads, width)).astype(np.float32)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    weight = jnp.asarray(weight)

    def results(attention, inputs):
        def loss(*inputs):
            y = attention(*inputs).astype(jnp.float32)
            return jnp.sum(y * weight), y

        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return [np.asarray(x, np.float64) for x in (y, *gradients)]

    with jax.default_matmul_precision("highest"):
        want = results(transformer.plain_attention, [x.astype(jnp.float32) for x in rounded])
    for attention, bound in ((transformer.plain_attention, 0.01), (_fused, 0.02)):
        ours = results(attention, rounded)
        for name, found, expected in zip("yqkv", ours, want, strict=True):
            atol = bound * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, atol=atol, err_msg=name)


def test_the_layer_gives_the_same_numbers_with_both():
    """Catches heads and tokens swapped on the way into the kernel or out of it."""

    def layer(attention):
        linear = functools.partial(nnx.Linear, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return transformer.Attention(128, 2, linear, qkv_bias=False, attention=attention)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 34, 128)), jnp.bfloat16)
    want, found = (np.asarray(layer(kind)(x), np.float32) for kind in ("plain", "cudnn"))
    np.testing.assert_allclose(found, want, atol=0.02 * np.abs(want).max())
