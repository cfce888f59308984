"""Time a step of SGD and HERO in PyTorch, as the paper's released code takes it.

The same networks and batches as in `step_time.py`, in one process: the loss is
differentiated at W, the weights move along the adaptive direction, the gradient there
is taken with its graph, and the mean squared difference to the first one is
differentiated again (reverse-over-reverse). Random images, initial
weights. PyTorch is no dependency of this project: install it by itself, in an
environment of its own.

    python -m examples.experiments.speed.pytorch_step_time --out pytorch_step_time.json  # 3 minutes
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
    layer = nn.Conv2d(
        *(inputs, outputs, size, stride, size // 2), groups=groups, bias=False
    )
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A body beside a shortcut, with or without a rectifier behind the sum."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.last = body, shortcut, last

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to the same, or a smaller image."""
        return self.last(self.body(x) + self.shortcut(x))


def basic_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the block of ResNets."""
    body = nn.Sequential(
        conv(inputs, outputs, 3, stride), nn.ReLU(), conv(outputs, outputs)
    )
    same = inputs == outputs and stride == 1
    shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)
    return Residual(body, shortcut, nn.ReLU())


def head(features: int) -> list[nn.Module]:
    """Return pooling over the image and the classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10)]


def resnet(stem: list[nn.Module], features: int, blocks: list[int]) -> nn.Module:
    """Return a residual network."""
    layers, inputs = [*stem, nn.ReLU()], features
    for stage, count in enumerate(blocks):
        for block in range(count):
            outputs = features * 2**stage
            layers.append(basic_block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, *head(inputs))


def resnet20() -> nn.Module:
    """Return the ResNet of CIFAR."""
    return resnet([conv(3, 16)], 16, [3, 3, 3])


def resnet18() -> nn.Module:
    """Return the ResNet of ImageNet."""
    stem = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return resnet(stem, 64, [2, 2, 2, 2])


def vgg19_bn() -> nn.Module:
    """Return VGG19 with BatchNorm."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [conv(inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *head(512))


def mobilenet_v2() -> nn.Module:
    """Return MobileNetV2 with the strides of CIFAR."""
    layers: list[nn.Module] = [conv(3, 32), nn.ReLU()]
    inputs = 32
    for expansion, outputs, count, first in (
        *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for block in range(count):
            stride, wide = (1 if block else first), inputs * expansion
            expand = [conv(inputs, wide, 1), nn.ReLU()] if expansion > 1 else []
            deep = [conv(wide, wide, 3, stride, wide), nn.ReLU()]
            body = nn.Sequential(*expand, *deep, conv(wide, outputs, 1))
            if stride > 1:
                layers.append(body)
            else:
                same = inputs == outputs
                shortcut = nn.Identity() if same else conv(inputs, outputs, 1)
                layers.append(Residual(body, shortcut, nn.Identity()))
            inputs = outputs
    return nn.Sequential(*layers, conv(320, 1280, 1), nn.ReLU(), *head(1280))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20": (resnet20, 32, 128),
    "mobilenet_v2": (mobilenet_v2, 32, 32),
    "vgg19_bn": (vgg19_bn, 32, 64),
    "resnet18": (resnet18, 64, 64),
}


def sgd(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    """Take a step of SGD."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def hero(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    """Take a step of HERO."""
    weights = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    g = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        norm = torch.stack(
            [(w.abs() * d).norm() for w, d in zip(weights, g, strict=True)]
        ).norm()
        step = [H * w**2 * d / norm for w, d in zip(weights, g, strict=True)]
        for w, z in zip(weights, step, strict=True):
            w.add_(z)
    loss = nn.functional.cross_entropy(model(x), y)
    at_U = torch.autograd.grad(loss, weights, create_graph=True)
    pairs = zip(weights, at_U, g, strict=True)
    penalty = sum((a - b).square().mean() for w, a, b in pairs if w.ndim > 1)
    gradient = torch.autograd.grad(loss + GAMMA * penalty, weights)
    with torch.no_grad():
        for w, z, d in zip(weights, step, gradient, strict=True):
            w.sub_(z)
            w.grad = d
    optimizer.step()


def main() -> None:
    """Let the two methods take turns, print and write the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=NETWORKS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    record: dict[str, object] = {
        "torch": torch.__version__,
        "threads": options.threads,
        "networks": {},
    }
    networks: dict[str, object] = {}
    for name in options.model or NETWORKS:
        make, size, batch = NETWORKS[name]
        model = make()
        x = torch.randn(batch, 3, size, size)
        y = torch.randint(10, (batch,))
        optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4
        )
        seconds: dict[str, list[float]] = {"SGD": [], "HERO": []}
        for turn in range(options.rounds + 1):
            for title, step in (("SGD", sgd), ("HERO", hero)):
                start = time.perf_counter()
                step(model, optimizer, x, y)
                if turn:  # the first one pays for fresh memory
                    seconds[title].append(time.perf_counter() - start)
        medians = {title: statistics.median(s) for title, s in seconds.items()}
        parameters = sum(w.numel() for w in model.parameters())
        print(
            f"{name}, {size}x{size} images, batch {batch}, {parameters} parameters: "
            + ", ".join(f"{title} {1e3 * s:.0f} ms" for title, s in medians.items())
            + f", ratio {medians['HERO'] / medians['SGD']:.2f}",
            flush=True,
        )
        networks[name] = {"size": size, "batch": batch, "seconds": seconds}
    record["networks"] = networks
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
