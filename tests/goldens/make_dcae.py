# SPDX-License-Identifier: Apache-2.0
"""What diffusers' autoencoders make of seeded weights and pictures, at reduced width.

`python tests/goldens/make_dcae.py` (with torch and diffusers installed, some seconds) writes
dcae.npz: for each model below the names and shapes of its tensors, and for each size the latents
and the images. Weights and pictures come from their names and are not stored.
"""

import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("dcae.npz")

# Every layout of a published DC-AE: its blocks, norms and ways to change the size, in four stages
# of few channels. Fields that AutoencoderDC's defaults fill are left out.
SANA = {
    "latent_channels": 8,
    "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 16, 32, 64],
    "decoder_block_out_channels": [8, 16, 32, 64],
    "encoder_layers_per_block": [1, 1, 1, 2],
    "encoder_qkv_multiscales": [[], [], [5], [5]],
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
DCAE = {
    "in": {
        "latent_channels": 16,
        "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
        "encoder_block_out_channels": [8, 16, 32, 64],
        "decoder_block_out_channels": [8, 16, 32, 64],
        "encoder_layers_per_block": [0, 2, 1, 1],
        "decoder_layers_per_block": [0, 2, 1, 1],
        "encoder_qkv_multiscales": [[], [], [], []],
        "decoder_qkv_multiscales": [[], [], [], []],
        "decoder_norm_types": ["batch_norm", "batch_norm", "rms_norm", "rms_norm"],
        "decoder_act_fns": ["relu", "relu", "silu", "silu"],
        "scaling_factor": 0.3189,
    },
    "sana": {
        **SANA,
        "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
        "decoder_layers_per_block": [1, 1, 1, 1],
        "decoder_qkv_multiscales": [[], [], [5], [5]],
        "upsample_block_type": "interpolate",
    },
    "lite": {
        **SANA,
        "decoder_layers_per_block": [0, 1, 2, 1],
        "decoder_conv_act_fn": "silu",
    },
    "1.5": {
        "latent_channels": 12,
        "encoder_block_out_channels": [8, 16, 16, 32],
        "decoder_block_out_channels": [8, 16, 16, 32],
        "encoder_layers_per_block": [0, 1, 2, 1],
        "decoder_layers_per_block": [0, 2, 1, 1],
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
        "scaling_factor": 0.5935,
    },
}
KL = {
    "sd": {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 16, 32],
        "layers_per_block": 2,
        "norm_num_groups": 8,
    },
}
SIZES = {"in": 8, "sana": 8, "lite": 8, "1.5": 8, "sd": 4}  # the compression f of each
SHAPES = ((4, 4), (4, 6))  # of the latents: a square and one that is not


def picture(model, shape):
    """-> [2, H, W, 3] float32 in [-1, 1] for latents of `shape`: smooth waves and some noise."""
    h, w = (side * SIZES[model] for side in shape)
    rng = np.random.Generator(np.random.Philox(key=h * 1000 + w))
    rows, columns = np.mgrid[:h, :w].astype(np.float32)
    waves = np.stack([np.sin(rows / 5), np.cos(columns / 7), np.sin((rows + columns) / 9)], -1)
    noise = 2 * rng.random((2, h, w, 3), np.float32) - 1
    return (0.6 * waves + 0.4 * noise).astype(np.float32)


def tensor(model, name, shape):
    """-> the weights called `name`, of `shape`; no two channels alike, norms not trivial."""
    if name.endswith("num_batches_tracked"):
        return np.full(shape, 7, np.int64)
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(f"{model} {name}".encode())))
    uniform = rng.random(shape, np.float32)
    if name.endswith("running_var"):
        return 0.5 + 1.5 * uniform
    if len(shape) > 1:
        fan_in = np.prod(shape[1:])
        return ((2 * uniform - 1) * np.float32(np.sqrt(3 / fan_in))).astype(np.float32)
    return 0.5 + uniform if name.endswith("weight") else 0.6 * uniform - 0.3


def weights(model):
    """-> {diffusers' name: array} of the model, as dcae.npz lists them."""
    with np.load(PATH) as golden:
        shapes = json.loads(str(golden[f"{model}/shapes"]))
    return {name: tensor(model, name, tuple(shape)) for name, shape in shapes.items()}


def outputs(model, shape):
    """-> (latents, images) that diffusers made, NHWC, for latents of `shape`."""
    with np.load(PATH) as golden:
        key = f"{model}/{shape[0]}x{shape[1]}"
        return golden[f"{key}/latents"], golden[f"{key}/images"]


def make():
    import torch
    from diffusers import AutoencoderDC, AutoencoderKL

    out = {}
    for kind, configs in ((AutoencoderDC, DCAE), (AutoencoderKL, KL)):
        for model, config in configs.items():
            network = kind.from_config(config).eval()
            shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
            out[f"{model}/shapes"] = np.array(json.dumps(shapes))
            state = {name: np.array(tensor(model, name, shape)) for name, shape in shapes.items()}
            network.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
            for shape in SHAPES:
                x = torch.from_numpy(picture(model, shape)).permute(0, 3, 1, 2)
                with torch.no_grad():
                    code = network.encode(x)
                    z = code.latent if kind is AutoencoderDC else code.latent_dist.mode()
                    y = network.decode(z).sample
                key = f"{model}/{shape[0]}x{shape[1]}"
                out[f"{key}/latents"] = z.permute(0, 2, 3, 1).numpy()
                out[f"{key}/images"] = y.permute(0, 2, 3, 1).numpy()
    partial = PATH.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, **out)
    os.replace(partial, PATH)
    sys.stdout.write(f"wrote {PATH}, {PATH.stat().st_size} bytes\n")


if __name__ == "__main__":
    make()
