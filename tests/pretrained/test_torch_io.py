# SPDX-License-Identifier: Apache-2.0
"""The command that converts the files of the metric networks."""

import functools
import subprocess
import sys

import numpy as np
import pytest
from goldens import judges
from safetensors.numpy import save_file

from dcae_jax.models import inception, inception_torch, lpips, lpips_torch
from dcae_jax.pretrained import torch_io


@functools.cache
def inception_state():
    return judges.inception_state(inception.shapes())


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
    save_file(inception_state(), source)
    status, lines, _ = run(capsys, source, f"--out={out}", "--allow_unknown_checksum")
    assert status == 0 and torch_io.sha256(source) in lines[0]
    assert lines[-1].startswith(f"wrote {out}: inception-fid")
    loaded = inception_torch.load(out)
    for name, value in inception_torch.from_torch(inception_state()).items():
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
    state = dict(inception_state())
    fc = state.pop("fc.bias")
    wrong = {
        "not vgg16, alexnet or the Inception": {"encoder.weight": np.zeros(2)},
        "'features.11.weight' is unexpected": alex | {"features.11.weight": np.zeros(2)},
        r"features.10.kernel has shape (3, 3, 9, 256)": alex
        | {"features.10.weight": np.zeros((256, 9, 3, 3))},
        "'fc.bias' is missing": state,
        "torchvision's ImageNet Inception": state | {"fc.bias": fc, "AuxLogits.fc.bias": fc},
        "fc.bias has shape (1000,)": state | {"fc.bias": fc[:1000]},
    }
    for message, arrays in wrong.items():
        save_file(arrays, source)
        status, _, errors = run(capsys, source, f"--out={out}", "--allow_unknown_checksum")
        assert (status, len(errors)) == (2, 1) and message in errors[0], (message, errors)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    save_file(alex, source)
    for message, arguments in {
        "no such file": (tmp_path / "absent.pth", f"--out={out}"),
        "not a readable safetensors": (tmp_path / "bad.safetensors", f"--out={out}"),
        "must end in .safetensors": (source, f"--out={tmp_path / 'o.npz'}"),
        "create it first": (source, f"--out={tmp_path / 'no' / 'o.safetensors'}"),
        "--out": (source,),
    }.items():
        status, _, errors = run(capsys, *arguments, "--allow_unknown_checksum")
        assert (status, len(errors)) == (2, 1) and message in errors[0], (message, errors)
    assert not out.exists()


def test_pth_without_torch_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    """Fails if a missing PyTorch ends in a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"")
    status, _, errors = run(capsys, tmp_path / "x.pth", f"--out={tmp_path / 'o.safetensors'}")
    assert (status, len(errors)) == (2, 1) and "; pip install torch, or" in errors[0]


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
