# SPDX-License-Identifier: Apache-2.0
"""Matrix products and convolutions of a lowered program."""

import re

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")


def products(lowered):
    """[(dtypes of the operands, whether both are of the highest precision)] of a jax Lowered."""
    found = []
    for line in PRODUCT.findall(lowered.as_text()):
        operands = re.search(r": \(tensor<([^>]*)>, tensor<([^>]*)>\)", line)
        dtypes = {operand.split("x")[-1] for operand in operands.groups()}
        found.append((dtypes, line.count("HIGHEST") == 2))
    return found
