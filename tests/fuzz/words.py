"""What is typed: recipes, specs, flags and paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from artefacts import RECIPE
from case import Case
from mutations import PAYLOAD, Draw, Raw, change_bytes, shown, values

CALL: dict[str, list[str]] = {
    "attack": [
        "pgd(linf(0.1), steps=2)", "pgd(l2(0.5), steps=1, step_size=0.1, restarts=2, keep=last)", "fgsm(linf(8/255))",
        "pgd(l1(2), steps=1, objective=experts_only(loss=ce))", "apgd(linf(0.1), steps=3, rho=0.75)",
        "apgd_t(linf(0.1), steps=2, targets=2)", "fab(linf(0.1), steps=2, targets=1)", "fmn(linf(0.1), steps=3)",
        "square(linf(0.1), steps=3)", "pgd(linf(0.1), steps=1, start=clean)",
        "bf16(pgd(linf(0.1), steps=1))",
        "through(soft(temperature=2), pgd(linf(0.1), steps=1))", "through(expert(1), pgd(linf(0.1), steps=1))",
        "route_flip(linf(0.1), steps=1, grid=[0, 1])",
        "expert_transition(linf(0.1), steps=1, grid=[0, 1])",
        "route_beam(linf(0.1), steps=1, beam=1, depth=1, candidates=2, grid=[0])",
        "pgd(linf(0.1), steps=1, objective=targeted(rank=2, loss=dlr))",
        "pgd(linf(0.1), steps=1, objective=router_hinge(cap=0.1))",
        "vmoe_pgd(linf(0.1), steps=1)", "pgd(linf(0.1), steps=1, objective=diluted(loss=ce, weight=6))",
    ],
    "certifier": [
        "bounds(linf(0.01), search=0)", "bounds(l2(0.1), how=ibp, search=1, up=1)", "smoothing(sigma=0.25, n0=4, n=8)",
        "theorem_5_4(linf(0.01), search=0)", "soft_lipschitz(linf(0.01), search=0)",
        "smoothing(sigma=0.5, n0=4, n=8, alpha=0.05, of=router)",
    ],
    "model": [
        "linear", "ensemble(linear, experts=2, router=linear)", "small_cnn(width=4)", "conv_small(width=2, hidden=4)",
        "dual(linear, linear, alpha=0.5, mix=logits)", "resized(linear, size=4)",
        "pathway(resnet8(width=4), experts=2, router=linear)",
        "ensemble(linear, experts=3, k=2, gate=soft, router=linear, mix=probabilities)", "own.py:make_model",
        "block_moe(resnet8(width=4), stages=[3], experts=2)", "pruned(resnet8(width=4), ratio=0.5)",
        "downsampled(linear, size=4)",
    ],
    "data": ["digits", "digits(val=0.2)", "folder(root='images', channels=1)",
    "folder(root='images', size=8, channels=1, val=0.5, in_memory=True)"],
    "method": [
        "standard", "standard(label_smoothing=0.1, mixup=0.2, loss=sigmoid)", "at(pgd(linf(0.1), steps=1))",
        "trades(pgd(linf(0.1), steps=1), beta=6)", "awp(mart(pgd(linf(0.1), steps=1), beta=5), gamma=0.01, start=0.1)",
        "gaussian(sigma=0.1)", "at(fgsm(linf(0.1)), balance=0.1, moves=all)", "rt_er(pgd(linf(0.1), steps=1))",
        "certified(linf(0.01), how=ibp, kappa=0.5)", "advmoe(pgd(linf(0.1), steps=1))",
        "consistent(standard, loss=kl, weight=1)",
    ],
    "optimizer": ["sgd(lr=0.1, momentum=0.9, weight_decay=5e-4)", "adamw(lr=1e-3)",
    "sgd(lr=0.1, momentum=0.9, nesterov=True)"],
    "schedule": ["cosine(warmup=0.1)", "constant", "step(milestones=[0.5, 0.75], factor=0.1)",
    "cyclic(cycles=2, low=0.5)", "one_cycle(rise=0.4)", "poly(0.9)"],
    "augment": ["crop_flip(padding=2)", "crop_flip(padding=0, flip=False, cutout=2)"],
    "sharpening": ["scaled(2)", "nuts", "nuts(scale=5, shift=-1.1, power=4)"],
    "threat": ["linf(0.1)", "l2(0.5)", "l1(8/255)"],
}  # fmt: skip

_ATTACK = "pgd(linf(0.1), steps=1)"
USES: dict[str, list[list[str]]] = {
    "attack": [
        ["evaluate", "run", "--limit", "2", "--curve", "none", "--attack", "{}"],
        ["sweep", "run", "--limit", "2", "--eps", "0.1", "--draws", "0", "--attack", "{}"],
        ["dissect", "run", "--limit", "2", "--attack", "{}"],
        ["train", "tiny.toml", "--max_steps", "1", "--val_limit", "4", "--out", "o", "--val_attack", "{}"],
    ],
    "certifier": [["certify", "run", "--limit", "2", "--certifier", "{}"]],
    "sharpening": [["blend", "other", "run", "--out", "o", "--limit", "2", "--alphas", "0.5", "--attack", _ATTACK,
    "--sharpen", "{}"]],
    "threat": [["evaluate", "run", "--limit", "2", "--curve", "none", "--attack", "pgd({}, steps=1)"]],
    "data": [
        ["evaluate", "run", "--limit", "2", "--curve", "none", "--out", "o", "--data", "{}"],
        ["train", "tiny.toml", "--max_steps", "1", "--val_limit", "4", "--out", "o", "--data", "{}"],
    ],
}  # fmt: skip

TOKEN = re.compile(r"[A-Za-z_][\w.:]*|\d+(?:\.\d+)?(?:e-?\d+)?|'[^']*'|\S|\s+")
WORK = re.compile(r"(steps|restarts|n|n0|search|up|regions|beam|depth|candidates|eot|batch|cycles|region_steps)=$")
"""What costs time in proportion: a large number there is work that was asked for, and no hang."""

NUMBERS = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "0.5",
    "1.5",
    "-0.5",
    "1e-320",
    "1e308",
    "1e999",
    "-1e999",
    "1/0",
    "8/255",
    "0x10",
    "1_0",
]
LARGE = ["1000000000", "9223372036854775807", "9223372036854775808", "1" + "0" * 30, "9" * 5000]
NAMES = ["None", "True", "false", "nan", "inf", "linf", "pgd", "digits", "linear", "all", "os.system", "__import__",
    "x", "ce", "'a'", "\"b\"",
         "[]", "[1, 2]", "()", "[[[]]]", "{}", "lambda: 1", "exact", "own.py:make_model", "own.py:nothing",
         "gone.py:f", "/etc/passwd:x",
         "../own.py:make_model", "é", "\u202e", "\0", "\x1b[31m", "\n", "1j", "-", "*", "**", "...", "=", ",", "(",
         ")", ":="]  # fmt: skip


def _hostile(canary: str) -> list[str]:
    payload = PAYLOAD.format(canary=canary)
    return [
        payload, f"pgd({payload})", f"own.py:{payload}", f"pgd(linf({payload}))", f"{{{payload}}}", f"f'{{{payload}}}'",
        f"(lambda: {payload})()", f"[x for x in [{payload}]]", "linf.__class__.__init__.__globals__",
        "pgd.__class__(1)",
        "().__class__.__bases__[0].__subclasses__()", f"{canary}/evil.py:f", "own.py:Mine.__init__",
        "own.py:torch.load('x')",
        "own.py:__builtins__", "1+" * 2000 + "1", "(" * 5000, "pgd(" * 3000, "-" * 5000 + "1", "[" * 90 + "]" * 90,
        "9**9**9**9",
        "linf(9**999999)", "'a'*10**10", "", " ", "\n", "#", "pgd(linf(0.1)) pgd", "pgd(linf(0.1));1",
        "pgd(**{'a': 1})", "x" * 100_000,
    ]  # fmt: skip


def _changed(spec: str, draw: Draw) -> str:
    tokens = TOKEN.findall(spec)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        at = draw(st.integers(0, len(tokens) - 1))
        token = tokens[at]
        action = draw(st.sampled_from(["other"] * 8 + ["gone", "twice", "put in", "letter", "end"]))
        if action == "other":
            number = token[0].isdigit()
            slow = WORK.search("".join(tokens[:at]))
            pool = (NUMBERS if slow else NUMBERS + LARGE) if number else NAMES
            tokens[at] = draw(st.sampled_from(pool + NAMES if number and not slow else pool))
        elif action == "gone":
            del tokens[at]
        elif action == "twice":
            tokens.insert(at, token)
        elif action == "put in":
            tokens.insert(at, draw(st.sampled_from(NAMES)))
        elif action == "letter":
            cut = draw(st.integers(0, len(token)))
            tokens[at] = token[:cut] + draw(st.sampled_from(["x", "_", " ", "", "é", "."])) + token[cut + 1 :]
        else:
            tokens.insert(
                len(tokens) - 1,
                draw(st.sampled_from([", zzz=1", ", 1, 2, 3", ", seed=-1", ", seed=2**70", ", ", ", steps=None"])),
            )
        if not tokens:
            break
    return "".join(tokens)


def spec_text(folder: Path, draw: Draw, canary: str) -> Case:
    kind = draw(st.sampled_from([*CALL, "attack", "attack", "model", "method"]))
    way = draw(st.integers(0, 11))
    spec = draw(st.sampled_from(CALL[kind]))
    valid = way == 0
    if way == 1:
        spec = draw(st.sampled_from(_hostile(canary)))
    elif not valid:
        spec = _changed(spec, draw)
    train = ["train", "tiny.toml", "--max_steps", "1", "--val_limit", "4", "--out", "o", f"--{kind}", "{}"]
    argv = [
        spec if word == "{}" else word.replace("{}", spec) for word in draw(st.sampled_from(USES.get(kind, [train])))
    ]
    return Case(
        f"{kind}: {shown(spec)}", argv, valid=False
    )  # a valid spec may be refused on this model: read by a person


# ------------------------------------------------------------------------------------------------------------- recipes


def _toml(value: Any) -> str:
    if isinstance(value, Raw):
        return {"NaN": "nan", "-Infinity": "-inf"}.get(value.text, value.text)
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return repr(value)


EXTRA = ["clip", "augment", "init", "val_attack", "val_certifier", "inputs"]


def recipe(folder: Path, draw: Draw, canary: str) -> Case:
    file, lines = folder / "tiny.toml", RECIPE.strip().splitlines()
    action = draw(
        st.sampled_from(["none"] + ["value"] * 12 + ["spec"] * 4 + ["gone", "twice", "name", "table", "bytes", "bytes"])
    )
    at = draw(st.integers(0, len(lines) - 1))
    field = lines[at].partition(" =")[0]
    words = f"{action} {field}"
    if action == "value":
        field = draw(st.sampled_from([line.partition(" =")[0] for line in lines] + EXTRA))
        value = draw(st.sampled_from(values(canary)))
        lines = [line for line in lines if not line.startswith(f"{field} =")] + [f"{field} = {_toml(value)}"]
        words = f"{field} = {shown(value)}"
    elif action == "spec":
        field, kind = draw(
            st.sampled_from(
                [
                    ("model", "model"),
                    ("method", "method"),
                    ("optimizer", "optimizer"),
                    ("augment", "augment"),
                    ("data", "data"),
                    ("val_attack", "attack"),
                ]
            )
        )
        text = _changed(draw(st.sampled_from(CALL[kind])), draw)
        lines = [line for line in lines if not line.startswith(f"{field} =")] + [f"{field} = {_toml(text)}"]
        words = f"{field} = {shown(text)}"
    elif action == "gone":
        del lines[at]
    elif action == "twice":
        lines.append(lines[at])
    elif action == "name":
        lines[at] = draw(st.sampled_from(["x", "_", "-", "'", "."])) + lines[at]
    elif action == "table":
        lines.insert(at, draw(st.sampled_from(["[table]", "[[list]]", "[model]", "a.b = 1"])))
    content = ("\n".join(lines) + "\n").encode()
    if action == "bytes":
        content, words = change_bytes(content, draw)
    file.write_bytes(content)
    limit = ["--max_steps", "1"] if draw(st.booleans()) else []
    if any(line.startswith(("max_steps =", "epochs =")) for line in lines[-1:]) or action in (
        "gone",
        "bytes",
        "table",
        "name",
    ):
        limit = ["--max_steps", "1"]  # else it may be all that was asked for
    return Case(words, ["train", "tiny.toml", "--out", "o", *limit], valid=action == "none")


# --------------------------------------------------------------------------------------------------------------- flags

VERBS: dict[str, tuple[list[str], list[str]]] = {
    "train": (["tiny.toml", "--max_steps", "1", "--val_limit", "4", "--out", "o"],
              ["--epochs", "--batch_size", "--seed", "--threads", "--ema", "--clip", "--val_limit",
              "--checkpoint_every", "--device", "--precision",
               "--init", "--out", "--attacks", "--resume", "--augment", "--data"]),
    "evaluate": (["run", "--limit", "6", "--curve", "none"],
                 ["--limit", "--batch-size", "--curve", "--split", "--precision", "--seed", "--device", "--out",
                 "--data", "--attack"]),
    "certify": (["run", "--limit", "1", "--certifier", "bounds(linf(0.01), search=0)"], ["--limit", "--batch-size",
    "--seed", "--device", "--certifier"]),
    "sweep": (["run", "--limit", "2", "--eps", "0.1", "--draws", "0", "--attack", _ATTACK], ["--eps", "--draws",
    "--limit", "--batch-size", "--seed"]),
    "dissect": (["run", "--limit", "2", "--attack", _ATTACK], ["--limit", "--batch-size", "--seed", "--attack"]),
    "lipschitz": (["run", "--limit", "1", "--attack", _ATTACK], ["--limit", "--batch-size", "--seed"]),
    "blend": (["other", "run", "--out", "o", "--limit", "2", "--alphas", "0.5", "--attack", _ATTACK],
              ["--alphas", "--mix", "--clean", "--limit", "--out", "--seed", "--sharpen"]),
    "check": (["run", "--only", "G1", "--limit", "2"], ["--only", "--limit", "--seed", "--attack"]),
    "report": (["run"], ["--out"]),
    "analyze": (["run"], ["--out"]),
    "theory": (["X1"], ["--seed", "--out"]),
    "list": (["attacks"], ["--costs"]),
}  # fmt: skip

FLAG_VALUES = [
    "", " ", "-1", "0", "1", "2", "1.5", "1e999", "nan", "inf", "-inf", "1000000000", "9223372036854775808",
    "1" + "0" * 30, "9" * 5000, "none", "auto",
    "true", "x", "\0", "\x1b[31m", "\udce9", "é", "0.1,0.2", ",", "0.1,,0.2", "0.1,0.1", "G2,R4", "-0.5", "1/0",
    "0x1", "1e-320", "cpu", "cuda", "cuda:99",
    "meta", "mps", "cpu:7", "test", "train", "fp32", "bf16", "digits", "linear", "--", "-", "a=b", "paper", "[]",
    "[1]", "(", "'",
]  # fmt: skip
PATHS = [
    "", ".", "run", "run/config.html", "run/config.json", "run/new", "run/rows", "tiny.toml", "tiny.toml/x",
    "new/deep/er", "x" * 300, "a\0b", "~nobodyxx/x",
    "\udce9", "\x1b]0;pwned\x07", "new.html", "/dev/null", "/dev/full", "/proc/nothing/x", "/dev/null/x", "-", "--",
    "circle", "pipe", "gone/..", "../x",
    "é.html", "x.json", ".html", "run/sweep.html", "run/.", "images",
]  # fmt: skip


def flags(folder: Path, draw: Draw, canary: str) -> Case:
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    verb = draw(st.sampled_from(sorted(VERBS)))
    base, names = VERBS[verb]
    argv = [verb, *base]
    action = draw(st.sampled_from(["none"] + ["value"] * 14 + ["unknown", "gone", "twice", "run", "run"]))
    if action == "value":
        flag = draw(st.sampled_from(names))
        pool = PATHS if flag in ("--out", "--init") else FLAG_VALUES
        if flag in ("--draws", "--epochs", "--checkpoint_every"):
            pool = [value for value in pool if not value.isdigit() or len(value) < 3]  # the work would be as large
        argv += [flag, draw(st.sampled_from(pool))]
    elif action == "unknown":
        argv.insert(
            draw(st.integers(0, len(argv))),
            draw(st.sampled_from(["--zzz", "-x", "--limi", "--seed=1=2", "--help=1", "extra", "\0", "--", "-1"])),
        )
    elif action == "gone" and verb != "theory":  # all of its experiments take a minute
        del argv[draw(st.integers(0, len(argv) - 1))]
    elif action == "twice":
        at = draw(st.integers(0, len(argv) - 1))
        argv.insert(at, argv[at])
    elif action == "run":
        argv[1] = draw(st.sampled_from(PATHS))
    return Case(shown(" ".join(argv)), argv, valid=action == "none")
