"""How byte-level BPE vocabularies cut text into words before merging, by GGUF's `tokenizer.ggml.pre`.

Each kind is a cascade of patterns: every pattern splits the pieces that the one before left; matches and gaps both are
pieces. Patterns and names are facts of the models' own tokenizer.json files and of GGUF's registry of names
(convert_hf_to_gguf.py, llama-vocab.cpp). Kinds of embedding models are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_SYMBOLS_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SYMBOLS_SLASH}"
_CASED = rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
_GPT4O = rf"{_CASED}|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DIGIT = r"\p{N}"
# Groups of three digits from the right, and spaces at the end. The files' own \d{1,3}(?=(?:\d{3})*\b) and \s+$ look at
# the rest of a run from each of its places: quadratic time. These look from its first place only and find the same.
_THREES = r"(?<!\p{N})\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\G(?<=\p{N})\p{N}{3}"
_THREES_AT_BORDERS = r"(?<!\d)\d{1,3}(?=(?:\d{3})*\b)|\G(?<=\d)\d{3}"
_SPACES_AT_END = r"(?<!\s)\s++$"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_V3 = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
)
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_LETTERS = (  # cased letters, as far as its tokenizer.json lists them
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_HAN = r"\p{Han}"
_KIMI_CASED = (
    rf"{_LEAD}[{_UPPER}&&[^{_HAN}]]*[{_LOWER}&&[^{_HAN}]]+{_CONTRACTION}?"
    rf"|{_LEAD}[{_UPPER}&&[^{_HAN}]]+[{_LOWER}&&[^{_HAN}]]*{_CONTRACTION}?"
)
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_ASIAN = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One kind.

    patterns: the cascade. ignore_merges: a piece that is a token stays whole, whatever the merges say. add_bos: whether
    BOS is added where the file's metadata are silent.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self, alone: str = "") -> pre_tokenizers.PreTokenizer:
        """The cascade, then the map from bytes to characters (`byte_of_character`).

        alone: characters after that map which are pieces by themselves.
        """
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        steps = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if alone:
            steps.append(pre_tokenizers.Split(Regex(f"[{re.escape(alone)}]"), behavior="isolated"))
        return pre_tokenizers.Sequence(steps)


def _kind(pattern: str, *more: str, ignore_merges: bool = False, add_bos: bool = False) -> PreTokenizer:
    return PreTokenizer((pattern, *more), ignore_merges, add_bos)


_KINDS: dict[tuple[str, ...], PreTokenizer] = {
    ("default",): _kind(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "exaone4", "a.x-4.0",
     "mellum"): _kind(_GPT2),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"):
        _kind(_LLAMA3, ignore_merges=True, add_bos=True),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): _kind(_LLAMA3),
    ("jais-2",): _kind(
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
        + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s"
    ),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo"): _kind(_QWEN2),
    ("qwen35",): _kind(
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
    ),
    ("ufakzeka",): _kind(rf"{_WORD}|\p{{N}}|{_SYMBOLS}"),
    ("seed-coder",): _kind(rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_REST}"),
    ("bailingmoe", "bailingmoe2", "llada-moe"): _kind(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    ("laguna",): _kind(r"[^\n]+|[\n]+", _QWEN2),
    ("minicpm5",): _kind(
        r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}", ignore_merges=True
    ),
    ("exaone-moe",): _kind(
        rf"{_CONTRACTION}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"):
        _kind(_DIGIT, _GPT2),
    ("falcon",): _kind(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    ("deepseek-llm",): _kind(
        r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?[{_DEEPSEEK_MARKS}]+", _SPACES_AT_END, _DEEPSEEK_CJK, r"\p{N}+"
    ),
    ("deepseek-coder",): _kind(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): _kind(r"\p{N}{1,3}", _CJK_AND_KANA, _DEEPSEEK_V3),
    ("bloom", "poro-chat", "gpt3-finnish"): _kind(_BLOOM),
    ("viking",): _kind(_BLOOM, _DIGIT),
    ("tekken",): _kind(_TEKKEN, ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "minimax-m2", "kanana2", "talkie"): _kind(_GPT4O),
    ("tiny_aya", "cohere2moe"): _kind(_THREES_AT_BORDERS, _GPT4O),
    ("youtu",): _kind(_YOUTU_ASIAN, rf"{_CASED}|\p{{N}}|{_SYMBOLS_SLASH}", ignore_merges=True),
    ("kimi-k2",): _kind(rf"{_HAN}+|{_KIMI_CASED}|\p{{N}}{{1,3}}|{_SYMBOLS}"),
    ("afmoe",): _kind(_THREES, _AFMOE_ASIAN, _DEEPSEEK_V3),
    ("chameleon",): _kind(
        r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", _DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]", _GPT2, add_bos=True
    ),
}  # fmt: skip

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for names, kind in _KINDS.items() for name in names}
"""Every known kind by its GGUF name."""
