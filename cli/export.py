"""`md2 export`: the depth network for other runtimes, the weights for the official code, or a model to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.console import say
from shards.errors import UsageError


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run, checkpoint, exported model or folder of Monodepth2 weights.")
    ],
    to: Annotated[
        Literal["onnx", "torch", "monodepth2", "safetensors"],
        typer.Option(
            help="ONNX; torch.export (.pt2); a folder of official Monodepth2 weights; a folder to publish: weights, "
            "configuration and model card."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="File, or folder for monodepth2 and safetensors. (default: depth.onnx, depth.pt2, monodepth2, model)",
        ),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Accept any batch size instead of 1 image.")
    ] = False,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Result of md2 eval --json, for the model card of safetensors; repeat for several."
        ),
    ] = None,
) -> None:
    """Write the depth network, or the weights of all networks. Depth is checked against PyTorch (to 1e-4)."""
    from md2.inference.inputs import require_model

    require_model(model)
    if to in ("monodepth2", "safetensors") and dynamic_batch:
        raise UsageError("--dynamic-batch has no meaning for weights: leave it out")
    if evaluation and to != "safetensors":
        raise UsageError(f"--evaluation is for the model card of --to safetensors; {to} has none: leave it out")

    from md2.inference.export import export_monodepth2, export_onnx, export_torch, metadata
    from md2.inference.predictor import load

    if to == "safetensors":
        from md2.report.model_card import export_safetensors

        folder = export_safetensors(model, out or Path("model"), evaluation or [])
        say(f"wrote {folder}: state the licence in its README.md, then for example: hf upload USER/NAME {folder}")
        return
    if to == "monodepth2":
        say(f"wrote {export_monodepth2(model, out or Path('monodepth2')).path}")
        return
    predictor = load(model, "cpu")
    writer = export_onnx if to == "onnx" else export_torch
    default = Path("depth.onnx" if to == "onnx" else "depth.pt2")
    written = writer(predictor, out or default, dynamic_batch=dynamic_batch)
    about = metadata(predictor)
    unit = "metres" if predictor.unit == "metres" else "the model's own unit"
    batch = "any batch" if dynamic_batch else "batch 1"
    say(
        f"wrote {written.path}: {about['width']}x{about['height']}, {batch}, depth in {unit}; "
        f"differs from PyTorch by {written.difference:.1e} at most"
    )
