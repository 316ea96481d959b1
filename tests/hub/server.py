"""A small model hub on 127.0.0.1 that the real huggingface_hub client can talk to, so that no test needs the internet.

In go repositories (bytes by file name), users with tokens and rights, and faults to show; out come the answers that the
real hub gives for the calls that `huarizo.hub` makes, with its status codes and headers, and a list of what was asked.
Large files are fetched from and sent to another host name, as with the real hub, to see that no token goes there.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


def commit_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repo:
    """A repository; `revisions` maps branch names to the files at that point."""

    files: dict[str, bytes]
    kind: str = "model"
    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes to claim in the list of files instead of the true ones."""
    status: int = 200
    """What the hub's API answers for this repository; 0 is a page in HTML instead of JSON."""
    damaged: dict[str, int] = field(default_factory=dict)
    """File -> how many times its first byte is served changed."""
    cut: tuple[str, ...] = ()
    """Files that are served without their last bytes, in an answer that is whole in itself."""
    drops: dict[str, int] = field(default_factory=dict)
    """File -> how many times the connection is closed in the middle of it. Only the first time brings bytes."""
    commits: list[list[str]] = field(default_factory=list)
    """Of each commit that was made here, the files in it."""
    put_drops: int = 0
    """How many times the connection is closed in the middle of a large file that is sent."""
    commit_status: int = 200
    """What the hub answers to a commit; 0 closes the connection."""
    preupload_status: int = 200

    def at(self, revision: str, repo_id: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch name or commit."""
        for branch, files in {"main": self.files, **self.branches}.items():
            commit = commit_of(f"{repo_id} {branch}" + f" {len(self.commits)}" * bool(self.commits))
            if revision in (branch, commit):
                return commit, files
        return None


@dataclass
class User:
    name: str
    role: str = "read"
    fine_grained: dict[str, Any] | None = None
    orgs: tuple[str, ...] = ()

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "test", "role": self.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if self.fine_grained is not None:
            token["fineGrained"] = self.fine_grained
        orgs = [{"type": "org", "name": name, "roleInOrg": "contributor"} for name in self.orgs]
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def may_read(self, repo_id: str, gated: bool) -> bool:
        if self.fine_grained is None or (gated and self.fine_grained.get("canReadGatedRepos")):
            return True
        places = (repo_id, repo_id.split("/")[0])
        return any(scope["entity"]["name"] in places for scope in self.fine_grained.get("scoped", []))

    def may_write(self, repo_id: str) -> bool:
        owner = repo_id.split("/")[0]
        if self.role == "read" or owner not in (self.name, *self.orgs):
            return False
        scopes = (self.fine_grained or {}).get("scoped", [])
        return self.fine_grained is None or any(
            scope["entity"]["name"] in (owner, repo_id) and "repo.write" in scope["permissions"] for scope in scopes
        )


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".parquet", ".gguf"))


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The running hub; use it in a `with` block."""

    def __init__(self, repos: dict[str, Repo], users: dict[str, User]) -> None:
        self.repos, self.users = repos, users
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path, token) of every request."""
        self.objects: dict[str, bytes] = {}
        """Large files that arrived, by sha256, in a commit or not yet."""
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def asked_in(self, case: str) -> list[tuple[str, str, str | None]]:
        """What was asked between the request for /mark/`case` and the next mark."""
        marks = [index for index, (_, path, _) in enumerate(self.asked) if path.startswith("/mark/")]
        start = next(index for index in marks if self.asked[index][1] == f"/mark/{case}")
        end = next((index for index in marks if index > start), len(self.asked))
        return self.asked[start + 1 : end]

    def files_sent(self, case: str) -> set[str]:
        return {
            path.rsplit("/", 1)[-1]
            for method, path, _ in self.asked_in(case)
            if method == "GET" and "/api/" not in path
        }


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        path = unquote(path) if path.startswith("/mark/") else path
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.server_hub.asked.append((self.command, path, bearer))
        user = self.server_hub.users.get(bearer) if bearer else None
        if path.startswith("/mark/"):
            return self._send(200, b"")
        if put := re.fullmatch(r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})", path):
            return self._take_object(self.server_hub.repos[put[1]], put[2])
        if self.command == "POST":
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            if user is None:
                return self._refuse(401, None, "Invalid credentials in Authorization header")
            return self._take(path, body, user, bearer or "")
        if cdn := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            return self._file(cdn[1], self.server_hub.repos[cdn[1]], unquote(cdn[2]), cdn[3])
        if bearer and user is None:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._send_json(user.whoami()) if user else self._refuse(401, None, "Invalid username or password.")
        if api := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self._api(api[1], api[2], api[3], unquote(api[4] or "main"), user)
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve("dataset" if file[1] else "model", file[2], unquote(file[3]), unquote(file[4]), user)
        return self._refuse(404, None, "Sorry, we can't find the page you are looking for.")

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server looks for

    def _open(self, kind: str, repo_id: str, user: User | None, contents: bool) -> Repo | None:
        """The repository if this user may see it (its list of files, or its contents); else the refusal is sent."""
        repo = self.server_hub.repos.get(repo_id)
        if repo is None or repo.kind != kind or (repo.private and (user is None or user.name not in repo.readers)):
            return self._refuse(404 if user else 401, "RepoNotFound", "Repository not found")
        if repo.private and user and not user.may_read(repo_id, gated=False):
            return self._refuse(403, None, "This token has no read right")
        if contents and repo.gated:
            if user is None:
                return self._refuse(401, "GatedRepo", "Access is restricted. Please log in.")
            if not user.may_read(repo_id, gated=True):
                return self._refuse(
                    403, None, "Please enable access to public gated repositories in your token settings"
                )
            if user.name not in repo.readers:
                return self._refuse(403, "GatedRepo", "Access is restricted and you are not in the authorized list.")
        return repo

    def _api(self, kind: str, repo_id: str, what: str | None, revision: str, user: User | None) -> None:
        repo = self._open(kind, repo_id, user, contents=False)
        if repo is None:
            return None
        if repo.status == 0:
            return self._send(200, b"<html>Please accept the terms of this Wi-Fi</html>", {"Content-Type": "text/html"})
        if repo.status != 200:
            return self._refuse(repo.status, None, "Trouble")
        found = repo.at(revision, repo_id)
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        entries = []
        for name, content in files.items():
            size = repo.claimed_sizes.get(name, len(content))
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            entry = {"name": name, "size": size, "oid": git_sha1(content), "lfs": lfs if is_large(name) else None}
            entries.append(entry)
        if what == "tree":
            return self._send_json([self._tree_entry(entry) for entry in entries])
        siblings = []
        for entry in entries:
            sibling = {"rfilename": entry["name"], "size": entry["size"], "blobId": entry["oid"]}
            siblings.append(sibling | ({"lfs": entry["lfs"]} if entry["lfs"] else {}))
        info = {"id": repo_id, "sha": commit, "private": repo.private, "gated": "auto" if repo.gated else False}
        return self._send_json(info | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree_entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        out = {"type": "file", "path": entry["name"], "size": entry["size"], "oid": entry["oid"]}
        if entry["lfs"]:
            out["lfs"] = {"oid": entry["lfs"]["sha256"], "size": entry["size"], "pointerSize": 134}
        return out

    def _take(self, path: str, body: bytes, user: User, bearer: str) -> None:
        """What is sent to the hub itself: all but the contents of large files."""
        if path == "/api/repos/create":
            return self._create(json.loads(body), user)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        call = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        call = call or re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify)", path)
        repo = self.server_hub.repos.get(call[1]) if call else None
        if call is None or repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if not user.may_write(call[1]):
            return self._refuse(403, None, "You don't have the rights required to perform this action")
        if call[2] == "preupload":
            return self._preupload(repo, json.loads(body)["files"])
        if call[2] == "objects/batch":
            return self._batch(call[1], json.loads(body))
        if call[2] == "verify":
            wanted = json.loads(body)
            whole = len(self.server_hub.objects.get(wanted["oid"], b"")) == wanted["size"]
            return self._send_json({}) if whole else self._refuse(422, None, "The object did not arrive")
        if repo.commit_status == 0:
            self.close_connection = True
            return None
        if repo.commit_status != 200:
            return self._refuse(repo.commit_status, None, f"Trouble with {bearer}")
        return self._commit(call[1], repo, [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any], user: User) -> None:
        repo_id = f"{wanted['organization'] or user.name}/{wanted['name']}"
        url = {"url": f"{self.server_hub.url}/{repo_id}"}
        if not user.may_write(repo_id):
            return self._refuse(403, None, "You don't have the rights to create a model under this namespace")
        if repo_id in self.server_hub.repos:
            body = json.dumps(url | {"error": "You already created this model repo"}).encode()
            return self._send(409, body, {"Content-Type": "application/json"})
        private = wanted.get("visibility") == "private"
        self.server_hub.repos[repo_id] = Repo({".gitattributes": b""}, private=private, readers=(user.name,))
        return self._send_json(url)

    def _validate(self, card: str) -> None:
        """The front matter of a model card, as far as the hub refuses one."""
        front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        values = yaml.safe_load(front[1]) if front else {}
        errors = []
        if not isinstance(values, dict):
            errors.append({"message": "the metadata is no mapping"})
        elif "base_model" in values and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(values["base_model"])):
            errors.append({"message": f'"base_model" with value "{values["base_model"]}" is not valid'})
        body = json.dumps({"errors": errors, "warnings": []}).encode()
        self._send(400 if errors else 200, body, {"Content-Type": "application/json"})

    def _preupload(self, repo: Repo, files: list[dict[str, Any]]) -> None:
        if repo.preupload_status != 200:
            return self._refuse(repo.preupload_status, None, "Trouble")
        modes = {file["path"]: "lfs" if is_large(file["path"]) else "regular" for file in files}
        told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return self._send_json({"files": told})

    def _batch(self, repo_id: str, wanted: dict[str, Any]) -> None:
        """Where each large file is to be sent: nowhere where it is here already."""
        objects = []
        for entry in wanted["objects"]:
            href = f"http://localhost:{self.server_hub.port}/lfs/{repo_id}/{entry['oid']}"
            verify = {"href": f"{self.server_hub.url}/{repo_id}.git/info/lfs/verify"}
            actions = {"upload": {"href": href}, "verify": verify}
            known = entry["oid"] in self.server_hub.objects
            objects.append(entry | ({} if known else {"actions": actions}))
        self._send_json({"transfer": "basic", "objects": objects})

    def _take_object(self, repo: Repo, oid: str) -> None:
        """The content of a large file; where the connection is to break, half of it is read."""
        length = int(self.headers["Content-Length"])
        if repo.put_drops > 0:
            repo.put_drops -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            return None
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != oid:
            return self._refuse(400, None, "The content is not what its name says")
        self.server_hub.objects[oid] = content
        return self._send(200, b"")

    def _commit(self, repo_id: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        """All files of a commit appear in one step, or none."""
        found = repo.at("main", repo_id)
        assert found is not None
        if lines[0]["value"].get("parentCommit", found[0]) != found[0]:
            return self._refuse(412, None, "A commit has happened since. Please refresh and try again.")
        added = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del repo.files[value["path"]]
                continue
            if line["key"] == "lfsFile" and value["oid"] not in self.server_hub.objects:
                return self._refuse(400, None, f"{value['path']} did not arrive")
            objects, is_large_one = self.server_hub.objects, line["key"] == "lfsFile"
            added[value["path"]] = objects[value["oid"]] if is_large_one else base64.b64decode(value["content"])
        repo.files.update(added)
        repo.commits.append(sorted(added))
        made = repo.at("main", repo_id)
        assert made is not None
        url = f"{self.server_hub.url}/{repo_id}/commit/{made[0]}"
        return self._send_json({"success": True, "commitOid": made[0], "commitUrl": url, "hookOutput": ""})

    def _resolve(self, kind: str, repo_id: str, revision: str, name: str, user: User | None) -> None:
        repo = self._open(kind, repo_id, user, contents=True)
        if repo is None:
            return None
        found = repo.at(revision, repo_id)
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if not is_large(name):
            return self._file(repo_id, repo, commit, name)
        headers = {
            "Location": f"http://localhost:{self.server_hub.port}/cdn/{repo_id}/{commit}/{name}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
            "X-Linked-Size": str(len(files[name])),
        }
        return self._send(302, b"", headers)

    def _file(self, repo_id: str, repo: Repo, revision: str, name: str) -> None:
        found = repo.at(revision, repo_id)
        assert found is not None
        commit, files = found
        content = files[name]
        headers = {"ETag": f'"{git_sha1(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "GET" and repo.damaged.get(name, 0) > 0:
            repo.damaged[name] -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        if self.command == "GET" and name in repo.cut:
            content = content[:-5]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        offset, status = (int(start[1]), 206) if start else (0, 200)
        if start:
            headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and repo.drops.get(name, 0) > 0:
            repo.drops[name] -= 1
            return self._drop(status, headers, content[offset:], bring=offset == 0)
        return self._send(status, content[offset:], headers)

    def _drop(self, status: int, headers: dict[str, str], body: bytes, bring: bool) -> None:
        """Promise the whole body, send at most half of it, hang up."""
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if bring else b"")
        self.wfile.flush()
        self.close_connection = True

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
