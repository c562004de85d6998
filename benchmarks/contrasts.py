# SPDX-License-Identifier: Apache-2.0
"""The paper's three claims about training, each with both arms, on `small`.

    python benchmarks/contrasts.py --photos=photos residual
    python benchmarks/contrasts.py --photos=photos --run=runs/small adaptation
    python benchmarks/contrasts.py --photos=photos --run=runs/small gan

`residual` trains phase 1 with and without the shortcuts at f64 and f32 with AdamW, at f64 also with
Muon, as in configs/phase1.py, all at half of `small`'s widths. `adaptation` compares phase 2 of
the chain in --run with no phase 2 and with training everything in it; `gan`, phase 3 of that chain
with the GAN on the whole decoder. Arms of a contrast have the same steps, data and seed. Writes
WORKDIR/PART.json and .svg, and goes on where it was stopped. What came out: docs/results.md.
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Mapping
from typing import Any

import common
import small
from matplotlib.figure import Figure

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax import files
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.schema import Evaluate
from dcae_jax.data import sources
from dcae_jax.demo import shipped
from dcae_jax.jobs import train
from dcae_jax.models import dcae
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import process
from dcae_jax.setup import run as setup

# At half of small's widths, six arms take half an hour.
F32 = dataclasses.replace(dcae.VARIANTS["small"], widths=(16, 32, 32, 64, 64, 128))
# One more stage, and the paper's latent of four times the channels.
F64 = dataclasses.replace(
    F32,
    latent_channels=128,
    **{
        field: getattr(F32, field) + getattr(F32, field)[-1:]
        for field in ("widths", "encoder_depths", "decoder_depths")
        + ("encoder_blocks", "decoder_blocks", "decoder_norms")
    },
)
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"muon": (), "learning_rate": 4e-4},  # the paper's optimizer
    "Muon": {},  # as in configs/phase1.py
}
ARMS = ((64, "AdamW"), (32, "AdamW"), (64, "Muon"))
WIDE = (256, 512, 1024)  # pixels


def config(file: str, photos: str, **changes: Any) -> config_lib.Config:
    path = os.path.join(config_lib.SHIPPED, file)
    data = {
        "path": os.path.join(photos, "train"),
        "held_out_path": os.path.join(photos, "held_out"),
    }
    given = config_lib.validate(config_lib.load_file(path, "small"))
    return config_lib.replace(given, data=data, **changes)


def arm(run: config_lib.Config, folder: str) -> list[dict[str, Any]]:
    """The rows of a training run, resumed or made."""
    assert train.run(run, folder) == train.DONE
    return files.read_rows(folder)


def cost(run: config_lib.Config, folder: str) -> dict[str, float]:
    """Mean seconds per step, without the first row's, and GB that the largest step's program needs
    beside its weights, as XLA states it."""
    steps = [row["step_s"] for row in files.read_rows(folder) if "step_s" in row][1:]
    built = setup.build(run, folder, mesh_lib.make_mesh(run.mesh), None)
    traced = setup.trace_steps(built)
    memory = traced[max(traced)].lower().compile().memory_analysis()
    return {
        "step_s": statistics.mean(steps),
        "activations_gb": memory.temp_size_in_bytes / 1e9,
    }


def scores(model: str, photos: str, sizes: tuple[int, ...], crops: int) -> dict[str, float]:
    """PSNR, SSIM and spectrum of a model on crops of the held-out photographs."""
    held_out = sources.folder(os.path.join(photos, "held_out"))
    settings = Evaluate(resolutions=sizes, crops=crops, count=0, batch_size=8)
    return small.score(shipped.reconstruction(model), settings, held_out)


def residual(photos: str, workdir: str, steps: int) -> dict[str, Any]:
    """{'f32, Muon, shortcuts': rows of PSNR and SSIM, ...}."""
    dcae.VARIANTS.update({"half-f32": F32, "half-f64": F64})
    found = {}
    for f, optimizer in ARMS:
        for shortcuts in (True, False):
            name = f"f{f}, {optimizer}, {'shortcuts' if shortcuts else 'without'}"
            run = config(
                "phase1.py",
                photos,
                model={"variant": f"half-f{f}", "residual": shortcuts},
                steps=steps,
                evaluate_every=max(steps // 6, 1),
                save_every=max(steps // 3, 1),
                ema_decay=0.98,
                evaluate={"crops": 1},
                optimizer={**SETTINGS[optimizer], "warmup_steps": 25},
            )
            rows = arm(run, os.path.join(workdir, name.replace(", ", "-")))
            kept = ("step", "psnr_256", "ssim_256")
            found[name] = [{k: r[k] for k in kept} for r in rows if "psnr_256" in r]
            print(name, found[name][-1], flush=True)
    return found


def adaptation(photos: str, workdir: str, chain: str) -> dict[str, Any]:
    """`compare` of no phase 2, phase 2, and everything trained in it, at WIDE pixels."""
    names = ("no phase 2", "phase 2", "everything")
    return compare(photos, workdir, chain, 2, names, (".*",), WIDE, 1)


def gan(photos: str, workdir: str, chain: str) -> dict[str, Any]:
    """`compare` of before phase 3, and its GAN on the head and on the whole decoder."""
    names = ("before phase 3", "head", "whole decoder")
    return compare(photos, workdir, chain, 3, names, (r"decoder\..*",), small.SIZES, 1)


def compare(
    photos: str,
    workdir: str,
    chain: str,
    phase: int,
    names: tuple[str, str, str],
    trainable: tuple[str, ...],
    sizes: tuple[int, ...],
    crops: int,
) -> dict[str, Any]:
    """{name: scores, whether the latents are those before `phase`, cost, rows} of three arms:
    before the phase, after it in `chain`, and after as many steps that train `trainable`."""
    before, after = (os.path.join(chain, f"phase{number}") for number in (phase - 1, phase))
    steps = files.read_rows(after)[-1]["step"]
    run = config(f"phase{phase}.py", photos, init_from=before, steps=steps)
    wide = dataclasses.replace(run, trainable=trainable)
    folder = os.path.join(workdir, names[2].replace(" ", "-"))
    arm(wide, folder)
    found = {}
    for name, where, of in zip(names, (before, after, folder), (None, run, wide), strict=True):
        found[name] = {"scores": scores(where, photos, sizes, crops)}
        found[name]["same latents"] = _encoder(where) == _encoder(before)
        if of:
            found[name] |= {"rows": _evaluated(files.read_rows(where)), **cost(of, where)}
        print(name, found[name], flush=True)
    return found


def _encoder(folder: str) -> str:
    return checkpoint_weights.encoder_checksum(checkpoint_weights.load_weights(folder)[0])


def _evaluated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = ("step", "psnr_256", "psnr_512", "ssim_256", "ssim_512")
    return [{k: row[k] for k in kept if k in row} for row in rows if "psnr_256" in row]


def plot(part: str, found: Mapping[str, Any], path: str) -> None:
    """PSNR against steps, a line per arm."""
    panels = {"residual": ("f32", "f64")}.get(part, ("psnr_256", "psnr_512"))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set(xlabel="step", ylabel="PSNR (dB), held-out crops", title=panel)
        for name, value in found.items():
            rows = value if part == "residual" else value.get("rows", [])
            if part == "residual" and not name.startswith(panel):
                continue
            key = "psnr_256" if part == "residual" else panel
            style = ("C0" if "Muon" in name else "C1") + ("-" if "shortcuts" in name else "--")
            line = [(row["step"], row[key]) for row in rows if key in row]
            if line:
                axes.plot(
                    *zip(*line, strict=True),
                    *([style] if part == "residual" else []),
                    label=name.removeprefix(f"{panel}, "),
                )
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # never on curves
    common.save_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("residual", "adaptation", "gan"))
    parser.add_argument("--photos", default="photos")
    parser.add_argument("--run", default="runs/small", help="workdir of phases.py:small")
    parser.add_argument("--workdir", default="runs/contrasts")
    parser.add_argument("--steps", type=int, default=300, help="of an arm of `residual`")
    given = parser.parse_args()
    process.set_up_logging()
    process.use_compile_cache()
    workdir = os.path.join(given.workdir, given.part)
    if given.part == "residual":
        found = residual(given.photos, workdir, given.steps)
    else:
        part = {"adaptation": adaptation, "gan": gan}[given.part]
        found = part(given.photos, workdir, given.run)
    plot(given.part, found, os.path.join(given.workdir, f"{given.part}.svg"))
    with open(os.path.join(given.workdir, f"{given.part}.json"), "w") as file:
        json.dump({"version": dcae_jax.__version__, "results": found}, file, indent=1)


if __name__ == "__main__":
    main()
