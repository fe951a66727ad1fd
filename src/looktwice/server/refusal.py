"""Why a request is refused, as OpenAI's API words it: {"error": {message, type, param, code}} and a status."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from looktwice.errors import CheckpointError, LooktwiceError, ServerError, one_line

KINDS = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class Refusal(Exception):
    """A request that is not answered. `param` is the field that is at fault, `code` a short stable word."""

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, HTTPStatus(status), param, code
        self.headers = {**(headers or {})}

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response; letters that are none of UTF-8 are replaced."""
        default = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        told = {
            "message": _whole(one_line(self.message)),
            "type": KINDS.get(self.status, default),
            "param": self.param and _whole(one_line(self.param, 200)),
            "code": self.code,
        }
        return {"error": told}


def refusal_of(error: LooktwiceError, param: str | None = None) -> Refusal:
    """How a request is refused that caused one of our own errors."""
    status = HTTPStatus.BAD_GATEWAY if isinstance(error, ServerError) else HTTPStatus.BAD_REQUEST
    code = "unusable_model" if isinstance(error, CheckpointError) else None
    return Refusal(str(error), status=status, param=param, code=code)


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
