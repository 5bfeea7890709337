# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""As much of the Hub's HTTP API on loopback as an unmodified client needs to push and load models.

Standard library only: HF_ENDPOINT has to be set before huggingface_hub is imported, and HF_HUB_DISABLE_XET=1, since
large files (here: safetensors) go by LFS.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN, USER = "hf_right", "somebody"
REVISION = "([^/]+)"


class Refusal(Exception):
    """Status, message, the code by which the client tells kinds of 404 apart, and what else the answer holds."""


class Repository:
    """private (`bool`), commits (id → path → bytes, in their order), refs (branch or tag → id)."""

    def __init__(self, private: bool):
        self.private, self.commits, self.refs, self.tags = private, {}, {}, set()
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[commit], self.refs[branch] = files, commit
        return commit

    def at(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


class LoopbackHub:
    """
    `with LoopbackHub() as hub:` serves on `hub.endpoint`.

    repositories (id → [`Repository`]); requests (`list[str]`: method and path of each); refuse (`str`, *optional*):
    answer requests whose method and path match this expression with a status
    that the client does not try again after.
    """

    def __init__(self):
        self.repositories, self.large_files, self.requests, self.refuse = {}, {}, [], None
        self.role = "write"  # of the token
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                hub.answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        try:
            if self.refuse and re.search(self.refuse, self.requests[-1]):
                raise Refusal(507, "The disk is full", None)
            headers, content = self.route(request, path, body)
            status = 200
        except Refusal as refusal:
            status, message, code, *about = refusal.args
            headers, content = {"X-Error-Message": message, "X-Error-Code": code or ""}, {"error": message}
            content.update(*about)
        if not isinstance(content, bytes):
            headers, content = {**headers, "Content-Type": "application/json"}, json.dumps(content).encode()
        request.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            request.send_header(name, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def route(self, request, path: str, body: bytes) -> tuple[dict, dict | list | bytes]:
        """Headers and content of the answer."""
        self.known = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if match := re.fullmatch(r"/large/(\w+)", path):
            if request.command == "PUT":
                self.large_files[match[1]] = body
            return {}, b""
        if path == "/api/whoami-v2":
            self.need_token()
            token = {"displayName": "a token", "role": self.role}
            return {}, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": token}}
        if path == "/api/validate-yaml":
            return {}, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return {}, self.create(json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [self.large_file(entry) for entry in json.loads(body)["objects"]]
            return {}, {"transfer": "basic", "objects": objects}
        if match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{REVISION}/(.+)", path):
            return self.resolve(self.repository(match[1]), match[2], match[3])
        if match := re.fullmatch(
            rf"/api/(?:models|spaces)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/{REVISION}(?:/(.*))?)?)?", path
        ):
            repository_id, action, revision, rest = match.groups()
            repository = self.repository(repository_id)
            if request.command == "POST" and action != "paths-info":
                self.need_token()
            return {}, self.act(repository_id, repository, action, revision or "main", rest, body)
        raise Refusal(404, f"no such route: {path}", None)

    def need_token(self):
        if not self.known:
            raise Refusal(401, "Invalid username or password.", None)

    def repository(self, repository_id: str) -> Repository:
        repository = self.repositories.get(repository_id)
        if repository is None or (repository.private and not self.known):
            raise Refusal(404 if self.known else 401, "Repository not found", "RepoNotFound")
        return repository

    def create(self, wanted: dict) -> dict:
        self.need_token()
        owner = wanted.get("organization") or USER
        if owner != USER:
            raise Refusal(403, f"You may not create a model under {owner}", None)
        repository_id = f"{owner}/{wanted['name']}"
        about = {"url": f"{self.endpoint}/{repository_id}", "name": repository_id, "id": repository_id}
        if repository_id in self.repositories:
            raise Refusal(409, "You already created this model repo", None, about)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.repositories[repository_id] = Repository(private)
        return about

    def large_file(self, entry: dict) -> dict:
        answer = {"oid": entry["oid"], "size": entry["size"], "authenticated": True}
        if entry["oid"] not in self.large_files:
            answer["actions"] = {"upload": {"href": f"{self.endpoint}/large/{entry['oid']}", "header": {}}}
        return answer

    def act(self, repository_id, repository: Repository, action, revision, rest, body) -> dict | list:
        if action in (None, "revision"):
            return self.describe(repository_id, repository, revision)
        if action == "branch":
            if revision in repository.refs:
                raise Refusal(409, "Reference already exists", None)
            repository.refs[revision] = repository.at(json.loads(body).get("startingPoint") or "main")
            return {}
        if action == "tag":
            name = json.loads(body)["tag"]
            repository.refs[name] = repository.at(revision)
            repository.tags.add(name)
            return {}
        if action == "refs":
            refs = [{"name": n, "ref": f"refs/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            tags = [ref for ref in refs if ref["name"] in repository.tags]
            return {"branches": [ref for ref in refs if ref not in tags], "tags": tags, "converts": []}
        files = repository.commits[repository.at(revision)]
        if action == "preupload":
            return {"files": [self.how_to_upload(files, entry) for entry in json.loads(body)["files"]]}
        if action == "commit":
            return self.commit(repository_id, repository, revision, dict(files), body)
        if action == "tree":
            found = [self.entry(name, data) for name, data in files.items() if name.startswith(rest or "")]
            if rest and not found:
                raise Refusal(404, f"{rest} does not exist", "EntryNotFound")
            return found
        if action == "paths-info":
            return [self.entry(name, files[name]) for name in json.loads(body)["paths"] if name in files]
        raise Refusal(404, f"no such action: {action}", None)

    def describe(self, repository_id: str, repository: Repository, revision: str) -> dict:
        commit = repository.at(revision)
        names = [{"rfilename": name} for name in repository.commits[commit]]
        about = {"id": repository_id, "sha": commit, "private": repository.private, "siblings": names}
        return {**about, "tags": [], "downloads": 0, "likes": 0}

    def how_to_upload(self, files: dict, entry: dict) -> dict:
        name = entry["path"]
        large = name.endswith(".safetensors")
        answer = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if name in files:
            answer["oid"] = etag(name, files[name])
        return answer

    def entry(self, name: str, data: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(data), "oid": etag(name, data)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": etag(name, data), "size": len(data), "pointerSize": 134}
        return entry

    def commit(self, repository_id: str, repository: Repository, branch: str, files: dict, body: bytes) -> dict:
        for line in body.decode().splitlines():
            key, value = json.loads(line).values()
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.large_files:
                    raise Refusal(400, f"{value['path']} was not uploaded", None)
                files[value["path"]] = self.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(branch, files)
        return {"commitOid": commit, "commitUrl": f"{self.endpoint}/{repository_id}/commit/{commit}"}

    def resolve(self, repository: Repository, revision: str, name: str) -> tuple[dict, bytes]:
        commit = repository.at(revision)
        if name not in repository.commits[commit]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = repository.commits[commit][name]
        return {"X-Repo-Commit": commit, "ETag": f'"{etag(name, data)}"', "X-Linked-Size": len(data)}, data


def etag(name: str, data: bytes) -> str:
    """Of a large file the SHA-256, of another git's id of its content."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
