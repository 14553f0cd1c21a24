"""Kernels of the variants, compiled for chips that this machine does not have.

    python -m pallas_kernels.aot tpu --variant moneta yaad memora titans ttt_mlp \\
        ttt_linear > experiments/kernels/v5e_64.txt
    python -m pallas_kernels.aot tpu --d 128 --no-xla --variant yaad memora \\
        gated_delta_net \\
        > experiments/kernels/v5e_128.txt

and the like for the other tables here. Expected: the tables as committed, up to changes
of the compiler (libtpu 0.0.42.1). They are facts of compiled programs, not timings.
"""
