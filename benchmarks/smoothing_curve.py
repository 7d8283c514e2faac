"""Randomised smoothing of the demo's routed model on digits, as it is and trained on Gaussian noise: certified accuracy
against the l2 radius, and what it costs.

python benchmarks/smoothing_curve.py [--images 100] [--n 10000] [--sigma 0.25] [--threads 1]

Trains both for the demo's eight epochs (a minute), then certifies the first test images with
``smoothing(sigma=0.25, n=10000)`` (alpha = 0.001 an image). One row a model, in per cent of the images: accuracy of the
model itself without noise; of the smoothed one, certified at each radius (0: right and not abstained); the noisy copies
that keep every route; wall and CPU seconds of the certificates alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from robustmoe import demo
from robustmoe.certification import ABSTAIN, Smoothing
from robustmoe.data import digits
from robustmoe.noise import Noise
from robustmoe.training import load_model, train

RADII = (0.0, 0.1, 0.25, 0.5, 0.75)


def curve(run: Path, images: int, smoothing: Smoothing) -> list[str]:
    """The cells of one row."""
    model, batch = load_model(run).eval(), digits().test.batch(torch.arange(images))
    with torch.no_grad():
        clean = (model(batch.x).argmax(1) == batch.y).float().mean().item()
    wall, cpu = time.perf_counter(), time.process_time()
    found = smoothing(model, batch.x, Noise.of(batch.index, 0))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    right = [one.radius if one.prediction == y else -1.0 for one, y in zip(found, batch.y.tolist())]
    shares = [clean, *(sum(size >= r for size in right) / images for r in RADII)]
    shares += [sum(one.prediction == ABSTAIN for one in found) / images, sum(one.stable or 0 for one in found) / images]
    return [*(f"{100 * share:.1f}" for share in shares), f"{wall:.0f}", f"{cpu:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    smoothing = Smoothing(given.sigma, n=given.n, batch=2000)
    noisy = dataclasses.replace(
        demo.ROUTED, method=f"gaussian(sigma={given.sigma}, balance=0.1)", val_attack=None, attacks=()
    )
    columns = ("clean", *(f"r = {r:g}" for r in RADII), "abstained", "route kept", "wall s", "CPU s")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in (demo.ROUTED, noisy):
            run = train(recipe, Path(scratch) / str(len(rows)))
            torch.set_num_threads(given.threads)
            rows.append(f"| {recipe.method} | " + " | ".join(curve(run, given.images, smoothing)) + " |")
    print("| trained by | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
