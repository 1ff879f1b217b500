"""Build objects from configs, and report in one line a `_target_` that makes the wrong kind of object."""

from __future__ import annotations

import functools
import inspect
import pydoc
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dpm_scales.errors import OutOfMemoryError, UserError, require, suggest
from dpm_scales.memory import lacks_memory
from dpm_scales.models.trust import current_names

_OWN = f"{__name__.partition('.')[0]}."


def plain(config: Any) -> Any:
    """Return an OmegaConf node as resolved plain containers, as checkpoints store them; other values unchanged."""
    if "omegaconf" not in sys.modules:  # then there are no nodes
        return config
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def read_config(file: Path, key: str) -> dict[str, Any]:
    """Return one of the package's YAML files as resolved plain containers, without its defaults list.

    Args:
        key: name of the option that chooses the file, for messages.

    Raises: UserError if the file has values that only a command line can provide.
    """
    from omegaconf import OmegaConf

    settings = OmegaConf.load(file)
    missing = sorted(OmegaConf.missing_keys(settings))
    needed = ", ".join(f"{file.parent.name}.{name}" for name in missing)
    require(not missing, f"{key}={file.stem} would need {needed}; give its folder or file: {key}=PATH")
    values: dict[str, Any] = plain(settings)
    values.pop("defaults", None)
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
        config: a mapping with `_target_`, also by a former name, and that class's arguments.
        kind: what the object must be.
        where: the config's key, for messages.
        partial_kwargs: arguments for calling a `_partial_` function to make the object; None if not allowed.
        kwargs: further arguments, which every class used here must accept.

    Raises: UserError if the class does not exist or makes another kind; OutOfMemoryError if memory runs out.
    """
    settings, kwargs = current_names(plain(config)), kwargs or {}
    found = check_kind(settings, kind, where, partial_kwargs)
    what = f"{where}._target_={settings['_target_']}"
    _require_arguments(found, kwargs, what)
    try:
        if _own_alone(settings):
            built = _built(settings, where, **kwargs)
        else:  # Hydra refuses to call what could do harm
            from hydra.utils import instantiate
            from omegaconf import OmegaConf

            # under its key, so that Hydra's error about a missing value names it in full
            built = instantiate(OmegaConf.create({where: settings})[where], _convert_="all", **kwargs)
    except Exception as error:
        root = root_cause(error)
        place = lacks_memory(root)
        if place is not None:
            raise OutOfMemoryError(f"{what} needs more memory than {place} has left; choose smaller values") from error
        usual = isinstance(root, (TypeError, ValueError, ImportError, AttributeError, ArithmeticError))
        if isinstance(root, UserError) or not (usual or type(root).__name__ == "MisconfigurationException"):
            raise
        text = " ".join(str(root).split()) or type(root).__name__
        if isinstance(root, ArithmeticError):  # "math range error", and not of which argument
            text = f"{text}; one of its numbers is too large or too small"
        raise UserError(f"{where}: {text} (HYDRA_FULL_ERROR=1 shows where)") from error
    if partial_kwargs is not None and settings.get("_partial_"):
        _require_arguments(found, partial_kwargs, what)
        built = built(**partial_kwargs)
    require(isinstance(built, kind), _no(kind, what))
    return built


def _own_alone(value: Any) -> bool:
    """Return whether nested containers name classes of this package only, and no keys that need Hydra itself."""
    if isinstance(value, list):
        return all(map(_own_alone, value))
    if not isinstance(value, dict):
        return True
    usual = all(not str(key).startswith("_") or key in ("_target_", "_partial_") for key in value)
    own = str(value.get("_target_", _OWN)).startswith(_OWN)
    return usual and own and all(map(_own_alone, value.values()))


def _built(value: Any, where: str, **kwargs: Any) -> Any:
    """Return nested plain containers with an object in place of every mapping that has a `_target_`, as Hydra does.

    Args:
        kwargs: further arguments of the outermost object.
    """
    if isinstance(value, list):
        return [_built(entry, f"{where}.{index}") for index, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    made = {key: _built(entry, f"{where}.{key}") for key, entry in value.items()} | kwargs
    for key, entry in made.items():
        missing = isinstance(entry, str) and entry == "???"
        require(not missing, f"{where}.{key} has no value yet; give it on the command line: KEY=VALUE")
    if "_target_" not in made:
        return made
    name, partial = str(made.pop("_target_")), made.pop("_partial_", False)
    found: Any = pydoc.locate(name)
    require(callable(found), f"{where}._target_={name}: there is no such class")
    return functools.partial(found, **made) if partial else found(**made)


def check_kind(config: Any, kind: type, where: str, partial_kwargs: Iterable[str] | None = None) -> Any:
    """Return the class or function that a config's `_target_` names; also check those in its arguments.

    Nothing is built.

    Args:
        partial_kwargs: names of the arguments for a `_partial_` function; None if `_partial_` is not allowed.

    Raises: UserError if it does not exist, or is known to make something other than `kind`.
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
    taken = arguments_of(found)
    for key, value in settings.items():
        if taken is not None and key not in ("_target_", "_partial_", *taken):
            # a part, unlike a value, is chosen by its group's name, which is no misspelling of another
            part = isinstance(value, dict) and "_target_" in value
            known = suggest(f"{where}.{key}", [f"{where}.{name}" for name in taken], misspelt=not part)
            raise UserError(f"unknown option '{where}.{key}': {known}")
        require_switch(f"{where}.{key}", value, alternatives(hints.get(key)))
        kinds = [k for k in get_args(hints.get(key)) or [hints.get(key)] if inspect.isclass(k) and k is not type(None)]
        if isinstance(value, dict) and "_target_" in value and len(kinds) == 1:
            check_kind(value, kinds[0], f"{where}.{key}")
    return found


@functools.cache
def hints_of(function: Any) -> dict[str, Any]:
    """Return the type hints of a function, or of a class's `__init__`; empty if they can't be resolved."""
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (TypeError, NameError):  # a module, or names imported only for type checking
        return {}


def locate(name: Any) -> Any:
    """Return the object that a `_target_` names, or None if it is missing or can't be imported; see `check_kind`."""
    try:
        return pydoc.locate(str(name))
    except pydoc.ErrorDuringImport:
        return None


def arguments_of(found: Any) -> Collection[str] | None:
    """Return the argument names of a function or class; None if it accepts any, or they are unknown."""
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # some C functions have no signature
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else parameters.keys()


def defaults_of(found: Any) -> dict[str, Any]:
    """Return the defaults of the arguments of a function or class by name; empty if they are unknown."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def alternatives(hint: Any) -> list[Any]:
    """Return the types, and the values of Literals, that a type hint allows."""
    if get_origin(hint) in (Union, UnionType):
        return [one for part in get_args(hint) for one in alternatives(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


def require_switch(key: str, value: Any, allowed: Sequence[Any] = (bool,)) -> None:
    """Raise UserError if bool is one of the `allowed` alternatives and `value` matches none of them."""
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
    """Return the message for a `_target_` that makes something other than `kind`."""
    room = kind.__module__
    while hasattr(sys.modules.get(parent := room.rpartition(".")[0]), kind.__name__) and f"{parent}." != _OWN:
        room = parent
    return f"{what} makes no {kind.__name__}; name a class derived from {room}.{kind.__name__}"


def root_cause(error: BaseException) -> BaseException:
    """Return the first exception of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def root_cause_line(error: BaseException) -> str:
    """Return the first line of an exception's root cause, or the name of its class if it has no message."""
    error = root_cause(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _configs(package: Path) -> Path:
    """Return the folder of the configs: inside an installed package, beside it in a checkout."""
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


CONFIGS = _configs(Path(__file__).resolve().parents[1])
