"""Write quantized.safetensors: small stacks as bitsandbytes stores and decodes them.

    python tests/golden/write_quantized.py

It was run once, with bitsandbytes 0.50.2. It uses bitsandbytes' plain code: the code for AVX-512
misreads rows whose length is not a multiple of the block.
"""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default import ops
from safetensors.torch import save_file

HERE = Path(__file__).parent
# name -> format, dtype, shape, blocksize, nested: whole blocks, blocks across rows and experts,
# each type once
CASES = {
    "a": ("nf4", torch.bfloat16, (2, 16, 64), 64, True),
    "b": ("nf4", torch.float16, (3, 10, 22), 128, True),
    "c": ("fp4", torch.float16, (3, 10, 22), 64, False),
    "d": ("fp4", torch.float32, (2, 8, 64), 256, True),
    "e": ("int8", torch.float16, (2, 6, 20), None, None),
}


def main() -> None:
    torch.manual_seed(0)
    tensors, cases = {}, {}
    for name, (format, dtype, shape, blocksize, nested) in CASES.items():
        stack = (torch.randn(shape) * 0.02).to(dtype)
        if format == "int8":
            codes, scales, _ = bnb.int8_vectorwise_quant(stack.view(-1, shape[-1]))
            dense = bnb.int8_vectorwise_dequant(codes, scales).to(dtype)
            found = {
                "codes": codes.view(shape),
                "scales": scales.view(*shape[:2], 1),
                "dense": dense.view(shape),
            }
            cases[name] = {"format": format, "tile": (1, shape[-1]), "unit": 7.874015718698502e-3}
        else:
            packed, state = bnb.quantize_4bit(
                stack, blocksize=blocksize, compress_statistics=nested, quant_type=format
            )
            found = {"packed": packed.view(-1), "code": state.code, "scales": state.absmax}
            scales = state.absmax
            if nested:
                found |= {
                    "nested_code": state.state2.code,
                    "nested_scales": state.state2.absmax,
                    "offset": state.offset,
                }
                scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            plain = ops._dequantize_4bit_compute.__wrapped__
            found["dense"] = plain(packed.view(-1), scales, state.code, blocksize, shape, dtype)
            cases[name] = {"format": format, "blocksize": blocksize}
        tensors |= {f"{name}.{part}": t.contiguous().clone() for part, t in found.items()}
    save_file(tensors, HERE / "quantized.safetensors", {"cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
