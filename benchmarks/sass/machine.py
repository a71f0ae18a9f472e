"""What an H100 can do in a cycle, and the time that follows from an instruction count."""

from collections.abc import Mapping
from math import floor
from typing import NamedTuple

from .listing import Instruction

# Of an H100 SXM. The clock is its boost clock; the bandwidth is that of a copy, not the 3.35 TB/s of its data sheet.
PROCESSORS, SCHEDULERS, HERTZ, BYTES_PER_SECOND = 132, 4, 1.755e9, 3.0e12
# Share of the cycles in which a scheduler with enough warps issues an instruction: an assumption.
SLOT_EFFICIENCY = 0.85
# Of a multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications).
WARPS, BLOCKS, REGISTERS, SHARED_BYTES, SHARED_BYTES_OF_BLOCK = 64, 32, 65536, 228 << 10, 1 << 10
REGISTER_UNIT = 256  # registers are given to warps in units of so many
WARP = 32

# Cycles for which a warp's instruction keeps a pipe of its scheduler busy: 32 lanes over the results that a scheduler's quarter
# of the multiprocessor has a cycle (CUDA C++ Programming Guide, throughput of arithmetic instructions, compute capability 9.0:
# 128 float additions, 64 integer and logic operations, 64 in double, 16 of transcendental functions and of conversions from and
# to 64 bits, 32 of shuffles, 16 of warp reductions). Loads and stores: one path of 128 bytes a cycle for four schedulers.
CYCLES = {"fma": 1.0, "imad": 2.0, "alu": 2.0, "fp64": 2.0, "xu": 8.0, "lsu": 4.0, "uniform": 2.0, "branch": 2.0}
FMA = ["FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "FSWZADD"]
FP64 = ["DADD", "DMUL", "DFMA", "DSETP", "DMNMX"]
XU = ["MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"]
# fmt: off
LSU = ["LD", "LDG", "LDS", "LDL", "LDC", "LDSM", "ST", "STG", "STS", "STL", "ATOM", "ATOMS", "ATOMG", "RED", "REDG", "SHFL",
       "REDUX", "MATCH", "LDGSTS", "LDGDEPBAR", "MEMBAR", "ERRBAR", "CCTL", "SYNCS", "STAS"]
BRANCH = ["BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "YIELD", "NANOSLEEP", "BAR", "NOP",
          "DEPBAR", "BPT", "KILL", "ENDCOLLECTIVE", "B2R", "BMOV", "RPCMOV"]
# fmt: on
PIPE_OF = {
    **dict.fromkeys(FMA, "fma"),
    **dict.fromkeys(FP64, "fp64"),
    **dict.fromkeys(XU, "xu"),
    **dict.fromkeys(LSU, "lsu"),
    **dict.fromkeys(BRANCH, "branch"),
    "IMAD": "imad",
}


def cycles_of(instruction: Instruction) -> dict[str, float]:
    """Returns the cycles for which an instruction keeps pipes busy."""
    name = instruction.name
    uniform = name.startswith("U") or name in ("R2UR", "S2UR")
    pipe = "uniform" if uniform else PIPE_OF.get(name, "xu" if name == "S2R" else "alu")
    cycles = CYCLES[pipe]
    if pipe == "imad":  # one half of the pipe for float multiplication does the integers too
        return {"imad": cycles, "fma": CYCLES["fma"]}
    if name in ("LDG", "LDS", "LDL", "STG", "STS", "STL", "LD", "ST"):
        cycles *= 4 if instruction.has("128") else 2 if instruction.has("64") else 1
    elif name == "REDUX":
        cycles *= 2
    return {pipe: cycles}


def resident_warps(registers: int, threads: int, shared: int) -> int:
    """Returns the warps of a multiprocessor, from registers, threads of a block and bytes of its shared memory."""
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = floor(REGISTERS / max(of_warp, 1)) // warps
    by_shared = SHARED_BYTES // (shared + SHARED_BYTES_OF_BLOCK)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared) * warps


class Prediction(NamedTuple):
    """The time of a token on the whole device, what bounds it, and the share of it that its bytes take."""

    seconds: float
    bound: str
    share: float


def predict(slots: float, cycles: Mapping[str, float], moved: float) -> Prediction:
    """Predicts from a token's slots, pipe cycles and bytes."""
    per_second = PROCESSORS * SCHEDULERS * HERTZ
    times = {pipe: count / per_second for pipe, count in cycles.items()}
    times |= {"slots": slots / (per_second * SLOT_EFFICIENCY), "memory": moved / BYTES_PER_SECOND}
    bound = max(times, key=lambda name: times[name])
    return Prediction(times[bound], bound, times["memory"] / times[bound])
