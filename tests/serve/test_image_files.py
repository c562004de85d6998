# SPDX-License-Identifier: Apache-2.0
"""dcae-jax reconstruct, encode, decode and sample: what they write, and files that are none."""

import io
import os
import re
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import dcae_jax
from dcae_jax import main
from dcae_jax.api import images
from dcae_jax.evaluation import metrics
from dcae_jax.runtime import process
from dcae_jax.serve import inputs

SIZES = {
    "a.png": (32, 32),
    "b.jpg": (37, 20),
    "c.png": (40, 30),
    "d.png": (48, 32),
    "sub/a.png": (5, 7),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of several sizes (width, height), two of which share a name."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        (root / name).parent.mkdir(exist_ok=True)
        levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(levels).save(root / name)
    (root / "notes.md").write_text("not an image")  # of another kind: left out
    return root


@pytest.fixture
def command(alone, autoencoder_export, capsys):
    """Runs a sub-command with --model -> (status, lines on stdout, lines on stderr)."""

    def run(name, *arguments, model=autoencoder_export):
        status = main.main(["dcae-jax", name, *map(str, arguments), f"--model={model}"])
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if not line.startswith("read the export")]
        return status, said.out.splitlines(), errors

    return run


def test_reconstruct_writes_pairs_and_scores_of_real_pixels(
    command, photos, autoencoder_export, tmp_path
):
    """Catches scores of padding, another batch's result beside an image, and a lost name."""
    status, lines, errors = command("reconstruct", photos, f"--out={tmp_path}")
    assert status == process.DONE and not errors and len(lines) == len(SIZES) + 1
    ae = dcae_jax.load_autoencoder(autoencoder_export)
    scores = []
    for line, (name, (width, height)) in zip(lines, sorted(SIZES.items()), strict=False):
        pixels = np.asarray(Image.open(photos / name))
        written = np.asarray(Image.open(tmp_path / f"{os.path.splitext(name)[0]}.png"))
        assert written.shape == (height, 2 * width + 2, 3)
        np.testing.assert_array_equal(written[:, :width], pixels)
        result = written[:, width + 2 :]
        np.testing.assert_allclose(result.astype(int), ae.reconstruct(pixels), atol=1)
        psnr = float(metrics.psnr(pixels[None], result[None])[0])
        h, w = -(-height // 16), -(-width // 16)
        assert f"{name}: {width}x{height}, PSNR {psnr:.2f} dB" in line
        assert f"latent {h}x{w}x8" in line
        scores.append(psnr)
    assert lines[-1].startswith(f"mean of {len(SIZES)} images: PSNR {np.mean(scores):.2f} dB")


def test_patterns_files_and_folders_each_get_a_name_of_their_own(photos):
    """Catches a result that overwrites another's, and a text file of a folder."""
    given = [str(photos / "*.png"), str(photos / "a.png"), str(photos)]
    found = [
        (os.path.relpath(item.path, photos), item.name) for item in inputs.find(given, (".png",))
    ]
    assert found == [
        ("a.png", "a"), ("c.png", "c"), ("d.png", "d"), ("a.png", "a-2"), ("a.png", "a-3"),
        ("c.png", "c-2"), ("d.png", "d-2"), ("sub/a.png", "sub/a"),
    ]  # fmt: skip


def test_equal_sizes_share_a_program_and_few_images_are_in_memory(monkeypatch):
    """Catches a program per remainder, an image that is left out, and all of them in memory."""
    rows = list(inputs.batches(list("aabababaac"), lambda row: 3))
    assert sorted(sum(rows, [])) == list(range(10)) and {len(row) for row in rows} == {1, 3}
    assert inputs.batch_size(8, 512, 512) == 8 and inputs.batch_size(8, 1024, 1024) == 2
    assert inputs.batch_size(8, 9000, 9000) == 1
    given = [inputs.Input(str(i), str(i)) for i in range(1000)]
    held = []

    def read(path):
        held.append(path)
        return path

    windows = []
    for window in inputs.windows(given, read, lambda value: 2**25 if value == "500" else 1):
        assert len(held) - sum(map(len, windows)) <= inputs.WINDOW + 1
        windows.append(window)
    assert sum(windows, []) == [(item, item.path) for item in given]


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_decode_gives_back_what_encode_saw(command, photos, autoencoder_export, tmp_path, form):
    """Catches latents without the image's size, in another order, or scaled."""
    latents, out = tmp_path / "latents", tmp_path / "images"
    status, lines, _ = command("encode", photos, f"--out={latents}", f"--format={form}")
    assert status == process.DONE and len(lines) == len(SIZES)
    status, lines, errors = command("decode", latents, f"--out={out}")
    assert status == process.DONE and len(lines) == len(SIZES) and not errors
    ae = dcae_jax.load_autoencoder(autoencoder_export)
    for name in SIZES:
        stem = os.path.splitext(name)[0]
        pixels, result = (np.asarray(Image.open(p)) for p in (photos / name, out / f"{stem}.png"))
        np.testing.assert_allclose(result.astype(int), ae.reconstruct(pixels), atol=1)
    if form == "npz":
        with np.load(latents / "b.npz") as arrays:  # pickles are refused by default
            z, facts = arrays["latent"], {k: str(arrays[k]) for k in arrays if k != "latent"}
    else:
        with safetensors.safe_open(latents / "b.safetensors", framework="numpy") as opened:
            z, facts = opened.get_tensor("latent"), opened.metadata()
    pixels = images.pad(images.to_float(np.asarray(Image.open(photos / "b.jpg"))), 16)
    np.testing.assert_allclose(z, ae.encode(pixels[None])[0], atol=1e-5)
    assert (facts["height"], facts["width"], facts["compression"]) == ("20", "37", "16")
    assert facts["model"] == autoencoder_export and len(facts["encoder"]) == 64


def _write(path, **change):
    """A file of latents, changed."""
    texts = dict(
        height="20", width="37", compression="16", scaling_factor="", model="m", encoder="e"
    )
    fields = {"latent": np.zeros((2, 3, 8), np.float32)} | {
        k: np.array(v) for k, v in texts.items()
    }
    np.savez(path, **{k: v for k, v in (fields | change).items() if v is not None})


@pytest.mark.slow
def test_latents_of_others_are_refused_in_one_line(command, tmp_path):
    """Catches pickles that run, a traceback, and noise from another encoder's latents."""
    path = tmp_path / "z.npz"
    cases = [
        ({}, "is of another encoder: m"),
        ({"latent": np.zeros((2, 3, 4), np.float32)}, "has latents of f16c4, but --model is f16c8"),
        ({"latent": np.zeros((2, 3), np.float32)}, "[h, w, c] of floats, not float32 [2, 3]"),
        ({"latent": np.full((2, 3, 8), np.nan)}, "not finite"),
        ({"latent": np.array([{}], object)}, "Object arrays cannot be loaded"),
        ({"latent": None}, "it has no"),
        ({"height": np.array("33")}, "[2, 3, 8] latents for 37x33 pixels"),
        ({"height": np.array("tall")}, "invalid literal"),
    ]
    for change, words in cases:
        _write(path, **change)
        status, lines, errors = command("decode", path, f"--out={tmp_path}")
        assert status == process.MISTAKE and not lines
        assert len(errors) == 1 and words in errors[0] and "z.npz" in errors[0], errors
    header = io.BytesIO()
    claim = {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7, 8)}
    np.lib.format.write_array_header_1_0(header, claim)
    _write(tmp_path / "claim.npz")
    with zipfile.ZipFile(tmp_path / "claim.npz") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        for name, data in (parts | {"latent.npy": header.getvalue()}).items():
            archive.writestr(name, data)
    for name in ("text.npz", "text.safetensors", "text.txt"):
        (tmp_path / name).write_bytes(b"hello")
    for name in ("claim.npz", "text.npz", "text.safetensors", "text.txt"):
        status, _, errors = command("decode", tmp_path / name, f"--out={tmp_path}")
        assert status == process.MISTAKE and len(errors) == 1 and "file of latents" in errors[0]


@pytest.fixture
def hostile(tmp_path):
    """Files that are no images, or unusual ones."""
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    Image.fromarray(np.full((9, 8), 65535, np.uint16)).save(tmp_path / "grey16.tiff")
    Image.fromarray(np.full((9, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
    Image.new("RGB", (50, 50), "red").save(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:999])
    return tmp_path


@pytest.mark.parametrize("name", ["reconstruct", "encode"])
@pytest.mark.parametrize(
    "file, words",
    [
        ("missing.png", "does not exist; name a file, a folder or a pattern"),
        ("*.gif", "does not exist"),
        ("notes.txt", "is not an image (JPEG, PNG"),
        ("empty.png", "is not an image"),
        ("cut.bmp", "cut.bmp cannot be read: image file is truncated"),
        ("float.tiff", "floating-point images have no known range"),
        ("nothing", "holds no file of the kinds .jpg"),
    ],
)
def test_what_is_no_image_is_one_line(command, hostile, name, file, words):
    """Catches a traceback, or status 0 with nothing written."""
    status, lines, errors = command(name, hostile / file, f"--out={hostile / 'out'}")
    assert status == process.MISTAKE and not lines
    assert len(errors) == 1 and words in errors[0] and file in errors[0], errors


def test_unusual_images_go_through_and_bad_ones_are_left_out(command, hostile, monkeypatch):
    """Catches one bad file that ends the run, 16 bits clipped to white, and SSIM of one pixel."""
    files = [hostile / name for name in ("one.png", "notes.txt", "grey16.tiff")]
    status, lines, errors = command("reconstruct", *files, f"--out={hostile}", "--alone")
    assert status == process.MISTAKE
    assert len(errors) == 2 and errors[0].startswith("skipped: ") and "notes.txt" in errors[0]
    assert errors[1] == "error: skipped 1 of 3 files, named above"
    assert "one.png: 1x1, PSNR" in lines[0] and "SSIM -," in lines[0] and "latent 1x1x8" in lines[0]
    assert "grey16.tiff: 8x9, PSNR" in lines[1]
    assert Image.open(hostile / "one.png").size == (1, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    status, _, errors = command("encode", hostile / "grey16.tiff", f"--out={hostile}")
    assert status == process.MISTAKE and "more than 0 million pixels; cut it" in errors[0]


def test_mistakes_in_arguments_are_one_line(command, photos, tmp_path):
    """Catches errors that name a configuration key, which these commands have not."""
    cases = [
        (("--multiple=40",), {}, "--multiple=40 is not a multiple of the compression, 16"),
        (("--batch_size=0",), {}, "'0' is not an integer of at least 1"),
        ((), {"model": tmp_path / "none"}, "/none': there is no such file or folder"),
        ((), {"model": photos}, "has no weights"),
    ]
    for more, model, words in cases:
        found = command(
            "reconstruct", photos / "a.png", f"--out={tmp_path / 'out'}", *more, **model
        )
        assert found[0] == process.MISTAKE and len(found[2]) == 1
        assert words in found[2][0] and "init_from" not in found[2][0], found[2]
    (tmp_path / "file").write_text("")
    status, _, errors = command("reconstruct", photos / "a.png", f"--out={tmp_path / 'file'}")
    assert status == process.MISTAKE and "is not a folder" in errors[0]


def test_sample_writes_an_image_per_label(command, generator_run, tmp_path):
    """Catches labels in another order, a batch that changes a sample, and a padded last batch."""
    given = ("--labels=2,0-1", "--count=5", "--steps=2", "--seed=3", "--guidance=2")
    status, lines, _ = command(
        "sample", f"--out={tmp_path}", *given, "--batch_size=2", model=generator_run
    )
    assert status == process.DONE and len(lines) == 5
    labels = [2, 0, 1, 2, 0]
    expected = dcae_jax.load_generator(generator_run).sample(labels, 2.0, 2, 3)
    for number, (label, image) in enumerate(zip(labels, expected, strict=True)):
        written = np.asarray(Image.open(tmp_path / f"{number:04d}-label{label}.png"))
        np.testing.assert_allclose(written.astype(int), image, atol=1)
    assert len(list(tmp_path.glob("*.png"))) == 6 and (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--labels=0,x", "'x' is not a class; write 0,3,7-9"),
        ("--labels=5-2", "'5-2' is not a class"),
        ("--labels=4", "labels=4 is not a class; give 0 to 2, or 3 for unconditional"),
        ("--steps=0", "steps=0 must be at least 1"),
        ("--guidance=nan", "guidance=nan must be finite"),
        ("--sampler=best", "'best'"),
        ("--count=2000000", "--count=2000000 is more than 1000000"),
    ],
)
def test_mistakes_in_sampling_are_one_line(command, generator_run, tmp_path, flag, words):
    """Catches a traceback, or minutes of sampling before it."""
    status, lines, errors = command("sample", f"--out={tmp_path}", flag, model=generator_run)
    assert status == process.MISTAKE and not lines
    assert re.search(re.escape(words), errors[-1]), errors
