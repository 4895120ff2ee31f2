// The Python module diffprune._C: the functions of ops.h, as they are.
#include <pybind11/pybind11.h>

#include "ops.h"

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  using namespace diffprune;
  module.doc() = "CUDA kernels of diffprune: plain functions of pointers and sizes; see csrc/ops.h.";
  py::class_<Where>(module, "Where", py::module_local())
      .def(py::init([](int device, uint64_t stream, int path) { return Where{device, stream, path}; }), py::arg("device"),
           py::arg("stream"), py::arg("path") = 0);
  module.def("architectures", &architectures);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("linear_grad_dot", &linear_grad_dot, unlocked);
  module.def("linear_grad_dot_partials", &linear_grad_dot_partials);
  module.def("linear_grad_sqnorm", &linear_grad_sqnorm, unlocked);
  module.def("linear_grad_sqnorm_partials", &linear_grad_sqnorm_partials);
  module.def("linear_grad_sqnorm_token", &linear_grad_sqnorm_token, unlocked);
  module.def("kmeans_round", &kmeans_round, unlocked);
  module.def("kmeans_search", &kmeans_search, unlocked);
  module.def("kmeans_decide", &kmeans_decide, unlocked);
  module.def("kmeans_search_again", &kmeans_search_again, unlocked);
  module.def("kmeans_search_again_few", &kmeans_search_again_few);
  module.def("kmeans_update", &kmeans_update, unlocked);
  module.def("flow_matching_loss", &flow_matching_loss, unlocked);
  module.def("flow_matching_loss_tiles", &flow_matching_loss_tiles);
}
