"""What can be certified of the released dual model's router: random, linear in the pixels, hard top-1 (Zhang et al.,
ICML 2025, released code).

python benchmarks/released_routes.py --data "cifar10(root='...')" [--images 2000] [--seeds 10]   # minutes on one core

For every eps: the share of test images whose route can change within the linf ball inside the box, the mean number of
the 4 experts that can be reached (pair by pair), the share where all 4 can, mean ± standard deviation over router
seeds; the same by linear programme on 40 images; and what the certifier says of a few.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from robustmoe import spec as specs
from robustmoe.attacks import linf
from robustmoe.certification import Ball, Bounds, router_bounds, rules
from robustmoe.certification.routes import reachable_exactly, route_radius
from robustmoe.data import Data
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.parts import Fork
from robustmoe.noise import Noise

RADII = (0.5, 1, 2, 4, 8)
"""eps, of 255."""
REFERENCE = {
    0.5: (47.7, 1.65, 2.5),
    1: (75.8, 2.35, 15.6),
    2: (95.8, 3.39, 58.6),
    4: (99.9, 3.96, 96.3),
    8: (100, 4.00, 100),
}
"""An earlier count, by other code: route can change (%), mean reachable, all four (%); 10 seeds, 2,000 test images."""
EXPERTS = "ensemble(resnet8(width=16), experts=4, gate=hard, router=linear)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    data: Data = specs.build(args.data, "data")
    x = data.test.batch(list(range(args.images))).x
    print("eps x 255 | route can change (%) | reachable of 4 | all four (%) | before: change, reachable, all four")
    found = {radius: [counted(made(data, seed), x, radius) for seed in range(args.seeds)] for radius in RADII}
    for radius, seeds in found.items():
        means = [f"{statistics.mean(each):.2f} ± {statistics.pstdev(each):.2f}" for each in zip(*seeds)]
        print(radius, *means, REFERENCE[radius], sep=" | ")
    model = made(data, 0)
    far = torch.cat([255 * route_radius(model, part, "linf") for part in x[:100].split(50)])
    print(f"seed 0, 100 images: median certified radius of the route {float(far.median()):.3f} / 255")
    programmes(model, x[:40])
    words(model, x[:4])


def made(data: Data, seed: int) -> RoutedModel:
    return build_model(EXPERTS, data.num_classes, data.image_shape, data.mean, data.std, seed=seed)


@torch.no_grad()
def pairwise(model: RoutedModel, x: Tensor, radius: float) -> Tensor:
    """(n, e) which experts can be reached, pair by pair."""
    fork = model.parts()
    assert isinstance(fork, Fork)
    parts = x.split(100)
    balls = [Ball(part, "linf", torch.full_like(part[:, 0, 0, 0], radius / 255)) for part in parts]
    return torch.cat([rules.reachable(router_bounds(fork.router, ball, "ibp")[1]) for ball in balls])


def counted(model: RoutedModel, x: Tensor, radius: float) -> tuple[float, float, float]:
    many = pairwise(model, x, radius).sum(1).double()
    return 100 * float((many > 1).double().mean()), float(many.mean()), 100 * float((many == 4).double().mean())


def programmes(model: RoutedModel, x: Tensor) -> None:
    same = 0
    for radius in RADII:
        exact = reachable_exactly(model, x, linf(radius / 255))["router"]
        cheap = pairwise(model, x, radius)
        assert not (exact & ~cheap).any()
        same += int((exact == cheap).all(1).sum())
        all_four = int(exact.all(1).sum())
        print(f"seed 0, linear programme, {radius}/255: all four reachable on {all_four} of {len(x)} images")
    print(f"the pairwise test says the same experts on {same} of {len(x) * len(RADII)}")


def words(model: RoutedModel, x: Tensor) -> None:
    certifier = Bounds(linf(8 / 255), how="ibp", search=0)
    for n, one in enumerate(certifier(model, x, Noise.of(torch.arange(len(x))))):
        print(f"image {n}: prediction {one.prediction}, radius {one.radius}, {one.reachable} reachable: {one.reason}")


if __name__ == "__main__":
    main()
