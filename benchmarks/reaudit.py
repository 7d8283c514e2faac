"""Public mixtures audited twice: as any attack library sees them, and through `rm.wrap`.

    python -m benchmarks.reaudit --source rt_er=PATH --source advmoe=PATH \\
        --source robust_experts=PATH --source dit_moe=PATH [--cifar10 FOLDER]

Each net (benchmarks/public_models.py) is trained, naturally and adversarially, by the same short loop: on digits, or
with --cifar10 on the first 5,000 images of a folder of CIFAR-10 as parquet. Then 50 test images are attacked: PGD-20
and AutoAttack on the net as a callable, then the routing attacks on what `rm.wrap(net, example=images)` made of it,
with nothing else given. A job is one net, training and seed; finished jobs are kept in --runs and not done again.
Without --source the nets of packages alone are audited.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.public_models import PUBLIC, Images
from benchmarks.results import RESULTS, described, spread_of, write
from torch import Tensor, nn

import robustmoe as rm
from robustmoe import analysis
from robustmoe import spec as specs
from robustmoe.attacks.views import image_routers
from robustmoe.wrapping import find_routers

IMAGES, BATCH = 50, 64


@dataclass(frozen=True)
class Setting:
    """What the nets are trained on and attacked at: images, ``limit`` of them for training, ``eps`` in linf, and
    ``epochs``. In an adversarial training the first ``natural`` of them are natural (a small transformer learns
    nothing otherwise).
    """

    images: Images
    eps: str
    epochs: int
    natural: int
    limit: int | None = None

    @property
    def radius(self) -> float:
        """``eps`` as a number, pixels in [0, 1]."""
        return float(Fraction(self.eps))

    def attack(self, name: str, rest: str = "") -> str:
        """The spec of an attack at this radius."""
        return f"{name}(linf({self.eps}){rest})"


DIGITS = Setting(Images(1, 8), eps="0.1", epochs=30, natural=10)
CIFAR10 = Setting(Images(3, 32), eps="4/255", epochs=20, natural=12, limit=5000)

CALLABLE = {"pgd, steps=20": ("pgd", ", steps=20"), "autoattack": ("autoattack", "")}
WRAPPED = {
    "pgd, steps=20": ("pgd", ", steps=20"),
    "pgd, steps=50, objective=experts_only": ("pgd", ", steps=50, objective=experts_only"),
    "route_flip": ("route_flip", ""),
}
REGIONS = {"image": "expert_transition", "token": "route_beam"}
"""Into every expert's region: where one decision is made for an image, and where many are."""
TRAININGS = ("natural", "adversarial")


def train(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, adversarial: bool, seed: int) -> None:
    """Adam and cosine; adversarially on PGD-5 images that climb the net in train mode, as the released codes do."""
    generator = torch.Generator().manual_seed(seed)
    steps = setting.epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for epoch in range(setting.epochs):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            images, labels = x[batch], y[batch]
            attacked = adversarial and epoch >= setting.natural
            inputs = climbed(net, images, labels, setting.radius, generator) if attacked else images
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
            schedule.step()
    net.eval()


def climbed(net: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Five steps of a quarter of ``eps`` from a random start."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    moved = low + (high - low) * torch.rand(x.shape, generator=generator)
    for _ in range(5):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(moved), y), moved)
        moved = torch.minimum(torch.maximum(moved.detach() + eps / 4 * gradient.sign(), low), high)
    return moved


def job(name: str, training: str, seed: int, source: Path | None, setting: Setting, data: Any) -> dict[str, Any]:
    """One net: trained, attacked as a callable, wrapped, attacked again."""
    torch.manual_seed(seed)
    net = PUBLIC[name].make(source, setting.images)
    start = time.perf_counter()
    train(net, *first(data.train, setting.limit), setting, training == "adversarial", seed)
    trained = time.perf_counter()
    x, y = first(data.test, IMAGES)
    out: dict[str, Any] = {"net": name, "version": PUBLIC[name].version(), "training": training, "seed": seed}
    out["callable"] = audited(net, x, y, setting, CALLABLE)
    out["routers"] = [f"{path}: {codec}" for path, codec in find_routers(net, x[:8]).routers.items()]
    try:
        wrapped = rm.wrap(net, example=x[:8])
    except rm.UserError as error:
        out["refused"] = str(error)
    else:
        out["notes"] = list(getattr(wrapped, "notes", ()))
        region = REGIONS["image" if image_routers(wrapped.run(x[:8]).trace) else "token"]
        out["wrapped"] = audited(wrapped, x, y, setting, WRAPPED | {region: (region, "")})
    return {**out, "seconds": {"train": trained - start, "audit": time.perf_counter() - trained}}


def first(images: Any, count: int | None) -> tuple[Tensor, Tensor]:
    """The first images of a set in [0, 1], and their labels; all of them where ``count`` is None."""
    batch = images.batch(list(range(len(images) if count is None else count)))
    return batch.x, batch.y


def audited(net: Any, x: Tensor, y: Tensor, setting: Setting, attacks: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Per cent of the images that are right: clean, under each attack, under all; and what the checks say."""
    records = rm.evaluate(net, x, y, attacks=[setting.attack(*each) for each in attacks.values()])
    survivors = [[bool(analysis.robust(row)) for row in record.rows] for record in records]
    out: dict[str, Any] = {"clean": 100 * records[0].summary().clean.value}
    for name, rows in zip(attacks, survivors):
        out[name] = 100 * sum(rows) / len(rows)
    out["survivors"] = [all(rows) for rows in zip(*survivors)]
    last = records[-1].summary()
    return {**out, "failed": list(last.failed), "warned": list(last.warned)}


COLUMNS = {
    "clean": lambda each: each["callable"]["clean"],
    "pgd": lambda each: each["callable"]["pgd, steps=20"],
    "pgd_wrapped": lambda each: each["wrapped"]["pgd, steps=20"],
    "autoattack": lambda each: each["callable"]["autoattack"],
    "as_callable": lambda each: 100 * sum(each["callable"]["survivors"]) / IMAGES,
    "wrapped": lambda each: (
        100 * sum(map(all, zip(each["callable"]["survivors"], each["wrapped"]["survivors"]))) / IMAGES
    ),
    "experts_only": lambda each: each["wrapped"]["pgd, steps=50, objective=experts_only"],
    "hidden": lambda each: COLUMNS["as_callable"](each) - COLUMNS["wrapped"](each),
}
"""Per cent of the images, of one job: what a callable keeps, what is left when routing attacks join, the difference."""
SHOWN = [name for name in COLUMNS if name not in ("experts_only", "hidden")]


def hidden_of_all(jobs: list[dict[str, Any]]) -> dict[str, float]:
    """Per cent of the images of all seeds together that the callable keeps and the routing attacks break, and Wilson's
    95 % interval.
    """
    count = round(sum(IMAGES * COLUMNS["hidden"](each) / 100 for each in jobs))
    share = analysis.Rate(count, IMAGES * len(jobs))
    low, high = share.interval
    return {"value": 100 * share.value, "low": 100 * low, "high": 100 * high}


def table(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """training -> net -> each column over the seeds; of nets that were refused, what was said."""
    numbers: dict[str, Any] = {}
    for training, name in dict.fromkeys((each["training"], each["net"]) for each in jobs):
        own = [each for each in jobs if (each["training"], each["net"]) == (training, name) and "wrapped" in each]
        if own:
            row = {column: spread_of([of(each) for each in own]) for column, of in COLUMNS.items()}
            numbers.setdefault(training, {})[name] = {**row, "hidden_of_all": hidden_of_all(own)}
    return numbers


def rows(numbers: dict[str, Any]) -> str:
    """The rows of docs/studies/reaudit.md: means, and the least and the largest of the seeds; last what was hidden."""
    lines = []
    for training, nets in numbers.items():
        for name, row in nets.items():
            cells = [f"{row[key]['mean']:.1f} ({row[key]['min']:.0f}-{row[key]['max']:.0f})" for key in SHOWN]
            total = row["hidden_of_all"]
            cells.append(f"{total['value']:.1f} ({total['low']:.1f}-{total['high']:.1f})")
            lines.append(f"| {PUBLIC[name].title} | {training} | {row['clean']['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH", help="a checkout")
    parser.add_argument("--nets", nargs="+", default=list(PUBLIC), choices=list(PUBLIC))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--cifar10", metavar="FOLDER", help="in place of digits: a folder of CIFAR-10 as parquet")
    parser.add_argument("--runs", type=Path, help="default runs/reaudit, with --cifar10 runs/reaudit_cifar10")
    parser.add_argument("--out", type=Path, help="default docs/results/studies/, named as --runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cifar10 = given.cifar10 is not None
    setting, place = (CIFAR10, "reaudit_cifar10") if cifar10 else (DIGITS, "reaudit")
    data = specs.build(f"cifar10('{given.cifar10}')" if cifar10 else "digits", "data")
    command = "python -m benchmarks.reaudit --source ..." + (" --cifar10 FOLDER" if cifar10 else "")
    about = described(command, seeds=given.seeds, images=IMAGES, eps=setting.radius)
    sources = {name: Path(path) for name, path in (each.split("=", 1) for each in given.source)}
    nets = [name for name in given.nets if PUBLIC[name].repository is None or name in sources]
    runs = given.runs or Path("runs") / place
    runs.mkdir(parents=True, exist_ok=True)
    jobs = []
    for seed, training, name in product(given.seeds, reversed(given.trainings), nets):
        file = runs / f"{name}-{training}-{seed}.json"
        if not file.exists():
            done = job(name, training, seed, sources.get(name), setting, data)
            file.write_text(json.dumps({**done, **{key: about[key] for key in ("commit", "hardware")}}, default=float))
        jobs.append(json.loads(file.read_text()))
        print(json.dumps({key: jobs[-1].get(key) for key in ("net", "training", "seed", "callable", "wrapped")}))
        write(given.out or RESULTS / "studies" / f"{place}.json", about, table(jobs), jobs=jobs)
    print(rows(table(jobs)))


if __name__ == "__main__":
    main()
