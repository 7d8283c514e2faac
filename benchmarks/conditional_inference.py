"""Affine experts in real time beside the dense net of their backbone: writes docs/results/conditional_inference.json.

python benchmarks/conditional_inference.py [--repeats 40]     # two minutes

Plain models in eval mode with random weights, `model(x)` under torch.inference_mode, one thread. All models of a
backbone take turns in one process, in another order every round, so that a busy machine slows all alike; CPU seconds
of the process, the median over the rounds of the ratio to the dense net in the same round. At batch 1 a turn is 20
images.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from pathway_inference import measure, ratio
from results import RESULTS, described, write
from robustmoe.models import LayerExperts, RoutedModel, build_model

BACKBONES = {"resnet8": "resnet8(width=16)", "resnet8_w32": "resnet8(width=32)", "patch_resnet": "patch_resnet"}
VARIANTS = {
    "block": "affine({}, experts=64)",
    "norm": "affine({}, experts=64, routers=norm)",
    "image": "affine({}, experts=64, routers=image)",
    "hard8": "affine({}, experts=8, gate=straight_through)",
}
FEW = 20
"""Images of a turn at batch 1."""


def model_of(spec: str) -> RoutedModel:
    """Experts that are not 0."""
    model = build_model(spec, 10, (3, 32, 32))
    for module in model.modules():
        if isinstance(module, LayerExperts):
            torch.nn.init.normal_(module.experts, std=0.1)
    return model


def ratios(backbone: str, batch: int, repeats: int) -> dict[str, float]:
    """Of each variant to the dense net, and the dense net's milliseconds an image."""
    models = {"dense": model_of(backbone), **{name: model_of(spec.format(backbone)) for name, spec in VARIANTS.items()}}
    x = torch.rand(batch, 3, 32, 32)
    turns = FEW if batch == 1 else 1

    def job(model: RoutedModel) -> None:
        for _ in range(turns):
            model(x)

    with torch.inference_mode():
        times = measure(
            {name: lambda model=model: job(model) for name, model in models.items()},  # type: ignore[misc]
            repeats,
            time.process_time,
        )
    found = {name: ratio(times, name, "dense") for name in VARIANTS}
    return {"dense_ms_an_image": 1e3 * statistics.median(times["dense"]) / (turns * batch), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    numbers = {}
    for name, backbone in BACKBONES.items():
        for batch in (128, 1):
            numbers[f"{name}_b{batch}"] = ratios(backbone, batch, args.repeats)
            print(f"{backbone}, batch {batch}: {numbers[f'{name}_b{batch}']}", flush=True)
    about = described(
        "python benchmarks/conditional_inference.py", seeds=[0], models=VARIANTS, spread="medians over rounds"
    )
    write(RESULTS / "conditional_inference.json", about, numbers)


if __name__ == "__main__":
    main()
