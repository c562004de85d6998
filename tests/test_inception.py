# SPDX-License-Identifier: Apache-2.0
"""Inception against torch-fidelity's, and the command that converts the judges' files."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from goldens import judges
from safetensors.numpy import save_file

from dcae_jax.data import transforms
from dcae_jax.models import inception, inception_torch, lpips, lpips_torch
from dcae_jax.pretrained import torch_io

KINDS = inception.PREPROCESSINGS


@functools.cache
def state():
    return judges.inception_state(inception.shapes())


@functools.cache
def weights():
    return inception_torch.from_torch(state())


@functools.partial(jax.jit, static_argnames=("kind", "fc_bias"))
def judge(weights, levels, kind, fc_bias=False):
    return inception.features(weights, inception.preprocess(levels, kind), fc_bias)


def assert_close(found, expected, tolerance=1e-4):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, tolerance, tolerance * np.abs(expected).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_golden_features(kind):
    """Fails on a wrong branch, pooling, BatchNorm eps, padding, resizing or the other input."""
    golden = json.loads(judges.PATH.read_text())
    pool3, logits = judge(weights(), judges.pictures(2, 96), kind)
    assert pool3.shape == (2, 2048) and logits.shape == (2, 1008)
    assert_close(pool3[:, ::64], golden[kind]["pool3"])
    assert_close(logits[:, ::32], golden[kind]["logits"])
    other = golden[KINDS[1 - KINDS.index(kind)]]["pool3"]
    assert np.abs(np.asarray(pool3[:, ::64]) - other).max() > 0.01


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """torch-fidelity's network with the random weights, by way of a file."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: torch.from_numpy(v) for k, v in state().items()}, path)
    return judges.fidelity_inception(path)


def assert_parity(original, levels, kind):
    expected = judges.torch_inception(original, levels, kind)
    pool3, logits = judge(weights(), levels, kind)
    assert_close(pool3, expected[0])
    assert_close(logits, expected[1])
    return expected


@pytest.mark.torch
@pytest.mark.parametrize("size", [96, 299, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_fidelity_live(original, size, kind):
    """Fails if a resizing up, down or by nothing parts from the tool of that name."""
    levels = judges.pictures(1, size, seed=size)
    expected = assert_parity(original, levels, kind)
    if size == 96:
        _, biased = judge(weights(), levels, kind, fc_bias=True)
        assert_close(biased, expected[2])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("size", [96, 299, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_fidelity_on_32_pictures(original, size, kind):
    """Fails if only some pictures agree: 32 of each size."""
    for seed in range(8):
        assert_parity(original, judges.pictures(4, size, seed), kind)


@pytest.mark.torch
def test_preprocessing_equals_torch_interpolate():
    """Fails if half-pixel bilinear has other edges or weights than PyTorch, H and W apart."""
    torch = pytest.importorskip("torch")
    levels = judges.pictures(1, 640)[:, :131, :640]
    x = torch.from_numpy(levels.transpose(0, 3, 1, 2) / np.float32(255))
    x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    expected = (2 * x - 1).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(inception.preprocess(levels, "pytorch-fid"), expected, atol=1e-4)


def test_preprocessings_by_hand():
    """Fails if the scale (255 or 256 steps) or the sampling points of a row are exchanged."""
    levels = np.broadcast_to(np.arange(598.0)[None, :, None, None] / 4, (1, 598, 299, 3))
    row = np.arange(299.0)
    half_pixel = inception.preprocess(levels, "pytorch-fid")[0, :, 0, 0]
    np.testing.assert_allclose(half_pixel, (2 * row + 0.5) / 4 / 127.5 - 1, atol=1e-6)
    corner = inception.preprocess(levels, "torch-fidelity")[0, :, 0, 0]
    np.testing.assert_allclose(corner, (2 * row / 4 - 128) / 128, atol=1e-6)
    same = judges.pictures(1, 299)
    for kind in KINDS:
        np.testing.assert_array_equal(
            inception.preprocess(same, kind), inception.preprocess(same.astype(np.float32), kind)
        )
    found = inception.preprocess(same, "pytorch-fid")
    np.testing.assert_allclose(found, same / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="choose one of pytorch-fid, torch-fidelity"):
        inception.preprocess(same, "clean-fid")
    with pytest.raises(ValueError, match="pass `preprocess` of it"):
        inception.features(weights(), same[:, :96])


def test_features_feed_the_metrics():
    """Fails if pictures in [-1, 1] lose their way through levels, features and moments."""
    x = judges.pictures(2, 96) / np.float32(127.5) - 1
    pool3, _ = judge(weights(), transforms.to_levels(x), "pytorch-fid")
    again, _ = judge(weights(), judges.pictures(2, 96), "pytorch-fid")
    assert_close(pool3, again, 1e-5)


def convert(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dcae_jax.pretrained.torch_io", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def save_pth(path, arrays):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, path)
    return path


def run(capsys, *arguments):
    """The command in this process -> (status, lines of stdout, lines of stderr)."""
    try:
        status = torch_io.main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def test_command_converts_safetensors_without_torch(tmp_path, capsys, monkeypatch):
    """Fails if names, layout or the file's kind are lost between the command and `load`."""
    monkeypatch.setitem(sys.modules, "torch", None)
    source, out = tmp_path / "i.safetensors", tmp_path / "inception.safetensors"
    save_file(state(), source)
    status, lines, _ = run(capsys, source, f"--out={out}", "--allow_unknown_checksum")
    assert status == 0 and torch_io.sha256(source) in lines[0]
    assert lines[-1].startswith(f"wrote {out}: inception-fid")
    loaded = inception_torch.load(out)
    for name, value in weights().items():
        np.testing.assert_array_equal(loaded[name], value)
    with pytest.raises(ValueError, match="'inception-fid', not LPIPS"):
        lpips_torch.load(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.safetensors", out.name]


@pytest.mark.torch
def test_command_converts_pth(tmp_path):
    """Fails if a .pth with its classifier and a second file of linear layers is not taken."""
    features = judges.lpips_state("alex")
    source = save_pth(
        tmp_path / "alexnet.pth", features | {"classifier.6.weight": np.zeros((2, 2), np.float32)}
    )
    linear = {f"{k}.model.1.weight": v for k, v in lpips.linear_layers("alex").items()}
    linear = {k: 2 * v[None, :, None, None] for k, v in linear.items()}
    linear = save_pth(tmp_path / "alex.pth", linear)
    out = tmp_path / "lpips.safetensors"
    done = convert(source, linear, f"--out={out}", "--allow_unknown_checksum")
    assert done.returncode == 0, done.stderr
    expected = lpips_torch.from_torch(features)[1]
    for name, value in lpips_torch.load(out, "alex").items():
        np.testing.assert_array_equal(value, (1 + name.startswith("lin")) * expected[name])


def test_command_knows_the_official_files(tmp_path, capsys, monkeypatch):
    """Fails if a file with the official checksum needs the flag, or another does not."""
    source, out = tmp_path / "a.safetensors", tmp_path / "lpips.safetensors"
    save_file(judges.lpips_state("alex"), source)
    status, _, errors = run(capsys, source, f"--out={out}")
    assert status == 2 and len(errors) == 1 and not out.exists()
    assert "alexnet-owt-7be5be79.pth" in errors[0] and "--allow_unknown_checksum" in errors[0]
    official = {torch_io.sha256(source)[:8]: "official.pth"}
    monkeypatch.setitem(torch_io.CHECKSUMS, "lpips-alex", official)
    out.write_bytes(b"an older file")
    status, lines, _ = run(capsys, source, f"--out={out}")
    assert status == 0 and lines[1] == "this is official.pth, lpips-alex"
    lpips_torch.load(out, "alex")
    with pytest.raises(ValueError, match="'lpips-alex', not the Inception"):
        inception_torch.load(out)


def test_command_refuses_wrong_files(tmp_path, capsys):
    """Fails if a wrong file is converted, or refused with a traceback instead of one line."""
    source, out = tmp_path / "x.safetensors", tmp_path / "o.safetensors"
    alex = judges.lpips_state("alex")
    inception_state = dict(state())
    fc = inception_state.pop("fc.bias")
    wrong = {
        "none of vgg16, alexnet and the Inception": {"encoder.weight": np.zeros(2)},
        "'features.11.weight' is unexpected": alex | {"features.11.weight": np.zeros(2)},
        r"features.10.kernel has shape (3, 3, 9, 256)": alex
        | {"features.10.weight": np.zeros((256, 9, 3, 3))},
        "'fc.bias' is missing": inception_state,
        "torchvision's ImageNet Inception": inception_state
        | {"fc.bias": fc, "AuxLogits.fc.bias": fc},
        "fc.bias has shape (1000,)": inception_state | {"fc.bias": fc[:1000]},
    }
    for message, arrays in wrong.items():
        save_file(arrays, source)
        status, _, errors = run(capsys, source, f"--out={out}", "--allow_unknown_checksum")
        assert (status, len(errors)) == (2, 1) and message in errors[0], (message, errors)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    save_file(alex, source)
    for message, arguments in {
        "no such file": (tmp_path / "absent.pth", f"--out={out}"),
        "not readable safetensors": (tmp_path / "bad.safetensors", f"--out={out}"),
        "must end in .safetensors": (source, f"--out={tmp_path / 'o.npz'}"),
        "create it first": (source, f"--out={tmp_path / 'no' / 'o.safetensors'}"),
        "--out": (source,),
    }.items():
        status, _, errors = run(capsys, *arguments, "--allow_unknown_checksum")
        assert (status, len(errors)) == (2, 1) and message in errors[0], (message, errors)
    assert not out.exists()


def test_pth_without_torch_names_the_extra(tmp_path, capsys, monkeypatch):
    """Fails if a missing PyTorch ends in a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"")
    status, _, errors = run(capsys, tmp_path / "x.pth", f"--out={tmp_path / 'o.safetensors'}")
    assert (status, len(errors)) == (2, 1) and "dcae_jax[torch]" in errors[0]


@pytest.mark.torch
def test_pickles_run_no_code(tmp_path, capsys):
    """Fails if a hostile .pth is unpickled: weights_only must refuse it in one line."""
    torch = pytest.importorskip("torch")
    torch.save({"features.0.weight": Hostile()}, tmp_path / "x.pth")
    status, _, errors = run(capsys, tmp_path / "x.pth", f"--out={tmp_path / 'o.safetensors'}")
    assert (status, len(errors)) == (2, 1) and "not a readable PyTorch file" in errors[0]


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))
