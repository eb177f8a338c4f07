"""Programs as launches: what is fused, what is not, and where activations lie. Needs no torch."""

import subprocess
import sys
from collections import Counter

import pytest

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cuda import CudaBackend
from kvarn.backends.cuda.forms import DENSE, MatrixForm
from kvarn.backends.cuda.launches import LinearLaunch, NormLaunch, RopeLaunch, places
from kvarn.backends.cuda.lower import lower
from kvarn.backends.cuda.memory import assign, matrix_forms
from kvarn.config import CudaConfig
from kvarn.program import Rows
from kvarn.tensors import DType
from kvarn.testing.models import SETTINGS, tiny_model

LIMITS = StepLimits(64, 8, 128)


def program(family="llama", **changes):
    return tiny_model(family, **changes).program


def lowered(made, wanted=(), stored=DType.F32):
    dtypes = {weight.name: stored for weight in made.weights}
    return lower(made, matrix_forms(made, dtypes, CudaConfig()), wanted)


def kinds(launches):
    return Counter(type(launch).__name__.removesuffix("Launch") for launch in launches)


def test_a_layer_of_llama_is_nine_launches():
    """Norm with residual, q with k and v, rotation with the write, attention, o; norm, gate with up, gating, down."""
    two, three = (lowered(program(num_hidden_layers=n)).launches for n in (2, 3))
    assert kinds(three) - kinds(two) == Counter(Norm=2, Linear=4, Rope=1, Attention=1, Gated=1)


def test_a_layer_of_qwen3_norms_heads_in_place():
    launches = lowered(program("qwen3")).launches
    heads = [launch for launch in launches if isinstance(launch, NormLaunch) and launch.groups > 1]
    assert len(heads) == 4
    assert all(launch.x == launch.out for launch in heads)


def test_what_is_wanted_is_not_overwritten():
    """A buffer asked for by name has what the program says, so that its value is nobody else's place."""
    made = program("qwen3")
    names = [buffer.name for buffer in made.buffers]
    every = lowered(made, names)
    assert set(every.outputs) == set(names)
    assert len({(view.place, view.start) for view in every.outputs.values()}) == len(names)
    ropes = [launch for launch in every.launches if isinstance(launch, RopeLaunch)]
    assert [launch.rotate_keys for launch in ropes[:1]] == [True], "of the first layer nothing is wanted"
    assert not ropes[-1].rotate_keys, "the last layer's keys are"


def test_matrices_of_unlike_forms_stay_apart():
    made = program()
    forms = {weight.name: DENSE for weight in made.weights if len(weight.shape) == 2}
    v = next(name for name in forms if name.endswith("attn.v.weight"))
    joined = next(launch for launch in lower(made, forms).launches if isinstance(launch, LinearLaunch))
    assert len(joined.weights) == 3
    apart = lower(made, {**forms, v: MatrixForm("int8", 16)}).launches
    first, second = [launch for launch in apart if isinstance(launch, LinearLaunch)][:2]
    assert [len(first.weights), second.weights] == [2, (v,)]


@pytest.mark.parametrize("family", SETTINGS)
def test_places_that_live_at_one_time_share_no_bytes(family):
    made = program(family)
    found = lowered(made, ("x", "attn"))
    layout = assign(found, LIMITS, "bfloat16")
    first, last = {}, {}
    for index, launch in enumerate(found.launches):
        for place in places(launch):
            first.setdefault(place, index)
            last[place] = index
    last.update({view.place: len(found.launches) for view in found.outputs.values()})

    def span(place):
        rows = LIMITS.max_num_tokens if place.rows is Rows.TOKENS else LIMITS.max_num_outputs
        start = layout.offsets[place]
        return start, start + rows * place.width * (4 if place.float32 else 2)

    for one in first:
        assert span(one)[1] <= layout.nbytes
        for other in first:
            if one is not other and first[one] <= last[other] and first[other] <= last[one]:
                assert span(one)[1] <= span(other)[0] or span(other)[1] <= span(one)[0]


def test_activations_do_not_grow_with_layers():
    few, many = (assign(lowered(program(num_hidden_layers=n)), LIMITS, "bfloat16").nbytes for n in (2, 12))
    assert few == many


def use(made, stored=DType.BF16, shared=(), **settings):
    dtypes = {weight.name: stored for weight in made.weights}
    kv = KvCacheSpec(10, 16, "float16")
    return CudaBackend(CudaConfig(**settings)).memory_use(made, dtypes, kv, LIMITS, shared=shared)


def test_forms_take_the_bytes_that_they_say():
    """Of an element: 16 bits, 8 and a scale a row, 4 and two of 16 bits for a group; and 4.5 of Q4_0 as stored."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 300}
    made = program(**wide, num_attention_heads=8, num_key_value_heads=8)
    table = 2 * made.weight("embed.weight").num_elements
    elements = sum(weight.num_elements for weight in made.weights if len(weight.shape) == 2) - table // 2
    bits = {}
    for name in ("dense", "int8", "fp8", "int4"):
        bits[name] = 8 * (use(made, weights=name).weights - table) / elements
    bits["int4:128"] = 8 * (use(made, weights="int4", weight_group=128).weights - table) / elements
    bits["Q4_0"] = 8 * (use(made, DType.Q4_0).weights - table) / elements
    wanted = {"dense": 16, "int8": 8, "fp8": 8, "int4": 5, "int4:128": 4.25, "Q4_0": 4.5}
    assert bits == pytest.approx(wanted, abs=0.06)


def test_shared_weights_are_not_counted():
    made = program()
    table = made.weight("embed.weight")
    assert use(made).weights - use(made, shared=["embed.weight"]).weights == -(-2 * table.num_elements // 512) * 512


def test_plans_need_no_torch():
    code = (
        "import sys; from kvarn.backends.cuda import CudaBackend; from kvarn.testing import tiny_model;"
        "from kvarn.backends import KvCacheSpec, StepLimits; from kvarn.config import CudaConfig;"
        "from kvarn.tensors import DType; p = tiny_model('llama').program;"
        "CudaBackend(CudaConfig()).memory_use("
        "p, {w.name: DType.F32 for w in p.weights}, KvCacheSpec(4), StepLimits(8, 2, 64));"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
