# SPDX-License-Identifier: Apache-2.0
"""Configurations of data, and batches of them."""

import io
import itertools
import json
import os
import pathlib
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from dcae_jax import config as config_lib
from dcae_jax.config.schema import Data
from dcae_jax.data import latents, pipeline, sources


def config(**changes):
    """A ConfigDict with batches of 4 at 16 pixels; changes: data__path=..., seed=..."""
    config = config_lib.default()
    config.batch_size, config.resolution, config.seed = 4, 16, 7
    config.data.threads = 2
    with config.unlocked():
        for key, value in changes.items():
            config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def section(config):
    """config.data of a ConfigDict, as functions take it; not validated."""
    return Data(**config.data.to_dict())


def batches(config, start=0, process=0, processes=1):
    """`training_batches` of a ConfigDict."""
    settings = section(config)
    on_latents = settings.source == "latents"
    return pipeline.training_batches(
        latents.latents(settings.path) if on_latents else sources.training_source(settings),
        settings,
        seed=config.seed,
        batch_size=config.batch_size,
        sizes=config.resolutions or (config.resolution,),
        start=start,
        process=process,
        processes=processes,
    )


def take(config, count, start=0, process=0, processes=1):
    """The first `count` of them."""
    return list(itertools.islice(batches(config, start, process, processes), count))


def pack(folder, kind, path):
    """Packs the images below `folder`, in sorted order, as a webdataset, arrow or parquet set.

    Returns the keys of config.data that read them. Two tars or files; parquet: row groups of 3.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True)
    names = sorted(str(p.relative_to(folder)) for p in pathlib.Path(folder).rglob("*.png"))
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:])):
        encoded = [(pathlib.Path(folder) / name).read_bytes() for name in part]
        labels = [classes.index(name.split("/")[0]) if classes else 0 for name in part]
        if kind == "webdataset":
            with tarfile.open(path / f"{number}.tar", "w") as tar:
                for name, data, label in zip(part, encoded, labels, strict=True):
                    _add(tar, name, data)
                    _add(tar, name.removesuffix(".png") + ".cls", str(label).encode())
                    _add(tar, name.removesuffix(".png") + ".json", b"{}")
            os.utime(path / f"{number}.tar", (1e9, 1e9))  # long ago, so that it is indexed
            continue
        images = [{"bytes": b, "path": n} for b, n in zip(encoded, part, strict=True)]
        table = pa.table({"image": images, "label": labels})
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
        if kind == "parquet":
            pq.write_table(table, path / f"{number}.parquet", row_group_size=3)
        else:
            with pa.OSFile(str(path / f"data-{number}.arrow"), "wb") as file:
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=2)
    if kind == "arrow":
        state = {"_data_files": [{"filename": f"data-{n}.arrow"} for n in range(2)]}
        (path / "state.json").write_text(json.dumps(state))
    source = "webdataset" if kind == "webdataset" else "huggingface"
    return {"data__source": source, "data__path": str(path)}


def _add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
