"""Small routed models, sound ones and ones with a planted fault, for the tests of the checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import PGD, Attack, linf
from robustmoe.data import Batch
from robustmoe.evaluation.checks import Subject
from robustmoe.models import RoutedModel
from robustmoe.routing import Routing, Tape, soft, straight_through, top_k

GATES: dict[str, Callable[[Tensor], Routing]] = {
    "straight": straight_through,
    "hard": lambda logits: top_k(logits, 1, "hard"),
    "renormalised": top_k,
    "vmoe": lambda logits: top_k(logits, 1, "vmoe"),
    "soft": soft,
}
EPS = 0.05
ATTACK = PGD(linf(EPS), steps=20)


class Pair(RoutedModel):
    """x is two pixels, p and q. The router says ``slope`` * (1/2 - p) of expert 0, the opposite of expert 1; expert 0
    says 1/2 - q of class 0 and the opposite of class 1; expert 1 the other way round.
    """

    def __init__(self, gate: str, slope: float = 1.0) -> None:
        super().__init__()
        self.gate, self.slope = gate, slope

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        p, q = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        logits = self.slope * torch.stack([0.5 - p, p - 0.5], 1)
        routing = tape("router", GATES[self.gate](logits[:, None]))
        experts = torch.stack([0.5 - q, q - 0.5, q - 0.5, 0.5 - q], 1).view(-1, 2, 2)
        chosen = experts.gather(1, routing.index[:, 0, :, None].expand(-1, -1, 2))
        return (routing.weight[:, 0, :, None] * chosen).sum(1)


class Mix(RoutedModel):
    """Three linear experts of 4 classes and a linear router on 16 pixels, standard normal weights; smooth if the gate
    is soft. Subclasses plant one fault each.
    """

    def __init__(self, gate: str = "soft", sharp: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.gate, self.sharp = gate, sharp
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList([nn.Linear(16, 4) for _ in range(3)])
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.data.zero_()

    def look(self, x: Tensor) -> Tensor:
        return x.flatten(1) - 0.5

    def score(self, x: Tensor) -> Tensor:
        return self.sharp * self.router(x)

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        x = self.look(x)
        routing = tape("router", GATES[self.gate](self.score(x)[:, None]))
        every = torch.stack([expert(x) for expert in self.experts], 1)
        chosen = every.gather(1, routing.index[:, 0, :, None].expand(-1, -1, 4))
        return (routing.weight[:, 0, :, None] * chosen).sum(1)


class Quantised(Mix):
    """Sees 9 grey levels: no gradient; with ``through``, one that pretends there were no levels."""

    def __init__(self, through: bool = False) -> None:
        super().__init__()
        self.through = through

    def look(self, x: Tensor) -> Tensor:
        x = super().look(x)
        levels = torch.round(8 * x) / 8
        return x + (levels - x).detach() if self.through else levels + 0 * x.detach()


class Masked(Mix):
    """A tenth of the gradient of class 0's logit is let through."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = super().body(x, tape)
        first = logits[:, :1]
        return torch.cat([0.9 * first.detach() + 0.1 * first, logits[:, 1:]], 1)


class Shattered(Mix):
    """A ripple of a wavelength of 0.005 pixels, 3 high, on every logit."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return super().body(x, tape) + 3 * torch.sin(400 * torch.pi * x.flatten(1)[:, :4])


class Large(Mix):
    """Logits times 1000: the cross-entropy of a right image is exactly 0."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return 1000 * super().body(x, tape)


class Along(Mix):
    """Linear logits of r, the sum of the pixels' distances from 1/2, half of them turned: eps moves r by 0.8."""

    def of(self, r: Tensor) -> list[Tensor]:
        """The logits of classes 1 to 3; that of class 0 is 0."""
        raise NotImplementedError

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        r = (self.look(x) * torch.tensor([1.0, -1.0], device=x.device).repeat(8)).sum(1)
        logits = torch.stack([torch.zeros_like(r), *self.of(r)], 1)
        return logits + 0.01 * super().body(x, tape)


class Distant(Along):
    """Of class 0 while r < 1. The nearest rival, class 1, rises as r falls, and is out of reach. Class 2 is in reach
    for r > 0.2, but so far below that cross-entropy gives it no weight, unless the logits are divided.
    """

    def of(self, r: Tensor) -> list[Tensor]:
        return [-2 - r, 60 * (r - 1), torch.full_like(r, -40.0)]


class Crowded(Along):
    """Of class 0 while r < 1, where class 1, the nearest rival, begins. Cross-entropy follows two others, steeper and
    never on top, which rise as r falls to -0.3.
    """

    def of(self, r: Tensor) -> list[Tensor]:
        steep = -0.35 - 1.25 * (r + 0.3).relu()
        return [0.1 * (r - 1), steep, steep]


class Single(Mix):
    """Cannot be asked in float64."""

    def look(self, x: Tensor) -> Tensor:
        return super().look(x.float()).to(torch.float32)


class Constant(Mix):
    """A router that does not look at the image."""

    def score(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.5, 0.0]).to(x).expand(len(x), 3)


class Dead(Mix):
    """Expert 2 is never chosen."""

    def score(self, x: Tensor) -> Tensor:
        return self.router(x) - torch.tensor([0.0, 0.0, 1e3])


class Noisy(Mix):
    """Dropout that is on in eval mode, inside a module of its own (``where="module"``) or in the body."""

    class Jitter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.3, training=True)

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.jitter = where, self.Jitter()

    def score(self, x: Tensor) -> Tensor:
        return self.router(self.jitter(x)) if self.where == "module" else self.router(x) + torch.rand(len(x), 3)


class Stale(Mix):
    """A router that remembers its last scores, and answers with them as often as it can."""

    def __init__(self, answers: str) -> None:
        super().__init__("hard")
        self.answers = answers
        self.last: Tensor | None = None

    def score(self, x: Tensor) -> Tensor:
        fresh = super().score(x)
        old = self.last if self.last is not None and len(self.last) == len(x) else fresh
        self.last = fresh.detach()
        return fresh if self.answers == "fresh" else old


class Capacity(Mix):
    """Expert 0 takes at most the first four images of a batch that want it; the others go to expert 1."""

    def __init__(self) -> None:
        super().__init__("hard")

    def score(self, x: Tensor) -> Tensor:
        logits = super().score(x)
        wants = logits.argmax(1) == 0
        late = wants & (wants.cumsum(0) > 4)
        return torch.where(late[:, None], torch.tensor([0.0, 1.0, 0.0]), logits)


class Dynamic(Mix):
    """Moves the image against its own gradient before it answers."""

    def __init__(self, grad: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.grad = grad

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            (slope,) = self.grad(torch.logsumexp(super().body(at, Tape()), 1).sum(), at)
        return super().body(x + 0.01 * slope.sign(), tape)


def pictures(n: int = 32) -> Tensor:
    return 0.1 + 0.8 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(5))


def case(model: RoutedModel, *attacks: Attack, n: int = 32, batch: Batch | None = None) -> Subject:
    """The model on random images that it gets right by definition: the labels are its own answers."""
    x = pictures(n)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return Subject.of(model, attacks or (ATTACK,), batch or Batch(x, y, torch.arange(n)))


def on(model: RoutedModel, batch: Batch, *attacks: Attack) -> Subject:
    """The model on these very images, right or wrong, as the cheap checks see it."""
    return Subject(model, attacks or (ATTACK,), batch, batch)
