"""What each process holds of a model that is spread: bytes of weights and AdamW's state after one step.

python benchmarks/sharding.py

It starts four processes. Counted are the tensors that stay between two passes; gradients (as many bytes as the weights)
and activations come on top. The first process writes docs/results/sharding.json: for each ``sharding`` the most that
any process holds.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from results import RESULTS, described, write
from robustmoe import distributed
from robustmoe.models import build_model
from robustmoe.noise import Noise
from robustmoe.training import AdamW, MiniBatch, standard, train_step
from robustmoe.training.sharding import held_bytes, placed

MODEL = "vit_moe(tiny, patch=4, experts=8, k=2, placement=every_2)"
MEGABYTE = 2**20


def held(how: str) -> float:
    """The most megabytes that a process holds with ``sharding=how``, after a step on one image a process."""
    model = placed(build_model(MODEL, 10, (3, 32, 32), seed=0), how, torch.device("cpu"))
    method = standard()
    optimisers = [AdamW().over(phase.parameters(model)) for phase in method.phases]
    noise = Noise.of(torch.tensor([distributed.rank()]), 0)
    x, y = torch.full((1, 3, 32, 32), 0.5), torch.tensor([distributed.rank()])
    train_step(model, method, optimisers, MiniBatch(x, y, noise))
    everyone = torch.zeros(distributed.world(), dtype=torch.float64)
    everyone[distributed.rank()] = held_bytes(model, optimisers) / MEGABYTE
    return float(distributed.all_reduce_sum(everyone).max())


def main() -> None:
    torch.set_num_threads(1)
    with distributed.session(torch.device("cpu")):
        numbers = {how: held(how) for how in ("none", "full", "experts")}
        if distributed.rank() == 0:
            settings = {"model": MODEL, "processes": distributed.world(), "unit": "MB of 2^20 bytes"}
            about = described("python benchmarks/sharding.py", settings=settings, seeds=[0])
            write(RESULTS / "sharding.json", about, numbers)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", __file__]
        raise SystemExit(subprocess.run(launch, check=False).returncode)
