"""What a user's own code hands over: files with a model (``--model``), and models, images and labels in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from case import Case
from mutations import Draw

HEAD = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.flat(x.flatten(1))
        return {answer}

def make_model():
    torch.manual_seed(0)
    {before}
    model = Mine()
    {after}
    return {result}
"""

ANSWERS = [
    "y", "(y, y)", "{'logits': y}", "None", "3", "'text'", "y.long()", "y > 0", "y.to(torch.complex64)",
    "y.to_sparse()", "y.to('meta')", "y.half()",
    "y.bfloat16()", "y.double()", "y[:, :3]", "y[:1]", "y[0]", "y.flatten()", "y[:, :, None]", "torch.cat([y, y], 1)",
    "y.numpy()", "y.tolist()",
    "y * float('nan')", "y * 1e38 * 1e38", "y.detach()", "y.detach().requires_grad_()", "y * 0", "y * 1e-40",
    "y * 1e30", "y.softmax(1)", "-y.abs() * float('inf')",
    "torch.rand_like(y)", "y if self.calls < 2 else y[:1]", "y if self.calls < 2 else None",
    "y if self.calls < 3 else y.long()", "1 / 0", "self.gone",
    "self.forward(x)", "x.sub_(0.5).flatten(1)[:, :10]", "x.mul_(2).flatten(1)[:, :10]",
    "y if len(x) > 1 else y.squeeze()", "y.squeeze()", "exit(3)",
    "quit()", "(_ for _ in ()).throw(SystemExit)", "(_ for _ in ()).throw(KeyboardInterrupt)",
    "(_ for _ in ()).throw(MemoryError('x'))",
    "(_ for _ in ()).throw(Exception('a\\nb\\x1b[31m'))", "(_ for _ in ()).throw(BaseException('x'))",
    "torch.empty(2**45)", "y.masked_fill(y < 0, -float('inf'))",
    "y + torch.tensor(1.0, requires_grad=True)", "y.abs().sqrt().sqrt()", "y.round()", "y.sign()",
    "nn.functional.one_hot(y.argmax(1), 10).float()",
    "torch.autograd.grad(y.sum(), x)[0].flatten(1)[:, :10]", "y.cpu().clone()", "y.expand(len(x), 10)", "y[:, 0]",
    "nn.Parameter(y)", "y.as_subclass(nn.Parameter)",
]  # fmt: skip
AFTERS = [
    "model.half()", "model.bfloat16()", "model.double()", "model.to('meta')", "model.requires_grad_(False)",
    "model.flat = None", "del model.flat",
    "model.train = None", "model.eval = lambda: 1 / 0", "model.flat.weight.data.fill_(float('nan'))",
    "model.flat.weight.data = model.flat.weight.data.long()",
    "model = model.flat", "model.share_memory()", "model.flat = nn.Linear(63, 10)",
    "model.flat = nn.utils.parametrizations.weight_norm(nn.Linear(64, 10))",
    "model.flat.register_forward_hook(lambda m, i, o: None)",
    "model.flat.register_forward_hook(lambda m, i, o: 1 / 0)",
    "model.flat.register_full_backward_hook(lambda m, i, o: 1 / 0)",
    "model = nn.Sequential(nn.BatchNorm2d(1), model)", "model = nn.Sequential(nn.Dropout(), model)",
    "model = nn.DataParallel(model)", "model.x = model",
]  # fmt: skip
RESULTS = [
    "model", "Mine", "None", "3", "lambda x: x.flatten(1)[:, :10]",
    "torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))",
    "torch.jit.trace(model, torch.zeros(2, 1, 8, 8))", "[model]", "(model, model)", "nn.Identity()",
    "nn.Sequential()", "model.state_dict()", "make_model()",
    "__import__('gone')", "1 / 0", "model.forward", "nn.ModuleList([model])", "exit(0)",
    "torch.compile(model, backend='eager')",
]  # fmt: skip
WHOLE = [
    b"", b"\0", b"\xff\xfe", b"def make_model(:", b"make_model = 3", b"make_model = None",
    b"def make_model(x): return x", b"def make_model(*a): return a",
    b"import gone_module\n", b"raise SystemExit(4)\n", b"raise KeyboardInterrupt\n", b"1/0\n",
    b"# caf\xe9\ndef make_model(): pass\n", b"\xef\xbb\xbfdef make_model(): pass\n",
    b"class make_model: pass\n", b"async def make_model(): pass\n", b"def make_model():\n  yield 1\n",
    b"import sys; sys.exit('text')\n", b"print('\x1b[31m')\ndef make_model(): pass\n",
    b"(" * 5000, b"x = " + b"[" * 150 + b"]" * 150 + b"\n", b"from own import make_model\n",
    b"def make_model(): return make_model()\n", b"__getattr__ = lambda n: 1 / 0\n",
]  # fmt: skip

_ATTACK = "pgd(linf(0.1), steps=2)"


def model_file(folder: Path, draw: Draw, canary: str) -> Case:
    answer, before, after, result = "y", "pass", "pass", "model"
    way = draw(st.sampled_from(["none", *["answer"] * 7, *["after"] * 3, *["result"] * 2, *["whole"] * 3, "name"]))
    words, name = way, "own.py:make_model"
    if way == "answer":
        words = answer = draw(st.sampled_from(ANSWERS))
    elif way == "after":
        words = after = draw(st.sampled_from(AFTERS))
    elif way == "result":
        words = result = draw(st.sampled_from(RESULTS))
    elif way == "name":
        words = name = draw(
            st.sampled_from(
                [
                    "own.py",
                    "own.py:",
                    ":make_model",
                    "own.py:gone",
                    "own.py:torch",
                    "own.py:Mine.forward",
                    "gone.py:f",
                    "own.txt:make_model",
                    "own.py:make_model:x",
                    "own.py:make_model(",
                    "own.py:make_model(1)",
                    ".:f",
                    "/dev/zero:f",
                    "own.py:__name__",
                    "own.py:make_model()()",
                ]
            )
        )
    source = (
        HEAD.replace("{answer}", answer)
        .replace("{before}", before)
        .replace("{after}", after)
        .replace("{result}", result)
    )
    content = source.encode()
    if way == "whole":
        content = draw(st.sampled_from(WHOLE))
        words = repr(content[:60])
    (folder / "own.py").write_bytes(content)
    verbs = [
        ["evaluate", "--model", name, "--data", "digits", "--limit", "4", "--curve", "none", "--attack", _ATTACK,
        "--out", "o"],
        ["evaluate", "--model", name, "--data", "digits", "--limit", "1", "--curve", "none", "--attack",
        "apgd_t(linf(0.1), steps=2, targets=2)", "--out", "o"],
        ["certify", "--model", name, "--data", "digits", "--limit", "2", "--certifier",
        "bounds(linf(0.01), search=0)", "--out", "o"],
        ["certify", "--model", name, "--data", "digits", "--limit", "2", "--certifier",
        "smoothing(sigma=0.1, n0=2, n=4)", "--out", "o"],
        ["sweep", "--model", name, "--data", "digits", "--limit", "2", "--eps", "0.1", "--draws", "0", "--attack",
        _ATTACK, "--out", "o"],
        ["dissect", "--model", name, "--data", "digits", "--limit", "2", "--attack", _ATTACK, "--out", "o"],
        ["lipschitz", "--model", name, "--data", "digits", "--limit", "1", "--attack", _ATTACK, "--out", "o"],
        ["train", "tiny.toml", "--model", name, "--max_steps", "1", "--val_limit", "4", "--out", "o"],
    ]  # fmt: skip
    argv = draw(st.sampled_from(verbs[:2] if way == "none" else [*verbs, verbs[0], verbs[0]]))
    return Case(f"{argv[0]}: {words}", argv, valid=way == "none")


# ----------------------------------------------------------------------------------------------------------- in Python

N, SHAPE, CLASSES = 4, (1, 6, 6), 3


def _images(kind: str) -> Any:
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1))
    nan, outside = x.clone(), x.clone()
    nan[1, 0, 2, 2], outside[2, 0, 1, 1] = float("nan"), 1.5
    return {
        "whole": x, "half": x.half(), "bfloat16": x.bfloat16(), "double": x.double(), "bytes": (x * 255).byte(),
        "int": (x * 0).long(), "nan": nan,
        "inf": nan.nan_to_num(float("inf")), "above": outside, "below": x - 0.5, "normalised": (x - 0.5) / 0.2,
        "rounding": x.clamp(0, 1) * (1 + 1e-7),
        "none": x[:0], "one": x[:1], "flat": x.flatten(1), "three axes": x[0], "empty pixels": x[..., :0],
        "complex": x.to(torch.complex64),
        "bool": x > 0.5, "numpy": x.numpy(), "list": x.tolist(), "text": "images", "nothing": None,
        "sparse": x.to_sparse(), "meta": x.to("meta"),
        "leaf": x.clone().requires_grad_(), "not contiguous": x.transpose(2, 3), "expanded": x[:1].expand(N, *SHAPE),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "other size": torch.rand(N, 1, 5, 7), "other channels": torch.rand(N, 3, 6, 6), "read only": _read_only(x),
        "inference": _inference(x),
    }[kind]  # fmt: skip


def _read_only(x: Tensor) -> Any:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _labels(kind: str, n: int) -> Any:
    y = torch.arange(n) % CLASSES
    return {
        "whole": y, "int32": y.int(), "int8": y.to(torch.int8), "uint8": y.byte(), "uint16": y.to(torch.uint16),
        "float": y.float(), "bool": y > 0,
        "minus": y - 1, "high": y + CLASSES, "huge": y + 2**40, "few": y[:-1], "many": torch.cat([y, y]),
        "column": y[:, None], "one hot": nn.functional.one_hot(y, CLASSES),
        "list": y.tolist(), "numpy": y.numpy(), "big endian": y.numpy().astype(">i4"), "text": ["a"] * n,
        "nothing": None, "number": 1, "complex": y.to(torch.complex64),
        "nan": y * float("nan"), "objects": [None] * n, "dict": {0: 1}, "meta": y.to("meta"), "sparse": y.to_sparse(),
        "inference": _inference(y),
    }[kind]  # fmt: skip


IMAGES = ["whole", "half", "bfloat16", "double", "bytes", "int", "nan", "inf", "above", "below", "normalised",
    "rounding", "none", "one", "flat", "three axes",
          "empty pixels", "complex", "bool", "numpy", "list", "text", "nothing", "sparse", "meta", "leaf",
          "not contiguous", "expanded", "channels last",
          "other size", "other channels", "read only", "inference"]  # fmt: skip
LABELS = ["whole", "int32", "int8", "uint8", "uint16", "float", "bool", "minus", "high", "huge", "few", "many",
    "column", "one hot", "list", "numpy", "big endian",
          "text", "nothing", "number", "complex", "nan", "objects", "dict", "meta", "sparse", "inference"]  # fmt: skip
MODELS = ["whole", "routed", "tuple", "none", "int", "bool", "complex", "nan", "inf", "wrong n", "one class",
    "squeeze", "in place", "no gradient", "fails", "fails later", "half",
          "double", "meta", "minus inf", "tiny", "large", "training", "random", "sequential"]  # fmt: skip
ATTACKS = [
    "pgd(linf(0.1), steps=2)", "pgd(l2(0.5), steps=2)", "pgd(l1(2), steps=2)", "fgsm(linf(0.1))",
    "apgd(linf(0.1), steps=3)", "apgd(l2(0.5), steps=3)", "apgd(l1(2), steps=3)",
    "apgd_t(linf(0.1), steps=2, targets=2)", "fab(linf(0.1), steps=2)", "fmn(linf(0.1), steps=2)",
    "fmn(l2(0.5), steps=2)", "square(linf(0.1), steps=3)", "square(l2(0.5), steps=3)",
    "route_flip(linf(0.1), steps=1, grid=[0, 1])", "expert_transition(linf(0.1), steps=1, grid=[0, 1])",
    "through(expert(1), pgd(linf(0.1), steps=1))",
    "pgd(linf(0.1), steps=1, objective=targeted(rank=2, loss=dlr))", "bf16(pgd(linf(0.1), steps=1))",
    "route_beam(linf(0.1), steps=1, beam=1, depth=1, candidates=2, grid=[0])",
    "through(soft(temperature=1), pgd(linf(0.1), steps=1))",
]  # fmt: skip
CERTIFIERS = [
    "bounds(linf(0.01), search=0)",
    "smoothing(sigma=0.25, n0=4, n=8)",
    "theorem_5_4(linf(0.01), search=0)",
    "soft_lipschitz(linf(0.01), search=0)",
]


class Odd(nn.Module):
    """A linear model with a fault of the given kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.calls = kind, 0
        self.flat = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.kind == "in place":
            x.sub_(0.5)
        y = self.flat(x.flatten(1).to(self.flat.weight.dtype))
        if self.kind == "fails" or (self.kind == "fails later" and self.calls > 2):
            raise RuntimeError("out of\nluck")
        answers: dict[str, Any] = {
            "tuple": (y, y), "none": None, "int": y.long(), "bool": y > 0, "complex": y.to(torch.complex64),
            "nan": y * float("nan"), "inf": y / 0,
            "wrong n": y[:-1], "one class": y[:, :1], "squeeze": y.squeeze(), "no gradient": y.detach(),
            "minus inf": y.masked_fill(y < 0, -float("inf")),
            "tiny": y * 1e-40, "large": y * 1e30, "random": y + torch.rand_like(y),
        }  # fmt: skip
        return answers.get(self.kind, y)


def _model(kind: str) -> Any:
    from robustmoe.models import build_model

    if kind == "routed":
        return build_model("ensemble(linear, experts=2, router=linear)", CLASSES, SHAPE, seed=0)
    if kind == "sequential":
        return nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    model = Odd(kind)
    if kind in ("half", "double"):
        return model.half() if kind == "half" else model.double()
    return model.to("meta") if kind == "meta" else model.train(kind == "training")


def api(folder: Path, draw: Draw, canary: str) -> Case:
    """An attack called directly, `evaluate` or `certify`; of images, labels and model one or two are odd."""
    call = draw(st.sampled_from(["attack", "attack", "attack", "evaluate", "certify"]))
    odd = draw(st.sampled_from(["images", "images", "labels", "labels", "model", "model", "two", "none"]))
    images = draw(st.sampled_from(IMAGES)) if odd in ("images", "two") else "whole"
    labels = draw(st.sampled_from(LABELS)) if odd in ("labels", "two") else "whole"
    model = draw(st.sampled_from(MODELS)) if odd == "model" else draw(st.sampled_from(["whole", "routed"]))
    spec = draw(st.sampled_from(CERTIFIERS if call == "certify" else ATTACKS))
    words = f"{call} {spec}: images {images}, labels {labels}, model {model}"
    needs_router = any(name in spec for name in ("route", "expert", "soft(", "theorem", "soft_lipschitz", "boun"))
    valid = (images, labels) == ("whole", "whole") and (model == "routed" or (model == "whole" and not needs_router))
    return Case(words, lambda: _called(call, spec, images, labels, model), valid=valid and call != "certify")


def _called(call: str, spec: str, images: str, labels: str, model: str) -> None:
    import robustmoe as rm
    from robustmoe import spec as specs

    x, net = _images(images), _model(model)
    y = _labels(labels, len(x) if hasattr(x, "__len__") and not isinstance(x, str) else N)
    before = x.clone() if isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu" else None
    if call == "attack":
        made: Any = specs.build(spec, "attack")
        out = made(net, x, y)
        _kept(made, x, out)
        print("attacked", tuple(out.shape), out.dtype)
    elif call == "evaluate":
        results = rm.evaluate(net, x, y, attacks=specs.build(spec, "attack"))
        numbers = [result.summary().robust.value for result in results]
        assert all(0 <= number <= 1 for number in numbers)
        print("robust", numbers)
    else:
        print([record.summary() for record in rm.certify(net, x, y, certifiers=specs.build(spec, "certifier"))])
    if before is not None:
        same = (
            torch.equal(torch.nan_to_num(before.detach()), torch.nan_to_num(x.detach())) if not x.is_complex() else True
        )
        assert same, "the caller's images were changed"


def _kept(attack: Any, x: Any, out: Any) -> None:
    """What an attack promises: images of the same shape in float32 or float64, in the box and in the ball."""
    x = torch.as_tensor(x).detach()
    assert isinstance(out, Tensor), "no tensor"
    assert out.shape == x.shape, f"shape {tuple(out.shape)} of {tuple(x.shape)}"
    assert out.dtype in ({torch.float32, x.dtype} & {torch.float32, torch.float64}), f"{out.dtype} of {x.dtype}"
    assert not out.requires_grad, "the images carry a gradient"
    assert bool(torch.isfinite(out).all()), "not finite"
    slack = 1e-5 if x.dtype in (torch.float32, torch.float64) else 2e-2
    assert -slack <= float(out.min()) <= float(out.max()) <= 1 + slack, "outside the box"
    size = attack.threat.size((out.double() - x.double()).float()) if hasattr(attack.threat, "size") else None
    if size is None:
        delta = (out.double() - x.double()).flatten(1)
        order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[attack.threat.norm]
        size = torch.linalg.vector_norm(delta, ord=order, dim=1)
    within = attack.threat.eps * (1 + 1e-4) + slack * (1 if attack.threat.norm == "linf" else 4)
    assert float(size.max()) <= within, f"distance {float(size.max())} of {attack.threat.eps}"
