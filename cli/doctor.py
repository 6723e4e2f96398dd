"""`md2 doctor`: what this machine has, and what of md2 works on it."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape

from cli.console import console, counted
from shards.errors import first_line


def doctor() -> None:
    """Check the installation: torch, DALI, GPU, decoders. Exit code 1 if something that training needs fails."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", platform.python_version),
        ("cores", lambda: str(len(os.sched_getaffinity(0)))),
        ("torch", _torch),
        ("GPU", _gpu),
        ("DALI", _dali),
        ("extras", _extras),
        ("cache", _cache),
        ("free disk", lambda: f"{shutil.disk_usage('.').free / 1e9:.0f} GB here"),
    ]
    failed = False
    for name, check in checks:
        try:
            console.print(f"[green]ok[/]    {name:10} {check()}", highlight=False)
        except Exception as error:  # of any library: the other checks still tell something
            failed = True
            console.print(f"[red]fails[/] {name:10} {escape(first_line(error))}", highlight=False)
    raise typer.Exit(1 if failed else 0)


def _extras() -> str:
    from importlib.util import find_spec

    modules = {"video": "av", "export": "onnxruntime", "dask": "distributed", "timm": "timm"}
    missing = [name for name, module in modules.items() if find_spec(module) is None]
    there = ", ".join(name for name in modules if name not in missing) or "none"
    return f"{there}; missing: pip install 'md2[{','.join(missing)}]'" if missing else there


def _cache() -> str:
    from shards.cache.folder import Cache, format_bytes, residents

    place = Cache.from_environment()
    return f"{place.folder}, {format_bytes(sum(resident.present for resident in residents(place)))} of datasets"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        from md2.distributed import unused_gpu

        if reason := unused_gpu():
            raise RuntimeError(reason)
        return "none: everything runs on the CPU"
    from md2.photometric.reprojection import has_kernels

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs = has_kernels(torch.zeros(1, device="cuda:0"))
    kernels = "Triton kernels run" if runs else str(caught[-1].message) if caught else "without Triton: slower"
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}, {kernels}{_video()}"


def _video() -> str:
    """What to do if the driver's video libraries are missing: containers get them, and JPEG engines, only on demand."""
    import ctypes

    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return (
            "; the driver's video libraries are missing, so JPEG engines, if the GPU has any, stay idle: start a "
            "container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    return ""


def _dali() -> str:
    """Decode a picture, on the GPU if there is one: that is what fails where the wheel and the machine disagree."""
    import io

    import numpy as np
    import nvidia.dali
    import torch
    from PIL import Image

    # DALI's stubs leave out half of what it exports.
    dali: Any = nvidia.dali

    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 100, 50)).save(buffer, "JPEG")
    encoded = np.frombuffer(buffer.getvalue(), np.uint8)
    place, device_id = ("mixed", 0) if torch.cuda.is_available() else ("cpu", None)

    def decode() -> Any:
        return dali.fn.decoders.image(dali.fn.external_source(lambda: [encoded]), device=place)

    (images,) = dali.pipeline_def(batch_size=1, num_threads=1, device_id=device_id)(decode)().run()
    ((height, width, _),) = images.shape()
    return f"{dali.__version__}, decodes on the {'CPU' if device_id is None else 'GPU'} ({width}x{height})"
