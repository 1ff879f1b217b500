"""Tar shards, sound and faulty, and a server of them on this machine that fails as configured."""

from __future__ import annotations

import io
import json
import re
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from dpm_scales.shards import ShardSource
from dpm_scales.shards.index import ShardEntry, ShardIndex
from dpm_scales.shards.pack import Packing, pack


def numbered(number: int, size: tuple[int, int] = (2, 3), channels: int = 1) -> np.ndarray:
    """Return an image (H, W) or (H, W, 3), uint8, that shows its number in its first two pixels."""
    image = np.full(size, 7, dtype=np.uint8)
    image[0, :2] = number // 256, number % 256
    return image if channels == 1 else np.repeat(image[..., None], 3, -1)


def number_of(image: np.ndarray) -> int:
    """Return the number that an image (C, H, W) shows."""
    return int(image[0, 0, 0]) * 256 + int(image[0, 0, 1])


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def tar(path: Path, files: Mapping[str, bytes] | list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar file, by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(numbers: range, labels: bool = True) -> dict[str, bytes]:
    """Return the members of numbered images, with their numbers modulo 3 as labels."""
    files = {}
    for number in numbers:
        files[f"{number:04d}.png"] = encoded(numbered(number))
        if labels:
            files[f"{number:04d}.cls"] = str(number % 3).encode()
    return files


def packed(folder: Path, count: int = 40, per_shard: int = 8, **settings: object) -> ShardIndex:
    """Pack `count` numbered images into `folder`, with their numbers modulo 3 as labels; return the index."""
    source = folder.with_name(f"{folder.name}.npz")
    images = np.stack([numbered(number) for number in range(count)])
    np.savez(source, images=images, labels=np.arange(count) % 3)
    return pack(source, folder, Packing(per_shard=per_shard, labels="folder", **settings), lambda *_: lambda _: None)  # type: ignore[arg-type]


def source(root: Any, **options: Any) -> ShardSource:
    """Return grey images of shards, with labels."""
    return ShardSource(root, **{"channels": 1, "labels": "cls", **options})


def numbers_of(part: Any) -> list[int]:
    """Return the numbers that the images of a part show; each has its label."""
    items = [part[i] for i in range(len(part))]
    assert all(label in (-1, number_of(image) % 3) for image, label in items)
    return [number_of(image) for image, _ in items]


def silent(name: str, total: int) -> Any:
    return lambda count: None


def fetched_numbers(root: Any, **options: Any) -> list[int]:
    """Return the numbers that the images at an address show, fetched with little patience."""
    part = ShardSource(root, **{"channels": 1, "val_fraction": 0, "tries": 4, "timeout": 0.15, **options}).train()
    return [number_of(part[i][0]) for i in range(len(part))]


def entry_of(folder: Path, name: str = "shard-000001.tar") -> ShardEntry:
    """Return the entry of a shard in a folder's index."""
    held = json.loads((folder / "index.json").read_text())["shards"]
    return next(ShardEntry(s["name"], s["images"], s["bytes"], s["sha256"]) for s in held if s["name"] == name)


@dataclass
class Faults:
    """Faults of a server by file name: each entry is used once, the last one repeatedly.

    Kinds: "500", "404" and other statuses; "cut" after half of the requested bytes; "stall" before the first byte;
    "trickle", a byte at a time; "cut early" and "no ranges", which send the whole file from its beginning;
    "to ADDRESS", a redirection; "ok".

    Attributes:
        asked: names of the requested files, with their ranges.
        secrets: their queries and logins.
    """

    of: dict[str, list[str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    secrets: list[tuple[str, str]] = field(default_factory=list)

    def next(self, name: str) -> str:
        kinds = self.of.get(name, ["ok"])
        return kinds.pop(0) if len(kinds) > 1 else kinds[0]


@contextmanager
def served(folder: Path, stall: float = 1.0) -> Iterator[tuple[str, Faults]]:
    """Serve a folder on this machine, with ranges and entity tags; yield the address, ending in /, and its faults."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, _, query = self.path.lstrip("/").partition("?")
            name = unquote(name)
            faults.asked.append((name, self.headers.get("Range", "")))
            faults.secrets.append((query, self.headers.get("Authorization", "")))
            kind = faults.next(name)
            path = folder / name
            if kind == "416" and not self.headers.get("Range"):
                kind = "ok"
            if kind.isdigit() or not path.is_file():
                self.send_error(int(kind) if kind.isdigit() else 404)
                return
            if kind.startswith("to "):
                self.send_response(302)
                self.send_header("Location", kind[3:])
                self.end_headers()
                return
            data = path.read_bytes()
            start = 0
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            tag = f'"{path.stat().st_mtime_ns}"'
            if asked and self.headers.get("If-Range") == tag and kind != "no ranges":
                start = int(asked[1])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            part = data[start:]
            if kind == "stall":
                time.sleep(stall)
            if kind == "trickle":
                for number in range(100):
                    self.wfile.write(part[number : number + 1])
                    time.sleep(stall / 10)
            self.wfile.write(part[: len(part) // 2] if kind.startswith("cut") else part)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", faults
        finally:
            server.shutdown()
            thread.join()
