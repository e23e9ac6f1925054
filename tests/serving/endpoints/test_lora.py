"""vLLM's own loading and unloading, going through the registry."""

from __future__ import annotations

import json
import shutil

import pytest

NAME = "sql"


async def load(world, path, name=NAME, **more):
    body = {"lora_name": name, "lora_path": str(path), **more}
    return await world.http.post("/v1/load_lora_adapter", json=body)


async def unload(world, name=NAME):
    return await world.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def test_a_loaded_adapter_can_be_asked_for_as_in_vllm(world, adapters):
    response = await load(world, adapters[3], lora_int_id=7)  # vLLM's clients send more than we need
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'sql' added successfully."
    assert (await world.ask(NAME, "x")).json()["model"] == NAME
    assert world.service.active(NAME).version == 1


async def test_an_unloaded_adapter_is_gone_as_in_vllm(world, adapters):
    await load(world, adapters[3])
    response = await unload(world)
    assert response.text == "Success: LoRA adapter 'sql' removed successfully."
    assert (await world.ask(NAME, "x")).status_code == 404
    assert (await unload(world)).status_code == 404


async def test_what_was_unloaded_can_be_loaded_again(world, adapters):
    for _ in range(3):
        assert (await load(world, adapters[3])).status_code == 200
        assert (await world.ask(NAME, "x")).status_code == 200
        assert (await unload(world)).status_code == 200
    assert [each.version for each in world.registry.versions(NAME)] == [1]


async def test_loading_again_brings_back_the_version_with_that_very_content(world, adapters, tmp_path):
    await load(world, adapters[3])
    other = shutil.copytree(adapters[3], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_bytes())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    world.service.settings.registry.__dict__["import_dirs"] = (tmp_path, adapters[3].parent)
    assert (await load(world, other, load_inplace=True)).status_code == 200
    assert world.service.active(NAME).version == 2
    await unload(world)
    assert (await load(world, adapters[3])).status_code == 200
    assert world.service.active(NAME).version == 1


async def test_a_name_that_is_loaded_is_refused_unless_in_place(world, adapters):
    await load(world, adapters[3])
    response = await load(world, adapters[3])
    assert response.status_code == 400
    assert "has already been loaded" in response.json()["error"]["message"]
    assert (await load(world, adapters[3], load_inplace=True)).status_code == 200
    assert world.service.active(NAME).version == 1


async def test_content_that_another_name_has_is_refused(world, adapters):
    response = await load(world, adapters[1])
    assert response.status_code == 422
    assert response.json()["error"]["reasons"][0]["code"] == "content_registered"


async def test_an_adapter_that_changes_nothing_is_not_called_a_success(world, adapters):
    world.engine.inert.add(NAME)
    response = await load(world, adapters[3])
    assert response.status_code == 422
    assert response.json()["error"]["reasons"][0]["code"] == "quarantined"
    assert (await load(world, adapters[3])).status_code == 409  # nor is it by trying again


@pytest.mark.parametrize(
    ("path", "status"),
    [("/etc", 403), ("~/x", 403), ("./x", 403), ("x", 403), ("a/b/c", 403), ("/\0", 400), ("a/\0", 400)],
)
async def test_paths_are_held_to_the_import_folders(world, path, status):
    assert (await load(world, path)).status_code == status


async def test_a_path_like_org_name_means_the_hub(world, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    response = await load(world, "org/name")
    assert response.status_code == 502
    assert "'org/name'" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["tiny", "auto", "unheard-of"])
async def test_only_experts_can_be_unloaded(world, name):
    response = await unload(world, name)
    assert response.status_code == 404
    assert "count, reverse, shout" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"lora_name": "x"}, {"lora_path": "x"}, {"lora_name": 7, "lora_path": "x"}, []])
async def test_bad_bodies_are_a_400(world, body):
    response = await world.http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
