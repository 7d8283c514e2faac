"""A model as an ONNX graph, for inference elsewhere. Its shapes are fixed, so every expert runs on every item."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from robustmoe.errors import UserError
from robustmoe.models import ImageShape, RoutedModel
from robustmoe.records import write_atomic

IMAGES = 64
"""Images on which the graph is compared with torch."""

ALLOWED = 1e-4
"""Of the logits' deviation."""


def write_onnx(model: RoutedModel, path: Path, shape: ImageShape) -> str:
    """Writes the model as a graph from images (n, ch, h, w) in [0, 1] to logits (n, c); returns what was written.

    Models whose images share room (capacities, expert choice) get a graph for one image at a time. The file is only
    written where onnxruntime answers as torch does. UserError where it does not, or a package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(
            f"an .onnx file needs {error.name}; expected the extra: pip install 'robustmoe[onnx]'"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        content = _graph(model, shape, file)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    images = torch.rand(IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    batches = images.split(given.shape[0] if isinstance(given.shape[0], int) else IMAGES)
    with torch.no_grad():
        ours = torch.cat([model(batch) for batch in batches])
    theirs = torch.cat([torch.from_numpy(session.run(None, {given.name: batch.numpy()})[0]) for batch in batches])
    difference = float((ours - theirs).abs().max() / ours.std().clamp_min(1e-30))
    agreeing = int((ours.argmax(1) == theirs.argmax(1)).sum())
    if not difference <= ALLOWED:
        raise UserError(
            f"onnxruntime answers otherwise than torch: logits {difference:.1e} of their deviation apart, {agreeing} "
            f"of {IMAGES} classes equal; no file was written"
        )
    write_atomic(path, content)
    batch = "any number of images" if len(batches) == 1 else "one image at a time"
    return (
        f"{path}: a graph for {batch}; onnxruntime and torch on {IMAGES} images: {agreeing} classes equal, logits "
        f"within {difference:.1e} of their deviation"
    )


def _graph(model: RoutedModel, shape: ImageShape, file: Path) -> bytes:
    """The graph for any number of images, or, where the model needs to know it, for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own code
        logging.disable(logging.WARNING)
        try:
            program = _exported(model, torch.zeros(3, *shape), {"x": {0: torch.export.Dim("n", min=1)}})
            if program is None:
                program = _exported(model, torch.zeros(1, *shape), None)
        finally:
            logging.disable(logging.NOTSET)
    if program is None:
        raise UserError("torch's exporter cannot write this model as an ONNX graph; save its weights instead (.pt)")
    program.save(str(file))
    return file.read_bytes()


def _exported(model: RoutedModel, example: torch.Tensor, dynamic: Any) -> Any:
    """torch's ONNX program; None where it cannot be made, or not for any number of images."""
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: _sorted},
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError):
        return None
    assert program is not None
    fixed = isinstance(program.model.graph.inputs[0].shape[0], int)
    return None if dynamic is not None and fixed else program


def _sorted(values: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """torch's stable sort: ONNX's TopK of all, which leaves equal values in their order."""
    from onnxscript import opset18

    place = dim % len(values.shape)
    size = opset18.Shape(values, start=place, end=place + 1)
    return opset18.TopK(values, size, axis=place, largest=int(descending), sorted=1)
