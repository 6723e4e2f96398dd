"""Optional places for scalars: Weights & Biases, MLflow. Their packages are not among md2's dependencies."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from shards.errors import UsageError, first_line


class Sink(Protocol):
    """Takes scalars by name."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases; a resumed run goes on under the id in RUN/wandb.id."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        wandb, path = _package("wandb"), run / "wandb.id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        self.handle = wandb.init(id=path.read_text(), name=run.name, dir=str(run), config=config, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        self.handle.log(values, step=step)

    def close(self) -> None:
        self.handle.finish()


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI; a resumed run goes on under the id in RUN/mlflow.id."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        self.client, path = _package("mlflow"), run / "mlflow.id"
        started = self.client.start_run(run_id=path.read_text() if path.exists() else None, run_name=run.name)
        path.write_text(started.info.run_id)
        self.client.log_dict(config, "config.yaml")

    def log(self, values: dict[str, float], step: int) -> None:
        # Its file store cannot have loss/0 beside loss: a folder of a file's name.
        self.client.log_metrics({name.replace("loss/", "loss_"): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.client.end_run()


_SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {"wandb": Wandb, "mlflow": MLflow}


def check_sinks(names: Sequence[str]) -> None:
    """Before anything else happens: are the sinks' packages there?

    Raises:
        UsageError: a sink's package is not installed.
    """
    for name in names:
        _package(name)


def open_sinks(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Sink]:
    """The sinks of these names.

    Raises:
        UsageError: a sink's package is not installed, or does not start: no server, no account, no place.
    """
    sinks = []
    for name in names:
        try:
            sinks.append(_SINKS[name](run, config))
        except UsageError:
            raise
        except Exception as error:  # each package has its own
            raise UsageError(f"train.sinks: {name} does not start: {first_line(error)}") from error
    return sinks


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"train.sinks has {name}, which is not installed: pip install {name}, or leave it out"
        ) from error
