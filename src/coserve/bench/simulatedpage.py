"""What the page of a simulation says of itself: that nothing was measured, the law, the memory, what is left out.

Owns: these words. Does not own: the page (report.py), the figures (simulate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from coserve.model.memory import GIB

NOTICE = (
    '<p class="lead"><strong>A simulation by arithmetic on a stated law, not a measurement.</strong> The scheduler, the pool '
    "of key-value blocks and the prefix cache are coserve's own. There was no accelerator: the clock is a number, and each "
    "iteration takes what the law at the end of this page gives for its rows.</p>"
)

_UNITS = (("bandwidth", "bytes/s"), ("peak_flops", "FLOP/s"), ("memory_bytes", "bytes"))


def simulated_method(data: Mapping[str, Any]) -> str:
    """The end of the page. data: the result file of a simulation."""
    return (
        f"<h2>What was simulated</h2>{_load(data['settings'])}{_memory(data['simulation'])}"
        "<p>Finetuning tokens are forward-token equivalents: a token counts as half when its forward pass is done and half "
        "when its backward pass is. Gain: goodput over capacity, plus finetuning throughput over finetune-only's. Forward rows "
        "in a pass: the share of finetuning's forward rows that were computed in one pass with requests' rows. Where reading "
        "the weights takes most of a pass, these rows cost little.</p>"
        "<p>Bound: the most tokens that any scheduler could train beside these requests under the same law. While requests "
        "run, every iteration of it lasts for the TPOT objective. Beside the rows of requests it holds as much training as "
        "fits, the best part of it in the pass. Optimizer steps are not counted.</p>"
        f"{_law(data['simulation'])}"
        "<p>Left out: prompts with a common prefix, requests with adapters, the contention of kernels, and the time that the "
        "host takes beside the device, unless it is given below. A real device is therefore slower; a measured profile or a "
        "lower efficiency says by how much.</p>"
        f"{_disturbance(data['simulation']['disturbance'])}"
        f"<p class=\"soft\">Command: <code>{escape(str(data.get('command', '')))}</code></p>"
    )


def _load(settings: Mapping[str, Any]) -> str:
    arrivals = settings["arrivals"]
    lengths = f"prompts of {arrivals['prompt_tokens']} and outputs of {arrivals['output_tokens']} tokens"
    if arrivals["length_scale"] is not None:
        lengths = f"the trace's own lengths times {arrivals['length_scale']:g}"
    elif arrivals["length_spread"]:
        lengths += f" in the mean (log-normal, standard deviation of the logarithm {arrivals['length_spread']:g})"
    return (
        f"<p>Arrivals: {escape(str(arrivals['kind']))}, {lengths}, together at most {arrivals['max_tokens']}. Requests that "
        f"came within {settings['duration']:g} s are counted, after a warm-up that lasts until as many leave as come. A job "
        "trains throughout each run except inference-only's. Requests that the engine refused, or that did not finish within "
        "their objectives after the last one came, count as missed. All policies at a rate see the same requests.</p>"
    )


def _memory(facts: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{escape(name)} {size / GIB:.1f} GiB" for name, size in facts["memory_bytes"].items())
    return (
        f"<p>Memory of each device: {parts}. The pool has room for {facts['key_value_tokens']} tokens of requests if nothing "
        f"trains. The job: {escape(facts['job_plan'])}. {facts['microbatches_that_fit']} of its micro-batches fit at once into "
        "the part of the pool that jobs may take.</p>"
    )


def _law(facts: Mapping[str, Any]) -> str:
    device = facts["device"]
    numbers = ", ".join(f"{name.replace('_', ' ')} {device[name]:.3g} {unit}" for name, unit in _UNITS)
    others = "".join(
        f"<tr><td>{escape(name)}</td><td>{value:.4g}</td></tr>" for name, value in device.items() if isinstance(value, float)
    )
    terms = "".join(f"<tr><td>{escape(name)}</td><td>{seconds:.4g}</td></tr>" for name, seconds in facts["law"].items())
    beside = "" if device["overlap"] == 1 else f", and {1 - device['overlap']:.0%} of the shorter"
    shared, size = "One device holds the model.", facts["tensor_parallel_size"]
    if size > 1:
        shared = f"{size} devices share the model, with two all-reduces per layer and direction over {device['link']['name']}."
    return (
        f"<h2>The law</h2><p>{escape(device['name'])}: {numbers}. Products with the weights take the longer of reading them "
        f"and of their arithmetic at {device['efficiency']:.0%} of the peak{beside}. Decode rows also read their keys and "
        f"values. A pass, a unit of training and each of its layers cost a constant. {shared}</p>"
        '<div class="charts"><div class="wide"><table><thead><tr><th>of the device</th><th>value</th></tr></thead>'
        f"<tbody>{others}</tbody></table></div>"
        '<div class="wide"><table><thead><tr><th>term of the law, from this amount on</th><th>seconds each</th></tr></thead>'
        f"<tbody>{terms}</tbody></table></div></div>"
    )


def _disturbance(given: Mapping[str, float]) -> str:
    said = []
    if given["noise"]:
        said.append(f"a relative error with a standard deviation of {given['noise']:.1%}")
    if given["stall_share"]:
        said.append(f"stalls in {given['stall_share']:.2%} of iterations, which take {given['stall_factor']:g} times as long")
    if given["slope"] != 1:
        said.append(f"rows that cost {given['slope']:g} times what the scheduler believes at first")
    if given["host_s"]:
        said.append(f"{given['host_s'] * 1e3:g} ms of the host in each iteration")
    if not said:
        return "<p>Iterations take exactly what the scheduler believes that they take.</p>"
    return f"<p>Iterations differ from the law by {', '.join(said)}. The scheduler learns of it from their times only.</p>"
