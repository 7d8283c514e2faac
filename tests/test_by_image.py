"""BatchNorm by image and averages over fields in few passes: equal to torch's own operations, forward and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from robustmoe.models import AffineModel, RoutedModel, affine, build_model, by_image
from robustmoe.models.by_image import averaged, field_means, normed, quick
from robustmoe.noise import Noise
from robustmoe.training import build_method

SHAPE, CLASSES = (3, 8, 8), 4
SPEC = "affine(resnet(depth=14, width=4), experts=5)"


@contextmanager
def by_torch() -> Iterator[None]:
    """The same model by torch's own operations."""
    with (
        mock.patch.object(affine, "quick", return_value=False),
        mock.patch.object(by_image, "quick", return_value=False),
    ):
        yield


def example(n: int = 3, d: int = 5, h: int = 4, w: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A map in channels-last memory, scale and shift of each image, mean and variance, in float64."""
    draw = torch.Generator().manual_seed(n + d)
    x = torch.randn(n, d, h, w, generator=draw, dtype=torch.float64) + torch.arange(d)[:, None, None]
    scale, shift = torch.randn(2, n, d, generator=draw, dtype=torch.float64)
    mean, var = torch.randn(d, generator=draw, dtype=torch.float64), torch.rand(d, generator=draw, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last), scale, shift, mean, var + 0.5


def test_only_maps_in_channels_last_memory_on_a_cpu_are_quick() -> None:
    x = example()[0]
    assert quick(x)
    assert not quick(x.contiguous())
    assert not quick(x[:0])
    assert not quick(torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("d", [1, 5, 300])
def test_normed_has_the_values_and_gradients_of_its_definition(of_batch: bool, d: int) -> None:
    x, scale, shift, mean, var = example(d=d)
    given = [each.requires_grad_(True) for each in (x, scale, shift)]
    if of_batch:
        mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
    out = normed(x, scale, shift, mean, var, 1e-5, of_batch)
    middle, spread = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if of_batch else (mean, var)
    unit = (x - middle[:, None, None]) / torch.sqrt(spread + 1e-5)[:, None, None]
    expected = scale[:, :, None, None] * unit + shift[:, :, None, None]
    torch.testing.assert_close(out, expected)
    above = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, given, above), torch.autograd.grad(expected, given, above))


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("d", [1, 5])
def test_normed_by_region_has_the_values_and_gradients_of_its_definition(of_batch: bool, d: int) -> None:
    x, _, _, mean, var = example(d=d, h=4, w=6)
    scale, shift = torch.randn(2, 3 * 4, d, dtype=x.dtype)
    given = [each.requires_grad_(True) for each in (x, scale, shift)]
    if of_batch:
        mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
    out = normed(x, scale, shift, mean, var, 1e-5, of_batch)
    middle, spread = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if of_batch else (mean, var)
    unit = (x - middle[:, None, None]) / torch.sqrt(spread + 1e-5)[:, None, None]
    rows = []
    for image, (own_scale, own_shift) in enumerate(zip(scale.split(4), shift.split(4))):
        quarters = [
            own_scale[2 * i + j, :, None, None] * unit[image, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            + own_shift[2 * i + j, :, None, None]
            for i in (0, 1)
            for j in (0, 1)
        ]
        rows.append(torch.cat([torch.cat(quarters[:2], 2), torch.cat(quarters[2:], 2)], 1))
    expected = torch.stack(rows)
    torch.testing.assert_close(out, expected)
    above = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, given, above), torch.autograd.grad(expected, given, above))


@pytest.mark.parametrize("of_batch", [False, True])
def test_gradients_of_gradients_are_differences_of_gradients(of_batch: bool) -> None:
    x, scale, shift, mean, var = example(n=2, d=2, h=2, w=2)

    def function(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        middle, spread = mean, var
        if of_batch:
            middle, spread = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
        return normed(x.contiguous(memory_format=torch.channels_last), scale, shift, middle, spread, 1e-5, of_batch)

    given = [each.requires_grad_(True) for each in (x, scale, shift)]
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("far", [0.0, 3.0, 30.0])
def test_in_half_precision_no_channel_is_moved(far: float) -> None:
    """Rounded values are off pixel by pixel; the average of a channel is off by what rounding its input moves it."""
    draw = torch.Generator().manual_seed(1)
    truth = torch.randn(16, 8, 16, 16, generator=draw, dtype=torch.float64) + far * torch.randn(
        8, 1, 1, generator=draw, dtype=torch.float64
    )
    x = truth.bfloat16().contiguous(memory_format=torch.channels_last)
    scale, shift = 1 + 0.3 * torch.randn(2, 16, 8, generator=draw)
    mean, var = (f(truth).float() for f in (lambda t: t.mean((0, 2, 3)), lambda t: t.var((0, 2, 3), correction=0)))
    expected = scale.double()[:, :, None, None] * (truth - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
    error = normed(x, scale, shift, mean, var, 1e-5, True).double() - expected - shift[:, :, None, None]
    given = (x.double() - truth) * scale[:, :, None, None]
    assert error.square().mean().sqrt() < 2 * given.square().mean().sqrt() + 0.004
    assert error.mean((2, 3)).square().mean().sqrt() < 3 * given.mean((2, 3)).square().mean().sqrt() + 4e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_field_means_are_torchs_pooling(dtype: torch.dtype, pool: int) -> None:
    x = example(h=6)[0].to(dtype).requires_grad_(True)
    out, expected = field_means(x, pool), averaged(x, pool)
    assert torch.equal(out, expected)
    above = torch.randn_like(out)
    [got], [wanted] = (torch.autograd.grad(each, x, above) for each in (out, expected))
    assert pool == 1 or got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, wanted, rtol=1e-12 if dtype == torch.float64 else 0, atol=0)


def trained(x: Tensor) -> AffineModel:
    """In float64, in train mode, its experts and statistics away from where they began."""
    model = build_model(SPEC, CLASSES, SHAPE, seed=0).double()
    assert isinstance(model, AffineModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".experts"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        model.train().run(x)
    return model


def learned(model: RoutedModel, x: Tensor) -> dict[str, Tensor]:
    """The loss of one-step adversarial training, its gradients, and then the statistics."""
    model.train()
    method = build_method("at(pgd(linf(8/255), steps=1, start=clean))")
    loss = method.phases[0].loss(model, x, torch.arange(len(x)) % CLASSES, Noise.of(torch.arange(len(x)))).value
    names = [name for name, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters()))))
    return {"loss": loss.detach(), **gradients, **{name: value.clone() for name, value in model.named_buffers()}}


def test_a_training_step_is_the_one_by_torchs_operations(images: Callable[..., Tensor]) -> None:
    x = images(12, *SHAPE).double()
    fast = learned(trained(x), x)
    with by_torch():
        slow = learned(trained(x), x)
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_transforms_of_functions_take_it(images: Callable[..., Tensor]) -> None:
    x = images(4, *SHAPE).double()
    model = trained(x).eval()
    at = x.clone().requires_grad_(True)
    [gradient] = torch.autograd.grad(model(at)[:, 1].sum(), at)
    torch.testing.assert_close(torch.func.grad(lambda z: model(z)[:, 1].sum())(x), gradient)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_forward_derivatives_are_torchs() -> None:
    x = example()[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert not quick(dual)
        assert not quick(x, dual)
        out = field_means(dual, 2)
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(tangent, torch.ones_like(tangent))


def test_statistics_that_are_not_the_layers_own_are_left_to_the_layer() -> None:
    x = example()[0]
    norm = affine.AffineNorm(5, place=0).double().train()
    assert norm.statistics(x[:1, :, :1, :1]) is None
    assert norm.statistics(x) is not None
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 1
    plain = nn.BatchNorm2d(5).double().train()
    plain(x)
    for mine, torchs in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, torchs)
