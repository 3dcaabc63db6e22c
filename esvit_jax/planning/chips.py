"""What the TPUs that one can rent are made of."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, all its cores together.

    Attributes:
      memory: bytes of main memory (HBM).
      bandwidth: bytes a second to and from it.
      peak_flops: bfloat16 operations a second; a multiply-add is two.
      topology_name: what libtpu calls the generation in the name of a topology.
      accelerator_type: what Google Cloud calls a slice, for a number of chips to be filled in.
      cores_in_type: what that number counts in a chip.
      config_name: libtpu's; "megacore" makes one device of a chip's two cores.
      matrix_units: multiply-add grids, of all cores.
      matrix_unit_side: multiply-adds along a side of one.
      link_bandwidth: bytes a second that a chip sends to its neighbours, over all its links.
      kernel_bundles: of our kernels, beside those that a v5e takes, about (docs/notes/kernels.md).
    """

    memory: int
    bandwidth: float
    peak_flops: float
    topology_name: str
    accelerator_type: str
    matrix_units: int
    link_bandwidth: float
    matrix_unit_side: int = 128
    cores_in_type: int = 1
    config_name: str = "default"
    kernel_bundles: float = 1.0

    @property
    def devices(self) -> int:
        """How many a compiler sees: a core is one, but two cores as a megacore are one."""
        return self.cores_in_type if self.config_name == "default" else 1

    @property
    def clock(self) -> float:
        """Cycles a second, of which the peak follows: 1.5e9 of a v5e."""
        return self.peak_flops / (self.matrix_units * 2 * self.matrix_unit_side**2)


# Sources. v2: Jouppi et al., "A domain-specific supercomputer for training deep neural networks",
# CACM 63(7), 2020. The others: the pages "TPU v3", "TPU v4", "TPU v5p", "TPU v5e", "TPU v6e" and
# "TPU7x (Ironwood)" of Google Cloud's documentation. A memory of "16 GB" there is 16 GiB, as the
# compiler's limits show. Of v6e and v7x each matrix unit counts twice: the compiler expects 3.0
# million cycles of a product of 8192³ on a v6e, which two grids of 256² that do one product each a
# cycle could not reach (4.2 million).
CHIPS = {
    "v2": Chip(16 * GIB, 700e9, 46e12, "v2", "v2-{}", 2, 248e9, cores_in_type=2),
    "v3": Chip(32 * GIB, 900e9, 123e12, "v3", "v3-{}", 4, 328e9, cores_in_type=2),
    "v4": Chip(
        32 * GIB, 1200e9, 275e12, "v4", "v4-{}", 8, 300e9, cores_in_type=2, config_name="megacore",
        kernel_bundles=1.6,
    ),
    "v5e": Chip(16 * GIB, 819e9, 197e12, "v5e", "v5litepod-{}", 4, 200e9),
    "v5p": Chip(
        95 * GIB, 2765e9, 459e12, "v5p", "v5p-{}", 8, 600e9, cores_in_type=2, config_name="megacore"
    ),
    "v6e": Chip(32 * GIB, 1638e9, 918e12, "v6e", "v6e-{}", 4, 448e9, matrix_unit_side=256),
    "v7x": Chip(
        192 * GIB, 7380e9, 2307e12, "tpu7x", "tpu7x-{}", 8, 600e9, matrix_unit_side=256,
        cores_in_type=2,
    ),
}  # fmt: skip
