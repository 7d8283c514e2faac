"""The files of a run folder: rows and other records, config, metrics, weights, checkpoint."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from case import Case, Evil
from mutations import Draw, change_bytes, change_json, change_kind, damage, dumped, shown

_ATTACK = "pgd(linf(0.1), steps=1)"
EVALUATE = ["evaluate", "run", "--limit", "6", "--curve", "none"]


def _case(words: str, argv: list[list[str]], draw: Draw) -> Case:
    chosen = draw(st.sampled_from(argv))
    return Case(f"{words}; {' '.join(chosen[:2])}", chosen, valid=words == "none")


def _one(folder: Path, draw: Draw, canary: str, pattern: str) -> str:
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    if draw(st.integers(0, 39)) == 0:
        return "none"
    return damage(draw(st.sampled_from(files)), draw, canary)


def rows(folder: Path, draw: Draw, canary: str) -> Case:
    words = _one(folder, draw, canary, "run/rows/*.jsonl")
    again = [*EVALUATE, "--attack", "pgd(linf(0.1), steps=2)"] if words.startswith("pgd") else EVALUATE
    return _case(words, [["analyze", "run"], ["report", "run"], again], draw)


def records(folder: Path, draw: Draw, canary: str) -> Case:
    names = ["sweep.json", "dissection.json", "lipschitz.json", "checks.json", "certificates", "blend.json"]
    name = draw(st.sampled_from(names))
    run = "blend" if name == "blend.json" else "run"
    words = _one(folder, draw, canary, f"{run}/{name}/*" if name == "certificates" else f"{run}/{name}")
    again = {
        "sweep.json": ["sweep", "run", "--limit", "4", "--eps", "0.05,0.1", "--draws", "1", "--attack", _ATTACK],
        "dissection.json": ["dissect", "run", "--limit", "4", "--attack", _ATTACK],
        "lipschitz.json": ["lipschitz", "run", "--limit", "2", "--attack", _ATTACK],
        "checks.json": ["analyze", "run"],
        "certificates": ["certify", "run", "--limit", "3", "--certifier", "bounds(linf(0.01), search=0)"],
        "blend.json": ["blend", "other", "run", "--out", "blend", "--limit", "4", "--alphas", "0,0.5,1", "--attack",
                       _ATTACK],
    }[name]  # fmt: skip
    return _case(words, [["report", run], ["report", run], again], draw)


RESUME = ["train", "tiny.toml", "--out", "run", "--resume"]


def config(folder: Path, draw: Draw, canary: str) -> Case:
    words = _one(folder, draw, canary, "run/config.json")
    verbs = [
        EVALUATE, ["report", "run"], ["analyze", "run"], RESUME, ["check", "run", "--only", "G1", "--limit", "2"],
        ["certify", "run", "--limit", "1", "--certifier", "bounds(linf(0.01), search=0)"],
        ["dissect", "run", "--limit", "2", "--attack", _ATTACK],
        ["train", "tiny.toml", "--out", "o", "--max_steps", "1", "--init", "run"],
    ]  # fmt: skip
    return _case(words, verbs, draw)


def metrics(folder: Path, draw: Draw, canary: str) -> Case:
    return _case(_one(folder, draw, canary, "run/metrics.jsonl"), [["report", "run"], RESUME], draw)


def weights(folder: Path, draw: Draw, canary: str) -> Case:
    """Bits of model.safetensors, its JSON header, or other tensors under the same names."""
    file = folder / "run" / "model.safetensors"
    way = draw(st.integers(0, 9))
    content = file.read_bytes()
    if way <= 3:
        changed, words = change_bytes(content, draw)
        file.write_bytes(changed)
    elif way <= 7:
        length = int.from_bytes(content[:8], "little")
        document, words = change_json(json.loads(content[8 : 8 + length]), draw, canary)
        head = dumped(document).encode("utf-8", "surrogatepass")
        file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])
    elif way == 8:
        words = change_kind(file, draw)
    else:
        words = _other_tensors(file, draw)
    verbs = [EVALUATE, ["train", "tiny.toml", "--out", "o", "--max_steps", "1", "--init", "run"],
             ["train", "tiny.toml", "--out", "o", "--max_steps", "1", "--init", "run/model.safetensors"]]  # fmt: skip
    return _case(words, verbs, draw)


def _other_tensors(file: Path, draw: Draw) -> str:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = draw(st.sampled_from(sorted(tensors)))
    old = tensors[name]
    makers: dict[str, Any] = {
        "nan": torch.full_like(old, float("nan")), "inf": torch.full_like(old, float("inf")), "half": old.half(),
        "double": old.double(), "int": old.long(), "empty": old.flatten()[:0], "one more": torch.cat([old, old[:1]]),
        "huge": old * 1e30, "flat": old.flatten(), "bool": old > 0,
    }  # fmt: skip
    how = draw(st.sampled_from(sorted(makers)))
    tensors[name] = makers[how]
    save_file(tensors, file)
    return f"{name} is {how}"


def state(folder: Path, draw: Draw, canary: str) -> Case:
    """Bits of state.pt, a hostile pickle in its place, or other values inside it."""
    import torch

    from robustmoe.training.checkpoint import read_state, save_state

    file = folder / "run" / "state.pt"
    way = draw(st.integers(0, 9))
    if way == 0:
        words = change_kind(file, draw)
    elif way <= 4:
        changed, words = change_bytes(file.read_bytes(), draw)
        file.write_bytes(changed)
    elif way == 5:
        words = draw(
            st.sampled_from(["a hostile pickle", "a hostile pickle in a zip", "a hostile value", "a whole model"])
        )
        evil: Any = Evil(canary)
        saved = {"a whole model": torch.nn.Linear(2, 2), "a hostile value": {"model": evil}}.get(words, evil)
        if words == "a hostile pickle":
            file.write_bytes(pickle.dumps(evil))
        elif draw(st.booleans()):
            torch.save(saved, file)
        else:
            save_state(file, saved)
            words += " with its digest"
    else:
        saved = read_state(file)
        words = _change_state(saved, draw, canary)
        save_state(file, saved)  # with a digest that is right: nothing else would be read
    return _case(words, [RESUME], draw)


def _change_state(saved: dict[str, Any], draw: Draw, canary: str) -> str:
    import torch

    from mutations import Raw, values

    node, way = saved, ""
    while True:
        key = draw(st.sampled_from(sorted(node, key=repr)))
        way += f".{key}"
        below = node[key]
        if not isinstance(below, dict) or not below or draw(st.integers(0, 3)) == 0:
            break
        node = below
    odd = [value for value in values(canary) if not isinstance(value, Raw)]
    odd += [torch.zeros(3), torch.full((2, 2), float("nan")), float("nan"), float("inf"), -5]
    if isinstance(node[key], torch.Tensor):
        odd += [node[key] * float("nan"), node[key].double(), node[key][:0], node[key].flatten()]
    action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add"]))
    if action == "delete":
        del node[key]
        return f"delete {way}"
    new = draw(st.sampled_from(odd))
    node[key if action == "replace" else f"{key}x"] = new
    return f"{action} {way}: {shown(new)}"
