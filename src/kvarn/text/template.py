"""`ChatTemplate`: a model's Jinja template, compiled once, rendered within bounds."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from kvarn.errors import ModelFileError, RequestError, TemplateError
from kvarn.text.gguf import Vocabulary
from kvarn.text.sandbox import BoundedEnvironment, Budget, check_size
from kvarn.weights import ModelFiles

MAX_TEMPLATE_CHARS = 256 << 10
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' "
    "else 'user') + '\\n' + message['content'] + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
FALLBACKS = (("<|im_start|>", CHATML), ("<start_of_turn>", GEMMA))
"""For models without a template: the format whose opening token the vocabulary has."""


class ChatTemplate:
    """A compiled template. Thread-safe: one rendering at a time.

    source: Jinja text. named: further templates by name ("tool_use"), used where tools are given. Raises TemplateError
    where the source is too long or no template.
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", named: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._environment = BoundedEnvironment()
        self._environment.globals["strftime_now"] = _strftime_now
        self._lock = threading.Lock()
        self._default = self._compile(source)
        tools = (named or {}).get("tool_use")
        self._with_tools = self._default if tools is None else self._compile(tools)

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are allowed"
            )
        try:
            return self._environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError, ValueError, SyntaxError) as error:
            raise TemplateError(f"the chat template is invalid: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as one text. continue_final_message: it ends with the last message's content. Raises
        TemplateError where the template refuses the messages, fails, or exceeds its bounds."""
        last = str(messages[-1].get("content") or "") if messages else ""
        if continue_final_message and not last.strip():
            raise RequestError(
                "continue_final_message needs content in the last message", field="continue_final_message"
            )
        known = {**self._tokens, **variables, "messages": [dict(m) for m in messages], "tools": tools,
                 "documents": None, "add_generation_prompt": add_generation_prompt}  # fmt: skip
        text = self._run(self._with_tools if tools else self._default, known)
        if continue_final_message:
            end = text.rfind(last.strip())
            if end < 0:
                raise TemplateError("the chat template changes the last message, so it cannot be continued")
            text = text[: end + len(last.strip())]
        return text

    def _run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        with self._lock:
            self._environment.budget = Budget()
            pieces: list[str] = []
            size = 0
            try:
                for piece in template.generate(**variables):
                    size += len(piece)
                    check_size(size)
                    pieces.append(piece)
            except TemplateError:
                raise
            except (RecursionError, MemoryError) as error:
                raise TemplateError("the chat template nests too deep or makes values too large") from error
            except Exception as error:  # a template can raise whatever Python can
                raise TemplateError(f"the chat template failed: {type(error).__name__}: {str(error)[:300]}") from error
        return "".join(pieces)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise TemplateError("strftime_now with more than 100 characters in the chat template")
    return datetime.now().strftime(pattern)


def find_template(files: ModelFiles, vocabulary: Vocabulary) -> ChatTemplate | None:
    """The template that a model's files carry, or one by its vocabulary's turn tokens; None where it has neither.

    Raises ModelFileError where a file holds something else than text, TemplateError where the text is no template.
    """
    named: dict[str, str] = {}
    if files.format == "gguf":
        source = files.metadata.get("tokenizer.chat_template")
        prefix = "tokenizer.chat_template."
        named = {
            k.removeprefix(prefix): v for k, v in files.metadata.items() if k.startswith(prefix) and isinstance(v, str)
        }
    else:
        from kvarn.text.hf import tokenizer_config

        source = tokenizer_config(files).get("chat_template")
        beside = files.file("chat_template.jinja")
        if beside is not None:
            source = beside.read_text(encoding="utf-8")
        if isinstance(source, list):
            named = {str(t.get("name")): str(t.get("template")) for t in source if isinstance(t, dict)}
            source = named.get("default")
    if source is None:
        texts = {vocabulary.tokens[i] for i in vocabulary.special}
        source = next((template for opening, template in FALLBACKS if opening in texts), None)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelFileError("must be text", path=str(files.path), field="chat_template")

    def text(token: int | None) -> str:
        return "" if token is None else vocabulary.tokens[token]

    eos = vocabulary.eos[0] if vocabulary.eos else None
    return ChatTemplate(source, bos_token=text(vocabulary.bos), eos_token=text(eos), named=named)
