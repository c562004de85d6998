# SPDX-License-Identifier: Apache-2.0
"""UViT-S: forward and a training step, compared with the same network in plain PyTorch.

    python benchmarks/transformer.py

Latents of 32 channels, 8 x 8 (64 patches) and 16 x 16 (256), patches of 1, batch 8, float32. The
training step is forward, backward, clipping and AdamW on the noise prediction; ours is the step
that jobs/train.py runs, without EMA. The peer uses `scaled_dot_product_attention`.
"""

import os

import common
import numpy as np

WIDTH, HEADS, DEPTH, CHANNELS, CLASSES, BATCH = 512, 8, 12, 32, 1000, 8
CASES = [f"{what}, {n} tokens" for n in (64, 256) for what in ("forward", "training step")]


def ours(case: str):
    import jax
    import jax.numpy as jnp

    from dcae_jax import config as config_lib
    from dcae_jax.models import weights as layers
    from dcae_jax.runtime import host_memory
    from dcae_jax.runtime import mesh as sharding
    from dcae_jax.setup import resolve
    from dcae_jax.setup import run as run_lib
    from dcae_jax.training import state
    from dcae_jax.training import step as steps

    host_memory.keep()  # as main.py does
    what, tokens = case.split(", ")
    side = int(int(tokens.split()[0]) ** 0.5)
    configs = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "configs")
    config = config_lib.load_file(os.path.join(configs, "uvit.py"), "s")
    config.autoencoder, config.resolution, config.batch_size = "f32c32", 32 * side, BATCH
    config.ema_decay = 0.0
    config = resolve.on_variant(config_lib.validate(config))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    spec = state.train_spec(config, mesh)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, side, side, CHANNELS), np.float32)
    if what == "forward":
        labels, t = jnp.zeros(BATCH, jnp.int32), jnp.full(BATCH, 0.5)
        start = state.init_state(config, mesh, spec)
        program = jax.jit(
            lambda weights, x: layers.merge(spec.graphdef, weights)(x, t, labels)
        ).lower(start.params, x)
        config = config_lib.replace(config, unroll=True)  # XLA counts a loop's body once
        cost = _cost(config, mesh, lambda graph, w: layers.merge(graph, w)(x, t, labels))
        compiled, weights = program.compile(), start.params
        x = jax.device_put(x)
        return lambda: jax.block_until_ready(compiled(weights, x)), cost
    abstract = state.abstract_state(config.sharding, mesh, spec)
    shapes = run_lib.abstract_batch(config, side, mesh)
    program = steps.jit_step(config, spec, abstract).lower(abstract, shapes, {}).compile()
    batch = {"latent": x.astype(shapes["latent"].dtype), "label": np.zeros(BATCH, np.int32)}
    batch = jax.device_put(batch)
    kept = [state.init_state(config, mesh, spec)]

    def run():
        kept[0], metrics = program(kept[0], batch, {})
        jax.block_until_ready((kept[0], metrics))

    config = config_lib.replace(config, unroll=True)
    spec = state.train_spec(config, mesh)
    cost = jax.jit(steps.make_step(config, spec)).lower(abstract, shapes, {}).compile()
    cost = cost.cost_analysis()
    return run, {"flops": cost["flops"], "bytes": cost["bytes accessed"]}


def _cost(config, mesh, call):
    import jax

    from dcae_jax.training import state

    spec = state.train_spec(config, mesh)
    cost = jax.jit(lambda w: call(spec.graphdef, w)).lower(spec.params).compile().cost_analysis()
    return {"flops": cost["flops"], "bytes": cost["bytes accessed"]}


def theirs(case: str):
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(common.THREADS)
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.skip = nn.Linear(2 * WIDTH, WIDTH) if skip else None
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(
                nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
            )

        def forward(self, x, skip=None):
            if skip is not None:
                x = self.skip(torch.cat([x, skip], -1))
            b, n, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(y.transpose(1, 2).reshape(b, n, WIDTH))
            return x + self.mlp(self.norm2(x))

    class UViT(nn.Module):
        def __init__(self, side):
            super().__init__()
            self.side = side
            self.patch = nn.Conv2d(CHANNELS, WIDTH, 1)
            self.label = nn.Embedding(CLASSES + 1, WIDTH)
            self.positions = nn.Parameter(0.02 * torch.randn(1, side * side + 2, WIDTH))
            self.ins = nn.ModuleList(Block(False) for _ in range(DEPTH // 2))
            self.mid = Block(False)
            self.outs = nn.ModuleList(Block(True) for _ in range(DEPTH // 2))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHANNELS)
            self.final = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

        def forward(self, x, t, labels):
            half = WIDTH // 2
            angles = t[:, None] * torch.exp(-np.log(10000.0) * torch.arange(half) / half)
            time = torch.cat([angles.cos(), angles.sin()], -1)[:, None]
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([time, self.label(labels)[:, None], x], 1) + self.positions
            kept = []
            for block in self.ins:
                x = block(x)
                kept.append(x)
            x = self.mid(x)
            for block in self.outs:
                x = block(x, kept.pop())
            x = self.head(self.norm(x))[:, 2:]
            return self.final(x.transpose(1, 2).reshape(len(x), CHANNELS, self.side, self.side))

    what, tokens = case.split(", ")
    side = int(int(tokens.split()[0]) ** 0.5)
    model = UViT(side)
    x = torch.randn(BATCH, CHANNELS, side, side)
    labels, t = torch.zeros(BATCH, dtype=torch.long), torch.full((BATCH,), 500.0)
    if what == "forward":

        def call():
            with torch.inference_mode():
                model(x, t, labels)

        return call, {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run():
        optimizer.zero_grad()
        noise, signal = torch.randn_like(x), torch.rand(BATCH, 1, 1, 1)
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        loss = (model(noisy, t, labels) - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run, {}


if __name__ == "__main__":
    common.beside(__file__, __doc__, CASES, ours, theirs, default=11)
