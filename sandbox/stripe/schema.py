"""Requests against the SDK's generated types (answers: `sandbox.stripe.answers`).

`stripe.params.*` are TypedDicts generated from Stripe's OpenAPI document for exactly the version that we pin. Open enums
are typed `Literal[...] | str`: the `str` is dropped here, so that a value Stripe does not list is refused.
`RequestOptions` fields (api_key, ...) never travel and are stripped.
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
from stripe._request_options import RequestOptions
from stripe._stripe_context import StripeContext
from stripe._stripe_object import UntypedStripeObject

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
def options_of(tp: Any) -> tuple[Any, ...]:
    """The alternatives of a type, with NotRequired, Optional and an open enum's `str` taken away."""
    while typing.get_origin(tp) in _WRAPPERS:
        tp = typing.get_args(tp)[0]
    if typing.get_origin(tp) not in _UNIONS:
        return (tp,)
    flat: list[Any] = []
    for arg in typing.get_args(tp):
        flat.extend(options_of(arg))
    has_enum = any(typing.get_origin(a) is typing.Literal and typing.get_args(a) != ("",) for a in flat)
    return tuple(a for a in flat if a is not type(None) and not (a is str and has_enum))


def check_request(name: str | None, value: dict[str, Any]) -> dict[str, Any]:
    """The request with its strings turned into ints, bools and lists; 400 in Stripe's words where it does not fit."""
    if name is None:
        if value:
            key = next(iter(value))
            raise bad_param(f"Received unknown parameter: {key}", param=key, code="parameter_unknown")
        return {}
    return _typed_dict(params_class(name), value, "")


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
    options = options_of(tp)
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
