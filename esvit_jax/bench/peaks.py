"""What GPUs and TPUs can do at best, so that a step's share of it can be told."""

from esvit_jax.planning.chips import CHIPS

# Operations a second of dense matrix products, a multiply-add being two: in bfloat16, and in TF32,
# which is what float32 becomes in a product on these. By the name that jax gives the device. From
# NVIDIA's data sheets of A100, H100, H200 and L4; where those count sparse products, the half.
_A100, _H100 = (312e12, 156e12), (989e12, 494e12)
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H200": _H100,
    "NVIDIA L4": (121e12, 60e12),
}

# TPUs by the name that jax gives the device. Products of float32 are products of bfloat16 there,
# unless a precision is asked for.
TPUS = {
    "TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e",
    "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "v7x",
}  # fmt: skip


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations a second of a device's products in "bfloat16" or "float32"; None if unknown.

    >>> peak_flops("NVIDIA L4", "bfloat16")
    121000000000000.0
    >>> peak_flops("TPU v5 lite", "bfloat16")
    197000000000000.0
    """
    if device_kind in TPUS:
        chip = CHIPS[TPUS[device_kind]]
        return chip.peak_flops / chip.devices
    peaks = PEAK_FLOPS.get(device_kind)
    return peaks and peaks[dtype == "float32"]
