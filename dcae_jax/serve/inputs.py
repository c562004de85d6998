# SPDX-License-Identifier: Apache-2.0
"""What the commands share: files, read a few at a time; the model; equal sizes in batches.

A window of files is in memory at once, never all. Within a window, images that are padded to the
same size form batches of one fixed size, and the rest goes through one by one: at most two programs
are compiled per size.
"""

import argparse
import contextlib
import dataclasses
import glob
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from dcae_jax import files
from dcae_jax.api import autoencoder, images
from dcae_jax.api.autoencoder import Autoencoder
from dcae_jax.data import transforms
from dcae_jax.errors import UserError
from dcae_jax.models import quantized
from dcae_jax.runtime import process

if TYPE_CHECKING:
    import tqdm

Value = TypeVar("Value")
WINDOW = 64  # files read before their results are written
WINDOW_PIXELS = 2**25  # or so many pixels: a larger image is a window of its own


@dataclasses.dataclass(frozen=True)
class Input:
    """A file, and the name of what is made of it: relative, without extension, unique."""

    path: str
    name: str


def find(given: Sequence[str], extensions: tuple[str, ...]) -> list[Input]:
    """The files that `given` names: files, folders (searched for `extensions`), glob patterns.

    Raises UserError for one that does not exist or holds nothing.
    """
    found: list[Input] = []
    taken: set[str] = set()
    for text in given:
        there = os.path.expanduser(text)
        paths = [there] if os.path.exists(there) else sorted(glob.glob(there, recursive=True))
        paths = paths if len(paths) == 1 else [path for path in paths if os.path.isfile(path)]
        if not paths:
            raise UserError(
                f"{text!r} does not exist; name a file, a folder or a pattern in quotes"
            )
        if os.path.isdir(paths[0]):
            root, names = paths[0], sorted(files.walk(paths[0]))
            names = [name for name in names if name.lower().endswith(extensions)]
            if not names:
                raise UserError(f"{text!r} holds no file of the kinds {' '.join(extensions)}")
            pairs = [(os.path.join(root, name), name) for name in names]
        else:
            pairs = [(path, os.path.basename(path)) for path in paths]
        for path, name in pairs:
            found.append(Input(path, _unique(os.path.splitext(name)[0], taken)))
    return found


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or `name-2`, ... where it is taken: a.png and a.jpg are two inputs."""
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    taken.add(unique)
    return unique


def read_image(path: str) -> np.ndarray:
    """The pixels [H, W, 3] uint8 of an image file. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=transforms.FORMATS) as image:
                return np.asarray(transforms.to_rgb(image))
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is not an image ({', '.join(transforms.FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(f"{path} has more than {most} million pixels; cut it into parts") from None
    except Exception as error:  # Pillow raises many types for a broken file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error


def windows(
    inputs: Sequence[Input], read: Callable[[str], Value], pixels: Callable[[Value], int]
) -> Iterator[list[tuple[Input, Value]]]:
    """Consecutive inputs with their contents, as many as may be in memory at once.

    A bad file among several is reported and left out. Raises UserError for the only input, and at
    the end if any was left out.
    """
    window: list[tuple[Input, Value]] = []
    total = skipped = 0
    with _progress_bar(len(inputs)) as bar:
        for item in inputs:
            try:
                value = read(item.path)
            except UserError as error:
                if len(inputs) == 1:
                    raise
                skipped += 1
                logging.warning("skipped: %s", error)
                bar.update()
                continue
            if window and (total + pixels(value) > WINDOW_PIXELS or len(window) == WINDOW):
                yield window
                bar.update(len(window))
                window, total = [], 0
            window.append((item, value))
            total += pixels(value)
        if window:
            yield window
            bar.update(len(window))
    if skipped:
        raise UserError(f"skipped {skipped} of {len(inputs)} files, named above")


def batches(keys: Sequence[Hashable], most: Callable[[int], int]) -> Iterator[list[int]]:
    """Positions of equal keys, together: batches of most(a position of them), then single ones."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    for rows in groups.values():
        size = max(most(rows[0]), 1)
        full = len(rows) // size * size
        yield from (rows[first : first + size] for first in range(0, full, size))
        yield from ([row] for row in rows[full:])


def batch_size(given: int, height: int, width: int) -> int:
    """`given`, or fewer: a batch has at most images.MOST_PIXELS."""
    return max(min(given, images.MOST_PIXELS // (height * width)), 1)


def _progress_bar(total: int) -> "tqdm.tqdm":
    """On stderr, for several files, if that is a terminal."""
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() and total > 1
    return tqdm(total=total, disable=not shown, unit="file", dynamic_ncols=True)


def say(line: str) -> None:
    """A line on stdout, above the progress bar."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


# --- arguments ------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, what: str = "") -> None:
    """Adds the arguments that say which model to load, and how."""
    text = "a workdir, checkpoint, export, folder, file or hub name"
    parser.add_argument("--model", required=True, help=what or text)
    parser.add_argument("--variant", default="", help="of a bare file: its published name")
    parser.add_argument("--weights", default="ema", choices=("ema", "raw"), help="of a workdir")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how to quantise an autoencoder."""
    parser.add_argument(
        "--quantize", default="", choices=tuple(quantized.FORMS), help="see docs/serve.md"
    )
    parser.add_argument("--calibrate", help="int8, fp8: a folder of images like those to come")


def positive(text: str) -> int:
    """An integer argument, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def load_autoencoder(given: argparse.Namespace) -> Autoencoder:
    """The model that `add_model`'s arguments name. Raises UserError, naming --model."""
    process.choose_platform()
    process.use_compile_cache()
    with naming_the_flag():
        return autoencoder.load_autoencoder(
            given.model,
            given.dtype,
            weights=given.weights,
            variant=given.variant,
            quantize=given.quantize,
            calibrate=given.calibrate,
        )


@contextlib.contextmanager
def naming_the_flag() -> Iterator[None]:
    """Errors about init_from, the key of a configuration, become errors about --model."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("init_from", "--model")
        raise UserError(re.sub(r"\b(quantize|calibrate)\b=?", r"--\1=", text)) from error
