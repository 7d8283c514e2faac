"""What the suites cost: AutoAttack beside pyautoattack; autoattack_routing, and PGD-50 with its curve as the command
line runs it, beside an older checkout of this project.

python benchmarks/suites.py [--before CHECKOUT] [--cifar10 FOLDER] [--images 50] [--rounds 1]
                            [--only routing curves peers] [--file suites_avx2]

Nets of the zoo, images that they get right (the curves: the first 256), CPU time of one thread, batches of 128. Every
tool is a process of its own that waits for its turn, so that a busy machine slows all alike; a ratio is the median over
the rounds. Frozen copies and the peer's checks are part of the time, a last pass of the exact model says which images
stand. pyautoattack comes with the extra crosscheck. Writes docs/results/suites.json (or the FILE there); what is not
run, such as all that needs --before, stays in the file as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parents[1] / "src"
ZOO = SOURCES / "robustmoe" / "zoo_models"
EPS = {"digits": 0.1, "fashion": 0.1, "cifar10": 8 / 255}
ROUTING, ROUTING_IMAGES = "digits_pathway", 23
PEERS = ("digits_dense", "digits_pathway", "fashion_mnist_dense", "cifar10_dense")
KINDS = ("routing", "curves", "peers")
CURVES, CURVE_IMAGES = ("digits_dense", "digits_pathway", "cifar10_resnet8_x10_0"), 256


# ------------------------------------------------------------------------------------------------ one process a tool


def zoo_net(name: str) -> Any:
    """The model of a zoo's folder, also for a checkout that knows no zoo."""
    from safetensors.torch import load_file

    from robustmoe.models import build_model

    config = json.loads((ZOO / name / "config.json").read_text(encoding="utf-8"))
    shape = tuple(config["image_shape"])
    model = build_model(config["model"], config["num_classes"], shape, tuple(config["mean"]), tuple(config["std"]))
    model.load_state_dict(load_file(ZOO / name / "model.safetensors"))
    return model.eval()


def images(name: str, model: Any, count: int, cifar10: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first test images that the model gets right, their labels and their indices."""
    from robustmoe import data

    sets = {"digits": data.digits, "fashion": data.fashion_mnist, "cifar10": lambda: data.cifar10(cifar10)}
    test = sets[name.split("_")[0]]().test
    batch = test.batch(list(range(min(len(test), 4 * count))))
    with torch.no_grad():
        right = torch.nonzero(model(batch.x).argmax(1) == batch.y)[:count, 0]
    return batch.x[right], batch.y[right], torch.as_tensor(batch.index)[right]


def by_us(tool: str, model: Any, x: Tensor, y: Tensor, index: Tensor, eps: float) -> tuple[Tensor, dict[str, float]]:
    """Which images stand, and the seconds of each part. An older checkout has other names for two things, and no room
    for targets at once.
    """
    from robustmoe import attacks
    from robustmoe.attacks.base import part_noise
    from robustmoe.evaluation import precision
    from robustmoe.noise import Noise

    room: Any = contextlib.nullcontext
    with contextlib.suppress(ImportError):
        from robustmoe.attacks.together import room_for as room
    frozen = getattr(precision, "frozen_copy", None) or precision.frozen  # type: ignore[attr-defined]
    climbed = frozen(model, x, "fast" if tool == "fast" else "strict")
    suite = "autoattack_routing" if tool in ("new", "old") else "autoattack"
    stands, parts = torch.ones(len(x), dtype=torch.bool), {}
    with torch.no_grad():
        output = model.run(x)
    for name, part in attacks.build_attack(f"{suite}(linf({eps}))").parts(output):
        start, left = time.process_time(), torch.nonzero(stands)[:, 0]
        if len(left):
            with room(128):
                x_adv = part(climbed, x[left], y[left], part_noise(Noise.of(index[left], 0), name))
            if float((x_adv - x[left]).abs().max()) > eps * (1 + 1e-5) + 1e-7:
                raise AssertionError(f"{name} left the ball")
            with torch.no_grad():
                stands[left] = model(x_adv).argmax(1) == y[left]
        parts[name] = time.process_time() - start
    return stands, parts


def by_peer(model: Any, x: Tensor, y: Tensor, eps: float) -> Tensor:
    import pyautoattack  # type: ignore[import-not-found,unused-ignore]

    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=0)
    x_adv = attack.run_standard_evaluation(x, y, batch_size=128)[0]
    with torch.no_grad():
        stands: Tensor = model(x_adv).argmax(1) == y
    return stands


def by_curve(net: str, count: int, cifar10: str) -> list[bool]:
    """Which images stand at each radius, in the order of the radii, of what `evaluate_run` writes: PGD-50 and its curve
    by default, the zoo's folder being the run. An older checkout takes the same words.
    """
    from robustmoe.evaluation import evaluate_run

    attack = f"pgd(linf({EPS[net.split('_')[0]]}),steps=50)"
    data = f"cifar10(root='{cifar10}')" if net.startswith("cifar10") else "digits"
    with tempfile.TemporaryDirectory() as folder:
        evaluate_run(ZOO / net, attacks=[attack], data=data, limit=count, out=folder)
        names = [file for file in Path(folder).rglob("*.jsonl") if not file.name.endswith(".examples.jsonl")]
        files = [[json.loads(line) for line in file.open(encoding="utf-8")] for file in names]
    stands = list[bool]()
    for _, *lines in sorted(files, key=lambda lines: float(lines[0]["eps"])):
        rows = sorted((line for line in lines if line["kind"] == "row"), key=lambda row: int(row["index"]))
        stands += [row["clean"] == row["label"] == row["adversarial"] for row in rows]
    return stands


def serve(net: str, tool: str, count: int, cifar10: str) -> None:
    """Answers each line that comes in by one whole attack: a line of JSON."""
    torch.set_num_threads(1)
    answer, sys.stdout = sys.stdout, sys.stderr
    model = zoo_net(net)
    x, y, index = images(net, model, count, cifar10)
    eps = EPS[net.split("_")[0]]
    for _ in sys.stdin:
        start, parts = time.process_time(), dict[str, float]()
        if tool.startswith("curve"):
            stands = torch.tensor(by_curve(net, count, cifar10))
        elif tool == "peer":
            stands = by_peer(model, x, y, eps)
        else:
            stands, parts = by_us(tool, model, x, y, index, eps)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        said = {"seconds": seconds, "parts": parts, "stands": stands.tolist(), "peak": peak}
        print(json.dumps(said), file=answer, flush=True)


# ------------------------------------------------------------------------------------------------ in turn


def in_turn(net: str, tools: dict[str, Path], count: int, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each tool said in each round, by the sources that it is to be of."""
    processes: dict[str, subprocess.Popen[str]] = {}
    for tool, sources in tools.items():
        command = [sys.executable, __file__, "--serve", net, tool, "--images", str(count), "--cifar10", args.cifar10]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(sources), os.environ.get("PYTHONPATH", "")])}
        processes[tool] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    said: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    for turn in range(args.rounds):
        names = [*tools]
        for tool in names[turn % len(names) :] + names[: turn % len(names)]:
            process = processes[tool]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            said[tool].append(json.loads(process.stdout.readline()))
            print(net, tool, f"{said[tool][-1]['seconds']:.1f} s", sum(said[tool][-1]["stands"]), flush=True)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return said


def ratios(said: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, Any]:
    """Seconds, peaks and what stands of each tool, and how many times as long as each other the reference takes."""
    row: dict[str, Any] = {"n": len(said[reference][0]["stands"])}
    for tool, rounds in said.items():
        each = [old["seconds"] / new["seconds"] for old, new in zip(said[reference], rounds, strict=True)]
        row[tool] = {
            "seconds": statistics.median(one["seconds"] for one in rounds),
            "stand": sum(rounds[0]["stands"]),
            "others": sum(a != b for a, b in zip(rounds[0]["stands"], said[reference][0]["stands"], strict=True)),
            "peak": rounds[-1]["peak"],
            "times": {"value": statistics.median(each), "low": min(each), "high": max(each)},
        }
    return row


def rows(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]], str]]:
    """Name, what each tool said, and which of them is the reference, of each row that can be run here."""
    before = args.before and args.before.resolve() / "src"
    if "routing" in args.only and before:
        yield "routing", in_turn(ROUTING, {"new": SOURCES, "old": before}, ROUTING_IMAGES, args), "old"
    for net in CURVES if "curves" in args.only and before else ():
        if args.cifar10 or not net.startswith("cifar10"):
            tools = {"curve_new": SOURCES, "curve_old": before}
            yield f"curve_{net}", in_turn(net, tools, CURVE_IMAGES, args), "curve_old"
    for net in PEERS if "peers" in args.only else ():
        if args.cifar10 or not net.startswith("cifar10"):
            yield net, in_turn(net, dict.fromkeys(("strict", "fast", "peer"), SOURCES), args.images, args), "peer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an older commit")
    parser.add_argument("--cifar10", default="", help="a folder of CIFAR-10; without it its nets are left out")
    parser.add_argument("--images", type=int, default=50, help="images beside the peer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--file", default="suites", help="the name of the results file")
    parser.add_argument("--serve", nargs=2, metavar=("NET", "TOOL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, args.images, args.cifar10)
        return
    if "peers" in args.only and importlib.util.find_spec("pyautoattack") is None:
        print("pyautoattack is not installed (make crosscheck): the rows beside it stay as they are")
        args.only.remove("peers")
    from results import RESULTS, described, write

    file = RESULTS / f"{args.file}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"about": {}, "numbers": {}}
    numbers, parts = dict(kept["numbers"]), dict(kept.get("parts", {}))
    command = "python benchmarks/suites.py --before CHECKOUT --cifar10 FOLDER"
    for name, said, reference in rows(args):
        numbers[name] = ratios(said, reference)
        if not name.startswith("curve"):
            parts[name] = {tool: rounds[-1]["parts"] for tool, rounds in said.items() if tool != "peer"}
        about = described(command, seeds=[0], rounds=args.rounds, before=kept["about"].get("before", ""))
        about["instructions"] = torch.backends.cpu.get_cpu_capability()
        if args.before is not None:
            git = ["git", "-C", str(args.before), "rev-parse", "HEAD"]
            about["before"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        write(file, about, numbers, parts=parts)


if __name__ == "__main__":
    main()
