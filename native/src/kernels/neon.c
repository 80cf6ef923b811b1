/* The portable kernels with NEON and its dot product: compiled with -march=armv8.2-a+dotprod+fp16. */
#if defined(__aarch64__)
#define NS_NEON
#define NS_TABLE ns_neon
#define NS_NAME "neon"
#include "scalar.c"
#endif
