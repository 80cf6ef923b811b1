/* The portable kernels with 256-bit vectors: compiled with -mavx2 -mfma -mf16c. */
#if defined(__x86_64__) || defined(__i386__)
#define NS_AVX2
#define NS_TABLE ns_avx2
#define NS_NAME "avx2"
#include "scalar.c"
#endif
