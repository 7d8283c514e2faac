"""What was aimed at in speed and what is reached, out of the results files: the table of docs/speed.md.

python benchmarks/aims.py

One column an instruction set: the files bench, suites and steps are measured with AVX-512, those that end in _avx2 with
AVX2. A ratio is how many times as long the other way takes, smallest to largest in brackets; in bold what is missed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

if __package__:
    from benchmarks.results import RESULTS
else:
    from results import RESULTS

SETS = ("", "_avx2")


@dataclass(frozen=True)
class Aim:
    """``path``: the number in the file, ``most``: at most the aim; ``peaks``: where ours and the other's stand."""

    work: str
    aim: float
    file: str
    path: str
    most: bool = False
    peaks: tuple[str, str] | None = None


def beside(work: str, aim: float, row: str, ours: str, other: str) -> Aim:
    """A row of the suites."""
    return Aim(work, aim, "suites", f"{row}.{ours}.times", peaks=(f"{row}.{ours}.peak", f"{row}.{other}.peak"))


def suites() -> list[Aim]:
    curve = "`evaluate`, PGD-50 and its curve, `{}`, beside 3897df2"
    aims = [
        beside(curve.format(net), 1 / 0.35, f"curve_{net}", "curve_new", "curve_old")
        for net in ("digits_dense", "digits_pathway", "cifar10_resnet8_x10_0")
    ]
    aims.append(beside("`autoattack_routing`, `digits_pathway`, beside 3897df2", 2.0, "routing", "new", "old"))
    for net in ("digits_dense", "digits_pathway", "fashion_mnist_dense", "cifar10_dense"):
        work = f"AutoAttack, `{net}`, beside pyautoattack"
        aims += [beside(f"{work}, {how}", aim, net, how, "peer") for how, aim in (("strict", 2.2), ("fast", 4.0))]
    return aims


def steps() -> list[Aim]:
    def step(work: str, aim: float, row: str, how: str, ours: str, other: str) -> Aim:
        return Aim(work, aim, "steps", f"{row}.{how}", peaks=(f"{row}.{ours}", f"{row}.{other}_peak"))

    aims = []
    for net in ("dense", "pathway"):
        work = f"AT with PGD-10, {net}, beside the live network"
        aims.append(step(work, 1.35, f"at_{net}", "live", "peak", "live"))
        aims.append(step(f"{work}, attack in bf16", 2.2, f"at_{net}", "in_bf16", "in_bf16_peak", "live"))
    for experts, aim in ((2, 2.5), (4, 3.0), (8, 4.0)):
        work = f"AdvMoE's step, {experts} experts, beside every expert on every image"
        aims.append(step(work, aim, f"advmoe_{experts}", "all_experts", "peak", "all_experts"))
    return [*aims, step("RT-ER's step beside a loop over images", 2.0, "rt_er", "loop", "peak", "loop")]


def speed() -> list[Aim]:
    aims = [
        Aim(f"`evaluate`, PGD-50, {net}, beside {peer}, {how}", aim, "bench", f"{row}{ending}.{peer}")
        for net, ending in (("digits", ""), ("`cifar10_resnet8_x10_0`", "_resnet8"))
        for peer, least in (("torchattacks", 1.6), ("foolbox", 1.9))
        for how, row, aim in (("strict", "pgd", least), ("fast", "pgd_fast", 3.0))
    ]
    for what, row, aim in (("MLP", "mlp", 2.0), ("two convolutions", "two", 1.2), ("four convolutions", "four", 1.2)):
        aims.append(Aim(f"CROWN, {what}, beside auto_LiRPA", aim, "bench", f"crown_{row}.auto_lirpa"))
    share = "`quick_verdict`'s share of the passes of `autoattack_routing`, the dearest net, %"
    return [
        *aims,
        Aim("smoothing beside a plain loop", 1.25, "bench", "smoothing.loop"),
        Aim("ViT-MoE's step, 64 experts over 8", 1.3, "bench", "vit_moe.experts_64", most=True),
        Aim("tokens through 64 experts over 8", 1.25, "bench", "tokens.experts_64", most=True),
        Aim("`robustmoe list`, CPU seconds", 0.3, "bench", "start.seconds", most=True),
        Aim("CIFAR-10 out of parquet, the second time, CPU seconds", 1.5, "bench", "parquet.seconds", most=True),
        Aim(share, 100 / 3, "quick_verdict", "digits_dual.share", most=True),
    ]


@cache
def numbers(file: str) -> dict[str, Any]:
    path = RESULTS / f"{file}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["numbers"]) if path.is_file() else {}


def looked_up(file: str, path: str) -> Any:
    """The number there, None where there is none."""
    value: Any = numbers(file)
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def cell(aim: Aim, ending: str) -> str:
    value = looked_up(aim.file + ending, aim.path)
    if value is None:
        return ""
    number, spread = value, ""
    if isinstance(value, dict):
        number = value["value"]
        spread = f" ({value['low']:.2f}-{value['high']:.2f})" if value["low"] < value["high"] else ""
    met = number <= aim.aim if aim.most else number >= aim.aim
    return f"{number:.2f}{spread}" if met else f"**{number:.2f}**{spread}"


def table() -> str:
    lines = ["| work | aimed at | AVX-512 | AVX2 | peak, MB: ours | the other's |", "|---|---|---|---|---|---|"]
    for aim in [*suites(), *steps(), *speed()]:
        peaks = ["", ""] if aim.peaks is None else [f"{looked_up(aim.file, path):.0f}" for path in aim.peaks]
        asked = f"{'at most ' if aim.most else ''}{aim.aim:.2f}"
        lines.append("| " + " | ".join([aim.work, asked, *(cell(aim, ending) for ending in SETS), *peaks]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
