# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/gpu.py that run PyTorch: diffusers' AutoencoderDC, and a plain UViT."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from autoencoder import their_model
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

F32C32 = ((128, 256, 512, 512, 1024, 1024), (0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2), 32)
TINY = ((16, 32, 64, 64, 128, 128), (0, 1, 1, 1, 1, 1), (0, 1, 1, 1, 1, 1), 32)
EMA = 1e-4  # 1 - decay
torch.backends.cudnn.benchmark = True


# --- autoencoder ----------------------------------------------------------------------------------


def coder(batch: int, tiny: bool, what: str, size: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """Encode or decode in bfloat16, channels last."""
    batch, size, device = (2, 64, "cpu") if tiny else (batch, size, "cuda")
    with torch.device(device):
        model = their_model(*(TINY if tiny else F32C32)).eval()
        model.to(torch.bfloat16, memory_format=torch.channels_last)
        shape = (3, size, size) if what == "encode" else (32, size // 32, size // 32)
        x = torch.randn(batch, *shape, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    run = getattr(model, what)
    run = torch.compile(run, mode="max-autotune") if compiled else run

    def call() -> None:
        with torch.no_grad():
            run(x)

    yield measured(call, device, batch, model)


def train(batch: int, tiny: bool, what: str, size: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """A training step: L1, clipping, AdamW and moving averages, under bfloat16 autocast."""
    del what
    batch, size, device = (2, 64, "cpu") if tiny else (batch, size, "cuda")
    with torch.device(device):
        model = their_model(*(TINY if tiny else F32C32)).train()
        model.to(memory_format=torch.channels_last)
        x = torch.rand(batch, 3, size, size) * 2 - 1
    x = x.to(memory_format=torch.channels_last)

    def loss() -> torch.Tensor:
        return (model.decode(model.encode(x).latent).sample - x).abs().mean()

    run = torch.compile(loss, mode="max-autotune") if compiled else loss
    yield measured(_step(model, run, device, clip=1.0), device, batch, model)


# --- UViT -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, then MLP; with `skip`, a stored output is concatenated first."""

    def __init__(self, width: int, heads: int, skip: bool):
        super().__init__()
        self.heads = heads
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], -1))
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """(x [B, c, h, w], t [B], labels [B]) -> [B, c, h, w], h = w = side.

    rematerialise: recomputes each block in the backward pass.
    """

    def __init__(
        self,
        *,
        side: int,
        channels: int,
        patch: int,
        width: int,
        heads: int,
        depth: int,
        classes: int = 1000,
        rematerialise: bool = False,
    ):
        super().__init__()
        self.side, self.patch_size, self.width = side // patch, patch, width
        self.rematerialise = rematerialise
        self.patch = nn.Conv2d(channels, width, patch, stride=patch)
        self.label = nn.Embedding(classes + 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.side**2 + 2, width))
        self.ins = nn.ModuleList(Block(width, heads, False) for _ in range(depth // 2))
        self.mid = Block(width, heads, False)
        self.outs = nn.ModuleList(Block(width, heads, True) for _ in range(depth // 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, patch**2 * channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        scale = -math.log(10000.0) / half
        angles = t[:, None] * torch.exp(scale * torch.arange(half, device=t.device))
        time_token = torch.cat([angles.cos(), angles.sin()], -1)[:, None]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.label(labels)[:, None], time_token, x], 1) + self.positions
        kept = []
        for block in self.ins:
            x = self.run(block, x)
            kept.append(x)
        x = self.run(self.mid, x)
        for block in self.outs:
            x = self.run(block, x, kept.pop())
        x = self.head(self.norm(x))[:, 2:].transpose(1, 2)  # [B, c p^2, P]
        x = x.reshape(len(x), -1, self.side, self.side)
        return functional.pixel_shuffle(x, self.patch_size)

    def run(self, block: nn.Module, *values: torch.Tensor) -> torch.Tensor:
        if self.rematerialise:
            return checkpoint(block, *values, use_reentrant=False)
        return block(*values)


def uvit(batch: int, tiny: bool, side: int, channels: int, patch: int) -> Iterator[dict[str, Any]]:
    """UViT-H's training step on random latents, under bfloat16 autocast, its blocks compiled."""
    sizes = {"width": 1152, "heads": 16, "depth": 28}
    device = "cuda"
    if tiny:
        batch, device, sizes = 2, "cpu", {"width": 128, "heads": 4, "depth": 4}
    with torch.device(device):
        model = UViT(side=side, channels=channels, patch=patch, rematerialise=True, **sizes)
        x = torch.randn(batch, channels, side, side)
        labels = torch.zeros(batch, dtype=torch.long)
    for block in (*model.ins, model.mid, *model.outs):
        block.compile()

    def loss() -> torch.Tensor:
        noise, signal = torch.randn_like(x), torch.rand(batch, 1, 1, 1, device=device)
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        return (model(noisy, 1000 * signal[:, 0, 0, 0], labels) - noise).square().mean()

    yield measured(_step(model, loss, device, clip=0.0), device, batch, model)


# --- measuring ------------------------------------------------------------------------------------


def _step(
    model: nn.Module, loss: Callable[[], torch.Tensor], device: str, clip: float
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    weights = [weight.detach() for weight in model.parameters()]
    averages = [weight.clone() for weight in weights]

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            value = loss()
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        torch._foreach_lerp_(averages, weights, EMA)

    return call


def measured(
    call: Callable[[], None], device: str, images: int, model: nn.Module
) -> dict[str, Any]:
    """A row; compile_s is the first call's seconds, peak_gb PyTorch's peak allocation."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    call()
    wait()
    first = time.perf_counter() - began
    row = common.steady(call, wait)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return row | {
        "batch": images,
        "images_per_s": images / row["seconds"],
        "compile_s": first,
        "peak_gb": peak,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
