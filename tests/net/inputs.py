# SPDX-License-Identifier: Apache-2.0
"""What the net's runs start from: images, and weights under PyTorch's names, from formulas alone.

Nothing here comes from the code under test: arrays are drawn with NumPy's RandomState, whose
streams never change, seeded by the tensor's name.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
CLASSES = 3


def models() -> dict:
    """models.json: {model: {'config': the config.json beside its weights, 'tensors': shapes}}."""
    with open(os.path.join(HERE, "models.json")) as file:
        return json.load(file)


def tensor(name: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """The initial value of a tensor: float32, of a size that keeps activations of order one."""
    rng = np.random.RandomState(zlib.crc32(f"{salt}{name}".encode()))
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if kind == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    values = rng.standard_normal(shape)
    if kind == "running_mean":
        values = 0.1 * values
    elif kind == "bias":
        values = 0.05 * values
    elif len(shape) == 1:  # the scale of a norm
        values = 1 + 0.1 * values
    elif "pos_embed" in name or "token" in name:
        values = 0.1 * values
    else:
        values = values / math.sqrt(math.prod(shape[1:]))
    return values.astype(np.float32)


def sincos(side: int, width: int) -> np.ndarray:
    """DiT's fixed positions [1, side^2, width], as its authors compute them: columns first."""

    def one(position: np.ndarray) -> np.ndarray:
        rates = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
        angles = position.reshape(-1)[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    column, row = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64))
    return np.concatenate([one(column), one(row)], axis=1)[None].astype(np.float32)


def weights(model: str) -> dict[str, np.ndarray]:
    """{PyTorch's name: initial value} of a model of models.json."""
    shapes = models()[model]["tensors"]
    values = {name: tensor(name, tuple(shape), model) for name, shape in shapes.items()}
    fixed = next((n for n in values if model == "dit" and n.endswith("pos_embed")), None)
    if fixed:
        _, tokens, width = values[fixed].shape
        values[fixed] = sincos(math.isqrt(tokens), width)
    return values


def write_model(folder: str, model: str) -> str:
    """Writes a model's initial weights in the format that its config.json is of; -> folder."""
    scaled = model == "scaled"  # the tiny one with a factor, which samples need
    model = "tiny" if scaled else model
    config = models()[model]["config"]
    if scaled:
        config["scaling_factor"] = 0.72
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    diffusers = "_class_name" in config
    name = "diffusion_pytorch_model.safetensors" if diffusers else "model.safetensors"
    save_file(weights(model), os.path.join(folder, name), metadata={"format": "pt"})
    return folder


def picture(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """[H, W, 3] uint8: waves and noise, each number another mix, brighter by class."""
    rng = np.random.RandomState(1000 * seed + number)
    y, x = np.mgrid[0:height, 0:width][..., None] / np.float64(32)
    waves = np.sin(rng.uniform(1, 9, 3) * y + rng.uniform(1, 9, 3) * x + rng.uniform(0, 6, 3))
    noise = rng.uniform(-1, 1, (height, width, 3))
    return np.clip(90 + 40 * (number % CLASSES) + 60 * waves + 25 * noise, 0, 255).astype(np.uint8)


def write_pictures(folder: str, count: int = 12, seed: int = 0) -> str:
    """`count` PNGs of several sizes in CLASSES folders; -> folder."""
    for number in range(count):
        inner = os.path.join(folder, f"class{number % CLASSES}")
        os.makedirs(inner, exist_ok=True)
        pixels = picture(number, 40 + 3 * (number % 4), 56 - 5 * (number % 3), seed)
        Image.fromarray(pixels).save(os.path.join(inner, f"{number:02d}.png"))
    return folder


# torchvision's `features`: layer number -> [out, in, kernel, kernel].
VGG16 = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256),
    14: (256, 256), 17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512),
    26: (512, 512), 28: (512, 512),
}  # fmt: skip
ALEXNET = {
    0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3),
}  # fmt: skip


def classifier(net: str) -> Mapping[str, np.ndarray]:
    """Random weights of torchvision's vgg16 or alexnet, `features` alone."""
    values = {}
    for number, (outputs, inputs, *kernel) in (VGG16 if net == "vgg" else ALEXNET).items():
        k = kernel[0] if kernel else 3
        name = f"features.{number}"
        shape = (outputs, inputs, k, k)
        values[f"{name}.weight"] = np.float32(2**0.5) * tensor(f"{name}.weight", shape, net)
        values[f"{name}.bias"] = tensor(f"{name}.bias", (outputs,), net)
    return values


def inception() -> Mapping[str, np.ndarray]:
    """Random weights of FID's Inception, as pytorch-fid names them."""
    values = {}
    for name, shape in models()["inception"]["tensors"].items():
        value = tensor(name, tuple(shape), "inception")
        values[name] = np.float32(2**0.5) * value if name.endswith("conv.weight") else value
    return values
