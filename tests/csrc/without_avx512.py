"""Prints the variables under which a program sees a processor without AVX-512: `env $(python …) program`.

Where the kernel can let CPUID fault (Intel) that is `without_avx512.c`, elsewhere `trapped_cpuid.c` with a
list of the CPUID instructions in the libraries of this Python, which takes minutes the first time (objdump).
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CPUID = b"\x0f\xa2"
# libc has chosen before any library is seen; it is asked by its own variable.
LIBC = ",".join(f"-AVX512{part}" for part in ("F", "VL", "BW", "CD", "DQ"))


def built(name: str, folder: Path) -> Path:
    """A library of this folder's `name`.c."""
    library = folder / f"{name}.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(HERE / f"{name}.c"), "-o", str(library), "-ldl"], check=True)
    return library


def faults(library: Path) -> bool:
    """Whether this kernel lets CPUID fault."""
    return (
        subprocess.run(["/bin/true"], env={"LD_PRELOAD": str(library)}, stderr=subprocess.PIPE).returncode
        == 0
    )


def libraries() -> Iterator[Path]:
    """Those of this Python's packages and of this checkout that may ask the processor."""
    for folder in (Path(sysconfig.get_path("platlib")), ROOT / "lora_kernels"):
        for path in sorted(folder.rglob("*.so*")):
            if path.is_file() and not path.is_symlink() and CPUID in path.read_bytes():
                yield path.resolve()


def offsets(library: Path) -> list[str]:
    """Of its CPUID instructions, as the disassembler finds them: the bytes alone are in other code too."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        found = [line.partition(":")[0].strip() for line in run.stdout if line.rstrip().endswith("\tcpuid")]
    if run.returncode:  # a library that is missed would see AVX-512
        raise subprocess.CalledProcessError(run.returncode, command)
    return found


def sites(folder: Path) -> Path:
    """The list, made anew for the libraries that have changed since the last one."""
    lists: list[str] = []
    for library in libraries():
        stat = library.stat()
        kept = folder / f"{library.name}-{stat.st_size}-{stat.st_mtime_ns}.cpuid"
        if not kept.exists():
            kept.write_text("\n".join(offsets(library)))
        lists += [f"{library}\t{offset}\n" for offset in kept.read_text().split()]
    everything = folder / "cpuid_sites"
    everything.write_text("".join(lists))
    return everything


def variables(folder: Path) -> list[str]:
    """As `env` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    preloaded = built("without_avx512", folder)
    if faults(preloaded):
        return [f"LD_PRELOAD={preloaded}"]
    audit = f"LD_AUDIT={built('trapped_cpuid', folder)}"
    return [audit, f"CPUID_SITES={sites(folder)}", f"GLIBC_TUNABLES=glibc.cpu.hwcaps={LIBC}"]


if __name__ == "__main__":
    print(*variables(Path(sys.argv[1]).resolve()))
