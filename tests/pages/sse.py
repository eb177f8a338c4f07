"""Answers that a test makes up, in place of the server's."""

import json


def said(*pieces, usage=None, finish="stop"):
    """The body of a stream that says these pieces."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def answers(page, *pieces, **more):
    """Has the page get this answer to everything it asks."""
    body = said(*pieces, **more)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )


def refuses(page, status, message, *, path="**/v1/chat/completions", code=None, headers=None, times=None):
    """Has the server refuse what the page asks."""
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}})
    page.route(
        path,
        lambda route: route.fulfill(status=status, content_type="application/json", body=body, headers=headers or {}),
        times=times,
    )
