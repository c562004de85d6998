# SPDX-License-Identifier: Apache-2.0
"""Gathers the photographs that `small` is trained on: one file of at most 24 MB.

    python benchmarks/photos.py --out=photos

Needs Debian 12's apt-get and dpkg-deb. photos.csv lists the photographs, sorted by eye from art,
logos and gradients, with author and licence as the package states them. Left out: ukui-wallpapers
(no photograph), tuxpaint-stamps-default (cut-outs, mostly below 512 pixels), opencv-doc (images
of other collections, without their licences), short sides below 512. This writes

    OUT/train/, OUT/held_out/  one image per file: data.path and data.held_out_path
    OUT/photos.tar             both folders, without mtimes and owners
    photos.md, beside this script: sources, authors, licences, sizes

The same packages and the same Pillow give the same bytes. A photograph larger than SHORT_SIDE is
downscaled to it, which also hides the artifacts of the package's own JPEG compression.

Whole photographs are held out: flower and chelsea, which the source `photos` holds out, and those
of Debian whose hashed name is divisible by six. The others of the source `photos` stay in training,
since models trained on that source have seen them.
"""

import argparse
import collections
import csv
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile

from PIL import Image, __version__

from dcae_jax.data.transforms import to_rgb

HERE = os.path.dirname(os.path.abspath(__file__))
SHORT_SIDE = 1024  # pixels
QUALITY = 90  # JPEG
LIMIT = 24_000_000  # bytes of photos.tar


def held_out(photo: dict[str, str]) -> bool:
    """The hold-out rule, fixed before any training."""
    if not _debian(photo["package"]):
        return photo["title"] in ("flower", "chelsea")
    return int(hashlib.sha256(_stem(photo).encode()).hexdigest(), 16) % 6 == 0


def _debian(package: str) -> bool:
    return not package.startswith("scikit-")


def _stem(photo: dict[str, str]) -> str:
    return f"{photo['package']}_{photo['title']}"


def unpack(package: str, debs: str) -> tuple[str, str]:
    """(folder of the package's files, version); downloads what `debs` lacks."""
    if not _debian(package):
        name = {"scikit-image": "skimage", "scikit-learn": "sklearn"}[package]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        return os.path.dirname(os.path.dirname(spec.origin)), importlib.metadata.version(package)
    if not (found := glob.glob(os.path.join(glob.escape(debs), f"{package}_*.deb"))):
        run = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
        subprocess.run(run, cwd=debs, check=True)
        found = glob.glob(os.path.join(glob.escape(debs), f"{package}_*.deb"))
    folder = os.path.join(debs, package)
    if not os.path.isdir(folder):
        subprocess.run(["dpkg-deb", "-x", found[0], f"{folder}.part"], check=True)
        os.rename(f"{folder}.part", folder)
    run = ["dpkg-deb", "-f", found[0], "Version"]
    return folder, subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def read(path: str) -> bytes:
    """A file's bytes; FILE.rcc/MEMBER is a member of a Qt resource file."""
    archive, rcc, member = path.partition(".rcc/")
    with open(archive + ".rcc" if rcc else path, "rb") as file:
        data = file.read()
    return _member(data, member) if rcc else data


def _member(data: bytes, wanted: str) -> bytes:
    """The uncompressed member of a Qt resource file (version 2 or 3) whose path ends so."""
    _, _, tree, contents, names = struct.unpack_from(">4s4I", data)

    def search(node: int, path: str) -> bytes | None:
        name, flags, first, second = struct.unpack_from(">IHII", data, tree + 22 * node)
        if node:
            (length,) = struct.unpack_from(">H", data, names + name)
            text = data[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be")
            path = f"{path}/{text}"
        if flags & 2:  # a folder: `first` children, the first of which is node `second`
            found = (search(child, path) for child in range(second, second + first))
            return next((content for content in found if content is not None), None)
        if not path.endswith("/" + wanted):
            return None
        (length,) = struct.unpack_from(">I", data, contents + second)
        return data[contents + second + 4 : contents + second + 4 + length]

    if (content := search(0, "")) is None:
        raise FileNotFoundError(wanted)
    return content


def reduce(data: bytes, lossless: bool) -> tuple[bytes, str, tuple[int, int]]:
    """(encoded image, file extension, its size in pixels), short side about SHORT_SIDE at most.

    Unchanged if that is not larger, or `lossless`.
    """
    with Image.open(io.BytesIO(data)) as image:
        extension, rgb = image.format.lower().replace("jpeg", "jpg"), to_rgb(image)
    scale = SHORT_SIDE / min(rgb.size)
    if lossless:
        return data, extension, rgb.size
    if scale < 0.9:
        size = (round(rgb.width * scale), round(rgb.height * scale))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=QUALITY, optimize=True)
    if scale >= 0.9 and len(data) <= encoded.tell():
        return data, extension, rgb.size
    return encoded.getvalue(), "jpg", rgb.size


def pack(out: str) -> str:
    """Writes OUT/photos.tar; returns its SHA-256. Exits if it is larger than LIMIT."""
    path = os.path.join(out, "photos.tar")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        names = [*glob.glob("train/*", root_dir=out), *glob.glob("held_out/*", root_dir=out)]
        for name in sorted(names):
            info = tarfile.TarInfo(name)
            info.size = os.path.getsize(os.path.join(out, name))
            with open(os.path.join(out, name), "rb") as file:
                tar.addfile(info, file)
    if os.path.getsize(path) > LIMIT:
        sys.exit(f"{path} has {os.path.getsize(path)} bytes, more than {LIMIT}; lower QUALITY")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--debs", default="", help="folder of .deb files; default OUT/debs")
    given = parser.parse_args()
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        sys.exit(f"{' and '.join(missing)} not found; run this on Debian 12")
    debs = given.debs or os.path.join(given.out, "debs")
    for folder in ("train", "held_out"):
        shutil.rmtree(os.path.join(given.out, folder), ignore_errors=True)
        os.makedirs(os.path.join(given.out, folder))
    os.makedirs(debs, exist_ok=True)

    with open(os.path.join(HERE, "photos.csv"), encoding="utf-8", newline="") as file:
        photos = list(csv.DictReader(file))
    packages = {name: unpack(name, debs) for name in sorted({p["package"] for p in photos})}
    for photo in photos:
        side = "held_out" if held_out(photo) else "train"
        if (photo["held_out"] == "yes") != (side == "held_out"):
            sys.exit(f"photos.csv: held_out of {_stem(photo)} is not what the rule says")
        folder, version = packages[photo["package"]]
        try:
            data = read(os.path.join(folder, photo["file"]))
        except FileNotFoundError:
            sys.exit(f"{photo['package']} {version} has no {photo['file']}; take photos.md's")
        lossless = side == "held_out" and not _debian(photo["package"])
        data, extension, size = reduce(data, lossless)
        photo |= {"side": side, "size": f"{size[0]}x{size[1]}", "bytes": str(len(data))}
        with open(os.path.join(given.out, side, f"{_stem(photo)}.{extension}"), "wb") as file:
            file.write(data)
    digest = pack(given.out)
    with open(os.path.join(HERE, "photos.md"), "w", encoding="utf-8") as file:
        file.write(report(photos, packages, os.path.join(given.out, "photos.tar"), digest))


def report(photos, packages, path: str, digest: str) -> str:
    """photos.md: the contents of the file and their authors."""
    sides = collections.Counter(photo["side"] for photo in photos)
    lines = [
        "# The photographs that `small` is trained on\n",
        f"Written by benchmarks/photos.py: {sides['train']} photographs for training and "
        f"{sides['held_out']} held out, in photos.tar of {os.path.getsize(path):,} bytes, SHA-256 "
        f"`{digest}` (Pillow {__version__}).\n",
        "| package | version | training | held out | licences |",
        "|---|---|---|---|---|",
    ]
    for name, (_, version) in packages.items():
        own = [photo for photo in photos if photo["package"] == name]
        held = sum(photo["side"] == "held_out" for photo in own)
        licences = ", ".join(sorted({photo["licence"] for photo in own}))
        lines.append(f"| {name} | {version} | {len(own) - held} | {held} | {licences} |")
    lines += [
        "\n| photograph | author | licence | pixels | bytes | |",
        "|---|---|---|---|---|---|",
    ]
    for photo in photos:
        note = "held out" if photo["side"] == "held_out" else ""
        values = (_stem(photo), *(photo[key] for key in ("author", "licence", "size", "bytes")))
        lines.append(f"| {' | '.join(values)} | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
