"""Models: dense networks, ensembles of whole networks, pathway MoE-CNNs. Each is written as a call and built
anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from robustmoe import spec as specs
from robustmoe.models.backbone import Backbone, Slim, StagedNetwork
from robustmoe.models.base import Dense, ImageShape, ModelSpec, NetworkSpec, Output, Plain, RoutedModel, as_routed
from robustmoe.models.ensemble import Ensemble, EnsembleModel
from robustmoe.models.mixing import mix_reference, mix_sparse, run_sparse
from robustmoe.models.norm import BatchNorm2d, Normalise
from robustmoe.models.pathway import Pathway, PathwayModel, StagedPathwayModel
from robustmoe.models.resnet import ResNet, resnet8, resnet10, resnet18, resnet20, resnet34, resnet50
from robustmoe.models.small import Linear, SmallCNN

MODELS: dict[str, Callable[..., ModelSpec]] = {
    "resnet": ResNet,
    "resnet8": resnet8,
    "resnet10": resnet10,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "linear": Linear,
    "small_cnn": SmallCNN,
    "ensemble": Ensemble,
    "pathway": Pathway,
    "slim": Slim,
}


def build_model(
    spec: str | ModelSpec,
    num_classes: int,
    image_shape: ImageShape,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
) -> RoutedModel:
    """A freshly initialised model in eval mode, for images of ``image_shape`` (ch, h, w) in [0, 1].

    ``mean`` and ``std``: one value a channel, of the training data; 0.5 each by default. The initialisation depends
    on ``seed`` alone; torch's global generator is left as it was. Raises `robustmoe.errors.UserError` for a spec that
    does not build.
    """
    described: ModelSpec = specs.build(spec, "model") if isinstance(spec, str) else spec
    channels = image_shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = described.build(
            num_classes, image_shape, Normalise(mean or (0.5,) * channels, std or (0.5,) * channels)
        )
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


__all__ = [
    "MODELS",
    "Backbone",
    "BatchNorm2d",
    "Dense",
    "Ensemble",
    "EnsembleModel",
    "ImageShape",
    "Linear",
    "ModelSpec",
    "NetworkSpec",
    "Normalise",
    "Output",
    "Pathway",
    "PathwayModel",
    "Plain",
    "ResNet",
    "RoutedModel",
    "Slim",
    "SmallCNN",
    "StagedNetwork",
    "StagedPathwayModel",
    "as_routed",
    "build_model",
    "mix_reference",
    "mix_sparse",
    "resnet8",
    "resnet10",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "run_sparse",
]
