# SPDX-License-Identifier: Apache-2.0
"""Published files: found on disk and on the hub, and refused when they are not what they claim."""

import fnmatch
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import ROOT
from support.published_weights import SMALL, hollow_file, random_weights, same, write_folder

from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_torch
from dcae_jax.pretrained import hub

# --- the hub --------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one model needs: its list of files, and the files."""

    folder = ""
    asked: list[str] = []

    def do_HEAD(self):
        self.asked.append(self.path)
        file = os.path.join(self.folder, os.path.basename(self.path))
        if "/resolve/" not in self.path or not os.path.isfile(file):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        with open(file, "rb") as opened:
            data = opened.read()
        self.send_response(200)
        self.send_header("ETag", f'"{len(data):040x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return data

    def do_GET(self):
        if not self.path.startswith("/api/"):
            data = self.do_HEAD() or b""
            self.wfile.write(data)
            return
        self.asked.append(self.path)
        there = [] if "another" in self.path else sorted(os.listdir(self.folder))
        sizes = {name: os.path.getsize(os.path.join(self.folder, name)) for name in there}
        files = [
            {"type": "file", "path": name, "size": size, "oid": f"{size:040x}"}
            for name, size in sizes.items()
        ]
        info = {"id": "mit-han-lab/any", "sha": "0" * 40, "siblings": []}
        body = json.dumps(files if "/tree/" in self.path else info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        del args


@pytest.mark.parametrize("form", ["diffusers", "authors"])
def test_a_hub_name_is_fetched_once_and_then_read_without_network(form, tmp_path, monkeypatch):
    """Catches a second download, a cache of our own, and a traceback or half a minute of retries
    where there is no network."""
    pytest.importorskip("huggingface_hub")
    arch = SMALL["dc-ae-f32c128-1.5"]
    weights = random_weights(arch)
    # A published name stands for a small model.
    monkeypatch.setitem(dcae.VARIANTS, "1.5-f32c128", arch)
    write_folder(tmp_path / "hub" / "", arch, weights, form)
    Hub.folder, Hub.asked = str(tmp_path / "hub"), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys\n"
        "from dcae_jax.checkpoints import weights as checkpoint\n"
        "from dcae_jax.errors import UserError\n"
        "from dcae_jax.models import dcae\n"
        "from support.published_weights import SMALL\n"
        "dcae.VARIANTS['1.5-f32c128'] = SMALL['dc-ae-f32c128-1.5']\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        w, saved = checkpoint.load_weights(line.strip())\n"
        "        print(len(w), float(sum(abs(v).sum() for v in w.values())), flush=True)\n"
        "    except UserError as error:\n"
        "        print(error, flush=True)\n"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "tests")]),
    }
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:

        def load(name):
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        first = load("mit-han-lab/dc-ae-f32c128-1.5-diffusers")
        asked = len(Hub.asked)
        assert load("mit-han-lab/dc-ae-f32c128-1.5-diffusers") == first
        assert len(Hub.asked) == asked
        other = load("mit-han-lab/another")
        wanted = {"diffusers": hub.DIFFUSERS_FILE, "authors": hub.AUTHORS_FILE}[form]
        gets = [path for path in Hub.asked if path.endswith(wanted)]
        server.shutdown()
        server.server_close()
        again = load("mit-han-lab/dc-ae-f32c128-1.5-diffusers")
        start = time.monotonic()
        unreachable = load("mit-han-lab/third")
        waited = time.monotonic() - start
        process.stdin.close()
    total = float(sum(abs(v).sum() for v in weights.values()))
    assert first.split()[0] == str(len(weights)) and float(first.split()[1]) == pytest.approx(total)
    assert gets and again == first
    assert "'mit-han-lab/another': that hub model has no config.json" in other
    assert "the download from the Hugging Face hub failed" in unreachable and waited < 10, waited
    assert (
        tmp_path / "cache" / "hub" / "models--mit-han-lab--dc-ae-f32c128-1.5-diffusers"
    ).exists()


def test_a_download_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """Catches an incomplete snapshot taken for the whole model, and a second request for a complete
    one."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    arch = SMALL["dc-ae-f32c128-1.5"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    os.remove(tmp_path / "hub" / hub.DIFFUSERS_FILE)
    names = sorted(tensors)
    parts = {
        f"{hub.DIFFUSERS_FILE[:-12]}-0000{i}-of-00002.safetensors": names[i::2] for i in (0, 1)
    }
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / "hub" / f"{hub.DIFFUSERS_FILE}.index.json").write_text(json.dumps(index))
    first, second = parts
    save_file({n: tensors[n] for n in parts[first]}, tmp_path / "hub" / first)
    asked = []

    def download(name, *, allow_patterns, local_files_only):
        asked.append(local_files_only)
        if not local_files_only:
            assert any(fnmatch.fnmatch(second, pattern) for pattern in allow_patterns)
            assert not any(fnmatch.fnmatch("unet/" + second, p) for p in allow_patterns)
            save_file({n: tensors[n] for n in parts[second]}, tmp_path / "hub" / second)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    same(weights, checkpoint_weights.load_weights("somebody/something")[0])
    assert asked == [True, False]
    checkpoint_weights.load_weights("somebody/something")
    assert asked == [True, False, True]


def test_half_precision_is_fetched_where_there_is_no_other(tmp_path, monkeypatch):
    """Catches a hub model of half precision that is never found, and twice the bytes of another."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    arch = SMALL["dc-ae-f32c128-1.5"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    os.remove(tmp_path / "hub" / hub.DIFFUSERS_FILE)
    half = "diffusion_pytorch_model.fp16.safetensors"
    asked = []

    def download(name, *, allow_patterns, local_files_only):
        asked.append(any(fnmatch.fnmatch(half, pattern) for pattern in allow_patterns))
        assert not any(fnmatch.fnmatch("unet/" + half, pattern) for pattern in allow_patterns)
        if asked[-1]:
            save_file(tensors, tmp_path / "hub" / half)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    same(weights, checkpoint_weights.load_weights("somebody/something")[0])
    assert asked == [False, False, True]


# --- files that are not what they claim -----------------------------------------------------------


def entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, words",
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "invalid offset for tensor `b`"),
        ({"a": entry(8, 16), "b": entry(8, 16)}, "invalid offset"),
        ({"a": entry(0, 2**40, shape=(2**38,))}, "not fully covered"),
        ({"a": entry(0, 8, shape=(2**62, 4))}, "overflow"),
        ({"a": entry(0, 8, shape=(-1, -2))}, "integer `-1`"),
        ({"a": entry(8, 0)}, "invalid offset"),
        ({"a": entry(0, 8, dtype="F128")}, "unknown variant `F128`"),
        ({"a": entry(0, 8, dtype=["F32"])}, "invalid type: sequence"),
        ({"a": [1]}, "integer `1`"),
        ([1], "invalid type: sequence"),
        (b"{", "EOF while parsing"),
        (2**60, "header too large"),
        (200, "invalid header length"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"", "header too small"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_before_it_is_read(header, words, tmp_path):
    """Catches gigabytes allocated, or the bytes of one tensor taken for another's."""
    body = bytes(16)
    path = tmp_path / "x.safetensors"
    if header in (b"",) or header == b"version https://git-lfs":
        path.write_bytes(header)
    elif isinstance(header, int):
        path.write_bytes(header.to_bytes(8, "little") + body)
    else:
        head = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    with pytest.raises(UserError) as caught:
        checkpoint_weights.load_weights(str(path))
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("name", ["x.safetensors", "x.png", "x.pt"])
@pytest.mark.parametrize(
    "content, words",
    [
        (b"\x89PNG\r\n\x1a\n", "is a PNG image, not weights"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a JPEG image"),
        (b"<!DOCTYPE html>", "is a web page"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(name, content, words, tmp_path):
    """Catches an image that is to be fetched again."""
    if name == "x.pt":
        pytest.importorskip("torch")
    (tmp_path / name).write_bytes(content + bytes(100))
    with pytest.raises(UserError) as caught:
        checkpoint_weights.load_weights(str(tmp_path / name))
    message = str(caught.value)
    assert words in message and "name a .safetensors" in message and "\n" not in message


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz"])
def test_an_archive_is_told_to_have_its_name(name, tmp_path):
    """Catches a traceback for a cut .npz, and a PyTorch file under a wrong name fetched again."""
    np.savez(tmp_path / "whole.npz", a=np.ones(99))
    (tmp_path / name).write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"is a zip archive \(.*must end in .pt\), not weights"):
        checkpoint_weights.load_weights(str(tmp_path / name))


def test_truncated_incomplete_and_wrong_weights_are_told_apart(tmp_path):
    """Catches a model that is half loaded, and an error that does not say what to do."""
    arch = SMALL["dc-ae-f32c32-sana-1.1"]
    tensors = write_folder(tmp_path / "hub", arch, random_weights(arch))
    file = tmp_path / "hub" / hub.DIFFUSERS_FILE
    os.truncate(file, os.path.getsize(file) - 100)
    with pytest.raises(UserError, match="not fully covered.*; fetch it again"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))
    lost = tensors.pop("encoder.conv_out.weight")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"1 missing \(encoder.conv_out.weight\).*incomplete"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))
    save_file({**tensors, "encoder.conv_out.weight": lost[:4]}, file)
    with pytest.raises(UserError, match="1 misshapen"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))
    shapes = dcae_torch.shapes_in(dcae.VARIANTS["f32c32-sana"], "diffusers")
    hollow_file(tmp_path / "x.safetensors", shapes)
    with pytest.raises(UserError, match="these are f32c32-sana weights; load them as"):
        checkpoint_weights.load_weights(str(tmp_path / "x.safetensors"), variant="f32c32")
    hollow_file(tmp_path / "x.safetensors", {"features.weight": (3, 3)})
    with pytest.raises(UserError, match="no variant; set variant="):
        checkpoint_weights.load_weights(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "no weights: neither"),
        ({"config.json": "{"}, "not readable JSON"),
        ({"config.json": "[1]"}, "not a JSON object"),
        ({"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {}}'}, "weight_map"),
        ({"phase1/config.json": "{}", "phase3/config.json": "{}"}, "several phases; choose one: "),
        ({"a.safetensors": "", "b.safetensors": ""}, "several weight files (a.safetensors"),
        ({"model.json": '{"kind": "generator"}'}, "kind='generator'"),
        ({"model.json": '{"kind": "autoencoder"}'}, "incomplete export"),
    ],
)
def test_a_folder_that_holds_no_model_says_what_is_missing(files, words, tmp_path):
    """Catches a KeyError or Orbax's traceback for a folder of something else."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        checkpoint_weights.load_weights(str(tmp_path))
    assert words in str(caught.value) and "\n" not in str(caught.value)
