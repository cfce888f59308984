"""What the paper reports, in percent of test accuracy (arXiv 2111.11986)."""

METHODS = {
    "hero": "HERO",
    "first_order": "first-order only",
    "grad_l1": "GRAD-L1",
    "sgd": "SGD",
}

NOISES = (20, 40, 60, 80)
"""Percent of symmetric label noise in Table 2."""

TABLE_1 = {
    "cifar10": {
        "resnet20": {"hero": 93.44, "grad_l1": 92.82, "sgd": 92.82},
        "mobilenet_v2": {"hero": 95.03, "grad_l1": 92.52, "sgd": 92.45},
        "vgg19_bn": {"hero": 94.79, "grad_l1": 93.41, "sgd": 93.89},
    },
    "cifar100": {
        "resnet20": {"hero": 70.72, "grad_l1": 69.30, "sgd": 69.52},
        "mobilenet_v2": {"hero": 76.90, "grad_l1": 74.13, "sgd": 73.12},
        "vgg19_bn": {"hero": 76.09, "grad_l1": 74.05, "sgd": 74.61},
    },
    "imagenet2012": {"resnet18": {"hero": 71.05, "grad_l1": 70.82, "sgd": 70.74}},
}
"""Data set, network, method."""

TABLE_2 = {
    "resnet20": {
        "hero": (90.63, 88.71, 84.61, 72.11),
        "grad_l1": (85.91, 78.66, 65.86, 48.28),
        "sgd": (85.64, 78.73, 66.42, 42.17),
    },
    "mobilenet_v2": {
        "hero": (91.70, 88.57, 81.73, 72.03),
        "grad_l1": (89.00, 85.56, 79.73, 30.34),
        "sgd": (89.28, 85.84, 80.49, 62.91),
    },
}
"""CIFAR-10 with the label noise of `NOISES`: network, method."""

TABLE_3 = {
    "hero": {"4": 93.45, "6": 94.90, "8": 95.03, "32": 95.03},
    "first_order": {"4": 91.61, "6": 93.92, "8": 94.00, "32": 94.06},
    "sgd": {"4": 85.88, "6": 91.81, "8": 92.33, "32": 92.45},
}
"""MobileNetV2 on CIFAR-10: method, bits."""


def accuracy(dataset: str, model: str, method: str, label_noise: float) -> float | None:
    """Return what Table 1, 2 or 3 says of float weights; None if nothing."""
    if label_noise:
        row = TABLE_2.get(model, {}).get(method) if dataset == "cifar10" else None
        return None if row is None else row[NOISES.index(round(100 * label_noise))]
    if method == "first_order":
        mobile = (dataset, model) == ("cifar10", "mobilenet_v2")
        return TABLE_3[method]["32"] if mobile else None
    return TABLE_1.get(dataset, {}).get(model, {}).get(method)
