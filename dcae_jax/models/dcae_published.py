# SPDX-License-Identifier: Apache-2.0
"""The names under which DC-AE's authors publish weights."""

import re

# Published name -> (variant, scaling factor of those weights).
PUBLISHED = {
    "dc-ae-f32c32-in-1.0": ("f32c32", 0.3189),
    "dc-ae-f32c32-mix-1.0": ("f32c32", 0.4552),
    "dc-ae-f64c128-in-1.0": ("f64c128", 0.2889),
    "dc-ae-f64c128-mix-1.0": ("f64c128", 0.4538),
    "dc-ae-f128c512-in-1.0": ("f128c512", 0.4883),
    "dc-ae-f128c512-mix-1.0": ("f128c512", 0.3620),
    "dc-ae-f32c32-sana-1.0": ("f32c32-sana", 0.41407),
    "dc-ae-f32c32-sana-1.1": ("f32c32-sana", 0.41407),
    "dc-ae-lite-f32c32": ("f32c32-lite", 0.41407),
    "dc-ae-lite-f32c32-sana-1.1": ("f32c32-lite", 0.41407),
    "dc-ae-f32c128-1.5": ("1.5-f32c128", None),
    "dc-ae-f64c128-1.5": ("1.5-f64c128", 0.5935),
    "dc-ae-1.5-f32c128": ("1.5-f32c128", None),  # the same two by their newer names
    "dc-ae-1.5-f64c128": ("1.5-f64c128", 0.5935),
    "dc-ae-f32c128-1.1": ("1.5-f32c128", None),  # trained without structure
}
# A suffix of f32c128's names: all 128 channels, but trained further on the first N alone.
CUT = re.compile(r"(dc-ae-f32c128-1\.[15]|dc-ae-1\.5-f32c128)-c(?:16|32|48|64|80|96|112)")
