"""Describe objects by the arguments of their constructors, in plain containers that can be written to files.

    describe(VP(num_scales=100))
    {"_target_": "dpm_scales.processes.VP", "num_scales": 100, "noise": {"_target_": ..., ...}, ...}

`models.instantiate.build` makes an equal object from it. A class derived from `Describable` records its arguments.
Other classes must keep every argument in an attribute of the same name, or be passed as `configured(MyNet, width=8)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, cast

from dpm_scales.errors import UserError, require, suggest

_GIVEN = "_given"
_PACKAGE = __name__.partition(".")[0]


class DescriptionError(UserError):
    """An object that can't be written to a file as plain values."""


class Describable:
    """Base class of objects that record the arguments of their constructor, including defaults."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that records its arguments first, unless a derived class has already done so."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording(self: object, *args: Any, **kwargs: Any) -> None:
        if _GIVEN not in self.__dict__:
            try:
                given = _bound(signature, (self, *args), kwargs)
            except TypeError:  # `init` raises it too, under its own name
                given = None
            # not through nn.Module's own __setattr__, which needs its constructor first
            object.__setattr__(self, _GIVEN, given)
        init(self, *args, **kwargs)

    return recording


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments by name, except the first; None if some have no name. Raises TypeError for a wrong call."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            found[name] = _copied(value)
        elif value:
            return None
    return found


def _copied(value: Any) -> Any:
    """Return a value in new lists and mappings, so that later changes by the caller do not affect it."""
    if isinstance(value, list | tuple | range):
        return [_copied(entry) for entry in value]
    return {key: _copied(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def revise(made: Describable, arguments: Mapping[str, Any]) -> None:
    """Replace recorded arguments of an object by values that it has chosen since."""
    given = made.__dict__.get(_GIVEN)
    if given is not None:
        object.__setattr__(made, _GIVEN, given | dict(arguments))


@dataclass(frozen=True)
class Configured:
    """A class with arguments, from which an object will be made; see `configured`."""

    kind: type
    arguments: Mapping[str, Any]


def configured(kind: type, **arguments: Any) -> Configured:
    """Return a class with arguments, to be passed to `Model` in place of an object.

    The model makes the object, and also passes `in_channels`, `out_channels` and `num_classes` to a network. It can be
    saved whatever attributes the class has.

    Args:
        kind: a class, defined in a module that can be imported.
        arguments: arguments of its constructor: numbers, strings, lists, mappings and describable objects.

    Raises: UserError for an argument that the class does not take.
    """
    require(inspect.isclass(kind), f"configured takes a class and its arguments, got {kind!r:.100}")
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):  # some C functions have no signature
        return Configured(kind, arguments)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            known = suggest(name, parameters)
            require(name in parameters, f"{kind.__name__} takes no argument {name!r}: {known}")
    return Configured(kind, arguments)


def describe(value: Any) -> Any:
    """Return a value as plain containers; for an object, its class as `_target_` and its arguments by name.

    An argument of None is replaced by the object that the constructor chose for it, if the attribute of its name holds
    one, so that a file does not depend on this version's defaults.

    Raises: DescriptionError for a value that can't be described, or a class that other programs can't import.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if hasattr(value, "tolist"):  # arrays
        return describe(value.tolist())
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, list | tuple | range):
        return [describe(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    kind = value.kind if isinstance(value, Configured) else type(value)
    place = class_name(kind)
    for name, argument in (arguments := _arguments(value)).items():
        try:
            arguments[name] = describe(argument)
        except DescriptionError as error:
            raise DescriptionError(f"{kind.__name__}.{name}: {error}") from error
    return {"_target_": place, **arguments}


def class_name(kind: type) -> str:
    """Return the full name of a class, as in a `_target_`. Raises DescriptionError if it can't be imported by name."""
    name, module = kind.__qualname__, kind.__module__
    advice = "move it to a module of its own, so that others can load it"
    if module == "__main__" or "<" in name:
        where = "a function" if "<" in name else "the program itself"
        raise DescriptionError(f"the class {kind.__name__} is defined in {where}; {advice}")
    if module == "builtins" or not (isinstance(kind, type) and module):
        raise DescriptionError(f"a {name} can't be written to a file as plain values")
    parts = module.split(".")
    return ".".join([*(parts[:2] if parts[0] == _PACKAGE else parts), name])


def _arguments(value: Any) -> dict[str, Any]:
    """Return the arguments of an object by name. Raises DescriptionError if it does not keep them."""
    if isinstance(value, Configured):
        return dict(value.arguments)
    name = type(value).__name__
    unnamed = f"{name} was made with arguments that have no names; give them by name"
    if isinstance(value, Describable):
        given = value.__dict__.get(_GIVEN, {})
        if given is None:
            raise DescriptionError(unnamed)
        # an argument of None that the constructor replaced by an object
        chosen = {key: getattr(value, key, None) for key, argument in given.items() if argument is None}
        return given | {key: made for key, made in chosen.items() if isinstance(made, Describable)}
    init = cast(Any, type(value)).__init__
    try:
        parameters = {} if init is object.__init__ else dict(list(inspect.signature(init).parameters.items())[1:])
    except ValueError as error:  # some C functions have no signature
        raise DescriptionError(f"a {name} can't be written to a file as plain values") from error
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise DescriptionError(unnamed)
    missing = [key for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD and not hasattr(value, key)]
    if missing:
        raise DescriptionError(
            f"{name} keeps no attribute of the name of its argument {missing[0]!r}; keep it as self.{missing[0]}, or "
            f"give the class and its arguments: ds.configured({name}, {missing[0]}=...)"
        )
    return {key: getattr(value, key) for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
