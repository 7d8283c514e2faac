"""Under pytest the shapes of `robustmoe`'s functions are checked, each in its first calls of a test."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import shapes
from robustmoe.routing import top_k


def outer() -> Tensor:
    @shapes.jaxtyped(typechecker=shapes.typechecked)
    def inner(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return x[:2]

    return inner(torch.zeros(3))


@shapes.jaxtyped(typechecker=shapes.typechecked)
def first_two(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Keeps its word for two numbers alone."""
    return x[:2]


def test_the_package_is_checked(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--jaxtyping-packages"):
        pytest.skip("this run leaves the hook out (--jaxtyping-packages=)")
    with pytest.raises(TypeCheckError, match="top_k"):
        top_k(torch.zeros(2, 3), 1, "hard")


@pytest.mark.parametrize("function", [lambda: first_two(torch.zeros(3)), outer], ids=["module", "made anew"])
def test_each_function_is_checked_in_its_first_calls(function) -> None:
    for _ in range(min(shapes.budget.calls, 5)):
        with pytest.raises(TypeCheckError, match="return value"):
            function()
    if shapes.budget.calls == shapes.CALLS:
        assert len(function()) == 2, "at rest"
    shapes.budget.start()
    with pytest.raises(TypeCheckError, match="return value"):
        function()


def made(shift: Tensor):
    @shapes.jaxtyped(typechecker=shapes.typechecked)
    def inner(x: Float[Tensor, " n"], again: bool = False) -> Float[Tensor, " n"]:
        if again:
            shapes.budget.start()
            assert made(-shift)(x).sum() == 2 - shift.sum(), "one while another runs"
        return x + shift

    return inner


def test_functions_made_anew_share_their_checks_and_nothing_else() -> None:
    first, second = made(torch.ones(2)), made(torch.full((2,), 2.0))
    for again in (False, True):
        for function, expected in ((first, [2.0, 2.0]), (second, [3.0, 3.0])):
            shapes.budget.start()
            assert function(torch.ones(2), again).tolist() == expected
            shapes.budget.start()
            with pytest.raises(TypeCheckError, match="parameters"):
                function(torch.ones(2, 2))
    gone = weakref.ref(first)
    del first, function
    gc.collect()
    assert gone() is None


@pytest.fixture
def spent() -> None:
    for _ in range(shapes.CALLS):
        first_two(torch.zeros(2))


@pytest.mark.usefixtures("spent")
def test_a_test_has_checks_of_its_own_after_its_fixtures() -> None:
    with pytest.raises(TypeCheckError, match="return value"):
        first_two(torch.zeros(3))


@shapes.jaxtyped(typechecker=shapes.typechecked)
def count(n: int, *names: str, last: float | None = None) -> int:
    """Keeps its word for a whole number without a last one."""
    return n if last is None else last  # type: ignore[return-value]


def test_a_function_without_shapes_is_checked_too() -> None:
    assert count(3, "a") == 3
    for arguments, named in (((2.5,), {}), ((3, 4), {}), ((3,), {"last": "x"}), ((3,), {"last": 0.5})):
        shapes.budget.start()
        with pytest.raises(TypeCheckError, match="count"):
            count(*arguments, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "hint, answer",
    [
        (Float[Tensor, " n"], True),
        (list[tuple[Float[Tensor, " n"], int] | None], True),
        (Callable[[Float[Tensor, " n"]], Tensor], True),
        ("a text that nobody understands", True),
        (list["Tensor"], True),
        (Tensor, False),
        (dict[str, list[Tensor]] | None, False),
        (Literal["n", "m"], False),
        (Callable[[int], Tensor], False),
    ],
)
def test_where_a_shape_stands_in_an_annotation(hint: object, answer: bool) -> None:
    assert shapes.shaped(hint) is answer
