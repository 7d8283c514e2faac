"""Forecasts beside the truth: docs/results/forecasts.json.

python benchmarks/forecasts.py     # half an hour on one thread
python benchmarks/forecasts.py dense rt_er     # some of them alone, the others stay; `commits` says what each measured

Five trainings on digits and three evaluations. Each is forecast in a process of its own, and then done in another:
seconds of the CPU (another job on the machine does not lengthen them) and the peak of memory of each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from results import RESULTS, described, spread_of, write

ROUNDS = 3
SEED = 0
THREADS = 1
NET = "resnet8(width=16)"
BALL = "linf(0.1)"
STEP = f"pgd({BALL}, steps=3, keep=last)"
COMMON = {
    "data": "digits",
    "schedule": "one_cycle",
    "batch_size": 64,
    "seed": SEED,
    "threads": THREADS,
    "val_attack": f"pgd({BALL}, steps=10)",
    "device": "cpu",
}
TRAININGS = {
    "dense": {"model": NET, "method": f"at({STEP})", "epochs": 10},
    "advmoe": {
        "model": f"pathway({NET}, experts=2, ratio=0.5, router=small_cnn, standardise=True)",
        "method": f"advmoe({STEP}, variant=released)",
        "epochs": 4,
    },
    "rt_er": {
        "model": f"ensemble({NET}, experts=2, router=linear, gate=straight_through)",
        "method": f"rt_er({STEP}, beta=6)",
        "epochs": 4,
    },
    "vit_moe": {
        "model": "vit_moe(tiny, patch=2, width=48, depth=4, heads=4, experts=8, k=2, placement=every_2)",
        "method": f"at({STEP}, balance=0.01, balance_loss=vmoe)",
        "epochs": 4,
        "ema": 0.99,
    },
    "affine": {
        "model": "affine(patch_resnet(width=8), experts=16, routers=norm)",
        "method": f"at({STEP})",
        "epochs": 12,
    },
}
EVALUATIONS = {
    "pgd_and_curve": ("zoo:digits_pathway", {"attacks": f"pgd({BALL}, steps=100)"}),
    "apgd": ("zoo:digits_dense", {"attacks": f"apgd({BALL}, steps=100, restarts=3)", "curve": "none"}),
    "autoattack_routing": ("zoo:digits_pathway", {"attacks": f"autoattack_routing({BALL})", "limit": 16}),
}


def told(name: str, truth: bool) -> dict[str, float]:
    """CPU seconds and bytes at the peak of one case, done or forecast; in this process."""
    import torch

    import robustmoe as rm
    from robustmoe import memory

    torch.set_num_threads(THREADS)
    rm.train, rm.evaluate_run, rm.forecast  # noqa: B018 (imports are no part of the work)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        if truth and name in TRAININGS:
            rm.train(rm.Recipe(**COMMON, **TRAININGS[name]), f"{folder}/run")
        elif truth:
            run, options = EVALUATIONS[name]
            rm.evaluate_run(run, out=folder, seed=SEED, device="cpu", **options)
        else:
            made = _forecast(name)
            return {**made.summary(), "spent": time.process_time() - begun}
        return {"cpu_seconds": time.process_time() - begun, "peak_bytes": memory.peak(device) or 0}


def _forecast(name: str) -> Any:
    import robustmoe as rm

    if name in TRAININGS:
        made = rm.forecast(rm.Recipe(**COMMON, **TRAININGS[name]))
    else:
        run, options = EVALUATIONS[name]
        made = rm.forecast(run, seed=SEED, device="cpu", **options)
    print(made, file=sys.stderr)
    return made


def child(name: str, what: str) -> dict[str, Any]:
    """What a process of its own says of a case."""
    command = [sys.executable, __file__, what, name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def beside(name: str) -> dict[str, Any]:
    """Forecast and truth of a case, and what the forecast is off, in per cent of the truth."""
    guess, true = child(name, "--forecast"), child(name, "--truth")
    return {
        "forecast": guess["cpu_seconds"],
        "from": guess["cpu_seconds_from"],
        "to": guess["cpu_seconds_to"],
        "at_most": guess["cpu_seconds_at_most"],
        "truth": true["cpu_seconds"],
        "off": 100 * (guess["cpu_seconds"] / true["cpu_seconds"] - 1),
        "spent": guess["spent"],
        "peak_forecast": guess["peak_bytes"] / 1e6,
        "peak": true["peak_bytes"] / 1e6,
        "peak_off": 100 * (guess["peak_bytes"] / true["peak_bytes"] - 1),
    }


def main() -> None:
    if sys.argv[1:2] in (["--truth"], ["--forecast"]):
        print(json.dumps(told(sys.argv[2], sys.argv[1] == "--truth")))
        return
    about = described("python benchmarks/forecasts.py", seeds=[SEED], threads=THREADS, rounds=ROUNDS)
    names = sys.argv[1:] or [*TRAININGS, *EVALUATIONS]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            rounds[name].append(beside(name))
            print(f"{name}: {json.dumps(rounds[name][-1])}", flush=True)
    for name, each in rounds.items():
        keep(about, name, over_rounds(each))


def over_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a case, the least and the most that a forecast is off, how many are within 25 %, and what the
    longest truth took above the shortest, in per cent.
    """
    truths, off = [each["truth"] for each in rounds], [each["off"] for each in rounds]
    return {
        **{key: statistics.median(each[key] for each in rounds) for key in rounds[0] if key != "off"},
        "off": {"least": min(off), "most": max(off)},
        "within_25": sum(abs(each) <= 25 for each in off),
        "truth_varies": 100 * (max(truths) / min(truths) - 1),
        "rounds": rounds,
    }


def keep(about: dict[str, Any], name: str, case: dict[str, Any]) -> None:
    """Writes a case into the results, beside those that are there; each with the commit that it measured."""
    file = RESULTS / "forecasts.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"about": {}, "numbers": {}}
    there = old["numbers"]
    cases = {each: there[each] for each in [*TRAININGS, *EVALUATIONS] if "rounds" in there.get(each, {})} | {name: case}
    commits = {each: old.get("commits", {}).get(each, old["about"].get("commit")) for each in cases}
    commits[name] = about["commit"]
    summary = {
        "off": spread_of([abs(each["off"]) for case in cases.values() for each in case["rounds"]]),
        "peak_off": spread_of([abs(each["peak_off"]) for case in cases.values() for each in case["rounds"]]),
        "within_25": sum(each["within_25"] for each in cases.values()),
        "forecasts": sum(len(each["rounds"]) for each in cases.values()),
    }
    asked = {"common": COMMON, "trainings": TRAININGS, "evaluations": EVALUATIONS}
    write(file, about, {**cases, "all": summary}, commits=commits, asked=asked)


if __name__ == "__main__":
    main()
