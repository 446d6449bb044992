#include "cpu/scale_gradient.h"

#include "cpu/half.h"

namespace lrds::cpu {
namespace {

template <class T>
void scale(const void* gradient, void* out, std::int64_t begin, std::int64_t end, float factor) {
  const T* const in = static_cast<const T*>(gradient);
  T* const to = static_cast<T*>(out);
  for (std::int64_t i = begin; i < end; ++i) from_float(to_float(in[i]) * factor, to + i);
}

}  // namespace

void scale_gradient(DType type, const void* gradient, void* out, std::int64_t begin,
                    std::int64_t end, double factor) {
  const float narrow = static_cast<float>(factor);
  switch (type) {
    case DType::kFloat64: {
      const double* const in = static_cast<const double*>(gradient);
      double* const to = static_cast<double*>(out);
      for (std::int64_t i = begin; i < end; ++i) to[i] = in[i] * factor;
      return;
    }
    case DType::kFloat32:
      return scale<float>(gradient, out, begin, end, narrow);
    case DType::kBFloat16:
      return scale<BFloat16>(gradient, out, begin, end, narrow);
    case DType::kFloat16:
      return scale<Float16>(gradient, out, begin, end, narrow);
  }
}

}  // namespace lrds::cpu
