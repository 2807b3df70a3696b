"""The metrics of Triton that dashboards may name, as docs/user_guide/metrics.md of Triton has them.

The first set is held to a running Triton (tests/component/local). The second needs a GPU, which the
tests don't have: the same server exported all of it on an H100, utilisation as a share of 1.
"""

TRITON = frozenset(
    {
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_request_duration_us",
        "nv_inference_queue_duration_us",
        "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_compute_output_duration_us",
    }
)
TRITON_GPU = frozenset(
    {
        "nv_gpu_utilization",
        "nv_gpu_memory_total_bytes",
        "nv_gpu_memory_used_bytes",
        "nv_gpu_power_usage",
        "nv_gpu_power_limit",
        "nv_energy_consumption",
    }
)
