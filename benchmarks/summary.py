"""What `train_speed.py` measured, as one JSON object and as a table: medians over all timed steps of all rounds."""

import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from gemm import flop_per_token

from huarizo.host import cpu_flags

FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
LIBRARIES = ("torch", "transformers", "peft", "accelerate")
PEERS = ("trl", "liger_kernel", "unsloth")


@dataclass(frozen=True)
class Facts:
    """What was asked for, and what the rows are like: tokens of an average step, and the share that is learnt from."""

    model: str
    rows: str
    date: str
    steps: int
    rounds: int
    tokens_per_step: int
    labelled_share: float
    trl_path: str | None
    warm_up: int
    rows_a_step: int


def machine() -> dict[str, Any]:
    """Its CPU, those flags of it that matter here, and its card if there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    described: dict[str, Any] = {"cpu": names[0] if names else "unknown", "flags": sorted(cpu_flags() & set(FLAGS))}
    if torch.cuda.is_available():
        described["card"] = torch.cuda.get_device_name()
    return described


def versions(trl_path: str | None) -> dict[str, str]:
    """Of the libraries that were timed; peers' where they were found, in the environment or in their own folder."""
    found = {name: version(name) for name in LIBRARIES}
    for peer in PEERS:
        there = [*distributions(name=peer), *(distributions(name=peer, path=[trl_path]) if trl_path else [])]
        found |= {peer: there[0].version} if there else {}
    return found


def ratio(over: float, under: float) -> float:
    return round(over / under, 3)


def best(speeds: dict[str, float], ours: bool) -> float | None:
    """The fastest Huarizo, or the fastest of the others."""
    return max((speed for name, speed in speeds.items() if name.startswith("huarizo") == ours), default=None)


def ratios(speeds: dict[str, float]) -> dict[str, float]:
    """Those for which both sides ran."""
    ours, peer = best(speeds, True), best(speeds, False)
    pairs = {
        "ratio_to_tutorial": (ours, speeds.get("tutorial")),
        "ratio_to_best_peer": (ours, peer),
        "int8_to_bf16": (speeds.get("huarizo_int8"), speeds.get("huarizo_bf16")),
    }
    return {name: ratio(over, under) for name, (over, under) in pairs.items() if over and under}


def ceiling_shares(
    speeds: dict[str, float], gflops: dict[str, float], config: dict[str, Any], labelled: float
) -> dict[str, float]:
    """How much of the machine's matrix products of its own dtype each Huarizo run uses."""
    flop = flop_per_token(config, labelled) * 1e-9
    dtypes = {name: name.removeprefix("huarizo_") for name in speeds if name.startswith("huarizo_")}
    return {name: ratio(speeds[name] * flop, gflops[dtype]) for name, dtype in dtypes.items() if dtype in gflops}


def of_contender(runs: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Medians of one contender's runs; `quartiles` are the 25th and 75th percentiles of tokens a second.

    cpu_share is the part of the CPU threads' time that the timed steps got: far below the others' where something else
    was running on the machine.
    """
    pairs = [pair for run in runs for pair in list(zip(run["step_tokens"], run["step_seconds"], strict=True))[warm_up:]]
    speeds = [tokens / seconds for tokens, seconds in pairs]
    wall, cpu = (sum(sum(run[key][warm_up:]) for run in runs) for key in ("step_seconds", "step_cpu_seconds"))
    lower, _, upper = statistics.quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    return {
        "tokens_per_second": round(statistics.median(speeds), 1),
        "quartiles": [round(lower, 1), round(upper, 1)],
        "step_ms": round(1000 * statistics.median(seconds for _, seconds in pairs), 1),
        "cpu_share": round(cpu / wall / torch.get_num_threads(), 2),
        "warm_up_seconds": [round(sum(run["step_seconds"][:warm_up]), 1) for run in runs],
        "train_seconds": round(statistics.median(run["train_seconds"] for run in runs), 1),
        "end_to_end_seconds": round(statistics.median(run["end_to_end_seconds"] for run in runs), 1),
        "peak_memory_gb": round(max(run["peak_memory"] for run in runs) / 1e9, 2),
    }


def summary(
    facts: Facts, runs: dict[str, list[Any]], gflops: dict[str, float], config: dict[str, Any]
) -> dict[str, Any]:
    """The JSON object. Contenders that did not run are absent."""
    measured = {name: of_contender(its, facts.warm_up) for name, its in runs.items()}
    by_key = {key: {name: m[key] for name, m in measured.items()} for key in next(iter(measured.values()))}
    speeds = by_key["tokens_per_second"]
    shares = ceiling_shares(speeds, gflops, config, facts.labelled_share)
    about = {key: value for key, value in asdict(facts).items() if key != "trl_path"}
    about["labelled_share"] = round(facts.labelled_share, 3)
    return {
        **about,
        **by_key,
        **ratios(speeds),
        **({"int8_ceiling_share": shares["huarizo_int8"]} if "huarizo_int8" in shares else {}),
        "ceiling_share": shares,
        "gemm_gflops": {dtype: round(rate, 1) for dtype, rate in gflops.items()},
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(facts.trl_path),
    }


def table(result: dict[str, Any]) -> str:
    """One line a contender."""
    head = f"{'contender':<14}{'tokens/s':>9}{'quartiles':>16}{'step ms':>10}{'end to end s':>14}{'peak GB':>9}"
    lines = [f"{head}{'x tutorial':>12}"]
    tutorial = result["tokens_per_second"].get("tutorial")
    for name, speed in result["tokens_per_second"].items():
        lower, upper = result["quartiles"][name]
        times = f"{speed / tutorial:.2f}" if tutorial else "-"
        lines.append(
            f"{name:<14}{speed:>9.1f}{f'{lower:.1f}-{upper:.1f}':>16}{result['step_ms'][name]:>10.1f}"
            f"{result['end_to_end_seconds'][name]:>14.1f}{result['peak_memory_gb'][name]:>9.2f}{times:>12}"
        )
    return "\n".join(lines)
