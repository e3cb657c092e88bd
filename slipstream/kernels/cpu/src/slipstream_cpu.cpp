// The one translation unit of the CPU kernels; the headers say what each part does.
#include "exports_linear.h"
#if __has_include("exports_block.h")
#include "exports_block.h"
#endif
