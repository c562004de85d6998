# SPDX-License-Identifier: Apache-2.0
"""Deep compression autoencoders (DC-AE) in JAX: training, evaluation, weights in and out.

ae = dcae_jax.load_autoencoder(path)
z = ae.encode(x)     # x [B, H, W, 3] float32 in [-1, 1]
y = ae.decode(z)
"""

import importlib

__version__ = "0.1.0"
__all__ = ["Autoencoder", "create_autoencoder", "load_autoencoder", "__version__"]


def __getattr__(name: str):
    # Lazily, so that `import dcae_jax` costs no more than its name.
    if name in __all__:
        return getattr(importlib.import_module("dcae_jax.api"), name)
    raise AttributeError(f"module 'dcae_jax' has no attribute {name!r}")
