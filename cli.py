"""Code that the commands share: what is said when something is wrong, the console, their options.

Only what needs no package is imported at the top, so that it can speak of those that are missing.
"""

import errno
import functools
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

if TYPE_CHECKING:
    from rich.console import Console

EXPECTED = ValueError, OSError, FloatingPointError  # whose messages are written for users
WRONG_INPUT = ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError


# ---- when something is wrong


def rank() -> int:
    """Return this process's rank before anything is launched: torchrun's, Lightning's, srun's."""
    numbers = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(number) for number in numbers if number.isdigit()), 0)


def is_main_process() -> bool:
    """Tell whether this process speaks for all ranks."""
    return rank() == 0


def fail(error: BaseException) -> int:
    """Say what is wrong in one message; return the exit code: 2 where the input is, else 1."""
    where = "" if is_main_process() else f" (rank {rank()})"
    print(f"error{where}: {describe(error)}", file=sys.stderr, flush=True)
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return 2 if isinstance(error, WRONG_INPUT) or too_long else 1


def describe(error: BaseException) -> str:
    """Return a message for users."""
    text = str(error)
    if "torchvision::nms" in text:
        return (
            "torch and torchvision do not fit together, which happens when they come from "
            "different places, or one is updated alone: "
            "pip install --force-reinstall torch torchvision"
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error.name} is not installed for {sys.executable}: "
            "pip install -r requirements.txt, or take the Python that has it (.venv/bin/python)"
        )
    if "DataLoader worker" in text:
        died = text.partition(". ")[0]
        return (
            "a process that loads images has died, which a full /dev/shm or little memory does; "
            f"try hardware.num_workers=0 ({died})"
        )
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        reason = text.splitlines()[0] if text else type(error).__name__
        return f"this does not fit into memory; try less of it ({reason})"
    if isinstance(error, UnicodeEncodeError):
        return f"this locale cannot write {error.object!r}; set PYTHONUTF8=1"
    if isinstance(error, OSError) and error.strerror:  # as the system gives it
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if n is not None]
        where = f"{' -> '.join(names)}: " if names else ""
        return f"{where}{error.strerror}; {advice(error.errno)}"
    return text if isinstance(error, EXPECTED) else f"{type(error).__name__}: {text}"


def guard() -> None:
    """Let an installation that cannot work end in `describe` from here on, not in a traceback.

    Ctrl-C ends with 130 also while packages are imported, and names in letters that the
    terminal lacks are printed as it can.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            os._exit(130)
        if isinstance(error, ImportError) or "torchvision::nms" in str(error):
            fail(error)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # a command runs
    guard()

import typer  # noqa: E402  (may be missing)

from config import Config, apply_override, check_config, fields_of  # noqa: E402
from files import advice, did_you_mean  # noqa: E402

# ---- the terminal


def plain_console(quiet: bool = False) -> "Console":
    """Return a console that prints names as they are, and that a reader may leave (`| head`)."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return Plain(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)


def quiet_libraries() -> None:
    """Silence Lightning's tips and hardware lines, which are not about this run."""
    import pytorch_lightning  # noqa: F401  (it sets its level when it is imported)

    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # but that another rank has died is
    launcher = "lightning_fabric.strategies.launchers.subprocess_script"
    logging.getLogger(launcher).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")


# ---- options


LOGS, SHIPPED = Path("lightning_logs"), Path("pretrained")


def named_models() -> dict[str, Path]:
    """Return {name: path} of runs, and of models that ship where there is nothing of that name."""
    ships = {path.stem: path for path in SHIPPED.glob("*.safetensors")}
    ships = {name: path for name, path in ships.items() if not (LOGS / name).exists()}
    runs = {path.parent.name: path.parent for path in LOGS.glob("*/checkpoints")}
    return dict(sorted((ships | runs).items()))


def model_names(incomplete: str) -> list[str]:
    """Return the names of models that begin so, for a shell to complete."""
    return [name for name in named_models() if name.startswith(incomplete)]


def keys_like(incomplete: str) -> list[str]:
    """Return `section.key=` of the keys that begin so, for a shell to complete."""
    keys = [f"{name}.{key}=" for name in Config.model_fields for key in fields_of(name)]
    return [key for key in keys if key.startswith(incomplete)]


def sampling_keys(incomplete: str) -> list[str]:
    """Return the keys of `sampling` and `guidance` that begin so."""
    return [key for key in keys_like(incomplete) if key.partition(".")[0] in STEERING]


STEERING = "sampling", "guidance"  # sections that have an option for each key
ALSO = {
    "class_label": (list[str], "What to draw: a class, several (2,5), or all; a row for each."),
    "fast": (bool, "Draw in few network calls; what else is said here wins."),
    "guide": (Path, "A weaker model that guidance leads away from; default: it without labels."),
}


def check_sampling(overrides: Iterable[str]) -> dict[str, Any]:
    """Return what `sampling.key=value` and `guidance.key=value` set; ValueError for any other.

    Those of guidance are called guidance_key.
    """
    tree: dict[str, dict] = {section: {} for section in STEERING}
    for override in overrides:
        apply_override(tree, override)
        if len(tree) > len(STEERING):
            only = " and ".join(f"{section}.key=value" for section in STEERING)
            raise ValueError(f"{override}: here only {only} can be said")
    run = {"dataset": {"name": "digits", "image_size": 32}, "training": {"max_steps": 1}}
    check_config(run | {"diffusion": {"timesteps": 10**6}} | tree, source="the command line")
    return tree["sampling"] | {f"guidance_{key}": v for key, v in tree["guidance"].items()}


def sampling_options(command: Callable) -> Callable:
    """Give a command an option for each key of the config's sections `sampling` and `guidance`.

    --eta 0.5 is an alias of `sampling.eta=0.5`, and --guidance-scale 2 of `guidance.scale=2`, which
    may follow the arguments. The command takes all as `sampling`, a dict of those that were given,
    with `class_label`, a list, `guide`, a path, and `fast`.
    """
    parameters = dict(inspect.signature(command).parameters)
    del parameters["sampling"]
    options: dict[str, tuple[Any, Any]] = {}
    for name, field in fields_of("sampling").items():
        options[name] = (
            field.annotation,
            typer.Option(help=f"{field.description}.", **limits(field)),
        )
    scale, interval = (fields_of("guidance")[key] for key in ("scale", "interval"))
    options["guidance_scale"] = float, typer.Option(help=f"{scale.description}.", **limits(scale))
    options["guidance_interval"] = (
        str,
        typer.Option(metavar="LO,HI", help=f"{interval.description}."),
    )
    for name, (kind, text) in ALSO.items():
        options[name] = kind, typer.Option(f"--{name.replace('_', '-')}", help=text)
    for name, (kind, option) in options.items():
        parameters[name] = inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Optional[kind], option],  # noqa: UP045
        )
    parameters["overrides"] = inspect.Parameter(
        "overrides",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,
            typer.Argument(
                metavar="SAMPLING.KEY=VALUE",
                help="The same as the options below.",
                autocompletion=sampling_keys,
            ),
        ],
    )

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        overrides = given.pop("overrides") or []
        if str(given.get("checkpoint")).startswith(STEERING):  # the first, after --run-name
            first = str(given["checkpoint"])
            if "=" in first:
                overrides, given["checkpoint"] = [first, *overrides], None
        chosen = {name: given.pop(name) for name in options}
        chosen = {name: value for name, value in chosen.items() if value not in (None, [])}
        try:
            if interval := chosen.pop("guidance_interval", None):
                overrides = [*overrides, f"guidance.interval=[{interval}]"]
            said = check_sampling(overrides)
        except ValueError as error:
            raise typer.Exit(fail(error)) from None
        command(sampling=said | chosen, **given)

    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    with_options.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    with_options.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return with_options


def limits(field: Any) -> dict[str, Any]:
    """Return a config field's bounds as typer's."""
    names = {"ge": "min", "le": "max"}
    return {n: getattr(m, k) for m in field.metadata for k, n in names.items() if hasattr(m, k)}


def usable_device(device: str) -> str:
    """Return the device that is meant; ValueError where it cannot be used here.

    Nothing is put on it: that would open a context there, in each of several processes.
    """
    import torch

    there = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if device == "auto":
        return next(kind for kind, count in there.items() if count)
    kind, colon, index = device.partition(":")
    if kind not in there or (colon and not index.isdigit()) or int(index or 0) >= there[kind]:
        names = [k if n == 1 else f"{k}:0 ... {k}:{n - 1}" for k, n in there.items() if n]
        raise ValueError(f"--device {device} cannot be used here; there are: {', '.join(names)}")
    return device


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of '64' or '96x64'."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and 0 < int(side) < 2**15 for side in sides):
        raise ValueError(f"--image-size {text!r} is neither 64 nor 96x64 (height x width)")
    return int(sides[0]), int(sides[-1])


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of '0-2,7': [0, 1, 2, 7]."""
    seeds: dict[int, None] = {}
    most = 10_000_000
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--seeds {text!r}: {part!r} is neither 7 nor 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(seeds) + last - first >= most or last >= 2**63:
            raise ValueError(f"--seeds {text!r}: at most {most:,} of them, each below 2^63")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def which_model(checkpoint: Path | None, run_name: str | None, which: str | None) -> Path:
    """Return what the line asks for; ValueError where it asks for nothing, or for two things."""
    known = named_models()
    if (checkpoint is None) == (run_name is None):
        there = f" (there are: {', '.join(known)})" if known else ""
        raise ValueError(f"give a checkpoint or a --run-name{there}, one of them")
    if run_name is not None and run_name not in known:
        raise FileNotFoundError(f"no run {run_name!r} in {LOGS}{did_you_mean(run_name, known)}")
    source = checkpoint or known[str(run_name)]
    found = checkpoint_of(source, which)
    if run_name and source.parent == SHIPPED:
        plain_console().print(f"no run {run_name} in {LOGS}: {source}, which ships")
    return found


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Values that win over the file's.",
        autocompletion=keys_like,
    ),
]
TrainedModel = Annotated[Path | None, typer.Argument(metavar="CKPT", help="A trained model.")]
RunName = Annotated[
    str | None,
    typer.Option(
        help="Instead of CKPT: a run of lightning_logs, or a model that ships (pretrained).",
        autocompletion=model_names,
    ),
]
Weights = Annotated[
    Literal["ema", "raw"], typer.Option(help="The EMA, or the last training weights.")
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Precision of the network; auto: bfloat16 where the hardware multiplies it."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**62, help="Seed of the first image; each next one has 1 more.")
]
CheckpointName = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="best|last|STEP",
        help="Which checkpoint of a run's folder. Default: the newest.",
    ),
]


def checkpoint_of(source: Path, name: str | None) -> Path:
    """Return a run's checkpoint: best, last or that of a step; FileNotFoundError: it has none."""
    if name is None:
        return source
    if source.is_file():
        raise ValueError(f"--checkpoint {name} is of a run's folder, and {source} is one file")
    folder = source / "checkpoints"
    path = folder / f"{f'step-{int(name):08d}' if name.isdecimal() else name}.ckpt"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.ckpt"))) or "none"
        hint = "; training.keep_best=validation keeps the best" if name == "best" else ""
        raise FileNotFoundError(f"no --checkpoint {name} in {folder}, there are: {there}{hint}")
    return path
