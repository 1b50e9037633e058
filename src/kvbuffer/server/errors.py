"""Every error leaves the server in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from kvbuffer.engine.async_engine import EngineStoppedError
from kvbuffer.errors import CapacityError, InvalidRequestError, KVBufferError, QueueFullError


class APIError(Exception):
    """An answer other than 200.

    Attributes:
        status: the HTTP status code.
        param: the request field at fault, or None.
        code: OpenAI's machine-readable code, or None.
        headers: HTTP headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """Return the JSON body, in ASCII: a refused string may hold surrogates, which UTF-8 cannot carry."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": fields}).encode("ascii")

    def response(self) -> Response:
        """Return the whole HTTP answer."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def from_kvbuffer_error(error: KVBufferError) -> APIError:
    """Translate an error of this package."""
    if isinstance(error, InvalidRequestError):
        return APIError(400, str(error), error.param)
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return APIError(429, str(error), code="rate_limit_exceeded", headers=headers)
    if isinstance(error, (EngineStoppedError, CapacityError)):
        return APIError(503, str(error), code="service_unavailable")
    return APIError(500, str(error), code="internal_error")


def from_validation_errors(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Translate what pydantic found wrong with a body; unknown fields first: they are usually misspelt."""
    unknown = [_path(error["loc"]) for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(repr(name) for name in unknown)
        plural = "s" if len(unknown) > 1 else ""
        return APIError(400, f"Unknown field{plural}: {names}.", unknown[0], "unknown_parameter")
    error = errors[0]
    if error["type"] == "json_invalid":
        detail = error.get("ctx", {}).get("error", error["msg"])
        return APIError(400, f"The request body is not valid JSON: {detail} at position {error['loc'][-1]}.")
    path = _path(error["loc"])
    if not path:
        if error["type"] == "missing":
            return APIError(400, "The request has no body; send a JSON object.")
        if error["type"] in ("model_attributes_type", "model_type"):
            return APIError(
                400,
                "The request body must be a JSON object sent with the header Content-Type: application/json.",
            )
    param = error.get("ctx", {}).get("param", path) or None
    if error["type"] == "missing":
        return APIError(400, f"The field {path!r} is required.", param, "missing_required_parameter")
    return APIError(400, f"{path}: {error['msg']}." if path else f"{error['msg']}.", param)


def _path(loc: Sequence[str | int]) -> str:
    """Spell a location as OpenAI does: ``messages[0].content``."""
    path = ""
    for part in loc[1:]:  # the first part says "body" (or "query")
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part != "str":  # the others are pydantic's names for the branches of a union
            path += f".{part}" if path else part
    return path


def install_error_handlers(app: FastAPI) -> None:
    """Make ``app`` answer every error in OpenAI's shape."""

    @app.exception_handler(APIError)
    async def on_api_error(_: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(KVBufferError)
    async def on_kvbuffer_error(_: Request, error: KVBufferError) -> Response:
        return from_kvbuffer_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        return from_validation_errors(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        message = error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"There is no {request.url.path} here."
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{request.method} is not allowed for {request.url.path}."
        elif error.status_code == HTTPStatus.BAD_REQUEST and error.__cause__ is not None:
            message = f"The request body is not valid JSON: {error.__cause__}."
        return APIError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> Response:
        return APIError(500, "Internal error; the server's log has the details.", code="internal_error").response()
