"""Libraries of the `hf` extra: imported when they are needed, quiet, and never on the network."""

from __future__ import annotations

import importlib
from types import ModuleType


def transformers() -> ModuleType:
    """Returns the transformers library, without its progress bars and advice.

    Raises:
        ValueError: If it is not installed.
    """
    library = _imported("transformers")
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library


def peft() -> ModuleType:
    """Returns the peft library.

    Raises:
        ValueError: If it is not installed.
    """
    return _imported("peft")


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"Expected the {name} library, got an environment without it. "
            "Install it with: pip install 'dpsgd[hf]'."
        ) from error
