# SPDX-License-Identifier: Apache-2.0
"""Encode, decode and a full training step of DC-AE beside diffusers' `AutoencoderDC` (PyTorch).

    python benchmarks/autoencoder.py

Encode and decode are f32c32's, with float32 weights drawn at random, through
`dcae_jax.create_autoencoder` and `AutoencoderDC`. The training step is forward, backward,
clipping and AdamW at widths 16 to 256, one block per stage, batch 8 at 128 pixels, L1 loss; ours is
the step that jobs/train.py runs.
"""

import common
import numpy as np

WIDTHS, LATENT = (16, 32, 64, 64, 128, 128, 256), 128
DEPTHS = (1,) * len(WIDTHS)
CASES = [
    f"{what}, {size} pixels, batch {batch}"
    for size in (256, 512)
    for batch in (1, 4)
    for what in ("encode", "decode")
]
TRAIN = "training step, 128 pixels, batch 8"


def _numbers(case: str) -> tuple[str, int, int]:
    what, size, batch = case.split(", ")
    return what, int(size.split()[0]), int(batch.split()[1])


def ours(case: str):
    import jax

    import dcae_jax

    if case == TRAIN:
        return _our_step()
    what, size, batch = _numbers(case)
    ae = dcae_jax.create_autoencoder("f32c32", dtype="float32")
    rng = np.random.default_rng(0)
    if what == "encode":
        run, x = ae.encode, rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)
    else:
        run, x = ae.decode, rng.standard_normal((batch, size // 32, size // 32, 32), np.float32)
    x = jax.device_put(x)
    program = jax.jit(lambda x: run(x)).lower(x).compile()
    cost = program.cost_analysis()
    facts = {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
    return lambda: jax.block_until_ready(run(x)), facts


def _our_step():
    import os

    import jax

    from dcae_jax import config as config_lib
    from dcae_jax.runtime import host_memory
    from dcae_jax.runtime import mesh as sharding
    from dcae_jax.setup import run as run_lib
    from dcae_jax.training import state
    from dcae_jax.training import step as steps

    host_memory.keep()  # as main.py does
    configs = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "configs")
    config = config_lib.load_file(os.path.join(configs, "phase1.py"), "f64c128")
    config.model.widths, config.model.latent_channels = WIDTHS, LATENT
    config.model.encoder_depths = config.model.decoder_depths = DEPTHS
    config.resolution, config.batch_size, config.remat = 128, 8, "none"
    config.loss.lpips_weight = config.ema_decay = 0.0
    config = config_lib.validate(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    spec = state.train_spec(config, mesh)
    abstract = state.abstract_state(config.sharding, mesh, spec)
    shapes = run_lib.abstract_batch(config, 128, mesh)
    program = steps.jit_step(config, spec, abstract).lower(abstract, shapes, {}).compile()
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 256, v.shape).astype(v.dtype) for k, v in shapes.items()}
    batch = jax.device_put(batch)
    kept = [state.init_state(config, mesh, spec)]

    def run():
        kept[0], metrics = program(kept[0], batch, {})
        jax.block_until_ready((kept[0], metrics))

    cost = program.cost_analysis()
    return run, {"flops": cost["flops"], "bytes": cost["bytes accessed"]}


def their_model(widths, encoder, decoder, latent):
    from diffusers import AutoencoderDC

    n, plain = len(widths), 3
    blocks = ("ResBlock",) * plain + ("EfficientViTBlock",) * (n - plain)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=latent,
        attention_head_dim=32,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=encoder,
        decoder_layers_per_block=decoder,
        encoder_qkv_multiscales=((),) * n,
        decoder_qkv_multiscales=((),) * n,
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types=("batch_norm",) * plain + ("rms_norm",) * (n - plain),
        decoder_act_fns=("relu",) * plain + ("silu",) * (n - plain),
    )


def theirs(case: str):
    import torch

    torch.set_num_threads(common.THREADS)
    torch.manual_seed(0)
    if case == TRAIN:
        return _their_step()
    what, size, batch = _numbers(case)
    model = their_model(
        (128, 256, 512, 512, 1024, 1024), (0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2), 32
    ).eval()
    if what == "encode":
        run, x = model.encode, torch.rand(batch, 3, size, size) * 2 - 1
    else:
        run, x = model.decode, torch.randn(batch, 32, size // 32, size // 32)

    def call():
        with torch.inference_mode():
            run(x)

    return call, {}


def _their_step():
    import torch

    model = their_model(WIDTHS, DEPTHS, DEPTHS, LATENT).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.rand(8, 3, 128, 128) * 2 - 1

    def run():
        optimizer.zero_grad()
        loss = (model.decode(model.encode(x).latent).sample - x).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run, {}


if __name__ == "__main__":
    # A training step takes half a second, the rest of the cases up to ten.
    turns = {TRAIN: 5}
    common.beside(
        __file__,
        __doc__,
        [*CASES, TRAIN],
        ours,
        theirs,
        rounds=lambda c: turns.get(c, 1),
        default=3,
    )
