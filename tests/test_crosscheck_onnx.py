"""Every kind of model as an ONNX graph: onnxruntime answers as torch does, whatever the experts are.

`make crosscheck` installs onnxruntime; without it this file is skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MISSING = "needs onnx, onnxscript and onnxruntime: run `make crosscheck`"
pytestmark = pytest.mark.crosscheck

onnxruntime = pytest.importorskip("onnxruntime", reason=MISSING)
pytest.importorskip("onnxscript", reason=MISSING)

import shapes  # noqa: E402
from robustmoe.errors import UserError  # noqa: E402
from robustmoe.models import RoutedModel, build_model  # noqa: E402
from robustmoe.weights import onnx  # noqa: E402

VIT = "vit_moe(tiny, patch=2, width=16, depth=2, heads=2, experts=4, placement=(1,)"
ANY = {
    "dense": "small_cnn",
    "ensemble": "ensemble(small_cnn, experts=3, router=small_cnn, k=2, gate=renormalised)",
    "hard": "ensemble(small_cnn, experts=3, router=small_cnn, gate=hard)",
    "pathway": "pathway(resnet8(width=4), experts=2, router=small_cnn)",
    "stages": "pathway(resnet8(width=4), experts=2, router=small_cnn, routers=stage)",
    "vit": "vit(patch=2, width=16, depth=2, heads=2)",
    "tokens": f"{VIT}, k=2)",
    "slots": f"{VIT}, choice=slots)",
    "affine": "affine(resnet8(width=4), experts=4)",
    "dual": "dual(standard=small_cnn, robust=small_cnn)",
    "block": "block_moe(resnet18(width=4), experts=2)",
    "convolutions": "conv_moe(resnet18(width=4), experts=2)",
}
ALONE = {"capacity": f"{VIT}, capacity=1.05)", "expert choice": f"{VIT}, choice=expert)"}
"""Models that fill rooms: their graphs take one image at a time."""


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape checks read sizes as numbers, which then are fixed in the graph."""
    monkeypatch.setattr(shapes.budget, "calls", 0)


def made(spec: str) -> RoutedModel:
    return build_model(spec, 10, (1, 8, 8), seed=1)


@pytest.mark.parametrize("name", [*ANY, *ALONE])
def test_a_graph_answers_as_torch(tmp_path: Path, name: str) -> None:
    model = made({**ANY, **ALONE}[name])
    said = onnx.write_onnx(model, tmp_path / "a.onnx", (1, 8, 8))
    assert ("one image at a time" in said) == (name in ALONE)
    assert "64 classes equal" in said
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    x = torch.rand(1 if name in ALONE else 5, 1, 8, 8)
    answered = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in x])
    assert (answered - expected).abs().max() <= 1e-4 * expected.std().clamp_min(1e-3)


def test_a_graph_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = made("small_cnn"), made("small_cnn")
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    graph = onnx._graph
    monkeypatch.setattr(onnx, "_graph", lambda model, shape, file: graph(other, shape, file))
    with pytest.raises(UserError, match="onnxruntime answers otherwise than torch"):
        onnx.write_onnx(model, tmp_path / "a.onnx", (1, 8, 8))
    assert not (tmp_path / "a.onnx").exists()
