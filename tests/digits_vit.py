"""Small vision transformers trained on digits, for tests of claims about trained nets."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from robustmoe import spec
from robustmoe.data import Batch
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise, permutation
from robustmoe.training.auxiliary import auxiliary


def digits_batches(test: int) -> tuple[Batch, Batch]:
    """All training images of digits, and the first ``test`` test images."""
    data = spec.build("digits", "data")
    return data.train.batch(list(range(len(data.train)))), data.test.batch(list(range(test)))


def trained(text: str, images: Batch, epochs: int, lr: float, batch: int = 64, seed: int = 0) -> RoutedModel:
    """The model of that spec in eval mode, after AdamW with a one-cycle schedule; router noise and V-MoE's balance loss
    (0.005 importance + 0.005 load) where it has routers.
    """
    model = build_model(text, 10, (1, 8, 8), seed=seed).train()
    steps = len(images.x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        for rows in permutation(len(images.x), seed, epoch).split(batch)[:steps]:
            output = model.run(images.x[rows], noise=Noise.of(images.index[rows], seed, epoch))
            loss = F.cross_entropy(output.logits, images.y[rows]) + auxiliary(output.trace, 0.01, "vmoe")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
