# SPDX-License-Identifier: Apache-2.0
"""The job `encode`: each image once, the same bytes after any interruption, exact statistics."""

import filecmp
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from support import CONFIGS, ROOT, run_job, small_models
from support.processes import two_processes

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files, main
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.data import latents, sources, transforms
from dcae_jax.errors import UserError
from dcae_jax.jobs import encode
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import preemption, process

COUNT, SIZE = 23, 32  # images of the fixture, and pixels per side of a crop


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Images of noise on a slope, in three classes."""
    root = tmp_path_factory.mktemp("data") / "images"
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        slope = np.linspace(0, 160, 40 + i)[None, :, None] + np.zeros((36, 1, 3))
        pixels = (slope + rng.integers(0, 90, slope.shape)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return str(root)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """-> a function that exports a narrow tiny model, after `change(weights)`."""

    def export(change=None, **settings):
        folder = str(tmp_path_factory.mktemp("export"))
        return small_models.export_autoencoder(folder, change, **settings)

    return export


@pytest.fixture(scope="module")
def model(exported):
    return exported()


@pytest.fixture
def config(image_folder, model):
    return _config(image_folder, model)


def _config(image_folder, model, **changes):
    config = config_lib.load_file(os.path.join(CONFIGS, "encode.py"))
    config.init_from, config.resolution = model, SIZE
    config.data.source, config.data.path = "folder", image_folder
    config.encode.shard_size, config.encode.batch_size = 5, 4
    config.encode.update(changes)
    return config


@pytest.fixture(scope="module")
def whole(image_folder, model, tmp_path_factory):
    """The workdir of a job that nothing interrupted, on one device."""
    workdir = str(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = mesh_lib.make_mesh
        patch.setattr(
            mesh_lib, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
        )
        assert run_job(encode, _config(image_folder, model), workdir) == encode.DONE
    return workdir


def _records(workdir):
    """{number of the crop: (values, label)}, each number once."""
    source = latents.latents(workdir)
    found = [latents.unpack(source.records[i]) for i in range(len(source))]
    assert len({number for *_, number in found}) == len(found)
    return {number: (values, label) for values, label, number in found}


def _assert_same_files(left, right):
    names = sorted(os.listdir(left))
    assert names == sorted(os.listdir(right))
    _, different, broken = filecmp.cmpfiles(left, right, names, shallow=False)
    assert not different and not broken, different


def test_latents_are_those_of_the_images_and_of_their_mirror_images(whole, model, image_folder):
    """Catches latents that are scaled, of other crops, mirrored after encoding, or mislabelled."""
    source = sources.folder(image_folder)
    ae = dcae_jax.load_autoencoder(model)
    records = _records(whole)
    assert sorted(records) == list(range(COUNT))
    for number, (values, label) in records.items():
        image, want = source[number]
        x = np.asarray(transforms.center_crop(image, SIZE))[None].astype(np.float32) / 127.5 - 1
        for variant, pixels in enumerate((x, x[:, :, ::-1])):
            z = np.asarray(ae.encode(np.ascontiguousarray(pixels)))[0]
            np.testing.assert_allclose(
                values[variant].astype(np.float32), z, rtol=2**-7, atol=1e-4 * np.abs(z).max()
            )
        assert label == want
        assert np.abs(values[0][:, ::-1].astype(float) - values[1].astype(float)).max() > 0.01


def test_the_manifest_holds_the_statistics_of_what_is_stored(whole, model, image_folder):
    """Catches sums of padding, of one variant, or of values before they were rounded."""
    manifest = latents.latents(whole).manifest
    z = np.stack([values for values, _ in _records(whole).values()]).astype(np.float64)
    assert z.shape == (COUNT, 2, 2, 2, 8)
    assert manifest["rms"] == pytest.approx(np.sqrt((z**2).mean()), rel=1e-12)
    flat = z.reshape(-1, 8)
    np.testing.assert_allclose(manifest["channel_mean"], flat.mean(0), rtol=1e-9)
    np.testing.assert_allclose(manifest["channel_std"], flat.std(0), rtol=1e-9)
    assert manifest["scaling_factor_multiplies_latent"] == 1 / manifest["rms"]
    assert manifest["scaling_from"] == "1/rms"
    wanted = {"kind": "latents", "count": COUNT, "flips": 2, "crops": 1, "dtype": "bfloat16"}
    wanted |= {"resolution": SIZE, "compression": 16, "latent_size": 2, "latent_channels": 8}
    wanted |= {"num_classes": 3, "class_names": ["class0", "class1", "class2"], "unreadable": []}
    wanted |= {"autoencoder": model, "weights": "ema"}
    assert {key: manifest[key] for key in wanted} == wanted
    assert manifest["source"] == {"images": COUNT, "source": "folder", "path": image_folder}
    assert manifest["checksum"] == checkpoint_weights.checksum(
        checkpoint_weights.load_weights(model)[0]
    )


@pytest.mark.parametrize("shard_size, batch_size, devices", [(7, 3, 1), (100, 8, 8)])
def test_each_image_is_there_once_whatever_the_sizes(
    whole, config, tmp_path, monkeypatch, shard_size, batch_size, devices
):
    """Catches images lost or doubled where shards, batches and devices do not divide."""
    make_mesh = mesh_lib.make_mesh
    monkeypatch.setattr(
        mesh_lib, "make_mesh", lambda sizes, _=None: make_mesh(sizes, jax.devices()[:devices])
    )
    config.encode.shard_size, config.encode.batch_size = shard_size, batch_size
    assert run_job(encode, config, str(tmp_path)) == encode.DONE
    ours, theirs = _records(str(tmp_path)), _records(whole)
    assert sorted(ours) == list(range(COUNT))
    for number, (values, label) in ours.items():
        assert label == theirs[number][1]
        want = theirs[number][0].astype(np.float32)
        np.testing.assert_allclose(values.astype(np.float32), want, rtol=2**-7, atol=1e-4)


def test_the_published_scaling_factor_is_kept(config, exported, tmp_path, caplog, alone):
    """Catches a factor of our own where one was published, or the inverse of it."""
    config.init_from = exported(scaling_factor=0.5)
    config.encode.flip, config.encode.dtype, config.encode.count = False, "float16", 4
    assert run_job(encode, config, str(tmp_path)) == encode.DONE
    source = latents.latents(str(tmp_path))
    assert source.manifest["scaling_factor_multiplies_latent"] == 0.5
    assert source.manifest["scaling_from"] == "published"
    assert source[3][0].shape == (1, 2, 2, 8) and source[3][0].dtype == np.float16
    assert len(source) == 4
    scaled = 0.5 * source.manifest["rms"]
    assert ("not about 1" in caplog.text) == (not 0.5 < scaled < 2)


def test_fixed_crops_are_those_of_evaluation(config, tmp_path, alone):
    """Catches crops that move with the shard or the batch they fall into."""
    config.data.source, config.encode.crops, config.encode.count = "photos", 3, 20
    assert run_job(encode, config, str(tmp_path)) == encode.DONE
    records = _records(str(tmp_path))
    assert {number: label for number, (_, label) in records.items()} == {
        n: n % len(sources.PHOTOS) for n in [*range(18), 18, 25]
    }
    images = sources.photos()
    crop = transforms.random_crop(images[16 % len(images)][0], SIZE, np.random.default_rng((4, 16)))
    x = np.asarray(crop)[None].astype(np.float32) / 127.5 - 1
    z = np.asarray(dcae_jax.load_autoencoder(config.init_from).encode(x))[0]
    got = records[16][0][0].astype(np.float32)
    np.testing.assert_allclose(got, z, rtol=2**-7, atol=1e-4 * np.abs(z).max())
    manifest = latents.latents(str(tmp_path)).manifest
    assert manifest["num_classes"] == 9 and manifest["class_names"][0] == "astronaut.png"


# --- interruptions --------------------------------------------------------------------------------


def _command(workdir, config):
    values = {key: config[key] for key in ("init_from", "resolution")}
    values |= {f"data.{key}": config.data[key] for key in ("source", "path")}
    values |= {f"encode.{key}": config.encode[key] for key in ("crops", "shard_size", "batch_size")}
    file = os.path.join(CONFIGS, "encode.py")
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [
        sys.executable,
        "-m",
        "dcae_jax.main",
        f"--config={file}",
        f"--workdir={workdir}",
    ] + flags


def test_a_killed_job_ends_with_the_same_bytes(config, tmp_path, alone):
    """Catches half a shard taken for a whole one, and statistics that forget the first half."""
    config.encode.crops = 20  # enough that the signal finds the job at work
    assert run_job(encode, config, str(tmp_path / "whole")) == encode.DONE
    killed = tmp_path / "killed"
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": xla}
    process = subprocess.Popen(_command(killed, config), env=environment, stderr=subprocess.DEVNULL)
    first = killed / latents.shard_name(0, 92)
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None and not first.exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert first.exists() and not (killed / latents.MANIFEST).exists()
    before = first.stat()
    done = subprocess.run(_command(killed, config), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming: " in done.stderr
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    _assert_same_files(tmp_path / "whole", killed)


class _Killed(BaseException):
    """In the place of a power cut."""


@pytest.mark.parametrize("file", ["encode.json", "00001-of-00005.json", "00004-of-00005.json"])
@pytest.mark.parametrize("after", [False, True])
def test_every_moment_of_a_crash_is_safe(whole, config, tmp_path, monkeypatch, alone, file, after):
    """Catches a shard that counts before its sums are written, and files left by a crash."""
    write_json = files.write_json

    def crash(path, value):
        if path.endswith(file):
            if after:
                write_json(path, value)
            raise _Killed
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", crash)
    with pytest.raises(_Killed):
        run_job(encode, config, str(tmp_path))
    (tmp_path / f"{latents.MANIFEST}.99.tmp").write_text("{")
    monkeypatch.setattr(files, "write_json", write_json)
    with pytest.raises(UserError):
        latents.latents(str(tmp_path))
    assert run_job(encode, config, str(tmp_path)) == encode.DONE
    _assert_same_files(whole, tmp_path)


def test_sigterm_stops_after_a_whole_shard_with_status_75(
    whole, config, tmp_path, monkeypatch, alone
):
    """Catches a preempted job that goes on, calls itself done, or leaves half a shard."""
    write_json = files.write_json

    def terminate(path, value):
        write_json(path, value)
        if path.endswith("00001-of-00005.json"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(files, "write_json", terminate)
    assert run_job(encode, config, str(tmp_path)) == preemption.STATUS
    left = sorted(name for name in os.listdir(tmp_path) if not name.endswith(".json"))
    assert left == [latents.shard_name(s, 5) for s in range(2)]
    assert run_job(encode, config, str(tmp_path)) == encode.DONE
    _assert_same_files(whole, tmp_path)


def test_a_finished_job_is_left_alone_and_mended_where_a_shard_is_damaged(
    whole, config, tmp_path, monkeypatch, alone
):
    """Catches a second encoding of everything, and a truncated shard that stays."""
    for name in os.listdir(whole):
        (tmp_path / name).write_bytes(pathlib.Path(whole, name).read_bytes())
    done = []
    write_shard = latents.write_shard
    monkeypatch.setattr(
        latents,
        "write_shard",
        lambda w, shard, *rest: done.append(shard) or write_shard(w, shard, *rest),
    )
    assert run_job(encode, config, str(tmp_path)) == encode.DONE
    assert not done
    os.truncate(tmp_path / latents.shard_name(3, 5), 1000)
    assert run_job(encode, config, str(tmp_path)) == encode.DONE
    assert [shard.first for shard in done] == [15]
    _assert_same_files(whole, tmp_path)


def test_two_processes_write_what_one_writes(whole, config, tmp_path):
    """Catches shards that two processes write, or none, and statistics of one process's part."""
    settings = config.to_dict() | {"workdir": str(tmp_path)}
    # The same four images on each device as in one process on one device.
    settings["encode"] |= {"batch_size": 16}
    two_processes(TWO, {"config": json.loads(json.dumps(settings))})
    _assert_same_files(whole, tmp_path)


TWO = """
from dcae_jax.jobs import encode
from support import run_job
given = settings["config"]
config = config_lib.load_file(f"{CONFIGS}/encode.py")
config.init_from, config.resolution = given["init_from"], given["resolution"]
config.data.source, config.data.path = given["data"]["source"], given["data"]["path"]
config.encode.update(given["encode"])
print(json.dumps(run_job(encode, config, given["workdir"])))
"""


# --- mistakes -------------------------------------------------------------------------------------


def test_another_configuration_is_refused_with_what_differs(whole, config, exported, alone):
    """Catches shards of two resolutions, data sets or models in one data set."""
    config.encode.flip, config.resolution = False, 48
    with pytest.raises(UserError, match="encode.flip was True, is False; resolution was 32, is 48"):
        run_job(encode, config, whole)
    config.encode.flip, config.resolution = True, SIZE
    config.init_from = exported(lambda weights: weights.update(_plus(weights)))
    with pytest.raises(UserError, match="other latents: weights was "):
        run_job(encode, config, whole)


def _plus(weights):
    name = next(n for n in weights if n.startswith("decoder.project_out") and n.endswith("bias"))
    return {name: weights[name] + 0.25}


def test_a_checksum_tells_weights_apart_and_the_encoders_only_encoders(exported, model):
    """Catches a decoder's training that invalidates latents, or an encoder's that does not."""
    weights, _ = checkpoint_weights.load_weights(model)
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
    config, image_folder, tmp_path, caplog, alone
):
    """Catches a job that stops at one bad file, or stores latents of zeros for it."""
    root = tmp_path / "images"
    root.mkdir()
    for i, file in enumerate(sources.folder(image_folder).files):
        (root / f"{i:02d}.png").write_bytes(pathlib.Path(image_folder, file).read_bytes())
    (root / "07.png").write_bytes(b"\x89PNG not really")
    config.data.path = str(root)
    assert run_job(encode, config, str(tmp_path / "z")) == encode.DONE
    assert sorted(_records(str(tmp_path / "z"))) == [n for n in range(COUNT) if n != 7]
    manifest = latents.latents(str(tmp_path / "z")).manifest
    assert manifest["count"] == COUNT - 1
    assert manifest["unreadable"] == [str(root / "07.png")]
    assert sum("unreadable, left out" in r.getMessage() for r in caplog.records) == 1
    config.encode.crops = 10
    with pytest.raises(UserError, match="of 2.. records read are unreadable .*07.png"):
        run_job(encode, config, str(tmp_path / "many"))
    assert not any(name.endswith(".tmp") for name in os.listdir(tmp_path / "many"))


def test_an_overflow_of_float16_names_bfloat16(config, exported, tmp_path, alone):
    """Catches infinite latents that a diffusion model is then trained on."""

    def louder(weights):
        for name in weights:
            if name.startswith("encoder.project_out"):
                weights[name] = weights[name] * 1e8

    config.init_from, config.encode.dtype = exported(louder), "float16"
    with pytest.raises(UserError, match="65504.*encode.dtype=bfloat16"):
        run_job(encode, config, str(tmp_path))
    config.encode.dtype, config.encode.count = "bfloat16", 4
    assert run_job(encode, config, str(tmp_path)) == encode.DONE  # no shard was there yet


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
def test_a_mistake_is_one_line_and_status_2(config, tmp_path, capsys, arguments, words):
    """Catches a traceback, or an hour of reading images, before the mistake shows."""
    config.encode.batch_size = 8
    status = main.main(["main", *_command(tmp_path / "z", config)[3:], *arguments])
    said = capsys.readouterr().err
    assert status == process.MISTAKE
    line = said.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), said
    assert "Traceback" not in said and not (tmp_path / "z").exists()


def test_a_folder_with_records_of_something_else_is_refused(config, tmp_path, alone):
    """Catches shards of an unknown model that pass for this job's."""
    (tmp_path / latents.shard_name(0, 5)).write_bytes(b"")
    with pytest.raises(UserError, match="holds latents or records"):
        run_job(encode, config, str(tmp_path))
