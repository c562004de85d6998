# SPDX-License-Identifier: Apache-2.0
"""Cases: batches, latents, reconstructions, samples and scores."""

import functools
import importlib.util
import io
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import inputs
import ml_dtypes
import numpy as np
import space as net
import training
from PIL import Image
from space import Space

# A record of latents, docs/latents.md: magic, dtype, flips, h, w, c, label, number of the crop.
HEADER = struct.Struct("<4sBBHHHiq")
DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
STEPS = 6  # evaluations of the network


# --- batches --------------------------------------------------------------------------------------


def _batches(space: Space, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of a model that does not learn tell the batches apart."""
    still = {
        "init_from": space.model("tiny"),
        "trainable": r"('decoder\.project_out\..*',)",
        "optimizer.learning_rate": 1e-12,
        "steps": 6,
    }
    changes = training.AUTOENCODER | still | dict(settings)
    return {"rows": net.rows(space.job("phase1.py:tiny", name, changes))}


def photos(space: Space) -> dict[str, Any]:
    """Catches other photographs, another order of an epoch, or another random crop."""
    return _batches(space, "photos", {"data.source": "photos", "seed": 3})


def centre(space: Space) -> dict[str, Any]:
    """Catches another centre crop, and mirroring where it was switched off."""
    settings = {"data.path": space.pictures(), "data.crop": "center", "data.flip": False}
    return _batches(space, "centre", {**settings, "data.held_out": 0.0, "data.workers": 1})


def mixture(space: Space) -> dict[str, Any]:
    """Catches another draw of a mixture's parts, or other labels and held-out images of them."""
    parts = f"((3.0,'folder','{space.pictures()}'),(1.0,'folder','{space.pictures(7, 1)}'))"
    return _batches(space, "mixture", {"data.source": "mixture", "data.parts": parts})


def prepared(space: Space) -> dict[str, Any]:
    """Catches another reading of a prepared ArrayRecord."""
    import tensorflow_datasets as tfds

    class NetPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3))
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._examples(0, 9), "validation": self._examples(9, 13)}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self, first, end):
            for i in range(first, end):
                file = io.BytesIO()
                Image.fromarray(inputs.picture(i, 44, 52, seed=2)).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 3}

    folder = space.path("tfds")
    NetPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    settings = {
        "data.source": "tfds",
        "data.name": "net_pictures",
        "data.data_dir": space.path("tfds"),
    }
    return _batches(space, "tfds-run", settings)


# --- latents --------------------------------------------------------------------------------------


def records(workdir: str) -> list[tuple[np.ndarray, int, int]]:
    """[(values [flips, h, w, c], label, number)] of a folder of latents, in order."""
    from array_record.python import array_record_module as array_record

    found = []
    for name in sorted(os.listdir(workdir)):
        if not name.endswith(".array_record"):
            continue
        for record in array_record.ArrayRecordReader(os.path.join(workdir, name)).read_all():
            magic, code, *shape, label, number = HEADER.unpack_from(record)
            assert magic == b"DCL1"
            values = np.frombuffer(record, DTYPES[code], offset=HEADER.size).reshape(shape)
            found.append((values, label, number))
    return found


def latents_of(workdir: str, space: Space) -> dict[str, Any]:
    """What a job encode left."""
    with open(os.path.join(workdir, "manifest.json")) as file:
        manifest = json.load(file)
    numbers = ("rms", "channel_mean", "channel_std", "scaling_factor_multiplies_latent")
    moving = {"shards", "model", "checksum", "encoder_checksum", *numbers}
    exact = {key: value for key, value in manifest.items() if key not in moving}
    found = records(workdir)
    return {
        "exact": {
            "manifest": json.loads(net.without_paths(json.dumps(exact), space)),
            "shards": [[s["file"], s["records"], s["bytes"]] for s in manifest["shards"]],
            "records": [[label, number] for _, label, number in found],
            "mirrored": [bool((v[0] != v[-1]).any()) for v, _, _ in found],
        },
        "values": {key: manifest[key] for key in numbers},
        "arrays": {str(n): net.summary(str(n), values) for values, _, n in found},
        "sha256": {s["file"]: s["sha256"] for s in manifest["shards"]},
    }


def encode_folder(space: Space) -> dict[str, Any]:
    """Catches another crop, order, label, statistic or record of the job encode."""
    return latents_of(space.latents(), space)


def encode_photos(space: Space) -> dict[str, Any]:
    """Catches other fixed crops, shards or counts where an image gives several, in float16."""
    settings = {
        "init_from": space.model("scaled"),
        "resolution": 48,
        "encode.crops": 2,
        "encode.count": 10,
        "encode.flip": False,
        "encode.dtype": "float16",
        "encode.shard_size": 4,
        "encode.batch_size": 4,
    }
    return latents_of(space.job("encode.py", "encode-photos", settings), space)


# --- the Python API -------------------------------------------------------------------------------


def autoencoders(space: Space) -> dict[str, Any]:
    """Catches another number of an autoencoder of the API: whole, in tiles."""
    import dcae_jax

    x = np.stack([inputs.picture(i, 64, 96) for i in range(2)]).astype(np.float32) / 127.5 - 1
    arrays, exact = {}, {}
    for name in ("tiny", "scaled"):
        ae = dcae_jax.load_autoencoder(space.model(name), dtype="float32")
        exact[name] = [
            ae.compression,
            ae.latent_channels,
            ae.scaling_factor,
            ae.num_parameters,
        ]
        z = np.asarray(ae.encode(x))
        arrays[f"{name} encode"] = z
        arrays[f"{name} decode"] = np.asarray(ae.decode(z))
    arrays["encode in tiles"] = np.asarray(ae.encode(x[:1], tile=3, overlap=1))
    arrays["decode in tiles"] = np.asarray(ae.decode(z[:1], tile=3, overlap=1))
    half = dcae_jax.load_autoencoder(space.model("tiny"), dtype="bfloat16")
    exact["bfloat16"] = str(np.asarray(half.encode(x)).dtype)
    return {
        "exact": exact,
        "arrays": {name: net.summary(name, value) for name, value in arrays.items()},
    }


SAMPLERS = {
    "uvit": ["", "dpm_fast", "dpmpp_2m", "dpmpp_3m", "ddim", "ddpm"],
    "dit": ["", "dpm_fast", "dpmpp_2m", "ddim"],
    "usit": ["", "euler", "heun"],
}


def _generator(space: Space, model: str) -> Any:
    import dcae_jax

    path, autoencoder = space.model(model), space.model("scaled")
    return dcae_jax.load_generator(path, autoencoder=autoencoder, dtype="float32")


def _latents(generator: Any, labels: list[int], **settings: Any) -> np.ndarray:
    """What sample_latents gives; since the record its settings are one object."""
    import dcae_jax

    if hasattr(dcae_jax, "SampleSettings"):
        return generator.sample_latents(labels, dcae_jax.SampleSettings(**settings))
    return generator.sample_latents(labels, **settings)


def samples(space: Space, model: str) -> dict[str, Any]:
    """Catches another noise, schedule, guidance or step of any sampler."""
    generator, arrays = _generator(space, model), {}
    labels = [0, 2, generator.num_classes]
    for sampler in SAMPLERS[model]:
        settings = dict(guidance=1.5, steps=STEPS, seed=4, sampler=sampler)
        if sampler == "dpmpp_3m":  # the corrected one, whatever it is called
            try:
                values = _latents(
                    generator, labels, **settings | {"sampler": f"{sampler}_corrected"}
                )
            except ValueError:
                values = _latents(generator, labels, **settings)
        else:
            values = _latents(generator, labels, **settings)
        arrays[sampler or "own"] = values
    sampler = "heun" if model == "usit" else "ddim"
    arrays["plain"] = _latents(generator, labels, steps=STEPS, sampler=sampler)
    settings = dict(guidance=2.0, steps=STEPS, seed=1, interval=(0.3, 0.8), first=5)
    arrays["interval"] = _latents(generator, labels, sampler=sampler, **settings)
    images = generator.sample(labels, 1.5, STEPS, 4, sampler=sampler)
    arrays["images"] = images.astype(np.float32)
    return {
        "exact": {"images": [str(images.dtype), list(images.shape)]},
        "arrays": {name: net.summary(name, value) for name, value in arrays.items()},
    }


def job_sample(space: Space) -> dict[str, Any]:
    """Catches other labels, files or pixels of the job sample in any format."""
    base = {
        "init_from": space.model("uvit"),
        "autoencoder": space.model("scaled"),
        "sample.count": 5,
        "sample.batch_size": 2,
        "sample.steps": STEPS,
        "sample.guidance": 1.5,
        "sample.sampler": "ddim",
    }
    found: dict[str, Any] = {"exact": {}, "arrays": {}, "sha256": {}}
    workdir = space.job("sample.py", "sample-npz", base | {"sample.format": "npz"})
    with np.load(os.path.join(workdir, "samples.npz")) as file:
        found["exact"]["npz"] = {key: [str(v.dtype), list(v.shape)] for key, v in file.items()}
        images = file["arr_0"]
        found["exact"]["labels"] = {k: v.tolist() for k, v in file.items() if v.ndim == 1}
    found["arrays"]["npz"] = net.summary("npz", images)
    labels = {"sample.format": "png", "sample.labels": "(2,0)"}
    workdir = space.job("sample.py", "sample-png", base | labels)
    listing = sorted(
        os.path.relpath(os.path.join(folder, name), workdir)
        for folder, _, names in os.walk(workdir)
        for name in names
        if not name.startswith(".")
    )
    found["exact"]["png"] = listing
    pngs = [np.asarray(Image.open(os.path.join(workdir, n))) for n in listing if ".png" in n]
    found["arrays"]["png"] = net.summary("png", np.stack(pngs))
    workdir = space.job("sample.py", "sample-grid", base | {"sample.format": "grid"})
    grid = np.asarray(Image.open(os.path.join(workdir, "samples.png")))
    found["arrays"]["grid"] = net.summary("grid", grid)
    return found


# --- scores ---------------------------------------------------------------------------------------


def _scores(workdir: str) -> dict[str, Any]:
    with open(os.path.join(workdir, "evaluate.json")) as file:
        results = json.load(file)["results"]
    return {"values": {k: v for k, v in results.items()}}


def evaluate(space: Space) -> dict[str, Any]:
    """Catches another PSNR, SSIM, LPIPS or rFID of reconstructions."""
    settings = {
        "init_from": space.model("tiny"),
        "data.source": "folder",
        "data.path": space.pictures(),
        "evaluate.resolutions": "(32,)",
        "evaluate.batch_size": 4,
        "evaluate.count": 6,
        "evaluate.grid": 2,
        "evaluate.lpips_weights": space.network("alex"),
        "evaluate.inception_weights": space.network("inception"),
    }
    return _scores(space.job("evaluate.py", "evaluate", settings))


def evaluate_samples(space: Space) -> dict[str, Any]:
    """Catches another FID, Inception score, KID, precision or recall of samples."""
    path = space.path("judged.npz")
    np.savez(path, arr_0=np.stack([inputs.picture(i, 48, 48, seed=5) for i in range(5)]))
    settings = {
        "evaluate.samples": path,
        "evaluate.reference": space.pictures(7, 1),
        "evaluate.batch_size": 4,
        "evaluate.inception_weights": space.network("inception"),
    }
    return _scores(space.job("evaluate.py", "evaluate-samples", settings))


CASES = {
    "batches of photos": photos,
    "batches of a folder, centred": centre,
    "batches of a mixture": mixture,
    "latents of a folder": encode_folder,
    "latents of photos": encode_photos,
    "autoencoder by API": autoencoders,
    "samples of job sample": job_sample,
    "scores of reconstructions": evaluate,
    "scores of samples": evaluate_samples,
}
for _model in SAMPLERS:
    CASES[f"samples of {_model}"] = functools.partial(samples, model=_model)
    CASES[f"samples of {_model}"].__doc__ = samples.__doc__
if importlib.util.find_spec("tensorflow_datasets"):
    CASES["batches of tfds"] = prepared
