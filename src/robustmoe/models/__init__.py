"""Models: dense networks, ensembles of whole networks, dual models, pathway MoE-CNNs. Each is written as a call and
built anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from robustmoe import generators
from robustmoe import spec as specs
from robustmoe.errors import UserError
from robustmoe.models.affine import AffineModel, AffineNorm, LayerExperts, PooledRouter
from robustmoe.models.affine_mixture import AffineMixture
from robustmoe.models.affine_vit import AffineViTModel
from robustmoe.models.backbone import Backbone, Slim, StagedNetwork
from robustmoe.models.base import Dense, ImageShape, ModelSpec, NetworkSpec, Output, RoutedModel
from robustmoe.models.block import BlockMoE, ConvMoE, LayeredModel, RoutedLayer
from robustmoe.models.conversion import MoefiedModel, moefy
from robustmoe.models.densenet import DenseNet, densenet40, densenet121
from robustmoe.models.dual import SHARPENINGS, Dual, DualModel, Nuts, Scaled, Sharpening, blend_logits
from robustmoe.models.ensemble import Ensemble, EnsembleModel
from robustmoe.models.memory import fitting_memory
from robustmoe.models.mixing import mix_reference, mix_sparse, run_sparse
from robustmoe.models.norm import BatchNorm2d, Normalise
from robustmoe.models.own import OwnModel
from robustmoe.models.patch_resnet import PatchResNet
from robustmoe.models.pathway import Pathway, PathwayModel, StagedPathwayModel
from robustmoe.models.plain import Plain, as_routed
from robustmoe.models.preact_resnet import PreActResNet, preact_resnet18, preact_resnet34, preact_resnet50
from robustmoe.models.pruned import Pruned
from robustmoe.models.resnet import ResNet, resnet8, resnet10, resnet18, resnet20, resnet34, resnet50
from robustmoe.models.small import ConvSmall, Downsampled, Linear, Resized, SmallCNN
from robustmoe.models.token_layers import SlotMoE, TokenLayer, TokenMoE
from robustmoe.models.tokens import TokenExperts
from robustmoe.models.vgg import VGG16
from robustmoe.models.vit import ViT, vit_base, vit_small, vit_tiny
from robustmoe.models.vit_moe import ViTMoE, ViTMoEModel
from robustmoe.models.wide_resnet import WideResNet, wrn_28_10

MODELS: dict[str, Callable[..., ModelSpec]] = {
    "resnet": ResNet,
    "resnet8": resnet8,
    "resnet10": resnet10,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "preact_resnet": PreActResNet,
    "preact_resnet18": preact_resnet18,
    "preact_resnet34": preact_resnet34,
    "preact_resnet50": preact_resnet50,
    "wide_resnet": WideResNet,
    "wrn_28_10": wrn_28_10,
    "vgg16": VGG16,
    "densenet": DenseNet,
    "densenet40": densenet40,
    "densenet121": densenet121,
    "vit": ViT,
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_moe": ViTMoE,
    "linear": Linear,
    "small_cnn": SmallCNN,
    "conv_small": ConvSmall,
    "downsampled": Downsampled,
    "resized": Resized,
    "ensemble": Ensemble,
    "pathway": Pathway,
    "slim": Slim,
    "pruned": Pruned,
    "block_moe": BlockMoE,
    "conv_moe": ConvMoE,
    "dual": Dual,
    "affine": AffineMixture,
    "patch_resnet": PatchResNet,
}


def build_model(
    spec: str | ModelSpec,
    num_classes: int,
    image_shape: ImageShape,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
) -> RoutedModel:
    """Returns a freshly initialised model in eval mode, for images of ``image_shape`` (ch, h, w) in [0, 1].

    ``mean`` and ``std``: one value a channel, of the training data; 0.5 each by default. The initialisation depends
    on ``seed`` alone; torch's global generator is left as it was. Raises `robustmoe.errors.UserError` for a spec that
    does not build.
    """
    described: ModelSpec = specs.build(spec, "model") if isinstance(spec, str) else spec
    channels = image_shape[0]
    with generators.seeded(seed):
        normalise = Normalise(mean or (0.5,) * channels, std or (0.5,) * channels)
        try:
            with fitting_memory():
                model = described.build(num_classes, image_shape, normalise)
        except UserError:
            raise
        except ValueError as error:  # what a spec alone cannot know: the images' size
            raise UserError(f"model {spec}: {error}") from error
    if not isinstance(described, OwnModel):  # code of a user's own may count on the memory format it was written for
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


__all__ = [
    "MODELS",
    "SHARPENINGS",
    "VGG16",
    "AffineMixture",
    "AffineModel",
    "AffineNorm",
    "AffineViTModel",
    "Backbone",
    "BatchNorm2d",
    "BlockMoE",
    "ConvMoE",
    "ConvSmall",
    "Dense",
    "DenseNet",
    "Downsampled",
    "Dual",
    "DualModel",
    "Ensemble",
    "EnsembleModel",
    "ImageShape",
    "LayerExperts",
    "LayeredModel",
    "Linear",
    "ModelSpec",
    "MoefiedModel",
    "NetworkSpec",
    "Normalise",
    "Nuts",
    "Output",
    "OwnModel",
    "PatchResNet",
    "Pathway",
    "PathwayModel",
    "Plain",
    "PooledRouter",
    "PreActResNet",
    "Pruned",
    "ResNet",
    "Resized",
    "RoutedLayer",
    "RoutedModel",
    "Scaled",
    "Sharpening",
    "Slim",
    "SlotMoE",
    "SmallCNN",
    "StagedNetwork",
    "StagedPathwayModel",
    "TokenExperts",
    "TokenLayer",
    "TokenMoE",
    "ViT",
    "ViTMoE",
    "ViTMoEModel",
    "WideResNet",
    "as_routed",
    "blend_logits",
    "build_model",
    "densenet40",
    "densenet121",
    "mix_reference",
    "mix_sparse",
    "moefy",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "resnet8",
    "resnet10",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "run_sparse",
    "vit_base",
    "vit_small",
    "vit_tiny",
    "wrn_28_10",
]
