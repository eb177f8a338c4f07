"""How byte-level BPE vocabularies cut text into words before merging, by GGUF's `tokenizer.ggml.pre`.

Each kind is a cascade of patterns: every pattern splits the pieces that the one before left; matches and gaps both are
pieces. Patterns and names are facts of the models' own tokenizer.json files and of GGUF's registry of names
(convert_hf_to_gguf.py, llama-vocab.cpp). Kinds of embedding models are left out.
"""

from __future__ import annotations

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
_DIGIT_GROUPS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_V3 = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
)
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼ\u1fbe"
    "ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
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

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The cascade, then the map from bytes to characters (`byte_of_character`)."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


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
        r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _DEEPSEEK_CJK,
        r"\p{N}+",
    ),
    ("deepseek-coder",): _kind(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): _kind(r"\p{N}{1,3}", _CJK_AND_KANA, _DEEPSEEK_V3),
    ("bloom", "poro-chat", "gpt3-finnish"): _kind(_BLOOM),
    ("viking",): _kind(_BLOOM, _DIGIT),
    ("tekken",): _kind(_TEKKEN, ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "minimax-m2", "kanana2", "talkie"): _kind(_GPT4O),
    ("tiny_aya", "cohere2moe"): _kind(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O),
    ("youtu",): _kind(_YOUTU_ASIAN, rf"{_CASED}|\p{{N}}|{_SYMBOLS_SLASH}", ignore_merges=True),
    ("kimi-k2",): _kind(rf"{_HAN}+|{_KIMI_CASED}|\p{{N}}{{1,3}}|{_SYMBOLS}"),
    ("afmoe",): _kind(_DIGIT_GROUPS_FROM_THE_RIGHT, _AFMOE_ASIAN, _DEEPSEEK_V3),
    ("superbpe",): _kind(r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    ("chameleon",): _kind(
        r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", _DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]", _GPT2, add_bos=True
    ),
}  # fmt: skip

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for names, kind in _KINDS.items() for name in names}
"""Every known kind by its GGUF name."""
