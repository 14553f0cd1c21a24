"""What XLA is told in every test, before JAX starts."""


def xla_flags(devices: int) -> str:
    """Settings of a process with so many CPU devices that compiles and runs once.

    The older code generator, in one piece and at the lowest effort, takes a fourth to
    a tenth of the time for the same programs; how fast they then run does not count
    at these sizes. Devices that share few cores may wait long for each other before
    XLA gives up.
    """
    return (
        f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0"
        " --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
