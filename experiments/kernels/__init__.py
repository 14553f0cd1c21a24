"""Every variant's kernels, compiled for chips that this machine does not have.

    python -m pallas_kernels.aot tpu --chip v5e --d 64 > experiments/kernels/v5e_64.txt

and the like for the other tables here. Expected: the tables as committed, up to changes
of the compiler (libtpu 0.0.42.1). They are facts of compiled programs, not timings.
"""
