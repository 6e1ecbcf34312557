// The only file that knows Python. The GIL is released while files are read and written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <utility>

#include "header.hpp"
#include "lfs.hpp"
#include "output.hpp"
#include "pool.hpp"
#include "reader.hpp"
#include "weight_map.hpp"

namespace py = pybind11;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

PyObject* file_error = nullptr;  // rlspec._C.FileError; owned by the module

void raise(const rlspec::Error& error) {
  const py::handle type(file_error);
  const py::object instance = type(py::str(error.what()));
  instance.attr("kind") = py::str(std::string(rlspec::error_text(error.kind()).name));
  PyErr_SetObject(file_error, instance.ptr());
}

py::tuple as_tuple(const rlspec::Header& header) {
  py::list tensors(header.tensors.size());
  for (std::size_t i = 0; i < header.tensors.size(); ++i) {
    const rlspec::TensorInfo& tensor = header.tensors[i];
    py::tuple shape(tensor.shape.size());
    for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) shape[axis] = py::int_(tensor.shape[axis]);
    tensors[i] = py::make_tuple(tensor.name, std::string(tensor.dtype), shape, tensor.begin, tensor.end);
  }
  py::dict metadata;
  for (const auto& [key, value] : header.metadata) metadata[py::str(key)] = py::str(value);
  return py::make_tuple(tensors, metadata);
}

py::tuple read_header(const py::bytes& path) {
  const std::string name = path;
  rlspec::Header header;
  {
    const py::gil_scoped_release release;
    header = rlspec::read_header(name);
  }
  return as_tuple(header);
}

py::dict read_weight_map(const py::bytes& path) {
  const std::string name = path;
  rlspec::WeightMap map;
  {
    const py::gil_scoped_release release;
    map = rlspec::read_weight_map(name);
  }
  py::dict out;
  for (const auto& [tensor, file] : map) out[py::str(tensor)] = py::str(file);
  return out;
}

// `pin`, `unpin`, `choose`: addresses of functions as rlspec::Pinning has them, or 0.
std::shared_ptr<rlspec::Pool> make_pool(std::uint64_t bound, std::uintptr_t pin, std::uintptr_t unpin,
                                        std::uintptr_t choose, int device) {
  if ((pin == 0) != (unpin == 0) || (pin == 0) != (choose == 0)) {
    throw py::value_error("pin, unpin and choose go together");
  }
  rlspec::Pinning pinning;
  pinning.pin = reinterpret_cast<decltype(pinning.pin)>(pin);
  pinning.unpin = reinterpret_cast<decltype(pinning.unpin)>(unpin);
  pinning.choose = reinterpret_cast<decltype(pinning.choose)>(choose);
  pinning.device = device;
  return std::make_shared<rlspec::Pool>(bound, pinning);
}

rlspec::Io io_named(const std::string& name) {
  if (name == "auto") return rlspec::Io::kAuto;
  if (name == "direct") return rlspec::Io::kDirect;
  if (name == "buffered") return rlspec::Io::kBuffered;
  throw py::value_error("io must be auto, direct or buffered");
}

std::unique_ptr<rlspec::Reader> make_reader(
    std::vector<std::string> paths,
    const std::vector<std::tuple<std::size_t, std::uint64_t, std::uint64_t>>& requests,
    std::shared_ptr<rlspec::Pool> pool, int workers, const std::string& io) {
  std::vector<rlspec::Request> wanted;
  wanted.reserve(requests.size());
  for (const auto& [file, begin, end] : requests) {
    if (file >= paths.size() || begin > end) throw py::value_error("a request outside its file");
    wanted.push_back({file, begin, end});
  }
  const rlspec::Io how = io_named(io);
  const py::gil_scoped_release release;
  return std::make_unique<rlspec::Reader>(std::move(paths), wanted, std::move(pool), workers, how);
}

// Waits in short turns, so that Ctrl-C is heard.
std::unique_ptr<rlspec::Block> next_block(rlspec::Reader& reader) {
  auto block = std::make_unique<rlspec::Block>();
  for (;;) {
    {
      const py::gil_scoped_release release;
      if (reader.next(std::chrono::milliseconds(100), *block)) return block;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

py::buffer_info bytes_of(rlspec::Block& block) {
  return py::buffer_info(block.data, 1, "B", static_cast<py::ssize_t>(block.size));
}

void write_bytes(rlspec::OutputFile& file, std::uint64_t offset, const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("data must be contiguous");
  const auto* const bytes = static_cast<const char*>(info.ptr);
  const auto count = static_cast<std::size_t>(info.size * info.itemsize);
  const py::gil_scoped_release release;
  file.write(offset, bytes, count);
}

void add_reading(py::module_& module) {
  py::class_<rlspec::Pool, std::shared_ptr<rlspec::Pool>>(module, "Pool")
      .def(py::init(&make_pool), py::arg("bound"), py::arg("pin") = 0, py::arg("unpin") = 0,
           py::arg("choose") = 0, py::arg("device") = 0)
      .def_property_readonly("bound", &rlspec::Pool::bound)
      .def_property_readonly("in_use", &rlspec::Pool::in_use)
      .def_property_readonly("high_water", &rlspec::Pool::high_water);
  py::class_<rlspec::Block>(module, "Block", py::buffer_protocol()).def_buffer(&bytes_of);
  struct Closer {  // joining threads may take as long as a read does
    void operator()(rlspec::Reader* reader) const {
      const py::gil_scoped_release release;
      delete reader;
    }
  };
  py::class_<rlspec::Reader, std::unique_ptr<rlspec::Reader, Closer>>(module, "Reader")
      .def(py::init([](std::vector<std::string> paths,
                       const std::vector<std::tuple<std::size_t, std::uint64_t, std::uint64_t>>& requests,
                       std::shared_ptr<rlspec::Pool> pool, int workers, const std::string& io) {
             return std::unique_ptr<rlspec::Reader, Closer>(
                 make_reader(std::move(paths), requests, std::move(pool), workers, io).release());
           }),
           py::arg("paths"), py::arg("requests"), py::arg("pool"), py::arg("workers"), py::arg("io"))
      .def("next", &next_block)
      .def("done", &rlspec::Reader::done);
  module.def(
      "pool_bytes", [](std::uint64_t begin, std::uint64_t end) { return rlspec::pool_bytes({0, begin, end}); },
      py::arg("begin"), py::arg("end"));
}

void add_writing(py::module_& module) {
  py::class_<rlspec::OutputFile>(module, "OutputFile")
      .def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("fresh") = true)
      .def(
          "clone", [](rlspec::OutputFile& file, const std::string& path) { return file.clone(rlspec::File(path)); },
          py::arg("path"), Unlocked())
      .def("reserve", &rlspec::OutputFile::reserve, py::arg("size"), Unlocked())
      .def("write", &write_bytes, py::arg("offset"), py::arg("data"))
      .def(
          "copy",
          [](rlspec::OutputFile& file, const std::string& path, std::uint64_t from, std::uint64_t to,
             std::uint64_t count) { file.copy(rlspec::Source(path, rlspec::Io::kAuto), from, to, count); },
          py::arg("path"), py::arg("from_offset"), py::arg("offset"), py::arg("count"), Unlocked())
      .def("sync", &rlspec::OutputFile::sync, Unlocked())
      .def("finish", &rlspec::OutputFile::finish, Unlocked());
  module.def("rename_new", &rlspec::rename_new, py::arg("source"), py::arg("target"), Unlocked());
  module.def("exchange", &rlspec::exchange, py::arg("a"), py::arg("b"), Unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Checkpoint files, read and written in C++.";
  file_error = PyErr_NewExceptionWithDoc(
      "rlspec._C.FileError", "A file is unreadable, malformed or not writable; `kind` says how, in one word.",
      PyExc_ValueError, nullptr);
  if (file_error == nullptr) throw py::error_already_set();
  module.attr("FileError") = py::handle(file_error);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const rlspec::Error& error) {
      raise(error);
    }
  });
  py::list kinds;
  for (const rlspec::ErrorText& text : rlspec::kErrorTexts) kinds.append(std::string(text.name));
  module.attr("ERROR_KINDS") = py::tuple(kinds);
  module.def("read_header", &read_header, py::arg("path"),
             "The tensors of a safetensors file, in the order of their bytes, and its metadata.");
  module.def(
      "parse_file", [](const py::bytes& content) { return as_tuple(rlspec::parse_file(std::string_view(content))); },
      py::arg("content"), "The same of a file's content.");
  module.def(
      "refuse_lfs_pointer", [](const py::bytes& content) { rlspec::refuse_lfs_pointer(std::string_view(content)); },
      py::arg("content"));
  module.def("read_weight_map", &read_weight_map, py::arg("path"), "Which file holds which tensor.");
  add_reading(module);
  add_writing(module);
}
