"""What GPUs can do at best, so that a step's share of it can be told."""

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


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations a second of a device's products in "bfloat16" or "float32"; None if unknown.

    >>> peak_flops("NVIDIA L4", "bfloat16")
    121000000000000.0
    """
    peaks = PEAK_FLOPS.get(device_kind)
    return peaks and peaks[dtype == "float32"]
