"""Objects from configs: what a `_target_` makes is what its place asks for, or one line tells that it is not."""

from __future__ import annotations

import functools
import inspect
import pydoc
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dpm_scales.errors import OutOfMemoryError, UserError, require
from dpm_scales.memory import lacks_memory


def plain(config: Any) -> Any:
    """Return an OmegaConf node as plain containers, resolved, as checkpoints may hold them; another value as it is."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def read_config(file: Path, key: str) -> dict[str, Any]:
    """Return one of the package's YAML files as plain containers, resolved.

    Args:
        key: the option that names it, for the message.

    Raises: UserError if it has values that only a command line can give.
    """
    from omegaconf import OmegaConf

    settings = OmegaConf.load(file)
    missing = sorted(OmegaConf.missing_keys(settings))
    needed = ", ".join(f"{file.parent.name}.{name}" for name in missing)
    require(not missing, f"{key}={file.stem} would need {needed}; give its folder or file: {key}=PATH")
    values: dict[str, Any] = plain(settings)
    return values


def build(
    config: Any,
    kind: type,
    where: str,
    partial_kwargs: dict[str, Any] | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Return the object that a config describes.

    Args:
        config: a mapping with `_target_` and that class's arguments.
        kind: what the object must be.
        where: the config's key, for messages.
        partial_kwargs: where `_partial_` is allowed: arguments of the function that then makes the object.
        kwargs: further arguments, which every class for this place takes.

    Raises: UserError if there is no such class, or if it makes something else; OutOfMemoryError if memory runs out.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    settings, kwargs = plain(config), kwargs or {}
    found = check_kind(settings, kind, where, partial_kwargs)
    what = f"{where}._target_={settings['_target_']}"
    _require_arguments(found, kwargs, what)
    try:
        # under its key, which Hydra's errors tell
        built = instantiate(OmegaConf.create({where: settings})[where], _convert_="all", **kwargs)
    except Exception as error:
        place = lacks_memory(root_cause(error))
        if place is None:
            raise
        raise OutOfMemoryError(f"{what} needs more memory than {place} has left; choose smaller values") from error
    if partial_kwargs is not None and settings.get("_partial_"):
        _require_arguments(found, partial_kwargs, what)
        built = built(**partial_kwargs)
    require(isinstance(built, kind), _no(kind, what))
    return built


def check_kind(config: Any, kind: type, where: str, partial_kwargs: Iterable[str] | None = None) -> Any:
    """Return the class or function that a config's `_target_` names, after a check of those in its arguments too.

    Nothing is built.

    Args:
        partial_kwargs: names of what functions are given where `_partial_` is allowed; None where it is not.

    Raises: UserError if it is not there, or is known to make something else than `kind`.
    """
    settings = plain(config)
    require(isinstance(settings, dict), f"{where} must be a config with a _target_, got {settings!r}")
    name, partial = settings.get("_target_"), settings.get("_partial_", False)
    require(isinstance(name, str) and name != "", f"{where}._target_ must name a class, got {name!r}")
    for key in settings:
        usual = not str(key).startswith("_") or key in ("_target_", "_partial_")
        require(usual, f"{where} holds the key {key!r}; give a class its arguments by their names")
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{where}._target_={name} can't be imported: {error.value}") from error
    require(found is not None, f"{where}._target_={name}: there is no such class")
    hints = hints_of(found)
    made = found if inspect.isclass(found) else hints.get("return")
    wrong = not callable(found) or (inspect.isclass(made) and not issubclass(made, kind))
    require(not wrong, _no(kind, f"{where}._target_={name}"))
    require(
        not inspect.isabstract(found),
        f"{where}._target_={name} is an abstract class; name a class derived from it",
    )
    require(isinstance(partial, bool), f"{where}._partial_ must be true or false, got {partial!r}")
    require(not partial or partial_kwargs is not None, f"{where}._partial_=true would make nothing; leave it out")
    require(
        not partial or not inspect.isclass(found),
        f"{where}._partial_=true is for functions of the {' and the '.join(partial_kwargs or ())}, and {name} is a "
        f"class; set {where}._partial_=false",
    )
    for key, value in settings.items():
        require_switch(f"{where}.{key}", value, alternatives(hints.get(key)))
        kinds = [k for k in get_args(hints.get(key)) or [hints.get(key)] if inspect.isclass(k) and k is not type(None)]
        if isinstance(value, dict) and "_target_" in value and len(kinds) == 1:
            check_kind(value, kinds[0], f"{where}.{key}")
    return found


@functools.cache
def hints_of(function: Any) -> dict[str, Any]:
    """Types of a function's arguments, or of a class's, and what it returns, as far as it tells."""
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (TypeError, NameError):  # a module; names that are imported for type checkers alone
        return {}


def locate(name: Any) -> Any:
    """What a `_target_` names; None if it is not there or can't be imported, which `check_kind` tells."""
    try:
        return pydoc.locate(str(name))
    except pydoc.ErrorDuringImport:
        return None


def arguments_of(found: Any) -> Collection[str] | None:
    """Names of a function's arguments, or of a class's; None if it takes any, or does not tell."""
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # of some built in C nobody knows
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else parameters.keys()


def alternatives(hint: Any) -> list[Any]:
    """The types, and the values of Literals, that a hint allows."""
    if get_origin(hint) in (Union, UnionType):
        return [one for part in get_args(hint) for one in alternatives(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


def require_switch(key: str, value: Any, allowed: Sequence[Any] = (bool,)) -> None:
    """Raise UserError if bool is among the `alternatives` that are allowed, and `value` is none of them."""
    if bool not in allowed or isinstance(value, bool):
        return
    kinds = tuple(kind for kind in allowed if isinstance(kind, type))
    if isinstance(value, kinds) or (isinstance(value, str) and value in allowed):
        return
    words = ["true", "false", *(repr(other) for other in allowed if isinstance(other, str))]
    words += ["null"] if type(None) in allowed else []
    raise UserError(f"{key} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}")


def _require_arguments(found: Any, names: Iterable[str], what: str) -> None:
    taken = arguments_of(found)
    for name in names:
        require(taken is None or name in taken, f"{what} takes no argument {name}, which it would be given here")


def _no(kind: type, what: str) -> str:
    """The line for a `_target_` that makes something else than `kind`."""
    room = kind.__module__
    while hasattr(sys.modules.get(parent := room.rpartition(".")[0]), kind.__name__):
        room = parent
    return f"{what} makes no {kind.__name__}; name a class derived from {room}.{kind.__name__}"


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that the others of a chain were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def root_cause_line(error: BaseException) -> str:
    """Return the first line of an exception's root cause; the name of its class if it says nothing."""
    error = root_cause(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
