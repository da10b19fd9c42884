"""`coserve plan`: what training keeps and why, its peak memory stage by stage, the curve and the baselines.

Owns: arguments and files. Does not own: what is planned (planned.py), how it is shown (planview.py), the picture (plots.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from coserve.cli.planned import DTYPES, Asked, AskedRanks, make_plan
from coserve.cli.planview import show, title, to_json
from coserve.cli.settings import SHARDING_HELP, QuantizationOption
from coserve.config.data import ADAPTERS
from coserve.config.values import AUTO, require
from coserve.devices.table import DEVICES
from coserve.model.locate import locate_model
from coserve.plots import memory_plan

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


class PlanCommand(TyperCommand):
    """Lets `--json` without a value mean standard output."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--json" in args:
            after = args.index("--json") + 1
            if after == len(args) or (args[after].startswith("-") and args[after] != "-"):
                args = [*args[:after], "-", *args[after:]]
        return super().parse_args(ctx, args)


def plan(
    model: Annotated[str | None, typer.Argument(help="Model (SmolLM2); config.json is enough.")] = None,
    adapter: Annotated[str, typer.Option(help=f"Kind of adapter: {', '.join(ADAPTERS)}.")] = "lora",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank (16), or width of a bottleneck (64).")] = None,
    target_modules: Annotated[str | None, typer.Option(help="all-linear, or names joined by commas (the kind's own).")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of an example.")] = 1024,
    max_microbatch_tokens: Annotated[int | None, typer.Option(help="Tokens packed together (--sequence-length).")] = None,
    window_tokens: Annotated[int, typer.Option(help="Tokens per unit in the last stage and the curve.")] = 256,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}: bytes per element.")] = "float32",
    quantization: QuantizationOption = "none",
    activation_memory: Annotated[
        str, typer.Option(help="Limit of the total: bytes (12.5GB), a share below 1 of the fastest plan's, or auto: none.")
    ] = AUTO,
    activation_compression: Annotated[
        str, typer.Option(help="none, lossless (sign bits) or fp8, which changes gradients a little.")
    ] = "lossless",
    tensor_parallel_size: Annotated[int, typer.Option(help="Devices that share the model.")] = 1,
    device: Annotated[
        str, typer.Option(help=f"What they are, for the choice of shardings: {', '.join(DEVICES)}; or numbers; link=pcie4.")
    ] = "H100",
    adapter_sharding: Annotated[str, typer.Option(help=SHARDING_HELP)] = "",
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Leave transformers + peft out.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="[FILE|-]", help="Write the plan as JSON; - or nothing: standard output.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw stages and curve into this picture.")] = None,
) -> None:
    """What finetuning keeps from forward to backward, why, and how much memory it takes at which cost."""
    if plot is not None:
        check_output(plot, "plot", PLOT_SUFFIXES)
    if json_file not in (None, "-"):
        check_output(Path(str(json_file)), "json")
    targets: tuple[str, ...] | str | None = target_modules
    if target_modules is not None and target_modules != "all-linear":
        targets = tuple(name.strip() for name in target_modules.split(",") if name.strip())
    planned = make_plan(
        locate_model(model), Asked(kind=adapter, rank=rank, targets=targets, dropout=dropout), dtype=dtype,
        sequence_length=sequence_length, num_tokens=max_microbatch_tokens or sequence_length, window_tokens=window_tokens,
        limit=activation_memory, compression=activation_compression, quantization=quantization,
        with_baselines=not no_baselines,
        among=AskedRanks(size=tensor_parallel_size, device=device, adapter=adapter_sharding),
    )
    if json_file == "-":
        print(to_json(planned))
    else:
        show(planned)
    if json_file is not None and json_file != "-":
        Path(json_file).write_text(to_json(planned) + "\n")
    if plot is not None:
        picture = planned.baselines
        points = {"peft": picture.peft, "gradient checkpointing": picture.checkpointing}
        ratios = {"peft": 0.0, "gradient checkpointing": planned.estimate.checkpointing_flops_ratio}
        memory_plan(
            [(stage.name, stage.parts) for stage in planned.estimate.stages],
            [(point.total_bytes, point.extra_flops_ratio) for point in planned.estimate.curve],
            {name: (point.total_bytes, ratios[name]) for name, point in points.items() if point is not None},
            plot, title=title(planned),
        )


def check_output(path: Path, name: str, suffixes: Sequence[str] = ()) -> None:
    """Raises ConfigError for a file that can't be written, before anything is computed."""
    require(not suffixes or path.suffix in suffixes, name, f"the file's name must end in {', '.join(suffixes)}, got {path}")
    require(not path.is_dir(), name, f"{path} is a directory")
    require(path.parent.is_dir(), name, f"{path} can't be made, as there is no directory {path.parent}")
