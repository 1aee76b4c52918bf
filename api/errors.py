"""Errors of the API as RFC 9457 problem documents, with the id of the request and a JSON pointer per wrong field."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.ids import new_id

log = logging.getLogger("sedsft.api")


class FieldProblem(BaseModel):
    """One wrong field of the body or of the query."""

    pointer: str = Field(description="JSON pointer (RFC 6901) into the body; `?name` for a query parameter.")
    message: str = Field(description="What was expected, what came, what to do.")


class Problem(BaseModel):
    """An error, RFC 9457."""

    type: str = "about:blank"
    title: str = Field(description="Name of the HTTP status.")
    status: int
    code: str = Field(description="Stable name of the cause.")
    detail: str = Field(description="What was expected, what came, what to do.")
    instance: str = Field(description="Path of the request.")
    request_id: str
    errors: list[FieldProblem] = []


class ApiError(Exception):
    """Ends a request with a problem document."""

    def __init__(
        self, status: int, code: str, detail: str, errors: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


def not_found(kind: str, name: str) -> ApiError:
    """404 for an id that is not there, or not the caller's."""
    return ApiError(404, "not_found", f"expected the id of a {kind}, got {name!r}, which is not there; list them to see ids")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the problems that a route can answer with."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI, max_body_bytes: int) -> None:
    """Answer every error of `app` with a problem document, and limit bodies."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return _respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [
            FieldProblem(pointer=_pointer(e["loc"], error.body), message=_message(e)) for e in _causes(error.errors())[:50]
        ]
        listed = "; ".join(f"{p.pointer or '/'}: {p.message}" for p in problems[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        return _respond(request, ApiError(422, "invalid_request", listed + more, problems))

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return _respond(request, ApiError(error.status_code, code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        detail = f"unexpected {type(error).__name__}; the service's log has it under this request_id"
        log.error("request %s failed", request.scope.get("request_id"), exc_info=error)
        return _respond(request, ApiError(500, "internal", detail))

    app.add_middleware(RequestLimits, max_body_bytes=max_body_bytes)


def _respond(request: Request, error: ApiError) -> JSONResponse:
    return problem_response(error, request.url.path, request.scope.get("request_id", ""))


def problem_response(error: ApiError, path: str, request_id: str) -> JSONResponse:
    """The problem document of an error."""
    problem = Problem(
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        code=error.code,
        detail=error.detail,
        instance=path,
        request_id=request_id,
        errors=error.errors,
    )
    headers = {"X-Request-Id": request_id, **error.headers}
    return JSONResponse(problem.model_dump(), error.status, headers=headers, media_type="application/problem+json")


def _causes(found: Sequence[Any]) -> list[Any]:
    """Without the consequences: pydantic also calls a list too short whose items were refused."""
    locations = [e["loc"] for e in found]
    return [
        e
        for e in found
        if e["type"] != "too_short" or not any(loc[: len(e["loc"])] == e["loc"] and loc != e["loc"] for loc in locations)
    ]


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] in ("missing", "json_invalid", "union_tag_not_found"):
        return str(error["msg"])
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    got = repr(error.get("input"))
    return f"{error['msg']}, got {got if len(got) <= 120 else got[:117] + '...'}"


def _pointer(location: Sequence[int | str], body: Any) -> str:
    """JSON pointer of a pydantic location, without the union tags that pydantic puts between the fields."""
    if location[0] != "body":
        return f"?{location[-1]}" if location[0] == "query" else str(location[-1])
    parts: list[str] = []
    node, tag_used = body, False
    for item in location[1:]:
        if isinstance(node, dict) and not tag_used and node.get("type") == item:
            tag_used = True
            continue
        parts.append(str(item).replace("~", "~0").replace("/", "~1"))
        tag_used = False
        if isinstance(node, dict):
            node = node.get(item)
        else:
            node = node[item] if isinstance(node, list) and isinstance(item, int) and item < len(node) else None
    return "".join(f"/{part}" for part in parts)


class RequestLimits:
    """Gives each request its id and refuses a body over the limit, announced or streamed."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = scope["request_id"] = new_id("req")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = [name for name, _ in message["headers"]]
                if b"x-request-id" not in names:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        body, too_large = await self._read(scope, receive)
        if too_large:
            detail = f"expected a body of at most {self.max_body_bytes} bytes, got more; put data in files and name their paths"
            response = problem_response(ApiError(413, "body_too_large", detail), scope["path"], request_id)
            return await response(scope, receive, send)
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send_with_id)

    async def _read(self, scope: Scope, receive: Receive) -> tuple[bytes, bool]:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return b"", True
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(body), False
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                return b"", True
            if not message.get("more_body"):
                return bytes(body), False
