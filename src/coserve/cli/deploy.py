"""`coserve deploy`: prints what starts a fleet on a cluster. It reads and changes nothing.

Owns: its arguments and their checks. Does not own: the texts (manifests.py).
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated

import typer

from coserve.cli.manifests import RAY_VERSION, Deployment, kuberay, machines
from coserve.config.values import require

FORMS = {"kuberay": kuberay, "serve": machines}
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
"""Of Kubernetes objects; KubeRay makes longer names of it."""


def deploy(
    form: Annotated[str, typer.Option("--print", help="kuberay: Kubernetes objects; serve: settings and systemd units.")],
    model: Annotated[str | None, typer.Argument(help="Directory or hub id on every machine (default SmolLM2).")] = None,
    replicas: Annotated[int, typer.Option(help="Replicas.")] = 3,
    gpus: Annotated[int, typer.Option(help="GPUs of one replica; 0: it runs on processors.")] = 1,
    cpus: Annotated[int, typer.Option(help="Processors of one replica.")] = 8,
    memory: Annotated[str, typer.Option(help="Memory of one replica, as Kubernetes writes it.")] = "32Gi",
    store: Annotated[str, typer.Option(help="Files of replicas: s3://BUCKET/PREFIX, or a directory that all see.")] =
        "s3://BUCKET/coserve",
    database_url: Annotated[str, typer.Option(help="PostgreSQL, without the password.")] =
        "postgresql://coserve@HOST/coserve",
    redis: Annotated[str | None, typer.Option(help="HOST:PORT of a Redis that keeps Ray's state.")] = None,
    head: Annotated[str, typer.Option(help="HOST:PORT of Ray's head; with kuberay it is a pod.")] = "HEAD:6379",
    image: Annotated[str, typer.Option(help="Image with Ray and coserve.")] = f"REGISTRY/coserve:ray{RAY_VERSION}",
    name: Annotated[str, typer.Option(help="Of the objects in Kubernetes.")] = "coserve",
) -> None:
    """Print manifests for a cluster. What has to be filled in is in capitals."""
    require(form in FORMS, "print", f"must be one of {', '.join(FORMS)}, got {form!r}")
    require(replicas >= 1, "replicas", f"must be at least 1, got {replicas}")
    require(gpus >= 0, "gpus", f"must be at least 0, got {gpus}")
    require(cpus >= 1, "cpus", f"must be at least 1, got {cpus}")
    require(_NAME.fullmatch(name) is not None, "name",
            f"must be at most 40 small letters, digits and dashes, from a letter on, got {name!r}")
    require("://" in store or PurePosixPath(store).is_absolute(), "store",
            f"must be s3://BUCKET/PREFIX or an absolute path, got {store!r}")
    require(database_url.startswith("postgresql"), "database_url", f"must be postgresql://..., got {database_url!r}")
    for field, value in (("redis", redis), ("head", head)):
        require(value is None or re.fullmatch(r"[^\s:]+:\d+", value) is not None, field, f"must be HOST:PORT, got {value!r}")
    print(FORMS[form](Deployment(
        name=name, image=image, model=model, replicas=replicas, gpus=gpus, cpus=cpus, memory=memory, store=store,
        database=database_url, redis=redis, head=head,
    )), end="")
