"""A Hub on loopback: what huggingface_hub asks of the real one to create, push, read and refuse repositories.

In memory, over real HTTP; a token is `hf_NAME` and belongs to the user NAME. `HF_HUB_DISABLE_XET` must be set, as
uploads go through LFS.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
DATASET_NAME = re.compile(r"(?:[\w-]+/)?[\w.-]+")


# --- what the Hub demands of a model card's metadata ------------------------------------------------------------------


def front_matter(card: str) -> dict | None:
    """The YAML block that opens a card, or None where there is none."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", card, re.DOTALL)
    return yaml.safe_load(block[1]) if block else None


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a model card, in words that begin with the place."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"metadata is no YAML: {error}"]
    if data is None:
        return []  # the Hub warns, no more
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = [f'"{name}" must be a string' for name in ("license", "library_name", "pipeline_tag") if _odd(data, name)]
    for name in ("tags", "datasets", "metrics", "base_model"):
        value = data.get(name, [])
        values = value if isinstance(value, list) else [value] if name != "tags" else [None]
        errors += [f'"{name}" must hold strings'] * any(not isinstance(item, str) or not item for item in values)
    index = data.get("model-index", [])
    if not isinstance(index, list):
        return [*errors, '"model-index" must be a list']
    for i, model in enumerate(index):
        errors += _model_errors(f"model-index[{i}]", model)
    return errors


def _odd(mapping: dict, name: str) -> bool:
    return name in mapping and (not isinstance(mapping[name], str) or not mapping[name])


def _required(place: str, value, *names: str) -> list[str]:
    if not isinstance(value, dict):
        return [f'"{place}" must be a mapping']
    wrong = (name for name in names if name not in value or _odd(value, name))
    return [f'"{place}.{name}" is required, as a string' for name in wrong]


def _model_errors(place: str, model) -> list[str]:
    errors = _required(place, model, "name")
    results = model.get("results") if isinstance(model, dict) else None
    if not isinstance(results, list) or not results:
        return [*errors, f'"{place}.results" is required, as a list']
    for i, result in enumerate(results):
        where, result = f"{place}.results[{i}]", result if isinstance(result, dict) else {}
        errors += _required(f"{where}.task", result.get("task"), "type")
        wrong = _required(f"{where}.dataset", result.get("dataset"), "type", "name")
        if not wrong and not DATASET_NAME.fullmatch(result["dataset"]["type"]):
            wrong = [f'"{where}.dataset.type" {result["dataset"]["type"]!r} does not match {DATASET_NAME.pattern}']
        errors += wrong
        metrics = result.get("metrics")
        if not isinstance(metrics, list) or not metrics:
            errors.append(f'"{where}.metrics" is required, as a list')
            continue
        for j, metric in enumerate(metrics):
            errors += _required(f"{where}.metrics[{j}]", metric, "type")
            if isinstance(metric, dict) and not isinstance(metric.get("value"), int | float | str | dict):
                errors.append(f'"{where}.metrics[{j}].value" is required')
    return errors


# --- repositories -----------------------------------------------------------------------------------------------------


@dataclass
class Repository:
    """A line of commits; `gated`: its files are for users in `readers` alone."""

    owner: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # hash -> path -> content, oldest first
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = b"".join(path.encode() + hashlib.sha1(data).digest() for path, data in sorted(files.items()))
        revision = hashlib.sha1(b"%d" % len(self.commits) + content).hexdigest()
        self.commits[revision] = files
        self.branches[branch] = revision
        return revision

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None


class FakeHub(ThreadingHTTPServer):
    """A context manager: serves at `url` within, and is gone afterwards."""

    daemon_threads = True

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.RLock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """path -> content of a repository."""
        repository = self.repositories[name]
        return repository.commits[repository.resolve(revision)]


def _entry(path: str, data: bytes) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


class Refused(Exception):  # noqa: N818
    """An answer that is no success: the status, and the code by which the client knows the kind."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """One request; a route is a pattern, and a method that gets what the pattern names."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *arguments) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.data = self.read_body()
        try:
            with self.server.lock:
                for methods, pattern, route in ROUTES:
                    match = re.fullmatch(pattern, path) if self.command in methods else None
                    if match:
                        route(self, **match.groupdict())
                        return
                raise Refused(404, "EntryNotFound", f"no such page: {path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            self.send({"error": str(refused)}, refused.status, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- who asks, and for what -----------------------------------------------------------------------------------

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if not token.startswith("hf_"):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return token.removeprefix("hf_")

    def repository(self, name: str, write: bool = False, files: bool = False) -> Repository:
        found, user = self.server.repositories.get(name), self.user()
        if found is None or (found.private and user != found.owner):
            # the client reads a bare 401 as "not found" over https alone, so the code is given here
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != found.owner:
            raise Refused(403 if user else 401, "", "You don't have the rights to write to this repository")
        if files and found.gated and user != found.owner and user not in found.readers:
            raise Refused(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted")
        return found

    def commit_of(self, name: str, revision: str, **access) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name, **access)
        commit = repository.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # --- routes ---------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user() is None:
            raise Refused(401, "", "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": "write"}}
        self.send({"type": "user", "name": self.user(), "orgs": [], "auth": token})

    def create(self) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        asked = json.loads(self.data)
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        said = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repositories:
            self.send({"error": "You already created this model repo", **said}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = made = Repository(user, private=private)
        made.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.send(said)

    def validate_card(self) -> None:
        errors = metadata_errors(json.loads(self.data)["content"])
        said = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.send(said, 400 if errors else 200)

    def info(self, name: str, revision: str = "main") -> None:
        commit, files = self.commit_of(name, revision)
        card = front_matter(files.get("README.md", b"").decode()) or {}
        said = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": self.repository(name).private,
            "gated": "manual" if self.repository(name).gated else False,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
        self.send(said | {key: card[key] for key in ("pipeline_tag", "library_name") if key in card})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        _, files = self.commit_of(name, revision)
        inside = f"{folder.strip('/')}/" if folder else ""
        self.send([_entry(path, data) for path, data in sorted(files.items()) if path.startswith(inside)])

    def paths(self, name: str, revision: str) -> None:
        _, files = self.commit_of(name, revision)
        self.send([_entry(path, files[path]) for path in json.loads(self.data)["paths"] if path in files])

    def preupload(self, name: str, revision: str) -> None:
        self.repository(name, write=True)
        paths = [file["path"] for file in json.loads(self.data)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        self.send({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})

    def lfs_batch(self, name: str) -> None:
        self.repository(name, write=True)
        objects = []
        for asked in json.loads(self.data)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
            known = asked["oid"] in self.server.blobs
            objects.append({"oid": asked["oid"], "size": asked["size"]} | ({} if known else {"actions": upload}))
        self.send({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise Refused(400, "BadChecksum", "the content is not that of its hash")
        self.server.blobs[oid] = self.data
        self.send({})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        files = dict(self.commit_of(name, revision)[1])
        for line in self.data.splitlines():
            step = json.loads(line)
            kind, value = step["key"], step["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        made = repository.commit(files, revision)
        self.send({"success": True, "commitOid": made, "commitUrl": f"{self.server.url}/{name}/commit/{made}"})

    def file(self, name: str, revision: str, path: str) -> None:
        commit, files = self.commit_of(name, revision, files=True)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self.send({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
            return
        entry = _entry(path, files[path])
        etag = entry.get("lfs", entry)["oid"]
        headers |= {"ETag": f'"{etag}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        self.send(files[path], headers=headers)


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
API = f"/api/models/{NAME}"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/validate-yaml", Handler.validate_card),
    (("POST",), "/api/repos/create", Handler.create),
    (("GET",), API, Handler.info),
    (("GET",), f"{API}/revision/{REVISION}", Handler.info),
    (("GET",), rf"{API}/tree/{REVISION}(?P<folder>/.*)?", Handler.tree),
    (("POST",), f"{API}/paths-info/{REVISION}", Handler.paths),
    (("POST",), f"{API}/preupload/{REVISION}", Handler.preupload),
    (("POST",), f"{API}/commit/{REVISION}", Handler.commit),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    (("GET", "HEAD"), rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.file),
]
