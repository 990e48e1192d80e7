"""What this machine's CPU can do."""

BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # torch's names, of x86 and Arm


def bfloat16_products() -> list[str]:
    """Names of the CPU's instructions that multiply bfloat16 numbers and that torch knows."""
    import torch

    known = torch.cpu.get_capabilities()
    return [name for name in BFLOAT16 if known.get(name)]
