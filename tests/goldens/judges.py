# SPDX-License-Identifier: Apache-2.0
"""The judges' originals: torch-fidelity, and VGG16 and AlexNet in plain torch, on random weights.

`python tests/goldens/judges.py` (with torch and torch-fidelity installed) writes judges.json:
torch-fidelity's numbers on the features of `synthetic`, which come from a seed and are not stored,
and what the networks give on seeded weights and pictures. It takes some minutes on two cores.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_suffix(".json")

# torchvision's `features` of the two networks, written down a second time for the comparison:
# (in, out, kernel, stride, padding) and the window of a maximum pooling of stride 2.
VGG16 = [(3, 64), (64, 64), 2, (64, 128), (128, 128), 2, (128, 256), (256, 256), (256, 256), 2]
VGG16 += [(256, 512), (512, 512), (512, 512), 2, (512, 512), (512, 512), (512, 512)]
VGG16 = [layer if layer == 2 else (*layer, 3, 1, 1) for layer in VGG16]
ALEXNET = [(3, 64, 11, 4, 2), 3, (64, 192, 5, 1, 2), 3, (192, 384, 3, 1, 1), (384, 256, 3, 1, 1)]
ALEXNET += [(256, 256, 3, 1, 1)]
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # indices of the ReLUs


def synthetic(rows=4096, dim=2048):
    """-> (generated [rows, dim], real [rows, dim], logits [rows, 1008]), float32, always the same.

    Elementwise arithmetic alone, no matrix product: the same numbers whatever the BLAS. Twelve
    hidden factors and a little noise, so that precision and recall are neither 0 nor 1.
    """
    random = np.random.RandomState(11)
    scale = random.uniform(0.1, 0.8, dim).astype(np.float32)
    offset = random.uniform(0.0, 0.6, dim).astype(np.float32)
    sets = []
    for spread, noise in ((0.85, 0.06), (1.0, 0.05)):
        factors = (spread * random.standard_normal((rows, 12))).astype(np.float32)
        x = factors[:, np.arange(dim) % 12] * scale + offset
        x += np.float32(noise) * random.standard_normal((rows, dim)).astype(np.float32)
        sets.append(np.maximum(x, 0))
    logits = 2 * random.standard_normal((rows, 1008)).astype(np.float32)
    return sets[0], sets[1], logits


def pictures(count, size, seed=3):
    """-> [count, size, size, 3] uint8: a gradient, a wave and noise, each picture another mix."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = random.uniform(2, 20, (count, 1, 1, 3))
    image = x[None, :, :, None] * 90 + 60 * np.sin(waves * y[None, :, :, None])
    image = image + 60 + random.uniform(0, 40, (count, 1, 1, 1)) * random.randn(*image.shape[:3], 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def lpips_state(net, seed=5, scale=1e-4):
    """A random state dict with torchvision's names, `features` only -> name -> array.

    Activations are of order `scale`: where they are small the two normalisations differ.
    """
    random = np.random.RandomState(seed)
    state, index = {}, 0
    for layer in VGG16 if net == "vgg" else ALEXNET:
        if isinstance(layer, tuple):
            inputs, outputs, kernel, _, _ = layer
            weight = random.standard_normal((outputs, inputs, kernel, kernel))
            weight *= (2 / (inputs * kernel * kernel)) ** 0.5 * (scale if index == 0 else 1)
            state[f"features.{index}.weight"] = weight.astype(np.float32)
            bias = 0.05 * scale * random.standard_normal(outputs)
            state[f"features.{index}.bias"] = bias.astype(np.float32)
        index += 2 if isinstance(layer, tuple) else 1
    return state


def torch_lpips(state, linear, x, y, net, normalize):
    """LPIPS in plain torch. x, y: [B, 3, H, W] tensors in [-1, 1]; linear: [C] arrays -> [B]."""
    import torch

    layers = []
    for layer in VGG16 if net == "vgg" else ALEXNET:
        if isinstance(layer, tuple):
            layers += [torch.nn.Conv2d(*layer), torch.nn.ReLU()]
        else:
            layers.append(torch.nn.MaxPool2d(layer, 2))
    network = torch.nn.Sequential(*layers)
    network.load_state_dict(
        {k.removeprefix("features."): torch.from_numpy(v) for k, v in state.items()}
    )
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    maps = []
    for h in (x, y):
        h = (h - shift) / scale
        taps = []
        for i, layer in enumerate(network):
            h = layer(h)
            if i in TAPS[net]:
                square = (h**2).sum(1, keepdim=True)
                if normalize == "lpips":
                    taps.append(h / (torch.sqrt(square) + 1e-10))
                else:
                    taps.append(h / torch.sqrt(square + 1e-8))
        maps.append(taps)
    total = 0
    for a, b, weight in zip(*maps, linear, strict=True):
        total = total + ((a - b) ** 2 * torch.from_numpy(weight)[:, None, None]).sum(1).mean((1, 2))
    return total


def inception_state(shapes, seed=7):
    """A random state dict of FID's Inception -> name -> array, activations of order one.

    shapes: those of `dcae_jax.models.inception.shapes()`, for the names and sizes alone.
    """
    random = np.random.RandomState(seed)
    state = {}
    for name, shape in shapes.items():
        layer, kind = name.rsplit(".", 1)
        if layer == "fc":
            value = 0.05 * random.standard_normal(shape)
            state["fc.weight" if kind == "kernel" else "fc.bias"] = value.T
        elif kind == "kernel":
            height, width, inputs, outputs = shape
            weight = random.standard_normal((outputs, inputs, height, width))
            state[f"{layer}.conv.weight"] = weight * (2 / (inputs * height * width)) ** 0.5
            state[f"{layer}.bn.weight"] = random.uniform(0.5, 1.5, outputs)
            state[f"{layer}.bn.bias"] = random.uniform(-0.2, 0.2, outputs)
            state[f"{layer}.bn.running_mean"] = random.uniform(-0.2, 0.2, outputs)
            state[f"{layer}.bn.running_var"] = random.uniform(0.5, 1.5, outputs)
    return {k: np.ascontiguousarray(v, np.float32) for k, v in state.items()}


def import_torch_fidelity():
    """Imports torch_fidelity with stand-ins for torchvision, which it needs for data sets alone."""
    if "torch_fidelity" in sys.modules:
        return
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    stubs = {f"torchvision{n}": types.ModuleType(f"torchvision{n}") for n in names}
    stubs["torchvision"].__version__ = "0.0"
    stubs["torchvision"].transforms = stubs["torchvision.transforms"]
    stubs["torchvision.transforms"].functional = stubs["torchvision.transforms.functional"]
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(stubs["torchvision.datasets"], name, object)
    sys.modules.update(stubs)
    try:
        import torch_fidelity  # noqa: F401
    finally:  # other libraries ask whether torchvision is there
        for name in stubs:
            del sys.modules[name]


def fidelity_inception(path):
    """torch-fidelity's own network with the weights of `path` (.pth)."""
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased", "logits"]
    return FeatureExtractorInceptionV3("fid", names, feature_extractor_weights_path=str(path))


def torch_inception(extractor, levels, kind):
    """[B, H, W, 3] uint8 -> (pool3, logits without bias, logits) of torch, as NumPy arrays."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(levels.transpose(0, 3, 1, 2)))
    if kind == "torch-fidelity":
        return [v.numpy() for v in extractor(x)]
    size = (299, 299)
    x = torch.nn.functional.interpolate(x / 255, size, mode="bilinear", align_corners=False)
    x = 2 * x - 1
    for name, layer in extractor.named_children():
        x = layer(x) if name != "fc" else x.flatten(1)
    logits = x @ extractor.fc.weight.T
    return [v.numpy() for v in (x, logits, logits + extractor.fc.bias)]


def fidelity_numbers(generated, real, logits, subsets=100):
    """torch-fidelity's numbers on features -> dict."""
    import_torch_fidelity()
    import torch
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    generated, real, logits = (torch.from_numpy(x) for x in (generated, real, logits))
    statistics = [metric_fid.fid_features_to_statistics(x) for x in (generated, real)]
    numbers = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    numbers |= metric_isc.isc_features_to_metric(logits)
    numbers |= metric_kid.kid_features_to_metric(
        generated, real, kid_subsets=subsets, kid_subset_size=1000, rng_seed=2020, verbose=False
    )
    return numbers | metric_prc.prc_features_to_metric(generated, real, verbose=False)


def main():
    import tempfile

    import torch

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from dcae_jax.models import inception, lpips

    golden = {"versions": {"torch": torch.__version__, "torch_fidelity": "0.4.0"}}
    golden["features"] = fidelity_numbers(*synthetic())
    golden["features, 10 subsets"] = fidelity_numbers(*synthetic(), subsets=10)
    x, y = (pictures(2, 64, seed) for seed in (1, 2))
    x, y = (torch.from_numpy(v.transpose(0, 3, 1, 2) / np.float32(127.5) - 1) for v in (x, y))
    for net in ("vgg", "alex"):
        linear = list(lpips.linear_layers(net).values())
        for normalize in ("lpips", "torchmetrics"):
            with torch.no_grad():
                value = torch_lpips(lpips_state(net), linear, x, y, net, normalize)
            golden[f"{net} {normalize}"] = value.tolist()
    state = inception_state(inception.shapes())
    with tempfile.TemporaryDirectory() as folder:
        torch.save({k: torch.from_numpy(v) for k, v in state.items()}, f"{folder}/i.pth")
        extractor = fidelity_inception(f"{folder}/i.pth")
    for kind in inception.PREPROCESSINGS:
        pool3, logits, _ = torch_inception(extractor, pictures(2, 96), kind)
        golden[kind] = {"pool3": pool3[:, ::64].tolist(), "logits": logits[:, ::32].tolist()}
    PATH.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
