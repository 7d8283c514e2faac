"""Our bounds of margins against auto_LiRPA's (Xu et al. 2020) on small ReLU networks: IBP, CROWN-IBP and CROWN.

    python benchmarks/bounds_reference.py
    python benchmarks/bounds_reference.py --lirpa CHECKOUT --wong CHECKOUT --cifar10 FOLDER

Needs auto_LiRPA, which this library does not (https://github.com/Verified-Intelligence/auto_LiRPA; a checkout of it
wants appdirs, graphviz, pyyaml and tqdm). Without flags: untrained networks. With them: CROWN on trained networks,
those of auto_LiRPA's checkout and Wong and Kolter's (https://github.com/locuslab/convex_adversarial); nothing of either
stands here. Writes docs/results/bounds_reference.json. Images are so far from the edges of the box [0, 1], which ours
keep to and theirs do not, that it plays no part.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from results import RESULTS, described, write
from robustmoe import data
from robustmoe.attacks.threat import Norm
from robustmoe.certification import Ball, Bounded, Bounding
from robustmoe.certification.graph import record
from robustmoe.models.norm import Normalise

METHODS: dict[Bounding, str] = {"ibp": "IBP", "crown_ibp": "CROWN-IBP", "crown": "CROWN"}
TIGHTER = {"compare_crown_with_ibp": True}
"""auto_LiRPA's option that keeps the tighter of CROWN and IBP, as ours always do."""

STEPS = {3: (1, 0), 4: (2, 1)}
"""Stride and padding of the trained networks' convolutions, by the size of their kernels."""


@dataclass(frozen=True)
class Trained:
    """A published network: which checkout, where in it, on which images of ours, and the ball."""

    source: str
    file: str
    images: str
    eps: float
    norm: Norm = "linf"
    count: int = 32
    normalised: bool = False


NORMALISED = ((0.485, 0.456, 0.406), (0.225, 0.225, 0.225))
"""Mean and deviation of Wong and Kolter's CIFAR-10 networks."""

TRAINED = {
    "lirpa_mnist_fc_3layer": Trained("lirpa", "vision/pretrained/mnist_fc_3layer.pth", "digits", 0.01),
    "lirpa_spectral_nor_mlp_b": Trained("lirpa", "simple/models/spectral_NOR_MLP_B.pth", "digits", 0.02),
    "lirpa_mnist_cnn_small": Trained("lirpa", "vision/pretrained/mnist_cnn_small.pth", "digits", 0.1),
    "lirpa_mnist_a_adv": Trained("lirpa", "vision/pretrained/mnist_a_adv.pth", "digits", 0.1),
    "lirpa_cifar_2c2f": Trained("lirpa", "vision/pretrained/cifar_2c2f.pth", "cifar10", 1 / 255),
    "wong_mnist": Trained("wong", "models/mnist.pth", "digits", 0.1),
    "wong_mnist_at_half": Trained("wong", "models/mnist.pth", "digits", 0.05),
    "wong_fashion_mnist": Trained("wong", "models/fashion_mnist.pth", "fashion_mnist", 0.1),
    "wong_svhn": Trained("wong", "models/svhn.pth", "cifar10", 0.01),
    "wong_har": Trained("wong", "models/har.pth", "uniform", 0.05),
    "wong_mnist_small_0_3": Trained("wong", "models_scaled/mnist_small_0_3.pth", "digits", 0.3),
    "wong_mnist_small_0_3_at_half": Trained("wong", "models_scaled/mnist_small_0_3.pth", "digits", 0.15),
    "wong_cifar_small_8px": Trained("wong", "models_scaled/cifar_small_8px.pth", "cifar10", 8 / 255, normalised=True),
    "wong_cifar_small_36px": Trained(
        "wong", "models_scaled_l2/cifar_small_36px.pth", "cifar10", 36 / 255, "l2", normalised=True
    ),
}
"""Wong and Kolter's at the radius of their training, and at half of it too where that certifies none of these images;
the others where some are certified. Left out: kw_mnist.pth (the same bytes as wong_mnist), test_min_max.pth (no plain
chain of layers), and of Wong and Kolter what our copy lacked (large networks, ResNets, four small ones)."""


def networks() -> dict[str, nn.Module]:
    """Untrained, weights times 1.5, in float64."""
    conv = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    found: dict[str, nn.Module] = {
        "3 x 32 units": nn.Sequential(
            nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        ),
        "conv_small": nn.Sequential(*conv, nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)),
        "BatchNorm and pooling": nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
        ),
    }  # fmt: skip
    with torch.no_grad():
        for network in found.values():
            network.double().eval()
            for weight in network.parameters():
                weight *= 1.5
    return found


def chain(tensors: list[Tensor]) -> list[nn.Module]:
    """The layers whose weights and biases these are, in order: convolutions, then linear layers, ReLUs between them."""
    layers: list[nn.Module] = []
    for weight, bias in zip(tensors[::2], tensors[1::2], strict=True):
        layer: nn.Conv2d | nn.Linear
        if weight.ndim == 4:
            stride, padding = STEPS[weight.shape[2]]
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding)
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            if not any(isinstance(each, nn.Flatten) for each in layers):
                layers.append(nn.Flatten())
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    return layers[:-1]


def loaded(trained: Trained, checkouts: Mapping[str, Path]) -> nn.Sequential:
    """In float64, with the normalisation first; of a cascade the first network."""
    folder = checkouts[trained.source] / ("examples" if trained.source == "lirpa" else "")
    state = torch.load(folder / trained.file, map_location="cpu", weights_only=True)
    if "state_dict" in state:
        state = state["state_dict"][0]
    first: list[nn.Module] = [Normalise(*NORMALISED)] if trained.normalised else []
    return nn.Sequential(*first, *chain(list(state.values()))).double().eval()


def images(trained: Trained, cifar10: str) -> Tensor:
    """The first test images, in float64, moved eps away from the edges of the box."""
    if trained.images == "uniform":
        seeded = torch.Generator().manual_seed(0)
        return 0.3 + 0.4 * torch.rand(trained.count, 1, 1, 561, dtype=torch.float64, generator=seeded)
    sets = {"digits": data.digits, "fashion_mnist": data.fashion_mnist, "cifar10": lambda: data.cifar10(cifar10)}
    x = sets[trained.images]().test.batch(list(range(trained.count))).x.double()
    if trained.images == "digits":  # as MNIST has them: 20 pixels high, with an edge of 4
        x = nn.functional.interpolate(x, size=(20, 20), mode="bilinear", align_corners=False)
        x = nn.functional.pad(x, (4, 4, 4, 4))
    return x.clamp(trained.eps, 1 - trained.eps)


def theirs(
    lirpa: Any, network: nn.Module, ball: Ball, rows: Tensor, method: str, options: Mapping[str, Any] | None = None
) -> Tensor:
    """(n, s) lower bounds by auto_LiRPA."""
    norm = float("inf") if ball.norm == "linf" else 2.0
    bounded = lirpa.BoundedModule(network, torch.empty_like(ball.x), bound_opts=dict(options or {}), verbose=False)
    image = lirpa.BoundedTensor(ball.x, lirpa.PerturbationLpNorm(norm=norm, eps=float(ball.eps[0])))
    lower, _ = bounded.compute_bounds(x=(image,), C=rows.transpose(0, 1).contiguous(), method=method)
    return torch.as_tensor(lower).detach()


@torch.no_grad()
def ours(network: nn.Module, ball: Ball, rows: Tensor, how: Bounding) -> tuple[Tensor, Tensor]:
    """(n, s) what the last linear bounds say alone (with "ibp": the intervals), and what is used."""
    bounded = Bounded(record(network, ball.x), ball, how)
    used = bounded.lower(rows)
    if how == "ibp":
        return used.T, used.T
    slope, offset = bounded.linear(rows)
    return (ball.lowest(slope) + offset).T, used.T


def on_untrained(lirpa: Any) -> None:
    print("network, norm, eps, method: least and largest of (ours - theirs), mean of theirs, seconds ours / theirs")
    for name, network in networks().items():
        x = 0.3 + 0.4 * torch.rand(8, 3, 8, 8, dtype=torch.float64)
        y = network(x).argmax(1)
        unit = torch.eye(10, dtype=torch.float64)
        rows = unit[y][None] - unit[:, None]
        for norm, sizes in (("linf", (0.004, 0.02, 0.1)), ("l2", (0.1, 0.25))):
            for eps in sizes:
                ball = Ball(x, norm, torch.full((8,), eps, dtype=x.dtype))  # type: ignore[arg-type]
                for how, method in METHODS.items():
                    start = time.perf_counter()
                    alone, used = ours(network, ball, rows, how)
                    middle = time.perf_counter()
                    reference = theirs(lirpa, network, ball, rows, method)
                    end = time.perf_counter()
                    gap, more = alone - reference, used - reference
                    print(
                        f"{name}, {norm}, {eps}, {method}: linear alone {gap.min():.1e} to {gap.max():.1e}, as used "
                        f"{more.min():.1e} to {more.max():.1e}, mean {reference.mean():.3f}, "
                        f"{middle - start:.2f} / {end - middle:.2f} s"
                    )


def compared(lirpa: Any, trained: Trained, network: nn.Sequential, x: Tensor) -> dict[str, float]:
    """CROWN margins of the class that is said, ours less theirs. Certified: all margins to other classes above 0."""
    with torch.no_grad():
        logits = network(x)
    said = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)
    rows = said[None] - torch.eye(logits.shape[1], dtype=x.dtype)[:, None]
    ball = Ball(x, trained.norm, torch.full((len(x),), trained.eps, dtype=x.dtype))
    start = time.perf_counter()
    _, used = ours(network, ball, rows, "crown")
    middle = time.perf_counter()
    default = theirs(lirpa, *normalised(network, ball), rows, "CROWN")
    end = time.perf_counter()
    tighter = theirs(lirpa, *normalised(network, ball), rows, "CROWN", TIGHTER)
    gap = used - default
    return {
        "eps": trained.eps,
        "images": len(x),
        "certified_ours": certified(used, said),
        "certified_theirs": certified(default, said),
        "certified_with_ibp": certified(tighter, said),
        "gap_with_ibp": float((used - tighter).abs().max()),
        "least": float(gap.min()),
        "most": float(gap.max()),
        "seconds": middle - start,
        "seconds_theirs": end - middle,
    }


def normalised(network: nn.Sequential, ball: Ball) -> tuple[nn.Sequential, Ball]:
    """The same question of what comes after a normalisation (`lost` says why auto_LiRPA gets it so)."""
    first = network[0]
    if not isinstance(first, Normalise):
        return network, ball
    return network[1:], Ball(first(ball.x), ball.norm, ball.eps / first.std.flatten()[0])


def certified(margins: Tensor, said: Tensor) -> int:
    return int((margins.masked_fill(said.bool(), torch.inf) > 0).all(1).sum())


def lost(lirpa: Any, trained: Trained, network: nn.Sequential, x: Tensor) -> dict[str, float]:
    """How wide auto_LiRPA's l2 intervals are after a normalisation and a convolution, at most, and how far a step
    inside the ball moves one of these outputs.
    """
    begin = network[:2]
    bounded = lirpa.BoundedModule(begin, torch.empty_like(x), verbose=False)
    image = lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=2.0, eps=trained.eps))
    lower, upper = bounded.compute_bounds(x=(image,), method="IBP")
    moved = x[:1].clone().requires_grad_()
    value = begin(moved)[0, 0, 8, 8]
    (slope,) = torch.autograd.grad(value, moved)
    with torch.no_grad():
        end = begin(moved + 0.999 * trained.eps * slope / slope.norm())[0, 0, 8, 8]
    return {"width": float((upper - lower).detach().max()), "moved": float((end - value).detach())}


def commit(checkout: Path) -> str:
    git = ["git", "rev-parse", "HEAD"]
    return subprocess.run(git, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


def on_trained(lirpa: Any, checkouts: Mapping[str, Path], cifar10: str) -> None:
    """Writes docs/results/bounds_reference.json."""
    about = described(
        "python benchmarks/bounds_reference.py --lirpa CHECKOUT --wong CHECKOUT --cifar10 FOLDER",
        seeds=[0],
        checkouts={name: commit(path) for name, path in checkouts.items()},
        nets={name: {"file": each.file, "images": each.images, "norm": each.norm} for name, each in TRAINED.items()},
    )
    numbers: dict[str, dict[str, float]] = {}
    for name, trained in TRAINED.items():
        numbers[name] = compared(lirpa, trained, loaded(trained, checkouts), images(trained, cifar10))
        print(name, numbers[name], flush=True)
    linf = [numbers[name] for name, each in TRAINED.items() if each.norm == "linf"]
    numbers["linf"] = {
        "gap_with_ibp": max(each["gap_with_ibp"] for each in linf),
        "least": min(each["least"] for each in linf),
        "most": max(each["most"] for each in linf),
    }
    trained = TRAINED["wong_cifar_small_36px"]
    numbers["lost"] = lost(lirpa, trained, loaded(trained, checkouts), images(trained, cifar10))
    write(RESULTS / "bounds_reference.json", about, numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lirpa", type=Path, help="a checkout of auto_LiRPA")
    parser.add_argument("--wong", type=Path, help="a checkout of convex_adversarial")
    parser.add_argument("--cifar10", help="a folder of CIFAR-10")
    args = parser.parse_args()
    given = [value is not None for value in vars(args).values()]
    if any(given) and not all(given):
        parser.error("give --lirpa, --wong and --cifar10, or none of them")
    if args.lirpa is not None:
        sys.path.insert(0, str(args.lirpa))
    if importlib.util.find_spec("auto_LiRPA") is None:
        print("auto_LiRPA is not installed; see https://github.com/Verified-Intelligence/auto_LiRPA", file=sys.stderr)
        return 1
    lirpa: Any = importlib.import_module("auto_LiRPA")
    torch.manual_seed(0)
    if all(given):
        on_trained(lirpa, {"lirpa": args.lirpa, "wong": args.wong}, args.cifar10)
    else:
        on_untrained(lirpa)
    return 0


if __name__ == "__main__":
    sys.exit(main())
