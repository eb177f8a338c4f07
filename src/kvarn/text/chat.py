"""`ChatEncoder`: chat messages to the text that the model reads, and which parts of it are plain text.

A template joins its own special tokens and the user's words into one text. To keep words that spell a special token
from becoming one, such spellings are replaced by placeholders while the template runs, and put back as literal spans.
The same goes for the beginning of such a spelling at the end of a text, and for an end at the beginning, since a
template may put two texts next to each other. All other texts reach the template unchanged: it can trim, split and
compare them, and an ordinary conversation tokenizes as the rendered whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

from kvarn.errors import TemplateError
from kvarn.text.messages import Message, checked_messages, checked_tools, plain, with_parts, with_text
from kvarn.text.special import Span, TokenFinder
from kvarn.text.template import ChatTemplate

_PROBE = "kvarn looks for this"

Change = Callable[[str, bool], str]
"""Text, and whether it is a key of an object, to other text."""


class ChatEncoder:
    """Renders conversations with one model's template. special: ids of the special tokens by spelling."""

    def __init__(self, template: ChatTemplate, special: Mapping[str, int]) -> None:
        self._template = template
        self._spellings = _Spellings(special)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
        literal_content: bool,
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of it in which special tokens are plain text (none unless `literal_content`).

        Raises RequestError, TemplateError; see `Tokenizer.encode_chat`.
        """
        adapt = with_parts if self._wants_parts else with_text
        conversation = [adapt(message) for message in checked_messages(messages)]
        offered = checked_tools(tools)
        chosen = plain(variables, "chat_template_kwargs")
        placeholders = _Placeholders([conversation, offered, chosen], self._template.sources)
        if literal_content:
            hide = placeholders.hider(self._spellings)
            conversation = [{**_mapped(message, hide), "role": message["role"]} for message in conversation]
            offered, chosen = _mapped(offered, hide), _mapped(chosen, hide)
        if continue_final_message:
            conversation[-1] = _marked(conversation[-1], placeholders.mark)
        text = self._template.render(
            conversation, tools=offered, add_generation_prompt=add_generation_prompt, variables=chosen
        )
        return placeholders.restore(_cut(text, placeholders.mark) if continue_final_message else text)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows content only where it is a list of parts (some multimodal models' do)."""
        message: Message = {"role": "user", "content": _PROBE}
        return not self._shows(message) and self._shows(with_parts(message))

    def _shows(self, message: Message) -> bool:
        try:
            return _PROBE in self._template.render([message])
        except TemplateError:
            return False


def _marked(message: Message, mark: str) -> Message:
    """The message with a mark, and a space that a trimming template takes away, at the end of its content."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{content}{mark} "}
    last = {"type": "text", "text": f"{content[-1]['text'] if content else ''}{mark} "}
    return {**message, "content": [*content[:-1], last]}


def _cut(text: str, mark: str) -> str:
    """The text up to the mark; without trailing whitespace where the template trims content."""
    before, found, after = text.rpartition(mark)
    if not found:
        raise TemplateError("the chat template does not show the last message's content, so it cannot be continued")
    return before if after.startswith(" ") else before.rstrip()


def _mapped(value: Any, change: Change) -> Any:
    """The value with `change(text, is_key)` applied to all texts in it."""
    if isinstance(value, str):
        return change(value, False)
    if isinstance(value, dict):
        return {change(key, True): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return value


class _Spellings:
    """The special tokens' spellings, whole and in part."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._finder = TokenFinder(special, {})

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(part for text in self._special for n in range(1, len(text)) if _telling(part := text[:n]))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(part for text in self._special for n in range(1, len(text)) if _telling(part := text[n:]))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._special), default=0)

    def spans(self, text: str, *, whole_only: bool) -> list[Span]:
        """Where the text spells a special token, and where its edges spell a part of one (unless `whole_only`)."""
        found = [(start, end) for start, end, _ in self._finder.find(text)]
        if whole_only:
            return found
        first, last = (found[0][0], found[-1][1]) if found else (len(text), 0)
        size = self._edge(text, range(min(first, self._longest), 0, -1), self._ends, at_end=False)
        if size:
            found.insert(0, (0, size))
            last = max(last, size)
        size = self._edge(text, range(min(len(text) - last, self._longest), 0, -1), self._beginnings, at_end=True)
        if size:
            found.append((len(text) - size, len(text)))
        return found

    @staticmethod
    def _edge(text: str, sizes: Iterable[int], parts: frozenset[str], *, at_end: bool) -> int:
        """The longest of the sizes at which the edge of the text is one of the parts; 0 where there is none."""
        return next((n for n in sizes if (text[len(text) - n :] if at_end else text[:n]) in parts), 0)


def _telling(part: str) -> bool:
    """Whether a part of a spelling is worth hiding: letters or spaces alone are words, and trimming needs them."""
    return not part.isalnum() and not part.isspace()


class _Placeholders:
    """Numbers that stand for texts while a template runs.

    Digits survive what templates do to text (trimming, case, JSON). The key is no part of the conversation or of the
    template, and depends on nothing else, so that a conversation always renders the same. It begins with its only 7:
    so nothing before a placeholder can make it look as if it began earlier.
    """

    def __init__(self, conversation: Any, sources: Mapping[str, str]) -> None:
        material = json.dumps(conversation, ensure_ascii=False) + "".join(sources.values())
        digest = material.encode(errors="replace")
        while True:
            digest = blake2b(digest, digest_size=24).digest()
            self._key = "7" + "".join(str(byte % 7) for byte in digest)
            if self._key not in material:
                break
        self.mark = self._placeholder(10**8 - 1)
        self._hidden: list[str] = []

    def _placeholder(self, number: int) -> str:
        return f"{self._key}{number:08d}"

    def hider(self, spellings: _Spellings) -> Change:
        """A function for `_mapped` that hides special tokens' spellings."""

        def hide(text: str, is_key: bool) -> str:
            pieces: list[str] = []
            position = 0
            for start, end in spellings.spans(text, whole_only=is_key):
                pieces += [text[position:start], self._placeholder(len(self._hidden))]
                self._hidden.append(text[start:end])
                position = end
            return "".join([*pieces, text[position:]]) if pieces else text

        return hide

    def restore(self, text: str) -> tuple[str, list[Span]]:
        """The text with what was hidden, and where that is."""
        pieces: list[str] = []
        spans: list[Span] = []
        size = position = 0
        for match in re.finditer(rf"{self._key}(\d{{8}})", text):
            hidden = self._hidden[int(match[1])]
            pieces += [text[position : match.start()], hidden]
            size += match.start() - position
            spans.append((size, size + len(hidden)))
            size += len(hidden)
            position = match.end()
        return "".join([*pieces, text[position:]]), spans
