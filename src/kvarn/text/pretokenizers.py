"""How byte-level BPE vocabularies cut text into words before merging, by GGUF's `tokenizer.ggml.pre`.

Each kind is a cascade of patterns: every pattern splits the pieces that the one before left, matches and gaps both
being pieces. The patterns are facts of the models' own tokenizer.json files, as llama.cpp's llama-vocab.cpp lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

CONTRACTIONS = r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{LINES}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{LINES}"
CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASH_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼι"
    "ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CJK = r"[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{CASED}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{CASED}+{LOWER}*"
GPT4O_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CASED}*{LOWER}+(?:{CONTRACTIONS})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{CASED}+{LOWER}*(?:{CONTRACTIONS})?"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """patterns: the cascade. ignore_merges: a piece that is a token stays whole, whatever the merges say. add_bos: what
    the vocabulary does where its metadata are silent."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The cascade, then GPT-2's byte-to-character map (Radford et al. 2019, section 2.2)."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_KINDS: dict[tuple[str, ...], PreTokenizer] = {
    ("default",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): PreTokenizer(
        (LLAMA3,), ignore_merges=True, add_bos=True
    ),
    ("dbrx", "smaug-bpe"): PreTokenizer((LLAMA3,)),
    ("chatglm-bpe", "glm4"): PreTokenizer((LLAMA3,)),
    ("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code", "jina-v1-en", "gigachat",
     "roberta-bpe", "mpt", "olmo", "jais", "trillion", "granite-docling"): PreTokenizer((GPT2,)),
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"): PreTokenizer(
        (r"\p{N}", GPT2)
    ),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2"): PreTokenizer((QWEN2,)),
    ("deepseek-llm",): PreTokenizer(
        (r"[\r\n]", rf"\s?[{DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}+")
    ),
    ("deepseek-coder",): PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense"): PreTokenizer((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3_WORDS)),
    ("falcon",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    ("bloom", "poro-chat", "gpt3-finnish"): PreTokenizer((BLOOM,)),
    ("viking",): PreTokenizer((BLOOM, r"\p{N}")),
    ("tekken",): PreTokenizer((rf"{TEKKEN_WORDS}|\p{{N}}|{SLASH_LINES}",), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4"): PreTokenizer((rf"{GPT4O_WORDS}|\p{{N}}{{1,3}}|{SLASH_LINES}",)),
}  # fmt: skip

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for names, kind in _KINDS.items() for name in names}
"""Every known kind by its GGUF name."""
