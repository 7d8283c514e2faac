"""The private names of torch stand in one module, and do there what their functions say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustmoe import compat

PACKAGE = Path(__file__).parents[1] / "src" / "robustmoe"
PUBLIC = {"_replace", "_asdict", "_fields"}
"""What `typing.NamedTuple` promises under a name with an underscore."""


def names(source: str) -> tuple[set[str], set[str]]:
    """The names with one underscore in front that a module defines, and those that it reads."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    read = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            (read if isinstance(node.ctx, ast.Load) else own).add(name)
        if isinstance(node, ast.AnnAssign | ast.arg):
            target = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            own.add(target)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            read |= {text} if hasattr(nn.Module(), text) or text.startswith("_HAS_DEFAULT") else set()
    private = [{name for name in every if name.startswith("_") and not name.startswith("__")} for every in (own, read)]
    return private[0], private[1]


def test_private_names_are_seen_where_they_are_read() -> None:
    source = """
from a import _b
class C:
    _text: str
    def _own(self): return self._own() + self._modules
x = torch._foreach_mul_
y = getattr(module, "_forward_hooks")
z = type(default).__name__ == "_HAS_DEFAULT_FACTORY"
"""
    own, read = names(source)
    assert own == {"_text", "_own"}
    assert read - own == {"_b", "_modules", "_foreach_mul_", "_forward_hooks", "_HAS_DEFAULT_FACTORY"}


def test_no_other_module_reads_a_private_name_of_others() -> None:
    both = {str(path.relative_to(PACKAGE)): names(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    ours = set().union(*(own for own, _ in both.values()), PUBLIC, {"_"})
    seen = {path: read - ours for path, (_, read) in both.items()}
    assert seen.pop("compat.py") == {
        "_C", "_backward_hooks", "_backward_pre_hooks", "_conv_forward", "_forward_hooks", "_forward_pre_hooks",
        "_functorch", "_grouped_mm", "_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported", "_pg_registry",
    }  # fmt: skip
    assert {path: read for path, read in seen.items() if read} == {}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN, which is asked")
def test_only_half_precision_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cpu, other = torch.device("cpu"), torch.device("mps")
    half = (torch.bfloat16, torch.float16)
    assert all(compat.multiplies(cpu, dtype) for dtype in (torch.float32, torch.float64))
    assert all(compat.multiplies(other, dtype) for dtype in half)
    own = [compat.multiplies(cpu, dtype) for dtype in half]
    assert own == [torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported()]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not any(compat.multiplies(cpu, dtype) for dtype in half)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_every_kind_of_hook_is_seen_and_its_end_too(register: str) -> None:
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(inner)
    assert not compat.has_hooks(inner)
    handle = getattr(inner, register)(lambda *_: None)
    assert compat.has_hooks(inner)
    assert not compat.has_hooks(outer)  # the hook is the inner module's
    handle.remove()
    assert not compat.has_hooks(inner)


class Plain(nn.Conv2d):
    pass


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class OwnProduct(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return -super()._conv_forward(x, weight, bias)


@pytest.mark.parametrize(("kind", "same"), [(nn.Conv2d, True), (Plain, True), (OwnForward, False), (OwnProduct, False)])
def test_a_convolution_with_a_computation_of_its_own_is_known(kind: type[nn.Conv2d], same: bool) -> None:
    assert compat.computes_as_conv2d(kind) is same
    ours, theirs = kind(1, 2, 3), nn.Conv2d(1, 2, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(ours(x), theirs(x)) is same


def test_a_function_transform_is_seen_while_it_runs() -> None:
    inside = []

    def function(x: Tensor) -> Tensor:
        inside.append(compat.in_function_transform())
        return x.square().sum()

    assert not compat.in_function_transform()
    torch.func.grad(function)(torch.ones(3))
    torch.func.vmap(function)(torch.ones(2, 3))
    torch.func.vjp(function, torch.ones(3))
    assert inside == [True, True, True]
    assert not compat.in_function_transform()


def test_the_grouped_product_is_the_operator_that_torchs_function_calls() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    seen = []

    def counted(items: object, weights: object, *_: object, **__: object) -> int:
        seen.append((items, weights))
        return 1

    with FlopCounterMode(display=False, custom_mapping={compat.grouped_product(): counted}):
        ends = torch.tensor([1, 4], dtype=torch.int32)
        nn.functional.grouped_mm(torch.ones(4, 8), torch.ones(2, 8, 16), offs=ends)
    assert [(tuple(items), tuple(weights)) for items, weights in seen] == [((4, 8), (2, 8, 16))]
