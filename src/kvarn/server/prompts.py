"""Prompts as token ids. What cannot fit is refused before the time is spent to tokenize it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvarn.engine import AsyncLLM
from kvarn.errors import RequestError
from kvarn.server.errors import ApiError
from kvarn.server.protocol import (
    MAX_INPUTS,
    MAX_PROMPTS,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    SamplingRequest,
)  # fmt: skip
from kvarn.server.thoughts import effort_variables
from kvarn.server.tools import ToolUse


class PromptEncoder:
    """Turns texts and conversations into token ids. Any thread may call; takes long for long texts."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._tokenizer = llm.tokenizer
        self._max_tokens = llm.max_model_len
        self._longest_token = llm.tokenizer.vocabulary.tokens.longest()

    def completion(self, request: CompletionRequest) -> Iterator[Sequence[int]]:
        """Token ids of each prompt, one after the other. Raises ApiError, RequestError naming `prompt`."""
        special = request.add_special_tokens is not False
        for ids in self._prompts(request.prompt, special, MAX_PROMPTS, "prompt"):
            yield self._kept(request, ids)

    def inputs(self, request: EmbeddingRequest) -> Iterator[Sequence[int]]:
        """Token ids of each text to embed. Raises ApiError naming `input`, RequestError naming `prompt`."""
        special = request.add_special_tokens is not False
        yield from self._prompts(request.input, special, MAX_INPUTS, "input")

    def _prompts(
        self, given: str | Sequence[Any], special: bool, most: int, name: str
    ) -> Iterator[Sequence[int]]:
        """name: of the parameter that they are given as."""
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts: list[Any] = [given] if single else list(given)
        if not 1 <= len(prompts) <= most:
            message = f"{name} must hold 1 to {most} prompts, not {len(prompts)}"
            raise ApiError(400, message, param=name, code="invalid_value")
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(len(prompt))
                yield self._tokenizer.encode(prompt, add_special_tokens=special)
            else:
                yield prompt

    def chat(self, request: ChatCompletionRequest, tools: ToolUse | None = None) -> Iterator[Sequence[int]]:
        """Token ids of the conversation. tools: those that it tells the model of. Raises TemplateError, RequestError
        naming the part at fault."""
        self._check_length(sum(map(_characters, request.messages)))
        ids = self._tokenizer.encode_chat(
            request.messages,
            tools=None if tools is None else tools.tools,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            template_kwargs={**effort_variables(request, self._tokenizer), **request.template_variables},
        )
        yield self._kept(request, ids)

    def _kept(self, request: SamplingRequest, ids: Sequence[int]) -> Sequence[int]:
        """What the request wants of a prompt."""
        limit = request.prompt_limit(self._max_tokens)
        return ids if limit is None else ids[-limit:]

    def _check_length(self, characters: int) -> None:
        most = self._max_tokens * self._longest_token
        if characters > most:
            raise RequestError(
                f"the prompt has {characters} characters, but the model's limit is {self._max_tokens} tokens "
                f"(max_model_len), and those hold at most {most} characters",
                field="prompt",
            )


def _characters(message: Mapping[str, Any]) -> int:
    """Characters of a message's text. The message is not checked yet and may be anything."""
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return sum(len(text) for text in texts if isinstance(text, str))
