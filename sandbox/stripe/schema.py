"""Requests and responses against the SDK's generated types.

`stripe.params.*` are TypedDicts and the resource classes carry annotations, both generated from Stripe's OpenAPI
document for exactly the version that we pin. Open enums are typed `Literal[...] | str`: the `str` is dropped here,
so that a value Stripe does not list is refused. `RequestOptions` fields (api_key, ...) never travel and are stripped.
"""

from __future__ import annotations

import collections.abc
import functools
import re
import sys
import types
import typing
from decimal import Decimal, InvalidOperation
from importlib import import_module
from typing import Any

import typing_extensions
from stripe._list_object import ListObject
from stripe._object_classes import OBJECT_CLASSES, V2_OBJECT_CLASSES
from stripe._request_options import RequestOptions
from stripe._stripe_context import StripeContext
from stripe._stripe_object import StripeObject, UntypedStripeObject

from sandbox.stripe.errors import ApiError, bad_param
from sandbox.stripe.forms import as_list

_EXTRA_NAMES = {
    "StripeContext": StripeContext,
    "Mapping": collections.abc.Mapping,
    "UntypedStripeObject": UntypedStripeObject,
}
_INTEGER = re.compile(r"^-?\d+$")
_WRAPPERS = (typing_extensions.NotRequired, typing_extensions.Required)
_UNIONS = (typing.Union, types.UnionType)
_MAX_METADATA = 50
# Sent by Stripe only when asked for with `expand`, although the SDK types them as plain optional fields.
INCLUDABLE = {
    "deleted",
    "line_items",
    "payments",
    "confirmation_secret",
    "refunds",
    "sources",
    "subscriptions",
    "tax_ids",
    "cash_balance",
    "total_count",
}


class ContractError(Exception):
    """The fake itself is about to answer something that the SDK's types forbid: a bug of ours, shown as a 500."""


@functools.cache
def params_class(name: str) -> type:
    """`InvoicePayParams` or `checkout.SessionCreateParams` -> the TypedDict."""
    *packages, leaf = name.split(".")
    return typing.cast("type", getattr(import_module(".".join(["stripe.params", *packages])), leaf))


@functools.cache
def _fields(cls: type) -> tuple[dict[str, Any], frozenset[str]]:
    """(field -> type, required fields) of a params TypedDict, without RequestOptions."""
    namespace = {**vars(sys.modules[cls.__module__]), **_EXTRA_NAMES}
    hints = typing_extensions.get_type_hints(cls, globalns=namespace, include_extras=True)
    options = set(RequestOptions.__annotations__) if _is_request(cls) else set()
    fields = {k: v for k, v in hints.items() if k not in options}
    required = frozenset(k for k, v in fields.items() if typing.get_origin(v) is not typing_extensions.NotRequired)
    return fields, required


def _is_request(cls: type) -> bool:
    return "api_key" in getattr(cls, "__annotations__", {})


@functools.cache
def _options(tp: Any) -> tuple[Any, ...]:
    """The alternatives of a type, with NotRequired, Optional and an open enum's `str` taken away."""
    while typing.get_origin(tp) in _WRAPPERS:
        tp = typing.get_args(tp)[0]
    if typing.get_origin(tp) not in _UNIONS:
        return (tp,)
    flat: list[Any] = []
    for arg in typing.get_args(tp):
        flat.extend(_options(arg))
    has_enum = any(typing.get_origin(a) is typing.Literal and typing.get_args(a) != ("",) for a in flat)
    return tuple(a for a in flat if a is not type(None) and not (a is str and has_enum))


def check_request(name: str | None, value: dict[str, Any]) -> dict[str, Any]:
    """The request with its strings turned into ints, bools and lists; 400 in Stripe's words where it does not fit."""
    if name is None:
        if value:
            key = next(iter(value))
            raise bad_param(f"Received unknown parameter: {key}", param=key, code="parameter_unknown")
        return {}
    return typing.cast("dict[str, Any]", _typed_dict(params_class(name), value, ""))


def _typed_dict(cls: type, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_param("Invalid object", param=path)
    fields, required = _fields(cls)
    out = {}
    for key, item in value.items():
        here = f"{path}[{key}]" if path else key
        if key not in fields:
            raise bad_param(f"Received unknown parameter: {here}", param=here, code="parameter_unknown")
        out[key] = _coerce(fields[key], item, here)
    for key in required:
        if key not in value:
            here = f"{path}[{key}]" if path else key
            raise bad_param(f"Missing required param: {here}.", param=here, code="parameter_missing")
    return out


def _coerce(tp: Any, value: Any, path: str) -> Any:
    failure: ApiError | None = None
    options = _options(tp)
    for option in options:
        try:
            return _coerce_one(option, value, path)
        except ApiError as exc:
            # The deepest complaint is the useful one: a hash with one bad field is not "must be an empty string".
            if failure is None or len(exc.error.get("param", "")) >= len(failure.error.get("param", "")):
                failure = exc
    raise failure or bad_param("Invalid value", param=path)


def _coerce_one(tp: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if tp is Any:
        return value
    if typing_extensions.is_typeddict(tp):
        return _typed_dict(tp, value, path)
    if origin is typing.Literal:
        return _literal(args, value, path)
    if origin is list:
        items = as_list(value)
        if items is None:
            raise bad_param("Invalid array", param=path)
        return [_coerce(args[0], item, f"{path}[{i}]") for i, item in enumerate(items)]
    if origin is dict or origin is UntypedStripeObject or origin is collections.abc.Mapping:
        return _string_map(args[-1], value, path)
    return _scalar(tp, value, path)


def _literal(allowed: tuple[Any, ...], value: Any, path: str) -> Any:
    if value in allowed:
        return value
    if isinstance(value, str) and value in ("true", "false") and (value == "true") in allowed:
        return value == "true"
    if allowed == ("",):
        raise bad_param("Invalid value", param=path)
    words = [str(a) for a in allowed]
    listing = f"{', '.join(words[:-1])}, or {words[-1]}" if len(words) > 1 else words[0]
    raise bad_param(f"Invalid {path}: must be one of {listing}", param=path)


def _string_map(item_type: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_param("Invalid object", param=path)
    if len(value) > _MAX_METADATA:
        raise bad_param(f"You can only have {_MAX_METADATA} keys in {path}", param=path)
    for key, item in value.items():
        if len(key) > 40 or (isinstance(item, str) and len(item) > 500):
            raise bad_param(f"{path}[{key}] is too long: keys hold 40 and values 500 characters", param=path)
    return {k: _coerce(item_type, v, f"{path}[{k}]") for k, v in value.items()}


def _scalar(tp: Any, value: Any, path: str) -> Any:
    if tp is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise bad_param(f"Invalid boolean: {value}", param=path)
    if tp is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and _INTEGER.match(value):
            return int(value)
        raise bad_param(f"Invalid integer: {value}", param=path, code="parameter_invalid_integer")
    if tp in (float, Decimal):
        try:
            return str(Decimal(str(value))) if tp is Decimal else float(value)
        except (InvalidOperation, TypeError, ValueError):
            raise bad_param(f"Invalid decimal: {value}", param=path, code="parameter_invalid_decimal") from None
    if tp is str and isinstance(value, str):
        return value
    raise bad_param(f"Invalid string: {value}", param=path, code="parameter_invalid_string")


def resource_class(name: str) -> type[StripeObject]:
    """`invoice` -> stripe.Invoice; raises ContractError for an object that the pinned SDK does not know."""
    classes = V2_OBJECT_CLASSES if name.startswith("v2.") else OBJECT_CLASSES
    if name not in classes:
        raise ContractError(f"the SDK has no object called {name!r}")
    module, cls = classes[name]
    return typing.cast("type[StripeObject]", getattr(import_module(module), cls))


@functools.cache
def resource_fields(cls: type) -> dict[str, tuple[tuple[Any, ...], bool]]:
    """Field -> (alternatives, may be null) of a resource class or of one of its inner classes."""
    out = {}
    for key, tp in typing.cast("dict[str, Any]", cls.__annotations__).items():
        if key.isupper() or key.startswith("_"):
            continue
        nullable = typing.get_origin(tp) in _UNIONS and type(None) in typing.get_args(tp)
        out[key] = (_options(tp), nullable)
    return out


def complete(obj: dict[str, Any], cls: type | None = None, path: str = "") -> dict[str, Any]:
    """A copy with every nullable field present, checked against the SDK's class; raises ContractError otherwise."""
    cls = cls or resource_class(obj["object"])
    path = path or obj.get("object", "")
    fields = resource_fields(cls)
    out: dict[str, Any] = {}
    for key, value in obj.items():
        if key.startswith("_"):
            continue
        if key not in fields:
            raise ContractError(f"{path}.{key}: unknown to {cls.__qualname__}")
        types_, nullable = fields[key]
        out[key] = _response(types_, value, nullable, f"{path}.{key}")
    v2 = str(obj.get("object", path)).startswith("v2.")
    for key, (_, nullable) in fields.items():
        if key in out:
            continue
        if not nullable:
            raise ContractError(f"{path}.{key}: missing, but never null in {cls.__qualname__}")
        if key not in INCLUDABLE and not v2:
            out[key] = None
    return out


def _response(types_: tuple[Any, ...], value: Any, nullable: bool, path: str) -> Any:
    if value is None:
        if not nullable:
            raise ContractError(f"{path}: null, but never null")
        return None
    failure: ContractError | None = None
    for tp in types_:
        try:
            return _response_one(tp, value, path)
        except ContractError as exc:
            failure = exc
    raise failure or ContractError(f"{path}: no type fits")


def _response_one(tp: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if tp is Any:
        return value
    if origin is typing.Literal:
        if value in args:
            return value
        raise ContractError(f"{path}: {value!r} is none of {args}")
    if origin is list and isinstance(value, list):
        return [_response(_options(args[0]), item, False, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is ListObject and isinstance(value, dict):
        return {**value, "data": [complete(item) for item in value["data"]]}
    if origin in (dict, UntypedStripeObject) and isinstance(value, dict):
        return value
    if isinstance(tp, (typing.ForwardRef, str)) and isinstance(value, dict):
        return complete(value) if "object" in value else value
    if isinstance(tp, type) and issubclass(tp, StripeObject) and isinstance(value, dict):
        return value if tp is StripeObject else complete(value, tp, path)
    if tp is Decimal and isinstance(value, str):
        return value
    if tp is float and isinstance(value, (int, float)):
        return value
    if isinstance(tp, type) and isinstance(value, tp) and (tp is not int or not isinstance(value, bool)):
        return value
    raise ContractError(f"{path}: {value!r} is not {tp}")
