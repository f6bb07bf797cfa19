// The kernels, compiled once for each kind of processor (CMakeLists.txt sets FASTMTP_SIMD and FASTMTP_TABLE).
//
// Nothing here may be contracted or reordered by the compiler (-ffp-contract=off, no -ffast-math): the same
// operations in the same order for every number of rows is what makes the engine batch-invariant. No function of
// the standard library that is inlined may be used: the linker keeps one copy of it, for the wrong processor.
#include "kernels.hpp"

#include <math.h>

#include FASTMTP_SIMD

using namespace fastmtp;

#include "kernels_rows.hpp"
#include "kernels_matmul.hpp"
#include "kernels_attention.hpp"

namespace fastmtp {

extern const Kernels FASTMTP_TABLE;
const Kernels FASTMTP_TABLE = {
    FASTMTP_NAME, matmul, convert, norm, add_rows, activate, rotate, store_token, attend, merge, argmax,
    sum_exponentials, read,
};

}  // namespace fastmtp
