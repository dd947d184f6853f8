/* Hides AVX-512 and AMX as without_avx512.c does, where the kernel cannot let CPUID fault (AMD).
 *
 * An auditor of the loader (LD_AUDIT): it sees each library before any of its code runs, and plants
 * a breakpoint on each of its CPUID instructions, of which without_avx512.py has made a list
 * (CPUID_SITES: a path and an offset a line). The handler answers in their place. A breakpoint's
 * signal is one that nobody else takes.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <link.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "cpuid_without_avx512.h"

static void on_breakpoint(int signal, siginfo_t* info, void* context) {
  (void)signal, (void)info;
  greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
  uint32_t r[4];
  cpuid_without_avx512(g[REG_RAX], g[REG_RCX], r);
  g[REG_RAX] = r[0], g[REG_RBX] = r[1], g[REG_RCX] = r[2], g[REG_RDX] = r[3];
  g[REG_RIP] += 1; /* the breakpoint is one byte of two */
}

static void plant(uint8_t* at, const char* library) {
  if (at[0] != 0x0f || at[1] != 0xa2) {
    dprintf(2, "trapped_cpuid: the list is not of this %s\n", library);
    _exit(1);
  }
  uintptr_t page = (uintptr_t)at & -4096ul, end = ((uintptr_t)(at + 1) & -4096ul) + 4096;
  mprotect((void*)page, end - page, PROT_READ | PROT_WRITE | PROT_EXEC);
  at[0] = 0xcc, at[1] = 0x90; /* int3, nop */
  mprotect((void*)page, end - page, PROT_READ | PROT_EXEC);
}

unsigned la_version(unsigned version) {
  struct sigaction own = {.sa_sigaction = on_breakpoint, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGTRAP, &own, 0);
  return version;
}

unsigned la_objopen(struct link_map* map, Lmid_t space, uintptr_t* cookie) {
  (void)space, (void)cookie;
  char path[PATH_MAX], listed[PATH_MAX];
  unsigned long offset;
  FILE* sites = fopen(getenv("CPUID_SITES") ? getenv("CPUID_SITES") : "", "r");
  if (!sites) {
    dprintf(2, "trapped_cpuid: CPUID_SITES names no file\n");
    _exit(1);
  }
  if (!realpath(map->l_name, path)) path[0] = 0; /* the program itself, and the kernel's own */
  while (fscanf(sites, "%4095[^\t]\t%lx\n", listed, &offset) == 2) {
    if (strcmp(path, listed) == 0) plant((uint8_t*)map->l_addr + offset, path);
  }
  fclose(sites);
  return 0;
}
