"""BatchNorm against torch's own, in the cases that torch's own has and in those it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.models.norm import BatchNorm2d, Normalise, Standardise, _GlobalBatchNorm


def pair(**settings: object) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Ours and torch's with the same random scale, shift and statistics."""
    ours, torchs = BatchNorm2d(3, **settings).double(), nn.BatchNorm2d(3, **settings).double()
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def passed(norm: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    """Output, input gradient, parameter gradients and statistics of one pass."""
    x = x.clone().requires_grad_(True)
    out = norm(x)
    gradients = torch.autograd.grad((out * direction).sum(), [x, *norm.parameters()])
    return [out, *gradients, *norm.buffers()]


@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_equals_torchs(settings: dict[str, object], training: bool) -> None:
    ours, torchs = pair(**settings)
    for _ in range(3):
        x, direction = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
        for one, other in zip(passed(ours.train(training), x, direction), passed(torchs.train(training), x, direction)):
            torch.testing.assert_close(one, other)


def test_an_empty_batch_leaves_the_statistics() -> None:
    norm, _ = pair()
    before = [b.clone() for b in norm.buffers()]
    x = torch.zeros(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        out = norm.train(training)(x)
        assert out.shape == x.shape
        out.sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(before, norm.buffers()))


def test_a_single_value_gives_the_shift() -> None:
    """Its deviation from its own mean is 0: the output is the bias, without gradient to image or weight. torch's
    refuses it.
    """
    norm, torchs = pair()
    x, direction = torch.randn(2, 1, 3, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value"):
        torchs(x)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    out, grad_x, grad_weight, grad_bias = passed(norm, x, direction)[:4]
    torch.testing.assert_close(out.flatten(), norm.bias)
    assert grad_x.abs().max() < 1e-12
    assert grad_weight.abs().max() < 1e-12
    torch.testing.assert_close(grad_bias, direction.flatten())
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * x.flatten())
    assert torch.equal(norm.running_var, var)


def test_running_statistics_over_processes_are_kept_as_torch_keeps_them() -> None:
    """The biased variance of the global batch in, the unbiased one kept."""
    for momentum in (0.1, None):
        norm, torchs = pair(momentum=momentum)
        for _ in range(3):
            x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
            torchs(x)
            norm._update(x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False), torch.tensor(20.0))
        for one, other in zip(norm.buffers(), torchs.buffers()):
            torch.testing.assert_close(one, other)


def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _GlobalBatchNorm.apply(x, weight, bias, 1e-5)[0]


def test_global_batchnorm_alone_is_batchnorm() -> None:
    """One process is the whole group: values and gradients of F.batch_norm, statistics of the batch."""
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3, 2, 2), (3,), (3,))]
    direction = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    reference = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True, eps=1e-5)
    out, mean, var, count = _GlobalBatchNorm.apply(*inputs, 1e-5)
    torch.testing.assert_close(out, reference)
    torch.testing.assert_close(mean, inputs[0].mean((0, 2, 3)))
    torch.testing.assert_close(var, inputs[0].var((0, 2, 3), unbiased=False))
    assert float(count) == 16
    for one, other in zip(*(torch.autograd.grad((o * direction).sum(), inputs) for o in (out, reference))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(4, 2, 2, 2), (2, 2, 1, 1), (1, 2, 1, 1)])
def test_global_batchnorm_gradients_by_finite_differences(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(own, (x, weight.detach().requires_grad_(), bias.detach().requires_grad_()))


def test_a_large_mean_does_not_cancel() -> None:
    """In float32, mean 1e4 and deviation 1: a variance by E[x^2] - E[x]^2 would lose every digit."""
    x = torch.randn(64, 2, 4, 4) + 1e4
    out = own(x, torch.ones(2), torch.zeros(2))
    expected = F.batch_norm(x.double(), None, None, training=True).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-3)


def test_half_precision_keeps_its_dtype_and_computes_wide() -> None:
    x = torch.randn(1, 3, 1, 1, dtype=torch.bfloat16)
    norm = BatchNorm2d(3).train()
    assert norm(x).dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32


def test_normalise_by_hand() -> None:
    x = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1)
    assert Normalise((0.5, 0.0), (0.25, 0.5))(x).flatten().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("mean, std", [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (float("nan"),))])
def test_normalise_is_checked(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one value a channel, std above 0"):
        Normalise(mean, std)


def test_standardised_logits_have_mean_0_and_variance_1_then_a_fixed_affine_map() -> None:
    norm = Standardise(nn.Linear(6, 3), 3).train()
    x = torch.randn(512, 6)
    logits = norm(x)
    torch.testing.assert_close(logits.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.var(0, unbiased=False), torch.ones(3), rtol=0, atol=1e-3)
    for _ in range(100):
        norm(x)
    norm.eval()
    torch.testing.assert_close(norm(x), logits, rtol=0, atol=2e-2)  # running statistics have come to the batch's
    torch.testing.assert_close(norm(x[:1]), norm(x)[:1], rtol=0, atol=1e-6)
    assert not list(norm.norm.parameters())


def test_standardise_works_in_float64_and_bfloat16() -> None:
    for training in (True, False):
        norm = Standardise(nn.Linear(6, 3), 3).train(training)
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(torch.randn(8, 6)).dtype == torch.float32
        assert norm.double()(torch.randn(8, 6, dtype=torch.float64)).dtype == torch.float64
