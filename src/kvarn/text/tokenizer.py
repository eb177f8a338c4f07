"""`Tokenizer`: text to token ids and back, for every vocabulary kind, and chat messages to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvarn.errors import RequestError
from kvarn.text.vocabulary import SPACE, Pieces, Vocabulary, byte_of_character
from kvarn.weights import ModelFiles

if TYPE_CHECKING:
    from kvarn.text.chat import ChatEncoder
    from kvarn.text.template import ChatTemplate


class Tokenizer:
    """A vocabulary with its rules. Safe to share between threads.

    chat_sources: Jinja sources of the model's chat templates by name ("default", "tool_use"); compiled when first used.
    """

    def __init__(self, vocabulary: Vocabulary, chat_sources: Mapping[str, str] | None = None) -> None:
        self.vocabulary = vocabulary
        self._chat_sources = dict(chat_sources or {})
        self._bytes: dict[int, bytes] = {}
        self._byte_of_character = byte_of_character()

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.vocabulary.tokens)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a sequence, where the vocabulary has one."""
        return self.vocabulary.bos

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.vocabulary.eos

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: BOS and EOS, as the vocabulary wants them (no second BOS where the text begins with one).
        parse_special: special tokens spelt out in the text become those tokens; otherwise they are text. Lone
        surrogates, which JSON lets in and UTF-8 has no room for, become U+FFFD.
        """
        ids = self.vocabulary.encoder.encode(well_formed(text), parse_special=parse_special)
        return self._enclosed(ids) if add_special_tokens else ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template, or a fallback (`kvarn.text.template`).

        Special tokens that the template writes become tokens. What spells one inside a message or a tool is text,
        unless `parse_special`. BOS is there once if the vocabulary wants it, whether the template writes it or not.

        continue_final_message: the last message is left open for the model to go on with, and no generation prompt is
        added. template_kwargs: variables of the template, such as `enable_thinking`.

        Raises RequestError naming the part of the request (`messages[3].content`, `tools`, …), TemplateError where the
        template is invalid, refuses the messages or exceeds its bounds.
        """
        text, literal = self._chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            variables=template_kwargs or {},
            literal_content=not parse_special,
        )
        ids = self.vocabulary.encoder.encode(text, parse_special=True, literal=literal)
        return self._opened(ids)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's own template; None where it has none. Raises TemplateError where it is invalid."""
        if not self._chat_sources:
            return None
        from kvarn.text.template import ChatTemplate  # Jinja is imported with the first conversation

        return ChatTemplate(self._chat_sources, self._template_tokens())

    @cached_property
    def _chat(self) -> ChatEncoder:
        from kvarn.text.chat import ChatEncoder
        from kvarn.text.template import fallback_template

        v = self.vocabulary
        special = {v.tokens[index]: index for index in v.special if v.tokens[index]}
        return ChatEncoder(self.chat_template or fallback_template(special, self._template_tokens()), special)

    def _template_tokens(self) -> dict[str, str]:
        """What templates know as bos_token, eos_token, …"""
        v = self.vocabulary
        bos = "" if v.bos is None else v.tokens[v.bos]
        eos = v.tokens[v.eos[0]] if v.eos else ""
        return {**dict(v.names), "bos_token": bos, "eos_token": eos}

    def _opened(self, ids: list[int]) -> list[int]:
        v = self.vocabulary
        return [v.bos, *ids] if v.add_bos and v.bos is not None and ids[:1] != [v.bos] else ids

    def _enclosed(self, ids: list[int]) -> list[int]:
        v = self.vocabulary
        ids = self._opened(ids)
        return [*ids, v.eos[0]] if v.add_eos and v.eos and ids[-1:] != [v.eos[0]] else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. Raises RequestError for a negative id."""
        data = b"".join(self.text_bytes(token, skip_special_tokens) for token in ids)
        if self.strips_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode(errors="replace")

    def text_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """`token_bytes`, but nothing for a special token that is to be skipped."""
        return b"" if skip_special_tokens and token_id in self.vocabulary.special else self.token_bytes(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes to the text, in UTF-8 (not all tokens are whole code points).

        Empty for ids beyond the vocabulary, which only fill up the model's embedding. Raises RequestError for a
        negative id.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelt(token_id)
        return known

    def _spelt(self, token_id: int) -> bytes:
        v = self.vocabulary
        if token_id < 0:
            raise RequestError(f"token ids must be at least 0, not {token_id}", field="token_ids")
        if token_id >= len(v.tokens) or token_id in v.padding:
            return b""
        text = v.tokens[token_id]
        if token_id in v.byte_tokens:
            return bytes.fromhex(text[3:5])
        if v.pieces is Pieces.SPACES:
            return (text if token_id in v.special else text.replace(SPACE, " ")).encode()
        if token_id in v.verbatim or not all(character in self._byte_of_character for character in text):
            return text.encode()
        return bytes(self._byte_of_character[character] for character in text)

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for ids beyond it. Raises RequestError for a negative id."""
        if token_id < 0:
            raise RequestError(f"token ids must be at least 0, not {token_id}", field="token_ids")
        return self.vocabulary.tokens[token_id] if token_id < self.vocab_size else ""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token rather than text."""
        return token_id in self.vocabulary.special

    @property
    def strips_leading_space(self) -> bool:
        """Whether text begins with a space that the vocabulary itself put there."""
        return self.vocabulary.space_prefix


def well_formed(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD, as browsers do where a string is cut inside an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def spellings(vocabulary: Vocabulary) -> list[str]:
    """How each token is spelt, by id; "" for ids that only fill the embedding up."""
    tokens = list(vocabulary.tokens)
    for index in vocabulary.padding:
        tokens[index] = ""
    return tokens


def load_spellings(files: ModelFiles) -> list[str]:
    """The `spellings` of open files. For GGUF files without making a tokenizer, which takes longer. Raises as
    `load_tokenizer` does."""
    if files.format == "gguf":
        from kvarn.text.gguf import spellings_from_gguf

        return spellings_from_gguf(files.metadata, str(files.path))
    return spellings(load_tokenizer(files).vocabulary)


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer of open files; a vocabulary-only GGUF is enough. The files may be closed afterwards.

    Raises ModelFileError where the files are inconsistent, UnsupportedModelError for a kind that kvarn does not know.
    """
    from kvarn.text.sources import chat_sources

    if files.format == "gguf":
        from kvarn.text.gguf import vocabulary_from_gguf

        vocabulary = vocabulary_from_gguf(files.metadata, str(files.path))
    else:
        from kvarn.text.hf import vocabulary_from_hf

        vocabulary = vocabulary_from_hf(files)
    return Tokenizer(vocabulary, chat_sources(files))
