"""What a user can call directly with a model and images keeps the promises of `robustmoe.evaluate`: bad images, labels,
noise and models are one line, and what is given stays as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
import shapes
from robustmoe import certification
from robustmoe.arrays import as_labels
from robustmoe.attacks import FMN, PGD, linf
from robustmoe.attacks.base import looked_at
from robustmoe.attacks.routes import reach
from robustmoe.attacks.routes.flip import RouteFlip
from robustmoe.certification import Bounds, Smoothing, SoftLipschitz, Theorem54
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.routing import Tape, top_k

N, CLASSES, SHAPE = 4, 3, (1, 4, 4)
BALL = linf(0.1)
SMOOTHING = Smoothing(n=30, n0=5)
HARD, SOFT = (f"ensemble(linear, experts=2, gate={gate}, router=linear)" for gate in ("hard", "soft"))
Call = Callable[[Any, Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Direct:
    """``call`` (model, images, labels, noise), on a model of the kind ``model``; whether it has ``labels``, ``noise``
    to get wrong; ``anything``: it takes any code that gives logits.
    """

    call: Call
    labels: bool = False
    noise: bool = True
    model: str = HARD
    anything: bool = True


CALLS = {
    "pgd": Direct(lambda m, x, y, noise: PGD(BALL, steps=2)(m, x, y, noise), labels=True),
    "fmn.distances": Direct(lambda m, x, y, noise: FMN(BALL, steps=3).distances(m, x, y, noise), labels=True),
    "route_flip.flips": Direct(lambda m, x, y, noise: RouteFlip(BALL, steps=2).flips(m, x, y, noise), labels=True),
    "reach.reachable": Direct(lambda m, x, y, noise: reach.reachable(m, x, BALL), noise=False),
    "reach.route_radius": Direct(lambda m, x, y, noise: reach.route_radius(m, x, "l2"), noise=False),
    "routes.route_radius": Direct(
        lambda m, x, y, noise: certification.route_radius(m, x, "l2", halvings=3), noise=False, anything=False
    ),
    "reachable_exactly": Direct(
        lambda m, x, y, noise: certification.reachable_exactly(m, x, BALL), noise=False, anything=False
    ),
    "exact_margin": Direct(
        lambda m, x, y, noise: certification.exact_margin(m, x, y, BALL), labels=True, noise=False, anything=False
    ),
    "bounds": Direct(lambda m, x, y, noise: Bounds(BALL, search=1)(m, x, noise), anything=False),
    "soft_lipschitz": Direct(
        lambda m, x, y, noise: SoftLipschitz(BALL, search=1)(m, x, noise), model=SOFT, anything=False
    ),
    "theorem_5_4": Direct(lambda m, x, y, noise: Theorem54(BALL, search=1)(m, x, noise), model=SOFT, anything=False),
    "smoothing": Direct(lambda m, x, y, noise: SMOOTHING(m, x, noise)),
    "predict": Direct(lambda m, x, y, noise: certification.predict(m, x, noise, SMOOTHING)),
}


@pytest.fixture(params=CALLS)
def direct(request: pytest.FixtureRequest) -> Direct:
    return CALLS[request.param]


def pictures() -> Tensor:
    """In steps of 1/256, which every floating-point type holds to the bit but bfloat16."""
    return torch.randint(0, 256, (N, *SHAPE), generator=torch.Generator().manual_seed(3)) / 256


def labels() -> Tensor:
    return torch.arange(N) % CLASSES


def streams() -> Noise:
    return Noise.of(torch.arange(N), 7)


def net(direct: Direct) -> RoutedModel:
    return build_model(direct.model, CLASSES, SHAPE, seed=1)


def plain(result: Any) -> Any:
    """The result as lists of numbers and words, so that two can be compared."""
    if isinstance(result, Tensor):
        return result.tolist()
    if isinstance(result, dict):
        return {name: plain(value) for name, value in result.items()}
    return [plain(value) for value in result] if isinstance(result, list | tuple) else result


def refused(direct: Direct, match: str, **given: Any) -> None:
    """The call ends in one line, of itself: the shape-checking hook, which a user does not have, rests."""
    given = {"m": net(direct), "x": pictures(), "y": labels(), "noise": streams(), **given}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes.budget, "calls", 0)
        with pytest.raises(UserError, match=match) as error:
            direct.call(given["m"], given["x"], given["y"], given["noise"])
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ bad input

BAD_IMAGES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "levels": (lambda x: (255 * x).byte(), "the images are torch.uint8, expected floating point"),
    "normalised": (lambda x: 4 * x - 2, r"the images range from -\S+ to \S+, expected \[0, 1\]"),
    "above the box": (lambda x: x + 1e-3 + (x == x.max()), "the images range from"),
    "not a number": (lambda x: x.masked_fill(x == x[2].max(), torch.nan), "image 2 holds a value that is not finite"),
    "a single one": (lambda x: x[0], r"the images have shape \(1, 4, 4\), expected four axes"),
    "none": (lambda x: x.numpy()[:0], "there are no images"),
    "complex": (lambda x: x.to(torch.complex64), "the images are torch.complex64"),
    "without values": (lambda x: x.to("meta"), "the images are on the meta device"),
    "words": (lambda x: ["cat"], "the images cannot be made a tensor"),
}

BAD_LABELS: dict[str, tuple[Any, str]] = {
    "negative": ([0, 1, -1, 0], "the labels of the batch range from -1 to 1, expected 0 or above"),
    "too high": ([0, 1, 9, 0], "label 9 is out of range: the model has 3 classes; expected labels 0 to 2"),
    "real": (torch.zeros(N), "the labels of the batch are torch.float32, expected integers"),
    "one-hot": (torch.zeros(N, CLASSES, dtype=torch.long), r"4 images and labels of shape \(4, 3\), expected \(4,\)"),
    "too few": ([0, 1], r"4 images and labels of shape \(2,\), expected \(4,\)"),
    "yes and no": (torch.zeros(N, dtype=torch.bool), "are torch.bool, expected integers"),
    "words": (["cat"] * N, "the labels of the batch cannot be made a tensor"),
    "none": (None, "the labels of the batch cannot be made a tensor"),
}

BAD_MODELS: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], Any]], str]] = {
    "a tuple": (lambda net: lambda x: (net(x), x), "the model gives a tuple of 2; .* pick them"),
    "classes": (lambda net: lambda x: net(x).argmax(1), "the model gives a tensor of torch.int64"),
    "a score": (lambda net: lambda x: net(x)[:, :1], "expected a column for each class, two at least"),
    "one row": (lambda net: lambda x: net(x).mean(0, keepdim=True), r"gives a tensor of shape \(1, 3\) for images"),
    "failing": (lambda net: lambda x: net(x.flatten(1)[:, :5]), "the model fails on images"),
    "nothing": (lambda net: lambda x: None, "the model gives nothing"),
}


@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_bad_images_are_one_line(direct: Direct, bad: str) -> None:
    make, match = BAD_IMAGES[bad]
    refused(direct, match, x=make(pictures()))


@pytest.mark.parametrize("bad", BAD_LABELS)
@pytest.mark.parametrize("name", [name for name, direct in CALLS.items() if direct.labels])
def test_bad_labels_are_one_line(name: str, bad: str) -> None:
    y, match = BAD_LABELS[bad]
    refused(CALLS[name], match, y=y)


@pytest.mark.parametrize("name", [name for name, direct in CALLS.items() if direct.noise])
def test_bad_noise_is_one_line(name: str) -> None:
    refused(CALLS[name], "4 images and 3 streams of noise; expected one an image", noise=streams()[:3])
    refused(CALLS[name], "the noise is a int; expected robustmoe.noise.Noise.of", noise=3)


@pytest.mark.parametrize("bad", BAD_MODELS)
def test_bad_outputs_are_one_line(direct: Direct, bad: str) -> None:
    make, match = BAD_MODELS[bad]
    dense = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    refused(direct, match, m=make(dense))


def test_a_network_that_cannot_be_moved_to_float64_is_one_line() -> None:
    """A function around a module: the copy that is bounded keeps the module's own weights."""
    dense = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    for name in ("bounds", "theorem_5_4", "exact_margin"):
        refused(
            CALLS[name], "the network fails on images of torch.float64 .*; give the nn.Module", m=lambda x: dense(x)
        )
    narrow = Bounds(BALL, search=1, dtype="float32")
    assert [each.prediction for each in narrow(lambda x: dense(x), pictures())] == dense(pictures()).argmax(1).tolist()


# ------------------------------------------------------------------------------------------------ good input


def test_what_is_given_stays_as_it_was(direct: Direct) -> None:
    model, x, y = net(direct).train(), pictures().requires_grad_(), labels()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    direct.call(model, x, y, streams())
    assert torch.equal(x, pictures())
    assert x.grad is None
    assert torch.equal(y, labels())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.is_grad_enabled()


def test_inference_mode_is_left(direct: Direct) -> None:
    """Inside it, and with images and labels that were made there, the result is the same."""
    model = net(direct)
    expected = plain(direct.call(model, pictures(), labels(), streams()))
    with torch.inference_mode():
        assert plain(direct.call(model, pictures(), labels(), streams())) == expected
    with torch.no_grad():
        assert plain(direct.call(model, pictures(), labels(), streams())) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, np.float32])
def test_images_of_every_floating_type_are_the_same_images(direct: Direct, dtype: Any) -> None:
    x = pictures().numpy().astype(dtype) if dtype is np.float32 else pictures().to(dtype)
    model = net(direct)
    expected = plain(direct.call(model, pictures(), labels(), streams()))
    assert plain(direct.call(model, x, labels(), streams())) == expected


def test_rounding_outside_the_box_is_clipped(direct: Direct) -> None:
    x = pictures()
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    rounded = x + 1e-7 * (2 * x - 1)
    assert rounded.min() < 0
    assert rounded.max() > 1
    clipped = rounded.clamp(0, 1)
    model = net(direct)
    expected = plain(direct.call(model, clipped, labels(), streams()))
    assert plain(direct.call(model, rounded, labels(), streams())) == expected


@pytest.mark.parametrize("name", [name for name, direct in CALLS.items() if direct.labels])
def test_labels_of_every_integer_type_are_the_same_labels(name: str) -> None:
    direct = CALLS[name]
    model = net(direct)
    expected = plain(direct.call(model, pictures(), labels(), streams()))
    for y in (labels().int(), labels().to(torch.uint8), labels().tolist(), labels().numpy().astype(">i2")):
        assert plain(direct.call(model, pictures(), y, streams())) == expected


def test_who_has_looked_is_not_looked_after(direct: Direct) -> None:
    """Inside an evaluation the same result comes of the images themselves."""
    model = net(direct)
    expected = plain(direct.call(model, pictures(), labels(), streams()))
    with looked_at():
        assert plain(direct.call(model, pictures(), labels(), streams())) == expected


class Writing(RoutedModel):
    """Two linear experts, by the level of one pixel; it writes into its images unless it is ``tidy``."""

    def __init__(self, tidy: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.tidy = nn.Linear(16, CLASSES), nn.Linear(16, CLASSES), tidy

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        x = (x - 0.5 if self.tidy else x.sub_(0.5)).flatten(1)
        route = tape("router", top_k(torch.stack([x[:, 0], -x[:, 0]], 1)[:, None], 1, "hard"))
        return torch.where(route.index[:, 0] == 0, self.first(x), self.second(x))


@pytest.mark.parametrize("name", [name for name, direct in CALLS.items() if direct.anything])
def test_a_model_that_writes_into_its_images_is_asked_of_copies(name: str) -> None:
    call, x = CALLS[name].call, pictures()
    written = plain(call(Writing(tidy=False), x, labels(), streams()))
    assert written == plain(call(Writing(tidy=True), x, labels(), streams()))
    assert torch.equal(x, pictures())


def test_without_noise_the_position_in_the_batch_draws() -> None:
    model = net(CALLS["smoothing"])
    by_position = Noise.of(torch.arange(N), 0)
    assert SMOOTHING(model, pictures()) == SMOOTHING(model, pictures(), by_position)
    asked = certification.predict(model, pictures(), None, SMOOTHING)
    assert torch.equal(asked, certification.predict(model, pictures(), by_position, SMOOTHING))


def test_a_route_radius_keeps_its_gradient() -> None:
    """It is trained on (`rt_er(stability=...)`), also inside no_grad."""
    model = net(CALLS["reach.route_radius"])
    (radius,) = reach.route_radius(model, pictures(), "linf").values()
    radius.sum().backward()
    assert any(weight.grad is not None and bool(weight.grad.any()) for weight in model.parameters())


# ------------------------------------------------------------------------------------------------ faults of the model's


class Refusing(torch.autograd.Function):
    """Fails in the backward pass, with the error that stands in ``error``."""

    error: BaseException = KeyError("oops")

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        raise Refusing.error


@pytest.mark.parametrize("wrapped", [False, True], ids=["a module", "a function"])
@pytest.mark.parametrize(
    "error, match",
    [
        (KeyError("oops"), "no gradient can be taken through the model .KeyError: 'oops'"),
        (RuntimeError("CUDA out of memory. Tried 2 GiB"), r"^out of memory \(CUDA .*; expected something smaller"),
    ],
    ids=["a fault", "no memory"],
)
def test_a_backward_pass_that_fails_is_one_line(wrapped: bool, error: BaseException, match: str) -> None:
    """Also of a function: no module of the model is then of another package."""
    dense = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = dense(Refusing.apply(x))
            return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refusing, "error", error)
        refused(CALLS["pgd"], match, m=Module().forward if wrapped else Module())


def test_a_pass_without_room_is_told_as_such() -> None:
    refused(CALLS["pgd"], "^out of memory", m=lambda x: torch.empty(10**15) + x)
    refused(CALLS["pgd"], "^out of memory", m=lambda x: (_ for _ in ()).throw(MemoryError()))


def test_a_lazy_module_is_one_line(direct: Direct) -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))
    refused(direct, "the model's weight '.*1.weight' has no shape yet .a lazy module.; run the model once", m=lazy)


@pytest.mark.parametrize("attribute", ["train", "itself"])
def test_a_module_that_cannot_be_put_in_eval_mode_is_one_line(direct: Direct, attribute: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    setattr(model, attribute, model if attribute == "itself" else None)
    refused(direct, "the model cannot be put in eval mode .*; expected an nn.Module whose eval", m=model)
    with pytest.raises(UserError, match="the model cannot be put in eval mode"):
        rm.evaluate(model, pictures(), labels(), attacks=["fgsm(linf(0.1))"], device="cpu")


def test_logits_of_eight_bits_are_logits() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    attacked = CALLS["pgd"].call(lambda x: model(x).to(torch.float8_e5m2), pictures(), labels(), streams())
    assert attacked.shape == pictures().shape


class Column:
    """Labels in a table, as pandas has them: by names of the rows, of which the first is not 0."""

    def __init__(self, values: list[int]) -> None:
        self.values = dict(zip("badc", values))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(list(self.values.values()), dtype)


def test_a_column_of_a_table_is_labels() -> None:
    assert as_labels(Column([2, 0, 1, 1]), 4, 3, "the table").tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda x: x.to(torch.float8_e4m3fn), "the images are torch.float8_e4m3fn, expected floating point"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "the images are nested, without plain values"),
        (lambda x: x.to_sparse(), "the images are torch.sparse_coo, without plain values"),
        (lambda x: x.masked_fill(x > 0.9, -torch.inf), r"image \d holds a value that is not finite"),
    ],
    ids=["eight bits", "nested", "sparse", "infinite"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_no_images_are_one_line(make: Callable[[Tensor], Tensor], match: str) -> None:
    refused(CALLS["pgd"], match, x=make(pictures()))
