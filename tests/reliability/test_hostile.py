# SPDX-License-Identifier: Apache-2.0
"""Weights from strangers: refused in one line, in little memory, and never run.

tests/pretrained/test_hub.py has the rest: offsets, sizes and shapes of safetensors, pickles.
"""

import contextlib
import importlib.util
import json
import os
import pickle
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dcae_jax import config as config_lib
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.evaluation import samples
from dcae_jax.pretrained import hub, torch_io


def _refused(path, *words):
    """Asserts one line that has `words`, and less than 300 MB more than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        checkpoint_weights.load_weights(str(path))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600, said
    assert all(word in said for word in words), said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def _safetensors(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


DEEP = b"[" * 100_000
HUGE = b"[" + b"[]," * 20_000_000 + b"[]]"


@pytest.mark.parametrize(
    "header, words",
    [
        (b'{"a": ' + DEEP, "recursion limit exceeded"),
        (HUGE, "invalid type: sequence"),
        (b'{"a": {"dtype": "F32", "shape": [1e99], "data_offsets": [0, 8]}}', "`1e+99`"),
        (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}', "JSON"),
        (b'{"a": {"dtype": "F32", "shape": ' + b"9" * 5000 + b"}}", "number out of range"),
        (
            b'{"a": {"dtype": "F32", "shape": [' + b"1," * 40 + b'2], "data_offsets": [0, 8]}}',
            "cov",
        ),
    ],
)
def test_headers_that_unfold(tmp_path, header, words):
    """Catches a RecursionError, and gigabytes of Python lists from a header of megabytes."""
    _safetensors(tmp_path / "x.safetensors", header)
    _refused(tmp_path / "x.safetensors", words)


@pytest.mark.parametrize("content", [DEEP, HUGE, b"\xff\xfe\x00", b'{"a": NaN', b"[1]"])
@pytest.mark.parametrize("name", ["config.json", "model.json"])
def test_json_files_that_unfold(tmp_path, name, content):
    """Catches the same in the small files beside the weights."""
    (tmp_path / name).write_bytes(content)
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    _refused(tmp_path, name, "fetch it again")


def _model(**changes):
    return {"config": {"model": {**config_lib.default().model.to_dict(), **changes}}}


@pytest.mark.parametrize(
    "saved, words",
    [
        ({"config": 3}, "has no model section"),
        ({"config": {"model": [1]}}, "not an object"),
        (_model(name="../../evil"), "not a model file in dcae_jax/models"),
        (_model(name="layers"), "not a model file in dcae_jax/models"),
        (_model(name="os"), "not a model file in dcae_jax/models"),
        (_model(variant=3), "model.variant=3 must have"),
        (_model(widths="wide"), "model.widths"),
        (_model(widths=[10**9] * 6), "model.widths"),
        (_model(encoder_depths=[10**9] * 6), "model.encoder_depths"),
        (_model(latent_channels=10**12), "model.latent_channels"),
        (_model(scaling_factor=float("nan")), "model.scaling_factor"),
        (_model(__class__="x"), "model.__class__ is not a key"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path, saved, words):
    """Catches any import a file asks for, a model of any size, and tracebacks of the library's."""
    from dcae_jax.api import autoencoder as api

    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError) as caught:
        values, loaded = checkpoint_weights.load_weights(str(tmp_path))
        del values
        api.create_autoencoder(loaded.model.variant)
    said = str(caught.value)
    if "models" in words:  # seen where the model is built, which needs weights; not reached here
        with pytest.raises(UserError, match=words):
            from dcae_jax import models

            models.find(ConfigDict(saved["config"]["model"]))
    else:
        assert words in said, said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "x.safetensors.index.json"])
def test_links_out_of_a_folder_are_refused(tmp_path, name):
    """Catches a folder that makes us read, and perhaps send on, files of the user's own."""
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"weight_map": {"a": "b"}}))
    folder = tmp_path / "folder"
    folder.mkdir()
    if name == "config.json":
        save_file({"a": np.zeros(2, np.float32)}, folder / "model.safetensors")
    os.symlink(secret, folder / name)
    _refused(folder, "link out of its folder", str(secret))


def test_the_hubs_own_links_are_followed(tmp_path):
    """Catches the check above refusing the hub's cache, which is made of links."""
    model = tmp_path / "models--a--b"
    (model / "blobs").mkdir(parents=True)
    revision = model / "snapshots" / "0123"
    revision.mkdir(parents=True)
    save_file({"a": np.zeros(2, np.float32)}, model / "blobs" / "77")
    os.symlink("../../blobs/77", revision / "model.safetensors")
    assert hub.read_tensors(str(revision))[1].keys() == {"a"}
    os.symlink(tmp_path, revision / "config.json")
    _refused(revision, "link out of its folder")


def test_shards_that_climb_out_are_looked_for_inside(tmp_path):
    """Catches ../ in the list of a model's files."""
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = {"weight_map": {"a": "../secret.safetensors", "b": "/etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(folder, str(folder), "not a file")


@contextlib.contextmanager
def _at_most(seconds):
    """Fails what hangs, where the test would hang with it."""

    def hung(*_):
        pytest.fail(f"hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pipes_are_not_waited_for(tmp_path, name):
    """Catches a load that hangs for ever on a pipe in the place of a file."""
    os.mkfifo(tmp_path / name)
    if name == "config.json":
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with _at_most(20):
        _refused(tmp_path, name)


def _export(folder):
    folder.mkdir()
    weights = {"w": np.arange(2000.0, dtype=np.float32)}
    checkpoint_weights.save_export(str(folder), weights, {"kind": "autoencoder", "model": {}})
    return folder / "params"


def test_a_manifest_that_points_outside_is_refused(tmp_path):
    """Catches checksums used to read any file, and links in an export."""
    params = _export(tmp_path / "export")
    manifest = json.loads((params / integrity.FILE).read_text())
    manifest["files"]["../../../etc/passwd"] = {"bytes": 1, "crc32": 1}
    (params / integrity.FILE).write_text(json.dumps(manifest))
    _refused(tmp_path / "export", "outside")


def test_an_export_that_claims_more_than_it_has_is_refused(tmp_path):
    """Catches a kilobyte of metadata that makes us allocate terabytes of zeros."""
    params = _export(tmp_path / "export")
    (params / integrity.FILE).unlink()
    spec = json.dumps({"driver": "file", "path": str(params) + "/"})
    code = (
        "import json, sys, tensorstore as ts\n"
        f"kv = ts.KvStore.open({{'driver': 'ocdbt', 'base': {spec}}}).result()\n"
        "for key in kv.list().result():\n"
        "    if key.endswith(b'.zarray'):\n"
        "        meta = json.loads(kv[key]); meta['shape'] = [2**40]\n"
        "        kv[key] = json.dumps(meta).encode()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    _refused(tmp_path / "export")


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"{}", b'{"a": 1', DEEP, b'{"tree_metadata": 3}']
)
def test_orbax_metadata_of_nonsense(tmp_path, content):
    """Catches Orbax's traceback for an export with other files in it."""
    params = _export(tmp_path / "export")
    (params / integrity.FILE).unlink()
    (params / "_METADATA").write_bytes(content)
    _refused(tmp_path / "export", "not a readable checkpoint")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.ckpt", "x.safetensors", "x.npz"])
def test_no_pickle_is_run_whatever_it_is_called(tmp_path, name):
    """Catches code in a file of weights, or of statistics, that runs when it is opened."""
    ran, path, safe = tmp_path / "ran", tmp_path / name, name.endswith("safetensors")
    torch = importlib.util.find_spec("torch")
    said = "not a readable PyTorch file" if torch else "needs PyTorch"
    if name == "x.npz":
        array = np.array([Hostile(str(ran))], dtype=object)
        np.savez(path, mu=array, sigma=array)
        with pytest.raises(UserError, match="cannot be read"):
            samples._given_moments(str(path), {})
    else:
        path.write_bytes(pickle.dumps({"a": Hostile(str(ran))}))
        _refused(path)
        with pytest.raises(UserError, match="not a readable safetensors" if safe else said):
            torch_io.read_state_dict(path)
    assert not ran.exists()
