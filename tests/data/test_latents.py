# SPDX-License-Identifier: Apache-2.0
"""Latents on disk, and training batches of them."""

import json
import os
import pickle
from concurrent import futures

import numpy as np
import pytest
from array_record.python import array_record_module
from support import data

from dcae_jax import config as config_lib
from dcae_jax.config.schema import Data
from dcae_jax.data import latents, sources
from dcae_jax.errors import UserError

SHAPE = (2, 3, 3, 4)  # flips, h, w, c


def _values(number, dtype):
    """Latents whose values tell the crop (integer part) and the variant (.0 or .5)."""
    values = np.full(SHAPE, number, np.float32) + np.array([0, 0.5])[:, None, None, None]
    return values.astype(latents.DTYPES[dtype])


def write(path, count=10, shard_size=4, dtype="bfloat16"):
    """A folder of latents as the job `encode` leaves it; the label of crop n is n % 3."""
    os.makedirs(path)
    shards = []
    for s in range(-(-count // shard_size)):
        file = latents.shard_name(s, -(-count // shard_size))
        writer = array_record_module.ArrayRecordWriter(
            os.path.join(path, file), latents.WRITER_OPTIONS
        )
        numbers = range(s * shard_size, min(count, (s + 1) * shard_size))
        for n in numbers:
            writer.write(latents.pack(_values(n, dtype), n % 3, n))
        writer.close()
        size = os.path.getsize(os.path.join(path, file))
        shards.append({"file": file, "records": len(numbers), "bytes": size})
    manifest = {
        "kind": "latents",
        "format": latents.FORMAT,
        "dtype": dtype,
        "flips": SHAPE[0],
        "latent_size": SHAPE[1],
        "latent_channels": SHAPE[3],
        "count": count,
        "shards": shards,
    }
    with open(os.path.join(path, latents.MANIFEST), "w") as file:
        json.dump(manifest, file)
    return str(path)


def _config(path, **changes):
    config = data.config(data__source="latents", data__path=path)
    config.data.update(changes)
    return config


def _assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"latent", "label"}
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_record_comes_back_as_it_was_written(dtype):
    """Catches a header of another size, labels cut to 8 bits, values of another dtype or order."""
    values = np.random.default_rng(0).normal(size=SHAPE).astype(latents.DTYPES[dtype])
    record = latents.pack(values, 70_000, 2**40)
    back, label, number = latents.unpack(record)
    assert back.dtype == values.dtype and (label, number) == (70_000, 2**40)
    np.testing.assert_array_equal(back, values)
    for broken, message in (
        (record[:-2], "does not fit its shape"),
        (record[:9], "not a record of latents"),
        (b"JPEG" + record[4:], "not a record of latents"),
    ):
        with pytest.raises(ValueError, match=message):
            latents.unpack(broken)


def test_a_source_reads_every_record_in_any_thread_and_process(tmp_path):
    """Catches records of a wrong shard, and a reader that cannot go to Grain's workers."""
    source = latents.latents(write(tmp_path / "z"))
    assert len(source) == 10
    copy = pickle.loads(pickle.dumps(source))
    with futures.ThreadPoolExecutor(4) as pool:
        for i, (values, label) in enumerate(pool.map(copy.__getitem__, range(10))):
            assert label == i % 3
            np.testing.assert_array_equal(values, _values(i, "bfloat16"))
    assert source.name(9).endswith("latents-00002-of-00003.array_record, record 1")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_batches_do_not_depend_on_hosts_workers_or_resumes(tmp_path, dtype):
    """Catches flips or an order drawn by each reader for itself, and a dtype lost on the way."""
    path = write(tmp_path / "z", dtype=dtype)
    whole = data.take(_config(path), 8)
    assert whole[0]["latent"].shape == (4, 3, 3, 4) and whole[0]["label"].dtype == np.int32
    assert whole[0]["latent"].dtype == latents.DTYPES[dtype]
    hosts = [data.take(_config(path), 8, process=p, processes=2) for p in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*hosts, strict=True)]
    _assert_equal(joined, whole)
    _assert_equal(data.take(_config(path), 5, start=12), whole[3:])
    if dtype == "bfloat16":
        _assert_equal(data.take(_config(path, workers=2, threads=1), 8), whole)


def test_each_crop_is_drawn_once_an_epoch_with_its_label_and_both_variants(tmp_path):
    """Catches the mirrored latents never used, or used although data.flip is off."""
    path = write(tmp_path / "z")
    seen = {}
    for flip in (True, False):
        batches = data.take(_config(path, flip=flip), 20)
        first = np.concatenate([b["latent"] for b in batches])[:, 0, 0, 0].astype(np.float32)
        labels = np.concatenate([b["label"] for b in batches])
        assert sorted(np.floor(first[:10])) == list(range(10))
        np.testing.assert_array_equal(np.floor(first) % 3, labels)
        seen[flip] = set(first % 1)
    assert seen == {True: {0.0, 0.5}, False: {0.0}}


def test_a_damaged_record_is_replaced_and_named_once(tmp_path, caplog):
    """Catches a run that stops, or trains on noise, where a disk flipped a bit."""
    # In bfloat16, 149.5 would be 150.
    path = write(tmp_path / "z", count=300, shard_size=300, dtype="float16")
    (shard,) = latents.latents(path).manifest["shards"]
    file = os.path.join(path, shard["file"])
    with open(file, "r+b") as opened:
        record = latents.pack(_values(150, "float16"), 0, 150)
        offset = opened.read().index(record[:50])
        opened.seek(offset + 60)
        opened.write(b"\xff")
    batches = data.take(_config(path), 150)  # two epochs
    first = np.concatenate([b["latent"] for b in batches])[:, 0, 0, 0].astype(np.float32)
    assert len(first) == 600 and 150 not in np.floor(first)
    assert sum("replaced" in r.getMessage() for r in caplog.records) == 1
    assert "record 150" in caplog.text


def _truncate(path):
    file = os.path.join(path, latents.shard_name(1, 3))
    os.truncate(file, os.path.getsize(file) // 2)


def _edit(**changes):
    def edit(path):
        file = os.path.join(path, latents.MANIFEST)
        with open(file) as opened:
            manifest = json.load(opened)
        with open(file, "w") as opened:
            json.dump(manifest | changes, opened)

    return edit


def _unfinished(path):
    os.rename(os.path.join(path, latents.MANIFEST), os.path.join(path, latents.IDENTITY))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: os.remove(os.path.join(path, latents.MANIFEST)), "configs/encode.py"),
        (_unfinished, "not fully encoded; rerun the command"),
        (lambda path: os.remove(os.path.join(path, latents.shard_name(2, 3))), "lacks the shard"),
        (_truncate, "latents-00001-of-00003.array_record has"),
        (_edit(count=11), "10 crops, manifest.json says 11"),
        (_edit(format=99), "format 99"),
        (_edit(kind="other"), "something else"),
    ],
)
def test_what_is_not_whole_is_refused_in_one_line(tmp_path, damage, words):
    """Catches training that starts on half of the latents, or fails hours later at a bad shard."""
    path = write(tmp_path / "z")
    damage(path)
    with pytest.raises(UserError, match=words) as caught:
        latents.latents(path)
    assert "\n" not in str(caught.value) and path in str(caught.value)


def test_latents_are_for_training_alone(tmp_path):
    """Catches an evaluation, or an encoding, that takes latents for images."""
    settings = Data(source="latents", path=str(tmp_path))
    for open_source in (
        sources.training_source,
        sources.held_out_source,
        sources.evaluation_source,
        sources.encoding_source,
    ):
        with pytest.raises(UserError, match="has no images"):
            open_source(settings)


def test_an_autoencoder_is_not_trained_on_latents(tmp_path):
    """Catches an autoencoder's run that fails at its first batch, long after it was started."""
    config = _config(str(tmp_path))
    with pytest.raises(UserError, match="data.source='latents' is for diffusion"):
        config_lib.validate(config)
    config.objective = "epsilon"
    config_lib.validate(config)
