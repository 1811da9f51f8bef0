"""What the entry points share: Hydra, and errors as one readable message."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from dpsgd import durable, jobs
from dpsgd.config import config_dir, resolve, typed_settings
from dpsgd.jobs import EXIT_BAD_INPUT
from dpsgd.lost_peers import LostPeer
from dpsgd.run_directory import CONFIG, RunDirectory

EXIT_CRASHED = 1
EXIT_INTERRUPTED = 130

_KILLED = (
    "A process that ran jobs was killed, perhaps for its memory, and the others ended with it. The "
    "same command with the same run.dir goes on; a lower hydra.launcher.n_jobs needs less memory."
)
_LAUNCHERS = {
    "joblib": "pip install 'dpsgd[sweep]'",
    "submitit_local": "pip install hydra-submitit-launcher",
    "submitit_slurm": "pip install hydra-submitit-launcher",
}
_EXPECTED = (ValueError, HydraException, OmegaConfBaseException, OSError, LostPeer)


def run(
    task: Callable[[DictConfig], None],
    config_name: str,
    job: Callable[[DictConfig, Console], Mapping[str, Any]] | None = None,
    speaks: Callable[[], bool] = lambda: True,
) -> None:
    """Composes the configuration from the command line and runs the task; exits on errors.

    A user's mistake gives one message on standard error and exit status 2; with `debug=true` it
    gives the traceback.

    Args:
        task: What to do with the resolved configuration.
        config_name: Name of the primary configuration file, without its ending.
        job: What to do with it in a sweep (`jobs.run`), by default the task. It may run in another
            process, so it must not hold what cannot be sent there.
        speaks: Whether this process tells what went wrong: of several, one does.
    """

    def fail(error: Exception) -> NoReturn:
        fail_with(_in_words(error, config_name), speaks)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it repeats what we say

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)
    def main(config: DictConfig) -> None:
        if os.getcwd() not in sys.path:  # a stranger's own module, named by _target_
            sys.path.insert(0, os.getcwd())
        _redact_sweep(config)
        overrides = HydraConfig.get().overrides.task
        if job is not None and in_sweep():
            of_sweep = job
            jobs.run(
                lambda console: of_sweep(resolve(config, overrides), console),
                run_path(config.run.dir).name,
                lambda error: _in_words(error, config_name),
            )
            return
        try:
            task(resolve(config, overrides))
        except BrokenPipeError:
            raise
        except Exception as error:  # here, before Hydra prints the overrides with the key
            if isinstance(error, _EXPECTED) and not _debugging():
                fail(error)
            speaks()  # for the others this is said
            traceback.print_exc()
            sys.exit(EXIT_CRASHED)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    sys.argv[1:] = [_quoted(argument) for argument in sys.argv[1:]]
    try:
        main()
    except BrokenPipeError:  # the reader of our output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except _EXPECTED as error:
        fail(error)
    except RuntimeError as error:
        if type(error).__name__ != "TerminatedWorkerError":  # of joblib
            raise
        print(f"Error: {_KILLED}", file=sys.stderr)
        sys.exit(EXIT_CRASHED)
    except KeyboardInterrupt:
        if speaks():
            print("Interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def fail_with(words: str, speaks: Callable[[], bool] = lambda: True) -> NoReturn:
    """Ends the process with a message about bad input, which one of several processes prints."""
    if speaks():
        print(f"Error: {words}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def run_path(configured: str) -> Path:
    """Returns the run's directory: as configured, or a sweep job's own below it."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return Path(configured)
    name = re.sub(r"[^\w.,=+-]", "_", settings.job.override_dirname)[:150]
    return Path(settings.sweep.dir) / f"{settings.job.num}_{name}".rstrip("_")


def resumed(config: DictConfig) -> DictConfig:
    """Returns the configuration of the run that `resume` names, with what else was typed.

    Raises:
        ValueError: If there is no unfinished run, or a run.dir was typed as well.
    """
    overrides = HydraConfig.get().overrides.task
    typed = [key for key, _ in typed_settings(overrides)]
    if in_sweep():
        raise ValueError("Expected resume= to go on with one run, got it with -m: leave out -m.")
    if "run.dir" in typed:
        raise ValueError("resume and run.dir exclude each other, and both are set: set one.")
    run = RunDirectory(config.resume)
    if not run.unfinished:
        raise ValueError(f"Expected an unfinished run to resume in '{config.resume}', got no run.")
    stored, key = resolve(run.config(), []), run.key()
    lacking = [name for name in config if name not in stored]
    if lacking:
        raise ValueError(f"Expected all settings in '{run.path / CONFIG}', {lacking} are missing.")
    for name in typed:
        OmegaConf.update(stored, name, OmegaConf.select(config, name), merge=False)
    stored.run.dir = config.resume
    if stored.privacy.key is not None:  # it was fixed, and is not in the file
        stored.privacy.key = None if key is None else key.hex()
    return resolve(stored, [])


def typed() -> list[str]:
    """Returns what the user typed, `key=value` each."""
    return list(HydraConfig.get().overrides.task)


def in_sweep() -> bool:
    """Whether the command is one of several jobs, of `-m`."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _quoted(argument: str) -> str:
    """The argument, its value in quotes if Hydra's grammar has no such characters (paths do)."""
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals:
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return argument


def _in_words(error: Exception, config_name: str) -> str:
    """What is wrong with the input; raises the error if it is another one, or with debug=true."""
    if _debugging() or not isinstance(error, _EXPECTED):
        raise error
    return _explain(error, config_name)


def _debugging() -> bool:
    return any(re.fullmatch(r"\+?debug=(true|1|yes|on)", arg, re.I) for arg in sys.argv[1:])


def _redact_sweep(config: DictConfig) -> None:
    """Takes a fixed key out of the multirun.yaml that Hydra has written."""
    settings = HydraConfig.get()
    key = OmegaConf.select(config, "privacy.key")
    if settings.mode == RunMode.MULTIRUN and key is not None:
        file = Path(settings.sweep.dir) / "multirun.yaml"
        text = file.read_text(encoding="utf-8")
        if str(key) in text:  # several jobs may do so at once
            durable.write(file, text.replace(str(key), "<redacted>").encode())


def _explain(error: Exception, config_name: str) -> str:
    """The error's words, with what exists for a mistyped option or key."""
    if isinstance(error, OSError) and error.filename:
        return f"Cannot use '{error.filename}': {error.strerror}."
    text = str(error).split("Config search path")[0]
    text = "\n".join(line for line in text.splitlines() if line.strip())
    for launcher in re.findall(r"Could not \w+ 'hydra/launcher/(\w+)'", text):
        if launcher in _LAUNCHERS:
            return f"hydra/launcher={launcher} is not installed: {_LAUNCHERS[launcher]}"
    match = re.search(r"Could not override '([\w.@/-]+)'", text)
    return text if match is None else _unknown_key(match[1], config_name)


def _unknown_key(key: str, config_name: str) -> str:
    known = _known_keys(config_name)
    parent = key.rpartition(".")[0]
    near = [k for k in known if k.rpartition(".")[2] == key]
    near = near or difflib.get_close_matches(key, known, n=3)
    siblings = [k for k in known if k.rpartition(".")[0] == parent and not k.endswith("_")]
    siblings = siblings or [k for k in known if "." not in k]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    further = f" (A further argument of {parent} is added with +{key}=...)" if parent else ""
    return f"There is no setting '{key}'.{hint} Settings there: {', '.join(siblings)}.{further}"


def _known_keys(config_name: str) -> list[str]:
    """The keys of the composed configuration, with the groups that the user chose if possible."""
    choices = [arg for arg in sys.argv[1:] if re.fullmatch(r"\w+=\w+", arg)]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for overrides in (choices, []):
            try:
                config = compose(config_name, overrides=overrides)
            except (HydraException, OmegaConfBaseException):
                continue
            return sorted(_keys(OmegaConf.to_container(config, resolve=False), ""))
    return []


def _keys(node: object, prefix: str) -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for name, value in node.items():
        keys += [f"{prefix}{name}", *_keys(value, f"{prefix}{name}.")]
    return keys
