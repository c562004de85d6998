# SPDX-License-Identifier: Apache-2.0
"""python -m dcae_jax.demo --workdir=demo-run"""

import sys

from dcae_jax.demo import page

if __name__ == "__main__":
    sys.exit(page.command(sys.argv))
