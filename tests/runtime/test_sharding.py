# SPDX-License-Identifier: Apache-2.0
"""Any mesh trains as one device does, and nothing is put together that could stay split."""

import dataclasses
import functools
import os
import re
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from support import CONFIGS

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.errors import UserError
from dcae_jax.runtime import mesh as mesh_lib
from dcae_jax.runtime import sharding
from dcae_jax.setup import resolve, tables
from dcae_jax.setup import run as run_lib
from dcae_jax.training import state as state_lib
from dcae_jax.training import step as step_lib

STEPS = 5
SPLIT = 64  # weights of so many numbers are split: those of the tests are all small
FSDP = (("data", 2), ("fsdp", 4))
SPATIAL = (("spatial", 4),)
slow = pytest.mark.slow


def _mesh(axes):
    sizes = config_lib.default().mesh
    sizes.update({"data": 1, **dict(axes)})
    count = int(np.prod([sizes[axis] for axis in mesh_lib.AXES]))
    return mesh_lib.make_mesh(sizes, jax.devices()[:count])


def _config(kind):
    """The shipped config of 'phase1', ..., 'uvit' or 'dit', narrow; 'phase1@128': at 128 pixels;
    'uvit muon': its kernels trained by Muon."""
    kind, _, muon = kind.partition(" ")
    name, _, size = kind.partition("@")
    config = config_lib.load_file(os.path.join(CONFIGS, f"{name}.py"), "tiny")
    config.optimizer.muon = (".*kernel",) if muon else ()
    config.batch_size = 8
    config.optimizer.warmup_steps = 0
    # Where a gradient is zero but for rounding, Adam would make a step of its sign.
    config.optimizer.eps = 1e-4
    if config.objective:
        config.model.width, config.model.heads, config.model.depth = 32, 4, 4
        config.model.latent_size, config.model.latent_channels = 4, 8
        config.model.num_classes, config.model.scaling_factor = 10, 1.0
        return config
    config.model.widths, config.model.latent_channels = (8, 8, 16, 32, 32), 8
    config.resolution, config.resolutions = int(size or 32), ()
    if size:
        config.batch_size = 2
    config.loss.gan_channels, config.loss.gan_warmup_steps = 8, 1
    return config


def _batch(config, seed):
    rng = np.random.default_rng(seed)
    if config.objective:
        shape = (config.batch_size, *[config.model.latent_size] * 2, config.model.latent_channels)
        latent = rng.standard_normal(shape, np.float32).astype(jnp.dtype(config.encode.dtype))
        return {"latent": latent, "label": rng.integers(0, 10, config.batch_size, np.int32)}
    shape = (config.batch_size, config.resolution, config.resolution, 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    return {"image": pixels, "label": np.zeros(config.batch_size, np.int32)}


@functools.cache
def _program(kind, axes):
    """(config, mesh, plan, state as shapes, compiled step)."""
    config, mesh = _config(kind), _mesh(axes)
    with mock.patch.object(sharding, "SMALL", SPLIT):
        spec = state_lib.train_spec(config, mesh)
        abstract = state_lib.abstract_state(config.sharding, mesh, spec)
        (size,) = run_lib.batch_sizes(config)
        step = step_lib.jit_step(config, spec, abstract)
        traced = step.trace(abstract, run_lib.abstract_batch(config, size, mesh), {})
        return config, mesh, spec, abstract, traced.lower().compile()


def _start(kind, axes):
    config, mesh, spec, _, _ = _program(kind, axes)
    with mock.patch.object(sharding, "SMALL", SPLIT):
        return state_lib.init_state(config, mesh, spec)


def _steps(kind, axes, now, first, last):
    """(the state after the steps first .. last - 1, their metrics)."""
    config, mesh, _, _, step = _program(kind, axes)
    rows = []
    for seed in range(first, last):
        now, metrics = step(now, mesh_lib.put_batch(_batch(config, seed), mesh), {})
        rows.append({name: float(value) for name, value in metrics.items()})
    return now, rows


@functools.cache
def _run(kind, axes):
    """(running statistics after two steps, metrics of each of five steps)."""
    now, rows = _steps(kind, axes, _start(kind, axes), 0, 2)
    stats = {name: np.asarray(value) for name, value in now.stats.items()}
    return stats, rows + _steps(kind, axes, now, 2, STEPS)[1]


def _assert_alike(rows, wanted, first=False):
    """first: the rows begin at the first step, whose gradients are alike but for rounding.

    Later a ReLU may be open on one side alone, which the norm of the gradients shows at once.
    """
    for i, (row, want) in enumerate(zip(rows, wanted, strict=True)):
        for name, value in want.items():
            loose = 5e-3 if "grad_norm" in name else 2e-4
            tolerance = 2e-5 if first and i == 0 else loose
            np.testing.assert_allclose(row[name], value, rtol=tolerance, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(row["loss"], want["loss"], rtol=2e-5)


@pytest.mark.parametrize(
    "kind, axes",
    [
        ("uvit", (("tensor", 4),)),
        pytest.param("phase1@128", SPATIAL, marks=slow),
        pytest.param("uvit", FSDP, marks=slow),
        *[
            pytest.param(kind, axes, marks=slow)
            for kind in ("phase1", "phase2", "phase3")
            for axes in ((("data", 8),), (("fsdp", 8),), FSDP)
        ],
        pytest.param("phase2@128", SPATIAL, marks=slow),
        pytest.param("phase3@128", SPATIAL, marks=slow),
        pytest.param("phase1@128", (("data", 2), ("spatial", 4)), marks=slow),
        pytest.param("uvit", (("data", 8),), marks=slow),
        pytest.param("uvit", (("fsdp", 8),), marks=slow),
        pytest.param("uvit", (("fsdp", 2), ("tensor", 4)), marks=slow),
        pytest.param("dit", (("fsdp", 2), ("tensor", 4)), marks=slow),
        pytest.param("phase1 muon", FSDP, marks=slow),
        pytest.param("uvit muon", (("fsdp", 2), ("tensor", 4)), marks=slow),
    ],
)
def test_a_mesh_trains_as_one_device_does(kind, axes):
    """Catches statistics of one device's share of the batch or of the height, a gradient summed
    twice, heads of q beside those of another k, and a halo that is not exchanged."""
    stats, rows = _run(kind, axes)
    one_stats, one_rows = _run(kind, ())
    _assert_alike(rows, one_rows, first=True)
    # After two steps: later a ReLU that is open on one side alone may move a mean near zero.
    for name, want in one_stats.items():
        np.testing.assert_allclose(stats[name], want, rtol=1e-4, atol=1e-6, err_msg=name)


def _collectives(text, kind):
    """Bytes of the results of each collective of this kind, all of them float32."""
    found = re.findall(rf"= \(?(.*?)\)? {kind}(?:-start)?\(", text)
    shapes = [re.findall(r"f32\[([\d,]*)\]", result) for result in found]
    return [
        sum(4 * int(np.prod([int(n) for n in shape.split(",") if n])) for shape in result)
        for result in shapes
    ]


@pytest.mark.parametrize("kind", ["uvit", "phase1", "phase3"])
@pytest.mark.slow
def test_fsdp_puts_one_layer_together_at_a_time(kind):
    """Catches a stack of layers, or the batch's activations, gathered on every device: both are
    what XLA does without constraints on how weights are used."""
    _, _, spec, _, step = _program(kind, FSDP)
    text = step.as_text()
    layers = [
        4 * leaf.size // (leaf.shape[0] if "*" in k else 1) for k, leaf in spec.params.items()
    ]
    total = sum(4 * leaf.size for leaf in spec.params.values())
    gathered = _collectives(text, "all-gather")
    assert gathered and max(gathered) <= max(total // 4, max(layers))
    other = sum(4 * w.size for w in spec.discriminator.params.values()) if spec.discriminator else 0
    assert sum(gathered) <= 1.1 * (total + 2 * other)
    assert sum(_collectives(text, "all-to-all")) <= 0.01 * total


def _scans(jaxpr):
    """All loops over layers in a program, also those inside others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _scans(inner)


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_the_backward_pass_keeps_activations_and_gathers_weights_again(kind):
    """Catches a remat policy that keeps whole weights of all layers, or computes all again."""
    config, mesh = _config(kind), _mesh(FSDP)
    with mock.patch.object(sharding, "SMALL", SPLIT):
        plan = state_lib.train_spec(config, mesh)
        abstract = state_lib.abstract_state(config.sharding, mesh, plan)
        (size,) = run_lib.batch_sizes(config)
        batch = run_lib.abstract_batch(config, size, mesh)
        program = step_lib.jit_step(config, plan, abstract).trace(abstract, batch, {}).jaxpr
    stacks = {leaf.shape for name, leaf in plan.params.items() if "*" in name and leaf.ndim > 2}
    forward = [scan for scan in _scans(program.jaxpr) if not scan.params["reverse"]]
    kept = {out.aval.shape for scan in forward for out in scan.outvars}
    assert forward and not kept & stacks
    c, heads = config.model.width, config.model.heads
    tokens = config.model.latent_size**2 + (2 if kind == "uvit" else 0)
    layers = config.model.depth // (2 if kind == "uvit" else 1)
    rows = (layers, config.batch_size, tokens)
    assert {(*rows, 3, heads, c // heads), (*rows, 4 * c)} <= kept


def test_tensor_adds_up_twice_a_block_and_direction():
    """Catches activations that are gathered between a block's halves, and heads split so that
    the products of q and k need another device."""
    config, mesh, spec, _, step = _program("uvit", (("tensor", 4),))
    tokens = 4 * config.batch_size * (2 + config.model.latent_size**2) * config.model.width
    sums = [size for size in _collectives(step.as_text(), "all-reduce") if size == tokens]
    # Forward: in_blocks, mid_block, out_blocks, the last with its skip; then backward.
    assert len(sums) <= 2 + 2 + 3 + 3 * 2
    wide = [size for size in _collectives(step.as_text(), "all-gather") if size >= tokens]
    assert len(wide) <= 2  # the gradient of the skip, back to both of its halves


def test_moments_averages_and_discriminator_lie_as_the_weights_do():
    """Catches moments on every device beside split weights, and a layer axis that is split."""
    phase = _config("phase3")
    phase.trainable = (".*",)
    cases = (phase, FSDP), (_config("uvit"), (("fsdp", 2), ("tensor", 4)))
    with mock.patch.object(sharding, "SMALL", SPLIT):
        for config, axes in cases:
            mesh = _mesh(axes)
            spec = state_lib.train_spec(config, mesh)
            abstract = state_lib.abstract_state(config.sharding, mesh, spec)
            for part in filter(None, (abstract, abstract.discriminator)):
                whole = 4 * sum(leaf.size for leaf in part.params.values())
                assert sharding.chip_bytes(part.params) < 0.4 * whole
                assert (
                    sharding.chip_bytes(part.opt_state) <= 2 * sharding.chip_bytes(part.params) + 8
                )
            for name, leaf in abstract.ema.items():
                kept = {**abstract.params, **abstract.stats}[name]
                assert leaf.sharding == kept.sharding
            for name, leaf in abstract.params.items():
                assert "*" not in name or leaf.sharding.spec[:1] in ((), (None,)), name
    table = tables.memory(abstract, mesh)
    assert "fsdp=2, tensor=4" in table and "moments" in table
    chip, whole = map(float, table.splitlines()[-1].split()[1:])
    assert 0.1 < chip / whole < 0.4


def test_rules_split_kernels_by_their_inputs_or_outputs():
    """Catches a rule that splits the wrong axis, the layers, or what does not divide."""
    mesh = _mesh((("fsdp", 2), ("tensor", 4)))
    with mock.patch.object(sharding, "SMALL", SPLIT):
        spec = functools.partial(sharding.weight_spec, mesh=mesh, stacked=True)
        assert tuple(spec((28, 64, 256), "columns")) == (None, "fsdp", "tensor")
        assert tuple(spec((28, 256, 64), "rows")) == (None, ("tensor", "fsdp"))
        assert tuple(spec((28, 256), "columns")) == (None, ("tensor", "fsdp"))
        assert tuple(spec((64, 8, 16), "fsdp")) == (None, None, "fsdp")
        assert tuple(spec((28, 66, 6), "rows")) == (None, "fsdp")
        assert tuple(spec((28, 64, 64), "replicate")) == ()
    with pytest.raises(UserError, match="'row'.*rows"):
        sharding.check_rules(((".*", "row"),))
    with pytest.raises(UserError, match=r"\(blocks"):
        sharding.check_rules((("(blocks", "fsdp"),))


def test_a_mesh_that_does_not_suit_the_model_is_refused():
    """Catches devices that all do the same, and errors of XLA's about an odd axis."""
    mesh = _mesh((("tensor", 4),))
    config = _config("phase1")
    with pytest.raises(UserError, match="mesh.tensor=4 shards no weight"):
        sharding.check_tensor(state_lib.train_spec(config, mesh).params, config.sharding, mesh)
    config = _config("uvit")
    sharding.check_tensor(state_lib.train_spec(config, mesh).params, config.sharding, mesh)
    config.model.heads, config.model.width = 2, 32
    with pytest.raises(UserError, match="does not divide the 2 heads"):
        state_lib.train_spec(config, mesh)
    config = _config("phase1")
    config.resolution = 80
    mesh = _mesh((("spatial", 3),))
    with pytest.raises(UserError, match="resolution=80 .* multiple of 48, at least 96; try 96$"):
        resolve.check_training(config_lib.validate(config), mesh)
    config.resolution = 96
    config.evaluate.resolutions = (112,)
    with pytest.raises(UserError, match="evaluate.resolutions=112 .* try 96 or 144"):
        resolve.check_training(config_lib.validate(config), mesh)


@dataclasses.dataclass(frozen=True)
class _Device:
    process_index: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Hosts:
    """A mesh over devices of other processes."""

    devices: np.ndarray

    @property
    def shape(self):
        return dict(zip(mesh_lib.AXES, self.devices.shape, strict=True))


@pytest.mark.parametrize(
    "shape, share, places",
    [
        ((8, 1, 1, 1), (1, 4), (2, 3)),  # each its own images
        ((1, 2, 1, 4), (0, 2), (0,)),  # processes 0 and 1 have the halves of the same images
        ((2, 1, 4, 1), (0, 2), (0,)),
        ((1, 1, 8, 1), (0, 1), (0,)),  # all have all
    ],
)
def test_processes_read_the_images_that_their_devices_have(shape, share, places, monkeypatch):
    """Catches halves of different pictures put together where height is split over processes."""
    devices = np.array([_Device(i // 2) for i in range(8)], object).reshape(shape)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    mesh = _Hosts(devices)
    assert mesh_lib.process_batch_slice(mesh) == share
    assert mesh_lib._places(mesh)[1] == places


def test_shares_that_overlap_in_part_are_refused():
    """Catches batches of different sizes on different processes, which would hang."""
    devices = np.array([_Device(i // 2) for i in range(6)], object).reshape(2, 1, 3, 1)
    with pytest.raises(UserError, match="overlapping slices"):
        mesh_lib.process_batch_slice(_Hosts(devices))


@pytest.fixture(scope="module")
def pair():
    """The same autoencoder on one device and with the height over four."""
    return [dcae_jax.create_autoencoder("tiny", 3, mesh=_mesh(a)) for a in ((), (("spatial", 4),))]


def test_several_devices_encode_and_decode_one_image(pair):
    """Catches attention over a part of the height, a missing halo, and heights that do not divide.

    144 rows are 9 rows of latents, which stay whole while their image is split. Of 80, nothing is.
    """
    one, four = pair
    x = np.random.default_rng(0).uniform(-1, 1, (1, 144, 32, 3)).astype(np.float32)
    z = four.encode(x)
    np.testing.assert_allclose(z, one.encode(x), atol=2e-4, rtol=1e-4)
    y = four.decode(np.asarray(z))
    assert y.sharding.shard_shape(y.shape) == (1, 36, 32, 3)
    np.testing.assert_allclose(y, one.decode(np.asarray(z)), atol=2e-4, rtol=1e-4)
    assert four._place(x, 16).sharding.shard_shape(x.shape) == (1, 36, 32, 3)
    assert four._place(x[:, :80], 16).sharding.is_fully_replicated


@pytest.mark.slow
def test_several_devices_need_less_memory_for_one_image(pair):
    """Catches an image that is put together on each device before it is decoded."""
    z = np.zeros((1, 32, 32, 32), np.float32)
    sizes = []
    for ae in pair:
        text = ae._decode.lower(ae.weights, ae._place(z)).compile().as_text()
        shapes = re.findall(r"f32\[1,([\d,]+)\]", text)
        sizes.append(max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes))
    whole, part = sizes
    assert part < 0.35 * whole


@slow
@pytest.mark.parametrize("there", [(), (("data", 2), ("fsdp", 2))], ids=["one", "four"])
def test_eight_devices_save_and_fewer_go_on(there, tmp_path):
    """Catches a checkpoint that goes on from anything but where it stood: moments in the order of
    the devices, averages or counters left out."""
    now, _ = _steps("phase1", FSDP, _start("phase1", FSDP), 0, 2)
    manager = checkpoints.open_manager(str(tmp_path), 1)
    checkpoints.save(manager, now, {}, 2, 16)
    manager.wait_until_finished()
    back, _, index = checkpoints.restore(manager, 2, _program("phase1", there)[3], {})
    manager.close()
    assert index == 16 and int(back.step) == 2
    _, rows = _steps("phase1", there, back, 2, STEPS)
    _assert_alike(rows, _run("phase1", ())[1][2:])


def test_fsdp_splits_the_largest_axis_that_divides():
    """Catches small biases split over chips, and kernels split along an axis of 3."""
    sizes = config_lib.default().mesh
    sizes.fsdp = 8
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:8])

    def spec(*shape, rule="fsdp"):
        return tuple(sharding.weight_spec(shape, rule, mesh))

    assert spec(3, 3, 64, 256) == (None, None, None, "fsdp")
    assert spec(3, 3, 512, 36) == (None, None, "fsdp")
    assert spec(64) == () and spec(3, 3, 64, 256, rule="replicate") == ()
