// The amx level: tiles are not used yet; it runs the avx512 kernels.
#include "kernels.h"

namespace cpullm {

void use_amx(Kernels&) {}

}  // namespace cpullm
