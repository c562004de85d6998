# SPDX-License-Identifier: Apache-2.0
"""One step of phase 3 in plain PyTorch: diffusers' AutoencoderDC, LPIPS, and a PatchGAN.

`PYTHONPATH=tests python tests/goldens/make_gan.py` (with torch and diffusers installed, some
seconds) writes gan.npz: the losses, both gradients, the adaptive weight and the updated weights of
the step below, by PyTorch's names, and the logits of discriminators of several depths. Weights and
images come from their names and are not stored.
"""

import os
import re
import sys
from pathlib import Path

import numpy as np
from goldens import judges, make_dcae

PATH = Path(__file__).with_name("gan.npz")

CONFIG = {  # f16, the layout of dcae_jax's `tiny`, narrow
    "latent_channels": 8,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 2,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 2,
    "encoder_block_out_channels": [8, 8, 16, 32, 32],
    "decoder_block_out_channels": [8, 8, 16, 32, 32],
    "encoder_layers_per_block": [0, 1, 1, 1, 1],
    "decoder_layers_per_block": [0, 1, 1, 1, 1],
    "encoder_qkv_multiscales": [[]] * 5,
    "decoder_qkv_multiscales": [[]] * 5,
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 2,
    "decoder_act_fns": ["relu"] * 3 + ["silu"] * 2,
    "scaling_factor": 1.0,
}
TRAINED = r"decoder\.(up_blocks\.1\.[1-9]\d*|norm_out|conv_out)\..*"  # the head
LAST = "decoder.conv_out.conv.weight"
# No two settings alike, so that none can stand in for another. eps is large: Adam's first step
# then depends on the size of a gradient and not on its sign alone.
STEP = {
    "batch_size": 3,
    "resolution": 32,
    "l1_weight": 1.5,
    "lpips_weight": 0.7,
    "gan_weight": 0.5,
    "gan_adaptive_max": 10.0,
    "learning_rate": 2e-2,
    "gan_learning_rate": 3e-2,
    "b1": 0.5,
    "b2": 0.9,
    "eps": 1e-3,
    "weight_decay": 0.2,
    "clip_norm": 0.25,
}
DISCRIMINATOR = (8, 2)  # (channels of the first layer, layers that halve the size)
GAIN = 3  # of the discriminator's kernels: some logits pass +-1, where the hinge is flat
DEPTHS = ((8, 2), (8, 3), (8, 4))  # the last one stops widening


def images(seed, size=STEP["resolution"]):
    """-> [B, H, W, 3] uint8."""
    return judges.pictures(STEP["batch_size"], size, seed=seed + 10)


def weights(seed, shapes, gain=1):
    """-> {name: float32 array} for {name: shape}; kernels are multiplied by `gain`."""
    made = {n: np.array(make_dcae.tensor(f"gan{seed}", n, tuple(s))) for n, s in shapes.items()}
    return {n: value * np.float32(gain) if value.ndim > 1 else value for n, value in made.items()}


def lpips_linear():
    """-> the five linear layers of LPIPS, made up."""
    sizes = (64, 128, 256, 512, 512)
    return [
        np.random.RandomState(i).random_sample(c).astype(np.float32) for i, c in enumerate(sizes)
    ]


def patchgan(channels, depth):
    """The published discriminator (pix2pix's NLayerDiscriminator) with GroupNorm for BatchNorm."""
    from torch import nn

    widths = [channels * min(2**i, 8) for i in range(depth + 1)]
    layers = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for i in range(1, depth + 1):
        stride = 2 if i < depth else 1
        layers += [
            nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
            nn.GroupNorm(8, widths[i]),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))


def loaded(network, seed, gain=1):
    """The network with the weights of its names."""
    import torch

    shapes = {name: value.shape for name, value in network.state_dict().items()}
    made = weights(seed, shapes, gain)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in made.items()})
    return network


def step(seed):
    """-> {name: array}: one whole step of phase 3."""
    import torch
    from diffusers import AutoencoderDC

    def norm(tensors):
        return torch.sqrt(sum((t**2).sum() for t in tensors))

    model = loaded(AutoencoderDC.from_config(CONFIG).eval(), seed)
    discriminator = loaded(patchgan(*DISCRIMINATOR), seed, GAIN)
    head = {n: p for n, p in model.named_parameters() if re.fullmatch(TRAINED, n)}
    model.requires_grad_(False)
    for parameter in head.values():
        parameter.requires_grad_(True)
    for name, module in model.named_modules():  # BatchNorm trains where its parameters do
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(bool(re.fullmatch(TRAINED, f"{name}.weight")))
    decayed = [p for p in head.values() if p.ndim > 1]
    others = [p for p in head.values() if p.ndim == 1]
    adam = {"betas": (STEP["b1"], STEP["b2"]), "eps": STEP["eps"]}
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": STEP["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=STEP["learning_rate"],
        **adam,
    )
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=STEP["gan_learning_rate"], weight_decay=0.0, **adam
    )

    x = torch.from_numpy(images(seed).astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    y = model.decode(model.encode(x).latent).sample
    l1 = (y - x).abs().mean()
    lpips = judges.torch_lpips(
        judges.lpips_state("vgg", scale=1.0), lpips_linear(), y, x, "vgg", "lpips"
    ).mean()
    reconstruction = STEP["l1_weight"] * l1 + STEP["lpips_weight"] * lpips
    generator = -discriminator(y).mean()
    norms = [
        norm(torch.autograd.grad(loss, [head[LAST]], retain_graph=True))
        for loss in (reconstruction, generator)
    ]
    weight = STEP["gan_weight"] * (norms[0] / (norms[1] + 1e-6)).clamp(0, STEP["gan_adaptive_max"])
    loss = reconstruction + weight.detach() * generator
    gradients = dict(zip(head, torch.autograd.grad(loss, head.values()), strict=True))

    on_real, on_fake = discriminator(x), discriminator(y.detach())
    hinge = 0.5 * (torch.relu(1 - on_real).mean() + torch.relu(1 + on_fake).mean())
    parameters = dict(discriminator.named_parameters())
    d_gradients = dict(
        zip(parameters, torch.autograd.grad(hinge, parameters.values()), strict=True)
    )

    for name, parameter in head.items():
        parameter.grad = gradients[name].clone()
    torch.nn.utils.clip_grad_norm_(head.values(), STEP["clip_norm"])
    optimizer.step()
    for name, parameter in parameters.items():
        parameter.grad = d_gradients[name].clone()
    discriminator_optimizer.step()

    metrics = {
        "loss": loss,
        "l1": l1,
        "lpips": lpips,
        "psnr": 10 * torch.log10(4 / ((y.clamp(-1, 1) - x) ** 2).mean()),
        "grad_norm": norm(gradients.values()),
        "gan_g_loss": generator,
        "gan_d_loss": hinge,
        "gan_weight": weight,
        "reconstruction_grad_norm": norms[0],
        "gan_grad_norm": norms[1],
        "logits_real": on_real.mean(),
        "logits_fake": on_fake.mean(),
        "gan_accuracy": 0.5 * ((on_real > 0).float().mean() + (on_fake < 0).float().mean()),
    }
    trained = {n: v for n, v in model.state_dict().items() if re.fullmatch(TRAINED, n)}
    parts = {
        "metrics": metrics,
        "gradients": gradients,
        "trained": {n: v for n, v in trained.items() if not n.endswith("num_batches_tracked")},
        "discriminator_gradients": d_gradients,
        "discriminator": discriminator.state_dict(),
    }
    return {
        f"{part}/{name}": value.detach().numpy()
        for part, values in parts.items()
        for name, value in values.items()
    }


def discriminator_logits(channels, depth):
    """-> [B, h, w]: what a discriminator says of images of 64 pixels."""
    import torch

    x = torch.from_numpy(images(1, 64).astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        return loaded(patchgan(channels, depth), 1, GAIN)(x)[:, 0].numpy()


def make():
    out = step(seed=0)
    for channels, depth in DEPTHS:
        out[f"logits/{channels}x{depth}"] = discriminator_logits(channels, depth)
    partial = PATH.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, **out)
    os.replace(partial, PATH)
    sys.stdout.write(f"wrote {PATH}, {PATH.stat().st_size} bytes\n")
    for name, value in out.items():
        if name.startswith("metrics/"):
            sys.stdout.write(f"{name} {float(value):.6g}\n")


if __name__ == "__main__":
    make()
