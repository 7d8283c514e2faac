"""`moefy`: a CNN of a user turned into a routed model that answers as it did."""

from __future__ import annotations

import copy
import re
import textwrap
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe import evaluate, moefy
from robustmoe.errors import UserError
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import BatchNorm2d, Dense, RoutedLayer, RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Tape, detach, to_expert
from robustmoe.training import MiniBatch, build_method, train_step
from robustmoe.training.optimisation import SGD
from test_block_moe import SHAPE, SPECS, lived_in, spread


class Net(nn.Module):
    """A user's network: a residual block, a strided convolution, plain BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.down, self.last = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.unused = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.body(x)
        return self.head(F.relu(self.last(self.down(x))).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    made = Net().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    return made


@pytest.mark.parametrize("k, gate", [(1, None), (2, None), (3, None), (2, "hard")])
@pytest.mark.parametrize("layers", ["down", ["body", "d?wn"], ["body.0"], "body.[01]"])
@torch.no_grad()
def test_a_converted_network_answers_as_it_did(
    k: int, gate: str | None, layers: str | list[str], net: Net, images: Callable[..., Tensor]
) -> None:
    x, before, state = images(12), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    model = moefy(net, layers, SHAPE, experts=3, k=k, gate=gate, router="gap_fc", standardise=True)
    free = model.run(x)
    torch.testing.assert_close(free.logits, net(x), rtol=1e-5, atol=1e-6)
    other = spread(free.trace, k)
    ones = {key: Routing(r.logits, r.index, torch.full_like(r.weight, 1 / k)) for key, r in other.items()}
    torch.testing.assert_close(model.run(x, forced=ones).logits, net(x), rtol=1e-5, atol=1e-6)
    assert all(isinstance(model.get_submodule(key.removesuffix(".router")), RoutedLayer) for key in free.trace)
    assert len(free.trace) == (2 if layers in (["body", "d?wn"], "body.[01]") else 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    # The user's network is what it was
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {type(module) for module in net.modules()} == {
        Net,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Sequential,
        nn.ReLU,
        nn.Linear,
    }


@torch.no_grad()
def test_jitter_tells_the_experts_apart(net: Net, images: Callable[..., Tensor]) -> None:
    """By that many standard deviations of a weight; the first stays the network's own. Seeded."""
    model = moefy(net, ["body", "down"], SHAPE, experts=3, jitter=0.1)
    x, layer = images(8), model.network.down
    assert torch.equal(layer.experts[0].weight, net.down.weight)
    for expert in layer.experts[1:]:
        assert float((expert.weight - net.down.weight).std() / net.down.weight.std()) == pytest.approx(0.1, rel=0.2)
    trace = model.run(x).trace
    torch.testing.assert_close(model.run(x, forced=to_expert(trace, 0)).logits, net(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model.run(x, forced=to_expert(trace, 1)).logits, net(x), atol=1e-3)
    twin, other = (moefy(net, ["body", "down"], SHAPE, experts=3, jitter=0.1, seed=seed) for seed in (0, 1))
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert not torch.equal(other.network.down.router.head.weight, layer.router.head.weight)


@torch.no_grad()
def test_normalisation_and_dtype(net: Net, images: Callable[..., Tensor]) -> None:
    from robustmoe.models import Normalise

    x = images(4)
    model = moefy(net, "down", SHAPE, normalise=Normalise((0.5,) * 3, (0.25,) * 3))
    torch.testing.assert_close(model(x), net((x - 0.5) / 0.25), rtol=1e-5, atol=1e-6)
    wide = moefy(net.double(), "down", SHAPE, k=2).run(x.double())
    assert wide.logits.dtype == wide.trace["network.down.router"].logits.dtype == torch.float64
    torch.testing.assert_close(wide.logits, net(x.double()), rtol=1e-12, atol=1e-12)


def test_a_trained_dense_model_of_ours_is_converted_too(images: Callable[..., Tensor]) -> None:
    dense, x = build_model("resnet8(width=4)", 4, SHAPE), images(5)
    model = moefy(dense, ["network.stages.1.*", "network.stages.2.0.conv?"], SHAPE, experts=2)
    with torch.no_grad():
        out = model.run(x)
        torch.testing.assert_close(out.logits, dense(x), rtol=1e-5, atol=1e-6)
    names = ["stages.1.0", "stages.2.0.conv1", "stages.2.0.conv2"]
    assert list(out.trace) == [f"network.network.{each}.router" for each in names]
    assert isinstance(dense, Dense)


class Odd(Net):
    """Layers that cannot be routed, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.pair, self.two = nn.ReLU(), Pair(), Two()
        self.centre, self.inner = Centre(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.two(x, self.pair(x)[0])
        x = self.centre(x) - 1
        self.inner(x)  # the result is in x
        return self.head(self.relu(self.down(x)).mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    "layers, message",
    [
        ("dwon", r"has no layer 'dwon'; did you mean 'down' or 'two'\? known: body, body.0, "),
        (["down", "body.*.conv"], r"has no layer 'body.\*.conv'"),
        ([], "layers names no layer"),
        (["body", "body.0"], "the layer 'body.0' stands inside 'body'; name one of them"),
        ("unused", "the layer 'unused' is called 0 times in one pass; expected once an image"),
        ("relu", "the layer 'relu' is called 2 times in one pass"),
        ("head", r"the layer 'head' gets \(2, 8\) for two images; expected one feature map"),
        ("two", r"the layer 'two' gets \(2, 6, 8, 8\), \(2, 6, 8, 8\) for two images"),
        ("pair", "the layer 'pair' gives tuple for two images"),
        ("centre", "the layer 'centre' answers an image by the others of its batch"),
        ("inner", "with inner as experts the network's logits change by .* a layer may change its input in place"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(layers: str | list[str], message: str) -> None:
    network = Net() if "body" in layers else Odd()
    with pytest.raises(UserError, match=message):
        moefy(network, layers, SHAPE)


def test_bad_numbers_are_refused(net: Net) -> None:
    with pytest.raises(ValueError, match="k must be between 1 and the number of experts, 2; got 3"):
        moefy(net, "down", SHAPE, experts=2, k=3)
    with pytest.raises(UserError, match=r"jitter must be 0 or more; got -0\.1"):
        moefy(net, "down", SHAPE, jitter=-0.1)
    with pytest.raises(UserError, match="gate=vmoe multiplies an expert by its probability"):
        moefy(net, "down", SHAPE, gate="vmoe")
    with pytest.raises(UserError, match=r"the network fails on images \(2, 1, 8, 8\): RuntimeError: .* 3 channels"):
        moefy(net, "down", (1, 8, 8))
    with pytest.raises(UserError, match="takes a network without routers; this one is a MoefiedModel"):
        moefy(moefy(net, "down", SHAPE), "network.body.0", SHAPE)


def test_layers_called_otherwise_than_at_conversion_are_refused(net: Net, images: Callable[..., Tensor]) -> None:
    """Twice in a pass, or not on the images: a network may decide so later."""

    class Fickle(Net):
        times, crops = 1, 1

        def forward(self, x: Tensor) -> Tensor:
            x = x.repeat(self.crops, 1, 1, 1)
            for _ in range(self.times):
                x = self.stem(x)[:, :3]
            return x.mean((2, 3))

    model = moefy(Fickle(), "stem", SHAPE)
    assert model(images(2)).shape == (2, 3)
    model.network.times = 2
    with pytest.raises(UserError, match=r"'network.stem' is called twice in one pass"):
        model(images(2))
    model.network.times, model.network.crops = 1, 3
    with pytest.raises(UserError, match=r"'network.stem' got 6 items in a pass of 2 images"):
        model(images(2))


@torch.no_grad()
def test_a_layer_under_two_names_stays_one(images: Callable[..., Tensor]) -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.down

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.alias(self.stem(x)).mean((2, 3)))

    network, x = Shared().eval(), images(3)
    model = moefy(network, "down", SHAPE)
    assert model.network.alias is model.network.down
    assert list(model.run(x).trace) == ["network.down.router"]
    torch.testing.assert_close(model(x), network(x), rtol=1e-5, atol=1e-6)


def test_two_threads_keep_their_passes_apart(net: Net, images: Callable[..., Tensor]) -> None:
    """Both are inside a pass of the same model at once: each has its own trace, for its own batch."""
    meet = threading.Barrier(2, timeout=20)

    class Meeting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                meet.wait()
            return x

    net.norm = nn.Sequential(net.norm, Meeting())
    model = moefy(net, ["body", "down"], SHAPE, jitter=0.3, standardise=True)
    inputs, found = {n: images(n) for n in (3, 5)}, {}

    def work(n: int) -> None:
        with torch.no_grad():
            found[n] = model.run(inputs[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, x in inputs.items():
        with torch.no_grad():
            alone = model.run(x)
        assert torch.equal(found[n].logits, alone.logits)
        assert all(torch.equal(found[n].trace[key].index, r.index) for key, r in alone.trace.items())


@torch.no_grad()
def test_models_inside_models(net: Net, images: Callable[..., Tensor]) -> None:
    """In a user's own routed model the traces join under prefixes; in a plain call the inner pass is its own."""
    x = images(6)
    inner = moefy(net, "down", SHAPE, experts=2, jitter=0.5)

    class Both(RoutedModel):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = inner, moefy(net, "body", SHAPE, experts=2, jitter=0.5)

        def body(self, x: Tensor, tape: Tape) -> Tensor:
            return self.one.body(x, tape.under("one")) - self.two.body(x, tape.under("two"))

    both = Both().eval()
    out = both.run(x)
    assert list(out.trace) == ["one.network.down.router", "two.network.body.router"]
    forced = to_expert(out.trace, 1)
    expected = inner.run(x, forced=to_expert(inner.run(x).trace, 1)).logits
    expected = expected - both.two.run(x, forced=to_expert(both.two.run(x).trace, 1)).logits
    torch.testing.assert_close(both.run(x, forced=forced).logits, expected)

    class Wrapping(Net):
        def forward(self, x: Tensor) -> Tensor:
            features, aside = self.stem(x), inner(x.flip(-1)[:2])
            return self.head(self.down(features).mean((2, 3))) + aside[:1]

    network = Wrapping().eval()
    outer = moefy(network, ["stem", "down"], SHAPE, experts=2)
    assert list(outer.run(x).trace) == ["network.stem.router", "network.down.router"]
    torch.testing.assert_close(outer(x), network(x), rtol=1e-5, atol=1e-6)


def test_a_converted_network_trains(net: Net, images: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    """Also where an expert gets one image of one pixel, which torch's own BatchNorm refuses."""
    x, y = images(16), labels(16)
    model = moefy(net, ["body", "down"], SHAPE, experts=3, standardise=True, jitter=0.1)
    assert all(isinstance(module, BatchNorm2d) for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    method = build_method("at(pgd(linf(0.03), steps=2), balance=0.1, balance_loss=entropy)")
    before = copy.deepcopy(model.state_dict())
    optimiser = SGD(0.1, 0.0, 0.0).make(model.parameters())
    routers = ["network.body.router", "network.down.router"]
    done = train_step(model, method, [optimiser], MiniBatch(x, y, Noise.of(torch.arange(16), 1)), routers=routers)
    assert all(done.router_grad[key] > 0 for key in routers)
    for key in ("network.body.router.network.head.weight", "network.down.experts.0.weight", "network.stem.weight"):
        assert not torch.equal(model.state_dict()[key], before[key])

    pixel = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Flatten())
    one = moefy(pixel, "1", (3, 1, 1)).train()
    assert torch.isfinite(one(images(1, 3, 1, 1))).all()


@pytest.mark.parametrize("kind", ["moefied", "blocks", "convolutions"])
@pytest.mark.parametrize("precision", ["strict", "fast"])
def test_frozen_copies_are_the_model(
    kind: str, precision: str, net: Net, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Copied, folded where a BatchNorm follows a convolution inside an expert or outside of all, and halved."""
    x, y = images(16), labels(16)
    if kind == "moefied":
        model = moefy(net, ["body", "down"], SHAPE, experts=3, jitter=0.2)
    else:
        model = lived_in(build_model(SPECS[kind], 4, SHAPE), images(32))
    copied = frozen_copy(model, x, precision)
    assert copied.folded > 0
    assert ("bf16 weights" in copied.note) == (precision == "fast"), copied.note
    forced = detach(spread(model.run(x).trace))
    for given in (detach(model.run(x).trace), forced):
        gradients = []
        for each in (model, copied.climbed):
            inner = x.clone().requires_grad_(True)
            logits = each.run(inner, forced=given).logits
            gradients.append((logits.detach(), *torch.autograd.grad(F.cross_entropy(logits, y), inner)))
        off = [float((a - b).norm() / a.norm()) for a, b in zip(*gradients)]
        assert max(off) < 1e-4 if precision == "strict" else off[0] < 0.05 and off[1] < 0.3, off


def test_evaluate_attacks_its_routers(net: Net, images: Callable[..., Tensor]) -> None:
    """Routers alone, and the beam over the cells of two routers."""
    x = images(6)
    model = moefy(net, ["body", "down"], SHAPE, experts=2, standardise=True, jitter=0.3)
    lived_in(model, images(32))
    with torch.no_grad():
        y = model(x).argmax(1)
    attacks = ["pgd(linf(0.1), steps=3, objective=router_only)", "route_beam(linf(0.1), steps=2)"]
    routers, beam = evaluate(model, x, y, num_classes=4, device="cpu", attacks=attacks).summary()
    for summary in (routers, beam):
        assert (summary.clean.count, summary.n) == (6, 6)
        assert set(summary.rerouted) == {"network.body.router", "network.down.router"}
        assert summary.router_attacked
    assert routers.rerouted_mean > 0.1


def test_the_example_of_the_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert moefy.__doc__ is not None
    (code,) = re.findall(r"For example::\n\n(.*?)\n\n    ``layers``", moefy.__doc__, re.DOTALL)
    exec(textwrap.dedent(code), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert sum(map(int, re.findall(r"\d+", printed.splitlines()[0]))) == 16, "each image went to one expert"
    assert "clean 16 of 16" in printed
