"""A cost model of the GPU plans: what each kernel asks of the device, hence a predicted time, made to be refuted.

A tile of S goes through a main loop (tensor cores, shared memory, L2) and an epilogue (exponentials, instructions).
With r tiles resident on an SM, it lets one through in

    max(main, epilogue, (main + epilogue + latency) / r),  main = max(tensor, shared, l2), epilogue = max(exps, issue):

for without warp specialisation a tile overlaps only with its neighbours. Kernels follow one another; each takes at
least its bytes over the copy bandwidth. :mod:`benchmarks.around` counts what PyTorch does around them. The numbers
below that are no device's are read off the kernels compiled for sm_90, or assumed; none was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.around import Counted, around_kernels
from benchmarks.cases import Case
from benchmarks.devices import Device
from fastcl import tuning
from fastcl.backends import panels

PLANS = ("panels", "registers", "one sweep")
"""panels: W goes through memory. registers: a backward whose accumulators live in registers, in the repository for
symmetric plans. one sweep: value and gradient from one panel of whole rows (one direction only)."""
PASSES = {
    "nt_xent": {"panels": 2, "registers": 2.5},
    "clip": {"panels": 4, "registers": 5},
    "info_nce": {"panels": 4, "registers": 4, "one sweep": 3},
}
"""Sweeps of N * M * D multiply-adds of each plan."""

TERMS = {
    "operands from L2 and shared memory": ("shared", "l2"),
    "exponentials and instructions": ("exps", "issue"),
    "latency": ("latency",),
    "idle SMs": ("waves",),
    "panels through memory": ("memory",),
    "PyTorch around the kernels": ("around",),
    "launches": ("launches",),
}
"""What a plan pays for besides its products: what it would save were these free tells which one matters."""

LATENCY = {"load": 1000, "partials": 200}
"""Clocks until a tile's first operands have come, and for a column's partial sums, read before, to be written."""
LAUNCH = {"torch": 5e-6, "triton": 15e-6, "call": 60e-6}
"""Seconds of the host for an operator, for a kernel of Triton, and for autograd and the custom operator of a call."""
SUPER_TILES = 32
REGISTER_EPILOGUE = (1.2, 125)
"""Registers of a thread for each of its elements of S and of the sums, and besides, compiled for sm_90."""
REGISTER_WIDTH = 256
"""Columns of an accumulator that fit into registers; a wider D recomputes S for each such slice."""
_LIBRARY_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128))

Free = frozenset[str]


class Epilogue(NamedTuple):
    """What one thread does for its share of a tile, in instructions: for each logit, and once."""

    slots: tuple[float, float]
    registers: tuple[float, float]
    """for each logit, and besides"""


EPILOGUES = {
    ("sweep", False): Epilogue((3, 60), (1.6, 75)),
    ("sweep", True): Epilogue((8, 250), (1.2, 100)),
    ("weights", False): Epilogue((6, 200), (1.1, 60)),
    ("weights", True): Epilogue((10, 150), (1.2, 100)),
}
"""By kernel, and whether terms along both axes are there: counted in the code compiled for sm_90, without masks."""
MASKED = 2.0
"""Slots of an exceptional tile's logit over a plain one's."""


@dataclass(frozen=True)
class Precision:
    """How one dtype is multiplied: by tl.dot in the kernels (so many products of a class), and by the library."""

    itemsize: int
    dot: str
    products: int
    library: str
    tuned_as: str


PRECISIONS = {
    "bfloat16": Precision(2, "half", 1, "half", "half"),
    "float16": Precision(2, "half", 1, "half", "half"),
    "tf32": Precision(4, "tf32", 1, "tf32", "tf32"),
    "float32": Precision(4, "tf32", 3, "float32", "float32"),
}
"""float32 is at the matmul precision "highest", tf32 at "high"."""


@dataclass(frozen=True)
class Prediction:
    """A case's time on a device and what it is made of."""

    seconds: float
    floor: float
    """seconds of the case's floor in passes at the library's rate"""
    parts: dict[str, float]
    """seconds by kernel; the host's time is not among them"""
    memory: int
    """bytes beyond the inputs"""
    bound: str
    """which of ``TERMS`` would save most time were it free"""
    saved: float
    """the share of the time that would be saved"""

    @property
    def fraction(self) -> float:
        return self.floor / self.seconds


def backend_plan(case: Case, device: Device, precision: str | None = None) -> str:
    """Which of panels and registers the `triton` backend takes: what the device's table says."""
    tuned_as = PRECISIONS[precision or case.dtype].tuned_as
    fits = case.loss == "nt_xent" and tuning.registers(tuned_as, device.capability, case.dim) is not None
    return "registers" if fits else "panels"


def predict(case: Case, device: Device, plan: str | None = None, precision: str | None = None) -> Prediction:
    """The prediction for value and gradients, by default for the plan of ``backend_plan``.

    Raises:
        ValueError: the loss has no such plan.
    """
    plan = plan or backend_plan(case, device, precision)
    seconds = predicted_seconds(case, device, plan, precision)
    model = _Model(case, device, PRECISIONS[precision or case.dtype])
    parts = model.parts(plan, frozenset())
    without = {name: model.total(plan, frozenset(terms)) for name, terms in TERMS.items()}
    bound = min(without, key=lambda name: without[name])
    memory = around_kernels(case, tuning.workspace_bytes(device.capability)).peak
    floor = case.floor_flops / device.gemm[model.precision.library]
    return Prediction(seconds, floor, parts, memory, bound, 1 - without[bound] / seconds)


def predicted_seconds(
    case: Case, device: Device, plan: str | None = None, precision: str | None = None, *, free: Iterable[str] = ()
) -> float:
    """The time alone, were the costs in ``free`` nothing."""
    plan = plan or backend_plan(case, device, precision)
    if plan not in PASSES[case.loss]:
        raise ValueError(f"plan is {plan!r}, expected one of {', '.join(PASSES[case.loss])} for {case.loss}")
    return _Model(case, device, PRECISIONS[precision or case.dtype]).total(plan, frozenset(free))


def crossover(loss: str, device: Device, pairs: int, dtype: str = "bfloat16") -> int | None:
    """The smallest D, in steps of 64, from which W panels are predicted to be faster than accumulators in registers."""
    depths = range(64, 1025, 64)
    faster = [_panels_win(Case(loss, pairs, d, dtype), device) for d in depths]
    return next((d for i, d in enumerate(depths) if all(faster[i:])), None)


def _panels_win(case: Case, device: Device) -> bool:
    return predicted_seconds(case, device, "panels") < predicted_seconds(case, device, "registers")


def clocks_per_logit(case: Case, device: Device, kernel: str, config: tuning.Config, precision: str) -> float:
    """What one logit costs an SM in ``kernel`` ("sweep" or "weights") with this configuration, to order candidates.

    Infinite where it would spill.
    """
    model = _Model(case, device, PRECISIONS[precision])
    each, rest = EPILOGUES[kernel, model.both_axes].registers
    if each * config.block_m * config.block_n / (32 * config.num_warps) + rest > 256:
        return math.inf
    clocks, _ = model._tile_clocks(kernel, config, frozenset())
    return clocks / (config.block_m * config.block_n)


def shared_memory(config: tuning.Config, itemsize: int) -> int:
    """Bytes of shared memory that a kernel's pipeline takes."""
    return config.num_stages * (config.block_m + config.block_n) * config.block_d * itemsize


def resident(device: Device, shared: int, registers: float, warps: int) -> int:
    """Tiles in flight on one SM."""
    by_registers = device.registers // (32 * warps * min(255, math.ceil(registers)))
    return max(1, min(by_registers, device.shared_memory // (shared + 1024), 2048 // (32 * warps)))


def operand_reads(config: tuning.Config, capability: tuple[int, int]) -> float:
    """Elements of shared memory that tensor instructions read for each step along D.

    A warp group (sm_90) reads rows of 64 and all its columns, sm_100 the tile's operands once, an older warp its own.
    """
    if capability[0] >= 10:
        return config.block_m + config.block_n * math.ceil(config.block_m / 128)
    units, least = (config.num_warps // 4, 64) if capability[0] == 9 else (config.num_warps, 16)
    splits = [(m, units // m) for m in (1, 2, 4, 8, 16) if units % m == 0 and config.block_m // m >= least]
    m, n = min(splits or [(1, units)], key=lambda split: config.block_m / split[0] + config.block_n / split[1])
    if capability[0] == 9:
        # each 64 rows are an instruction of their own and read the columns again
        return config.block_m * n + config.block_n * config.block_m / 64
    return config.block_m * n + config.block_n * m


class _Model:
    def __init__(self, case: Case, device: Device, precision: Precision) -> None:
        self.case, self.device, self.precision = case, device, precision
        self.symmetric = case.loss == "nt_xent"
        self.both_axes = case.loss != "info_nce"
        self.n, self.d = case.rows, case.dim

    def total(self, plan: str, free: Free) -> float:
        """The device's time or the host's, whichever is longer."""
        host = 0.0 if "launches" in free else self._host(plan)
        return max(sum(self.parts(plan, free).values()), host)

    def parts(self, plan: str, free: Free) -> dict[str, float]:
        around = 0.0 if "around" in free else self._around().bytes / self.device.copy
        match plan:
            case "panels":
                kernels = {"sweep": self._sweep(free)} | self._panels(free)
            case "registers":
                kernels = self._registers(free)
            case "one sweep":
                kernels = self._one_sweep(free)
        return kernels | {"around": around}

    def _host(self, plan: str) -> float:
        # the sweep, and for each axis its partial results combined
        kernels = self._around().kernels + 1 + (2 if self.both_axes and not self.symmetric else 1)
        count = len(self._cut(self._config("weights")))
        products = 2 * count if plan != "registers" else 0
        kernels += count if plan != "registers" else 1 if self.symmetric else 2
        return LAUNCH["call"] + LAUNCH["torch"] * (self._around().operators + products) + LAUNCH["triton"] * kernels

    def _around(self) -> Counted:
        return around_kernels(self.case, tuning.workspace_bytes(self.device.capability))

    def _config(self, kernel: str) -> tuning.Config:
        name = kernel + ("_symmetric" if self.symmetric else "")
        return tuning.lookup(name, self.precision.tuned_as, self.device.capability, n=self.n, m=self.n, d=self.d)

    def _elements(self) -> int:
        return min(tuning.workspace_bytes(self.device.capability) // self.precision.itemsize, panels.MOST_ELEMENTS)

    def _cut(self, config: tuning.Config) -> list[panels.Panel]:
        """The backward's panels."""
        return panels.cut(self.n, self.n, (config.block_m, config.block_n), self._elements(), self.symmetric)

    def _tile_clocks(
        self, kernel: str, config: tuning.Config, free: Free, *, slots: int | None = None, masked: float = 1.0
    ) -> tuple[float, int]:
        """Clocks that an SM takes for one tile, and how many tiles it has in flight, ``slots`` where that is known."""
        device, epilogue = self.device, EPILOGUES[kernel, self.both_axes]
        area, item = config.block_m * config.block_n, self.precision.itemsize
        threads = 32 * config.num_warps
        operands = (config.block_m + config.block_n) * self.d * item
        reads = operand_reads(config, device.capability) * self.d * item
        # W's factors, exp(c - L), are made again by each thread that looks at a row or column
        exps = area + (threads * (config.block_m + config.block_n) / 8 if kernel == "weights" and self.both_axes else 0)
        per_logit, once = epilogue.slots
        cost = {
            "tensor": self.precision.products * 2 * area * self.d / self._tensor_rate(),
            "shared": (self.precision.products * reads + operands) / device.shared_bytes,
            "l2": operands / device.l2_bytes,
            "exps": exps / device.exponentials,
            "issue": (masked * per_logit * area + once * threads) / device.lanes,
            "latency": LATENCY["load"] + (LATENCY["partials"] if kernel == "sweep" and self.both_axes else 0),
        }
        cost |= dict.fromkeys(free & cost.keys(), 0.0)
        main = max(cost["tensor"], cost["shared"], cost["l2"])
        after = max(cost["exps"], cost["issue"])
        each, rest = epilogue.registers
        tiles = slots or resident(device, shared_memory(config, item), each * area / threads + rest, config.num_warps)
        return max(main, after, (main + after + cost["latency"]) / tiles), tiles

    def _mean_tile_clocks(self, kernel: str, config: tuning.Config, free: Free) -> tuple[float, int]:
        """As ``_tile_clocks``, with the tiles on the diagonals of self pairs and positives made in pieces."""
        plain, slots = self._tile_clocks(kernel, config, free)
        side = min(config.piece, config.block_m, config.block_n)
        piece = replace(config, block_m=side, block_n=side)
        each, _ = self._tile_clocks(kernel, piece, free, slots=slots, masked=MASKED)
        pieces = config.block_m * config.block_n / side**2
        if "tensor" in free or "waves" in free:
            return plain, slots
        tiles = tile_count(self.n, config, self.symmetric)
        share = min(1.0, (1.5 if self.symmetric else 1.0) * self.n / config.block_m / tiles)
        return plain + share * max(0.0, pieces * each - plain), slots

    def _tensor_rate(self) -> float:
        """FLOP/clock of an SM; the library's rate has power limits in it, which hold for everyone."""
        return self.device.gemm[self.precision.dot] / self.device.sms / self.device.clock

    def _on_sms(self, programs: float, each: float, slots: int, free: Free) -> float:
        """Seconds of so many programs, each of which takes an SM's clocks when ``slots`` are in flight."""
        places = self.device.sms * slots
        waves = programs / places if "waves" in free else math.ceil(programs / places)
        return waves * slots * each / self.device.clock

    def _sweep(self, free: Free) -> float:
        config = self._config("sweep")
        clocks, slots = self._mean_tile_clocks("sweep", config, free)
        rows, columns = (super_tiles(self.n, block)[1] for block in (config.block_m, config.block_n))
        tiles = tile_count(self.n, config, self.symmetric)
        programs = rows * (rows + 1) / 2 if self.symmetric else rows * columns
        seconds = self._on_sms(programs, clocks * tiles / programs, slots, free)
        matrix = self.n * self.d * self.precision.itemsize
        waves = math.ceil(programs / self.device.sms / slots)
        moved = matrix * (1 + (1 if 2 * matrix < self.device.l2_size else waves))
        return self._at_least(seconds, moved, free)

    def _panels(self, free: Free) -> dict[str, float]:
        config = self._config("weights")
        clocks, slots = self._mean_tile_clocks("weights", config, free)
        weights = products = 0.0
        item = self.precision.itemsize
        for panel in self._cut(config):
            rows, columns = panel.shape
            tiles = math.ceil(rows / config.block_m) * math.ceil(columns / config.block_n)
            if panel.mirror:
                side = math.ceil(rows / config.block_m)
                tiles = side * (side + 1) // 2
            weights += self._at_least(self._on_sms(tiles, clocks, slots, free), rows * columns * item, free)
            products += self._product(rows, self.d, columns, free)
            if not panel.mirror:
                products += self._product(columns, self.d, rows, free)
        return {"weights": weights, "products": products}

    def _product(self, m: int, n: int, k: int, free: Free) -> float:
        """C += A @ B by the library with C in float32, without splitting k."""
        best = math.inf
        for tile_m, tile_n in _LIBRARY_TILES:
            tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n)
            rate = self.device.gemm[self.precision.library] / self.device.sms
            # a smaller tile is as fast as its operands come
            rate *= min(1.0, tile_m * tile_n / (tile_m + tile_n) / 64)
            rounds = tiles / self.device.sms if "waves" in free else math.ceil(tiles / self.device.sms)
            best = min(best, rounds * 2 * tile_m * tile_n * k / rate)
        if "tensor" in free:
            best = 0.0
        return self._at_least(best, (m + n) * k * self.precision.itemsize + 8 * m * n, free)

    def _registers(self, free: Free) -> dict[str, float]:
        """Each owner of rows recomputes its S for each slice of D that its accumulator holds, then W times it."""
        width = min(2 ** math.ceil(math.log2(self.d)), REGISTER_WIDTH)
        config = tuning.registers(self.precision.tuned_as, self.device.capability, width)
        config = config or tuning.Config(64, 64, width, 4, 2)
        slices = math.ceil(self.d / width)
        device, item = self.device, self.precision.itemsize
        area, other = config.block_m * config.block_n, config.block_n * self.d * item
        per_logit, once = EPILOGUES["weights", self.both_axes].slots
        reads = slices * operand_reads(config, device.capability) * self.d * item + other * config.block_m / 64
        cost = {
            "tensor": self.precision.products * 2 * area * self.d * (slices + 1) / self._tensor_rate(),
            "shared": (self.precision.products * reads + slices * other) / device.shared_bytes,
            "l2": slices * other / device.l2_bytes,
            "exps": slices * area / device.exponentials,
            "issue": slices * (per_logit * area + once * 32 * config.num_warps) / device.lanes,
        }
        cost |= dict.fromkeys(free & cost.keys(), 0.0)
        main, after = max(cost["tensor"], cost["shared"], cost["l2"]), max(cost["exps"], cost["issue"])
        each, rest = REGISTER_EPILOGUE
        registers = each * config.block_m * (width + config.block_n) / (32 * config.num_warps) + rest
        shared = (config.block_m + config.num_stages * config.block_n) * width * item
        slots = resident(device, shared, registers, config.num_warps)
        clocks = max(main, after, (main + after) / slots)
        programs = math.ceil(self.n / config.block_m)
        once_over = self._on_sms(programs, clocks * math.ceil(self.n / config.block_n), slots, free)
        owners = 1 if self.symmetric else 2
        # one direction has its sums from the sweep that owns rows (flash-attention's shape)
        sweep = {} if self.case.loss == "info_nce" else {"sweep": self._sweep(free)}
        return sweep | {"rows and columns": owners * once_over}

    def _one_sweep(self, free: Free) -> dict[str, float]:
        """E = exp(S - c) of whole rows, its sums, dA = r * (E @ B), dB += E.T @ (r * A)."""
        config = self._config("weights")
        clocks, slots = self._tile_clocks("weights", config, free)
        height = min(self.n, max(config.block_m, self._elements() // self.n // config.block_m * config.block_m))
        kernel = products = 0.0
        for rows in _cut(self.n, height):
            tiles = math.ceil(rows / config.block_m) * math.ceil(self.n / config.block_n)
            seconds = self._on_sms(tiles, clocks, slots, free)
            kernel += self._at_least(seconds, rows * self.n * self.precision.itemsize, free)
            products += self._product(rows, self.d, self.n, free) + self._product(self.n, self.d, rows, free)
        return {"panels of E": kernel, "products": products}

    def _at_least(self, seconds: float, moved: float, free: Free) -> float:
        return seconds if "memory" in free else max(seconds, moved / self.device.copy)


def super_tiles(count: int, multiple: int) -> tuple[int, int]:
    """The side of the sweep's super-tiles and their number, as the forward chooses them."""
    side = math.ceil(math.ceil(count / multiple) / SUPER_TILES) * multiple
    return side, math.ceil(count / side)


def tile_count(n: int, config: tuning.Config, symmetric: bool) -> int:
    """Tiles of S that a sweep visits."""
    rows, columns = math.ceil(n / config.block_m), math.ceil(n / config.block_n)
    return rows * (rows + 1) // 2 if symmetric else rows * columns


def _cut(count: int, size: int) -> Iterable[int]:
    return [min(size, count - begin) for begin in range(0, count, size)]
