# SPDX-License-Identifier: Apache-2.0
"""int8 autoencoders: loading, the compiled program, exports, and what is refused."""

import collections
import json
import os
import re

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from support.published_weights import same

import dcae_jax
from dcae_jax import main
from dcae_jax.api import autoencoder, calibration
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import Model
from dcae_jax.errors import UserError
from dcae_jax.models import quantized
from dcae_jax.models import weights as weights_lib
from dcae_jax.runtime import process


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three small images."""
    root = tmp_path_factory.mktemp("calibration")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return str(root)


@pytest.fixture(autouse=True)
def _small_crops(monkeypatch):
    monkeypatch.setattr(calibration, "SIZE", 32)


@pytest.fixture(scope="module")
def int8(autoencoder_export, photos):
    """The narrow autoencoder in int8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "SIZE", 32)
        return dcae_jax.load_autoencoder(autoencoder_export, quantize="int8", calibrate=photos)


def _products(ae, size=64):
    """{(operation, dtypes of its operands and result): count} in the HLO of encode and decode."""
    f, found = ae.compression, collections.Counter()
    for function, shape in (
        (ae._encode, (1, size, size, 3)),
        (ae._decode, (1, size // f, size // f, ae.latent_channels)),
    ):
        text = function.lower(ae.weights, jax.ShapeDtypeStruct(shape, "float32")).as_text("hlo")
        dtypes = dict(re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (\w+)\[", text, re.M))
        pattern = r"= (\w+)\[[^=]*? (convolution|dot)\(%?([\w.-]+), %?([\w.-]+)\)"
        for out, operation, a, b in re.findall(pattern, text):
            found[operation, dtypes[a], dtypes[b], out] += 1
    return found


def test_the_program_has_int8_convolutions_and_products(one_device):
    """Catches an int8 model whose kernels are scaled to floats before they are used."""
    model = Model(variant="tiny")
    found = {
        form: _products(autoencoder.abstract_autoencoder(model, one_device, "float32", form), 128)
        for form in ("int8", "int8-weights")
    }
    # Residual blocks and changes of size; four products in each of four attention blocks.
    integer = {("convolution", "s8", "s8", "s32"): 14, ("dot", "s8", "s8", "s32"): 16}
    assert {kind: n for kind, n in found["int8"].items() if "s8" in kind} == integer
    # The first and last convolutions, and the sums of attention.
    assert found["int8"]["convolution", "f32", "f32", "f32"] == 4
    assert not any("s8" in kind for kind in found["int8-weights"])


def test_int8_is_near_the_float_model_and_smaller(autoencoder_export, int8, photos):
    """Catches ranges or scales of another layer, and weights that are kept in float32 too."""
    whole = dcae_jax.load_autoencoder(autoencoder_export)
    x = np.stack(calibration.crops(photos, 16))
    z, z8 = np.asarray(whole.encode(x)), np.asarray(int8.encode(x))
    y, y8 = np.asarray(whole.decode(z)), np.asarray(int8.decode(z))
    for a, b in ((z, z8), (y, y8)):
        assert 1e-4 < np.sqrt(np.mean((a - b) ** 2)) / a.std() < 0.05
    assert int8.num_parameters == whole.num_parameters
    assert int8.encoder_checksum == whole.encoder_checksum
    bytes8, bytes32 = (sum(w.nbytes for w in ae.weights.values()) for ae in (int8, whole))
    assert bytes8 < 0.5 * bytes32  # the narrow model is mostly what is left out


def test_images_may_be_a_folder_or_arrays(photos):
    """Catches ranges that depend on how the same images are given, and crops of uneven sizes."""
    images = [Image.open(os.path.join(photos, name)) for name in sorted(os.listdir(photos))]
    wanted = calibration.crops(photos, 16)
    assert [crop.shape for crop in wanted] == [(32, 32, 3)] * 3
    for given in (images, np.stack([np.asarray(image) for image in images])):
        np.testing.assert_array_equal(wanted, calibration.crops(given, 16))
    assert calibration.crops(photos, 48)[0].shape == (48, 48, 3)


def test_a_range_covers_every_image(monkeypatch):
    """Catches the range of the last image alone, or of the images' mean."""
    monkeypatch.setattr(quantized, "input_peaks", lambda model, x: {"a": x.max(), "b": -x.min()})
    graphdef, weights, _ = weights_lib.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    images = [np.full((4, 4, 3), value, np.float32) for value in (0.5, -1.0, 0.25)]
    peaks = calibration.input_peaks(graphdef, weights, "float32", images)
    assert peaks == {"a": 0.5, "b": 1.0}


def test_an_export_holds_int8_and_loads_without_images(
    run_export, autoencoder_export, int8, photos
):
    """Catches weights that stay float32, another program after loading, and int8 weights that a
    job takes for float ones."""
    how = ("--config.export.quantize=int8", f"--config.export.calibrate={photos}")
    status, said, out = run_export(autoencoder_export, "orbax", *how)
    assert status == 0 and "largest difference after reading it back: 0" in said
    again = dcae_jax.load_autoencoder(out)
    same(int8.weights, again.weights)
    kinds = {(str(w.dtype), name.rpartition(".")[2]) for name, w in again.weights.items()}
    assert {("int8", "kernel"), ("float32", "kernel"), ("float32", "input_scale")} <= kinds
    assert again.quantize == "int8" and again.encoder_checksum == int8.encoder_checksum
    assert again.graphdef == int8.graphdef
    meta = json.loads(open(os.path.join(out, "model.json")).read())
    assert meta["quantize"] == "int8" and meta["calibrate"] == photos
    with pytest.raises(UserError, match="is int8, which only encodes and decodes"):
        checkpoint_weights.load_weights(out)
    with pytest.raises(UserError, match="these weights are int8 already"):
        dcae_jax.load_autoencoder(out, quantize="int8-weights")
    status, said, _ = run_export(out, "diffusers", out="b")
    assert status == process.MISTAKE and "give the weights that it was made from" in said


@pytest.mark.slow
def test_a_stablehlo_program_computes_in_int8(run_export, autoencoder_export, int8, photos):
    """Catches a program that takes float weights, or gives other images than we do."""
    how = ("--config.export.quantize=int8", f"--config.export.calibrate={photos}")
    status, said, out = run_export(autoencoder_export, "stablehlo", *how)
    assert status == 0, said
    assert float(re.search(r"reading it back: ([\d.e-]+)", said)[1]) < 0.05
    tensors = load_file(os.path.join(out, "weights.safetensors"))
    same(int8.weights, tensors)
    with open(os.path.join(out, "decode.stablehlo"), "rb") as file:
        program = jax.export.deserialize(bytearray(file.read())).mlir_module()
    assert re.search(r"stablehlo.convolution.*xi8>, tensor<.*xi8>\) -> tensor<.*xi32>", program)


@pytest.mark.slow
def test_the_commands_take_it_and_latents_stay_exchangeable(
    alone, autoencoder_export, photos, tmp_path, capsys
):
    """Catches a flag that is not passed on, and int8 decoders that refuse their own latents."""

    def run(name, *arguments):
        status = main.main(["dcae-jax", name, *arguments, f"--model={autoencoder_export}"])
        return status, capsys.readouterr().err.splitlines()

    latents = str(tmp_path / "latents")
    assert run("encode", photos, f"--out={latents}")[0] == process.DONE
    for form in ("", "int8"):
        how = [f"--quantize={form}", f"--calibrate={photos}"] if form else []
        assert run("decode", latents, f"--out={tmp_path / form}/images", *how)[0] == process.DONE
    a, b = (np.asarray(Image.open(tmp_path / form / "images" / "0.png")) for form in ("", "int8"))
    assert 0 < np.abs(a.astype(int) - b).mean() < 8
    status, said = run("reconstruct", photos, f"--out={tmp_path}", "--quantize=int8")
    assert status == process.MISTAKE and said[-1].startswith(
        "error: --quantize='int8' needs --calibrate="
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"quantize": "int4"}, "quantize='int4' is not known; choose one of int8, int8-weights"),
        ({"quantize": "int8"}, "quantize='int8' needs calibrate="),
        ({"quantize": "int8", "calibrate": []}, "calibrate= holds no images"),
        ({"quantize": "int8", "calibrate": "none"}, "calibrate='none' does not exist"),
        ({"quantize": "int8-weights", "calibrate": []}, "has no ranges to calibrate"),
        ({"quantize": "fp8", "calibrate": []}, "needs a GPU of compute capability 9.0"),
        ({"calibrate": []}, "quantize='' is not known"),
    ],
)
def test_what_cannot_be_is_one_line(autoencoder_export, arguments, words):
    """Catches a traceback from qwix or XLA, and a calibration that is silently left out."""
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        dcae_jax.load_autoencoder(autoencoder_export, **arguments)
    assert "\n" not in str(caught.value)


def test_only_float_weights_are_cut(one_device):
    """Catches a cut encoder that passes for the whole one, whose checksum it would carry."""
    model = Model(variant="tiny-1.5")
    ae = autoencoder.abstract_autoencoder(model, one_device, "float32", "int8")
    with pytest.raises(UserError, match="channels=16: these weights are int8; cut the float ones"):
        ae.cut(16)


def test_a_broken_image_is_named(autoencoder_export, tmp_path):
    """Catches Pillow's traceback in the middle of a calibration."""
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match=r"a\.png cannot be read; remove it"):
        dcae_jax.load_autoencoder(autoencoder_export, quantize="int8", calibrate=str(tmp_path))


@pytest.mark.parametrize(
    "form, more, words",
    [
        ("diffusers", ["quantize=int8"], "the format diffusers holds float weights"),
        ("authors", ["quantize=int8-weights"], "the format authors holds float weights"),
        ("orbax", ["quantize=int8"], "export.quantize='int8' needs export.calibrate="),
        ("orbax", ["quantize=int8", "calibrate=none"], "export.calibrate='none' does not exist"),
        ("orbax", ["quantize=int8-weights", "dtype=float16"], "sets the dtypes itself"),
        ("orbax", ["calibrate=photos"], "is for export.quantize='int8'; set both"),
        ("orbax", ["quantize=fp8"], "export.quantize='fp8'"),
    ],
)
def test_exports_that_cannot_be_are_one_line(run_export, autoencoder_export, form, more, words):
    """Catches int8 weights in a format whose readers take them for floats."""
    flags = [f"--config.export.{flag}" for flag in more]
    status, said, out = run_export(autoencoder_export, form, *flags)
    assert status == process.MISTAKE and words in said.splitlines()[-1]
    assert not os.path.exists(out)
