"""Time a step of SGD and HERO in PyTorch, as the paper's released code takes it.

    python -m examples.experiments.speed.pytorch_step_time  # 3 minutes

The networks and batches of `step_time`: the loss is differentiated at W, the weights
move along the adaptive direction, the gradient there is taken with its graph, and the
mean squared difference to the first one is differentiated again. Random images, initial
weights. It needs PyTorch and nothing else: install that in an environment of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

H, GAMMA = 0.5, 5.0


def conv(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a convolution without bias, with BatchNorm."""
    options = {"groups": groups, "bias": False}
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A body beside a shortcut, with or without a rectifier behind the sum."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.last = body, shortcut, last

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to the same, or a smaller image."""
        return self.last(self.body(x) + self.shortcut(x))


def whole(*layers: nn.Module, features: int) -> nn.Module:
    """Return a network with pooling over the image and a classifier at its end."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10)
    return nn.Sequential(*layers, *head)


def resnet(*stem: nn.Module, features: int, blocks: list[int]) -> nn.Module:
    """Return a residual network."""
    layers, inputs = [*stem, nn.ReLU()], features
    for stage, count in enumerate(blocks):
        for block in range(count):
            outputs, stride = features * 2**stage, 2 if stage and not block else 1
            first = conv(inputs, outputs, 3, stride)
            body = nn.Sequential(first, nn.ReLU(), conv(outputs, outputs))
            same = inputs == outputs and stride == 1
            shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)
            layers.append(Residual(body, shortcut, nn.ReLU()))
            inputs = outputs
    return whole(*layers, features=inputs)


def resnet18() -> nn.Module:
    """Return the ResNet of ImageNet."""
    stem = conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return resnet(*stem, features=64, blocks=[2, 2, 2, 2])


def vgg19_bn() -> nn.Module:
    """Return VGG19 with BatchNorm."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [conv(inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return whole(*layers, features=512)


def mobilenet_v2() -> nn.Module:
    """Return MobileNetV2 with the strides of CIFAR."""
    layers: list[nn.Module] = [conv(3, 32), nn.ReLU()]
    inputs = 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)]
    stages += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, outputs, count, first in stages:
        for stride in [first] + [1] * (count - 1):
            wide = inputs * expansion
            expand = [conv(inputs, wide, 1), nn.ReLU()] if expansion > 1 else []
            deep = [conv(wide, wide, 3, stride, wide), nn.ReLU()]
            body: nn.Module = nn.Sequential(*expand, *deep, conv(wide, outputs, 1))
            if stride == 1:
                same = inputs == outputs
                shortcut = nn.Identity() if same else conv(inputs, outputs, 1)
                body = Residual(body, shortcut, nn.Identity())
            layers.append(body)
            inputs = outputs
    return whole(*layers, conv(320, 1280, 1), nn.ReLU(), features=1280)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20": (lambda: resnet(conv(3, 16), features=16, blocks=[3, 3, 3]), 32, 128),
    "mobilenet_v2": (mobilenet_v2, 32, 32),
    "vgg19_bn": (vgg19_bn, 32, 64),
    "resnet18": (resnet18, 64, 64),
}
"""Network, height and width of its images, and images per step."""


def hero(loss: Callable[[], Tensor], weights: list[Tensor]) -> None:
    """Leave HERO's gradient with the weights."""
    g = torch.autograd.grad(loss(), weights)
    pairs = [*zip(weights, g, strict=True)]
    with torch.no_grad():
        norm = torch.stack([(w.abs() * d).norm() for w, d in pairs]).norm()
        hz = [H * w**2 * d / norm for w, d in pairs]
        for w, d in zip(weights, hz, strict=True):
            w.add_(d)
    value = loss()
    at_U = torch.autograd.grad(value, weights, create_graph=True)
    triples = zip(weights, at_U, g, strict=True)
    penalty = sum((a - b).square().mean() for w, a, b in triples if w.ndim > 1)
    gradient = torch.autograd.grad(value + GAMMA * penalty, weights)
    with torch.no_grad():
        for w, d, grad in zip(weights, hz, gradient, strict=True):
            w.sub_(d)
            w.grad = grad


def measure(name: str, rounds: int) -> dict[str, object]:
    """Let the two methods take turns; return the seconds of their steps."""
    make, size, batch = NETWORKS[name]
    model = make()
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    weights = list(model.parameters())
    sgd = torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-4)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    gradients: dict[str, Callable[[], object]] = {
        "SGD": lambda: loss().backward(),
        "HERO": lambda: hero(loss, weights),
    }
    seconds: dict[str, list[float]] = {method: [] for method in gradients}
    for turn in range(rounds + 1):
        for method, gradient in gradients.items():
            start = time.perf_counter()
            sgd.zero_grad()
            gradient()
            sgd.step()
            if turn:  # the first one pays for fresh memory
                seconds[method].append(time.perf_counter() - start)
    a, b = (1e3 * statistics.median(times) for times in seconds.values())
    count = sum(w.numel() for w in weights)
    print(f"{name}, {size}x{size} images, batch {batch}, {count} parameters:", end=" ")
    print(f"SGD {a:.0f} ms, HERO {b:.0f} ms, ratio {b / a:.2f}", flush=True)
    return {"size": size, "batch": batch, "seconds": seconds}


def main() -> None:
    """Measure the networks, print and write the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=NETWORKS, nargs="+", default=[*NETWORKS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    torch.manual_seed(0)
    record: dict[str, object] = {"torch": torch.__version__}
    record["threads"] = torch.get_num_threads()
    record["networks"] = {x: measure(x, options.rounds) for x in options.model}
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
