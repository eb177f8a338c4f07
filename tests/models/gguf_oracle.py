"""Writes a transformers model as GGUF the way llama.cpp's converter does: names from the `gguf` package's own map."""

import gguf
import numpy as np

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3, "gemma3_text": gguf.MODEL_ARCH.GEMMA3, "gpt2": gguf.MODEL_ARCH.GPT2,
}  # fmt: skip


def interleaved(weight, heads):
    """Rows of a query or key matrix from pairs (i, i + d/2) to pairs (2i, 2i+1), head by head."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def converted(name, values, config):
    """The tensor as GGUF holds it."""
    if config.model_type in ("llama", "mistral"):
        if ".q_proj." in name:
            return interleaved(values, config.num_attention_heads)
        if ".k_proj." in name:
            return interleaved(values, config.num_key_value_heads)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return values + np.float32(1)
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    return values


def write(path, oracle, pairs=(), tensors=()):
    """The model as a GGUF file. pairs: further (method of GGUFWriter, value) calls; tensors: further (name, array)."""
    config = oracle.config
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type in ("llama", "mistral"):
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    for method, value in pairs:
        getattr(writer, method)(value)
    for name, parameter in oracle.state_dict().items():
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tied or target is None:
            assert tied or name.endswith((".attn.bias", ".attn.masked_bias")), name
            continue
        values = np.ascontiguousarray(converted(name, parameter.float().numpy(), config))
        writer.add_tensor(target, values)
    for name, values in tensors:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
