"""The finalists of benchmarks/conditional.py under AutoAttack, every attack on the route, and transfer.

python benchmarks/conditional_finalists.py run --out DIR --cifar10 DIR --pairs affine64:dense16 --epochs 30 --seeds 2
python benchmarks/conditional_finalists.py run --out DIR --fashion --pairs resnet8_affine64:resnet8 --epochs 10
python benchmarks/conditional_finalists.py table --write       # docs/results/studies/conditional_finalists.json

The nets are those of the package's zoo; DIR takes the rows, and what is in them is not attacked again. A pair is a
mixture and the dense net that it is set beside. On the first 1,000 test images both meet PGD-50, AutoAttack (standard)
and APGD made on the other net of the pair; the mixture also all routing attacks of `autoattack_routing`, every expert
alone among them. A net's union is what stands behind all of them and the six attacks of conditional.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from conditional import SIZES, STUDY, data_of, difference
from results import RESULTS, described, spread_of, write
from robustmoe import zoo
from robustmoe.analysis import robust
from robustmoe.evaluation import evaluate_run
from robustmoe.records import Evaluation

FOLDER = RESULTS / "studies" / "conditional_finalists"
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The parts of AutoAttack; what is left behind them is its own count, whatever comes after."""


def judge(net: str, other: str, args: argparse.Namespace) -> None:
    """Attacks one net of a pair and writes what stands. Both by their names in conditional.py's results."""
    file = FOLDER / f"{net}.json"
    if file.exists():
        return
    cheap = json.loads((STUDY / f"{net}.json").read_text(encoding="utf-8"))["numbers"]
    data, size, limit = data_of(args), SIZES[data_of(args)], args.limit
    suite = "autoattack_routing" if "affine" in cheap["model"] else "autoattack"
    attacks = {
        "PGD-50": f"pgd({size}, steps=50, keep=first)",
        "suite": f"{suite}({size})",
        "transfer": f"from_run({str(in_zoo(other, data))!r}, apgd({size}))",
    }
    judged = {
        name: evaluate_run(
            in_zoo(net, data),
            attacks=(attack,),
            data="fashion_mnist" if args.fashion else f"cifar10(root={str(args.cifar10)!r})",
            out=args.out / net / name,
            limit=limit,
            precision="fast",
            curve=(),
        )[0]
        for name, attack in attacks.items()
    }
    stands = {name: {row.index for row in each.rows if robust(row)} for name, each in judged.items()}
    stands["AutoAttack"] = stands_behind(judged["suite"], AUTOATTACK)
    stands["cheap"] = {i for i in cheap["survivors"] if i < limit}
    union = set.intersection(*stands.values())
    numbers = {
        **{name: cheap[name] for name in ("arm", "seed", "epochs", "model", "macs", "parameters")},
        "beside": other,
        "images": limit,
        "clean": judged["PGD-50"].summary().clean.value,
        "stands": {name: len(indices) / limit for name, indices in stands.items()},
        "union": len(union) / limit,
        "survivors": sorted(union),
    }
    asked = f"{'--fashion' if args.fashion else '--cifar10 DIR'} --pairs {' '.join(args.pairs)} --epochs {args.epochs}"
    command = (
        f"python benchmarks/conditional_finalists.py run --out DIR {asked} --seeds {cheap['seed']} --limit {limit}"
    )
    write(file, described(command, seeds=[cheap["seed"]]), numbers)
    print(f"{file.name}: {numbers['stands']}, union {100 * numbers['union']:.1f}", flush=True)


def in_zoo(net: str, data: str) -> Path:
    """The folder of a net that the package ships."""
    arm, epochs, _, seed = net.removeprefix("fashion_").rsplit("-", 3)
    return zoo.FOLDER / f"{data}_{arm}_x{epochs}_{seed}"


def stands_behind(result: Evaluation, parts: tuple[str, ...]) -> set[int]:
    """The images that these parts of a suite left, whatever broke them later."""
    return {row.index for row in result.rows if row.clean == row.label and row.part not in parts}


def table(files: list[Path]) -> dict[str, Any]:
    """By arm and epochs: spreads in per cent over seeds, and the paired difference of the unions to the other net."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for file in files:
        kind, seed = _kind(file.stem)
        runs.setdefault(kind, {})[seed] = json.loads(file.read_text(encoding="utf-8"))["numbers"]
    out: dict[str, Any] = {}
    for name, by_seed in runs.items():
        entry: dict[str, Any] = {key: next(iter(by_seed.values()))[key] for key in ("macs", "parameters", "images")}
        for key in ("clean", "union"):
            entry[key] = spread_of([100 * each[key] for each in by_seed.values()])
        for key in next(iter(by_seed.values()))["stands"]:
            entry[key.replace("-", "_")] = spread_of([100 * each["stands"][key] for each in by_seed.values()])
        twins = runs.get(_kind(next(iter(by_seed.values()))["beside"])[0], {}) if "affine" in name else {}
        pairs = [difference(each, twins[seed]) for seed, each in by_seed.items() if seed in twins]
        if pairs:
            entry["difference"] = spread_of([mean for mean, _ in pairs])
            entry["by_seed"] = [mean for mean, _ in pairs]
            entry["over_images"] = statistics.mean(half for _, half in pairs) / len(pairs) ** 0.5
        out[name] = entry
        print(name, json.dumps(entry))
    return out


def _kind(run: str) -> tuple[str, int]:
    """The arm and its epochs, and the seed, of a run folder's name."""
    arm, epochs, _, seed = run.rsplit("-", 3)
    return f"{arm}_x{epochs}", int(seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table"])
    parser.add_argument("--out", type=Path, help="a folder for the rows")
    parser.add_argument("--cifar10", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--fashion", action="store_true", help="Fashion-MNIST instead")
    parser.add_argument("--pairs", nargs="+", default=["affine64:dense16"], metavar="MIXTURE:DENSE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of the training")
    parser.add_argument("--limit", type=int, default=1000, help="test images")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.verb == "run":
        if args.out is None or not (args.fashion or args.cifar10):
            parser.error("run needs --out, a folder for the rows, and --cifar10 DIR or --fashion")
        for seed in args.seeds:
            for pair in args.pairs:
                begin = "fashion_" if args.fashion else ""
                nets = [f"{begin}{arm}-{args.epochs}-{args.precision}-{seed}" for arm in pair.split(":")]
                for net, other in (nets, nets[::-1]):
                    judge(net, other, args)
        return
    numbers = table(sorted(FOLDER.glob("*.json")))
    if args.write:
        command = "python benchmarks/conditional_finalists.py table --write"
        seeds = sorted({int(file.stem.rsplit("-", 1)[1]) for file in FOLDER.glob("*.json")})
        about = described(command, seeds=seeds, spread="sample deviation over seeds")
        write(FOLDER.with_suffix(".json"), about, numbers)


if __name__ == "__main__":
    main()
