"""A finished run, read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from dpsgd.run_directory import CONFIG, MODEL, REPORT, read_report

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Run(NamedTuple):
    """A finished run, read back.

    Attributes:
        model: The trained model, in eval mode on the CPU, in the dtype of the run.
        config: The composed configuration, an OmegaConf dictionary.
        report: The final figures and the guarantee, a plain dictionary.
    """

    model: nn.Module
    config: Any
    report: dict[str, Any]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a model.safetensors into a model.

    Raises:
        ValueError: If the file is missing, broken, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, str(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"Expected weights of this model in '{path}', got: {str(error).strip()}"
        ) from error


def load_run(path: str | Path) -> Run:
    """Returns (model, config, report) of a finished run.

    The model is built anew from the run's configuration and gets the trained weights.

    Args:
        path: The run's directory, `runs/<name>`.

    Raises:
        ValueError: If there is no finished run, or its files are broken.
    """
    from dpsgd.components import build_model
    from dpsgd.placement import Placement

    folder = Path(path).expanduser()
    missing = [name for name in (CONFIG, REPORT, MODEL) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"Expected a finished run in '{folder}', but {missing} is missing.")
    report = read_report(folder)
    config = read_config(folder / CONFIG)
    model = Placement.from_names("cpu", config.dtype).model(build_model(config))
    load_weights(model, folder / MODEL)
    return Run(model.eval(), config, report)


def read_config(path: Path) -> DictConfig:
    """Returns the settings in a config.yaml.

    Raises:
        ValueError: If it cannot be read, or holds no settings.
    """
    from omegaconf import DictConfig, OmegaConf

    try:
        config = OmegaConf.load(path)
    except Exception as error:  # YAML's own, of which there are many kinds
        raise ValueError(f"Expected readable settings in '{path}', got: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"Expected settings in '{path}', got a list.")
    return config
