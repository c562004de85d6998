# SPDX-License-Identifier: Apache-2.0
"""Where the net's runs happen: command lines in this process, their files, what is read of them."""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import inputs
import numpy as np
from safetensors.numpy import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
# The checkout whose package and configurations run: this one, or that of the record.
ROOT = os.path.abspath(os.environ.get("DCAE_NET_ROOT") or os.path.join(HERE, os.pardir, os.pardir))
CONFIGS = os.path.join(ROOT, "configs")
TIMES = ("_s", "_per_s")  # ends of the metrics that are not results
EVALUATE = {
    "evaluate.resolutions": "(32,)",
    "evaluate.batch_size": 2,
    "evaluate.count": 2,
    "evaluate.grid": 2,
}


def flags(settings: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in settings.items()]


def command(config: str, workdir: str, settings: Mapping[str, Any]) -> list[str]:
    """Arguments of a job: `config` is a file of configs/, with :VARIANT."""
    return [f"--config={os.path.join(CONFIGS, config)}", f"--workdir={workdir}", *flags(settings)]


def run(arguments: list[str]) -> tuple[int, str]:
    """Runs a command line in this process -> (exit status, what it wrote to stderr)."""
    from dcae_jax import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main.main(["main", *arguments])
    return status, said.getvalue()


class Space:
    """A temporary folder; what several cases start from is made there once, when first asked."""

    def __init__(self, root: str):
        self.root = os.path.abspath(root)
        os.makedirs(self.root, exist_ok=True)
        for make in (self.model, self.pictures, self.network, self.latents):
            setattr(self, make.__name__, functools.cache(make))

    def path(self, *names: str) -> str:
        return os.path.join(self.root, *names)

    def job(self, config: str, name: str, settings: Mapping[str, Any]) -> str:
        """Runs a job that must succeed; -> its workdir."""
        workdir = self.path(name)
        status, said = run(command(config, workdir, settings))
        if status != 0:
            raise RuntimeError(f"{name}: status {status}\n{said[-2000:]}")
        return workdir

    def model(self, name: str) -> str:
        """The folder of a model of models.json with its initial weights."""
        return inputs.write_model(self.path("models", name), name)

    def pictures(self, count: int = 12, seed: int = 0) -> str:
        return inputs.write_pictures(self.path(f"pictures{count}-{seed}"), count, seed)

    def network(self, name: str) -> str:
        """A file for loss.lpips_weights ('vgg'), evaluate.lpips_weights or .inception_weights."""
        state = inputs.inception() if name == "inception" else inputs.classifier(name)
        source, out = self.path(f"{name}-torch.safetensors"), self.path(f"{name}.safetensors")
        save_file(state, source)
        arguments = [source, f"--out={out}", "--allow_unknown_checksum"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = _torch_io().main(arguments)
        assert status == 0, f"{name} was not converted"
        return out

    def latents(self) -> str:
        """Latents 2 x 2 x 8 of the pictures by the tiny autoencoder."""
        settings = {
            "init_from": self.model("tiny"),
            "data.source": "folder",
            "data.path": self.pictures(),
            "resolution": 32,
            "encode.batch_size": 4,
        }
        return self.job("encode.py", "latents", settings)

    def export(self, workdir: str, which: str, form: str) -> tuple[dict[str, np.ndarray], str]:
        """(tensors by PyTorch's names, their file) of a run's `which` weights."""
        out = f"{workdir}-{which}"
        settings = {
            "init_from": workdir,
            "weights": which,
            "export.format": form,
            "export.out": out,
        }
        arguments = [f"--config={os.path.join(CONFIGS, 'export.py')}", *flags(settings)]
        status, said = run(arguments)
        if status != 0:
            raise RuntimeError(f"export of {workdir}: status {status}\n{said[-2000:]}")
        (file,) = [name for name in os.listdir(out) if name.endswith(".safetensors")]
        path = os.path.join(out, file)
        return load_file(path), path


def _torch_io() -> ModuleType:
    """The module that converts weights, under its name of today or that of the record."""
    try:
        return importlib.import_module("dcae_jax.pretrained.torch_io")
    except ModuleNotFoundError:
        return importlib.import_module("dcae_jax.torch_io")


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows(workdir: str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl without times."""
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        found = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in found]


def summary(name: str, value: np.ndarray, start: np.ndarray | None = None) -> dict[str, Any]:
    """What is recorded of a tensor: enough to see any change, in a line.

    The four projections are on vectors of random signs, of the change since `start` where there
    is one, over the root of the size: of the order of its rms.
    """
    value = np.asarray(value, np.float64)
    change = value if start is None else value - np.asarray(start, np.float64)
    rng = np.random.RandomState(len(name))
    signs = rng.randint(0, 2, (4, change.size)) * 2.0 - 1
    return {
        "shape": list(value.shape),
        "mean": float(value.mean()),
        "rms": float(np.sqrt(np.mean(value**2))),
        "change": float(np.sqrt(np.mean(change**2))),
        "projections": (signs @ change.reshape(-1) / np.sqrt(change.size)).tolist(),
    }


def tensors(
    values: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """{name: summary}, changes being counted from `start`."""
    values, start = _parts(values), start and _parts(start)
    return {
        name: summary(name, value, start and start[name]) for name, value in sorted(values.items())
    }


def _parts(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the biases of queries, keys and values apart: that of keys moves by rounding alone."""
    parts = {}
    for name, value in values.items():
        if name.endswith("attn.qkv.bias"):
            for part, third in zip("qkv", np.split(np.asarray(value), 3), strict=True):
                parts[f"{name}[{part}]"] = third
        else:
            parts[name] = value
    return parts


def without_paths(text: str, space: Space) -> str:
    """`text` without what differs from one run of the net to the next."""
    text = text.replace(space.root, "SPACE").replace(ROOT, "REPOSITORY")
    # ml_collections quotes a whole traceback; only its end is ours.
    text = re.sub(r"Traceback \(most recent call last\).*\b(\w+Error: )", r"... \1", text)
    # Our own names of parameters may change.
    text = re.sub(r"'(?:encoder|decoder)\.[\w.]+'", "'PATH'", text)
    text = re.sub(r"\((?:[\w.*]+, )+\.\.\.\)", "(NAMES, ...)", text)
    text = re.sub(r"\d+\.\d{9,}", lambda number: f"{float(number[0]):.4g}", text)
    text = re.sub(r"\(Error while deserializing header: .*\);", "(REASON);", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S*", "TIME", text)
    return text.replace(os.path.realpath(sys.prefix), "PYTHON").replace(sys.prefix, "PYTHON")
