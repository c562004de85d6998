# SPDX-License-Identifier: Apache-2.0
"""What the record says in words and numbers that were changed on purpose since.

The record itself is never edited for these. An entry that no recorded message has is an error.
"""

import copy
import json
from typing import Any

WORDS = (
    # Modules and files moved.
    ("dcae_jax/config.py", "dcae_jax/config/schema.py"),
    # Sub-commands of the one command line.
    ("python -m dcae_jax.torch_io", "dcae-jax convert"),
    # More variants.
    (" tiny, f32c32, f64c128", " tiny, tiny-1.5, tiny-lite, small, small-lite, f32c32, f64c128"),
    (
        "dc-ae-f32c128-1.5, dc-ae-f64c128-1.5",
        "dc-ae-f32c128-1.5, dc-ae-f64c128-1.5, dc-ae-1.5-f32c128, dc-ae-1.5-f64c128, "
        "dc-ae-f32c128-1.1",
    ),
    ("make it with dcae_jax.torch_io", "make it with `dcae-jax convert`"),
    # The key `phase` is gone: what starts from weights says so itself.
    ("and phase 1 starts from weights", "but this configuration starts from weights"),
    ("and phase 2 starts from weights", "but this configuration starts from weights"),
    ("and phase 3 starts from weights", "but this configuration starts from weights"),
    # Every key has its choices and bounds in one place, which are checked before what it needs.
    (
        "data.source='photos': objective='guess' learns latents; run configs/encode.py, then set "
        "data.source=latents and data.path to its workdir",
        "objective='guess' is not known; choose one of , epsilon, learned_sigma, flow, meanflow",
    ),
    (
        "mesh (data=-2, fsdp=1, tensor=1, spatial=1): sizes must be positive, and one at most may "
        "be -1",
        "mesh.data=-2 must be in [-1, 2147483647]",
    ),
    # A section's keys stand in its own order, no longer in the alphabet's.
    (
        "{'data': -1, 'fsdp': 1, 'spatial': 2, 'tensor': 1}",
        "{'data': -1, 'fsdp': 1, 'tensor': 1, 'spatial': 2}",
    ),
    # Messages in the field's words.
    ("is no file of dcae_jax/models with a model", "is not a model file in dcae_jax/models"),
    ("; leave 0", "; leave it at 0"),
    ("gan_layers=4 needs pictures of", "gan_layers=4 needs images of"),
    ("_weights='/none' is no file;", "_weights='/none' is not a file;"),
    ("must be as encoder_block_out_channels", "must be as long as encoder_block_out_channels"),
    ("these are the weights of no variant known here", "these weights match no known variant"),
    ("is none of whole numbers in", "must be an int in"),
    ("is no text; write ('...',)", "must be a non-empty string, as in ('...',)"),
    ("is no pair (path pattern, rule)", "must be a pair (path pattern, rule)"),
    ("is too large; the most is", "is too large; it must be at most"),
    ("is no multiple of the model's f", "is not a multiple of the model's f"),
    ("has no images; name those with data.source", "has no images; set data.source"),
    ("name its workdir with --config.init_from", "set --config.init_from to its workdir"),
    ("and one at most may be -1", "and at most one may be -1"),
    ("' learns latents;", "' trains on latents;"),
    (
        "() names no size to evaluate training at; give evaluate",
        "() is empty, but training needs a size to evaluate at; set evaluate",
    ),
    ("is no VARIANT", "is not a VARIANT"),
    ("is no flag;", "is not a flag;"),
    ("is no readable JSON", "is not readable JSON"),
    ("json is no JSON object;", "json is not a JSON object;"),
    ("is no readable safetensors", "is not a readable safetensors file"),
    ("that are those of neither a UViT", "that match neither a UViT"),
    (
        "that are those of no variant; name it with variant=, one of",
        "that match no variant; set variant= to one of",
    ),
    (
        "plan.config is empty; name the file of a job, as in configs",
        "plan.config is empty; set it to a job's config file, e.g. configs",
    ),
    (
        "is of the job evaluate, which has nothing to plan",
        "is for the job evaluate; plan a train or a sample job",
    ),
    (
        "plan.generator is empty; name the file of the job that trains the model, as in",
        "plan.generator is empty; set it to the config file that trains the model, e.g.",
    ),
    (
        "trains no diffusion model; name a file that does, as",
        "does not train a diffusion model; use a file that does, e.g.",
    ),
    (
        "sharding has ('.*', 'sideways'); give (path pattern, rule) with a rule of fsdp",
        "sharding: ('.*', 'sideways') must be (path pattern, rule), with one of the rules fsdp",
    ),
    ("is there and not empty; name", "exists and is not empty; name"),
    (
        "is of the job evaluate; leave it empty in the job train, and use configs/evaluate.py",
        "is for the job evaluate (configs/evaluate.py); leave it empty in the job train",
    ),
    # Two sources more.
    (
        "photos, folder, tfds, mixture, latents",
        "photos, folder, huggingface, webdataset, tfds, mixture, latents",
    ),
    ("'photos', 'folder' or 'tfds'", "'photos', 'folder', 'huggingface', 'webdataset' or 'tfds'"),
    ("=folder, tfds, photos or mix", "=folder, huggingface, webdataset, tfds, photos or mix"),
)
# safetensors are read by the library of that name, whose reasons are its own: REASON.
REASONS = (
    (
        "SPACE/empty.safetensors cannot be read (cannot mmap an empty file); check the path",
        "SPACE/empty.safetensors is not a readable safetensors file (REASON); fetch it again",
    ),
    (": only 3 bytes;", " (REASON);"),
    (": its header claims 1000000000 bytes;", " (REASON);"),
    (": its header of 100 bytes is cut off at 10;", " (REASON);"),
    (": its header is no JSON;", " (REASON);"),
    (": its header is no JSON object;", " (REASON);"),
    (": a has shape [1e+99];", " (REASON);"),
    (": a of shape [3] takes 12 bytes, not [0, 8];", " (REASON);"),
    (": a ends at byte 1200 of 16: cut off;", " (REASON);"),
    (": a has dtype 'F7';", " (REASON);"),
    (": a and b overlap;", " (REASON);"),
)
# Numbers, {case: {path in its result: now}}; a row is found by its step.
#
# Images are spread over the source where evaluate.count is less than there is, and parts of a
# mixture have orders of their own. These numbers are those of the recorded code (commit e9d9a46)
# with two changes: `spread` in its evaluation_batches, and the seed of a part in _record_order.
NUMBERS: dict[str, dict[tuple[str | int, ...], Any]] = {
    "train phase1": {
        ("rows", 20, "psnr_32"): 11.4776821,
        ("rows", 20, "ssim_32"): 0.0271320678,
    },
    "train lpips": {
        ("rows", 4, "psnr_32"): 9.51811218,
        ("rows", 4, "ssim_32"): 0.0100839138,
    },
    "train phase2": {
        ("rows", 20, "psnr_32"): 8.72810364,
        ("rows", 20, "ssim_32"): 0.00949336961,
    },
    "train phase3": {
        ("rows", 20, "psnr_32"): 9.03792572,
        ("rows", 20, "ssim_32"): 0.00738646556,
    },
    "train gan": {
        ("rows", 20, "psnr_32"): 9.03017044,
        ("rows", 20, "ssim_32"): 0.00746463146,
    },
    "train accumulated": {
        ("rows", 6, "psnr_32"): 10.2434721,
        ("rows", 6, "ssim_32"): 0.0175474659,
    },
    "train decay": {
        ("rows", 4, "psnr_32"): 9.71029186,
        ("rows", 4, "ssim_32"): 0.0112365857,
    },
    "train finetune": {
        ("rows", 0, "psnr_32"): 8.54343033,
        ("rows", 0, "psnr_48"): 8.42566872,
        ("rows", 0, "ssim_32"): 0.00908944197,
        ("rows", 0, "ssim_48"): 0.00587541843,
        ("rows", 6, "psnr_32"): 9.19233036,
        ("rows", 6, "psnr_48"): 8.95759392,
        ("rows", 6, "ssim_32"): 0.00838485174,
        ("rows", 6, "ssim_48"): 0.00809748191,
    },
    "batches of a folder, centred": {
        ("rows", 6, "psnr_32"): 8.05365944,
        ("rows", 6, "ssim_32"): 0.010300912,
    },
    "batches of a mixture": {
        ("rows", 4, "grad_norm"): 0.722437441,
        ("rows", 4, "l1"): 0.696361005,
        ("rows", 4, "loss"): 0.696361005,
        ("rows", 4, "psnr"): 8.18054581,
        ("rows", 6, "grad_norm"): 0.858660758,
        ("rows", 6, "l1"): 0.713103533,
        ("rows", 6, "loss"): 0.713103533,
        ("rows", 6, "psnr"): 7.99196863,
        ("rows", 6, "psnr_32"): 8.51643562,
        ("rows", 6, "ssim_32"): 0.0117488988,
    },
    "scores of reconstructions": {
        ("values", "32", "lpips"): 0.151424468,
        ("values", "32", "psnr"): 8.39255969,
        ("values", "32", "rfid"): 6906.89882,
        ("values", "32", "ssim"): 0.0107124504,
    },
    "batches of tfds": {
        ("rows", 6, "psnr_32"): 8.25873375,
        ("rows", 6, "ssim_32"): 0.00677174237,
    },
    "recipes": {
        # The scale of the paper for 2B, which the documentation had all along.
        ("recipes", "usit.py:2b", "sample.guidance"): 1.15,
        # The job reads the variant now.
        ("recipes", "evaluate.py:", "model.variant"): "",
    },
}


# A scalar, as in PyTorch and in published files; exports had [1].
COUNTER = ".num_batches_tracked"


def today(name: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded case `name` in the words and numbers of today."""
    now = copy.deepcopy(recorded)
    for path, value in NUMBERS.get(name, {}).items():
        entry, key = _at(now, path)
        entry[key] = value
    for tensors in now.get("tensors", {}).values():
        for tensor, found in tensors.items():
            if tensor.endswith(COUNTER):
                found["shape"] = []
    return {**now, "exact": _words(now["exact"])} if "exact" in now else now


def _at(result: dict[str, Any], path: tuple[str | int, ...]) -> tuple[Any, Any]:
    """(the dict that holds the number at `path`, its key there)."""
    *parents, key = path
    for name in parents:
        if isinstance(result, list):
            result = next(row for row in result if row["step"] == name)
        else:
            result = result[name]
    return result, key


def _words(tree: Any) -> Any:
    if isinstance(tree, str):
        for then, now in (*WORDS, *REASONS):
            tree = tree.replace(then, now)
        return tree
    if isinstance(tree, dict):
        return {key: _words(value) for key, value in tree.items()}
    return [_words(value) for value in tree] if isinstance(tree, list) else tree


def unused(record: dict[str, Any]) -> list[str]:
    """Entries that change nothing in the record."""
    text = json.dumps([result.get("exact") for result in record.values()])
    words = [then for then, _ in (*WORDS, *REASONS) if json.dumps(then)[1:-1] not in text]
    return words + [
        f"{name}: {path}"
        for name, paths in NUMBERS.items()
        for path, value in paths.items()
        for entry, key in [_at(record[name], path)]
        if entry.get(key) == value
    ]
