// The only file that knows Python. The GIL is released while files are read.
#include <pybind11/pybind11.h>

#include "header.hpp"

namespace py = pybind11;

namespace {

PyObject* header_error = nullptr;  // rlspec._C.HeaderError; owned by the module

void raise(const rlspec::Error& error) {
  const py::handle type(header_error);
  const py::object instance = type(py::str(error.what()));
  instance.attr("kind") = py::str(std::string(rlspec::error_text(error.kind()).name));
  PyErr_SetObject(header_error, instance.ptr());
}

py::tuple read_header(const py::bytes& path) {
  const std::string name = path;
  rlspec::Header header;
  {
    const py::gil_scoped_release release;
    header = rlspec::read_header(name);
  }
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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Checkpoint files, read in C++.";
  header_error = PyErr_NewExceptionWithDoc(
      "rlspec._C.HeaderError", "A safetensors file is unreadable or malformed; `kind` says how, in one word.",
      PyExc_ValueError, nullptr);
  if (header_error == nullptr) throw py::error_already_set();
  module.attr("HeaderError") = py::handle(header_error);
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
}
