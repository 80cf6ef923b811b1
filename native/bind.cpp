// The engine as a Python class. runtime/engine.py wraps it; errors arrive there as ValueError("found\0allowed").
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "netsuke.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

[[noreturn]] void raise(const ns_error &error) {
  std::string text = std::string(error.found) + '\0' + error.allowed;
  PyErr_SetObject(PyExc_ValueError, nb::str(text.c_str(), text.size()).ptr());
  throw nb::python_error();
}

nb::dict sizes(const ns_memory &m) {
  nb::dict out;
  out["weights"] = m.weights;
  out["kv_cache"] = m.kv_cache;
  out["activations"] = m.activations;
  out["scratch"] = m.scratch;
  out["tables"] = m.tables;
  out["allocated"] = m.allocated;
  return out;
}

ns_options options(int context, int slots, int rows, int logit_rows, int threads, const std::string &kv, const std::string &isa) {
  ns_options o{context, slots, rows, logit_rows, threads, kv == "int8" ? NS_KV_INT8 : NS_KV_F16, isa.empty() ? nullptr : isa.c_str()};
  return o;
}

using ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using flags = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

class Engine {
 public:
  Engine(const std::string &folder, int context, int slots, int rows, int logit_rows, int threads, const std::string &kv,
         const std::string &isa) {
    ns_error error{};
    ns_options o = options(context, slots, rows, logit_rows, threads, kv, isa);
    int failed;
    {
      nb::gil_scoped_release release;
      failed = ns_open(&engine_, folder.c_str(), &o, &error);
    }
    if (failed) raise(error);
  }
  ~Engine() { close(); }
  void close() {
    if (engine_) ns_close(engine_);
    engine_ = nullptr;
  }

  // Logits of the wanted rows, (n, vocab): a view that the next call overwrites.
  nb::ndarray<nb::numpy, const float, nb::ndim<2>> forward(ints tokens, ints slots, flags want) {
    ns_error error{};
    if (tokens.shape(0) != slots.shape(0) || tokens.shape(0) != want.shape(0)) throw nb::value_error("unequal lengths");
    size_t rows = 0;
    for (size_t i = 0; i < want.shape(0); i++) rows += want.data()[i] & 1;
    int failed;
    {
      nb::gil_scoped_release release;
      failed = ns_forward(open(), (int)tokens.shape(0), tokens.data(), slots.data(), want.data(), &error);
    }
    if (failed) raise(error);
    size_t shape[2] = {rows, (size_t)ns_describe(engine_).vocab};
    return {ns_logits(engine_), 2, shape, nb::find(this)};
  }
  int length(int slot) { return ns_length(open(), slot); }
  void truncate(int slot, int length) {
    ns_error error{};
    if (ns_truncate(open(), slot, length, &error)) raise(error);
  }
  void copy(int target, int source, int length) {
    ns_error error{};
    if (ns_copy(open(), target, source, length, &error)) raise(error);
  }
  nb::dict memory() { return sizes(ns_memory_of(open())); }
  nb::dict facts() {
    ns_facts f = ns_describe(open());
    nb::dict out;
    out["vocab"] = f.vocab, out["width"] = f.width, out["layers"] = f.layers, out["heads"] = f.heads, out["kv_heads"] = f.kv_heads;
    out["head_dim"] = f.head_dim, out["context"] = f.context, out["slots"] = f.slots, out["rows"] = f.rows;
    out["logit_rows"] = f.logit_rows, out["threads"] = f.threads, out["isa"] = f.isa;
    return out;
  }

 private:
  ns_engine *open() {
    if (!engine_) throw nb::value_error("the engine is closed");
    return engine_;
  }
  ns_engine *engine_ = nullptr;
};

class Sampler {
 public:
  Sampler(float temperature, float top_p, int top_k, float min_p, uint64_t seed) : s_{temperature, top_p, min_p, top_k, seed} {}
  int pick(floats logits) {
    if (logits.shape(0) != size_) {
      size_ = logits.shape(0);
      scratch_.reset(new float[2 * size_]);
    }
    return ns_sample(&s_, logits.data(), (int)size_, scratch_.get());
  }

 private:
  ns_sampler s_;
  size_t size_ = 0;
  std::unique_ptr<float[]> scratch_;
};

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Engine>(m, "Engine")
      .def(nb::init<const std::string &, int, int, int, int, int, const std::string &, const std::string &>(), "folder"_a,
           "context"_a = 0, "slots"_a = 1, "rows"_a = 256, "logit_rows"_a = 0, "threads"_a = 0, "kv"_a = "float16", "isa"_a = "")
      .def("close", &Engine::close)
      .def("forward", &Engine::forward, "tokens"_a, "slots"_a, "want"_a)
      .def("length", &Engine::length)
      .def("truncate", &Engine::truncate)
      .def("copy", &Engine::copy)
      .def("memory", &Engine::memory)
      .def("facts", &Engine::facts);
  nb::class_<Sampler>(m, "Sampler")
      .def(nb::init<float, float, int, float, uint64_t>())
      .def("pick", &Sampler::pick);
  m.def(
      "plan",
      [](const std::string &manifest, int context, int slots, int rows, int logit_rows, int threads, const std::string &kv) {
        ns_error error{};
        ns_memory memory{};
        ns_options o = options(context, slots, rows, logit_rows, threads, kv, "scalar");
        if (ns_plan(manifest.data(), manifest.size(), &o, &memory, &error)) raise(error);
        return sizes(memory);
      },
      "manifest"_a, "context"_a = 0, "slots"_a = 1, "rows"_a = 256, "logit_rows"_a = 0, "threads"_a = 0, "kv"_a = "float16");
  m.def(
      "sparse_trial",
      [](int outs, int ins, int bits, double share, int threads, int rounds) {
        double seconds[2];
        int failed;
        {
          nb::gil_scoped_release release;
          failed = ns_sparse_trial(outs, ins, bits, share, threads, rounds, seconds);
        }
        if (failed) throw nb::value_error("no memory, or inputs that are no multiple of 64");
        return nb::make_tuple(seconds[0], seconds[1]);
      },
      "outs"_a, "ins"_a, "bits"_a, "share"_a, "threads"_a, "rounds"_a = 15);
  m.def("read_rate", &ns_read_rate, "bytes"_a, "threads"_a, "seconds"_a = 1.0, nb::call_guard<nb::gil_scoped_release>());
  m.def("int8_rate", &ns_int8_rate, "threads"_a, "seconds"_a = 1.0, nb::call_guard<nb::gil_scoped_release>());
}
