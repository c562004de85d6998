# SPDX-License-Identifier: Apache-2.0
"""UViT and DiT in plain PyTorch, with the parameters' names of the authors, and what they give.

`python tests/goldens/make_diffusion.py` (with torch, a second) writes diffusion.npz: for each
model below the names and shapes of its tensors, and its outputs. Weights and inputs come from
names and are not stored. The definitions follow the papers' formulas and share no code with
dcae_jax.
"""

import json
import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("diffusion.npz")

# Every field of an Architecture, by keyword. Sizes differ from each other, so that a swap shows.
MODELS = {
    "uvit": dict(depth=6, width=24, heads=3, latent_size=4, patch_size=1, num_classes=5),
    "uvit-p2": dict(depth=4, width=32, heads=2, latent_size=6, patch_size=2, num_classes=5),
    "dit": dict(depth=3, width=24, heads=3, latent_size=4, patch_size=1, num_classes=5),
    "dit-p2": dict(depth=2, width=32, heads=2, latent_size=6, patch_size=2, num_classes=5),
}
for _name, _sizes in MODELS.items():
    _sizes.update(latent_channels=7, out_channels=14 if _name in ("uvit-p2", "dit") else 7)

TIMES = np.array([1000.0, 17.0, 0.37], np.float32)
LABELS = np.array([0, 5, 3], np.int32)  # 5 is "none"


def inputs(model):
    """-> (x [3, h, w, c], times [3], labels [3])."""
    sizes = MODELS[model]
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(model.encode())))
    shape = (3, sizes["latent_size"], sizes["latent_size"], sizes["latent_channels"])
    return rng.standard_normal(shape, np.float32), TIMES, LABELS


def tensor(model, name, shape):
    """-> the weights called `name`: nothing is zero, no two channels are alike."""
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(f"{model} {name}".encode())))
    uniform = rng.random(shape, np.float32)
    if "norm" in name and name.endswith("weight"):
        return 0.5 + uniform
    fan_in = np.prod(shape[1:]) if len(shape) > 1 and "emb" not in name.split(".")[0] else 3
    gain = 0.3 if "adaLN" in name else 1  # else the gates grow without bound from block to block
    return ((2 * uniform - 1) * np.float32(gain * np.sqrt(3 / fan_in))).astype(np.float32)


def weights(model):
    """-> {the authors' name: array} of the model's parameters."""
    with np.load(PATH) as golden:
        shapes = json.loads(str(golden[f"{model}/shapes"]))
    return {name: tensor(model, name, tuple(shape)) for name, shape in shapes.items()}


def output(model):
    """-> [3, h, w, out_channels], what PyTorch made of `weights` and `inputs`."""
    with np.load(PATH) as golden:
        return golden[f"{model}/output"]


def network(sizes, backbone):
    """-> the torch.nn.Module of 'uvit' or 'dit'; (x [B, c, h, w], t, labels) -> [B, out, h, w]."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, heads, patch = sizes["width"], sizes["heads"], sizes["patch_size"]
    side = sizes["latent_size"] // patch
    outputs = sizes["out_channels"]

    def sinusoids(t, features):
        half = features // 2
        # Rounded as the originals round it: at t = 1000 the last bit of a frequency shows.
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angle = torch.outer(t, frequency)
        return torch.cat([angle.cos(), angle.sin()], 1)

    def to_image(tokens):
        """[B, N, p p out] -> [B, out, h, w], values of a token in the order (row, column, out)."""
        image = torch.zeros(len(tokens), outputs, side * patch, side * patch)
        for n in range(side * side):
            row, column = divmod(n, side)
            square = tokens[:, n].view(-1, patch, patch, outputs).permute(0, 3, 1, 2)
            rows = slice(row * patch, (row + 1) * patch)
            image[:, :, rows, column * patch : (column + 1) * patch] = square
        return image

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(sizes["latent_channels"], width, patch, stride=patch)

        def forward(self, x):
            return self.proj(x).flatten(2).mT

    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding_table = nn.Embedding(sizes["num_classes"] + 1, width)

        def forward(self, labels):
            return self.embedding_table(labels)

    class Attention(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
            self.proj = nn.Linear(width, width)

        def forward(self, x):
            q, k, v = (
                part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2)
            )
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.proj(mixed.transpose(1, 2).flatten(2))

    class MLP(nn.Module):
        def __init__(self, approximate):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.approximate = approximate

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))

    class UViTBlock(nn.Module):
        def __init__(self, skip):
            super().__init__()
            if skip:
                self.skip_linear = nn.Linear(2 * width, width)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn, self.mlp = Attention(bias=False), MLP("none")

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class UViT(nn.Module):
        def __init__(self):
            super().__init__()
            half = sizes["depth"] // 2
            self.patch_embed, self.label_emb = Patches(), Labels()
            self.pos_embed = nn.Parameter(torch.zeros(1, 2 + side * side, width))
            self.in_blocks = nn.ModuleList(UViTBlock(skip=False) for _ in range(half))
            self.mid_block = UViTBlock(skip=False)
            self.out_blocks = nn.ModuleList(UViTBlock(skip=True) for _ in range(half))
            self.norm = nn.LayerNorm(width)
            self.decoder_pred = nn.Linear(width, patch * patch * outputs)

        def forward(self, x, t, labels):
            first = torch.stack([self.label_emb(labels), sinusoids(t, width)], 1)
            x = torch.cat([first, self.patch_embed(x)], 1) + self.pos_embed
            kept = []
            for block in self.in_blocks:
                x = block(x)
                kept.append(x)
            x = self.mid_block(x)
            for block, old in zip(self.out_blocks, reversed(kept), strict=True):
                x = block(block.skip_linear(torch.cat([x, old], 2)))
            return to_image(self.decoder_pred(self.norm(x))[:, 2:])

    def modulated(x, shift, scale):
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    class DiTBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Attention(bias=True), MLP("tanh")
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

        def forward(self, x, c):
            s1, g1, a1, s2, g2, a2 = self.adaLN_modulation(c).chunk(6, 1)
            x = x + a1[:, None] * self.attn(modulated(x, s1, g1))
            return x + a2[:, None] * self.mlp(modulated(x, s2, g2))

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
            self.linear = nn.Linear(width, patch * patch * outputs)

        def forward(self, x, c):
            return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, 1)))

    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

        def forward(self, t):
            return self.mlp(sinusoids(t, 256))

    def position(row, column):
        """Half of the channels for the column, half for the row; each its sines, then cosines."""
        quarter = width // 4
        return [
            wave(place / 10000 ** (k / quarter))
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for k in range(quarter)
        ]

    class DiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.x_embedder, self.y_embedder, self.t_embedder = Patches(), Labels(), Time()
            table = [position(row, column) for row in range(side) for column in range(side)]
            self.register_buffer("pos_embed", torch.tensor(table)[None])
            self.blocks = nn.ModuleList(DiTBlock() for _ in range(sizes["depth"]))
            self.final_layer = Last()

        def forward(self, x, t, labels):
            x = self.x_embedder(x) + self.pos_embed
            c = self.t_embedder(t) + self.y_embedder(labels)
            for block in self.blocks:
                x = block(x, c)
            return to_image(self.final_layer(x, c))

    return UViT() if backbone == "uvit" else DiT()


def run(net, x, t, labels):
    """-> the network's output for NHWC arrays, NHWC."""
    import torch

    with torch.no_grad():
        y = net(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), torch.from_numpy(labels)
        )
    return y.permute(0, 2, 3, 1).numpy()


def make():
    import torch

    out = {}
    for model, sizes in MODELS.items():
        net = network(sizes, model.split("-")[0])
        parameters = dict(net.named_parameters())
        shapes = {name: list(p.shape) for name, p in parameters.items()}
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(torch.from_numpy(tensor(model, name, tuple(p.shape))))
        out[f"{model}/shapes"] = np.array(json.dumps(shapes))
        out[f"{model}/output"] = run(net, *inputs(model))
    partial = PATH.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, **out)
    os.replace(partial, PATH)
    sys.stdout.write(f"wrote {PATH}, {PATH.stat().st_size} bytes\n")


if __name__ == "__main__":
    make()
