"""Under pytest the shapes of `robustmoe`'s functions are checked, in the first calls of a test."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import shapes
from robustmoe.routing import top_k


@jaxtyping.jaxtyped(typechecker=shapes.typechecked)
def first_two(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Keeps its word for two numbers alone."""
    return x[:2]


def test_the_package_is_checked(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--jaxtyping-packages"):
        pytest.skip("this run leaves the hook out (--jaxtyping-packages=)")
    with pytest.raises(jaxtyping.TypeCheckError, match="top_k"):
        top_k(torch.zeros(2, 3), 1, "hard")


def test_the_hook_rests_when_its_checks_are_spent_and_not_before() -> None:
    shapes.budget.left = 4
    first_two(torch.zeros(2))  # of its arguments, and of its result
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        first_two(torch.zeros(3))
    assert len(first_two(torch.zeros(3))) == 2, "at rest"
    shapes.budget.start()
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        first_two(torch.zeros(3))


@pytest.fixture
def spent() -> None:
    shapes.budget.left = 1
    first_two(torch.zeros(2))
    assert jaxtyping.config.jaxtyping_disable


@pytest.mark.usefixtures("spent")
def test_a_test_has_checks_of_its_own_after_its_fixtures() -> None:
    assert shapes.budget.left == shapes.budget.calls
    assert not jaxtyping.config.jaxtyping_disable
