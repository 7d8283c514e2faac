"""How much weight a fresh V-MoE router leaves to the chosen experts: writes docs/results/gate_mass.json.

python benchmarks/gate_mass.py     # seconds

With gates that are not renormalised a routed layer's output is scaled by this mass. Fresh models of `MODEL` on the
first 200 test digits; the mean over images, tokens and layers, for seeds 1 to 5.
"""

from __future__ import annotations

import torch

from results import RESULTS, described, spread_of, write
from robustmoe.data import digits
from robustmoe.models import build_model

MODEL = "vit_moe(tiny, patch=2, width=48, depth=4, heads=4, placement=every_2, gating=vmoe, experts={experts}, k={k})"
SIZES = [(8, 1), (8, 2), (32, 2)]
SEEDS = [1, 2, 3, 4, 5]


@torch.no_grad()
def mass(experts: int, k: int, seed: int) -> float:
    """The mean, over images, tokens and layers, of the chosen experts' weights."""
    model = build_model(MODEL.format(experts=experts, k=k), 10, (1, 8, 8), seed=seed).eval()
    trace = model.run(digits().test.batch(list(range(200))).x).trace
    return torch.stack([routing.weight.sum(-1).mean() for routing in trace.values()]).mean().item()


def main() -> None:
    numbers = {}
    for experts, k in SIZES:
        values = [mass(experts, k, seed) for seed in SEEDS]
        numbers[f"e{experts}_k{k}"] = {"mass": spread_of(values), "k_over_e": k / experts}
        print(f"{experts} experts, k = {k}: {numbers[f'e{experts}_k{k}']}")
    about = described("python benchmarks/gate_mass.py", seeds=SEEDS, spread="sample deviation and range over seeds")
    write(RESULTS / "gate_mass.json", about, numbers)


if __name__ == "__main__":
    main()
