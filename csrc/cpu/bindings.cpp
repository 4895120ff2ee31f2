// The Python module diffprune._cpu: the functions of ops.h, as they are.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

PYBIND11_MODULE(_cpu, module) {
  namespace py = pybind11;
  module.doc() = "C++ kernels of diffprune for the CPU: plain functions of addresses and sizes; see csrc/cpu/ops.h.";
  module.def("variants", &diffprune::cpu::variants);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("kmeans_assign", &diffprune::cpu::kmeans_assign, unlocked);
  module.def("kmeans_update", &diffprune::cpu::kmeans_update, unlocked);
  module.def("add_exactly", &diffprune::cpu::add_exactly, unlocked);
}
