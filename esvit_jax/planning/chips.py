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
    """

    memory: int
    bandwidth: float
    peak_flops: float
    topology_name: str
    accelerator_type: str
    cores_in_type: int = 1
    config_name: str = "default"


# Sources. v2: Jouppi et al., "A domain-specific supercomputer for training deep neural networks",
# CACM 63(7), 2020. The others: the pages "TPU v3", "TPU v4", "TPU v5p", "TPU v5e", "TPU v6e" and
# "TPU7x (Ironwood)" of Google Cloud's documentation. A memory of "16 GB" there is 16 GiB, as the
# compiler's limits show.
CHIPS = {
    "v2": Chip(16 * GIB, 700e9, 46e12, "v2", "v2-{}", 2),
    "v3": Chip(32 * GIB, 900e9, 123e12, "v3", "v3-{}", 2),
    "v4": Chip(32 * GIB, 1200e9, 275e12, "v4", "v4-{}", 2, "megacore"),
    "v5e": Chip(16 * GIB, 819e9, 197e12, "v5e", "v5litepod-{}"),
    "v5p": Chip(95 * GIB, 2765e9, 459e12, "v5p", "v5p-{}", 2, "megacore"),
    "v6e": Chip(32 * GIB, 1638e9, 918e12, "v6e", "v6e-{}"),
    "v7x": Chip(192 * GIB, 7380e9, 2307e12, "tpu7x", "tpu7x-{}", 2),
}
