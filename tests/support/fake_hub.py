"""A Hugging Face Hub in memory, behind the transport of huggingface_hub: its own code sends real requests to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote

import httpx2
import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.utils._http

from support.shell import Outcome, command

TOKEN = "hf_" + "x" * 34


@dataclass
class FakeHub:
    """Repositories: the files of each commit by repository, and the commits of each branch, tag or prefix.

    Attributes:
        requests: method and path of all requests so far.
        broken: an exception to raise for each request, or a status to answer.
    """

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: Exception | int | None = None

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files to a branch; return its hash."""
        before = self.branches.get(repo, {}).get(branch, "")
        content = "".join(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        commit = hashlib.sha1((before + content).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[repo][self.branches[repo][branch]]

    def upload(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Add a commit with the files of a folder."""
        found = [path for path in folder.rglob("*") if path.is_file()]
        return self.add(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}, branch)

    def downloads(self) -> set[str]:
        """Return the names of the files whose content was requested."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        }

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = unquote(request.url.path)
        self.requests.append((request.method, path))
        if isinstance(self.broken, Exception):
            raise self.broken
        if self.broken is not None:
            return httpx2.Response(self.broken, request=request)
        body = request.read()
        if path == "/api/repos/create":
            return self._create(request, json.loads(body))
        if path == "/api/validate-yaml":
            return self._json(request, {"errors": [], "warnings": []})
        api = path.startswith(("/api/models/", "/api/datasets/"))
        for prefix in ("/api/models/", "/api/datasets/", "/datasets/", "/"):
            if path.startswith(prefix):
                break
        parts = path.removeprefix(prefix).split("/")
        repo, what, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
        signed = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if repo not in self.commits or (repo in self.private and not signed):
            return self._error(request, 401, "RepoNotFound")
        if repo in self.gated and not api:
            return self._error(request, 403, "GatedRepo")
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json(request, {"files": files})
        if what == "commit":
            return self._commit(request, repo, "/".join(rest), body)
        name = rest[0] if what in ("resolve", "tree", "paths-info") else "/".join(rest) or "main"
        commit = self.branches[repo].get(name, name)
        if commit not in self.commits[repo]:
            return self._error(request, 404, "RevisionNotFound")
        files = self.commits[repo][commit]
        if what in ("tree", "paths-info"):
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            asked = parse_qs(body.decode()).get("paths", []) if what == "paths-info" else []
            return self._json(request, [entry for entry in entries if what == "tree" or entry["path"] in asked])
        if what == "resolve":
            return self._file(request, files, "/".join(rest[1:]), commit)
        siblings = [{"rfilename": n} for n in sorted(files)]
        return self._json(
            request,
            {"id": repo, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "private": False},
        )

    def _create(self, request: httpx2.Request, values: dict[str, Any]) -> httpx2.Response:
        repo = f"{values['organization']}/{values['name']}"
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return httpx2.Response(401, request=request)
        if values["organization"] != "me":
            return httpx2.Response(403, request=request, json={"error": "You don't have the rights"})
        known = repo in self.commits
        if not known:
            self.add(repo, {".gitattributes": b""})
            if values.get("private") or values.get("visibility") == "private":
                self.private.add(repo)
        return httpx2.Response(409 if known else 200, request=request, json={"url": f"https://huggingface.co/{repo}"})

    def _commit(self, request: httpx2.Request, repo: str, branch: str, body: bytes) -> httpx2.Response:
        files = dict(self.files(repo, branch))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                assert entry["value"]["encoding"] == "base64"
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                files.pop(entry["value"]["path"])
            else:
                assert entry["key"] == "header"
        commit = self.add(repo, files, branch)
        return self._json(request, {"commitUrl": f"https://huggingface.co/{repo}/commit/{commit}", "commitOid": commit})

    def _file(self, request: httpx2.Request, files: dict[str, bytes], name: str, commit: str) -> httpx2.Response:
        if name not in files:
            return self._error(request, 404, "EntryNotFound")
        data = files[name]
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Content-Length": str(len(data)),
        }
        return httpx2.Response(200, request=request, headers=headers, content=b"" if request.method == "HEAD" else data)

    def _json(self, request: httpx2.Request, values: Any) -> httpx2.Response:
        return httpx2.Response(200, request=request, json=values)

    def _error(self, request: httpx2.Request, status: int, code: str) -> httpx2.Response:
        return httpx2.Response(status, request=request, headers={"X-Error-Code": code, "X-Error-Message": code})


@contextmanager
def serving(hub: FakeHub, cache: Path, token: str | None = TOKEN) -> Iterator[FakeHub]:
    """Let huggingface_hub talk to `hub`, with a cache of its own, logged in if there is a token."""
    constants, before = huggingface_hub.constants, huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(hub.answer)))
    with (
        mock.patch.dict("os.environ", {"HF_TOKEN": token or ""}),
        mock.patch.object(constants, "HF_HUB_CACHE", str(cache)),
        mock.patch.object(constants, "HF_TOKEN_PATH", str(cache / "token")),
        mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
    ):
        try:
            yield hub
        finally:
            huggingface_hub.set_client_factory(before)


def push(*arguments: object) -> Outcome:
    """Run `dpm-scales push` with these arguments in this process."""
    return command("push", *arguments)
