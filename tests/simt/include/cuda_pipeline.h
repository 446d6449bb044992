// Replaces CUDA's header of this name.
#pragma once

#include <cstddef>

#include "simt.h"

// NOLINTBEGIN(bugprone-reserved-identifier): CUDA's names

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes) {
  simt::async_copy(to, from, bytes);
}
inline void __pipeline_commit() { simt::async_commit(); }
inline void __pipeline_wait_prior(std::size_t unfinished) { simt::async_wait(unfinished); }

// NOLINTEND(bugprone-reserved-identifier)
