"""What --model_name names: a folder below models/, a path, or a hub id that is looked up in the local hub cache. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spilt.artifacts.store import Store, checked_name
from spilt.errors import UserError, first_line
from spilt.model import checkpoint

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
WANTED = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]  # pickled weights only where there are no others


def locate(base_dir: Path, said: str, download: bool = False) -> tuple[str, Path]:
    """(the name under which results are stored, the checkpoint's folder). A path and a hub id are known by their last part.

    Nothing is fetched without `download`. Raises UserError for a path that is not there and an id that is not in the cache.
    """
    if "/" not in said and os.sep not in said:
        return said, Store(base_dir).model(said)
    path = Path(said).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        if checkpoint.gguf(path.parent) != path:
            raise UserError(f"--model_name {said}: other models lie beside it; put it, or a link to it, into a folder of its own")
        return _name(path.stem), path.parent
    if path.is_dir():
        return _name(path.resolve().name), path
    if HUB_ID.fullmatch(said) and ".." not in said:
        return _name(path.name), _of_hub(said, download)
    raise UserError(f"--model_name {said!r}: no such folder; wanted a name below models/, a path, or a hub id such as Qwen/Qwen2.5-7B")


def _name(text: str) -> str:
    return checked_name("model name", re.sub(r"[^A-Za-z0-9._-]+", "-", text))


def _of_hub(hub_id: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=not download, allow_patterns=WANTED, ignore_patterns=["*/*.safetensors"]))
        if download and not checkpoint.weights(folder):
            snapshot_download(hub_id, allow_patterns=["*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # of the network, of the hub, of a cache that is damaged
        if download:
            raise UserError(f"--model_name {hub_id}: cannot be downloaded: {first_line(error)}") from None
        folder = Path()
    if not checkpoint.there(folder):
        raise UserError(f"--model_name {hub_id}: is neither a folder here nor in the local hub cache; --download fetches it from the hub")
    return folder


def link(base_dir: Path, name: str, folder: Path) -> None:
    """models/{name} leads to a checkpoint elsewhere, so that later commands find it. Raises UserError where another one lies there."""
    place = Store(base_dir).model(name)
    if os.path.lexists(place):
        if not place.exists() or not place.samefile(folder):
            raise UserError(f"{place}: is another model than {folder}, and results are stored by that name; rename one of the folders")
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(folder.resolve(), target_is_directory=True)
    except FileExistsError:  # another process of this run
        pass
