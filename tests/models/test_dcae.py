# SPDX-License-Identifier: Apache-2.0
"""The models: sizes against the published ones, shapes, precision, the ablation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcae_jax import config as config_lib
from dcae_jax import models
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_torch, layers
from dcae_jax.models.weights import abstract, merge, num_parameters, split

# Parameters of the published files: (all, encoder).
PUBLISHED_SIZES = {
    "f32c32": (323_356_460, 123_172_384),
    "f64c128": (676_896_140, 264_550_528),
    "f128c512": (1_120_682_252, 415_661_056),
    "f32c32-sana": (312_250_275, 153_027_104),
    "f32c32-lite": (421_181_228, 153_027_104),
    "1.5-f32c128": (523_609_740, None),
    "1.5-f64c128": (714_741_644, None),
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_parameter_counts_equal_the_published_ones(name):
    """Catches a missing bias, a wrong width or depth, a norm too many: any slip in a variant."""
    arch = dcae.VARIANTS[name]
    _, params, _ = split(
        abstract(lambda rngs: dcae.DCAE(arch, depthwise="grouped", dtype=jnp.float32, rngs=rngs))
    )
    want_total, want_encoder = PUBLISHED_SIZES[name]
    assert num_parameters(params) == want_total
    assert want_encoder in (None, num_parameters(params, "encoder."))


def _small(name, **changes):
    """A variant with its layout and narrow stages."""
    arch = dcae.VARIANTS[name]
    widths = tuple(32 if i < 3 else 64 for i in range(len(arch.widths)))
    depths = dict(
        encoder_depths=tuple(min(d, 1) for d in arch.encoder_depths),
        decoder_depths=tuple(min(d, 1) for d in arch.decoder_depths),
    )
    return dataclasses.replace(arch, widths=widths, latent_channels=16, **depths, **changes)


def _build(arch, dtype=jnp.float32, seed=0):
    model = dcae.DCAE(arch, depthwise="shifted", dtype=dtype, rngs=nnx.Rngs(seed))
    graph, params, stats = split(model)
    return graph, {**params, **stats}


@pytest.mark.parametrize("name", ["f64c128", "f32c32-sana", "f32c32-lite", "1.5-f64c128"])
def test_latents_are_f_times_smaller_and_decode_to_the_size_of_the_image(name):
    """Catches a stage that halves once too often or not at all, also for non-square images."""
    arch = _small(name)
    graph, weights = _build(arch)
    f = arch.compression

    def shapes(weights, x):
        model = merge(graph, weights)
        z = model.encode(x)
        return z, model.decode(z)

    z, y = jax.eval_shape(shapes, weights, jax.ShapeDtypeStruct((1, f, 2 * f, 3), jnp.float32))
    assert z.shape == (1, 1, 2, 16) and y.shape == (1, f, 2 * f, 3)


CUTS = (16, 32, 48, 64, 80, 96, 112)  # of f32c128, as released


def test_a_cut_model_is_the_whole_one_on_masked_latents():
    """Catches a kernel cut on the wrong axis, and a mask that is off by one."""
    arch = dataclasses.replace(_small("1.5-f32c128"), latent_channels=128)
    graph, weights = _build(arch)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    z = rng.normal(size=(1, 1, 1, 128)).astype(np.float32)
    whole = merge(graph, weights)
    latent = np.asarray(whole.encode(x))
    for channels in CUTS:
        small, _ = _build(dataclasses.replace(arch, latent_channels=channels))
        cut = merge(small, dcae.cut(weights, channels))
        np.testing.assert_allclose(cut.encode(x), latent[..., :channels], atol=1e-5)
        want = np.asarray(whole.decode(layers.first_channels(z, channels)))
        assert np.abs(cut.decode(z[..., :channels]) - want).max() <= 1e-5 * want.std()
        beyond = np.asarray(whole.decode(layers.first_channels(z, channels + 1)))
        assert np.abs(beyond - want).max() > 1e-3 * want.std()


@pytest.mark.parametrize(
    "name", ["1.5-f32c128", pytest.param("1.5-f64c128", marks=pytest.mark.slow)]
)
def test_full_size_weights_can_be_cut_to_every_released_number_of_channels(name):
    """Catches a path that the real layout does not have, or an axis of another length."""
    arch = dcae.VARIANTS[name]

    def shapes(arch):
        _, params, _ = split(
            abstract(lambda r: dcae.DCAE(arch, depthwise="grouped", dtype=jnp.float32, rngs=r))
        )
        return {k: v.shape for k, v in params.items()}, params

    whole = shapes(arch)[1]
    for channels in CUTS:
        cut = jax.eval_shape(lambda w, c=channels: dcae.cut(w, c), whole)
        want, _ = shapes(dataclasses.replace(arch, latent_channels=channels))
        assert {k: v.shape for k, v in cut.items()} == want


def test_the_mask_may_be_traced_and_differ_between_examples():
    """Catches a program for each number of channels, and one number for the whole batch."""
    traced = []

    @jax.jit
    def first(z, channels):
        traced.append(channels)
        return layers.first_channels(z, channels)

    z = np.ones((2, 1, 1, 8), np.float32)
    for counts in ([1, 8], [5, 3]):
        kept = first(z, np.array(counts))
        np.testing.assert_array_equal(np.asarray(kept).sum((1, 2, 3)), counts)
        assert all(np.all(np.asarray(kept)[i, ..., :n] == 1) for i, n in enumerate(counts))
    assert len(traced) == 1


def test_channels_are_refused_where_a_shortcut_averages_them():
    """Catches a mask on latents whose channels are averages: a result, and a wrong one."""
    for name in ("f64c128", "tiny", "sd-vae-f8"):
        arch = models.autoencoder_of(name).variant(name)
        with pytest.raises(UserError, match="evaluate.channels=3 needs .* latent shortcut.* 1.5-"):
            models.check_channels(arch, [3], "evaluate.channels")
    models.check_channels(dcae.VARIANTS["1.5-f64c128"], [1, 128], "channels")
    models.check_channels(_small("f64c128", residual=False), [16], "channels")
    for count in (0, 129):
        with pytest.raises(UserError, match=rf"channels={count} is not in \[1, 128\]"):
            models.check_channels(dcae.VARIANTS["1.5-f64c128"], [count], "channels")


def test_without_residual_no_shortcut_is_left():
    """Catches a shortcut that stays in the ablation, which would then measure nothing.

    With every weight zero only shortcuts carry a signal.
    """
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    for residual in (True, False):
        graph, weights = _build(_small("f64c128", residual=residual))
        weights = {k: jnp.zeros_like(jnp.asarray(v)) for k, v in weights.items()}
        # The first convolution must pass something on.
        weights["encoder.project_in.conv.kernel"] += 1.0

        @jax.jit
        def carried(weights, x, graph=graph):
            model = merge(graph, weights)
            z = model.encode(x)
            return jnp.abs(z).max(), _before_output(model.decoder, jnp.ones_like(z))

        assert [bool(value > 0) for value in carried(weights, x)] == [residual, residual]


def _before_output(decoder, z):
    """The largest value that reaches the output head of a decoder."""
    reached = []
    decoder.project_out = lambda x: reached.append(x) or x[..., :3]
    decoder(z)
    return jnp.abs(reached[0]).max()


def test_bfloat16_stays_close_to_float32():
    """Catches a sum, norm or division left in bfloat16; at most 3 % of the output's deviation."""
    x = np.random.default_rng(1).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graph, weights = _build(_small("f32c32-sana"), dtype)
        outputs.append(np.asarray(jax.jit(lambda w, x, g=graph: merge(g, w)(x))(weights, x)))
    error = np.abs(outputs[1] - outputs[0])
    assert outputs[1].dtype == np.float32
    assert error.mean() < 0.03 * outputs[0].std()


def test_published_names_give_variant_and_scaling_factor():
    """Catches the scaling of the 'in' weights used for 'mix', or the other way round."""
    assert dcae.variant("dc-ae-f32c32-in-1.0").scaling_factor == 0.3189
    assert dcae.variant("dc-ae-f32c32-mix-1.0").scaling_factor == 0.4552
    assert dcae.variant("dc-ae-f64c128-1.5").widths[-1] == 1024


@pytest.mark.parametrize(
    "name",
    [
        "dc-ae-1.5-f32c128",
        "dc-ae-f32c128-1.1",
        *(f"dc-ae-f32c128-{family}-c{c}" for family in ("1.1", "1.5") for c in CUTS),
        "dc-ae-1.5-f32c128-c64",
    ],
)
def test_newer_names_and_cuts_are_the_whole_architecture(name):
    """Catches a file of the authors that is refused, or read as one of fewer channels."""
    assert dcae.variant(name) == dcae.variant("dc-ae-f32c128-1.5")
    config = {"model_name": name}
    assert dcae_torch.variant_of(config, "authors") == dcae.variant("dc-ae-f32c128-1.5")
    for wrong in ("dc-ae-f32c128-1.5-c17", "dc-ae-f64c128-1.5-c16"):
        with pytest.raises(UserError, match=f"model.variant='{wrong}' is not known"):
            dcae.variant(wrong)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"variant": "f31"}, "model.variant='f31'"),
        ({"widths": (8, 8)}, "2 entries"),
        ({"widths": (32, 32, 64, 40, 128)}, "40 in stage 3"),
        ({"decoder_widths": (8, 8)}, "decoder_widths=.* has 2 entries"),
        ({"decoder_widths": (24, 24, 40, 64, 128)}, "decoder_widths=.* average 96 .* 40"),
        ({"latent_channels": 48}, "average"),
        ({"encoder_depths": (1, 0, 1, 1, 1)}, "only the first"),
    ],
)
def test_impossible_architectures_are_named(changes, words):
    """Catches an architecture that fails deep inside XLA instead of in one line."""
    config = config_lib.default().model
    config.variant = "tiny"
    config.update(changes)
    with pytest.raises(UserError, match=words):
        dcae.architecture(config)


def test_blocks_that_start_at_scale_0_are_the_identity():
    """Catches a block whose branch is not ended by the scaled norm, and a scale on other norms."""
    model = dcae.DCAE(_small("small"), depthwise="shifted", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 64)), jnp.float32)
    deep = [model.encoder.stages[4][0], model.decoder.stages[5][0]]  # of 64 channels
    shallow = [model.encoder.stages[1][0], model.decoder.stages[2][1]]  # of 32
    for block, channels in [(b, 64) for b in deep] + [(b, 32) for b in shallow]:
        np.testing.assert_array_equal(block(x[..., :channels]), x[..., :channels])
    assert (model.decoder.project_out.norm.scale[...] == 1).all()
