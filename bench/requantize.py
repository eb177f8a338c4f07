"""Writes a GGUF file's matrices in another type, for a draft model that takes less to read.

    python bench/requantize.py MODEL.gguf OUT.gguf [--type Q4_0]

What a draft model says is verified, so what this loses costs guesses, never answers. Needs the `gguf` package (kvarn's
`dev` extra), which does the arithmetic. Vectors stay as they are. Not for models that answer: nothing is measured here.
"""

from __future__ import annotations

import argparse

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

UNQUANTIZED = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)


def requantize(source: str, out: str, kind: GGMLQuantizationType) -> None:
    """Writes `out`. Raises what the package raises for files that it cannot read."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            item = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if data.ndim >= 2 and stored not in UNQUANTIZED:
            data, stored = quants.quantize(quants.dequantize(data, stored), kind), kind
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL.gguf")
    parser.add_argument("out", metavar="OUT.gguf")
    parser.add_argument("--type", default="Q4_0", choices=["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
    args = parser.parse_args()
    requantize(args.source, args.out, GGMLQuantizationType[args.type])


if __name__ == "__main__":
    main()
