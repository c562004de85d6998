# SPDX-License-Identifier: Apache-2.0
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import judges
from safetensors.numpy import load_file, save_file

from dcae_jax.models import lpips, lpips_torch

NETS = ("vgg", "alex")
distance = jax.jit(lpips.distance, static_argnames=("net", "normalize"))


@functools.cache
def weights(net):
    return lpips_torch.from_torch(judges.lpips_state(net))[1]


def pair(size=64):
    return [judges.pictures(2, size, seed) / np.float32(127.5) - 1 for seed in (1, 2)]


@functools.partial(jax.jit, static_argnames=("net", "normalize"))
def value_and_gradient(weights, x, y, net, normalize="lpips"):
    """-> ([B], the gradient of their sum with respect to x)."""

    def total(x):
        value = lpips.distance(weights, x, y, net, normalize)
        return value.sum(), value

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return value, gradient


def save(path, arrays, network):
    save_file(arrays, path, metadata={"network": network})
    return path


@pytest.mark.parametrize("normalize", ["lpips", "torchmetrics"])
@pytest.mark.parametrize("net", NETS)
def test_equals_the_golden_distance(net, normalize):
    """Fails on a wrong tap, padding, input scaling, linear layer or the other normalisation."""
    found = distance(weights(net), *pair(), net, normalize)
    expected = json.loads(judges.PATH.read_text())
    np.testing.assert_allclose(found, expected[f"{net} {normalize}"], rtol=0, atol=1e-6)
    other = expected[f"{net} {'lpips' if normalize == 'torchmetrics' else 'torchmetrics'}"]
    assert np.abs(np.asarray(found) - other).min() > 1e-5
    assert found.dtype == jnp.float32


@pytest.mark.torch
@pytest.mark.parametrize("normalize", ["lpips", "torchmetrics"])
@pytest.mark.parametrize("net", NETS)
def test_equals_plain_torch_live(net, normalize):
    """Fails if value or gradient part from PyTorch's at a size that the poolings do not divide."""
    torch = pytest.importorskip("torch")
    x, y = pair(51)
    linear = list(lpips.linear_layers(net).values())
    u, v = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, y))
    u.requires_grad_()
    expected = judges.torch_lpips(judges.lpips_state(net), linear, u, v, net, normalize)
    expected.sum().backward()

    found, gradient = value_and_gradient(weights(net), x, y, net, normalize)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    expected = u.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


def test_gradient_steps_reduce_it():
    """Fails if the gradient has the wrong sign or never reaches the first argument."""
    x, y = pair(32)
    values = []
    for _ in range(6):
        value, gradient = value_and_gradient(weights("alex"), x, y, "alex")
        values.append(float(value.mean()))
        x = x - 0.05 * gradient / jnp.abs(gradient).max()
    assert all(b < a for a, b in zip(values, values[1:], strict=False)), values
    assert 0 < values[-1] < 0.9 * values[0], values


@pytest.mark.parametrize("normalize", ["lpips", "torchmetrics"])
def test_gradient_is_finite_where_features_vanish(normalize):
    """Fails if the root of a norm that is zero, or underflows to it, makes the gradient NaN."""
    x, y = pair(32)
    vanishing = lpips_torch.from_torch(judges.lpips_state("alex", scale=1e-25))[1]
    for weight, other in ((vanishing, y), (weights("alex"), x)):
        _, gradient = value_and_gradient(weight, x, other, "alex", normalize)
        assert np.isfinite(gradient).all()


def test_bfloat16_images_are_compared_in_float32():
    """Fails if a bfloat16 input lowers the network's own precision."""
    x, y = pair(32)
    x = jnp.asarray(x, jnp.bfloat16)
    found = distance(weights("alex"), x, y, "alex")
    expected = distance(weights("alex"), x.astype(jnp.float32), y, "alex")
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_linear_layers_are_the_published_ones():
    """Fails if the shipped file is damaged: counts and sums of lpips 0.1.4, weights/v0.1."""
    for net, (size, total) in {"vgg": (1472, 131.855509), "alex": (1152, 105.275355)}.items():
        layers = lpips.linear_layers(net)
        joined = np.concatenate([layers[f"lin{i}"] for i in range(5)])
        assert joined.size == size and joined.min() >= 0
        np.testing.assert_allclose(joined.sum(dtype=np.float64), total, rtol=1e-6)


def test_load_refuses_another_file(tmp_path):
    """Fails if the wrong network, a missing or misshaped array is found out only at run time."""
    good = save(tmp_path / "a.safetensors", weights("alex"), "lpips-alex")
    loaded = lpips_torch.load(good, "alex")
    np.testing.assert_array_equal(loaded["features.3.kernel"], weights("alex")["features.3.kernel"])
    with pytest.raises(ValueError, match="'lpips-alex', not LPIPS of net=vgg"):
        lpips_torch.load(good, "vgg")
    arrays = load_file(good)
    cut = save(tmp_path / "b.safetensors", arrays | {"lin0": arrays["lin0"][1:]}, "lpips-alex")
    with pytest.raises(ValueError, match=r"lin0 has shape \(63,\)"):
        lpips_torch.load(cut)
    arrays.pop("features.8.bias")
    with pytest.raises(ValueError, match="features.8.bias has shape None"):
        lpips_torch.load(save(tmp_path / "c.safetensors", arrays, "lpips-alex"))
    (tmp_path / "d.safetensors").write_bytes(b"no")
    for name in ("d.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match="not a readable LPIPS file"):
            lpips_torch.load(tmp_path / name)


def test_arguments_are_checked():
    """Fails if a typo or a picture that the poolings swallow gives a traceback from XLA."""
    x, y = pair(32)
    with pytest.raises(ValueError, match="'vgg' .training. or 'alex'"):
        lpips.distance(weights("alex"), x, y, "squeeze")
    with pytest.raises(ValueError, match="choose 'lpips' or 'torchmetrics'"):
        lpips.distance(weights("alex"), x, y, "alex", "none")
    with pytest.raises(ValueError, match="of one shape"):
        lpips.distance(weights("alex"), x, y[:1], "alex")
    for net in NETS:
        smallest = lpips.MIN_SIZE[net]
        small = [v[:, :smallest, :smallest] for v in (x, y)]
        assert np.isfinite(distance(weights(net), *small, net)).all()
        with pytest.raises(ValueError, match="enlarge"):
            lpips.distance(weights(net), *(v[:, 1:] for v in small), net)
