// Step plans: building them stage by stage, and running a step.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "runtime/attention_stage.h"
#include "runtime/isa.h"
#include "runtime/linear_stage.h"
#include "runtime/plan.h"
#include "runtime/row_stages.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvarn;

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using OptionalInts = std::optional<Ints>;
using Slots = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tables = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char *what) {
    if (!ok) throw std::invalid_argument(what);
}

Function function_of(const std::string &name) {
    if (name == "silu") return Function::kSilu;
    if (name == "gelu") return Function::kGelu;
    if (name == "gelu_tanh") return Function::kGeluTanh;
    require(name == "relu", "no such activation function");
    return Function::kRelu;
}

Batch make_batch(const Ints &token_ids, const Ints &positions, const Slots &slot_mapping, const Ints &query_start,
                 const Ints &seq_lens, const Tables &block_tables, const Ints &output_rows,
                 const OptionalInts &tree_parents) {
    const size_t tokens = token_ids.size(), sequences = seq_lens.size();
    require(positions.size() == tokens, "positions must have as many elements as token_ids");
    require(slot_mapping.shape(0) == tokens, "slot_mapping must have a row for each of token_ids");
    require(query_start.size() == sequences + 1, "query_start must have one element more than seq_lens");
    require(block_tables.shape(0) == sequences, "block_tables must have a row for each of seq_lens");
    require(block_tables.shape(1) == slot_mapping.shape(1), "block_tables and slot_mapping must be of as many KV groups");
    require(!tree_parents || tree_parents->size() == tokens, "tree_parents must have as many elements as token_ids");
    return {int64_t(tokens), int64_t(sequences), int64_t(output_rows.size()), int64_t(block_tables.shape(1)),
            int64_t(block_tables.shape(2)), token_ids.data(), positions.data(), slot_mapping.data(),
            query_start.data(), seq_lens.data(), block_tables.data(), output_rows.data(),
            tree_parents ? tree_parents->data() : nullptr};
}

// Raw arrays of a batch, kept by reference while a step runs without the GIL.
template <class Run>
auto with_batch(Run run) {
    return [run](StepPlan &plan, const Ints &token_ids, const Ints &positions, const Slots &slot_mapping,
                 const Ints &query_start, const Ints &seq_lens, const Tables &block_tables, const Ints &output_rows,
                 const OptionalInts &tree_parents) {
        const Batch batch = make_batch(token_ids, positions, slot_mapping, query_start, seq_lens, block_tables,
                                       output_rows, tree_parents);
        nb::gil_scoped_release release;
        return run(plan, batch);
    };
}

Rows array(nb::handle plan, const FloatBuffer &buffer, int64_t rows) {
    const Limits &limits = nb::cast<StepPlan &>(plan).limits();
    require(rows >= 0 && rows <= (buffer.outputs ? limits.max_outputs : limits.max_tokens), "more rows than a buffer has");
    const size_t shape[2] = {size_t(rows), size_t(buffer.width)};
    const int64_t strides[2] = {buffer.stride, 1};
    return Rows(buffer.data, 2, shape, plan, strides);
}

// Where a layer's keys and values are: a slot of the blocks of a KV group.
const KvLayerView &kv_layer(const StepPlan &plan, size_t group, size_t slot) {
    require(group < plan.limits().windows.size(), "no such KV group");
    require(slot < plan.kv().num_slots(), "no such slot of a KV block");
    return plan.kv().slot(slot);
}

AttentionShape attention_shape(const StepPlan &plan, size_t kv_group, size_t slot, int64_t heads, float scale,
                               float softcap, int64_t window) {
    const KvLayerView &kv = kv_layer(plan, kv_group, slot);
    const int64_t kept = plan.limits().windows[kv_group];
    require(kept == 0 || (window > 0 && window <= kept), "a layer sees no more than its KV group keeps");
    require(heads > 0 && heads % kv.heads == 0, "heads must be a multiple of the KV heads");
    require(window >= 0, "a window is not negative");
    return {kv, int64_t(kv_group), heads, scale, softcap, window, (plan.limits().max_model_len + kKeySpan - 1) / kKeySpan};
}

void check_heads(const HeadRecipe &recipe, int64_t width, int64_t head_dim, const StepPlan &plan) {
    require(recipe.x.width == width, "heads do not match the buffer");
    if (recipe.norm.used()) require(int64_t(recipe.norm.weight->values.size()) == head_dim, "a head's norm has head_dim weights");
    if (recipe.rope)
        require(2 * recipe.rope->pairs <= head_dim && recipe.rope->positions >= plan.limits().max_model_len,
                "the rotary table does not fit heads or positions");
}

void add_attention(StepPlan &plan, size_t kv_group, size_t slot, const HeadRecipe &q, const HeadRecipe &k,
                   const FloatBuffer &v, bool write, int64_t heads, float scale, float softcap, int64_t window,
                   const FloatBuffer &out, const QuantBuffer &quants, size_t partials) {
    const AttentionShape shape = attention_shape(plan, kv_group, slot, heads, scale, softcap, window);
    const KvLayerView &kv = shape.kv;
    check_heads(q, heads * kv.key_dim, kv.key_dim, plan);
    require(out.width == heads * kv.value_dim, "attention's out has heads * value_dim elements");
    require(!quants.used() || (quants.cols == out.width && shape.group() * kv.value_dim % kGroup == 0),
            "attention's int8 output must fall into groups of 32");
    if (write) {
        check_heads(k, kv.heads * kv.key_dim, kv.key_dim, plan);
        require(v.width == kv.heads * kv.value_dim, "v has KV heads * value_dim elements");
    }
    const AttentionInput input{q, k, v, write};
    if (write) plan.add(std::make_unique<HeadsStage>(plan.context(), input, shape));
    float *place = plan.floats(partials, AttentionStage::partial_elements(shape, plan.context().threads));
    plan.add(std::make_unique<AttentionStage>(plan.context(), input, shape, out, quants, place));
}

void check_job(const LinearJob &job, int64_t cols) {
    const PackedMatrix &m = job.weight->matrix();
    require(m.cols == cols, "linears of one stage read the same width");
    require(job.out.data || job.quants.used(), "a linear needs an output");
    require(!job.out.data || job.out.width == m.rows, "a linear's output has its weight's rows");
    require(!job.quants.used() || job.quants.cols == m.rows, "a linear's int8 output has its weight's rows");
    require(!job.residual.data || job.residual.width == m.rows, "a residual has the output's width");
    require(!job.bias || int64_t(job.bias->values.size()) == m.rows, "a bias has an element for each row");
    if (!job.up) return;
    require(job.up->matrix().rows == m.rows && job.up->matrix().cols == m.cols, "gate and up have one shape");
    require(!job.up_bias || int64_t(job.up_bias->values.size()) == m.rows, "a bias has an element for each row");
    require(job.function.has_value(), "gate and up need a function");
}

void add_linear(StepPlan &plan, const std::string &label, const FloatBuffer &input, const QuantBuffer &quants,
                std::shared_ptr<InputRecipe> recipe, const std::vector<LinearJob> &jobs) {
    require(!jobs.empty(), "a linear stage has at least one linear");
    const int64_t cols = jobs.front().weight->matrix().cols;
    for (const LinearJob &job : jobs) {
        check_job(job, cols);
        const bool quantized = traits(job.weight->matrix().format).scales != Scales::kFloat;
        require(!job.up || (traits(job.up->matrix().format).scales != Scales::kFloat) == quantized,
                "gate and up read one kind of rows");
        require(quantized ? quants.used() && quants.cols == cols : input.data && input.width == cols,
                "quantized weights read int8 rows, float weights float rows, of their width");
    }
    if (recipe) {
        require(quants.used() && recipe->x.width == cols && recipe->x.outputs == quants.outputs,
                "an input recipe makes the rows that are read");
        plan.add(std::make_unique<PrepareStage>(plan.context(), *recipe, quants, kOwnRows));
    }
    plan.add(std::make_unique<LinearStage>(label, plan.context(), input, quants, std::move(recipe), jobs,
                                           plan.next_index()));
}

void bind_records(nb::module_ &m) {
    nb::class_<FloatBuffer>(m, "FloatBuffer", "A place for float32 rows; as made by default, none.")
        .def(nb::init<>())
        .def_ro("width", &FloatBuffer::width);
    nb::class_<QuantBuffer>(m, "QuantBuffer", "A place for int8 rows with their scales; as made by default, none.")
        .def(nb::init<>());
    nb::class_<NormParameters>(m, "Norm", "Parameters of a norm; as made by default, none.")
        .def(nb::init<>())
        .def("__init__", [](NormParameters *self, std::shared_ptr<Vector> weight, std::shared_ptr<Vector> bias,
                            float eps, bool layer, int64_t groups) {
            require(groups >= 1 && (!bias || bias->values.size() == weight->values.size()), "bias must match weight");
            new (self) NormParameters{std::move(weight), std::move(bias), eps, layer, groups};
        }, "weight"_a, "bias"_a.none(), "eps"_a, "layer"_a, "groups"_a);
    nb::class_<HeadRecipe>(m, "HeadRecipe", "Norm and rotation of the heads of a buffer.")
        .def("__init__", [](HeadRecipe *self, const FloatBuffer &x, const NormParameters &norm,
                            std::shared_ptr<RotaryTable> rope) { new (self) HeadRecipe{x, norm, std::move(rope)}; },
             "x"_a, "norm"_a, "rope"_a.none());
    nb::class_<InputRecipe>(m, "InputRecipe", "How a linear's int8 input is made from float rows.")
        .def("__init__", [](InputRecipe *self, const FloatBuffer &x, const NormParameters &norm) {
            require(!norm.used() || norm.groups * int64_t(norm.weight->values.size()) == x.width, "norm does not fit");
            new (self) InputRecipe{x, norm};
        }, "x"_a, "norm"_a);
    nb::class_<LinearJob>(m, "LinearJob", "A linear, or a gate/up pair, and what follows it.")
        .def("__init__", [](LinearJob *self, std::shared_ptr<PackedWeight> weight, std::shared_ptr<PackedWeight> up,
                            std::shared_ptr<Vector> bias, std::shared_ptr<Vector> up_bias,
                            const std::optional<std::string> &function, const FloatBuffer &residual, float scale,
                            float softcap, const FloatBuffer &out, const QuantBuffer &quants) {
            std::optional<Function> f;
            if (function) f = function_of(*function);
            new (self) LinearJob{std::move(weight), std::move(up), std::move(bias), std::move(up_bias), f, residual,
                                 scale, softcap, out, quants};
        }, "weight"_a, "up"_a.none() = nb::none(), "bias"_a.none() = nb::none(), "up_bias"_a.none() = nb::none(),
           "function"_a.none() = nb::none(), "residual"_a = FloatBuffer{}, "scale"_a = 1.0f, "softcap"_a = 0.0f,
           "out"_a = FloatBuffer{}, "quants"_a = QuantBuffer{});
}

void bind_row_stages(nb::class_<StepPlan> &plan) {
    plan.def("embed", [](StepPlan &p, std::shared_ptr<PackedWeight> table, const FloatBuffer &out, float scale) {
            require(table->matrix().cols == out.width && table->matrix().rows >= p.limits().vocab_size, "the table must fit");
            p.add(std::make_unique<EmbedStage>(p.context(), std::move(table), out, scale));
        }, "table"_a, "out"_a, "scale"_a)
        .def("position_embed", [](StepPlan &p, std::shared_ptr<PackedWeight> table, const FloatBuffer &x,
                                  const FloatBuffer &out) {
            require(table->matrix().cols == out.width && x.width == out.width &&
                        table->matrix().rows >= p.limits().max_model_len, "the table must fit");
            p.add(std::make_unique<PositionStage>(p.context(), std::move(table), x, out));
        }, "table"_a, "x"_a, "out"_a)
        .def("norm", [](StepPlan &p, const NormParameters &norm, const FloatBuffer &x, const FloatBuffer &out) {
            require(norm.used() && norm.groups * int64_t(norm.weight->values.size()) == x.width && x.width == out.width,
                    "norm does not fit");
            p.add(std::make_unique<NormStage>(p.context(), norm, x, out));
        }, "norm"_a, "x"_a, "out"_a)
        .def("rope", [](StepPlan &p, std::shared_ptr<RotaryTable> table, const FloatBuffer &x, const FloatBuffer &out,
                        int64_t heads) {
            require(heads > 0 && x.width == out.width && x.width % heads == 0 && 2 * table->pairs <= x.width / heads &&
                        table->positions >= p.limits().max_model_len, "the rotary table does not fit");
            p.add(std::make_unique<RopeStage>(p.context(), std::move(table), x, out, heads));
        }, "table"_a, "x"_a, "out"_a, "heads"_a)
        .def("kv_write", [](StepPlan &p, size_t kv_group, size_t slot, const FloatBuffer &k, const FloatBuffer &v) {
            const KvLayerView &kv = kv_layer(p, kv_group, slot);
            require(k.width == kv.heads * kv.key_dim && v.width == kv.heads * kv.value_dim, "k and v must fit the layer");
            p.add(std::make_unique<KvWriteStage>(p.context(), kv, int64_t(kv_group), k, v));
        }, "kv_group"_a, "slot"_a, "k"_a, "v"_a)
        .def("activation", [](StepPlan &p, const std::string &f, const FloatBuffer &x, const FloatBuffer &out) {
            require(x.width == out.width, "widths must agree");
            p.add(std::make_unique<ActivationStage>(p.context(), function_of(f), x, out));
        }, "function"_a, "x"_a, "out"_a)
        .def("gated_activation", [](StepPlan &p, const std::string &f, const FloatBuffer &gate, const FloatBuffer &up,
                                    const FloatBuffer &out) {
            require(gate.width == out.width && up.width == out.width, "widths must agree");
            p.add(std::make_unique<GatedStage>(p.context(), function_of(f), gate, up, out));
        }, "function"_a, "gate"_a, "up"_a, "out"_a)
        .def("add", [](StepPlan &p, const FloatBuffer &a, const FloatBuffer &b, const FloatBuffer &out) {
            require(a.width == out.width && b.width == out.width, "widths must agree");
            p.add(std::make_unique<AddStage>(p.context(), a, b, out));
        }, "a"_a, "b"_a, "out"_a)
        .def("select_rows", [](StepPlan &p, const FloatBuffer &x, const FloatBuffer &out) {
            require(x.width == out.width && out.outputs && !x.outputs, "selects from token rows into output rows");
            p.add(std::make_unique<SelectStage>(p.context(), x, out));
        }, "x"_a, "out"_a);
}

}  // namespace

void bind_plan(nb::module_ &m) {
    bind_records(m);
    m.attr("TILE_TOKENS") = kTileTokens;
    m.attr("OWN_ROWS") = kOwnRows;
    m.def("attention_partial_bytes", [](int64_t heads, int64_t kv_heads, int64_t value_dim, int64_t max_model_len,
                                        int threads) {
        AttentionShape shape{};
        shape.kv.heads = kv_heads;
        shape.kv.value_dim = value_dim;
        shape.heads = heads;
        shape.max_spans = (max_model_len + kKeySpan - 1) / kKeySpan;
        return size_t(AttentionStage::partial_elements(shape, threads)) * sizeof(float);
    }, "heads"_a, "kv_heads"_a, "value_dim"_a, "max_model_len"_a, "threads"_a,
       "Bytes where a decode step's attention, cut over threads, keeps its parts.");
    m.def("linear_scratch_bytes", &LinearStage::scratch_bytes_of_any,
          "Bytes a linear asks of each thread for an item.");
    m.def("linear_own_bytes", [](int64_t cols) { return LinearStage::own_bytes(cols); }, "cols"_a,
          "Bytes a linear that prepares its input asks of each thread for the stage.");
    m.def("attention_scratch_bytes", [](int64_t group, int64_t key_dim, int64_t value_dim, const std::string &type) {
        return AttentionStage::scratch_bytes(group, key_dim, value_dim, kv_type_of(type));
    }, "group"_a, "key_dim"_a, "value_dim"_a, "type"_a, "Bytes attention asks of each thread for an item.");
    m.def("thread_bytes", &StepPlan::thread_bytes, "scratch"_a, "own"_a,
          "Bytes a plan takes for each thread, from the largest that its stages ask for.");
    auto plan = nb::class_<StepPlan>(m, "StepPlan", "Stages over buffers in one arena, run as one call per step.");
    plan.def("__init__", [](StepPlan *self, std::shared_ptr<Pool> pool, std::shared_ptr<KvCache> kv,
                            const std::string &isa, int64_t max_tokens, int64_t max_sequences, int64_t max_outputs,
                            int64_t max_model_len, int64_t vocab_size, size_t arena_bytes,
                            const std::vector<int64_t> &windows) {
            require(max_tokens >= 1 && max_sequences >= 1 && max_outputs >= 1 && max_model_len >= 1,
                    "limits are at least 1");
            require(!windows.empty() && *std::min_element(windows.begin(), windows.end()) >= 0,
                    "there is a KV group, and no window is negative");
            new (self) StepPlan(std::move(pool), std::move(kv), choose_kernels(isa),
                                {max_tokens, max_sequences, max_outputs, max_model_len, vocab_size, windows}, arena_bytes);
        }, "pool"_a, "kv"_a, "isa"_a, "max_tokens"_a, "max_sequences"_a, "max_outputs"_a, "max_model_len"_a,
           "vocab_size"_a, "arena_bytes"_a, "windows"_a)
        .def("float_buffer", &StepPlan::float_buffer, "offset"_a, "width"_a, "stride"_a, "outputs"_a)
        .def("quant_buffer", &StepPlan::quant_buffer, "offset"_a, "cols"_a, "outputs"_a)
        .def("attention", &add_attention, "kv_group"_a, "slot"_a, "q"_a, "k"_a, "v"_a, "write"_a, "heads"_a, "scale"_a,
             "softcap"_a, "window"_a, "out"_a, "quants"_a, "partials"_a)
        .def("linear", &add_linear, "label"_a, "input"_a, "quants"_a, "recipe"_a.none(), "jobs"_a)
        .def("finish", &StepPlan::finish)
        .def_prop_ro("arena_bytes", &StepPlan::arena_bytes)
        .def_prop_ro("scratch_bytes", &StepPlan::scratch_bytes)
        .def_prop_ro("labels", &StepPlan::labels)
        .def("run", with_batch([](StepPlan &p, const Batch &b) { p.run(b); }), "token_ids"_a.noconvert(), "positions"_a.noconvert(),
             "slot_mapping"_a.noconvert(), "query_start"_a.noconvert(), "seq_lens"_a.noconvert(), "block_tables"_a.noconvert(), "output_rows"_a.noconvert(), "tree_parents"_a.noconvert().none(),
             "Runs a step with the GIL released. Raises ValueError where the batch is out of range.")
        .def("count", &StepPlan::count, "on"_a, "Switches the counting of stages' times on or off, from zero.")
        .def("counters", [](const StepPlan &p) {
            std::vector<std::tuple<uint64_t, uint64_t, uint64_t>> counters;
            for (const StageCounter &c : p.counters()) counters.emplace_back(c.span_ns, c.busy_ns, c.calls);
            return counters;
        }, "Per stage, in the order of `labels`: (ns, ns of all threads together, steps that it ran in).")
        .def("array", [](nb::handle_t<StepPlan> self, const FloatBuffer &buffer, int64_t rows) {
            return array(self, buffer, rows);
        }, "buffer"_a, "rows"_a, "A view of a buffer's rows, float32 (rows, width).");
    bind_row_stages(plan);
}
