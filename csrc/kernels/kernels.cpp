// The kernels, compiled once for each kind of processor (CMakeLists.txt sets FASTMTP_SIMD and FASTMTP_TABLE).
//
// The compiler may not contract or reorder operations (-ffp-contract=off, no -ffast-math): the engine is
// batch-invariant because the operations and their order are the same for every number of rows. Inlined functions of
// the standard library may not be used: the linker keeps one copy of each, perhaps compiled for another processor.
#include "kernels.hpp"

#include <math.h>

#include FASTMTP_SIMD

using namespace fastmtp;

#include "kernels_rows.hpp"
#include "kernels_matmul.hpp"
#include "kernels_attention.hpp"
#include "kernels_peak.hpp"

namespace fastmtp {

extern const Kernels FASTMTP_TABLE;
const Kernels FASTMTP_TABLE = {
    FASTMTP_NAME, matmul, convert, norm, add_rows, activate, rotate, store_key, store_value, attend, merge,
    divide, argmax, sum_exponentials, small_numbers, read, product_peak, attention_peak,
};

}  // namespace fastmtp
