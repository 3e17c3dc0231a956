"""What a denoiser costs: parameters, MACs, latency and memory."""

from ofadiff.profiling.cost import UnitCosts, count_macs, count_parameters, unit_costs, unit_parameters
from ofadiff.profiling.latency import LatencyCosts, latency_table, measure_latency_costs
from ofadiff.profiling.memory import measure_peak_memory, peak_memory_of
from ofadiff.profiling.timing import measure_latencies, processor_name

__all__ = [
    "LatencyCosts",
    "UnitCosts",
    "count_macs",
    "count_parameters",
    "latency_table",
    "measure_latencies",
    "measure_latency_costs",
    "measure_peak_memory",
    "peak_memory_of",
    "processor_name",
    "unit_costs",
    "unit_parameters",
]
