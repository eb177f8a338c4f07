"""`Tokenizer`: text to token ids and back, for every vocabulary kind, and chat messages to token ids."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from kvarn.errors import TemplateError
from kvarn.text.chat import protect, split_protected, validate_messages
from kvarn.text.gguf import SPACE, Vocabulary, vocabulary_from_gguf
from kvarn.text.template import ChatTemplate, find_template
from kvarn.weights import ModelFiles

END_OF_TURN = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>",
    "[EOT]", "<|return|>", "<end_of_utterance>",
})  # fmt: skip
"""Special tokens that end an answer wherever a vocabulary has them, named as eos or not."""


def _byte_of_character() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest are moved to 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


class Tokenizer:
    """A vocabulary with its rules. Immutable and safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary, chat_template: ChatTemplate | None = None) -> None:
        self._vocabulary = vocabulary
        self._parsing = vocabulary.core
        self._plain = copy.deepcopy(vocabulary.core)
        self._plain.encode_special_tokens = True
        self._bytes_of = _byte_of_character()
        self.chat_template = chat_template
        self.vocab_size = len(vocabulary.tokens)
        self.bos_token_id = vocabulary.bos
        ends = [i for i in sorted(vocabulary.special) if vocabulary.tokens[i] in END_OF_TURN]
        self.eos_token_ids = tuple(dict.fromkeys((*vocabulary.eos, *ends)))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens, longest first."""
        texts = {self._vocabulary.tokens[i] for i in self._vocabulary.special}
        return tuple(sorted((t for t in texts if t), key=len, reverse=True))

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`. add_special_tokens: BOS and EOS as the vocabulary wants them. parse_special: special
        tokens spelt out in the text become those tokens; otherwise they are text like any other."""
        core = self._parsing if parse_special else self._plain
        ids: list[int] = core.encode(_well_formed(text), add_special_tokens=False).ids if text else []
        v = self._vocabulary
        if add_special_tokens:
            if v.add_bos and v.bos is not None:
                ids.insert(0, v.bos)
            if v.add_eos and v.eos:
                ids.append(v.eos[0])
        return ids

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
        """Token ids of a conversation by the model's chat template.

        Special tokens that the template writes become tokens; what looks like one inside a message is text, unless
        `parse_special`. continue_final_message: the last message is left open for the model to go on with. Raises
        TemplateError, RequestError naming the message.
        """
        if self.chat_template is None:
            raise TemplateError("the model has no chat template; use plain completions")
        checked = validate_messages(messages)
        texts = () if parse_special else self.special_texts
        protected, table = protect((checked, list(tools or ())), texts)
        shielded, shielded_tools = protected
        rendered = self.chat_template.render(
            shielded,
            tools=shielded_tools or None,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **dict(template_kwargs or {}),
        )
        ids: list[int] = []
        for piece, literal in split_protected(rendered, table):
            ids += self.encode(piece, parse_special=not literal)
        v = self._vocabulary
        if v.add_bos and v.bos is not None and ids[:1] != [v.bos]:
            ids.insert(0, v.bos)
        return ids

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it. Raises IndexError."""
        return self._vocabulary.tokens[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes to the text. Raises IndexError."""
        v = self._vocabulary
        text = v.tokens[token_id]
        if token_id in v.added:
            return text.encode()
        if v.pieces == "bytes":
            try:
                return bytes(self._bytes_of[character] for character in text)
            except KeyError:
                return text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes((int(text[3:5], 16),))
            except ValueError:
                pass
        return text.replace(SPACE, " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token rather than text."""
        return token_id in self._vocabulary.special

    @property
    def strips_leading_space(self) -> bool:
        """Whether text begins with a space that the vocabulary itself put there."""
        return self._vocabulary.space_prefix

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. Raises IndexError for an id out of range."""
        kept = [i for i in ids if not (skip_special_tokens and self.is_special(i))]
        text = b"".join(self.token_bytes(i) for i in kept).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text


def _well_formed(text: str) -> str:
    """Lone surrogates, which JSON lets in and UTF-8 has no room for, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_surrogate(text) else text


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer of open files; a vocabulary-only GGUF is enough. Raises ModelFileError, UnsupportedModelError."""
    if files.format == "gguf":
        vocabulary = vocabulary_from_gguf(files.metadata, str(files.path))
    else:
        from kvarn.text.hf import vocabulary_from_hf

        vocabulary = vocabulary_from_hf(files)
    return Tokenizer(vocabulary, find_template(files, vocabulary))
