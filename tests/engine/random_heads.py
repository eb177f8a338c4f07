"""Files of random heads for tiny models: sure of themselves, and seldom right."""

import numpy as np

from kvarn.models import content_key
from kvarn.spec.heads import Heads, HeadsShape, Training, save_heads, tensor_shapes


def random_heads(model, kind, *, seed=0, draft_vocab=100, ahead=3, window=24, sure=6.0):
    rng = np.random.default_rng(seed)
    hidden, vocab = model.config.hidden_size, model.program.vocab_size
    if kind == "medusa":
        shape = HeadsShape(hidden, vocab, draft_vocab, ahead)
    else:
        shape = HeadsShape(hidden, vocab, draft_vocab, 4, 2, 16, 96, window, 10_000.0)
    ids = np.sort(rng.choice(vocab, draft_vocab, replace=False)).astype(np.int32)
    tensors = {}
    for name, extents in tensor_shapes(kind, shape).items():
        scale = 1.0 if len(extents) == 1 else extents[1] ** -0.5 * (sure if "lm_head" in name else 1.0)
        values = rng.standard_normal(extents) * scale
        if name.endswith("norm.weight"):
            values = 1 + values / 10
        tensors[name] = values.astype(np.float16 if len(extents) == 2 else np.float32)
    return Heads(kind, content_key(model.program, model.weights), shape, Training("", 7, 3, (0.5, 0.25)), ids, tensors)


def heads_file(folder, model, kind, **settings):
    path = folder / f"{kind}.safetensors"
    save_heads(path, random_heads(model, kind, **settings))
    return str(path)
