# SPDX-License-Identifier: Apache-2.0
"""What UViT and DiT have in common, against PyTorch's numbers and against themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import make_diffusion

from dcae_jax import models
from dcae_jax.errors import UserError
from dcae_jax.models import dit, layers, transformer, uvit
from dcae_jax.models import weights as weights_lib

MODELS = list(make_diffusion.MODELS)


def module_of(model):
    return {"uvit": uvit, "dit": dit}[model.split("-")[0]]


def arch_of(model):
    return module_of(model).Architecture(**make_diffusion.MODELS[model])


def weights_of(model):
    names = models.backbone_names(module_of(model))
    return names.from_torch(make_diffusion.weights(model), arch_of(model))


@functools.cache
def forward(model, *, dtype="float32", remat=False, unroll=False):
    """A function (weights, x, t, labels) -> prediction."""
    form = dict(dtype=dtype, remat=remat, unroll=unroll)
    graph, _, _ = weights_lib.split(
        weights_lib.abstract(
            lambda rngs: module_of(model).create(arch_of(model), rngs=rngs, **form)
        )
    )
    return lambda weights, *inputs: weights_lib.merge(graph, weights)(*inputs)


def error(ours, theirs):
    """(largest, mean) difference as a share of the deviation."""
    off = np.abs(np.asarray(ours) - np.asarray(theirs)) / np.std(theirs)
    return off.max(), off.mean()


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_predictions_equal_those_of_pytorch(model, unroll):
    """Catches skips in the wrong order, row and column swapped, a wrong eps, the other GELU."""
    y = jax.jit(forward(model, unroll=unroll))(weights_of(model), *make_diffusion.inputs(model))
    want = make_diffusion.output(model)
    assert y.shape == want.shape and y.dtype == jnp.float32
    largest, mean = error(y, want)
    assert largest <= 1e-3 and mean <= 1e-4
    # At t = 1000 the last bit of a frequency shows; at the smaller times, the other GELU would.
    assert error(y[1:], want[1:])[0] <= 2e-5


@pytest.mark.parametrize("model", ["uvit-p2", pytest.param("dit", marks=pytest.mark.slow)])
def test_loops_and_recomputation_change_neither_prediction_nor_gradient(model):
    """Catches a skip lost from the loop's gradient, and a `remat` that nobody reads."""
    weights, inputs = weights_of(model), make_diffusion.inputs(model)

    def program(**form):
        def loss(weights):
            return jnp.mean(jnp.square(forward(model, **form)(weights, *inputs)))

        traced = jax.jit(jax.grad(loss)).trace(weights)
        text = str(traced.jaxpr)
        assert ("remat" in text) == form.get("remat", False)
        assert ("scan[" in text) != form.get("unroll", False)
        return traced.lower()

    want = program(unroll=True).compile()(weights)
    program(unroll=True, remat=True)
    for form in (dict(), dict(remat=True)):
        found = program(**form).compile()(weights)
        assert found.keys() == want.keys()
        for name, value in want.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(found[name] / scale, value / scale, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("model", ["uvit", "dit"])
def test_remat_keeps_less(model):
    """Catches a remat policy that keeps every activation, which costs time and saves nothing."""
    arch = dataclasses.replace(arch_of(model), depth=8, latent_size=8)
    inputs = jnp.zeros((4, 8, 8, arch.latent_channels)), jnp.ones(4), jnp.zeros(4, jnp.int32)

    def temporaries(remat):
        form = dict(dtype="float32", remat=remat, unroll=False)
        graph, params, stats = weights_lib.split(
            weights_lib.abstract(lambda rngs: module_of(model).create(arch, rngs=rngs, **form))
        )

        def loss(weights):
            return jnp.mean(jnp.square(weights_lib.merge(graph, weights)(*inputs)))

        program = jax.jit(jax.grad(loss)).lower({**params, **stats}).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) < 0.5 * temporaries(remat=False)


@pytest.mark.parametrize("model", ["uvit", "dit-p2"])
def test_bfloat16_stays_close_to_float32(model):
    """Catches a softmax, a norm or the time's features computed in half precision."""
    weights, inputs = weights_of(model), make_diffusion.inputs(model)
    y = jax.jit(forward(model, dtype="bfloat16"))(weights, *inputs)
    assert y.dtype == jnp.float32
    largest, mean = error(y, make_diffusion.output(model))
    assert largest < 0.1 and mean < 0.02


def attention_of(kind):
    """One head of four channels in bfloat16."""
    linear = functools.partial(
        nnx.Linear,
        kernel_init=nnx.initializers.normal(1.0),
        dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    return transformer.Attention(4, 1, linear, qkv_bias=False, attention=kind)


def test_cudnn_is_given_what_plain_attention_computes(monkeypatch):
    """Catches heads and tokens swapped for the fused kernel, another scale, an unknown name."""
    fused, asked = jax.nn.dot_product_attention, []

    def run(q, k, v, *, implementation):
        asked.append(implementation)
        return fused(q, k, v, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", run)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    want, found = (attention_of(kind)(x).astype(jnp.float32) for kind in ("plain", "cudnn"))
    np.testing.assert_allclose(found, want, atol=0.05 * float(jnp.abs(want).max()))
    assert asked == ["cudnn"]
    with pytest.raises(UserError, match="'flash'.*plain, cudnn"):
        attention_of("flash")


def test_scores_and_softmax_are_float32():
    """Catches scores rounded to bfloat16, where 256.5 is 256, or exponentials taken in it."""
    attention = attention_of("plain")
    qkv = np.zeros((4, 12), np.float32)  # of two tokens: their q, k and v, exact in bfloat16
    qkv[0, [0, 1, 4]] = 16, 1, 16
    qkv[1, [0, 1, 4, 5, 8]] = 16, 1, 16, 0.5, 1
    attention.qkv.kernel.set_value(jnp.asarray(qkv))
    attention.proj.kernel.set_value(jnp.eye(4))
    x = jnp.eye(4)[None, :2]
    scores = np.array([256, 256.5]) / 2  # 4 channels a head
    want = np.exp(scores[1]) / np.exp(scores).sum()
    assert abs(float(attention(x)[0, 0, 0]) - want) < 2**-8
    program = str(jax.make_jaxpr(attention)(x)).splitlines()
    exponentials = [line for line in program if "= exp " in line]
    assert exponentials and all("f32" in line and "bf16" not in line for line in exponentials)


def test_patches_are_cut_and_joined_in_the_same_order():
    """Catches rows swapped with columns, or channels before positions, in one direction only."""
    x = np.arange(2 * 6 * 6 * 5, dtype=np.float32).reshape(2, 6, 6, 5)
    init = nnx.initializers.zeros
    embed = transformer.patch_embed(5, 45, 3, kernel_init=init, bias_init=init, rngs=nnx.Rngs(0))
    embed.kernel.set_value(jnp.eye(45).reshape(3, 3, 5, 45))
    patches = embed(x).reshape(2, 4, 45)
    np.testing.assert_array_equal(patches[1, 1].reshape(3, 3, 5), x[1, :3, 3:])
    np.testing.assert_array_equal(transformer.from_patches(patches, 3, 2), x)


@pytest.mark.parametrize("where", ["nnx's keys", "keys of the host", "in a trace"])
def test_each_stacked_layer_has_its_own_draws(where):
    """Catches one draw repeated for all layers, and a fan-in that counts them."""
    rngs = weights_lib.host_rngs(3) if where == "keys of the host" else nnx.Rngs(3)

    def stack(rngs):
        def create(rngs):
            return nnx.Linear(30, 20, kernel_init=layers.xavier, rngs=rngs)

        return transformer.Stacked(20, create, remat=False, unroll=False, rngs=rngs)

    create = nnx.jit(stack) if where == "in a trace" else stack
    stacks = [weights_lib.split(create(rngs))[1]["*.kernel"] for _ in range(2)]
    kernel = np.concatenate([np.asarray(value) for value in stacks])
    assert kernel.shape == (40, 30, 20) and kernel.dtype == np.float32
    assert np.abs(np.corrcoef(kernel.reshape(40, -1))[np.triu_indices(40, 1)]).max() < 0.25
    assert abs(kernel.std() - (2 / 50) ** 0.5) < 0.003
    shape = weights_lib.split(weights_lib.abstract(stack))[1]["*.kernel"]
    assert shape.shape == (20, 30, 20)


@pytest.mark.parametrize("model", ["uvit", "dit"])
def test_blocks_are_stored_stacked_under_a_star(model):
    """Catches paths that name one layer: patterns, checkpoints and shardings rely on the star."""
    weights = weights_of(model)
    stars = {name: value for name, value in weights.items() if "blocks." in name}
    assert stars and all(".*." in name for name in stars)
    depth = arch_of(model).depth // (2 if model == "uvit" else 1)
    assert all(value.shape[0] == depth for value in stars.values())
    last = f"{'in_blocks' if model == 'uvit' else 'blocks'}.{depth - 1}.attn.qkv.weight"
    stack = next(
        value for name, value in stars.items() if name.endswith("blocks.*.attn.qkv.kernel")
    )
    np.testing.assert_array_equal(
        weights[last.replace(f".{depth - 1}.", ".*.").replace("weight", "kernel")][-1],
        make_diffusion.weights(model)[last].T,
    )
    assert stack.ndim == 3


@pytest.mark.parametrize("module, eps", [(dit, 1e-6), (uvit, 1e-5)])
def test_norms_have_the_published_eps(module, eps):
    """Catches another eps of LayerNorm, which activations of ordinary size hide (DiT's models.py
    has 1e-6, timm's blocks in UViT PyTorch's default)."""
    x = 2e-3 * np.random.default_rng(0).standard_normal((2, 3, 32))
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    norm = module.layer_norm(32, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), want, rtol=1e-4, atol=1e-5)
