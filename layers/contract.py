"""What a layer of a user's own must have, said once for the laws and the trainer.

`imported` finds its class, `check_class` asks what that declares, `check_fields` what
it is built with, `check_call` what a call returns, `check_init_state` whether there is
a state where none is refused; each raises a `ValueError` of one line. `settable` lists
the fields that a command line can set.
"""

import dataclasses
import importlib
import inspect
import itertools
import numbers
import os
import sys
import sysconfig
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.facts import has_state

FIELDS = {
    "features": "features: int",
    "dtype": "dtype: jnp.dtype = jnp.float32",
}
# What a model gives its layers, so that no one else does.
FROM_MODEL = frozenset({"features", "length", "context", "size", "dtype"})
CALL = "__call__(self, x, state=None, sequence=None, train=False)"
STATE = "init_state(self, batch_size)"
KINDS = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    tuple: ((tuple, list), "a sequence"),
}


def imported(name: str) -> type[nn.Module]:
    """The class at the dotted path `name`, "package.module.Class".

    Raises:
        ValueError: there is no such module, in the places that the message lists; or
            no such class in it; or one that is no layer, see `check_class`. What the
            module itself raises while it is imported passes.
    """
    module, _, attribute = name.rpartition(".")
    cls = getattr(_module(name, module), attribute, None)
    if cls is None:
        file = getattr(sys.modules[module], "__file__", None) or "no file"
        classes = [
            key
            for key, value in vars(sys.modules[module]).items()
            if isinstance(value, type)
            and issubclass(value, nn.Module)
            and value.__module__ == module
        ]
        raise ValueError(
            f"layer: must be a Flax module of {module} ({file}), which has "
            f"{', '.join(classes) or 'none'}, got {name!r}"
        )
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        kind = "a class" if isinstance(cls, type) else f"a {type(cls).__name__}"
        raise ValueError(
            f"layer: {name} must be a class of flax.linen.Module, got {kind} that is "
            "none"
        )
    check_class(cls, name)
    return cls


def _module(name, module):
    # A package first, to say which part is missing.
    for part in itertools.accumulate(module.split("."), "{}.{}".format):
        try:
            importlib.import_module(part)
        except ModuleNotFoundError as error:
            # What the user's own module fails to import is the user's to see.
            if error.name != part:
                raise
            raise ValueError(_not_found(name, part)) from error
    return sys.modules[module]


def _not_found(name, part):
    parent = part.rpartition(".")[0]
    if parent:
        package = sys.modules[parent]
        if not hasattr(package, "__path__"):
            return (
                f"layer: {parent} ({getattr(package, '__file__', 'built in')}) is a "
                f"module and no package, so {name!r} cannot be in it"
            )
        looked = [os.path.abspath(place) for place in package.__path__]
        return (
            f"layer: there is no module {part!r} for {name!r}; {parent} is the package "
            f"in {', '.join(looked)}"
        )
    here, looked = os.getcwd(), _places()
    hint = (
        "; start from the folder that has it, or name that in PYTHONPATH"
        if here in looked
        else f"; the current folder, {here}, is not among them, PYTHONPATH=. adds it"
    )
    return (
        f"layer: there is no module {part!r} for {name!r}; Python looked in "
        f"{', '.join(looked) or 'no folder'} and what is installed{hint}"
    )


def _places():
    """The folders of Python's path that hold neither its own nor installed modules."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    theirs = {Path(sysconfig.get_path(kind)).resolve() for kind in kinds}
    folders = []
    for place in (Path(entry or os.getcwd()).resolve() for entry in sys.path):
        known = not theirs.isdisjoint({place, *place.parents})
        if place.is_dir() and not known and str(place) not in folders:
            folders.append(str(place))
    return folders


def check_class(cls: type[nn.Module], name: str = "") -> None:
    """Raises a `ValueError` that says what the class of a layer lacks of the fields
    `features` and `dtype`, the call of the contract, and `init_state`."""
    name, fields = name or cls.__name__, _fields(cls)
    lacks = []
    for field, line in FIELDS.items():
        if field not in fields:
            bare = ", which has no annotation and so is no field"
            lacks.append(f"the field `{line}`{bare if hasattr(cls, field) else ''}")
    call, state = _method(cls, "__call__"), _method(cls, "init_state")
    if call is None:
        lacks.append(f"the method `{CALL}`")
    if state is None:
        lacks.append(f"the method `{STATE}`")
    if lacks:
        raise ValueError(
            f"layer: {name} must have features, dtype, __call__ and init_state; it "
            f"lacks {' and '.join(lacks)}"
        )
    options = dict(state=None, sequence=None, train=False)
    fits = _takes(call, None, None) and _takes(call, None, None, *options.values())
    if not (fits and _takes(call, None, None, **options)):
        raise ValueError(
            f"layer: {name} must take `{CALL}`, got `__call__{inspect.signature(call)}`"
        )
    if not _takes(state, None, 1):
        raise ValueError(
            f"layer: {name} must have `{STATE}`, got "
            f"`init_state{inspect.signature(state)}`"
        )


def check_fields(
    argument: str,
    name: str,
    cls: type[nn.Module],
    values: Mapping[str, Any],
    own: Collection[str] = (),
) -> None:
    """Raises a `ValueError` naming `argument` unless `values` are fields of the layer
    `name`, each with a value like its default, and all that have none are there.
    Those of `own` are not the user's to give."""
    fields = _fields(cls)
    valid = sorted({*fields} - {*own})
    unknown = sorted({*values} - {*fields})
    if unknown:
        raise ValueError(f"{argument}: must be among {valid} for {name}, got {unknown}")
    without = [
        key
        for key, field in fields.items()
        if key not in values and not has_default(field)
    ]
    if without:
        raise ValueError(
            f"{argument}: must have {without}, of which {name} has no default, got "
            f"{sorted(values)}"
        )
    plain = settable(cls)
    for key in (key for key in plain if key in values):
        (kind, default), value = plain[key], values[key]
        if not (_alike(value, kind) or value is default):
            raise ValueError(
                f"{argument}.{key}: must be {KINDS[kind][1]} for {name}, got {value!r}"
            )


def check_call(layer: nn.Module, name: str = "") -> None:
    """Raises a `ValueError` unless a call returns y of the shape of x, and a state.

    An array in their place, of two rows, would be taken for both.
    """
    name = name or type(layer).__name__
    x = jax.ShapeDtypeStruct(
        (2, 1, *getattr(layer, "size", ()), layer.features), jnp.float32
    )

    def call(x):
        streams = dict.fromkeys(("params", "dropout"), jax.random.key(0))
        return layer.init_with_output(streams, x)[0]

    answer = jax.eval_shape(call, x)
    pair = isinstance(answer, tuple) and len(answer) == 2
    if not pair or getattr(answer[0], "shape", None) != x.shape:
        what = jax.tree.map(lambda leaf: leaf.shape, answer)
        raise ValueError(
            f"layer: a call of {name} must return y, of the shape of x, {x.shape}, and "
            f"a state, got {what}"
        )


def check_init_state(layer: nn.Module, name: str = "") -> None:
    """Raises a `ValueError` unless `init_state` makes a state, or the class declares
    that there is none."""
    if not has_state(layer):
        return
    name = name or type(layer).__name__
    try:
        jax.eval_shape(lambda: layer.init_state(1))
    except Exception as problem:  # of whatever kind: it is the user's code
        raise ValueError(
            f"layer: init_state of {name} must make a state, or its class declare that "
            f'there is none, REFUSES = ("state",), got {type(problem).__name__}: '
            f"{problem}"
        ) from problem


def settable(cls: type[nn.Module]) -> dict[str, tuple[type, Any]]:
    """The fields that a command line can set: name -> (type, default), of those whose
    type is plain; None where there is no default."""
    plain = {}
    for key, field in _fields(cls).items():
        default = field.default if has_default(field) else None
        kind = type(default) if default is not None else _hinted(cls, key)
        if key not in FROM_MODEL and kind in KINDS:
            plain[key] = kind, default
    return plain


def _hinted(cls, key):
    """The type of a field by its annotation, which may also allow None."""
    try:
        hint = typing.get_type_hints(cls)[key]
    except (KeyError, NameError, TypeError):
        return None
    kinds = [
        kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)
    ]
    return kinds[0] if len(kinds) == 1 else None


def has_default(field: dataclasses.Field) -> bool:
    """Whether the value of a field may be left out."""
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _fields(cls):
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    return {key: f for key, f in fields.items() if key not in ("parent", "name")}


def _method(cls, name):
    """As it is called on an instance, `self` first; the class of a class has a
    `__call__` of its own."""
    definitions = (vars(base)[name] for base in cls.__mro__ if name in vars(base))
    return next((f for f in definitions if callable(f)), None)


def _takes(function, *args, **kwargs):
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _alike(value, kind):
    truth = isinstance(value, bool) and kind is not bool
    return isinstance(value, KINDS[kind][0]) and not truth
