"""Errors in Stripe's own shape: status, type, code, param and message as the API reference gives them."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer other than 2xx.

    `commit` keeps what the handler wrote (a declined charge is a fact, and is found by later reads);
    `remember` stores the answer under the idempotency key (Stripe does so once a request began to execute).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        commit: bool = False,
        remember: bool = True,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.commit = commit
        self.remember = remember
        self.error: dict[str, Any] = {"type": type_, "message": message}
        if code:
            self.error["code"] = code
            self.error["doc_url"] = f"https://docs.stripe.com/error-codes/{code.replace('_', '-')}"
        if param:
            self.error["param"] = param
        self.error.update(extra)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400 raised while executing: the object's state, or the amount, forbids what was asked."""
    return ApiError(400, message, param=param, code=code)


def bad_param(message: str, *, param: str, code: str | None = None) -> ApiError:
    """400 raised before executing: the request does not match Stripe's schema, and no key remembers it."""
    return ApiError(400, message, param=param, code=code, remember=False)


def missing(noun: str, id_: str, *, param: str = "id") -> ApiError:
    """404 for a path id; 400 would be raised by Stripe for some body ids, which carry the same code."""
    return ApiError(404, f"No such {noun}: '{id_}'", code="resource_missing", param=param)


def card_error(message: str, code: str, decline_code: str | None = None, **extra: Any) -> ApiError:
    """402: the issuer said no. What happened (failed charge, intent without a method) is kept."""
    if decline_code:
        extra["decline_code"] = decline_code
    return ApiError(402, message, type_="card_error", code=code, commit=True, **extra)
