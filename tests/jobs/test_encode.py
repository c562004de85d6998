# SPDX-License-Identifier: Apache-2.0
"""The job `encode`: each image once, the same bytes after any interruption, exact statistics."""

import os
import pathlib

import jax
import numpy as np
import pytest
from support import encoding, run_job

import dcae_jax
from dcae_jax import main
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.data import latents, sources, transforms
from dcae_jax.errors import UserError
from dcae_jax.jobs import encode
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import process


def _records(workdir):
    """{number of the crop: (values, label)}, each number once."""
    source = latents.latents(workdir)
    found = [latents.unpack(source.records[i]) for i in range(len(source))]
    assert len({number for *_, number in found}) == len(found)
    return {number: (values, label) for values, label, number in found}


def test_latents_are_those_of_the_images_and_of_their_mirror_images(
    encoded, narrow_export, encode_images
):
    """Catches latents that are scaled, of other crops, mirrored after encoding, or mislabelled."""
    source = sources.folder(encode_images)
    ae = dcae_jax.load_autoencoder(narrow_export)
    records = _records(encoded)
    assert sorted(records) == list(range(encoding.COUNT))
    for number, (values, label) in records.items():
        image, want = source[number]
        x = (
            np.asarray(transforms.center_crop(image, encoding.SIZE))[None].astype(np.float32)
            / 127.5
            - 1
        )
        for variant, pixels in enumerate((x, x[:, :, ::-1])):
            z = np.asarray(ae.encode(np.ascontiguousarray(pixels)))[0]
            np.testing.assert_allclose(
                values[variant].astype(np.float32), z, rtol=2**-7, atol=1e-4 * np.abs(z).max()
            )
        assert label == want
        assert np.abs(values[0][:, ::-1].astype(float) - values[1].astype(float)).max() > 0.01


def test_the_manifest_holds_the_statistics_of_what_is_stored(encoded, narrow_export, encode_images):
    """Catches sums of padding, of one variant, or of values before they were rounded."""
    manifest = latents.latents(encoded).manifest
    z = np.stack([values for values, _ in _records(encoded).values()]).astype(np.float64)
    assert z.shape == (encoding.COUNT, 2, 2, 2, 8)
    assert manifest["rms"] == pytest.approx(np.sqrt((z**2).mean()), rel=1e-12)
    flat = z.reshape(-1, 8)
    np.testing.assert_allclose(manifest["channel_mean"], flat.mean(0), rtol=1e-9)
    np.testing.assert_allclose(manifest["channel_std"], flat.std(0), rtol=1e-9)
    assert manifest["scaling_factor_multiplies_latent"] == 1 / manifest["rms"]
    assert manifest["scaling_from"] == "1/rms"
    wanted = {
        "kind": "latents",
        "count": encoding.COUNT,
        "flips": 2,
        "crops": 1,
        "dtype": "bfloat16",
    }
    wanted |= {
        "resolution": encoding.SIZE,
        "compression": 16,
        "latent_size": 2,
        "latent_channels": 8,
    }
    wanted |= {"num_classes": 3, "class_names": ["class0", "class1", "class2"], "unreadable": []}
    wanted |= {"autoencoder": narrow_export, "weights": "ema"}
    assert {key: manifest[key] for key in wanted} == wanted
    assert manifest["source"] == {
        "images": encoding.COUNT,
        "source": "folder",
        "path": encode_images,
    }
    assert manifest["checksum"] == checkpoint_weights.checksum(
        checkpoint_weights.load_weights(narrow_export)[0]
    )


@pytest.mark.parametrize("shard_size, batch_size, devices", [(7, 3, 1), (100, 8, 8)])
def test_each_image_is_there_once_whatever_the_sizes(
    encoded, encode_config, tmp_path, monkeypatch, shard_size, batch_size, devices
):
    """Catches images lost or doubled where shards, batches and devices do not divide."""
    make_mesh = mesh_lib.make_mesh
    monkeypatch.setattr(
        mesh_lib, "make_mesh", lambda sizes, _=None: make_mesh(sizes, jax.devices()[:devices])
    )
    encode_config.encode.shard_size, encode_config.encode.batch_size = shard_size, batch_size
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE
    ours, theirs = _records(str(tmp_path)), _records(encoded)
    assert sorted(ours) == list(range(encoding.COUNT))
    for number, (values, label) in ours.items():
        assert label == theirs[number][1]
        want = theirs[number][0].astype(np.float32)
        np.testing.assert_allclose(values.astype(np.float32), want, rtol=2**-7, atol=1e-4)


def test_the_published_scaling_factor_is_kept(
    encode_config, export_narrow, tmp_path, caplog, alone
):
    """Catches a factor of our own where one was published, or the inverse of it."""
    encode_config.init_from = export_narrow(scaling_factor=0.5)
    encode_config.encode.flip, encode_config.encode.dtype, encode_config.encode.count = (
        False,
        "float16",
        4,
    )
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE
    source = latents.latents(str(tmp_path))
    assert source.manifest["scaling_factor_multiplies_latent"] == 0.5
    assert source.manifest["scaling_from"] == "published"
    assert source[3][0].shape == (1, 2, 2, 8) and source[3][0].dtype == np.float16
    assert len(source) == 4
    scaled = 0.5 * source.manifest["rms"]
    assert ("not about 1" in caplog.text) == (not 0.5 < scaled < 2)


def test_fixed_crops_are_those_of_evaluation(encode_config, tmp_path, alone):
    """Catches crops that move with the shard or the batch they fall into."""
    encode_config.data.source, encode_config.encode.crops, encode_config.encode.count = (
        "photos",
        3,
        20,
    )
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE
    records = _records(str(tmp_path))
    assert {number: label for number, (_, label) in records.items()} == {
        n: n % len(sources.PHOTOS) for n in [*range(18), 18, 25]
    }
    images = sources.photos()
    crop = transforms.random_crop(
        images[16 % len(images)][0], encoding.SIZE, np.random.default_rng((4, 16))
    )
    x = np.asarray(crop)[None].astype(np.float32) / 127.5 - 1
    z = np.asarray(dcae_jax.load_autoencoder(encode_config.init_from).encode(x))[0]
    got = records[16][0][0].astype(np.float32)
    np.testing.assert_allclose(got, z, rtol=2**-7, atol=1e-4 * np.abs(z).max())
    manifest = latents.latents(str(tmp_path)).manifest
    assert manifest["num_classes"] == 9 and manifest["class_names"][0] == "astronaut.png"


# --- mistakes -------------------------------------------------------------------------------------


def test_another_configuration_is_refused_with_what_differs(
    encoded, encode_config, export_narrow, alone
):
    """Catches shards of two resolutions, data sets or models in one data set."""
    encode_config.encode.flip, encode_config.resolution = False, 48
    with pytest.raises(UserError, match="encode.flip was True, is False; resolution was 32, is 48"):
        run_job(encode, encode_config, encoded)
    encode_config.encode.flip, encode_config.resolution = True, encoding.SIZE
    encode_config.init_from = export_narrow(lambda weights: weights.update(_plus(weights)))
    with pytest.raises(UserError, match="other latents: weights was "):
        run_job(encode, encode_config, encoded)


def _plus(weights):
    name = next(n for n in weights if n.startswith("decoder.project_out") and n.endswith("bias"))
    return {name: weights[name] + 0.25}


def test_a_checksum_tells_weights_apart_and_the_encoders_only_encoders(
    export_narrow, narrow_export
):
    """Catches a decoder's training that invalidates latents, or an encoder's that does not."""
    weights, _ = checkpoint_weights.load_weights(narrow_export)
    decoder = weights | _plus(weights)
    assert checkpoint_weights.checksum(weights) == checkpoint_weights.checksum(
        dict(reversed(weights.items()))
    )
    assert checkpoint_weights.checksum(weights) != checkpoint_weights.checksum(decoder)
    assert checkpoint_weights.encoder_checksum(weights) == checkpoint_weights.encoder_checksum(
        decoder
    )
    name = next(n for n in weights if n.startswith("encoder.") and n.endswith("kernel"))
    encoder = weights | {name: weights[name] * 1.0001}
    assert checkpoint_weights.encoder_checksum(weights) != checkpoint_weights.encoder_checksum(
        encoder
    )


def test_a_broken_image_is_left_out_named_and_counted(
    encode_config, encode_images, tmp_path, caplog, alone
):
    """Catches a job that stops at one bad file, or stores latents of zeros for it."""
    root = tmp_path / "images"
    root.mkdir()
    for i, file in enumerate(sources.folder(encode_images).files):
        (root / f"{i:02d}.png").write_bytes(pathlib.Path(encode_images, file).read_bytes())
    (root / "07.png").write_bytes(b"\x89PNG not really")
    encode_config.data.path = str(root)
    assert run_job(encode, encode_config, str(tmp_path / "z")) == encode.DONE
    assert sorted(_records(str(tmp_path / "z"))) == [n for n in range(encoding.COUNT) if n != 7]
    manifest = latents.latents(str(tmp_path / "z")).manifest
    assert manifest["count"] == encoding.COUNT - 1
    assert manifest["unreadable"] == [str(root / "07.png")]
    assert sum("unreadable, left out" in r.getMessage() for r in caplog.records) == 1
    encode_config.encode.crops = 10
    with pytest.raises(UserError, match="of 2.. records read are unreadable .*07.png"):
        run_job(encode, encode_config, str(tmp_path / "many"))
    assert not any(name.endswith(".tmp") for name in os.listdir(tmp_path / "many"))


def test_an_overflow_of_float16_names_bfloat16(encode_config, export_narrow, tmp_path, alone):
    """Catches infinite latents that a diffusion model is then trained on."""

    def louder(weights):
        for name in weights:
            if name.startswith("encoder.project_out"):
                weights[name] = weights[name] * 1e8

    encode_config.init_from, encode_config.encode.dtype = export_narrow(louder), "float16"
    with pytest.raises(UserError, match="65504.*encode.dtype=bfloat16"):
        run_job(encode, encode_config, str(tmp_path))
    encode_config.encode.dtype, encode_config.encode.count = "bfloat16", 4
    assert run_job(encode, encode_config, str(tmp_path)) == encode.DONE  # no shard was there yet


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.init_from="], ["init_from is empty"]),
        (["--config.resolution=72"], ["resolution=72", "f=16", "64 or 80"]),
        (["--config.encode.batch_size=12"], ["encode.batch_size=12", "8 or 16"]),
        (["--config.encode.dtype=float64"], ["encode.dtype='float64'", "float16"]),
        (["--config.data.source=latents"], ["has no images"]),
        (["--config.mesh.spatial=2"], ["'spatial': 2", "leave mesh.* out"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(encode_config, tmp_path, capsys, arguments, words):
    """Catches a traceback, or an hour of reading images, before the mistake shows."""
    encode_config.encode.batch_size = 8
    status = main.main(["main", *encoding.command(tmp_path / "z", encode_config)[3:], *arguments])
    said = capsys.readouterr().err
    assert status == process.MISTAKE
    line = said.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), said
    assert "Traceback" not in said and not (tmp_path / "z").exists()


def test_a_folder_with_records_of_something_else_is_refused(encode_config, tmp_path, alone):
    """Catches shards of an unknown model that pass for this job's."""
    (tmp_path / latents.shard_name(0, 5)).write_bytes(b"")
    with pytest.raises(UserError, match="holds latents or records"):
        run_job(encode, encode_config, str(tmp_path))
