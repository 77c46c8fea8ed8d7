"""Files: written whole or not at all, with what is said where one cannot be; YAML in and out."""

import difflib
import errno
import json
import os
import re
import reprlib
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pydantic import BaseModel

AGAIN = "give the same command again"
_ADVICE = {
    "ENOSPC": f"free some and {AGAIN}",
    "EDQUOT": f"free some of your quota and {AGAIN}",
    "EMFILE": f"allow more open files (ulimit -n) and {AGAIN}",
    "ENFILE": f"close other programs and {AGAIN}",
    "EIO": f"see whether the disk is sound and {AGAIN}",
    "ENOENT": "give a path that exists",
    "EEXIST": "give another path",
    "ENOTDIR": "give another path",
    "EISDIR": "give another path",
    "ENAMETOOLONG": "give a shorter name",
    "EACCES": "allow it, or give another path",
    "EPERM": "allow it, or give another path",
    "EROFS": "give another path",
}


def advice(code: int | None) -> str:
    """Return what a user can do about an error of the system."""
    return _ADVICE.get(errno.errorcode.get(code or 0, ""), f"mend that and {AGAIN}")


@contextmanager
def explained(path: str | Path, *, kept: bool = True) -> Iterator[None]:
    """Turn an error of the system into one that names `path` and says what to do.

    Args:
        kept: say that what was at `path` before is intact, where something is there.

    Raises:
        OSError: of the kind and errno that the system gave.
    """
    try:
        yield
    except Exception as error:
        # torch and Lightning hide a full disk behind errors of their own
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            shown = None if cause.__suppress_context__ else cause.__context__
            cause = cause.__cause__ or shown
        # torch's C++ says "unable to open file <...>: Too many open files (24)"
        if cause is None and (found := re.match(r"unable to .*\((\d+)\)$", str(error))):
            cause = OSError(int(found[1]), os.strerror(int(found[1])))
        if cause is None or str(cause).startswith("cannot write "):
            raise
        reason = cause.strerror or str(cause)
        inside = os.fsdecode(cause.filename) if cause.filename else None
        if inside and not same_place(inside, path):
            reason += f" ({inside})"
        intact = "; what was there before is intact" if kept and os.path.lexists(path) else ""
        kind = type(OSError(cause.errno, "")) if cause.errno else OSError
        told = kind(f"cannot write {path}: {reason}; {advice(cause.errno)}{intact}")
        told.errno = cause.errno
        raise told from None


def same_place(one: str, other: str | Path) -> bool:
    """Return whether `one` is `other` or the temporary file beside it."""
    return Path(one) == Path(other) or Path(one).name.startswith(f".{Path(other).stem}.")


@contextmanager
def atomic_write(
    path: str | Path, *, keep_suffix: bool = False, unique: bool = False
) -> Iterator[Path]:
    """Give a name beside `path` to write a file or a folder to; then force it to disk and rename.

    Args:
        keep_suffix: the name ends as `path` does, for writers that go by it.
        unique: no other process is given the same name, for files that several may write.

    Raises:
        OSError: one message that names `path` and says what to do; what was there is intact.
    """
    path = Path(path)
    middle = f".{uuid.uuid4().hex}" if unique else ""
    name = f".{path.stem}{middle}.tmp{path.suffix}" if keep_suffix else f".{path.name}{middle}.tmp"
    temporary = path.with_name(name)
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)  # of a process that was killed
            yield temporary
            for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
                if file.is_file():
                    with file.open("r+b") as opened:
                        os.fsync(opened.fileno())
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise


def remove(path: Path) -> None:
    """Delete a file or a folder as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = ".*.tmp") -> None:
    """Delete what processes that were killed left in `folder` more than a day ago."""
    for leftover in folder.glob(pattern):
        with suppress(OSError):  # another process may be faster
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                remove(leftover)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-4 as a string; this reads it as YAML 1.2 and every person does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"
    ),
    list("-+0123456789."),
)


def _no_duplicate_keys(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    merge = "tag:yaml.org,2002:merge"
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != merge]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {key!r} stands twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.construct_mapping = _no_duplicate_keys  # type: ignore


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain data."""
    return yaml.load(text, _Loader)  # safe: _Loader is yaml.SafeLoader with better floats


def read_yaml(path: Path) -> dict:
    """Return a config's sections.

    Raises:
        ValueError: it is none. OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; a config is a YAML file")
    if not path.exists():
        there = sorted(str(p) for p in Path("configs").glob("*.yml"))
        raise FileNotFoundError(f"no config at {path}{did_you_mean(str(path), there)}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except Exception as error:  # its constructors raise anything
        where = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {where}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no sections (dataset:, model:, training:, ...)")
    return tree


def split_override(override: str) -> tuple[str, str, str]:
    """Return section, key and text of `section.key=text`; ValueError where it is not so."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name and "." not in name):
        raise ValueError(f"{override!r} is not an override; write section.key=value")
    return section, name, text


def yaml_value(text: str, where: str) -> Any:
    """Return the value of a YAML scalar or list; ValueError names `where` it was given."""
    try:
        return parse_yaml(text)
    except Exception:  # its constructors raise anything
        raise ValueError(f"{where}: {reprlib.repr(text)} is not a YAML value") from None


def set_value(tree: dict, section: str, name: str, value: Any) -> None:
    """Set a key of a section in plain data; ValueError where the section is none."""
    values = tree.setdefault(section, {})
    if values is None:
        values = tree[section] = {}
    if not isinstance(values, dict):
        raise ValueError(f"{section}.{name}={value}: {section} is not a section")
    values[name] = value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' where something near is known, else the list."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are: {', '.join(known)}" if known else ""


# ---- a config, which is a pydantic model of sections, as text


def _fields(config: "BaseModel", section: str) -> dict[str, Any]:
    return type(getattr(config, section)).model_fields


def to_yaml(config: "BaseModel") -> str:
    """Return the resolved config, every default written out, with what each key means."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        fields = _fields(config, section)
        lines.append(f"{section}:")
        for key, value in values.items():
            text = yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]
            lines.append(f"  {f'{key}: {text}':<34}  # {fields[key].description}")
    return "\n".join(lines) + "\n"


def move_old_keys(tree: dict, kind: "type[BaseModel]") -> list[str]:
    """Move what `training` once held to its sections, in place; return the keys as they are now."""
    moved, training = [], tree["training"] if isinstance(tree.get("training"), dict) else {}
    for key in list(training):
        for section in ("hardware", "logging", "evaluation"):
            known = kind.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
            values = tree.setdefault(section, {}) if key in known else None
            if isinstance(values, dict) and key not in values:  # else it is refused as unknown
                values[key] = training.pop(key)
                moved.append(f"{section}.{key}")
    return moved


def explain(fault: Any, kind: "type[BaseModel]") -> str:
    """Return one line of what pydantic finds wrong with a config: where, value, rule and hint."""
    of_unions = "int", "constrained-int", "literal['auto']"
    where = ".".join(str(part) for part in fault["loc"] if part not in of_unions)
    if fault["type"] == "extra_forbidden":
        section = kind.model_fields.get(fault["loc"][0]) if len(fault["loc"]) > 1 else None
        known = section.annotation.model_fields if section else kind.model_fields  # type: ignore[union-attr]
        return f"{where}: no such key{did_you_mean(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{where}: missing; give it a value"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {reprlib.repr(fault['input'])}: {message[0].lower()}{message[1:]}"


def divisors(n: int) -> str:
    """Return the divisors of n, for hints."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def differences(old: "BaseModel", new: "BaseModel", *, learned: bool = False) -> list[str]:
    """Return 'section.key: old -> new' for each value that differs; `learned`: of keys not free."""
    lines, new_tree = [], new.model_dump(mode="json")
    for section, values in old.model_dump(mode="json").items():
        fields = _fields(old, section)
        for key, value in values.items():
            other = new_tree[section][key]
            if value != other and not (learned and fields[key].json_schema_extra):
                lines.append(f"{section}.{key}: {json.dumps(value)} -> {json.dumps(other)}")
    return lines
