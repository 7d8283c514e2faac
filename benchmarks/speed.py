"""What the levers on speed give: each beside the same work done without it, in turn, in one process, on one thread.

python benchmarks/speed.py [--net RUN_FOLDER --data SPEC --eps 8/255] [--rounds 7] [--only evaluate pgd]
                           [--cifar10 FOLDER] [--file bench_avx2]

Each round runs new and old (and the peers that are installed) once, in another order; a ratio is the median over the
rounds of old over new CPU time, with the smallest and the largest. A lever that changes no answer is asserted to change
none. Without --net a small network is trained on digits first. Writes docs/results/bench.json (or the FILE there) when
all rows are run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from robustmoe import zoo
from robustmoe.analysis import robust
from robustmoe.attacks import FAB, PGD, Attack, ExpertsOnly, TargetedAPGD, at_radius, linf
from robustmoe.attacks.together import room_for
from robustmoe.certification import Ball, Bounded, Smoothing, bounds, routes
from robustmoe.certification.graph import record
from robustmoe.data import Batch, Data, InMemory, cifar10, digits, mean_std
from robustmoe.data import base as data_base
from robustmoe.evaluation import evaluate
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.spec import build
from robustmoe.training import MiniBatch, build_method, load_model, train_step
from robustmoe.training.optimisation import AdamW

if __package__:
    from benchmarks.bounds_reference import theirs
    from benchmarks.pgd import digits_net
    from benchmarks.results import RESULTS, described, write
    from benchmarks.token_dispatch import Layer
else:
    from bounds_reference import theirs
    from pgd import digits_net
    from results import RESULTS, described, write
    from token_dispatch import Layer

Work = Callable[[], Any]
RESNET = Path(zoo.__file__).parent / "zoo_models" / "cifar10_resnet8_x10_0"


@dataclass(frozen=True)
class Row:
    """``new`` beside ``old`` work, by name; ``same``: whether an answer of both must be equal."""

    new: Work
    old: dict[str, Work]
    same: Callable[[Any, Any], bool] | None = None


@dataclass(frozen=True)
class Net:
    model: RoutedModel
    batch: Batch
    eps: float


def clock() -> float:
    """CPU seconds of this process and of those that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def compared(row: Row, rounds: int) -> dict[str, Any]:
    """The ratios of a row; one round warms up."""
    works = {"new": row.new, **row.old}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        names, answers = [*works], {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            answers[name] = works[name]()
            seconds[name].append(clock() - start)
        for name in row.old if row.same is not None else ():
            if row.same is not None and not row.same(answers["new"], answers[name]):
                raise AssertionError(f"{name} gives another answer")
    found: dict[str, Any] = {"seconds": statistics.median(seconds["new"][1:])}
    for name in row.old:
        ratios = [old / new for old, new in zip(seconds[name][1:], seconds["new"][1:], strict=True)]
        found[name] = {"value": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


# ------------------------------------------------------------------------------------------------ rows


def counts(*attacks: Attack, net: Net, **options: Any) -> list[int]:
    """How many images each attack leaves, and those of the curve. ``options``: `evaluate`'s."""
    results = evaluate(net.model, net.batch.x, net.batch.y, attacks=attacks, **{"curve": (), **options})
    return [sum(map(robust, result.rows)) for result in results]


def pgd_rows(net: Net) -> dict[str, Row]:
    """``evaluate`` with its curve, and PGD-50 alone, beside keep=best (the curve: each radius on its own) and peers."""
    pgd = PGD(linf(net.eps), steps=50)
    best = replace(pgd, keep="best")
    radii = tuple(net.eps * factor for factor in (0.25, 0.5, 1.5, 2.0))
    each = [best, *(at_radius(best, eps) for eps in radii)]
    x, y = net.batch.x, net.batch.y
    peers: dict[str, Work] = {"keep_best": lambda: counts(best, net=net)}
    with contextlib.suppress(ImportError):
        theirs = importlib.import_module("torchattacks").PGD(net.model, eps=net.eps, alpha=net.eps / 4, steps=50)
        peers["torchattacks"] = lambda: [theirs(x, y)]
    with contextlib.suppress(ImportError):
        foolbox: Any = importlib.import_module("foolbox")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=net.eps / 4, steps=50)
        wrapped = foolbox.PyTorchModel(net.model, bounds=(0, 1), device="cpu")
        peers["foolbox"] = lambda: [attack(wrapped, x, y, epsilons=net.eps)[1]]
    return {
        "evaluate": Row(
            lambda: counts(pgd, net=net, curve=radii),
            {"each_radius_alone": lambda: counts(*each, net=net)},
            lambda new, old: new[0] == old[0] and all(a <= b for a, b in zip(new, old, strict=True)),
        ),
        "pgd": Row(lambda: counts(pgd, net=net), peers),
        "pgd_fast": Row(lambda: counts(pgd, net=net, precision="fast"), peers),
    }


def target_rows(net: Net, images: int = 12) -> dict[str, Row]:
    """The targets of APGD-T and FAB-T at once beside one at a time, on a few images that stand, of a batch of 128."""
    copy = frozen_copy(net.model, net.batch.x)
    x_adv = PGD(linf(net.eps), steps=20, keep="first")(copy, net.batch.x, net.batch.y)
    with torch.no_grad():
        left = net.batch[torch.nonzero(net.model(x_adv).argmax(1) == net.batch.y)[:images, 0]]

    def attacked(attack: Attack, room: int) -> Tensor:
        with room_for(room):
            return attack(copy, left.x, left.y, Noise.of(left.index))

    def verdicts_agree(new: Tensor, old: Tensor) -> bool:
        """Which images stand: the last bits may depend on how many share a pass, on some processors."""
        with torch.no_grad():
            return torch.equal(net.model(new).argmax(1) == left.y, net.model(old).argmax(1) == left.y)

    attacks = {
        "apgd_t": TargetedAPGD(linf(net.eps), steps=20),
        "fab": FAB(linf(net.eps), steps=20, targets=9),
    }
    return {
        name: Row(
            lambda attack=attack: attacked(attack, 128),  # type: ignore[misc]
            {"one_at_a_time": lambda attack=attack: attacked(attack, 1)},  # type: ignore[misc]
            verdicts_agree,
        )
        for name, attack in attacks.items()
    }


def noise_rows() -> dict[str, Row]:
    """Draws of 256 CIFAR images beside the same formulas on whole new tensors."""
    noise, shape = Noise.of(torch.arange(256)), (3, 32, 32)

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    def mixed(z: Tensor) -> Tensor:
        z = z - 7046029254386353131
        z = (z ^ shifted(z, 30)) * -4658895280553007687
        z = (z ^ shifted(z, 27)) * -7723592293110705685
        return z ^ shifted(z, 31)

    def uniform(streams: Noise) -> Tensor:
        bits = mixed(~streams.state[:, None] ^ mixed(torch.arange(3072))[None]).view(256, *shape)
        return shifted(bits, 40).to(torch.float32) * 2.0**-24

    def normal() -> Tensor:
        radius = torch.sqrt(-2.0 * torch.log1p(-uniform(noise.fold(1))))
        return radius * torch.cos(2.0 * torch.pi * uniform(noise.fold(2)))

    return {
        "uniform": Row(lambda: noise.uniform(*shape), {"new_tensors": lambda: uniform(noise)}, torch.equal),
        "normal": Row(lambda: noise.normal(*shape), {"new_tensors": normal}, torch.equal),
    }


def statistics_rows() -> dict[str, Row]:
    """Mean and deviation of 10,000 images of 3x32x32 by counts of levels, beside sums in float64."""
    levels = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
    images = InMemory(levels, torch.zeros(10_000, dtype=torch.int64))

    def summed() -> Any:
        with mock.patch.object(data_base, "_level_sums", data_base._sums):
            return mean_std(images)

    return {"mean_std": Row(lambda: mean_std(images), {"float64_sums": summed}, lambda new, old: bool(new == old))}


def crown_networks() -> dict[str, tuple[nn.Sequential, tuple[int, ...], int]]:
    """Untrained ReLU networks in float64 by name, with the shape and the number of their images."""

    def of(*layers: nn.Module) -> nn.Sequential:
        return (
            nn.Sequential(*[part for layer in layers[:-1] for part in (layer, nn.ReLU())], layers[-1]).double().eval()
        )

    def last(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))

    conv = nn.Conv2d
    two = (conv(3, 16, 4, 2, 1), conv(16, 32, 4, 2, 1))
    four = (conv(3, 16, 3, 1, 1), conv(16, 16, 4, 2, 1), conv(16, 32, 3, 1, 1), conv(32, 32, 4, 2, 1))
    return {
        "crown_mlp": (of(last(784, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)), (1, 28, 28), 32),
        "crown_two": (of(*two, last(512, 100), nn.Linear(100, 10)), (3, 16, 16), 16),
        "crown_four": (of(*four, last(2048, 10)), (3, 32, 32), 2),
    }


def crown_rows() -> dict[str, Row]:
    """CROWN at linf 2/255, margins of the predicted class, beside auto_LiRPA where it can be imported (a checkout of
    github.com/Verified-Intelligence/auto_LiRPA), and two convolutions beside whole maps of coefficients.
    """
    torch.manual_seed(0)
    return {name: crown_row(*each, beside_maps=name == "crown_two") for name, each in crown_networks().items()}


def crown_row(network: nn.Sequential, shape: tuple[int, ...], images: int, beside_maps: bool) -> Row:
    x = 0.3 + 0.4 * torch.rand(images, *shape, dtype=torch.float64)  # theirs do not keep to the box [0, 1]
    ball = Ball(x, "linf", torch.full((images,), 2 / 255, dtype=x.dtype))
    unit = torch.eye(10, dtype=x.dtype)
    rows = unit[network(x).argmax(1)][None] - unit[:, None]

    @torch.no_grad()
    def new() -> Tensor:
        slope, offset = Bounded(record(network, x), ball, "crown").linear(rows)
        return ball.lowest(slope) + offset

    def maps() -> Tensor:
        with mock.patch.object(bounds.Windows, "units", bounds._units):
            return new()

    old: dict[str, Work] = {"whole_maps": maps} if beside_maps else {}
    with contextlib.suppress(ImportError):
        lirpa: Any = importlib.import_module("auto_LiRPA")
        old["auto_lirpa"] = lambda: theirs(lirpa, network, ball, rows, "CROWN").T
    close: Callable[[Tensor, Tensor], bool] = lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-10)  # noqa: E731
    return Row(new, old, close)


def route_rows() -> dict[str, Row]:
    """What holds the clean route of 128 images, on a pathway of two experts, beside a whole pass."""
    spec = "pathway(resnet8(width=16), experts=2, ratio=0.5, router=small_cnn)"
    model = build_model(spec, 10, (3, 32, 32)).eval()
    x, y = torch.rand(128, 3, 32, 32), torch.zeros(128, dtype=torch.long)

    def old() -> None:
        with mock.patch.object(type(model), "route", RoutedModel.route):
            ExpertsOnly()(model, x, y)

    return {"held_route": Row(lambda: ExpertsOnly()(model, x, y) and None, {"whole_pass": old})}


def smoothing_rows(copies: int = 1000, sigma: float = 0.25) -> dict[str, Row]:
    """Two images under noise beside a loop as Cohen et al. 2019 write it: an image a time, torch's own draws."""
    model = build_model("resnet8(width=16)", 10, (3, 32, 32)).eval()
    x, certifier = torch.rand(2, 3, 32, 32), Smoothing(sigma=sigma, n0=100, n=copies, batch=500)

    @torch.no_grad()
    def loop() -> None:
        for image in x:
            for number in (100, copies):
                counts = torch.zeros(10, dtype=torch.long)
                for piece in torch.arange(number).split(500):
                    many = image.repeat(len(piece), 1, 1, 1)
                    counts += torch.bincount(model(many + sigma * torch.randn_like(many)).argmax(1), minlength=10)

    @torch.no_grad()
    def ours() -> None:
        certifier.certify(model, x, Noise.of(torch.arange(2)))

    return {"smoothing": Row(ours, {"loop": loop})}


def reach_rows() -> dict[str, Row]:
    """Which of eight linear experts 30 images reach, beside a linear programme for each."""
    model = build_model("ensemble(linear, experts=8, router=linear)", 10, (1, 8, 8), seed=0).double().eval()
    x = torch.rand(30, 1, 8, 8, dtype=torch.float64)

    def new() -> Tensor:
        return routes.reachable_exactly(model, x, linf(0.05))["router"]

    def programmes() -> Tensor:
        with mock.patch.object(routes, "ROUNDS", 0):
            return new()

    return {"reach": Row(new, {"programmes": programmes}, torch.equal)}


def many_experts_rows() -> dict[str, Row]:
    """64 experts beside 8, one a token: a step of a transformer's adversarial training, and 2,080 tokens of width 192
    through experts of width 768, there and back.
    """

    def step(experts: int) -> Work:
        spec = f"vit_moe(tiny, patch=2, width=48, depth=4, heads=4, experts={experts}, k=1, placement=every_2)"
        model, method = build_model(spec, 10, (3, 16, 16), seed=0), build_method("at(pgd(linf(0.01), steps=2))")
        batch = MiniBatch(torch.rand(32, 3, 16, 16), torch.randint(10, (32,)), Noise.of(torch.arange(32)))
        optimisers = [AdamW().over(phase.parameters(model)) for phase in method.phases]
        return lambda: train_step(model, method, optimisers, batch)

    def tokens(experts: int) -> Work:
        layer = Layer(2080, 192, 768, experts, 1)
        return lambda: layer.training("auto")

    made: dict[str, Callable[[int], Work]] = {"vit_moe": step, "tokens": tokens}
    return {name: Row(make(8), {"experts_64": make(64)}) for name, make in made.items()}


def start_rows() -> dict[str, Row]:
    """`robustmoe list` in a process of its own, beside what importing torch alone takes."""

    def python(*arguments: str) -> Work:
        command = [sys.executable, *arguments]
        return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True) and None

    return {"start": Row(python("-m", "robustmoe", "list"), {"torch": python("-c", "import torch")})}


def parquet_rows(root: str) -> dict[str, Row]:
    """CIFAR-10 out of parquet files, decoded before, beside decoding them."""

    def load(cache: str) -> str:
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": cache}):
            return cifar10(root).train.fingerprint

    def fresh() -> str:
        with tempfile.TemporaryDirectory() as empty:
            return load(empty)

    kept = tempfile.mkdtemp()
    return {"parquet": Row(lambda: load(kept), {"decoded": fresh}, lambda new, old: bool(new == old))}


# ------------------------------------------------------------------------------------------------ the table


def rows(args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    model = digits_net(0.1) if args.net is None else load_model(Path(args.net))
    data: Data = digits() if args.net is None else build(args.data, "data")
    net = Net(model.eval(), data.test.batch(list(range(128))), float(Fraction(args.eps)))
    groups = [pgd_rows(net), target_rows(net), noise_rows(), statistics_rows(), crown_rows(), route_rows()]
    groups += [smoothing_rows(), reach_rows(), many_experts_rows(), start_rows()]
    if args.cifar10:
        resnet = Net(load_model(RESNET).eval(), cifar10(args.cifar10).test.batch(list(range(128))), 8 / 255)
        groups.append({f"{name}_resnet8": row for name, row in pgd_rows(resnet).items()})
        groups.append(parquet_rows(args.cifar10))
    for group in groups:
        yield from group.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", help="a run folder (default: trained on digits)")
    parser.add_argument("--data", default="digits", help="what the run is tested on")
    parser.add_argument("--eps", default="0.15", help="linf radius, such as 8/255")
    parser.add_argument("--cifar10", help="CIFAR-10 as parquet: its loading, PGD on a ResNet-8 of the zoo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], help="some rows; nothing is written")
    parser.add_argument("--file", default="bench", help="the name of the results file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    about = (
        {}
        if args.only
        else described("python benchmarks/speed.py", seeds=[0], instructions=capability, rounds=args.rounds)
    )
    numbers: dict[str, Any] = {}
    print("| row | CPU seconds | beside | takes | smallest to largest |\n|---|---|---|---|---|")
    for name, row in rows(args):
        if args.only and name not in args.only:
            continue
        numbers[name] = compared(row, args.rounds)
        for against in row.old:
            ratio = numbers[name][against]
            spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
            seconds = numbers[name]["seconds"]
            print(f"| {name} | {seconds:.4f} | {against} | {ratio['value']:.2f} times | {spread} |", flush=True)
    if not args.only:
        write(RESULTS / f"{args.file}.json", about, numbers)


if __name__ == "__main__":
    main()
