# SPDX-License-Identifier: Apache-2.0
"""The net's cases: {name: function of a Space -> what is recorded}.

A result is JSON: under 'rows' metrics by step, under 'tensors' and
'arrays' summaries, under 'values' numbers,
under 'sha256' digests, which hold on one machine alone, under 'exact' anything else.
"""

from collections.abc import Callable
from typing import Any

import mistakes
import outputs
import resume
import training
from space import Space

CASES: dict[str, Callable[[Space], dict[str, Any]]] = {
    **training.CASES,
    **mistakes.CASES,
    **outputs.CASES,
    **resume.CASES,
}
