# SPDX-License-Identifier: Apache-2.0
"""The ranges of layers' inputs, from images that the user names, and where they are needed."""

from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from dcae_jax import files
from dcae_jax.api import images
from dcae_jax.data import folders, transforms
from dcae_jax.errors import MachineError, UserError
from dcae_jax.models import quantized
from dcae_jax.models import weights as weights_lib
from dcae_jax.models.quantized import Form
from dcae_jax.models.weights import AnyArray, Array, Weights
from dcae_jax.runtime import precision

Images = str | Iterable[Image.Image | AnyArray]  # a folder or file, or images of any kind
COUNT = 64  # images of a folder that are used, spread over its sorted files
SIZE = 256  # pixels per side of their centre crops
FP8 = 9.0  # compute capability from which on XLA has fp8 convolutions


def check(name: str, form: Form, calibrate: Images | None, mesh: Mesh) -> None:
    """Raises UserError where the form `name` is undefined, or `calibrate` is missing or useless."""
    device = mesh.devices.flat[0]
    if name == "fp8" and float(getattr(device, "compute_capability", None) or 0) < FP8:
        raise UserError(
            f"quantize='fp8' needs a GPU of compute capability {FP8} or more (H100), and this is "
            f"{device.device_kind}; use 'int8'"
        )
    if form.inputs and calibrate is None:
        raise UserError(
            f"quantize={name!r} needs calibrate=, a folder of images like those to come; or use "
            "quantize='int8-weights'"
        )
    if not form.inputs and calibrate is not None:
        raise UserError(f"quantize={name!r} has no ranges to calibrate; leave out calibrate")


def crops(given: Images, compression: int) -> list[np.ndarray]:
    """The images' centre crops [S, S, 3], float32 in [-1, 1]. Raises UserError."""
    size = -(-SIZE // compression) * compression
    found = [
        transforms.to_float(np.asarray(transforms.center_crop(image, size)))
        for image in (_read(given) if isinstance(given, str) else map(_image, given))
    ]
    if not found:
        raise UserError("calibrate= holds no images; give some like those to come")
    return found


def _read(path: str) -> Iterable[Image.Image]:
    files.check(path, "calibrate")
    try:
        source = folders.folder(path)
    except UserError as error:
        raise UserError(str(error).replace("data.path", "calibrate")) from error
    step = max(len(source) / COUNT, 1)
    for i in range(min(len(source), COUNT)):
        try:
            image, _ = source[int(i * step)]
        except MachineError:
            raise
        except Exception as error:  # Pillow raises many types for a broken file
            name = source.name(int(i * step))
            raise UserError(f"calibrate={path!r}: {name} cannot be read; remove it") from error
        yield image


def _image(given: Image.Image | AnyArray) -> Image.Image:
    return Image.fromarray(transforms.to_uint8(images.to_float(given)))


def input_peaks(
    graphdef: nnx.GraphDef, weights: Weights, dtype: str, batch: list[np.ndarray]
) -> dict[str, float]:
    """The largest absolute input of each layer by its path, on images [H, W, 3] in [-1, 1]."""

    @jax.jit
    def peaks(weights: Weights, x: Array) -> dict[str, Array]:
        with precision.of(dtype):
            return quantized.input_peaks(weights_lib.merge(graphdef, weights), x)

    found = [jax.device_get(peaks(weights, x[None])) for x in batch]
    return {name: float(max(each[name] for each in found)) for name in found[0]}
