# SPDX-License-Identifier: Apache-2.0
"""Cases: exit status and message of command lines that are wrong."""

import json
import os
from typing import Any

import numpy as np
import space as net
from safetensors.numpy import save_file
from space import Space

# What makes each of these command lines a mistake; the rest of it is right.
TRAIN = [
    ("--config.batch_sise=3",),
    ("--config.optimizer.lr=3",),
    ("--config.zzzz=3",),
    ("--config.batch_size=three",),
    ("--config.resolution=72",),
    ("--config.evaluate.resolutions=(64,100)",),
    ("--config.evaluate.resolutions=()",),
    ("--config.mesh.fsdp=3",),
    ("--config.mesh.data=8", "--config.batch_size=12"),
    ("--config.data.source=folder",),
    ("--config.data.source=folder", "--config.data.path=/none"),
    ("--config.data.source=web",),
    ("--config.data.source=latents",),
    ("--config.data.source=tfds",),
    ("--config.data.source=mixture",),
    ("--config.data.source=mixture", "--config.data.parts=((0,'folder','x'),)"),
    ("--config.data.source=mixture", "--config.data.parts=((1,'web','x'),)"),
    ("--config.data.source=mixture", "--config.data.parts=((1,'folder'),)"),
    ("--config.loss.lpips_weight=1.0",),
    ("--config.loss.lpips_weight=1.0", "--config.loss.lpips_weights=/no"),
    ("--config.trainable=('decoder.step.*',)",),
    ("--config.init_from=/none",),
    ("--config.loss.gan_weight=1.0", "--config.trainable=('encoder.*',)"),
    ("--config.loss.gan_weight=1.0", "--config.resolution=16", "--config.loss.gan_layers=4"),
    ("--config.job=juggle",),
    ("--config.model.variant=f33",),
    ("--config.model.name=os",),
    ("stray",),
    ("--config.dtype=float16",),
    ("--config.accumulate=3",),
    ("--config.ema_decay=1.0",),
    ("--config.data.crop=squash",),
    ("--config.data.crop_area=(0.5,0.2)",),
    ("--config.optimizer.learning_rate=nan",),
    ("--config.optimizer.learning_rate=0.0",),
    ("--config.optimizer.eps=1.0",),
    ("--config.optimizer.schedule=linear",),
    ("--config.seed=-1",),
    ("--config.profile_steps=(3,)",),
    ("--config.profile_steps=(5,3)",),
    ("--config.trainable=(3,)",),
    ("--config.sharding=(('a',),)",),
    ("--config.sharding=(('.*','sideways'),)",),
    ("--config.weights=both",),
    ("--config.remat=all",),
    ("--config.objective=guess",),
    ("--config.objective=flow",),
    ("--config.evaluate.samples=x.npz",),
    ("--config.evaluate.protocol=imagenet-256",),
    ("--config.mesh.spatial=2",),
    ("--config.model.widths=(8,8)",),
    ("--config.model.latent_channels=7",),
]
# The same of other jobs: flags without --config., SPACE and CONFIGS being folders.
JOBS = {
    "encode.py": [
        "init_from=",
        "resolution=72",
        "encode.dtype=float64",
        "data.source=latents",
        "mesh.spatial=2",
        "data.path=/none",
        "init_from=/none",
    ],
    "evaluate.py": [
        "evaluate.protocol=imagenet-64",
        "evaluate.protocol=imagenet-512 evaluate.resolutions=(256,)",
        "evaluate.protocol=imagenet-256 evaluate.crops=2",
        "evaluate.protocol=imagenet-256 evaluate.count=100",
        "evaluate.protocol=imagenet-256 data.source=photos",
        "evaluate.reference=/data/val",
        "evaluate.lpips_weights=/none",
        "evaluate.inception_weights=/none",
        "evaluate.samples=/none init_from=",
        "evaluate.samples=/none init_from= evaluate.reference=/none",
        "init_from=",
        "evaluate.resolutions=(40,)",
    ],
    "export.py": [
        "seed=0",
        "init_from=/none",
        "init_from=SPACE/models/tiny export.out=SPACE",
        "init_from=SPACE/models/tiny export.format=authors export.out=SPACE/e",
        "init_from=SPACE/models/uvit export.format=diffusers export.out=SPACE/e",
        "init_from=SPACE/models/uvit export.format=stablehlo export.out=SPACE/e",
    ],
    "sample.py": ["seed=0", "init_from=/none", "init_from=SPACE/models/tiny"],
    "uvit.py:tiny": [
        "data.path=/none",
        "data.source=photos",
        "patch_size=4",
        "model.latent_size=4",
        "model.latent_channels=4",
        "model.num_classes=2",
        "model.scaling_factor=2.0",
        "model.depth=3",
        "model.heads=3",
        "mesh.spatial=2",
        "init_from=SPACE/models/dit",
        "init_from=SPACE/models/tiny",
        "autoencoder=SPACE/models/uvit",
    ],
    "plan.py": [
        "seed=0",
        "plan.config=/none.py",
        "plan.config=CONFIGS/evaluate.py",
        "plan.config=CONFIGS/phase1.py:tiny plan.topologies=('v9:2x2',)",
        "plan.config=CONFIGS/phase1.py:tiny plan.topologies=('v5e:2x2x1',)",
        "plan.config=CONFIGS/phase1.py:tiny plan.topologies=('v5p:2x2',)",
        "plan.config=CONFIGS/phase1.py:tiny plan.overrides=('batch_sise=3',)",
        "plan.config=CONFIGS/phase1.py:tiny plan.overrides=('batch_size=x',)",
        "plan.config=CONFIGS/sample.py",
        "plan.config=CONFIGS/sample.py plan.generator=CONFIGS/phase1.py:tiny",
        "plan.config=CONFIGS/uvit.py:tiny plan.overrides=('autoencoder=x',)",
    ],
}
# Values that no key of the kind takes; each is tried on its own.
IMPOSSIBLE = {
    "batch_size": (0, 2**40, "inf"),
    "steps": (-1,),
    "log_every": (0,),
    "save_every": (0,),
    "keep": (0,),
    "max_skipped": (0,),
    "ema_decay": (-0.1, "nan"),
    "ema_warmup": (0,),
    "label_dropout": (1.5,),
    "patch_size": (0,),
    "resolutions": ("(0,)", "('x',)", "(64.5,)"),
    "optimizer.b1": (1.0,),
    "optimizer.clip_norm": (-1.0,),
    "optimizer.weight_decay": (-1.0, "inf"),
    "optimizer.warmup_from": (2.0,),
    "optimizer.decay": ("('',)",),
    "loss.l1_weight": (-1.0,),
    "loss.lpips_weight": (-1.0,),
    "loss.gan_weight": (-1.0,),
    "loss.gan_layers": (0,),
    "data.rotation": (200.0,),
    "data.color_jitter": (2.0,),
    "data.held_out": (1.0,),
    "data.threads": (0,),
    "model.depth": (-1,),
    "model.scaling_factor": ("nan",),
    "model.encoder_depths": ("(-1,)",),
    "mesh.data": (-2, 0),
    "sample.guidance": (-1.0,),
    "sample.guidance_interval": ("(0.5,0.2)", "(0.5,)"),
    "sample.labels": ("(-1,)",),
    "sample.format": ("gif",),
    "encode.dtype": ("float64",),
    "encode.shard_size": (0,),
    "export.format": ("onnx",),
    "plan.watts": (-1.0,),
    "plan.effort": (2.0,),
}


def told(space: Space, arguments: list[str]) -> dict[str, Any]:
    """What a command line ends in: its status, and the lines of error that it wrote."""
    status, said = net.run(arguments)
    lines = net.without_paths(said, space).splitlines()
    errors = [line for line in lines if line.startswith(("error: ", "Traceback"))]
    return {"status": status, "error": "\n".join(errors)}


def _real(argument: str, space: Space) -> str:
    """An argument with SPACE and CONFIGS replaced by the folders that they stand for."""
    return argument.replace("SPACE", space.root).replace("CONFIGS", net.CONFIGS)


def _cases(
    space: Space, config: str, base: dict[str, Any], several: list[tuple[str, ...]]
) -> dict[str, Any]:
    found = {}
    for arguments in several:
        workdir = space.path("refused")
        command = net.command(config, workdir, base)
        given = [_real(argument, space) for argument in arguments]
        found[" ".join((config, *arguments))] = told(space, [*command, *given])
        assert not os.path.exists(os.path.join(workdir, "checkpoints")), arguments
    return {"exact": found}


def training(space: Space) -> dict[str, Any]:
    """Catches another status or message of a wrong training command, or work before it."""
    return _cases(space, "phase1.py:tiny", {}, TRAIN)


def bounds(space: Space) -> dict[str, Any]:
    """Catches a key that loses its bounds, its kind or the words that name it."""
    several = [
        (f"--config.{key}={value}",) for key, values in IMPOSSIBLE.items() for value in values
    ]
    return _cases(space, "phase1.py:tiny", {}, several)


def files(space: Space) -> dict[str, Any]:
    """Catches absl's usage text, or a traceback, for a missing file, flag or chain of phases."""
    found = {}
    config, workdir = f"--config={net.CONFIGS}/", f"--workdir={space.path('refused')}"
    for name, arguments in {
        "no config": [workdir],
        "no workdir": [f"{config}phase1.py:tiny"],
        "no file": [f"{config}phase9.py", workdir],
        "finetune.py:tiny,encoder": [f"{config}finetune.py:tiny,encoder", workdir],
        "mix.py:tiny,phase4": [f"{config}mix.py:tiny,phase4", workdir],
        "phase2.py:tiny": [f"{config}phase2.py:tiny", workdir],
        "phase3.py:tiny": [f"{config}phase3.py:tiny", workdir],
        "finetune.py:tiny": [f"{config}finetune.py:tiny", workdir],
        "phases.py:tiny": [f"{config}phases.py:tiny", workdir, "--config.batch_size=8"],
        "phase1.init_from": [f"{config}phases.py:tiny", workdir, "--config.phase1.init_from=/none"],
        "phase2.init_from": [f"{config}phases.py:tiny", workdir, "--config.phase2.init_from=/none"],
        "unknown flag": [f"{config}phase1.py:tiny", workdir, "--verbose"],
        "process": [f"{config}phase1.py:tiny", workdir, "--num_processes=2"],
    }.items():
        found[name] = told(space, arguments)
    return {"exact": found}


def jobs(space: Space) -> dict[str, Any]:
    """Catches another status or message of the jobs encode, evaluate, export, sample and plan."""
    pictures = {"data.source": "folder", "data.path": space.pictures(), "resolution": 32}
    tiny = {"init_from": space.model("tiny"), **pictures}
    uvit = {"data.path": space.latents(), "batch_size": 4, "model.depth": 2}
    for name in ("uvit", "dit"):
        space.model(name)
    found = {}
    for config, base in {
        "encode.py": tiny | {"encode.batch_size": 4},
        "evaluate.py": tiny,
        "export.py": {},
        "sample.py": {},
        "uvit.py:tiny": uvit,
        "plan.py": {"plan.topologies": "('cpu',)"},
    }.items():
        several = [tuple(f"--config.{flag}" for flag in line.split()) for line in JOBS[config]]
        found |= _cases(space, config, base, several)["exact"]
    return {"exact": found}


def hostile(space: Space) -> dict[str, Any]:
    """Catches a traceback, or other words, for weights that are damaged or not what they say."""
    deep = b"[" * 100_000

    def header(text: bytes, data: int = 16) -> bytes:
        return len(text).to_bytes(8, "little") + text + bytes(data)

    entry = b'{"a": {"dtype": "F32", "shape": %s, "data_offsets": %s}}'
    safetensors = {
        "empty": b"",
        "short": b"abc",
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "long header": (10**9).to_bytes(8, "little") + bytes(16),
        "cut header": (100).to_bytes(8, "little") + b"{}",
        "no json": header(b'{"a": '),
        "deep": header(b'{"a": ' + deep),
        "array": header(b"[1]"),
        "infinite": header(entry % (b"[1e99]", b"[0, 8]")),
        "wrong size": header(entry % (b"[3]", b"[0, 8]")),
        "cut": header(entry % (b"[300]", b"[0, 1200]")),
        "dtype": header(b'{"a": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}}'),
        "overlap": header(
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}'
        ),
        "another model": header(entry % (b"[2]", b"[0, 8]"), 8),
    }
    found = {}
    config = f"--config={net.CONFIGS}/export.py"

    def refuse(name: str, path: str, *more: str) -> None:
        arguments = [config, f"--config.init_from={path}", f"--workdir={space.path('refused')}"]
        found[name] = told(space, [*arguments, *more])

    for name, content in safetensors.items():
        path = space.path(f"{name.replace(' ', '_')}.safetensors")
        with open(path, "wb") as file:
            file.write(content)
        refuse(name, path)
    for name, content in {"deep": deep, "bytes": b"\xff\xfe\x00", "array": b"[1]"}.items():
        for file_name in ("config.json", "model.json"):
            folder = space.path("folders", f"{name}-{file_name}")
            os.makedirs(folder)
            save_file({"a": np.zeros(2, np.float32)}, os.path.join(folder, "model.safetensors"))
            with open(os.path.join(folder, file_name), "wb") as file:
                file.write(content)
            refuse(f"{file_name} {name}", folder)
    empty = space.path("folders", "empty")
    os.makedirs(empty)
    refuse("empty folder", empty)
    tiny = space.model("tiny")
    with open(os.path.join(tiny, "config.json")) as file:
        settings = json.load(file)
    changes = {"_class_name": "VQModel", "latent_channels": 3, "encoder_block_out_channels": [8]}
    for key, value in changes.items():
        folder = space.path("folders", f"changed {key}")
        os.makedirs(folder)
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(settings | {key: value}, file)
        os.symlink(
            os.path.join(tiny, "diffusion_pytorch_model.safetensors"),
            os.path.join(folder, "diffusion_pytorch_model.safetensors"),
        )
        refuse(f"link out, changed {key}", folder)
        os.remove(os.path.join(folder, "diffusion_pytorch_model.safetensors"))
        os.link(
            os.path.join(tiny, "diffusion_pytorch_model.safetensors"),
            os.path.join(folder, "diffusion_pytorch_model.safetensors"),
        )
        refuse(f"changed {key}", folder)
    for variant in ("f32c32", "f33", "tiny"):
        bare = os.path.join(tiny, "diffusion_pytorch_model.safetensors")
        own = f"--config={net.CONFIGS}/export.py:{variant}"
        found[f"bare file as {variant}"] = told(
            space, [own, f"--config.init_from={bare}", f"--workdir={space.path('refused')}"]
        )
    return {"exact": found}


CASES = {
    "mistakes in training": training,
    "mistakes in values": bounds,
    "mistakes in files and flags": files,
    "mistakes in other jobs": jobs,
    "mistakes in weights": hostile,
}
