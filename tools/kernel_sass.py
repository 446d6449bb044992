"""The machine code of every CUDA kernel: access widths, fences, local memory, inner loops.

python tools/kernel_sass.py                     compile and print the differences from tests/kernel_sass.csv
python tools/kernel_sass.py --print [NAME]      print the rows of all kernels, or of those whose name contains NAME
python tools/kernel_sass.py --write             write that table and tests/kernel_registers.csv anew

It disassembles what tools/kernel_registers.py compiles, so the files and architectures are the same. Columns:

instructions        of the whole kernel, without padding
ldg, stg, lds, sts  loads and stores of global and shared memory: "bits x count", widest first
copies              cp.async (LDGSTS) with its bits, and bulk copies (UBLKCP)
local               loads and stores of local memory: spilled registers, arrays indexed at run time
fences              MEMBAR with the scope of the GPU or the system, which waits for all earlier stores
cctl                invalidations of L1
loops               "instructions:exponentials" of each loop that takes exponentials or stores 128 bits and contains
                    no other such loop, in the order of their addresses

The body of a loop includes the branches that only some rows take. An element takes two exponentials (student and
teacher) where the temperature is 1, 2 or 4, three otherwise, one where the teacher is not read: twice the quotient is
the number of instructions per element of the first kind. A kernel that unrolls its row has one such loop: the rows.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_registers
from kernel_registers import ROOT, Row, demangle

TABLE = ROOT / "tests" / "kernel_sass.csv"
COLUMNS = (
    "nvcc",
    "file",
    "arch",
    "kernel",
    "instructions",
    "ldg",
    "stg",
    "lds",
    "sts",
    "copies",
    "local",
    "fences",
    "cctl",
    "loops",
)


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: `operation` is the mnemonic with its modifiers, as in STG.E.128."""

    address: int
    conditional: bool
    operation: str
    operands: str

    @property
    def name(self) -> str:
        return self.operation.split(".", 1)[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for other instructions and for branches through a register."""
        if self.name != "BRA":
            return None
        address = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(address.group(1), 16) if address else None

    @property
    def falls_through(self) -> bool:
        if self.name == "BRA":
            # BRA P0, BRA.DIV UR4, ...: the condition is an operand.
            return self.conditional or "," in self.operands
        return self.conditional or self.name not in ("EXIT", "RET", "BRX", "KILL")


def find_cuobjdump() -> str | None:
    """Of the toolkit, the PATH, or the copy that comes with triton, which CUDA builds of torch install."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    site = Path(torch.__file__).parent.parent
    folders = [Path(home) / "bin" for home in homes if home]
    folders += [*site.glob("nvidia/cu[0-9]*/bin"), site / "triton" / "backends" / "nvidia" / "bin"]
    for folder in folders:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return str(folder / "cuobjdump")
    return shutil.which("cuobjdump")


def disassemble(cuobjdump: str, compiled: Path) -> str:
    # cuobjdump runs the nvdisasm that it finds on the PATH.
    path = f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [cuobjdump, "-sass", str(compiled)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout


def kernels(text: str) -> dict[str, list[Instruction]]:
    """Instructions by mangled name, from what cuobjdump -sass prints. ValueError where it holds no kernel."""
    by_name: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if header := re.match(r"\s*Function : (\S+)", line):
            code = by_name.setdefault(header.group(1), [])
        elif parsed := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            address, predicate, operation, operands = parsed.groups()
            code.append(Instruction(int(address, 16), predicate is not None, operation, operands))
    if not by_name:
        raise ValueError("the disassembly holds no kernel")
    return by_name


def blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[set[int]]]:
    """Basic blocks in the order of their addresses, and the blocks that may run after each."""
    starts = {code[0].address}
    for instruction, following in zip(code, code[1:], strict=False):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or not instruction.falls_through or instruction.conditional:
            starts.add(following.address)
    parts: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            parts.append([])
        parts[-1].append(instruction)
    index = {part[0].address: i for i, part in enumerate(parts)}
    after: list[set[int]] = []
    for i, part in enumerate(parts):
        last = part[-1]
        next_blocks = {index[last.target]} if last.target in index else set()
        if last.falls_through and i + 1 < len(parts):
            next_blocks.add(i + 1)
        after.append(next_blocks)
    return parts, after


def natural_loops(after: list[set[int]]) -> dict[int, set[int]]:
    """The blocks of each loop by its header, which dominates the blocks that branch back to it."""
    before: list[set[int]] = [set() for _ in after]
    for i, next_blocks in enumerate(after):
        for j in next_blocks:
            before[j].add(i)
    order: list[int] = []
    seen = set()
    stack = [(0, iter(sorted(after[0])))]
    seen.add(0)
    while stack:
        block, rest = stack[-1]
        following = next((j for j in rest if j not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(sorted(after[following]))))
    order.reverse()
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            of_all = set.intersection(*(dominators[i] for i in before[block] if i in dominators)) | {block}
            if of_all != dominators[block]:
                dominators[block], changed = of_all, True
    loops: dict[int, set[int]] = {}
    for block in order:
        for header in after[block] & dominators[block]:
            body = loops.setdefault(header, {header})
            pending = [block]
            while pending:
                member = pending.pop()
                if member not in body:
                    body.add(member)
                    pending += [i for i in before[member] if i in dominators]
    return loops


def widths(code: list[Instruction], name: str) -> str:
    """Accesses of one kind as "128x4 32x1"; 32 bits where the operation names no other width."""
    counts: Counter[int] = Counter()
    for instruction in code:
        if instruction.name == name:
            modifiers = instruction.operation.split(".")[1:]
            bits = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16|64|128|256)", m)]
            counts[bits[0] if bits else 32] += 1
    return " ".join(f"{bits}x{counts[bits]}" for bits in sorted(counts, reverse=True))


def count(code: list[Instruction], *names: str) -> int:
    return sum(instruction.name in names for instruction in code)


def describe(code: list[Instruction]) -> Row:
    """The table's columns of one kernel, but for its name."""
    parts, after = blocks(code)
    heavy: dict[int, str] = {}
    loops = natural_loops(after)
    for header in sorted(loops):
        body = [instruction for block in sorted(loops[header]) for instruction in parts[block]]
        exponentials = sum(instruction.operation.startswith("MUFU.EX2") for instruction in body)
        if exponentials > 0 or "128x" in widths(body, "STG"):
            heavy[header] = f"{len(body)}:{exponentials}"
    copies = [text for text in (widths(code, "LDGSTS"),) if text]
    if bulk := count(code, "UBLKCP"):
        copies.append(f"bulk x{bulk}")
    fences = sum(i.name == "MEMBAR" and re.search(r"\.(GPU|SYS)\b", i.operation) is not None for i in code)
    return {
        "instructions": str(sum(instruction.name != "NOP" for instruction in code)),
        "ldg": widths(code, "LDG"),
        "stg": widths(code, "STG"),
        "lds": widths(code, "LDS"),
        "sts": widths(code, "STS"),
        "copies": " ".join(copies),
        "local": str(count(code, "LDL", "STL")),
        "fences": str(fences),
        "cctl": str(sum(instruction.operation.startswith("CCTL.IV") for instruction in code)),
        "loops": " ".join(text for header, text in heavy.items() if not (heavy.keys() - {header}) & loops[header]),
    }


def table(cuobjdump: str, folder: Path, pairs: list[tuple[str, str]], version: str) -> list[Row]:
    """Rows of the objects that kernel_registers.compile_all left in `folder`."""
    rows = []
    for stem, arch in pairs:
        by_name = kernels(disassemble(cuobjdump, kernel_registers.object_path(folder, stem, arch)))
        for kernel, code in zip(demangle(list(by_name)), by_name.values(), strict=True):
            rows.append({"nvcc": version, "file": stem, "arch": arch, "kernel": kernel, **describe(code)})
    return sorted(rows, key=lambda row: (row["file"], int(row["arch"]), row["kernel"]))


def read_table() -> list[Row]:
    return kernel_registers.read_rows(TABLE)


def differences(compiled: list[Row], expected: list[Row]) -> list[str]:
    """What changed, a line each; empty where the tables are the same."""

    def by_kernel(rows: list[Row]) -> dict[str, Row]:
        return {f"{row['file']} sm_{row['arch']} {row['kernel']}": row for row in rows}

    before, now = by_kernel(expected), by_kernel(compiled)
    lines = []
    for kernel in sorted(before.keys() | now.keys()):
        if kernel not in before or kernel not in now:
            lines.append(f"{kernel}: {'new' if kernel in now else 'gone'}")
            continue
        changed = [c for c in COLUMNS[4:] if before[kernel][c] != now[kernel][c]]
        if changed:
            lines.append(f"{kernel}: " + "; ".join(f"{c} {before[kernel][c]} -> {now[kernel][c]}" for c in changed))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write both tables")
    action.add_argument("--print", nargs="?", const="", metavar="NAME", dest="name", help="print rows")
    arguments = parser.parse_args()
    nvcc, cuobjdump = kernel_registers.find_nvcc(), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        sys.stderr.write(f"{'nvcc' if nvcc is None else 'cuobjdump'} was not found: set CUDA_HOME\n")
        return 2
    version = kernel_registers.nvcc_version(nvcc)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reports = kernel_registers.compile_all(nvcc, folder)
        rows = table(cuobjdump, folder, sorted(reports), version)
    if arguments.write:
        kernel_registers.write_rows(TABLE, COLUMNS, rows)
        kernel_registers.write_rows(
            kernel_registers.TABLE, kernel_registers.COLUMNS, kernel_registers.table(reports, version)
        )
        sys.stdout.write(f"{TABLE.relative_to(ROOT)}: {len(rows)} kernels\n")
        return 0
    if arguments.name is not None:
        for row in rows:
            if arguments.name in row["kernel"]:
                sys.stdout.write(f"{row['file']} sm_{row['arch']} {row['kernel']}\n")
                sys.stdout.write("".join(f"    {c:13}{row[c]}\n" for c in COLUMNS[4:] if row[c] not in ("", "0")))
        return 0
    changed = differences(rows, read_table())
    sys.stdout.write("\n".join([*changed, f"{len(rows)} kernels, {len(changed)} differences"]) + "\n")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
