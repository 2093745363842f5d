"""The fields of the playground's requests, checked."""

from __future__ import annotations

import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request

from basic.common.errors import InvalidInputError


class RequestBody:
    """The JSON object of a request; each method returns a field, or raises InvalidInputError that names it."""

    def __init__(self, fields: dict[str, Any], max_text_characters: int) -> None:
        self._fields, self._max_text_characters = fields, max_text_characters

    @classmethod
    async def read(cls, request: Request, max_text_characters: int) -> RequestBody:
        """Read the body of a request, whose size the server has checked."""
        # Pages of other origins cannot send this content type without a preflight request, which we reject.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the request must be JSON (Content-Type: application/json)")
        body = await request.body()
        try:
            fields = await run_in_threadpool(json.loads, body)
        except (ValueError, RecursionError):
            raise InvalidInputError("the request is not JSON") from None
        if not isinstance(fields, dict):
            raise InvalidInputError("the request must be a JSON object")
        return cls(fields, max_text_characters)

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def text(self, name: str) -> str:
        value, limit = self._fields.get(name), self._max_text_characters
        if not isinstance(value, str):
            raise InvalidInputError(f"{name} must be a string, got {value!r:.80}")
        if len(value) > limit:
            raise InvalidInputError(f"{name} has {len(value):,} characters; at most {limit:,} are allowed")
        return value

    def messages(self, name: str, most: int) -> list[dict[str, str]]:
        value = self._fields.get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise InvalidInputError(f"{name} must be a list of 1 to {most:,} messages, got {value!r:.80}")
        for message in value:
            if not isinstance(message, dict) or message.keys() != {"role", "content"}:
                raise InvalidInputError(f"{name} must have messages with a role and a content, got {message!r:.80}")
        return [{key: RequestBody(each, self._max_text_characters).text(key) for key in each} for each in value]

    def flag(self, name: str) -> bool:
        value = self._fields.get(name, False)
        if not isinstance(value, bool):
            raise InvalidInputError(f"{name} must be true or false, got {value!r:.80}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidInputError(f"{name} must be an integer from {low:,} to {high:,}, got {value!r:.80}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        value = self._fields.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidInputError(f"{name} must be a number from {low:,} to {high:,}, got {value!r:.80}")
        return value
