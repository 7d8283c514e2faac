"""Makes the zoo: trains each model into the package, attacks it, and writes its card.

cd EMPTY_FOLDER && python PATH/benchmarks/zoo.py     # minutes; runs/ is left there
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from results import described
from robustmoe import demo, zoo
from robustmoe.analysis import groups, worst_case
from robustmoe.evaluation import evaluate_run
from robustmoe.records import read_config

MODELS = {
    "digits_pathway": ("pathway", "the demo's MoE-CNN of two pathways, adversarially trained (AdvMoE's kind)"),
    "digits_dense": ("dense", "its dense twin: the backbone alone, the same training"),
    "digits_certified": ("certified", "a hard-routed MoE of two networks, trained for certificates"),
}
"""Name in the zoo: the run of the demo that it is, and what is said of it."""


def main() -> None:
    torch.set_num_threads(1)
    source = described("python benchmarks/zoo.py")
    demo.demo()
    for name, (run, about) in MODELS.items():
        folder, place = Path("runs/demo") / run, zoo.FOLDER / name
        config, results = read_config(folder), evaluate_run(folder)
        worst = worst_case([(result.header, result.rows) for result in groups(results)[0]])
        place.mkdir(parents=True, exist_ok=True)
        for file in zoo.FILES:
            shutil.copy(folder / file, place / file)
        card = {
            "name": name,
            "about": about,
            **{field: config[field] for field in ("model", "data", "method")},
            "n": worst.robust.n,
            "clean": worst.clean.count,
            "worst": worst.robust.count,
            "attacks": [adds.name for adds in worst.adds],
            **{field: source[field] for field in ("command", "commit", "hardware")},
        }
        (place / zoo.CARD).write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
