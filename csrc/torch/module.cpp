// The Python module lrds_fast._C: importing it loads the operators; build_info says what was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kd_loss.h"

namespace py = pybind11;

#if !defined(LRDS_VERSION) || !defined(LRDS_TORCH_VERSION)
#error "LRDS_VERSION and LRDS_TORCH_VERSION are set by setup.py"
#endif
#if !defined(LRDS_CUDA_ARCHS)
#define LRDS_CUDA_ARCHS ""
#endif
#if !defined(LRDS_CUDA_VERSION)
#define LRDS_CUDA_VERSION ""
#endif

namespace {

py::list split(const std::string& words) {
  py::list out;
  for (std::size_t begin = 0; begin < words.size();) {
    const std::size_t end = std::min(words.find(';', begin), words.size());
    out.append(words.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

py::dict build_info() {
  using lrds::cpu::Isa;
  py::dict info;
  info["version"] = LRDS_VERSION;
  info["torch_version"] = LRDS_TORCH_VERSION;
#if defined(LRDS_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_version"] = LRDS_CUDA_VERSION;
  info["cuda_archs"] = split(LRDS_CUDA_ARCHS);
  py::list isas;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (lrds::cpu::isa_compiled(isa)) isas.append(lrds::cpu::isa_name(isa));
  }
  info["cpu_isas"] = isas;
  info["cpu_isa"] = lrds::cpu::isa_name(lrds::cpu::selected_isa());
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of lrds_fast (registered on import) and the facts of this build.";
  m.def("build_info", &build_info,
        "What was built: version, CUDA architectures, instruction sets.");
}
