# SPDX-License-Identifier: Apache-2.0
"""Deep compression autoencoders (DC-AE) in JAX, and latent diffusion on top of them.

ae = dcae_jax.load_autoencoder(path)
z = ae.encode(x)     # x [B, H, W, 3] float32 in [-1, 1]
y = ae.decode(z)
images = dcae_jax.load_generator(path).sample(labels, guidance=1.5)  # [B, H, W, 3] uint8
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> module, imported at its first use: `import dcae_jax` costs no more than its name.
_HOMES = {
    "Autoencoder": "dcae_jax.api.autoencoder",
    "Generator": "dcae_jax.api.generator",
    "SampleSettings": "dcae_jax.api.generator",
    "create_autoencoder": "dcae_jax.api.autoencoder",
    "load_autoencoder": "dcae_jax.api.autoencoder",
    "load_generator": "dcae_jax.api.generator",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dcae_jax' has no attribute {name!r}")
