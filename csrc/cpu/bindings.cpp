// The Python module diffprune._cpu: what ops.h has, as it is, and the walk over a tar's headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"
#include "tar_members.h"

namespace {

template <class Value>
pybind11::bytes bytes_of(const std::vector<Value>& values) {
  return pybind11::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(Value));
}

// (keys, where each ends, first members, extensions, their numbers, three columns of places and one of
// stamps), numbers as bytes; or None.
pybind11::object grouped(const diffprune::cpu::TarMembers& members) {
  const auto found = members.grouped();
  if (!found) return pybind11::none();
  const auto& [header_offset, data_offset, size] = found->places;
  return pybind11::make_tuple(pybind11::bytes(found->keys), bytes_of(found->key_ends), bytes_of(found->first),
                              found->extensions, bytes_of(found->codes),
                              pybind11::make_tuple(bytes_of(header_offset), bytes_of(data_offset), bytes_of(size),
                                                     bytes_of(found->stamps)));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  namespace py = pybind11;
  module.doc() = "C++ of diffprune for the CPU: kernels, which take addresses and sizes, and the walk over tars; see csrc/cpu.";
  module.def("variants", &diffprune::cpu::variants);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  using diffprune::cpu::CentroidSearch;
  py::class_<CentroidSearch>(module, "CentroidSearch")
      .def(py::init<const std::string&, uintptr_t, uintptr_t, int64_t, int64_t, int>(), unlocked)
      .def("assign", &CentroidSearch::assign, unlocked);
  module.def("kmeans_update", &diffprune::cpu::kmeans_update, unlocked);
  module.def("add_exactly", &diffprune::cpu::add_exactly, unlocked);

  using diffprune::cpu::TarMembers;
  py::class_<TarMembers>(module, "TarMembers")
      .def(py::init<>())
      .def("take", &TarMembers::take)
      .def("add", &TarMembers::add, py::arg("name"), py::arg("header_offset"), py::arg("data_offset"), py::arg("size"),
           py::arg("stamp"))
      .def("trust", &TarMembers::trust)
      .def("members", &TarMembers::members)
      .def("grouped", &grouped);
}
