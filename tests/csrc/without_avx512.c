/* Hides AVX-512 and AMX from a process and its children: what a processor without them would say.
 *
 * Preloaded (LD_PRELOAD). The kernel lets CPUID fault (arch_prctl(ARCH_SET_CPUID, 0): Linux on
 * Intel), and the handler here answers in its place with those features taken out. So every library
 * that asks the processor, MKL, oneDNN, OpenBLAS and ours, takes its AVX2 code, and no variable of
 * any of them has to be known. What ld.so and libc chose before the preload stays. `make test-avx2`
 * runs the suite under it.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "cpuid_without_avx512.h"

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif

typedef int (*sigaction_type)(int, const struct sigaction*, struct sigaction*);
typedef void (*handler_type)(int);

static struct sigaction other; /* whoever else wants SIGSEGV: Python's faulthandler does */
static int hiding;

static int let_cpuid(int run) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, run); }

static int real_sigaction(int signal, const struct sigaction* now, struct sigaction* before) {
  static sigaction_type found;
  if (!found) found = (sigaction_type)dlsym(RTLD_NEXT, "sigaction");
  return found(signal, now, before);
}

static void otherwise(int signal, siginfo_t* info, void* context) {
  if ((other.sa_flags & SA_SIGINFO) && other.sa_sigaction) {
    other.sa_sigaction(signal, info, context);
  } else if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) {
    other.sa_handler(signal);
  } else { /* the instruction faults again, and ends the process */
    struct sigaction plain = {.sa_handler = SIG_DFL};
    real_sigaction(SIGSEGV, &plain, 0);
  }
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* at = (const uint8_t*)g[REG_RIP];
  if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) { /* not CPUID */
    otherwise(signal, info, context);
    return;
  }
  uint32_t leaf = g[REG_RAX], sub = g[REG_RCX], r[4];
  let_cpuid(1);
  cpuid_without_avx512(leaf, sub, r);
  let_cpuid(0);
  g[REG_RAX] = r[0], g[REG_RBX] = r[1], g[REG_RCX] = r[2], g[REG_RDX] = r[3];
  g[REG_RIP] += 2;
}

/* Nobody takes the fault away from the handler above: what they install is kept for it to call. */
int sigaction(int signal, const struct sigaction* now, struct sigaction* before) {
  if (signal != SIGSEGV || !hiding) return real_sigaction(signal, now, before);
  if (before) *before = other;
  if (now) other = *now;
  return 0;
}

handler_type signal(int number, handler_type handler) {
  struct sigaction now = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
  return sigaction(number, &now, &before) ? SIG_ERR : before.sa_handler;
}

__attribute__((constructor(101))) static void begin(void) {
  struct sigaction own = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
  real_sigaction(SIGSEGV, &own, &other);
  hiding = let_cpuid(0) == 0;
  if (!hiding) {
    static const char said[] = "without_avx512: this kernel or processor cannot let CPUID fault\n";
    if (write(2, said, sizeof said - 1) < 0) _exit(1);
    _exit(1);
  }
}
