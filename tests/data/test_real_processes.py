# SPDX-License-Identifier: Apache-2.0
"""Batches of 1, 2 and 4 processes, as training reads them."""

import numpy as np
import pytest
from PIL import Image
from support import data
from support.processes import processes

KINDS = ["folder", "webdataset", "arrow", "parquet"]
BROKEN = {  # record 13 of 24, in the second of two files
    "folder": "class1/04.png",
    "webdataset": "1.tar, class1/04.png",
    "arrow": "data-1.arrow, row 1",
    "parquet": "1.parquet, row group 0, row 1",
}

# For each source: reads global batches, and saves this process's rows as they are put on devices.
READING = """
import json, logging, sys
settings = json.loads(sys.argv[1])
import jax
if settings["processes"] > 1:
    jax.distributed.initialize(settings["address"], settings["processes"], settings["process"])
import numpy as np
from support import data
from dcae_jax.runtime import mesh as mesh_lib
assert len(jax.devices()) == jax.process_count() == settings["processes"]
said = {}
for kind, keys in settings["sources"].items():
    config = data.config(**keys, batch_size=8)
    mesh = mesh_lib.make_mesh(config.mesh)
    process, count = mesh_lib.process_batch_slice(mesh)
    lines = said[kind] = []
    handler = logging.StreamHandler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    for start, steps in settings["parts"]:
        batches, rows = data.batches(config, start * 8, process, count), {}
        for step in range(start, start + steps):
            for key, value in mesh_lib.put_batch(next(batches), mesh).items():
                for shard in value.addressable_shards:
                    rows[f"{step} {key} {shard.index[0].start or 0}"] = np.asarray(shard.data)
        name = f"{kind}-{settings['processes']}-{start}-{jax.process_index()}.npz"
        np.savez(f"{settings['out']}/{name}", **rows)
    logging.getLogger().removeHandler(handler)
print(json.dumps(said))
"""


def _images(folder):
    """Two dozen images in three classes, in which each crop is another; one is no image."""
    for i in range(24):
        path = folder / f"class{i // 9}" / f"{i % 9:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        slope = Image.linear_gradient("L").resize((24 + i, 40)).rotate(7 * i)
        Image.merge("RGB", (slope, slope.rotate(90), slope.rotate(180))).save(path)
    (folder / BROKEN["folder"]).write_bytes(b"\x89PNG not really")


def _joined(folder, kind, count, start):
    """{(step, key): global batch} of the rows that `count` processes saved."""
    found = {}
    for process in range(count):
        with np.load(folder / f"{kind}-{count}-{start}-{process}.npz") as rows:
            for name, value in rows.items():
                step, key, first = name.split()
                found.setdefault((int(step), key), {})[int(first)] = value
    return {k: np.concatenate([rows[i] for i in sorted(rows)]) for k, rows in found.items()}


@pytest.mark.slow
def test_sources_processes_and_resumes_all_give_the_same_global_batches(tmp_path):
    """Catches an order, a crop or a replacement that depends on the kind of source, on how many
    processes read, or on where a run of other processes stopped; and a broken record that no
    process names."""
    _images(tmp_path / "images")
    sources = {"folder": {"data__source": "folder", "data__path": str(tmp_path / "images")}}
    for kind in KINDS[1:]:
        sources[kind] = data.pack(tmp_path / "images", kind, tmp_path / kind)
    out = tmp_path / "out"
    out.mkdir()
    # (first batch, batches): all; of two processes that stop after 3, four go on to 5, one to 8.
    parts = {2: [(0, 8)], 4: [(0, 8), (3, 2)], 1: [(0, 8), (5, 3)]}
    said = {}
    for count, own in parts.items():
        settings = {"out": str(out), "parts": own, "sources": sources}
        for lines in processes(count, READING, settings):
            for kind, found in lines.items():
                said.setdefault((kind, count), []).extend(found)
    whole = _joined(out, "folder", 1, 0)
    assert len(whole) == 16 and whole[0, "image"].shape == (8, 16, 16, 3)
    assert len({value.tobytes() for (_, key), value in whole.items() if key == "image"}) == 8
    for kind in KINDS:
        for count in (1, 2, 4):
            _assert_same(_joined(out, kind, count, 0), whole)
            broken = [line for line in said[kind, count] if line.startswith("unreadable, replaced")]
            assert broken and {line.endswith(BROKEN[kind]) for line in broken} == {True}, broken
        resumed = _joined(out, kind, 4, 3) | _joined(out, kind, 1, 5)
        _assert_same(resumed, {key: value for key, value in whole.items() if key[0] >= 3})


def _assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=str(key))
