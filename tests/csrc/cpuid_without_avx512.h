/* What CPUID would say on a processor that has no AVX-512 and no AMX. */
#include <stdint.h>

#define BIT(n) (1u << (n))

/* Registers in the order of the instruction's results: a, b, c, d. */
static inline void hide(uint32_t leaf, uint32_t sub, uint32_t* r) {
  if (leaf == 7 && sub == 0) {
    r[1] &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) |
              BIT(31));                                       /* F DQ IFMA .. VL */
    r[2] &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
    r[3] &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) |
              BIT(25)); /* 4VNNIW .. FP16, AMX */
  } else if (leaf == 7 && sub == 1) {
    r[0] &= ~(BIT(5) | BIT(21)); /* AVX512-BF16, AMX-FP16 */
  } else if (leaf == 13 && sub == 0) {
    r[0] &= ~0x600e0u; /* the state of masks, ZMM and tiles */
  }
}

static inline void cpuid_without_avx512(uint32_t leaf, uint32_t sub, uint32_t* r) {
  __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "0"(leaf), "2"(sub));
  hide(leaf, sub, r);
}
