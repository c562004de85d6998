# SPDX-License-Identifier: Apache-2.0
"""`python -m dcae_jax.demo`, the same as `dcae-jax demo`."""

import sys

from dcae_jax.demo import page

if __name__ == "__main__":
    sys.exit(page.main())
