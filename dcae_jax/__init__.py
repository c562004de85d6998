# SPDX-License-Identifier: Apache-2.0
"""Deep compression autoencoders (DC-AE) in JAX, and latent diffusion on top of them.

ae = dcae_jax.load_autoencoder(path)
z = ae.encode(x)     # x [B, H, W, 3] float32 in [-1, 1]
y = ae.decode(z)
images = dcae_jax.load_generator(path).sample(labels, guidance=1.5)  # [B, H, W, 3] uint8
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "Autoencoder",
    "Generator",
    "SampleSettings",
    "create_autoencoder",
    "load_autoencoder",
    "load_generator",
    "__version__",
]


def __getattr__(name: str):
    # Lazily, so that `import dcae_jax` costs no more than its name.
    if name in __all__:
        return getattr(importlib.import_module("dcae_jax.api"), name)
    raise AttributeError(f"module 'dcae_jax' has no attribute {name!r}")
