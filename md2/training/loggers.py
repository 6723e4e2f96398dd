"""Optional loggers of scalars: Weights & Biases, MLflow. Their packages are not among md2's dependencies."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from shards.errors import UsageError, first_line
from shards.files import read_small


class Logger(Protocol):
    """Receives scalars by name."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Record the scalars of a step."""

    def close(self) -> None:
        """End the run's record."""


class Wandb:
    """Weights & Biases; a resumed run continues under the id in RUN/wandb.id."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        wandb, path = _package("wandb"), run / "wandb.id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        self.handle = wandb.init(
            id=read_small(path).decode(), name=run.name, dir=str(run), config=config, resume="allow"
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.handle.log(values, step=step)

    def close(self) -> None:
        self.handle.finish()


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI; a resumed run continues under the id in RUN/mlflow.id."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        self.client, path = _package("mlflow"), run / "mlflow.id"
        started = self.client.start_run(run_id=read_small(path).decode() if path.exists() else None, run_name=run.name)
        path.write_text(started.info.run_id)
        self.client.log_dict(config, "config.yaml")

    def log(self, values: dict[str, float], step: int) -> None:
        # Its file store cannot hold both loss and loss/0: a file and a folder of one name. data_wait likewise.
        named = {name.replace("loss/", "loss_").replace("data_wait/", "data_wait_"): v for name, v in values.items()}
        self.client.log_metrics(named, step=step)

    def close(self) -> None:
        self.client.end_run()


_LOGGERS: dict[str, Callable[[Path, dict[str, Any]], Logger]] = {"wandb": Wandb, "mlflow": MLflow}


def check_loggers(names: Sequence[str]) -> None:
    """Check that the loggers' packages are installed.

    Raises:
        UsageError: one is not.
    """
    for name in names:
        _package(name)


def open_loggers(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Logger]:
    """Start the loggers of these names.

    Raises:
        UsageError: a package is not installed, or its logger does not start: no server, no account, no folder.
    """
    loggers = []
    for name in names:
        try:
            loggers.append(_LOGGERS[name](run, config))
        except UsageError:
            raise
        except Exception as error:  # each package has its own
            raise UsageError(f"train.loggers: {name} does not start: {first_line(error)}") from error
    return loggers


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"train.loggers has {name}, which is not installed: pip install {name}, or leave it out"
        ) from error
