# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/gpu.py that measure single layers: attention, depthwise convolutions."""

import functools
import math
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from gpu_parts import Row, Rows, measured, random

from dcae_jax.models import layers, transformer
from dcae_jax.models import weights as weights_lib


def attention(batch: int, tiny: bool) -> Rows:
    """Both attentions with UViT-H's heads, forward and with backward. batch: patches in total."""
    heads, width = (2, 32) if tiny else (16, 1152)
    both = {
        "plain": transformer.plain_attention,
        "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
    }
    for patches in (64, 256, 1024):
        n, b = patches + 2, (128 if tiny else batch) // patches or 1  # with label and time
        shape = (b, n, 3, heads, width // heads)
        qkv = random(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        grad = random(jax.ShapeDtypeStruct((b, n, *shape[3:]), jnp.bfloat16), 1)
        for name in transformer.ATTENTIONS if jax.default_backend() == "gpu" else ("plain",):

            def forward(qkv: Any, attend: Any = both[name]) -> Any:
                return attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])

            def backward(qkv: Any, grad: Any, forward: Any = forward) -> Any:
                return jax.vjp(forward, qkv)[1](grad)

            for what, call, arguments in (
                ("forward", forward, (qkv,)),
                ("both ways", backward, (qkv, grad)),
            ):
                flops = 4 * b * n * n * width * (1 if what == "forward" else 3)
                row = {"case": f"{name}, {n} tokens, {what}", "batch": b}
                try:
                    yield row | small(call, arguments, flops)
                except Exception as error:  # a kernel may refuse a number of tokens
                    yield row | {"failed": str(error).strip().splitlines()[0][:200]}


def depthwise(batch: int, tiny: bool) -> Rows:
    """The forms of the depthwise convolution in f32c32's blocks at 512 pixels, with backward."""
    for side, channels in ((8, 32),) if tiny else ((64, 4096), (32, 8192), (16, 8192)):
        shape = (2 if tiny else batch, side, side, channels)
        x, grad = (random(jax.ShapeDtypeStruct(shape, jnp.bfloat16), seed) for seed in (0, 1))
        kernel = random(jax.ShapeDtypeStruct((3, 3, 1, channels), jnp.float32), 2)
        for name in typing.get_args(layers.DepthwiseForm):

            def conv(x: Any, kernel: Any, name: Any = name, channels: int = channels) -> Any:
                made = layers.Layers(jnp.bfloat16, weights_lib.host_rngs(0), name)
                layer = made.conv(channels, channels, use_bias=False, depthwise=True)
                layer.kernel = type(layer.kernel)(kernel)
                return layer(x)

            def both(x: Any, kernel: Any, grad: Any, conv: Any = conv) -> Any:
                y, pull = jax.vjp(conv, x, kernel)
                return y, pull(grad)

            arguments = (x, kernel, grad)
            flops = 3 * 18 * math.prod(shape)
            row = small(both, arguments, flops)
            yield row | {"case": f"{name}, {side}x{side}x{channels}"}


def small(call: Callable[..., Any], arguments: tuple, flops: float) -> Row:
    """A row for a program of a few milliseconds."""
    return measured(lambda _: (jax.jit(call), arguments), arguments, flops=flops, seconds=0.5)
