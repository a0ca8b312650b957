"""Answers against the SDK's generated resource classes: nullable fields filled in, everything else checked.

A class's annotations are compiled once into small checkers, as every event carries a whole object.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable
from decimal import Decimal
from importlib import import_module
from typing import Any

from stripe._list_object import ListObject
from stripe._object_classes import OBJECT_CLASSES, V2_OBJECT_CLASSES
from stripe._stripe_object import StripeObject, UntypedStripeObject

from sandbox.stripe.schema import options_of

Checker = Callable[[Any], Any]

# Sent by Stripe only when asked for with `expand`, although the SDK types them as plain optional fields.
INCLUDABLE = frozenset(
    [
        *("cash_balance", "confirmation_secret", "deleted", "line_items", "payments"),
        *("refunds", "sources", "subscriptions", "tax_ids", "total_count"),
    ]
)


class ContractError(Exception):
    """The fake itself is about to answer something that the SDK's types forbid: a bug of ours, shown as a 500."""


@functools.cache
def resource_class(name: str) -> type:
    """`invoice` -> stripe.Invoice; raises ContractError for an object that the pinned SDK does not know."""
    classes = V2_OBJECT_CLASSES if name.startswith("v2.") else OBJECT_CLASSES
    if name not in classes:
        raise ContractError(f"the SDK has no object called {name!r}")
    module, cls = classes[name]
    return typing.cast("type", getattr(import_module(module), cls))


@functools.cache
def resource_fields(cls: type) -> dict[str, tuple[Checker, bool]]:
    """Field -> (checker, may be null) of a resource class or of one of its inner classes."""
    out: dict[str, tuple[Checker, bool]] = {}
    annotations: dict[str, Any] = cls.__annotations__
    for key, tp in annotations.items():
        if key.isupper() or key.startswith("_"):
            continue
        out[key] = (_any_of(options_of(tp)), _nullable(tp))
    return out


def _nullable(tp: Any) -> bool:
    return typing.get_origin(tp) in (typing.Union, types.UnionType) and type(None) in typing.get_args(tp)


@functools.cache
def _omitted_as_null(cls: type, *, v2: bool) -> tuple[str, ...]:
    """What v1 sends as null when it is unset; v2 leaves it out."""
    return () if v2 else tuple(k for k, (_, null) in resource_fields(cls).items() if null and k not in INCLUDABLE)


@functools.cache
def _required(cls: type) -> frozenset[str]:
    return frozenset(k for k, (_, null) in resource_fields(cls).items() if not null)


def complete(obj: dict[str, Any], cls: type | None = None) -> dict[str, Any]:
    """A copy with every nullable field present and private ones gone; raises ContractError naming the wrong field."""
    if cls is None:
        try:
            cls = resource_class(obj["object"])
        except KeyError:
            raise ContractError(f": {obj!r} names no object") from None
    fields = resource_fields(cls)
    out: dict[str, Any] = {}
    for key, value in obj.items():
        if key[0] == "_":
            continue
        if key not in fields:
            raise ContractError(f"{cls.__qualname__}.{key}: unknown to the SDK")
        checker, nullable = fields[key]
        if value is None:
            if not nullable:
                raise ContractError(f"{cls.__qualname__}.{key}: null, but never null")
            out[key] = None
            continue
        try:
            out[key] = checker(value)
        except ContractError as exc:
            raise ContractError(f"{cls.__qualname__}.{key}: {exc}") from None
    missing = _required(cls) - out.keys()
    if missing:
        raise ContractError(f"{cls.__qualname__}.{min(missing)}: missing, but never null")
    for key in _omitted_as_null(cls, v2=cls.__module__.startswith("stripe.v2")):
        out.setdefault(key, None)
    return out


def _any_of(options: tuple[Any, ...]) -> Checker:
    checkers = [_checker(tp) for tp in options]
    if len(checkers) == 1:
        return checkers[0]

    def check(value: Any) -> Any:
        failure: ContractError | None = None
        for checker in checkers:
            try:
                return checker(value)
            except ContractError as exc:
                failure = exc
        raise failure or ContractError("no type fits")

    return check


def _checker(tp: Any) -> Checker:
    """One type's checker; a nested object is compiled when it is first met."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if tp is Any:
        return lambda value: value
    if origin is typing.Literal:
        allowed = frozenset(args)
        return _guard(lambda value: isinstance(value, (str, bool)) and value in allowed, f"none of {args}")
    if origin is list:
        item = _any_of(options_of(args[0]))
        return _mapped(list, lambda value: [item(one) for one in value])
    if origin is ListObject:
        return _mapped(dict, lambda value: {**value, "data": [complete(one) for one in value["data"]]})
    if origin in (dict, UntypedStripeObject) or tp is StripeObject:
        return _mapped(dict, lambda value: value)
    if isinstance(tp, (typing.ForwardRef, str)):
        return _mapped(dict, lambda value: complete(value) if "object" in value else value)
    if isinstance(tp, type) and issubclass(tp, StripeObject):
        inner: type = tp
        return _mapped(dict, lambda value: complete(value, inner))
    if tp is Decimal:
        return _guard(lambda value: isinstance(value, str), "no decimal string")
    if tp is float:
        return _guard(lambda value: isinstance(value, (int, float)), "no number")
    if tp is int:
        return _guard(lambda value: type(value) is int, "no integer")
    return _guard(lambda value: isinstance(value, tp), f"no {tp}")


def _guard(fits: Callable[[Any], bool], what: str) -> Checker:
    def check(value: Any) -> Any:
        if not fits(value):
            raise ContractError(f"{value!r} is {what}")
        return value

    return check


def _mapped(container: type, convert: Checker) -> Checker:
    def check(value: Any) -> Any:
        if not isinstance(value, container):
            raise ContractError(f"{value!r} is no {container.__name__}")
        return convert(value)

    return check
