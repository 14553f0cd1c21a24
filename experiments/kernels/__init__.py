"""Kernels of the variants, compiled for chips that this machine does not have.

Each table has the command that made it in its first line:

    python -m pallas_kernels.aot tpu --no-xla --into experiments/kernels/v5e_64.txt
    python -m pallas_kernels.aot tpu --chip v6e --no-xla \\
        --into experiments/kernels/v6e_64.txt

and the like; h100.txt has one before each of its parts. With --into, rows that a table
has are not made again: compiling them all takes half an hour for a TPU and hours for a
GPU, can be cut at any row, and the same command adds what is missing at the end. Of
variants that are one program the first in the list of variants has a row: retnet for
lightning_attention and mamba2, gla for hgrn2, mamba for longhorn_diagonal. Softmax
attention is no scan and has none.

layers_v5e.txt tells what whole layers have around their kernels (`layers.py`),
v5e_64_xla.txt what plain XLA makes of four variants; tpu7x_64.txt has part of the
variants.

Expected: the tables as committed, up to changes of the compiler (libtpu 0.0.42.1). They
are facts of compiled programs, not timings. A row that says "does not compile" has the
reason in its own words: GPU kernels take no exact readout.
"""
