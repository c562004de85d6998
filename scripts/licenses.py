# SPDX-License-Identifier: Apache-2.0
"""Writes docs/licenses.md and requirements.lock: what a plain installation brings along.

    python scripts/licenses.py

Reads the metadata of the packages installed here, from dcae_jax's own requirements onwards.
"""

import importlib.metadata
import os
import re

from packaging.requirements import Requirement

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> dict[str, importlib.metadata.Distribution]:
    """Distributions by name that dcae_jax requires, with the extras that another one asks for."""
    found, seen, waiting = {}, set(), [("dcae_jax", "")]
    while waiting:
        name, extra = waiting.pop()
        name = canonical(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system or Python
            continue
        for line in found[name].requires or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                waiting += [(wanted.name, more) for more in ("", *wanted.extras)]
    return found


def license_of(distribution: importlib.metadata.Distribution) -> str:
    """The license as the package states it: expression, classifiers, or the field's first line."""
    meta = distribution.metadata
    if meta.get("License-Expression"):
        return meta["License-Expression"]
    classifiers = [c for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    names = [c.rsplit(" :: ", 1)[1] for c in classifiers if c.count("::") > 1]
    field = (meta.get("License") or "").strip().splitlines()
    return ", ".join(names) or (field[0][:60] if field else "not stated")


def main() -> None:
    others = sorted((name, d) for name, d in needed().items() if name != "dcae-jax")
    rows = [f"| {name} | {d.version} | {license_of(d)} |" for name, d in others]
    with open(os.path.join(ROOT, "requirements.lock"), "w", encoding="utf-8") as file:
        file.write(
            "# Versions of one installation without extras (Linux, Python 3.11). To get the same:\n"
            "#     pip install -c requirements.lock -e .\n"
            "# Written by `python scripts/licenses.py`.\n"
        )
        file.writelines(f"{name}=={d.version}\n" for name, d in others)
    head = (
        "# Licenses of what is installed along\n\n"
        "Written by `python scripts/licenses.py`. dcae_jax itself is under Apache-2.0, the LPIPS\n"
        "layers that it carries under the license in `dcae_jax/models/lpips_linear.LICENSE`.\n\n"
        "| package | version | license |\n|---|---|---|\n"
    )
    with open(os.path.join(ROOT, "docs", "licenses.md"), "w", encoding="utf-8") as file:
        file.write(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
