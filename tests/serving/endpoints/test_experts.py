"""`/v1/experts`: register, look up, change, promote, roll back, retire, remove."""

from __future__ import annotations

import asyncio
import json

import pytest

from adapters_registry.expert import State
from adapters_registry.registry import Registry

FRENCH = "say cherry in french"
ABOUT = {"name": "translate", "samples": ["say banana in french", {"prompt": "say window in french", "answer": "x"}]}


def from_folder(folder, **more):
    return {**ABOUT, "source": {"folder": str(folder)}, **more}


async def add(world, folder, **more):
    return await world.http.post("/v1/experts", json=from_folder(folder, **more))


def files_of(folder, *names):
    names = names or ("adapter_config.json", "adapter_model.safetensors", "README.md")
    return [("files", (name, (folder / name).read_bytes())) for name in names if (folder / name).exists()]


async def upload(world, files, about=None, **options):
    data = {"expert": json.dumps(about or ABOUT)}
    return await world.http.post("/v1/experts", data=data, files=files, **options)


def events(text):
    """(event, data) of a stream of server-sent events."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    parts = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


async def nothing_new(world):
    names = {each.name for each in await asyncio.to_thread(world.registry.experts, None, tuple(State))}
    return names == {"count", "reverse", "shout"} and len(world.registry.store.digests()) == 3


# Registering


async def test_a_folder_of_the_server_is_registered_and_answers_the_next_request(world, adapters):
    response = await add(world, adapters[3], description="Speaks French.", tags=["lang"], licence="MIT")
    assert response.status_code == 201
    body = response.json()
    assert (body["name"], body["version"], body["state"]) == ("translate", 1, "active")
    assert (body["description"], body["tags"], body["licence"]) == ("Speaks French.", ["lang"], "MIT")
    assert body["samples"] == 2
    assert body["checks"][0]["passed"]
    assert body["loaded"]
    assert "path" not in body
    answer = await world.ask("auto", FRENCH)
    assert answer.json()["model"] == "translate"


async def test_an_upload_is_registered_and_answers_the_next_request(world, adapters):
    response = await upload(world, files_of(adapters[3]))
    assert response.status_code == 201, response.text
    assert response.json()["source"] == "upload"
    assert (await world.ask("auto", FRENCH)).json()["model"] == "translate"


async def test_an_upload_of_a_whole_folder_sends_its_name_along(world, adapters):
    files = [("files", (f"adapter/{name}", content)) for _, (name, content) in files_of(adapters[3])]
    assert (await upload(world, files)).status_code == 201


async def test_a_hub_repository_that_is_not_there_is_refused(world, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    response = await world.http.post("/v1/experts", json={**ABOUT, "source": {"hub": "org/nothing"}})
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "source_unavailable"
    assert await nothing_new(world)


@pytest.mark.parametrize("folder", ["/etc", "../..", "~", "relative/folder", "/\0", "x" * 5000, "{imports}/.."])
async def test_a_folder_outside_the_import_folders_is_refused(world, adapters, folder):
    response = await add(world, folder.format(imports=adapters[0].parent))
    assert response.status_code in (400, 403)
    message = response.json()["error"]["message"]
    assert "import_dirs" in message or "not a folder's path" in message
    assert "root:" not in message
    assert await nothing_new(world)


async def test_a_link_out_of_the_import_folders_is_refused(serve, adapters, tmp_path):
    inside = tmp_path / "imports"
    inside.mkdir()
    (inside / "link").symlink_to(adapters[3])
    loop = inside / "loop"
    loop.symlink_to(loop)
    async with serve(registry={"import_dirs": [inside]}) as world:
        assert (await add(world, inside / "link")).status_code == 403
        assert (await add(world, loop)).status_code in (400, 422)
        assert (await add(world, inside / "nowhere")).status_code == 422
        assert await nothing_new(world)


async def test_without_import_folders_no_folder_is_open(serve, adapters):
    async with serve(registry={"import_dirs": []}) as world:
        assert (await add(world, adapters[3])).status_code == 403


async def test_every_reason_to_refuse_is_told_at_once(world, adapters):
    config = json.loads((adapters[3] / "adapter_config.json").read_bytes())
    config.update(use_dora=True, base_model_name_or_path="somebody/else")
    files = [
        *files_of(adapters[3], "adapter_model.safetensors"),
        ("files", ("adapter_config.json", json.dumps(config))),
    ]
    response = await upload(world, files, {**ABOUT, "name": "reverse"})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "expert_refused"
    codes = {reason["code"] for reason in error["reasons"]}
    assert {"name_taken", "base_mismatch"} <= codes or {"name_taken", "other_base_model"} <= codes or len(codes) >= 3
    assert all(reason["message"] in error["message"] for reason in error["reasons"])
    assert await nothing_new(world)


async def test_a_truncated_upload_is_refused_and_leaves_nothing(world, adapters):
    files = files_of(adapters[3], "adapter_config.json")
    weights = (adapters[3] / "adapter_model.safetensors").read_bytes()
    response = await upload(world, [*files, ("files", ("adapter_model.safetensors", weights[:-100]))])
    assert response.status_code == 422
    assert await nothing_new(world)


async def test_only_a_pickle_is_refused_unopened(world, adapters):
    files = [*files_of(adapters[3], "adapter_config.json"), ("files", ("adapter_model.bin", b"cos\nsystem\n."))]
    response = await upload(world, files)
    assert response.status_code == 422
    assert "safetensors" in response.json()["error"]["message"]
    assert await nothing_new(world)


@pytest.mark.parametrize("name", ["../../evil/adapter_config.json", "/etc/adapter_config.json"])
async def test_an_upload_that_names_another_folder_is_refused(world, adapters, name):
    files = files_of(adapters[3], "adapter_model.safetensors")
    files.append(("files", (name, (adapters[3] / "adapter_config.json").read_bytes())))
    response = await upload(world, files)
    assert response.status_code == 422
    assert "path_traversal" in {reason["code"] for reason in response.json()["error"]["reasons"]}
    assert await nothing_new(world)


async def test_an_upload_of_two_adapters_at_once_is_refused(world, adapters):
    response = await upload(world, files_of(adapters[3]) + files_of(adapters[2]))
    assert response.status_code == 400
    assert "same name" in response.json()["error"]["message"]


async def test_a_quarantined_registration_says_why(world, adapters):
    world.engine.inert.add("translate")
    response = await add(world, adapters[3])
    assert response.status_code == 201
    body = response.json()
    assert body["state"] == "quarantined"
    assert body["checks"][0]["value"] == 0.0
    assert "nats" in body["reasons"][0]
    assert (await world.ask("auto", FRENCH)).json()["model"] == "tiny"


async def test_an_engine_that_refuses_leaves_nothing(world, adapters):
    world.engine.refuses.add("translate")
    response = await add(world, adapters[3])
    assert response.status_code == 422
    assert response.json()["error"]["reasons"][0]["code"] == "engine_refused"
    assert await nothing_new(world)


BAD_BODIES = [
    (b"{", "application/json", "JSON"),
    (b"[]", "application/json", "object"),
    (b'{"name": "x"}', "application/json", "source"),
    (b'{"source": {"folder": "/"}}', "application/json", "name"),
    (b'{"name": "x", "source": {"folder": "/"}, "smaples": []}', "application/json", "smaples"),
    (b'{"name": "x", "source": {"git": "/"}}', "application/json", "source"),
    (b'{"name": 7, "source": {"hub": "a/b"}}', "application/json", "name"),
    (b'{"name": "x", "source": {"hub": "a/b"}, "samples": [" "]}', "application/json", "samples"),
    (b'{"name": "x", "source": {"hub": "a/b"}, "samples": [{"prompt": ""}]}', "application/json", "samples"),
    (b'{"name": "x", "source": {"hub": "a/b"}, "samples": [{"question": "a"}]}', "application/json", "samples"),
    (b'{"name": "x", "source": {"hub": "a/b"}, "visibility": "secret"}', "application/json", "visibility"),
    (b'{"name": "x", "source": {"hub": "a/b"}, "description": "\\u0000"}', "application/json", "NUL"),
    (b'{"name": "x", "source": {"hub": "a/b"}, "description": "\\ud800"}', "application/json", ""),
    (b"{}", "text/plain", "text/plain"),
    (b"", "", "nothing"),
    (b"--x--", "multipart/form-data; boundary=x", ""),
    (b"nonsense", "multipart/form-data; boundary=x", ""),
    (b"nonsense", "multipart/form-data", ""),
    (b"name=x", "application/x-www-form-urlencoded", "urlencoded"),
]


async def test_bad_descriptions_are_a_400_that_names_the_field(world):
    for content, kind, says in BAD_BODIES:
        response = await world.http.post("/v1/experts", content=content, headers={"content-type": kind})
        assert response.status_code == 400, (content, response.text)
        error = response.json()["error"]
        assert says in error["message"], (content, error)
        assert error["type"] == "invalid_request_error"
    assert await nothing_new(world)


@pytest.mark.parametrize(
    ("data", "files", "says"),
    [
        ({}, [("files", ("adapter_config.json", b"{}"))], "'expert'"),
        ({"expert": "{"}, [("files", ("adapter_config.json", b"{}"))], "JSON"),
        ({"expert": '{"nmae": "x"}'}, [("files", ("adapter_config.json", b"{}"))], "nmae"),
        ({"expert": json.dumps(ABOUT)}, [("weights", ("adapter_config.json", b"{}"))], "weights"),
        ({"expert": json.dumps(ABOUT)}, [("files", (f"{k}.txt", b"{}")) for k in range(9)], "Too many files"),
    ],
)
async def test_bad_uploads_are_a_400(world, data, files, says):
    response = await world.http.post("/v1/experts", data=data, files=files)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["auto", "tiny", "Upper", "a b", "", "../x", "a/b", "x" * 65, "é"])
async def test_names_that_would_confuse_are_refused(world, adapters, name):
    response = await add(world, adapters[3], name=name)
    assert response.status_code == 422
    assert await nothing_new(world)


async def test_a_disk_that_fills_while_an_upload_arrives_is_a_507(world, adapters, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile.write", full)
    response = await upload(world, files_of(adapters[3]))
    assert response.status_code == 507
    assert response.json()["error"]["code"] == "store_full"


async def test_a_disk_that_fills_while_files_are_stored_is_a_507_and_leaves_nothing(world, adapters, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapters_registry.store.os.fsync", full)
    response = await add(world, adapters[3])
    assert response.status_code == 507
    assert await nothing_new(world)


# Progress


async def test_progress_is_streamed_and_ends_with_the_expert(world, adapters):
    response = await world.http.post("/v1/experts?stream=true", json=from_folder(adapters[3]))
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    stages = [data["stage"] for name, data in found if name == "progress"]
    assert list(dict.fromkeys(stages)) == ["fetch", "validate", "store", "try", "embed", "done"]
    assert all(0 <= data["fraction"] <= 1 for name, data in found if name == "progress")
    assert found[-1][0] == "expert"
    assert found[-1][1]["state"] == "active"


async def test_a_streamed_refusal_ends_with_the_error(world, adapters):
    response = await world.http.post("/v1/experts?stream=true", json=from_folder(adapters[1]))
    name, data = events(response.text)[-1]
    assert name == "error"
    assert data["error"]["reasons"][0]["code"] == "content_registered"


async def test_a_streamed_failure_of_ours_is_logged_and_not_told(world, adapters, caplog, monkeypatch):
    def fails(*args):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(world.registry, "prepare", fails)
    response = await world.http.post("/v1/experts?stream=true", json=from_folder(adapters[3]))
    name, data = events(response.text)[-1]
    assert name == "error"
    assert data["error"]["code"] == "internal_error"
    assert "a bug of ours" not in response.text
    assert "a bug of ours" in caplog.text


async def test_a_long_registration_keeps_the_stream_open(world, adapters, monkeypatch, until):
    monkeypatch.setattr("serving.endpoints.streams.HEARTBEAT", 0.01)
    world.engine.gate.clear()
    call = world.call("/v1/experts", from_folder(adapters[3]), query=b"stream=true")
    seen = b""
    while b": still at it" not in seen:
        seen += (await call.next()).get("body", b"")
    world.engine.gate.set()
    await call.done()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_half_way_leaves_a_whole_registration(world, adapters, until, stream):
    world.engine.gate.clear()
    call = world.call("/v1/experts", from_folder(adapters[3]), query=b"stream=true" if stream else b"")
    await until(lambda: world.engine.waiting)
    call.hang_up()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    world.engine.gate.set()
    await until(lambda: world.service.active("translate"))
    assert (await world.ask("auto", FRENCH)).json()["model"] == "translate"


async def test_an_upload_s_files_outlive_a_client_that_leaves(world, adapters, until):
    world.engine.gate.clear()
    request = world.http.build_request(
        "POST", "/v1/experts", data={"expert": json.dumps(ABOUT)}, files=files_of(adapters[3])
    )
    kind = {"content-type": request.headers["content-type"]}
    call = world.call("/v1/experts", None, headers=kind, content=await request.aread())
    await until(lambda: world.engine.waiting)
    call.task.cancel()
    world.engine.gate.set()
    await until(lambda: world.service.active("translate"))


# Looking up


async def test_experts_are_listed_with_what_is_known_of_them(world):
    body = (await world.http.get("/v1/experts")).json()
    assert body["object"] == "list"
    assert [each["name"] for each in body["data"]] == ["count", "reverse", "shout"]
    assert not any(each["loaded"] for each in body["data"])
    one = (await world.http.get("/v1/experts/reverse")).json()
    assert one["sample_prompts"][0] == {"prompt": "spell banana backwards", "answer": None}


async def test_states_can_be_asked_for(world, adapters):
    await add(world, adapters[3], stage=True)
    names = [each["name"] for each in (await world.http.get("/v1/experts?state=staged")).json()["data"]]
    assert names == ["translate"]
    both = (await world.http.get("/v1/experts?state=staged&state=active")).json()["data"]
    assert len(both) == 4
    assert (await world.http.get("/v1/experts?state=sleeping")).status_code == 400


async def test_what_is_not_there_is_a_404_that_says_what_is(world):
    for path, code in (
        ("/v1/experts/rhyme", "expert_not_found"),
        ("/v1/experts/rhyme/versions", "expert_not_found"),
        ("/v1/experts/reverse?version=7", "version_not_found"),
    ):
        response = await world.http.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == code
    assert "count, reverse, shout" in (await world.http.get("/v1/experts/rhyme")).json()["error"]["message"]
    assert (await world.http.get("/v1/experts/reverse?version=0")).status_code == 400


# Changing


async def test_versions_are_added_promoted_and_rolled_back(world, adapters):
    assert (await add(world, adapters[3], name="reverse")).status_code == 422  # not by accident
    response = await add(world, adapters[3], name="reverse", new_version=True)
    assert (response.status_code, response.json()["version"]) == (201, 2)
    versions = (await world.http.get("/v1/experts/reverse/versions")).json()["data"]
    assert [(each["version"], each["state"]) for each in versions] == [(1, "retired"), (2, "active")]

    response = await world.http.post("/v1/experts/reverse/promote", json={"version": 1})
    assert (response.json()["version"], response.json()["state"]) == (1, "active")
    assert world.service.active("reverse").version == 1
    response = await world.http.post("/v1/experts/reverse/rollback")
    assert response.json()["version"] == 2
    await world.ask("reverse", "x")
    assert world.engine.asked[-1].body["model"] == world.service.active("reverse").id


async def test_a_staged_version_answers_once_it_is_promoted(world, adapters):
    await add(world, adapters[3], stage=True)
    assert (await world.ask("translate", "x")).status_code == 404
    assert (await world.ask("auto", FRENCH)).json()["model"] == "tiny"
    await world.http.post("/v1/experts/translate/promote", json={"version": 1})
    assert (await world.ask("auto", FRENCH)).json()["model"] == "translate"


async def test_a_quarantined_version_is_promoted_only_by_force(world, adapters):
    world.engine.inert.add("translate")
    await add(world, adapters[3])
    response = await world.http.post("/v1/experts/translate/promote", json={"version": 1})
    assert response.status_code == 409
    assert "nats" in response.json()["error"]["message"]
    response = await world.http.post("/v1/experts/translate/promote", json={"version": 1, "force": True})
    assert response.json()["state"] == "active"


async def test_a_retired_expert_is_routed_around_and_comes_back(world):
    assert (await world.http.post("/v1/experts/reverse/retire")).json()["state"] == "retired"
    assert (await world.ask("auto", "spell cherry backwards")).json()["model"] == "tiny"
    assert (await world.http.post("/v1/experts/reverse/retire")).status_code == 404
    await world.http.post("/v1/experts/reverse/rollback")
    assert (await world.ask("auto", "spell cherry backwards")).json()["model"] == "reverse"


async def test_changed_samples_are_routed_by_at_once(world):
    change = {"samples": ["say banana in french"], "description": "Speaks.", "tags": ["a"], "licence": "MIT"}
    body = (await world.http.patch("/v1/experts/reverse", json=change)).json()
    assert (body["description"], body["tags"], body["licence"], body["samples"]) == ("Speaks.", ["a"], "MIT", 1)
    assert (await world.ask("auto", FRENCH)).json()["model"] == "reverse"
    body = (await world.http.patch("/v1/experts/reverse", json={})).json()
    assert body["description"] == "Speaks."


BAD_CHANGES = [{"colour": "red"}, {"tags": "a"}, {"samples": [7]}, {"visibility": "secret"}, {"description": "\0"}, []]


async def test_bad_changes_are_a_400_and_change_nothing(world):
    before = (await world.http.get("/v1/experts/reverse")).json()
    for change in BAD_CHANGES:
        response = await world.http.patch("/v1/experts/reverse", json=change)
        assert response.status_code == 400, (change, response.text)
    for body in ({}, {"version": 0}, {"version": "one"}, {"version": 1, "froce": True}):
        assert (await world.http.post("/v1/experts/reverse/promote", json=body)).status_code == 400, body
    assert (await world.http.get("/v1/experts/reverse")).json() == before


async def test_a_removed_expert_is_forgotten(world):
    response = await world.http.delete("/v1/experts/reverse")
    assert response.json() == {"object": "expert.deleted", "name": "reverse", "version": None, "deleted": True}
    assert (await world.http.get("/v1/experts/reverse")).status_code == 404
    assert (await world.http.delete("/v1/experts/reverse")).status_code == 404
    assert (await world.ask("auto", "spell cherry backwards")).json()["model"] == "tiny"


async def test_one_version_can_be_removed(world, adapters):
    await add(world, adapters[3], name="reverse", new_version=True)
    assert (await world.http.delete("/v1/experts/reverse?version=1")).status_code == 200
    versions = (await world.http.get("/v1/experts/reverse/versions")).json()["data"]
    assert [each["version"] for each in versions] == [2]


async def test_what_is_registered_is_there_after_a_restart(serve, adapters, base):
    async with serve() as world:
        await add(world, adapters[3])
    async with serve() as world:
        assert (await world.ask("auto", FRENCH)).json()["model"] == "translate"
    with Registry.open(world.folder, base=base) as registry:
        assert registry.get("translate").checks[0].value == 0.25


# Tenants


@pytest.fixture
async def tenants(serve, adapters):
    """Ann has a private expert; Bob must not learn of it. The headers of ann, bob and the operator."""
    async with serve() as world:
        create = world.registry.keys.create
        headers = {}
        for owner in ("ann", "bob", "operator"):
            _, token = await asyncio.to_thread(create, owner, ["infer", "admin"])
            headers[owner] = {"authorization": f"Bearer {token}"}
        body = from_folder(adapters[3], visibility="private")
        response = await world.http.post("/v1/experts", json=body, headers=headers["ann"])
        assert response.json()["owner"] == "ann"
        yield world, headers


async def test_another_tenant_s_private_expert_is_invisible_everywhere(tenants):
    world, headers = tenants
    bob = headers["bob"]
    asked = [
        await world.http.get("/v1/models", headers=bob),
        await world.http.get("/v1/models/translate", headers=bob),
        await world.http.get("/v1/experts", headers=bob),
        await world.http.get("/v1/experts?state=active&state=retired", headers=bob),
        await world.http.get("/v1/experts/rhyme", headers=bob),
        await world.http.post("/v1/unload_lora_adapter", json={"lora_name": "rhyme"}, headers=bob),
        await world.http.get("/metrics", headers=bob),
        await world.http.get("/ready"),
        await world.http.post("/v1/route", json={"prompt": FRENCH}, headers=bob),
        await world.ask("auto", FRENCH, headers=bob),
    ]
    assert asked[-1].json()["model"] == "tiny"
    for response in asked:
        without = response.text.replace("The model 'translate' does not exist", "").replace(FRENCH, "")
        assert "translate" not in without, response.url
        assert "french" not in without
        assert "translate" not in str(response.headers)


async def test_another_tenant_s_private_expert_cannot_be_named_or_changed(tenants):
    world, headers = tenants
    bob = headers["bob"]
    unknown = await world.ask("unheard-of", "x", headers=bob)
    hidden = await world.ask("translate", "x", headers=bob)
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.json() == json.loads(unknown.text.replace("unheard-of", "translate"))
    for method, path, body in (
        ("GET", "/v1/experts/translate", None),
        ("GET", "/v1/experts/translate/versions", None),
        ("PATCH", "/v1/experts/translate", {"visibility": "public"}),
        ("POST", "/v1/experts/translate/promote", {"version": 1}),
        ("POST", "/v1/experts/translate/rollback", None),
        ("POST", "/v1/experts/translate/retire", None),
        ("DELETE", "/v1/experts/translate", None),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "translate"}),
        ("POST", "/v1/route", {"model": "translate", "prompt": "x"}),
    ):
        response = await world.http.request(method, path, json=body, headers=bob)
        assert response.status_code == 404, (method, path, response.text)


async def test_its_owner_and_the_operator_see_it(tenants):
    world, headers = tenants
    for who in ("ann", "operator"):
        assert (await world.ask("auto", FRENCH, headers=headers[who])).json()["model"] == "translate"
        assert (await world.http.get("/v1/experts/translate", headers=headers[who])).status_code == 200


async def test_a_public_expert_is_changed_by_its_owner_only(tenants):
    world, headers = tenants
    await world.http.patch("/v1/experts/translate", json={"visibility": "public"}, headers=headers["ann"])
    assert (await world.ask("auto", FRENCH, headers=headers["bob"])).json()["model"] == "translate"
    for name in ("translate", "reverse"):
        response = await world.http.delete(f"/v1/experts/{name}", headers=headers["bob"])
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "not_owner"
    assert (await world.http.delete("/v1/experts/translate", headers=headers["ann"])).status_code == 200
