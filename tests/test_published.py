# SPDX-License-Identifier: Apache-2.0
"""Weights that others published: every kind of path, and files that are not what they claim."""

import dataclasses
import fnmatch
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.published_weights import KL, SMALL, hollow_file, random_weights, same, write_folder

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dcae_torch, sdvae, sdvae_torch
from dcae_jax.models.weights import abstract, split
from dcae_jax.pretrained import hub, published
from dcae_jax.training import state as state_lib

# --- every kind of path ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "kl"])
def test_a_folder_of_diffusers_gives_weights_and_model(name, tmp_path, one_device):
    """Catches a scaling factor lost, a model built with other blocks, a tensor misplaced."""
    arch = KL if name == "kl" else SMALL[name]
    weights = random_weights(arch)
    write_folder(tmp_path / "hub", arch, weights)
    ae = dcae_jax.load_autoencoder(str(tmp_path / "hub"), mesh=one_device)
    same(weights, ae.weights)
    assert ae.architecture == arch
    assert ae.scaling_factor == arch.scaling_factor
    assert ae.model_config.name == ("sdvae" if name == "kl" else "dcae")
    # A pipeline has its autoencoder in a folder of its own.
    (tmp_path / "pipeline").mkdir()
    os.rename(tmp_path / "hub", tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    same(weights, checkpoint_weights.load_weights(str(tmp_path / "pipeline"))[0])


def test_stable_diffusions_posterior_is_sampled_by_seed(tmp_path, one_device):
    """Catches a seed that is ignored, and a sample where the mean was asked for."""
    write_folder(tmp_path / "hub", KL, random_weights(KL))
    ae = dcae_jax.load_autoencoder(str(tmp_path / "hub"), mesh=one_device)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    mean, one, again, other = (
        np.asarray(ae.encode(x, **options))
        for options in (
            {},
            {"sample": True, "seed": 1},
            {"sample": True, "seed": 1},
            {"sample": True, "seed": 2},
        )
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1 and np.abs(one - mean).max() > 0.1
    with pytest.raises(ValueError, match="does not go with tiles"):
        ae.encode(x, sample=True, tile=1)
    tiny = dcae_jax.create_autoencoder("tiny", mesh=one_device)
    with pytest.raises(ValueError, match="deterministic encoder"):
        tiny.encode(x, sample=True)


def test_a_folder_of_the_authors_has_its_model_by_name(tmp_path):
    """Catches names of the authors that only diffusers' folders are read for."""
    name = "dc-ae-f64c128-in-1.0"
    (tmp_path / "config.json").write_text(json.dumps({"model_name": name}))
    shapes = dcae_torch.shapes_in(dcae.variant(name), "authors")
    hollow_file(tmp_path / "model.safetensors", shapes)
    weights, saved = checkpoint_weights.load_weights(str(tmp_path))
    assert saved.model.variant == name
    assert sum(value.size for value in weights.values()) > 600e6


@pytest.mark.parametrize(
    "variant, given, scaling",
    [
        ("f32c32-sana", "", 0.41407),
        ("f32c32", "", None),
        ("f32c32", "dc-ae-f32c32-in-1.0", 0.3189),
        ("sd-vae-f8", "", 0.18215),
    ],
)
def test_a_bare_file_tells_its_variant_but_not_its_scaling_factor(
    variant, given, scaling, tmp_path
):
    """Catches a file that needs a config.json, and a scaling factor that was made up."""
    if variant == "sd-vae-f8":
        random = random_weights(sdvae.VARIANTS[variant])
        save_file(
            {
                k: np.ascontiguousarray(v)
                for k, v in sdvae_torch.to_torch(random, sdvae.Variant(), "diffusers").items()
            },
            tmp_path / "x.safetensors",
        )
    else:
        shapes = dcae_torch.shapes_in(dcae.VARIANTS[variant], "authors")
        hollow_file(tmp_path / "x.safetensors", shapes)
    _, saved = checkpoint_weights.load_weights(str(tmp_path / "x.safetensors"), variant=given)
    module = sdvae if variant == "sd-vae-f8" else dcae
    assert saved.model.variant == (given or variant)
    assert module.architecture(saved.model).scaling_factor == scaling


def test_fine_tuned_weights_carry_their_own_scaling_factor(tmp_path):
    """Catches the factor of the variant in place of the one in config.json."""
    arch = dataclasses.replace(SMALL["dc-ae-f32c32-sana-1.1"], scaling_factor=0.7)
    write_folder(tmp_path / "hub", arch, random_weights(arch))
    _, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    assert saved.model.scaling_factor == 0.7
    assert dcae.architecture(saved.model) == arch


def test_half_precision_and_shards_are_read(tmp_path):
    """Catches bfloat16 read as integers, and the first of several files taken for all."""
    arch = SMALL["dc-ae-f32c32-sana-1.1"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    os.remove(tmp_path / "hub" / hub.DIFFUSERS_FILE)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        half = {n: tensors[n].astype(ml_dtypes.bfloat16) for n in part}
        save_file(half, tmp_path / "hub" / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / "hub" / f"{hub.DIFFUSERS_FILE}.index.json").write_text(json.dumps(index))
    read, _ = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    want = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in weights.items()}
    same(want, read)


def test_a_mistyped_local_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    """Catches half a minute of retries, and a private name sent out, for a typing mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(hub, "fetch", lambda name: pytest.fail(f"looked up {name}"))
    with pytest.raises(UserError, match="'runs/phase9': there is no such file or folder"):
        checkpoint_weights.load_weights("runs/phase9")


def test_training_starts_from_published_weights(small, one_device, tmp_path):
    """Catches init_from that reads only workdirs, or weights of the mapped file in the state."""
    arch = dcae.architecture(small.model)
    weights = random_weights(arch)
    write_folder(tmp_path / "hub", arch, weights)
    read, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"), "ema")
    assert saved.model.variant == "tiny"
    spec = state_lib.train_spec(small, one_device)
    start = state_lib.init_state(small, one_device, spec, read)
    same(weights, {**start.params, **start.stats})


@pytest.mark.torch
def test_a_pickle_of_weights_is_read_and_code_in_it_is_not_run(tmp_path):
    """Catches .pt files opened as any pickle, and a state dict nested as trainers nest it."""
    torch = pytest.importorskip("torch")
    arch = SMALL["dc-ae-lite-f32c32-sana-1.1"]
    weights = random_weights(arch)
    tensors = write_folder(tmp_path / "hub", arch, weights)
    plain = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    os.remove(tmp_path / "hub" / hub.DIFFUSERS_FILE)
    for content in (plain, {"state_dict": plain}):
        torch.save(content, tmp_path / "hub" / "weights.pt")
        same(weights, checkpoint_weights.load_weights(str(tmp_path / "hub"))[0])

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Hostile()}, tmp_path / "hub" / "weights.pt")
    with pytest.raises(UserError, match="weights.pt is not a readable PyTorch file"):
        checkpoint_weights.load_weights(str(tmp_path / "hub"))
    assert not (tmp_path / "ran").exists()


# --- the hub --------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one model needs: what it has, and its files."""

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


def test_a_hub_name_is_fetched_once_and_then_read_without_network(tmp_path):
    """Catches a second download, a cache of our own, and a traceback where there is no network, or
    half a minute of retries before it is told."""
    pytest.importorskip("huggingface_hub")
    arch = SMALL["dc-ae-f32c128-1.5"]
    weights = random_weights(arch)
    write_folder(tmp_path / "hub" / "", arch, weights)
    Hub.folder, Hub.asked = str(tmp_path / "hub"), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys\nfrom dcae_jax.checkpoints import weights as checkpoint\nfrom dcae_jax.errors import UserError\n"
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
        gets = [path for path in Hub.asked if path.endswith(hub.DIFFUSERS_FILE)]
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
    assert "the Hugging Face hub does not give it" in unreachable and waited < 10, waited
    assert (
        tmp_path / "cache" / "hub" / "models--mit-han-lab--dc-ae-f32c128-1.5-diffusers"
    ).exists()


def test_a_download_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """Catches a snapshot with some of its shards taken for the whole model, and a second request
    for one that is whole."""
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
    with pytest.raises(UserError, match="no variant; name it with variant="):
        checkpoint_weights.load_weights(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "no weights: neither"),
        ({"config.json": "{"}, "no readable JSON"),
        ({"config.json": "[1]"}, "no JSON object"),
        ({"a.safetensors": "", "b.safetensors": ""}, "several files of weights (a.safetensors"),
        ({"model.json": '{"kind": "generator"}'}, "kind='generator'"),
        ({"model.json": '{"kind": "autoencoder"}'}, "incomplete export"),
    ],
)
def test_a_folder_that_holds_no_model_says_what_is_missing(files, words, tmp_path):
    """Catches a KeyError or Orbax's traceback for a folder of something else."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        checkpoint_weights.load_weights(str(tmp_path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- full size ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "authors"])
@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.1"])
def test_full_size_weights_travel_there_and_back_bit_for_bit(name, form, tmp_path):
    """Catches a square kernel turned one way only, and two tensors under one name, in the depths
    and widths that are published; both give no error, since all shapes are right."""
    arch = dcae.variant(name)
    module = abstract(
        lambda rngs: dcae.DCAE(arch, depthwise="grouped", dtype=np.float32, rngs=rngs)
    )
    _, params, stats = split(module)
    rng = np.random.default_rng(0)
    weights = {
        path: rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in {**params, **stats}.items()
    }
    write_folder(tmp_path / "hub", arch, weights, form)
    read, saved = checkpoint_weights.load_weights(str(tmp_path / "hub"))
    assert saved.model.variant in (name, "f32c32", "f32c32-sana")
    same(weights, read)
    shutil.rmtree(tmp_path / "hub")  # 1.3 GB, which pytest would keep


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import jax, dcae_jax, orbax.checkpoint
from dcae_jax import config as config_lib
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
jax.numpy.zeros(3).block_until_ready()
peak = start = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
ae = dcae_jax.load_autoencoder(sys.argv[1])
jax.block_until_ready(ae.weights)
done = True
thread.join()
size = sum(4 * v.size for v in ae.weights.values())
print(size, peak - start)
"""


def peak_of(path):
    """(bytes of the float32 weights, peak of anonymous memory while they are loaded)."""
    env = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusers", "bfloat16", "orbax"])
def test_loading_takes_little_more_memory_than_the_weights(kind, tmp_path):
    """Catches weights that are in memory twice: as read, and as placed.

    And, of Orbax, blocks that its threads have freed and the C library keeps.
    """
    arch = dataclasses.replace(dcae.VARIANTS["f32c32-sana"], widths=(96, 192, 384, 384, 768, 768))
    weights = random_weights(arch)
    assert sum(v.nbytes for v in weights.values()) > 600e6
    if kind == "orbax":
        (tmp_path / "hub").mkdir()
        meta = {"kind": "autoencoder", "model": config_lib.to_json(published.model_settings(arch))}
        checkpoint_weights.save_export(str(tmp_path / "hub"), weights, meta)
    else:
        tensors = write_folder(tmp_path / "hub", arch, weights)
        if kind == "bfloat16":
            half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
            save_file(half, tmp_path / "hub" / hub.DIFFUSERS_FILE)
    del weights
    size, peak = peak_of(tmp_path / "hub")
    logging.info("%s: %.0f MB of weights, peak %.2f times", kind, size / 1e6, peak / size)
    assert peak <= 1.3 * size, peak / size
