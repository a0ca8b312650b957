"""Packing on openb by the published protocol of FGD (ATC'23): arrivals one by one, nothing moved, nothing refused that fits.

Allocated GPU % is the mean over the arrivals at which the demand so far rounds to 100 % (130 %) of the GPUs. Beside it a bound
(`benchmarks.packing_bound`): of whoever may refuse anything, and of whoever keeps all that ours took before it first had no room for a
job of one GPU; moves unlimited.

Any seed will do: where no order file is published, arrivals and ties are drawn as the published protocol draws them
(`benchmarks.protocol`); gains are then against our own FGD. The weights of the score were chosen so, on seeds 1001..1004:

    python -m benchmarks packing --seeds 1001,1002,1003,1004 --weights fragmentation=0.5
    python -m benchmarks packing --seeds 1001,1002,1003,1004 --ablation       # each weight set to nothing, one at a time
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import packing_bound, protocol, traces
from benchmarks.harness import Options, Report, require
from benchmarks.traces import Nodes, Trace
from scheduler.core.fit_kernels import fit_kernel
from scheduler.core.jit import kernel
from scheduler.core.pack import Packer, Run, classes_of
from scheduler.core.score import DEFAULT_WEIGHTS, MixEstimate, Weights, tables_for
from scheduler.core.state import State, refresh_all, take
from scheduler.core.types import I32, I64, Fleet, Request

Known = dict[tuple[str, str, int], tuple[float, float]]  # (trace, policy, seed) -> published % at the two points
POINTS = (100, 130)
TERMS = tuple(Weights.__annotations__)
CUTS = 16  # orders of tied shapes tried against a published run


@dataclass(frozen=True)
class Outcome:
    at: tuple[float, float]  # allocated % at the two points
    multi_drops: int
    placed: int
    refused_fitting: int
    kept: I64  # arrivals that were placed before the first job of one GPU was dropped


@kernel
def random_run(seed: int, seq: I32, qs: I64, s: State, host: I32) -> None:
    """Each replica on a host drawn evenly from those that fit: one look at every host."""
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator
    for i in range(len(seq)):
        q = qs[seq[i]]
        chosen, mask, fitting = -1, 0, 0
        for h in range(len(s.rows)):
            reason, m, _, _ = fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)
            if reason == 0:
                fitting += 1
                if np.random.randint(0, fitting) == 0:  # noqa: NPY002
                    chosen, mask = h, m
        host[i] = chosen
        if chosen >= 0:
            take(chosen, q, mask, s)


@kernel
def count_refused(seq: I32, qs: I64, s: State, host: I32, mask: I32) -> int:
    """Replays placements from an empty state; how many replicas were dropped although some host fitted."""
    refused = 0
    for i in range(len(seq)):
        q = qs[seq[i]]
        if host[i] >= 0:
            take(host[i], q, mask[i], s)
            continue
        for h in range(len(s.rows)):
            if fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)[0] == 0:
                refused += 1
                break
    return refused


def requests_of(trace: Trace) -> list[Request]:
    return [
        Request(
            job=i,
            cpu=int(cpu),
            ram=int(ram),
            gpus=int(gpus),
            gpu_milli=int(milli) if gpus else 1000,
            models=int(models),
        )
        for i, (cpu, ram, gpus, milli, models) in enumerate(trace.pods)
    ]


def play(
    nodes: Nodes,
    trace: Trace,
    seed: int,
    packer: str,
    *,
    online: bool = False,
    audit: bool = False,
    rank: list[int] | None = None,
    ties: int = 0,
    weights: Weights = DEFAULT_WEIGHTS,
) -> Outcome:
    """One run of one policy. `rank` of each node for ties, instead of the order file's; `ties` of the mix as `Trace.shapes`."""
    arrivals, permutation = trace.orders[seed]
    fleet = nodes.fleet(np.argsort(rank or permutation).tolist())
    vectors, of = classes_of(requests_of(trace))
    seq = of[arrivals]
    if packer == "random":
        placer = Packer(fleet, vectors, tables_for(fleet, trace.shapes(), "best_fit"))
        run = Run(seq)
        random_run(seed, run.seq, placer.classes, placer.state, run.host)
    elif online:
        run = _learning(fleet, vectors, trace, arrivals, seq, packer, weights)
    else:
        tables = tables_for(fleet, trace.shapes(ties=ties), packer, weights)
        run = Packer(fleet, vectors, tables, steps=len(seq)).place(seq)
    refused = 0
    if audit:
        fresh = Packer(fleet, vectors, tables_for(fleet, trace.shapes(), "best_fit"))
        refused = int(count_refused(run.seq, fresh.classes, fresh.state, run.host, run.mask))
    return _outcome(nodes, trace.pods[arrivals], run, refused)


def _learning(fleet: Fleet, vectors: I64, trace: Trace, arrivals: I64, seq: I32, packer: str, weights: Weights) -> Run:
    """The mix is learned from what has arrived: nothing known for the first 16, then new tables as it grows by a quarter."""
    mix = MixEstimate()
    placer = Packer(fleet, vectors, tables_for(fleet, [], packer, weights), steps=len(seq))
    whole, start, until = Run(seq), 0, 16
    rows = trace.pods[arrivals].tolist()
    while start < len(seq):
        part = Run(seq[start:until])
        placer.resume(part, 0)
        whole.host[start:until], whole.mask[start:until] = part.host, part.mask
        for cpu, ram, gpus, milli, models in rows[start:until]:
            mix.observe(cpu, ram, gpus, milli, models)
        start, until = until, min(len(seq), until + max(16, until // 4))
        placer.tables = tables_for(fleet, mix.shapes(), packer, weights)
        refresh_all(placer.state, placer.tables)
        placer.watts_returned()
    return whole


def _outcome(nodes: Nodes, pods: I64, run: Run, refused: int) -> Outcome:
    capacity = nodes.gpu_total * 1000
    asked = pods[:, 2] * pods[:, 3]
    placed = run.host >= 0
    demand = np.rint(100 * np.cumsum(asked) / capacity)
    allocated = 100 * np.cumsum(np.where(placed, asked, 0)) / capacity
    require(allocated[-1] <= 100, "more GPU placed than there is")
    at = tuple(float(allocated[demand == p].mean()) if np.any(demand == p) else float(allocated[-1]) for p in POINTS)
    single = np.flatnonzero(~placed & (pods[:, 2] == 1))
    kept = np.flatnonzero(placed[: single[0] if len(single) else len(placed)])
    return Outcome((at[0], at[1]), int((~placed & (pods[:, 2] > 1)).sum()), int(placed.sum()), refused, kept)


def bounds(nodes: Nodes, trace: Trace, seed: int, ours: Outcome) -> list[list[float]]:
    """By point: what nobody who refuses at will allocates more than, and nobody who keeps what `ours` took at first; % of the GPUs.
    Empty without `highspy`.
    """
    pods = trace.pods[trace.orders[seed][0]]
    demand = np.rint(100 * np.cumsum(pods[:, 2] * pods[:, 3]) / (nodes.gpu_total * 1000))
    found = []
    for i, point in enumerate(POINTS):
        last = int(np.flatnonzero(demand <= point)[-1]) + 1
        both = [
            packing_bound.allocated(nodes, pods[:last], pods[kept[kept < last]]) for kept in (ours.kept[:0], ours.kept)
        ]
        if None in both:
            return []
        found.append([value for value in both if value is not None])
        require(ours.at[i] <= found[-1][0] + 1e-6, f"{trace.name}, seed {seed}: more allocated than the bound says")
    return found


def ablation(
    nodes: Nodes, readers: dict[str, Callable[[], Trace]], seeds: tuple[int, ...], known: Known, weights: Weights
) -> dict[str, list[float]]:
    """Weight left out -> mean gain over FGD at 100 % and 130 %, and the worst list's, points; first with all of them."""
    every = [trace() for trace in readers.values()]
    base = [
        np.mean([known.get((t.name, "FGD", s)) or play(nodes, t, s, "fgd").at for s in seeds], axis=0) for t in every
    ]
    out = {}
    for name in ("none", *TERMS):
        w = weights if name == "none" else weights._replace(**{name: 0.0})
        ours = [np.mean([play(nodes, t, s, "tailrace", weights=w).at for s in seeds], axis=0) for t in every]
        gains = np.array(ours) - np.array(base)
        out[name] = [round(float(v), 3) for v in (*gains.mean(axis=0), gains.min())]
        print(
            f"without {name:16} {out[name][0]:+.3f} @100 {out[name][1]:+.3f} @130 {out[name][2]:+.3f} worst", flush=True
        )
    return out


def as_published(
    nodes: Nodes, trace: Trace, seed: int, known: tuple[float, float], ours: Outcome
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(FGD with the node order of the published run of this seed, the same as near as a cut of the mix comes to `known`).

    The order files' node order is the published generator's before, not after, the simulated scheduler drew from it: with
    that mended most lists agree to the last digit. Where the mix is cut among shapes asked for equally often, which of
    them are in was decided by the order of a hash map, anew in every published run: `CUTS` orders are tried, the nearest counts.
    An order file of another protocol keeps `ours`.
    """
    arrivals, _, rank = protocol.order(trace.pods, nodes.gpu_total, seed, len(nodes))
    if not np.array_equal(arrivals, trace.orders[seed][0]):
        return ours.at, ours.at
    plain = play(nodes, trace, seed, "fgd", rank=rank).at
    found = [plain]
    if trace.tied():
        found += [play(nodes, trace, seed, "fgd", rank=rank, ties=t).at for t in range(1, CUTS)]
    return plain, min(found, key=lambda at: abs(at[0] - known[0]) + abs(at[1] - known[1]))


def load(
    options: Options,
) -> tuple[Nodes, dict[str, Callable[[], Trace]], tuple[int, ...], Known, str]:
    """(nodes, lazily read traces, seeds, published figures, where from)."""
    folder = traces.directory(options.trace_dir)
    seeds = options.seeds or (traces.SEEDS[:1] if options.quick else traces.SEEDS)
    if folder is None:
        nodes, trace = traces.generate(200 if options.quick else 1200, seeds)
        return nodes, {trace.name: lambda: trace}, seeds, {}, "built-in generator"
    nodes = traces.read_nodes(folder)
    chosen = options.traces or traces.trace_names(folder)
    readers: dict[str, Callable[[], Trace]] = {name: partial(_read, folder, name, nodes, seeds) for name in chosen}
    return nodes, readers, seeds, traces.published(folder), "openb"


def _read(folder: Path, name: str, nodes: Nodes, seeds: tuple[int, ...]) -> Trace:
    """A pod list with an order for each seed: the file's, else drawn by the published protocol."""
    trace = traces.read_trace(folder, name, nodes.models, seeds)
    for seed in seeds:
        if seed not in trace.orders:
            arrivals, permutation, _ = protocol.order(trace.pods, nodes.gpu_total, seed, len(nodes))
            trace.orders[seed] = arrivals, permutation
    return trace


def run(options: Options) -> Report:
    unknown = {name for name, _ in options.weights} - set(TERMS)
    require(not unknown, f"--weights {', '.join(sorted(unknown))}: there are {', '.join(TERMS)}")
    weights = DEFAULT_WEIGHTS._replace(**dict(options.weights))
    nodes, readers, seeds, published, source = load(options)
    columns = "trace|random|best fit|FGD|ours|gain @100|gain @130|online|multi drops FGD/ours|FGD off published"
    table = [columns.split("|")]
    gains, online_gains, errors, plain_errors, refused, drops = [], [], [], [], 0, [0, 0]
    peer: dict[str, list[float]] = {"fgd": [], "best_fit": [], "random": []}
    default: list[float] = []
    singles: list[dict[str, Any]] = []
    limits: list[list[list[float]]] = []
    for name, reader in readers.items():
        trace = reader()
        used = list(seeds)
        runs = {p: [play(nodes, trace, s, p) for s in used] for p in ("fgd", "best_fit")}
        runs["random"] = [play(nodes, trace, used[0], "random")]
        runs["tailrace"] = [play(nodes, trace, s, "tailrace", audit=True, weights=weights) for s in used]
        runs["online"] = [play(nodes, trace, s, "tailrace", online=True, weights=weights) for s in used]
        require(min(o.placed for o in runs["tailrace"]) > 0, f"{name}: nothing placed")
        mean = {p: np.mean([o.at for o in outs], axis=0) for p, outs in runs.items()}
        known = [published[name, "FGD", s] for s in used if (name, "FGD", s) in published]
        base = np.mean([published.get((name, "FGD", s), o.at) for s, o in zip(used, runs["fgd"], strict=True)], axis=0)
        if known:
            again = [
                (published[name, "FGD", s], *as_published(nodes, trace, s, published[name, "FGD", s], o))
                for s, o in zip(used, runs["fgd"], strict=True)
                if (name, "FGD", s) in published
            ]
            target, plain, near = (np.mean([row[i] for row in again], axis=0) for i in range(3))
            errors.append(float(np.abs(near - target).max()))
            plain_errors.append(float(np.abs(plain - target).max()))
        for i, s in enumerate(used):
            limit = bounds(nodes, trace, s, runs["tailrace"][i]) if not (options.quick and limits) else []
            limits += [limit] if limit else []
            singles.append(
                {"trace": name, "seed": s, "FGD published": published.get((name, "FGD", s)), "bound": limit}
                | {p: outs[i].at for p, outs in runs.items() if i < len(outs)}
            )
        gains.append(mean["tailrace"] - base)
        online_gains.append(mean["online"] - base)
        refused += sum(o.refused_fitting for o in runs["tailrace"])
        drop = [sum(o.multi_drops for o in runs[p]) for p in ("fgd", "tailrace")]
        drops = [drops[0] + drop[0], drops[1] + drop[1]]
        for p, values in peer.items():
            values.append(float(mean[p][1]))
        if name == "default":
            default.append(float(mean["tailrace"][1]))
        table.append(
            [
                *(name, *(f"{mean[p][1]:.2f}" for p in ("random", "best_fit", "fgd", "tailrace"))),
                *(f"{g:+.2f}" for g in gains[-1]),
                *(f"{online_gains[-1].mean():+.2f}", f"{drop[0]}/{drop[1]}", f"{errors[-1]:.3f}" if known else "-"),
            ]
        )
    figures = {
        "fgd_abs_error_points": max(errors, default=0.0),
        "worst_gain_points": float(np.min(gains)),
        "mean_gain_points": float(np.mean(gains)),
        "refused_fitting": float(refused),
        "multi_gpu_drops_vs_fgd": drops[1] / max(1, drops[0]),
        "online_mix_cost_points": float(np.mean(gains) - np.mean(online_gains)),
        "default_at_130": default[0] if default else float("nan"),
    }
    must = {
        "fgd_abs_error_points": ("<=", 0.1),
        "worst_gain_points": (">=", 0.4),
        "mean_gain_points": (">=", 1.4),
        "refused_fitting": ("<=", 0.0),
        "multi_gpu_drops_vs_fgd": ("<=", 1.0),
        "online_mix_cost_points": ("<=", 0.3),
    }
    limited = {
        f"lp_{who}_at_{point}": float(np.mean([limit[i][j] for limit in limits]))
        for i, point in enumerate(POINTS)
        for j, who in enumerate(("free", "keeping_ours"))
        if limits
    }
    left_out = ablation(nodes, readers, seeds, published, weights) if options.ablation else {}
    if not default:
        figures["default_at_130"] = peer_mean = float(np.mean([g[1] for g in gains]) + np.mean(peer["fgd"]))
        require(peer_mean > 0, "nothing allocated")
    return Report(
        "packing",
        figures,
        {f"{p}_at_130": float(np.mean(v)) for p, v in peer.items()}
        | {"fgd_plain_error_points": max(plain_errors, default=0.0)}
        | limited,
        {
            "source": source,
            "traces": list(readers),
            "seeds": list(seeds),
            "nodes": len(nodes),
            "gpus": nodes.gpu_total,
            "weights": dict(zip(TERMS, weights, strict=True)),
            **({"left out: mean gain @100, @130, worst list": left_out} if left_out else {}),
        },
        must,
        table,
        singles,
    )
