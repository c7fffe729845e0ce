"""Memory that the kernels of a device need besides quantized weights. Does not import torch."""

from __future__ import annotations

from ascendit.device.device import Device
from ascendit.device.limits import QuantizedLayer
from ascendit.quant.schemes import SCHEMES


def prepared_bytes(layer: QuantizedLayer, device: Device, *, reference: bool, emulate: str | None) -> int:
    """Bytes that a kernel stores besides the parameters: decoded copies, scales in the layout of an NPU.

    `reference`: the plain PyTorch kernels run. `emulate`: the load option.
    """
    _, scheme, (n, k) = layer
    if device.operators == "npu" and not reference and scheme in device.native_schemes:
        return _npu_bytes(scheme, n, k, restricted=device.chip != "a5")
    if emulate != "decode-once":
        return 0
    if reference or device.operators == "npu":
        return 4 * n * k
    if device.operators == "cpu":
        return 0 if SCHEMES[scheme].multiplied_on_cpu else 2 * -(-n // 64) * 64 * k
    return 2 * n * k


def _npu_bytes(scheme: str, n: int, k: int, *, restricted: bool) -> int:
    """Bytes that the layouts of an NPU add: scales in pairs, biases, int8_block padded on a2 and a3."""
    blocks, groups = -(-k // 32), -(-k // 512)
    total = n * (blocks + 1) if SCHEMES[scheme].block and blocks % 2 else 0
    total += 4 * n * groups if scheme == "mxfp4_dualscale" and groups > 1 else 0
    total += 2 * n if scheme == "mxfp4" else 0
    if SCHEMES[scheme].tile:
        rows, columns = (-(-n // 256) * 256, groups * 512) if restricted else (n, k)
        padded = (rows, columns) != (n, k)
        total += 4 * rows + (rows * columns - n * k if padded else 0)
        tiles = -(-rows // 128) * -(-columns // 128)
        total += 4 * tiles if tiles != -(-n // 128) * -(-k // 128) else 0
    return total
