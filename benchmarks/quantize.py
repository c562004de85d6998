# SPDX-License-Identifier: Apache-2.0
"""What int8 costs in quality, and what it saves: prints tables for docs/serve.md.

    python benchmarks/quantize.py --model=runs/tiny/phase3 --calibrate=photos/train \
        --photos=photos/held_out [--forms=int8-weights,int8]
    python benchmarks/quantize.py --tpu=v5e:2x2 --variant=f32c32    # compiled, not run

Quality is the mean PSNR over the photographs' centre crops: to the float model's images, and to the
photographs. Memory is what XLA plans for one call: arguments, results and temporaries. The forms
take turns, so that other load on the machine affects all; times are medians. The last table times
one layer of the model's kind alone. --tpu is a process of its own: it loads libtpu.
"""

import argparse
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import dcae_jax
from dcae_jax import files
from dcae_jax.api import autoencoder, calibration
from dcae_jax.config.schema import MeshSizes, Model
from dcae_jax.data import transforms
from dcae_jax.evaluation import pairs
from dcae_jax.planner import chips, compile
from dcae_jax.runtime import mesh as mesh_lib

ALONE = MeshSizes(data=1, fsdp=1, tensor=1, spatial=1)


def programs(ae: autoencoder.Autoencoder, batch: int, size: int) -> dict:
    """{name: (compiled program, its input)} of encode and decode."""
    f, sharding = ae.compression, mesh_lib.replicated(ae.mesh)
    shapes = {
        "encode": (ae._encode, (batch, size, size, 3)),
        "decode": (ae._decode, (batch, size // f, size // f, ae.latent_channels)),
    }
    found = {}
    for name, (function, shape) in shapes.items():
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        found[name] = (function.lower(ae.weights, x).compile(), shape)
    return found


def memory(program: jax.stages.Compiled) -> float:
    """MB of one call: arguments, results and temporaries."""
    m = program.memory_analysis()
    bytes_ = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return (bytes_ - m.alias_size_in_bytes) / 1e6


def weight_bytes(ae: autoencoder.Autoencoder) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in ae.weights.values())


def medians(calls: dict, rounds: int) -> dict:
    """{name: median seconds}, the calls in turn."""
    for call in calls.values():
        jax.block_until_ready(call())
    spent = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in spent.items()}


def model_table(given: argparse.Namespace) -> list[list]:
    forms = ["", *given.forms.split(",")]
    models = {
        form: dcae_jax.load_autoencoder(
            given.model,
            given.dtype,
            mesh_lib.make_mesh(ALONE, jax.devices()[:1]),
            quantize=form,
            calibrate=None if form in ("", "int8-weights") else given.calibrate,
        )
        for form in forms
    }
    photos = calibration.crops(given.photos, models[""].compression)
    outputs = {
        form: np.concatenate([np.asarray(ae.decode(ae.encode(x[None]))) for x in photos])
        for form, ae in models.items()
    }
    compiled = {
        (form, name): program
        for form, ae in models.items()
        for name, program in programs(ae, given.batch_size, given.size).items()
    }
    calls = {}
    for (form, name), (program, shape) in compiled.items():
        x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        x = jax.device_put(x, mesh_lib.replicated(models[form].mesh))
        calls[form, name] = lambda p=program, w=models[form].weights, x=x: p(w, x)
    seconds = medians(calls, given.rounds)
    head = ["", "PSNR to float32", "PSNR", "weights, MB", "of float32's"]
    rows = [head + [f"{name}, {what}" for name in ("encode", "decode") for what in ("MB", "im/s")]]
    whole = weight_bytes(models[""])
    for form, ae in models.items():
        error = np.mean((outputs[form] - outputs[""]) ** 2, (1, 2, 3))
        to_float = np.mean(10 * np.log10(4 / error)) if form else np.inf
        to_photo = np.mean(
            [
                pairs.psnr(transforms.to_uint8(x), transforms.to_uint8(y))
                for x, y in zip(photos, outputs[form], strict=True)
            ]
        )
        row = [form or "float32", f"{to_float:.2f}", f"{to_photo:.3f}"]
        row += [f"{weight_bytes(ae) / 1e6:.2f}", f"{weight_bytes(ae) / whole:.3f}"]
        for name in ("encode", "decode"):
            row += [f"{memory(compiled[form, name][0]):.1f}"]
            row += [f"{given.batch_size / seconds[form, name]:.1f}"]
        rows.append(row)
    return rows


def layer_table(rounds: int, size: int = 64, channels: int = 64) -> list[list]:
    """Milliseconds of one 3x3 convolution and one 1x1 convolution alone, in float32 and int8."""
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (8, size, size, channels))
    kernel = rng.integers(-127, 128, (3, 3, channels, channels))

    def conv(x, kernel, out):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=out,
        )

    def dot(x, kernel, out):
        return jax.lax.dot_general(
            x, kernel[0, 0], (((3,), (0,)), ((), ())), preferred_element_type=out
        )

    calls = {}
    for name, function in {"3x3": conv, "1x1": dot}.items():
        for dtype, out in ((jnp.float32, jnp.float32), (jnp.int8, jnp.int32)):
            run = jax.jit(lambda x, k, f=function, out=out: f(x, k, out))
            arrays = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
            calls[name, dtype.__name__] = lambda run=run, arrays=arrays: run(*arrays)
    seconds = medians(calls, rounds)
    rows = [["one layer, [8, 64, 64, 64]", "float32, ms", "int8, ms"]]
    for name in ("3x3", "1x1"):
        rows.append([name, *(f"{1e3 * seconds[name, t]:.1f}" for t in ("float32", "int8"))])
    return rows


def tpu_table(given: argparse.Namespace) -> list[list]:
    """What the TPU compiler reports of encode and decode on one chip."""
    jax.config.update(*compile.effort_option(-1.0))  # 4 to 6 times faster, docs/scaling.md
    mesh = mesh_lib.make_mesh(ALONE, chips.devices(given.tpu)[:1])
    rows = [["", "weights, MB", "encode, MB", "GFLOP", "decode, MB", "GFLOP"]]
    for dtype, form in (("float32", ""), ("bfloat16", ""), ("bfloat16", "int8")):
        ae = autoencoder.abstract_autoencoder(Model(variant=given.variant), mesh, dtype, form)
        row = [form or dtype, f"{weight_bytes(ae) / 1e6:.1f}"]
        for program, _ in programs(ae, given.batch_size, given.size).values():
            flops = program.cost_analysis()["flops"]
            row += [f"{memory(program):.1f}", f"{flops / 1e9:.1f}"]
        rows.append(row)
        print(*row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/tiny/phase3")
    parser.add_argument("--calibrate", default="photos/train")
    parser.add_argument("--photos", default="photos/held_out")
    parser.add_argument("--forms", default="int8-weights,int8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tpu", default="", help="a topology, as in v5e:2x2")
    parser.add_argument("--variant", default="f32c32", help="with --tpu")
    given = parser.parse_args()
    if given.tpu:
        print(files.table(tpu_table(given)))
        return
    device = jax.devices()[0].device_kind
    print(f"{os.cpu_count()} x {platform.machine()}, {device}, jax {jax.__version__}")
    print(files.table(model_table(given)), "\n")
    print(files.table(layer_table(given.rounds)))


if __name__ == "__main__":
    main()
