# SPDX-License-Identifier: Apache-2.0
"""Small models of the published layouts, and folders of them as others publish."""

import dataclasses
import json
import os

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.models import dcae, dcae_torch, sdvae, sdvae_torch
from dcae_jax.models import weights as weights_lib
from dcae_jax.pretrained import hub, published

# The blocks of published models at a hundredth of their width.
SMALL = {
    name: dataclasses.replace(
        dcae.variant(name),
        widths=(8, 16, 32, 32, 32, 32, 32)[: len(dcae.variant(name).widths)],
        latent_channels=8,
        encoder_depths=(dcae.variant(name).encoder_depths[0] and 1, *(1,) * n),
        decoder_depths=(dcae.variant(name).decoder_depths[0] and 1, *(1,) * n),
    )
    for name, n in {
        "dc-ae-f32c32-mix-1.0": 5,
        "dc-ae-f32c32-sana-1.1": 5,
        "dc-ae-lite-f32c32-sana-1.1": 5,
        "dc-ae-f32c128-1.5": 5,
        "dc-ae-f64c128-1.5": 6,
    }.items()
}
PUBLISHED = SMALL["dc-ae-f32c32-mix-1.0"]
KL = dataclasses.replace(sdvae.VARIANTS["sd-vae-f8"], widths=(32, 32, 32, 32))


def random_weights(arch):
    """{path: array} of an autoencoder."""
    module = (
        sdvae.SDVAE(arch, dtype=np.float32, rngs=nnx.Rngs(0))
        if isinstance(arch, sdvae.Variant)
        else dcae.DCAE(arch, depthwise="grouped", dtype=np.float32, rngs=nnx.Rngs(0))
    )
    _, params, stats = weights_lib.split(module)
    return {name: np.asarray(value) for name, value in {**params, **stats}.items()}


def write_folder(folder, arch, weights, form="diffusers"):
    """A folder as others publish it."""
    names = sdvae_torch if isinstance(arch, sdvae.Variant) else dcae_torch
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(names.config_of(arch, form)))
    tensors = {k: np.ascontiguousarray(v) for k, v in names.to_torch(weights, arch, form).items()}
    file = hub.AUTHORS_FILE if form == "authors" else hub.DIFFUSERS_FILE
    save_file(tensors, folder / file)
    return tensors


def write_export(folder, arch, weights, **settings):
    """An export of ours; settings: keys of config.model that differ from the architecture's."""
    folder.mkdir()
    model = config_lib.to_json(published.model_settings(arch)) | settings
    meta = {"kind": "autoencoder", "model": model}
    checkpoint_weights.save_export(str(folder), weights, meta)


def hollow_file(path, shapes):
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + end)


def same(a, b):
    """Asserts that two dicts of arrays are equal."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(np.asarray(b[name]), np.asarray(value), err_msg=name)
