"""Adapters as things: load and unload by directory (vLLM's routes), download in PEFT's format, deletion of tuned models.

Owns: bodies and paths, the archive. Does not own: names and directories (models.py), what a job's deletion means
(jobs/service.py).
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse, PlainTextResponse
from pydantic import Field
from starlette.background import BackgroundTask

from coserve.core import NotFound
from coserve.peft.format import CONFIG_FILE, ORIGIN_FILE, WEIGHTS_FILE
from coserve.peft.remarks import GENERATION_FILE
from coserve.server.bodies.forms import Body, Form
from coserve.server.bodies.reader import body_reader
from coserve.server.errors import Forbidden
from coserve.server.index.disk import storage_errors
from coserve.server.inference.fields import FieldPolicy
from coserve.server.services import Served, Tenant

router = APIRouter(prefix="/v1", tags=["adapters"])
Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoadAdapterBody(Body):
    """vLLM's body. is_3d_lora_weight: only its default, false."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadAdapterBody(Body):
    """vLLM's body."""

    lora_name: Name


_LOAD_FORM = Form(model=LoadAdapterBody, prepare=FieldPolicy(implemented=LoadAdapterBody.model_fields).apply)
_UNLOAD_FORM = Form(model=UnloadAdapterBody, prepare=FieldPolicy(implemented=UnloadAdapterBody.model_fields).apply)
LoadBody = Annotated[LoadAdapterBody, Depends(body_reader(_LOAD_FORM))]
UnloadBody = Annotated[UnloadAdapterBody, Depends(body_reader(_UNLOAD_FORM))]


@router.post("/load_lora_adapter", response_class=PlainTextResponse, openapi_extra=_LOAD_FORM.openapi)
async def load_adapter(services: Served, tenant: Tenant, body: LoadBody) -> str:
    """Serves the adapter in a directory below --adapter-root. What its maker should know follows, a line each."""
    warnings = await services.models.load(tenant, body.lora_name, body.lora_path, replace=body.load_inplace)
    done = f"Success: LoRA adapter '{body.lora_name}' added successfully"
    return "\n".join((done, *(f"Warning: {warning}" for warning in warnings)))


@router.post("/unload_lora_adapter", response_class=PlainTextResponse, openapi_extra=_UNLOAD_FORM.openapi)
async def unload_adapter(services: Served, tenant: Tenant, body: UnloadBody) -> str:
    """Takes back what /v1/load_lora_adapter did; requests that use the adapter go on."""
    await services.models.unload(tenant, body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully"


@router.get("/adapters/{model:path}/download", response_class=FileResponse)
def download_adapter(model: str, services: Served, tenant: Tenant) -> FileResponse:
    """One's own adapter as a zip archive of a directory in PEFT's format."""
    if model in services.models.base_names:
        raise Forbidden(f"model: {model} is the base model; only adapters can be downloaded", param="model")
    record = services.models.find_record(tenant, model)
    if record.tenant != tenant:
        raise Forbidden(f"model: {model} is not an adapter of yours", param="model")
    archive = _archive(Path(services.models.find_files(record).directory))
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in model)
    afterwards = BackgroundTask(os.unlink, archive)
    return FileResponse(archive, media_type="application/zip", filename=f"{name}.zip", background=afterwards)


@router.delete("/models/{model:path}")
async def delete_model(model: str, services: Served, tenant: Tenant) -> dict[str, Any]:
    """Deletes a model that a job of one's own has made. also_deleted: names of checkpoints with the same weights."""
    gone = await services.jobs.delete_model(tenant, model)
    also = [name for name in gone if name != model]
    return {"id": model, "object": "model", "deleted": True, **({"also_deleted": also} if also else {})}


def _archive(directory: Path) -> str:
    """A temporary zip file of an adapter; weights don't compress. Raises NotFound, CapacityError."""
    with storage_errors():
        handle, path = tempfile.mkstemp(suffix=".zip", prefix="coserve-")
        try:
            with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in (CONFIG_FILE, WEIGHTS_FILE):
                    archive.write(directory / name, name)
                for name in (ORIGIN_FILE, GENERATION_FILE):
                    if (directory / name).is_file():
                        archive.write(directory / name, name)
        except BaseException as error:
            os.unlink(path)
            if isinstance(error, FileNotFoundError):
                raise NotFound("model: the files of this adapter are gone", param="model") from error
            raise
    return path
