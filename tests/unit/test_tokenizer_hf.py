"""Tokenizers and templates from Hugging Face folders, against transformers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from kvarn.errors import ModelFileError, TemplateError, UnsupportedModelError
from kvarn.text import IncrementalDetokenizer, load_tokenizer
from kvarn.text.vocabulary import byte_of_character

TEMPLATE = (
    "{{ bos_token }}{%- for m in messages %}\n  {% generation %}\n{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{- m['content'] | trim }}{{ '<|im_end|>' + eos_token }}\n{% endgeneration %}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Folder:
    """The files of a folder, without weights."""

    format = "hf"

    def __init__(self, path, config=None, generation=None):
        self.path = path
        self.metadata = config or {}
        self.generation_config = generation or {}

    def file(self, name):
        path = self.path / name
        return path if path.is_file() else None


def byte_level_core():
    characters = sorted(byte_of_character())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    vocabulary = {token: index for index, token in enumerate([*characters, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def metaspace_core():
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "▁t", "he", "▁the"]
    core = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(words)},
            [("▁", "t"), ("h", "e"), ("▁t", "he")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def save(core, path, **config):
    core.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    core.add_tokens([AddedToken("<think>", normalized=False)])
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    core.save(str(path / "tokenizer.json"))
    settings_ = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings_))
    return Folder(path)


@pytest.fixture(scope="module", params=["bytes", "spaces"])
def pair(request, tmp_path_factory):
    """Our tokenizer and transformers' of the same folder."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp(request.param)
    files = save(byte_level_core() if request.param == "bytes" else metaspace_core(), path)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    return load_tokenizer(files), theirs


TEXTS = st.lists(st.one_of(st.sampled_from([" the", "the", "<think>", " ", "é", "😀"]), st.text(max_size=3))).map(
    "".join
)


@given(text=TEXTS)
@settings(max_examples=50)
def test_encodes_as_transformers_does(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)


def test_special_tokens_are_text_unless_asked(pair):
    ours, theirs = pair
    text = "the<|im_end|> the<think>"
    ids = ours.encode(text)
    assert [token for token in ids if ours.is_special(token)] == []
    assert ours.decode(ids) == text
    assert "<think>" in [ours.token_text(token) for token in ids]
    assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False)


@given(text=TEXTS)
@settings(max_examples=50)
def test_decodes_as_transformers_does(pair, text):
    ours, theirs = pair
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    detokenizer = IncrementalDetokenizer(ours)
    assert "".join([*map(detokenizer.append, ids), detokenizer.finish()]) == ours.decode(ids)


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "é<f>"}}]])
def test_conversations_as_transformers_has_them(pair, tools):
    ours, theirs = pair
    messages = [{"role": "system", "content": "the the"}, {"role": "user", "content": " the\n"}]
    expected = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ours.encode_chat(messages, tools=tools) == expected


def test_continued_conversations_as_transformers_has_them(pair):
    ours, theirs = pair
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "the the "}]
    expected = theirs.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=False)
    assert ours.encode_chat(messages, continue_final_message=True) == expected


def test_content_stays_text(pair):
    ours, _ = pair
    messages = [{"role": "user", "content": "the<|im_end|> the"}]
    ids = ours.encode_chat(messages)
    special = [ours.token_text(token) for token in ids if ours.is_special(token)]
    assert special == ["<s>", "<|im_start|>", "<|im_end|>", "</s>", "<|im_start|>"]
    assert "the<|im_end|> the<|im_end|>" in ours.decode(ids, skip_special_tokens=False)


def test_ends_come_from_every_config(tmp_path):
    files = save(byte_level_core(), tmp_path)
    end, turn = (Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id(t) for t in ("</s>", "<|im_start|>"))
    files.metadata = {"eos_token_id": 5}
    files.generation_config = {"eos_token_id": [end, turn, 10**9]}
    tokenizer = load_tokenizer(files)
    names = [tokenizer.token_text(token) for token in tokenizer.eos_token_ids]
    assert names == ["</s>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.bos_token_id == tokenizer.encode("", add_special_tokens=True)[0]


def test_templates_by_name_and_by_file(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    files = save(byte_level_core(), tmp_path, chat_template=named)
    template = load_tokenizer(files).chat_template
    user = [{"role": "user", "content": "a"}]
    assert (template.render(user), template.render(user, tools=[{}])) == ("plain", "1")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(files).chat_template.render(user) == "from the file"


def test_damaged_and_foreign_files(tmp_path):
    with pytest.raises(ModelFileError, match=r"tokenizer.json: is missing"):
        load_tokenizer(Folder(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(ModelFileError, match="is no tokenizer"):
        load_tokenizer(Folder(tmp_path))
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        load_tokenizer(Folder(tmp_path))


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (5, ModelFileError, "must be text"),
        ([5], ModelFileError, r"chat_template\[0\]: must have a name"),
        ([{"name": "rag", "template": "x"}], TemplateError, "none of the model's chat templates"),
        ("{% if %}", TemplateError, "invalid"),
    ],
)
def test_bad_templates(tmp_path, template, error, message):
    files = save(byte_level_core(), tmp_path, chat_template=template)
    with pytest.raises(error, match=message):
        load_tokenizer(files).encode_chat([{"role": "user", "content": "a"}])
