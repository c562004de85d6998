# SPDX-License-Identifier: Apache-2.0
"""Broken, odd and hostile image files: replaced and named, never a crash, a hang or a bomb."""

import io
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from support import data

from dcae_jax import config as config_lib
from dcae_jax.data import pipeline, sources
from dcae_jax.errors import UserError
from dcae_jax.jobs import evaluate

RNG = np.random.default_rng(0)


def _photo(size=(48, 40), form="PNG", **options):
    """The bytes of an image file of noise over a slope."""
    pixels = RNG.integers(0, 64, (size[1], size[0], 3)) + np.linspace(0, 190, size[0])[:, None]
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, format=form, **options)
    return out.getvalue()


def _chunk(name, content):
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def _bomb(side=30_000):
    """A PNG of a megabyte or so that unfolds to side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(side + 1)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _animated(form):
    frames = [Image.fromarray(np.full((40, 48, 3), 40 * i, np.uint8)) for i in range(4)]
    out = io.BytesIO()
    frames[0].save(out, format=form, save_all=True, append_images=frames[1:])
    return out.getvalue()


def _with_exif(content):
    """A JPEG with `content` for its EXIF."""
    photo = _photo(form="JPEG")
    segment = b"Exif\0\0" + content
    return photo[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + photo[2:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
GOOD = {
    "jpeg called.png": lambda: _photo(form="JPEG"),
    "png called.jpg": lambda: _photo(),
    "1x1.png": lambda: _photo((1, 1)),
    "1 wide.png": lambda: _photo((1, 400)),
    "gif.gif": lambda: _animated("GIF"),
    "apng.png": lambda: _animated("PNG"),
    "webp.webp": lambda: _animated("WEBP"),
    "broken icc.png": lambda: _photo(icc_profile=b"\x00\x01no profile"),
    "broken icc.jpg": lambda: _photo(form="JPEG", icc_profile=b"x" * 300),
    "broken exif.jpg": lambda: _with_exif(b"MM\0*\0\0\0\x08\xff\xff" + bytes(40)),
    "exif of nonsense.jpg": lambda: _with_exif(bytes(range(200))),
    "a name with  spaces.png": lambda: _photo(),
    "čeština 写真 🖼.png": lambda: _photo(),
    "new\nline.png": lambda: _photo(),
}
BAD = {
    "zero bytes.png": lambda: b"",
    "truncated.jpg": lambda: _photo(form="JPEG")[:700],
    "truncated.png": lambda: _photo()[:900],
    "text.png": lambda: b"not an image\n" * 9,
    "postscript.png": lambda: EPS,
    "bomb.png": _bomb,
    "sliver.png": lambda: _photo((1, 30_000)),
}


pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")


def _config(path, **changes):
    config = config_lib.default()
    config.batch_size, config.resolution = 4, 64
    config.data.source, config.data.path, config.data.held_out = "folder", str(path), 0.0
    config.data.update(changes)
    return config


def _write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, make in files.items():
        (folder / name).write_bytes(make())


@pytest.mark.parametrize("crop", ["random", "random_resized", "center"])
def test_odd_files_are_read(tmp_path, crop, caplog):
    """Catches good pixels that are thrown away for their name, metadata or size."""
    _write(tmp_path, GOOD)
    config = _config(tmp_path, crop=crop)
    batches = data.batches(config)
    for _ in range(2 * len(GOOD) // 4):
        assert next(batches)["image"].shape == (4, 64, 64, 3)
    assert not caplog.records, caplog.text


def test_broken_files_are_left_out_by_name_in_little_time_and_memory(tmp_path, caplog):
    """Catches a decoder's crash, and a bomb of 900 million pixels that is unpacked first."""
    _write(tmp_path, {**GOOD, **BAD})
    source = sources.folder(str(tmp_path))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    masks = [
        batch["mask"]
        for batch in pipeline.evaluation_batches(source, size=64, batch_size=8, threads=2)
    ]
    assert int(sum(mask.sum() for mask in masks)) == len(source) - len(BAD)
    for name in BAD:
        assert f"left out: {tmp_path / name}" in caplog.text, name
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"{grown} kB"  # the bomb alone would take 900,000
    assert time.monotonic() - began < 120  # it ends; speed is not the question


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    """Catches PostScript in a file called .png, for which Pillow starts Ghostscript."""

    def started(*command, **options):
        raise AssertionError(command)

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(OSError, match="cannot identify"):
        sources.folder(str(tmp_path))[0]


def test_loops_of_links_end_and_linked_folders_are_read_once(tmp_path):
    """Catches an endless walk, and a data set of links that looks empty."""
    outside = tmp_path / "outside"
    _write(outside, {"c.png": _photo})
    root = tmp_path / "root"
    (root / "dogs").mkdir(parents=True)
    (root / "dogs" / "a.png").write_bytes(_photo())
    os.symlink(root, root / "dogs" / "loop")
    os.symlink("self.png", root / "self.png")
    os.symlink(outside, root / "cats")
    os.symlink(outside, root / "more cats")
    source = sources.folder(str(root))
    assert source.files == ("cats/c.png", "dogs/a.png", "self.png")
    assert source.class_names == ("cats", "dogs")
    batches = list(pipeline.evaluation_batches(source, size=32, batch_size=4))
    assert batches[0]["mask"].sum() == 2


def test_one_broken_picture_to_judge_is_a_users_mistake(small, tmp_path):
    """Catches a traceback of Pillow's for the file that was named."""
    (tmp_path / "photo.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="photo.png.* cannot be read"):
        evaluate.read_image(str(tmp_path / "photo.png"))


def _mend(content):
    """A PNG whose chunks have the checksums of what they hold, as far as they can be separated.

    Without it Pillow looks at nothing but the checksum of a chunk that was changed.
    """
    content, at = bytearray(content), 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(content)


def _with_chunks():
    """A PNG with text, metadata and a frame's header behind its pixels."""
    photo = _photo(icc_profile=b"\x00\x01no profile")
    zipped = zlib.compress(b"a word " * 30)
    parts = [
        _chunk(b"tEXt", b"key\0value"),
        _chunk(b"zTXt", b"key\0\0" + zipped),
        _chunk(b"iTXt", b"key\0\1\0en\0key\0" + zipped),
        _chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4)),
        _chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 48, 40, 0, 0, 1, 10, 0, 0)),
    ]
    return photo[:-12] + b"".join(parts) + photo[-12:]


FIELDS = (16, 20, 24, 25, 28)  # of a PNG: where width, height, bits, colours, interlacing stand


def _mutate(content, rng):
    """A damaged copy: bytes changed, cut out, doubled, or the end cut off.

    Half of the PNGs keep their length and right checksums, and most of their damage is in headers.
    """
    content = bytearray(content)
    deep = content[:4] == b"\x89PNG" and bool(rng.integers(2))
    places = [i for i in range(len(content)) if i < 33 or i > len(content) - 300]
    for _ in range(int(rng.integers(1, 3 if deep else 6))):
        if len(content) < 30:
            break
        at = int(
            rng.choice(FIELDS if rng.integers(2) else places)
            if deep
            else rng.integers(len(content))
        )
        kind = rng.integers(2 if deep else 5)
        if kind == 0:
            content[at] = int(rng.integers(256))
        elif kind == 1:
            content[at : at + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1])))
        elif kind == 2:
            del content[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            content[at:at] = content[at : at + int(rng.integers(1, 64))]
        else:
            content = content[: max(at, 20)]
    return _mend(content) if deep else bytes(content)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_neither_crash_nor_hang_the_loader(tmp_path, count, monkeypatch):
    """Catches a decoder whose error is none of Python's, and a file that takes for ever."""
    rng = np.random.default_rng(count)
    originals = [
        _photo(form="JPEG"),
        _photo(form="JPEG", progressive=True, quality=30),
        _photo(form="JPEG", exif=Image.Exif(), icc_profile=bytes(128)),
        _photo(),
        _photo(form="PNG", optimize=True, dpi=(72, 72)),
        _with_exif(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(8)),
        _animated("PNG"),
        _with_chunks(),
    ]
    for i in range(count):
        original = originals[i % len(originals)]
        suffix = "png" if original[:4] == b"\x89PNG" else "jpg"
        (tmp_path / f"{i:05d}.{suffix}").write_bytes(_mutate(original, rng))
    source = sources.folder(str(tmp_path))
    assert len(source) == count
    slowest, read = 0.0, 0
    for batch in pipeline.evaluation_batches(source, size=32, batch_size=50, threads=2):
        began = time.monotonic()
        assert batch["image"].shape == (50, 32, 32, 3)
        read += int(batch["mask"].sum())
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 60
    print(f"{read} of {count} mutated files were still readable")
    assert 0 < read < count
    # In training too they are replaced. That many are an error, which is tested elsewhere.
    monkeypatch.setattr(pipeline, "BAD_AFTER", 10**9)
    monkeypatch.setattr(pipeline, "TRIES", 200)
    config = _config(tmp_path)
    batches = data.batches(config)
    # An epoch. Some files still decode, to black, and now and then a whole batch of them.
    lit = [next(batches)["image"].any() for _ in range(count // 4)]
    assert np.mean(lit) > 0.9
