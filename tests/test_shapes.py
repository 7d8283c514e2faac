"""Under pytest the shapes of `robustmoe`'s functions are checked, each in its first calls of a test."""

from __future__ import annotations

import gc
import weakref

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
