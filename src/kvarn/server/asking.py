"""From what a client asks for to the requests that the engine gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from kvarn.errors import RequestError
from kvarn.server.beams import BeamGeneration
from kvarn.server.caller import Caller
from kvarn.server.errors import ApiError
from kvarn.server.generation import Generation, new_id
from kvarn.server.protocol import ChatCompletionRequest, CompletionRequest
from kvarn.server.spelling import AS_OPENAI, Spelling, respelt
from kvarn.server.state import Served
from kvarn.server.thoughts import Thoughts
from kvarn.server.tools import ToolUse, Voice
from kvarn.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that will be answered, in whichever form. tools: that may be called; None: the answer is text."""

    generation: Generation
    tokenizer: Tokenizer
    model: str
    tools: ToolUse | None
    thoughts: Thoughts | None = None
    """What the model thinks before it answers, which is told apart; None: all is its answer."""

    def voices(self) -> list[Voice]:
        """One for each answer."""
        thoughts = self.thoughts
        return [
            Voice(self.tools, None if thoughts is None else thoughts.reader())
            for _ in range(self.generation.num_choices)
        ]


def asked_chat(
    body: ChatCompletionRequest,
    served: Served,
    caller: Caller,
    prefix: str,
    spelling: Spelling = AS_OPENAI,
    *,
    thinking: bool = False,
) -> Chat:
    """The answer a chat asks for. prefix: of its id. thinking: thoughts are told apart from it.

    Raises ApiError, parameters named as the client spells them.
    """
    tokenizer = served.llm.tokenizer
    try:
        tools = ToolUse.of(body.tools, body.tool_choice, body.parallel_tool_calls, tokenizer)
        try:
            (ids,) = served.prompts.chat(body, tools)
        except RequestError as error:
            raise body.refusal(error) from None
        thoughts = Thoughts.of(body, tokenizer, ids) if thinking else None
        generation = asked(body, iter((ids,)), served, caller, prefix, tools, thoughts, spelling)
    except ApiError as error:
        raise respelt(error, spelling) from None
    return Chat(generation, tokenizer, served.name, tools, thoughts)


def asked(
    body: ChatCompletionRequest | CompletionRequest,
    prompts: Iterator[Sequence[int]],
    served: Served,
    caller: Caller,
    prefix: str,
    tools: ToolUse | None = None,
    thoughts: Thoughts | None = None,
    spelling: Spelling = AS_OPENAI,
) -> Generation:
    """What the body asks for of these prompts. Raises ApiError, parameters named as the client spelt them."""

    def refusal(error: RequestError) -> ApiError:
        return respelt(body.refusal(error), spelling)

    try:
        sampling = body.to_sampling()
        if tools is not None:
            sampling = tools.bind(sampling)
        if thoughts is not None:
            sampling = thoughts.bind(sampling, tools, served.llm.config.grammar)
        beams = body.beams()
        make = Generation if beams is None else partial(BeamGeneration, beams)
        return make(
            served.llm, prompts, sampling, body.given_id(prefix) or new_id(prefix), caller, priority=body.priority,
            cache_salt=body.salt, refusal=refusal,
        )  # fmt: skip
    except RequestError as error:
        raise refusal(error) from None
